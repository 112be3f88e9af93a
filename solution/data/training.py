"""Manifests (CSV, folders, DeepfakeBench JSON) to batches; balanced sampling.

A manifest becomes a list of `Item`; an epoch becomes a plan of batches, a pure function of (items, config, seed, epoch);
a planned sample becomes the member's view (side, side, 3) uint8 and, where asked for, its forgery mask. All randomness
comes from (seed, epoch, position), so an interrupted run replays exactly and ranks never disagree.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from solution.config import (
    AugmentConfig,
    ConfigError,
    DegradationConfig,
    MemberConfig,
    SamplingConfig,
    ViewConfig,
)
from solution.data.degradation import degrade, use_one_opencv_thread
from solution.data.faces import FaceLocator, choose_face, crop_square, make_view, view_box
from solution.data.images import IMAGE_SUFFIXES, UnreadableInput, decode_image, resize_image
from solution.data.self_blend import face_region, self_blend
from solution.errors import UsageError
from solution.records import Batch, FaceBox


class ManifestError(UsageError):
    """A manifest that cannot be used: names the file, the row, what was found and what was expected."""


@dataclass(frozen=True)
class Item:
    """One picture of a manifest. `name` is its path as the manifest writes it; scores join by it."""

    name: str
    path: Path
    label: int
    source: str = ""
    split: str = ""
    generator: str = ""
    video: str = ""
    mask: str = ""


@dataclass
class DropReport:
    """Every row that a manifest lost, and why."""

    dropped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.dropped.append((name, reason))

    def summary(self) -> str:
        """One line a reason, with its count and an example."""
        examples: dict[str, str] = {}
        for name, reason in self.dropped:
            examples.setdefault(reason, name)
        counts = Counter(reason for _, reason in self.dropped)
        return "\n".join(f"dropped {n}: {reason} (e.g. {examples[reason]})" for reason, n in counts.most_common())


# ------------------------------------------------------------------------------------------------ manifests
def read_manifest(
    source: Path | str, *, split: str | None = None, videos: bool = False
) -> tuple[list[Item], DropReport]:
    """The pictures of a manifest, in its order, and a report of the rows left out.

    source: a CSV (`path,label[,source,split,generator,mask,video]`, paths relative to it), a folder with `real/` and
    `fake/`, or a DeepfakeBench JSON (in the folder its frames are relative to; the forgery masks lie beside the frames,
    `masks` for `frames` in the path, where a release has them). split: keep only rows of that split; of rows that name
    none, a tenth of the videos or pictures, by name, is `val` and the rest `train`.
    videos: keep rows whose path is a video file too; a row is otherwise a picture.

    Raises:
        ManifestError: nothing usable in it, an unknown layout, a bad label, or a missing column.
    """
    source = Path(source)
    items, report, seen = [], DropReport(), set()
    for item in _rows(source):
        if split is not None and split != (item.split or _held_out(item)):
            continue
        suffix = item.path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES and not videos:
            report.add(item.name, f"not a picture ({suffix or 'no suffix'})")
        elif not item.path.exists():
            report.add(item.name, "file is missing")
        elif item.name in seen:
            report.add(item.name, "listed twice")
        else:
            seen.add(item.name)
            items.append(item)
    if not items:
        wanted = f" of split {split!r}" if split else ""
        raise ManifestError(f"{source}: no usable picture{wanted}\n{report.summary()}".rstrip())
    return items, report


def _rows(source: Path) -> Iterator[Item]:
    """Every row of a manifest, as it stands there."""
    if not source.exists():
        raise ManifestError(f"{source}: no such manifest; expected a CSV, a DeepfakeBench JSON, or a folder")
    if source.is_dir():
        return _folder_rows(source)
    if source.suffix.lower() == ".csv":
        return _csv_rows(source)
    if source.suffix.lower() == ".json":
        return _deepfakebench_rows(source)
    raise ManifestError(f"{source}: expected a .csv, a .json, or a folder with real/ and fake/")


def manifest_splits(source: Path | str) -> set[str]:
    """The splits that a manifest's rows belong to."""
    return {item.split or _held_out(item) for item in _rows(Path(source))}


