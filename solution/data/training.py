"""Training and validation batches: a planned sample to the member's view and its forgery mask, and the loaders.

Takes `Item`s and plans of `Sample`s; gives views (side, side, 3) uint8 with masks (side, side) float32, and `Batch`es.
All randomness comes from (seed, epoch, position), so an interrupted run replays exactly and ranks never disagree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from solution.config import AugmentConfig, DegradationConfig, MemberConfig, SamplingConfig
from solution.data.degradation import degrade, use_one_opencv_thread
from solution.data.epochs import Sample
from solution.data.faces import FaceLocator, crop_square, large_enough, make_view, view_box
from solution.data.guard import Watch, guarded, look_at, one_by_one
from solution.data.images import UnreadableInput, decode_image, decode_mask, resize_image
from solution.data.manifest import DropReport, Item
from solution.data.self_blend import face_region, self_blend
from solution.data.views import (
    View,
    find_face,
    locators_for,
    open_picture,
    quiet_worker,
    see,
    stack_views,
)
from solution.io import stamp
from solution.records import Batch, FaceBox


class Augmentation:
    """Flip, rotation and square crop, on picture and mask together, then the picture's look, through albumentations."""

    def __init__(self, config: AugmentConfig):
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import otherwise asks the network for news
        import albumentations
        import cv2

        side = config.side
        smallest = max(1, int(side * config.crop_min))
        self.compose = albumentations.Compose(
            [
                albumentations.HorizontalFlip(p=config.flip_p),
                albumentations.Rotate(
                    limit=(-config.rotate_degrees, config.rotate_degrees),
                    border_mode=cv2.BORDER_REFLECT_101,
                    p=config.rotate_p,
                ),
                albumentations.RandomSizedCrop(min_max_height=(smallest, side), size=(side, side), p=config.crop_p),
                albumentations.ColorJitter(
                    brightness=(0.6, 1.5),
                    contrast=(0.6, 1.4),
                    saturation=(0.3, 1.7),
                    hue=(-0.03, 0.03),
                    p=config.colour_p,
                ),
                albumentations.OneOf(
                    [
                        albumentations.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.5)),
                        albumentations.Sharpen(alpha=(0.1, 0.5), lightness=(1.0, 1.0)),
                    ],
                    p=config.sharpness_p,
                ),
            ]
        )
        # Each is seeded apart: `set_random_seed` hands one seed down to all, after which they fire together, with tied
        # parameters. The outer before the inner, for that.
        self.parts = list(_all_in(self.compose, albumentations.BaseCompose))

    def __call__(
        self, image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """image (S, S, 3) uint8 and mask (S, S) float32 or None, moved alike."""
        for part in self.parts:
            part.set_random_seed(int(rng.integers(2**31)))
        if mask is None:
            return self.compose(image=image)["image"], None
        moved = self.compose(image=image, mask=mask)
        return moved["image"], moved["mask"]


def _all_in(composed: Any, kind: type) -> Iterator[Any]:
    """An albumentations composition (of `kind`) and everything in it, the outer before the inner."""
    yield composed
    for transform in composed.transforms:
        yield from _all_in(transform, kind) if isinstance(transform, kind) else (transform,)


class TrainingViews(Dataset):
    """Planned samples to (view uint8 (side, side, 3), label, mask (side, side) float32, mask_known, name)."""

    def __init__(
        self,
        items: Sequence[Item],
        config: MemberConfig,
        faces: dict[str, FaceBox | None],
        seed: int,
    ):
        self.items, self.config, self.faces, self.seed = (
            list(items),
            config,
            faces,
            seed,
        )
        self.with_masks = config.needs_masks
        self.watch = Watch()
        self._augmentation: Augmentation | None = None

    def __getitem__(self, sample: Sample) -> tuple[np.ndarray, int, np.ndarray | None, bool, str] | None:
        """The sample, or None for an unreadable picture under `sampling.on_unreadable=drop`."""
        try:
            with self.watch.file(sample.index, self.items[sample.index].path):
                return self._sample(sample)
        except UnreadableInput:  # the picture, its mask or its donor
            if self.config.sampling.on_unreadable == "fail":
                raise
            return None

    def batch(self, samples: Sequence[Sample]) -> Batch | None:
        """The samples together."""
        return collate([self[sample] for sample in samples])

    def again(self, number: int, _: Sequence[list[Sample]]) -> None:
        """As `guarded` wants it: the picture of this number as a sample."""
        self._sample(Sample(0, 0, number, False))

    def _donor(self, number: int) -> np.ndarray:
        path = self.items[number].path
        with self.watch.file(number, path):
            return decode_image(path)

    def _sample(self, sample: Sample) -> tuple[np.ndarray, int, np.ndarray | None, bool, str]:
        rng = np.random.default_rng([self.seed, sample.epoch, sample.position, 303])
        item = self.items[sample.index]
        image = decode_image(item.path)
        donor = int(rng.integers(len(self.items)))
        label = 1 if sample.blend else item.label
        face = self.faces.get(item.name)
        image, mask, known = self._forgery(image, item, face, sample.blend, rng)
        image, mask = self._square(image, mask, large_enough(face, *image.shape[:2], self.config.face))
        if self._augmentation is None:  # built in the worker: the import is slow
            self._augmentation = Augmentation(self.config.augment)
        image, mask = self._augmentation(image, mask, rng)
        image = degrade(
            np.ascontiguousarray(image),
            self.config.degradation,
            rng,
            lambda: self._donor(donor),
        )
        # The same resize-and-slice, of a picture that is already the member's source.
        whole = replace(self.config.view, source="image")
        image = make_view(image, whole, None, self.config.face)
        if mask is not None:
            mask = make_view(np.ascontiguousarray(mask), whole, None, self.config.face).clip(0, 1)
        return image, label, mask, known, item.name

    def _forgery(
        self,
        image: np.ndarray,
        item: Item,
        face: FaceBox | None,
        blend: bool,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray | None, bool]:
        """The picture, blended when planned, and its forgery mask (None when the member takes none)."""
        if blend:
            image, mask = self_blend(image, face, rng)
            return image, mask if self.with_masks else None, True
        if not self.with_masks:
            return image, None, False
        if item.label == 0:
            return image, np.zeros(image.shape[:2], np.float32), True
        if item.mask == "whole" or item.generator in self.config.sampling.fully_generated:
            return image, face_region(image.shape, face), face is not None  # where there is none, it is the centre
        if item.mask:
            mask = decode_mask(item.mask)
            # A fake of which nothing is forged: the mask is wrong, and what is forged not known.
            return image, resize_image(mask, image.shape[1], image.shape[0]), bool(mask.any())
        return image, np.zeros(image.shape[:2], np.float32), False

    def _square(
        self, image: np.ndarray, mask: np.ndarray | None, face: FaceBox | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The member's source, whole picture or face crop, as an `augment.side` square, with its mask."""
        box = view_box(self.config.view, face, image.shape[:2], self.config.face)
        if box is not None:
            image = crop_square(image, box)
            mask = None if mask is None else crop_square(mask, box)
        side, growth = self.config.augment.side, self.config.view.growth
        image = resize_image(image, side, side, growth)
        return image, None if mask is None else resize_image(mask, side, side, growth)


class ValidationViews(Dataset):
    """Items to the member's view as submission sees it: degraded at their own size first, then located, then cut."""

    def __init__(
        self,
        items: Sequence[Item],
        config: MemberConfig,
        degradation: DegradationConfig | None,
        seed: int,
    ):
        self.items, self.config, self.degradation, self.seed = (
            list(items),
            config,
            degradation,
            seed,
        )
        self.views = (View.of(config),)
        self.locators = locators_for(self.views)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> np.ndarray:
        """(side, side, 3) uint8."""
        item = self.items[index]
        picture = open_picture(item.path, item.name, self.degradation, self.seed)
        (view,) = see(picture, self.views, self.locators)
        return view


def readable(
    items: Sequence[Item], on_unreadable: str, report: DropReport, *, workers: int, progress: bool
) -> list[Item]:
    """The validation pictures that can be read: known before the first step, not after an epoch.

    on_unreadable: as in `SamplingConfig`; under `drop` the others go into `report`. workers: processes that read; a file at
    which one dies cannot be read.

    Raises:
        UnreadableInput: one cannot be read, under `fail`.
    """
    from tqdm import tqdm

    kept = []
    looks = look_at([item.path for item in items], _reads, workers=min(workers, len(items)), start=quiet_worker)
    for item, (_, reason) in zip(items, tqdm(looks, "validation set", len(items), leave=False, disable=not progress)):
        if reason and on_unreadable == "fail":
            raise UnreadableInput(item.path, reason)
        if reason:
            report.add(item.name, f"validation: {reason}")
        else:
            kept.append(item)
    return kept


def _reads(path: Path) -> None:
    decode_image(path)


def tell_masks(items: Sequence[Item], sampling: SamplingConfig, *, workers: int = 0) -> str:
    """A line for the start: how many fakes have a forgery mask, each opened once; a real picture needs none.

    workers: processes that open them; a mask at which one dies cannot be read.

    Raises:
        UnreadableInput: a mask that cannot be read, under `sampling.on_unreadable=fail`; else it is counted.
    """
    fakes = [item for item in items if item.label]
    whole = [item for item in fakes if item.mask == "whole" or item.generator in sampling.fully_generated]
    named = {item.name for item in whole}
    masked = [item for item in fakes if item.mask and item.name not in named]
    known, black, unreadable, inverted = len(whole), [], [], []
    paths = [Path(item.mask) for item in masked]
    looks = look_at(paths, _says_something, workers=min(workers, len(paths)), start=quiet_worker)
    for item, (some, reason) in zip(masked, looks):
        if reason and sampling.on_unreadable == "fail":
            raise UnreadableInput(item.mask, reason)
        known += bool(some)
        if some == _FRAME:
            inverted.append(item.name)
        if reason:
            unreadable.append(item.name)
        elif not some:
            black.append(item.name)
    text = f"masks: {known} of {len(fakes)} fakes"
    if black:
        text += f"; {len(black)} are black, nothing forged, and count as not known (e.g. of {black[0]})"
    if unreadable:
        text += f"; {len(unreadable)} cannot be read, and their pictures are dropped (e.g. of {unreadable[0]})"
    if 2 * len(inverted) > len(masked):
        text += (
            f"; {len(inverted)} call the whole border forged and something within not, as inverted ones do: 255 or white is "
            f"forged, 0 or black is not (e.g. of {inverted[0]})"
        )
    return text


_NOTHING, _SOMETHING, _FRAME = range(3)


def _says_something(mask: Path) -> int:
    """Whether a mask marks nothing, something, or its whole border and not all within."""
    marked = decode_mask(mask)
    forged = marked > 0.5
    border = np.concatenate([forged[0], forged[-1], forged[:, 0], forged[:, -1]])
    return _FRAME if border.all() and not forged.all() else _SOMETHING if marked.any() else _NOTHING


# ------------------------------------------------------------------------------------------------ loaders
def collate(samples: list) -> Batch | None:
    """Training samples to a `Batch`; samples dropped by policy are None and leave a smaller batch (None when empty)."""
    samples = [s for s in samples if s is not None]
    if not samples:
        return None
    images, labels, masks, known, names = zip(*samples)
    with_masks = masks[0] is not None
    return Batch(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor(labels),
        masks=torch.from_numpy(np.stack(masks).astype(np.float32)) if with_masks else None,
        mask_known=torch.tensor(known) if with_masks else None,
        names=tuple(names),
    )


def training_loader(views: TrainingViews, plan: list[list[Sample]], *, workers: int) -> Iterator[Batch | None]:
    """Batches of `plan`, in its order; a picture at which a worker dies is an unreadable one."""
    use_one_opencv_thread()

    def load(batches: Iterable[list[Sample]]) -> DataLoader:
        return DataLoader(
            views,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),  # else starting it would draw from the generator of the members' dropout
            prefetch_factor=4,
            pin_memory=torch.cuda.is_available(),
        )

    views.watch = Watch(workers)
    if workers:
        return guarded(plan, load, views.watch, views.again)
    return one_by_one(plan, views.batch, views.watch, views.again, quiet_worker)


def validation_loader(views: ValidationViews, *, batch: int, workers: int) -> DataLoader:
    """View batches (B, 3, side, side) uint8, in the order of the items."""
    use_one_opencv_thread()
    return DataLoader(
        views,
        batch_size=batch,
        num_workers=workers,
        collate_fn=stack_views,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )


def locate_faces(
    items: Sequence[Item], config: MemberConfig, cache: Path, *, workers: int = 0, progress: bool = True
) -> dict[str, FaceBox | None]:
    """The chosen face of every item, however small, from `cache` (JSON lines, appended as it goes) where it is known already.

    A line is name, size and time of the file, face: what has been replaced since is located again. workers: processes
    that search; a file at which one dies is an unreadable one.
    """
    from tqdm import tqdm

    use_one_opencv_thread()
    cached = _cached_faces(cache)
    stamps = {item.name: stamp(item.path)[:2] for item in items}
    known = {name: cached[name, *own] for name, own in stamps.items() if (name, *own) in cached}
    todo = [item for item in items if item.name not in known]
    if not todo:
        return known
    cache.parent.mkdir(parents=True, exist_ok=True)
    look = partial(_face_of, locator=FaceLocator(replace(config.face, min_area=0.0)))
    found = look_at([item.path for item in todo], look, workers=min(workers, len(todo)), start=quiet_worker)
    with cache.open("a") as file:
        for item, (face, reason) in zip(todo, tqdm(found, "faces", len(todo), unit="picture", disable=not progress)):
            if reason and config.sampling.on_unreadable == "fail":
                raise UnreadableInput(item.path, reason)
            if reason:
                continue  # the loader drops it and counts it
            known[item.name] = face
            file.write(json.dumps([item.name, *stamps[item.name], face]) + "\n")
    return known


def _face_of(path: Path, locator: FaceLocator) -> FaceBox | None:
    return find_face(decode_image(path), locator)


def _cached_faces(cache: Path) -> dict[tuple[str, int, int], FaceBox | None]:
    faces = {}
    for line in cache.read_text().splitlines() if cache.exists() else ():
        try:
            name, size, changed, box = json.loads(line)
        # The torn last line of an interrupted run, and lines without size and time, are located again.
        except ValueError:
            continue
        faces[name, size, changed] = None if box is None else _box(box)
    return faces


def _box(values: list) -> FaceBox:
    *numbers, landmarks = values
    return FaceBox(*numbers, None if landmarks is None else tuple(tuple(p) for p in landmarks))