def draw_items(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """At most `limit` items, a fixed draw of `seed`, in their old order; 0: all."""
    if not 0 < limit < len(items):
        return list(items)
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in sorted(order[:limit])]


def _held_out(item: Item) -> str:
    """The split of a row that names none: a tenth of the videos (or pictures), by name, is held out as `val`."""
    return "val" if stable_seed(item.video or item.name) % 10 == 0 else "train"


def _csv_rows(source: Path) -> Iterator[Item]:
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"path", "label"} - set(reader.fieldnames or ())
        if missing:
            raise ManifestError(f"{source}: column {', '.join(sorted(missing))} is missing; found {reader.fieldnames}")
        for number, row in enumerate(reader, start=2):
            extra = {k: row.get(k) or "" for k in ("source", "split", "generator", "video", "mask")}
            if not row["path"] or not row["label"]:
                raise ManifestError(f"{source}, line {number}: no path or no label")
            label = _label(row["label"], f"{source}, line {number}")
            if extra["mask"] not in ("", "whole"):
                extra["mask"] = str(source.parent / extra["mask"])
            yield Item(row["path"], source.parent / row["path"], label, **extra)


def _label(text: str, where: str) -> int:
    labels = {"0": 0, "1": 1, "real": 0, "fake": 1}
    if text.strip().lower() not in labels:
        raise ManifestError(f"{where}: label is {text!r}; expected 0 or real, 1 or fake")
    return labels[text.strip().lower()]


def _folder_rows(source: Path) -> Iterator[Item]:
    if not (source / "real").is_dir() or not (source / "fake").is_dir():
        raise ManifestError(f"{source}: expected the folders real/ and fake/ in it")
    for label, name in enumerate(("real", "fake")):
        for path in sorted((source / name).rglob("*")):
            if path.is_file():
                yield Item(path.relative_to(source).as_posix(), path, label, source=source.name)


def _deepfakebench_rows(source: Path) -> Iterator[Item]:
    """dataset -> label -> split -> [compression] -> video -> {label, frames}; frames relative to the JSON's folder."""
    try:
        tree = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ManifestError(f"{source}: no JSON ({error})") from None
    for dataset, labels in tree.items():
        for label_name, splits in labels.items():
            for split, videos in splits.items():
                yield from _deepfakebench_videos(source, dataset, label_name, split, videos)


def _deepfakebench_videos(source: Path, dataset: str, label_name: str, split: str, tree: dict) -> Iterator[Item]:
    for video, entry in tree.items():
        if "frames" not in entry:  # one more level: compression
            yield from _deepfakebench_videos(source, dataset, label_name, split, entry)
            continue
        # DeepfakeBench labels are names such as FF-real, DFDC_Real or a generator's; WhichisReal is one of those.
        words = re.split(r"[^a-z0-9]+", str(entry.get("label", label_name)).lower())
        label = 0 if words[-1] == "real" else 1
        for frame in entry["frames"]:
            name = frame.replace("\\", "/")
            path = Path(name) if Path(name).is_absolute() else source.parent / name
            yield Item(
                name,
                path,
                label,
                dataset,
                split,
                label_name if label else "",
                f"{label_name}/{video}",
                _mask_beside(path) if label else "",
            )


def _mask_beside(frame: Path) -> str:
    """The forgery mask of a DeepfakeBench frame, `masks` for `frames` in its path, a .png; empty where there is none."""
    parts = list(frame.parts)
    if "frames" not in parts:
        return ""
    parts[len(parts) - 1 - parts[::-1].index("frames")] = "masks"
    mask = Path(*parts).with_suffix(".png")
    return str(mask) if mask.is_file() else ""


def known_masks(items: Sequence[Item], sampling: SamplingConfig) -> tuple[int, int]:
    """How many fake pictures have a forgery mask, and how many fakes there are; a real one needs none."""
    fakes = [item for item in items if item.label]
    whole = set(sampling.fully_generated)
    return sum(bool(i.mask) or i.generator in whole for i in fakes), len(fakes)


def select(items: Sequence[Item], sampling: SamplingConfig, seed: int) -> tuple[list[Item], DropReport]:
    """`items` after the frame cap per video and the per-source caps and drop rates, a fixed draw of `seed`."""
    rng = np.random.default_rng([seed, 101])
    report, kept = DropReport(), []
    videos: dict[tuple[str, int, str], list[Item]] = defaultdict(list)
    for item in items:
        if item.video:
            videos[item.source, item.label, item.video].append(item)
    spread = set()
    for frames in videos.values():  # the middle frame of each of equal stretches
        count = min(sampling.frames, len(frames))
        places = ((np.arange(count) + 0.5) * len(frames) / count).astype(int)
        spread |= {frames[place].name for place in places}
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.video and item.name not in spread:
            report.add(item.name, f"more than {sampling.frames} frames of its video")
            continue
        groups[f"{item.source}/{'fake' if item.label else 'real'}"].append(item)
    cap = _rates("cap", sampling.cap, math.inf)
    drop = _rates("drop", sampling.drop, 1.0)
    unknown = (set(cap) | set(drop)) - set(groups)
    if unknown:
        raise ConfigError(f"sampling.cap/drop name {sorted(unknown)}; the manifest has {sorted(groups)}")
    for key, group in groups.items():
        order = rng.permutation(len(group))
        keep = round(len(group) * (1 - drop.get(key, 0.0)))
        keep = min(keep, int(cap.get(key, keep)))
        for index in order[keep:]:
            report.add(group[index].name, f"cap or drop rate of {key}")
        kept += [group[index] for index in sorted(order[:keep])]
    return kept, report


def _rates(field: str, settings: tuple[str, ...], most: float) -> dict[str, float]:
    rates = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            rates[key] = float(value)
        except ValueError:
            raise ConfigError(f"sampling.{field}: {setting!r} is not SOURCE/real=VALUE or SOURCE/fake=VALUE") from None
        if not 0 <= rates[key] <= most:
            raise ConfigError(f"sampling.{field}: {setting!r} must lie between 0 and {most:g}")
    return rates


# ------------------------------------------------------------------------------------------------ plans
class Sample(NamedTuple):
    """One planned sample: which item, at which position of which epoch, and whether it becomes a self-blended fake."""

    epoch: int
    position: int
    index: int
    blend: bool


def plan_epoch(
    labels: np.ndarray,
    sources: Sequence[str],
    *,
    sampling: SamplingConfig,
    blend_p: float,
    batch: int,
    seed: int,
    epoch: int,
    batches: int = 0,
) -> list[list[Sample]]:
    """The batches of one epoch, over all ranks: a pure function of its arguments.

    labels: (N,) 0/1. `batch` samples each; an epoch draws N samples, the remainder is left out, or as many as `batches`
    take, in whole shuffled passes over the data. With `balanced` or `temperature`, every batch is half real, half fake.
    A fake slot becomes a self-blended real with `blend_p`.

    Raises:
        ConfigError: a class is missing that the balance needs.
    """
    rng = np.random.default_rng([seed, epoch, 202])
    real, fake = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    total = batches * batch or len(labels)
    if sampling.balance == "none":
        order = _passes(np.arange(len(labels)), total, rng)
    else:
        if not len(real) or not len(fake):
            raise ConfigError(
                f"sampling.balance={sampling.balance} needs both classes; real {len(real)}, fake {len(fake)}"
            )
        half = -(-total // 2) if batches else total // 2
        draws = [_draw(group, half, sources, sampling, rng) for group in (real, fake)]
        # real, fake, real, fake: every even batch is half and half
        order = np.stack(draws, axis=1).reshape(-1)[:total]
    blend = (labels[order] == 1) & (rng.random(len(order)) < blend_p)
    if blend.any():
        if not len(real):
            raise ConfigError("augment.self_blend_p needs real pictures to blend")
        order = np.where(blend, rng.choice(real, len(order)), order)
    samples = [Sample(epoch, p, int(i), bool(b)) for p, (i, b) in enumerate(zip(order, blend))]
    return [samples[start : start + batch] for start in range(0, len(samples) - batch + 1, batch)]


def _draw(
    group: np.ndarray,
    count: int,
    sources: Sequence[str],
    sampling: SamplingConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """`count` indices of `group`: whole shuffled passes, or source-weighted draws with `temperature`."""
    if sampling.balance == "balanced":
        return _passes(group, count, rng)
    names = np.array([sources[i] for i in group])
    sizes = Counter(names.tolist())
    # A source of n pictures is drawn with weight n * n ** -temperature; each of its pictures with n ** -temperature.
    weights = np.array([sizes[n] ** -sampling.temperature for n in names])
    return rng.choice(group, count, p=weights / weights.sum())


def _passes(group: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` members of `group`: whole shuffled passes over it, the last one cut."""
    passes = -(-count // len(group))
    return np.concatenate([rng.permutation(group) for _ in range(passes)])[:count]


# ------------------------------------------------------------------------------------------------ samples
def stable_seed(name: str) -> int:
    """A 32-bit number that depends on the name alone: seeds of degraded validation pictures."""
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))


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

    def __call__(
        self, image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """image (S, S, 3) uint8 and mask (S, S) float32 or None, moved alike."""
        self.compose.set_random_seed(int(rng.integers(2**31)))
        if mask is None:
            return self.compose(image=image)["image"], None
        moved = self.compose(image=image, mask=mask)
        return moved["image"], moved["mask"]


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
        self._augmentation: Augmentation | None = None

    def __getitem__(self, sample: Sample) -> tuple[np.ndarray, int, np.ndarray | None, bool, str] | None:
        """The sample, or None for an unreadable picture under `sampling.on_unreadable=drop`."""
        try:
            return self._sample(sample)
        except UnreadableInput:  # the picture, its mask or its donor
            if self.config.sampling.on_unreadable == "fail":
                raise
            return None

    def _sample(self, sample: Sample) -> tuple[np.ndarray, int, np.ndarray | None, bool, str]:
        rng = np.random.default_rng([self.seed, sample.epoch, sample.position, 303])
        item = self.items[sample.index]
        image = decode_image(item.path)
        donor = self.items[int(rng.integers(len(self.items)))]
        label = 1 if sample.blend else item.label
        face = self.faces.get(item.name)
        image, mask, known = self._forgery(image, item, face, sample.blend, rng)
        image, mask = self._square(image, mask, face)
        if self._augmentation is None:  # built in the worker: the import is slow
            self._augmentation = Augmentation(self.config.augment)
        image, mask = self._augmentation(image, mask, rng)
        image = degrade(
            np.ascontiguousarray(image),
            self.config.degradation,
            rng,
            lambda: decode_image(donor.path),
        )
        view = self.config.view
        image = make_view(image, _whole(view), None, self.config.face)
        if mask is not None:
            mask = np.clip(resize_image(np.ascontiguousarray(mask), view.resize, view.resize), 0, 1)
            edge = (view.resize - view.side) // 2
            mask = mask[edge : edge + view.side, edge : edge + view.side]
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
            return image, face_region(image.shape, face), True
        if item.mask:
            mask = decode_image(Path(item.mask))[:, :, 0].astype(np.float32) / 255
            return image, resize_image(mask, image.shape[1], image.shape[0]), True
        return image, np.zeros(image.shape[:2], np.float32), False

    def _square(
        self, image: np.ndarray, mask: np.ndarray | None, face: FaceBox | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The member's source, whole picture or face crop, as an `augment.side` square, with its mask."""
        box = view_box(self.config.view, face, image.shape[:2], self.config.face)
        if box is not None:
            image = crop_square(image, box)
            mask = None if mask is None else crop_square(mask, box)
        side = self.config.augment.side
        return resize_image(image, side, side), None if mask is None else resize_image(mask, side, side)


def _whole(view: ViewConfig) -> ViewConfig:
    """The same resize-and-slice, of a picture that is already the member's source."""
    return replace(view, source="image")


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
        self.locator = FaceLocator(config.face) if config.view.source == "face" else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> np.ndarray:
        """(side, side, 3) uint8."""
        item = self.items[index]
        image = decode_image(item.path)
        if self.degradation is not None:
            image = degraded_picture(image, item.name, self.degradation, self.seed)
        face = None
        if self.locator is not None:
            face = choose_face(self.locator.locate(image), *image.shape[:2], self.config.face)
        return make_view(image, self.config.view, face, self.config.face)


def degraded_picture(image: np.ndarray, name: str, degradation: DegradationConfig, seed: int) -> np.ndarray:
    """The picture as every member sees it degraded: drawn from (seed, name) alone. uint8 in, uint8 out.

    The pasted patch of the distractor is cut from the picture's own mirror image: no second file decides a score.
    """
    rng = np.random.default_rng([seed, stable_seed(name)])
    return degrade(image, degradation, rng, image[:, ::-1])


# ------------------------------------------------------------------------------------------------ loaders
def _worker_init(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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


def training_loader(views: TrainingViews, plan: list[list[Sample]], *, workers: int) -> DataLoader:
    """Batches of `plan`, in its order."""
    use_one_opencv_thread()
    return DataLoader(
        views,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_worker_init,
        generator=torch.Generator(),  # else starting it would draw from the generator of the members' dropout
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def stack_views(views: list[np.ndarray]) -> torch.Tensor:
    """uint8 views (side, side, 3) -> (B, 3, side, side)."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()


def validation_loader(views: ValidationViews, *, batch: int, workers: int) -> DataLoader:
    """View batches (B, 3, side, side) uint8, in the order of the items."""
    use_one_opencv_thread()
    return DataLoader(
        views,
        batch_size=batch,
        num_workers=workers,
        collate_fn=stack_views,
        worker_init_fn=_worker_init,
        generator=torch.Generator(),
    )


def locate_faces(
    items: Sequence[Item], config: MemberConfig, cache: Path, *, progress: bool = True
) -> dict[str, FaceBox | None]:
    """The chosen face of every item, from `cache` (JSON lines, appended as it goes) where it is known already."""
    from tqdm import tqdm

    use_one_opencv_thread()
    known: dict[str, FaceBox | None] = {}
    if cache.exists():
        for line in cache.read_text().splitlines():
            try:
                name, box = json.loads(line)
            except json.JSONDecodeError:  # the torn last line of an interrupted run is located again
                continue
            known[name] = None if box is None else _box(box)
    todo = [item for item in items if item.name not in known]
    if not todo:
        return known
    locator = FaceLocator(config.face)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a") as file:
        for item in tqdm(todo, desc="faces", unit="picture", disable=not progress):
            try:
                image = decode_image(item.path)
            except UnreadableInput:
                if config.sampling.on_unreadable == "fail":
                    raise
                continue  # the loader drops it and counts it
            face = choose_face(locator.locate(image), *image.shape[:2], config.face)
            known[item.name] = face
            file.write(json.dumps([item.name, face]) + "\n")
    return known


def _box(values: list) -> FaceBox:
    *numbers, landmarks = values
    return FaceBox(*numbers, None if landmarks is None else tuple(tuple(p) for p in landmarks))
