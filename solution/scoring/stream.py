"""Inputs to rows with logits: batches fixed by the listing, read by workers, computed by the ensemble, in order.

Takes `Input`s or `Item`s; gives raw logits (positive = fake) by member, as `Scored` rows or as (N,) float64 arrays in the
order of the items. Loader workers decode a picture once, search its face once, and cut each distinct view, uint8 RGB
(S, S, 3), once for all members that see it; this process runs the members while the workers prepare what comes next.

Batches are fixed by the listing and their size alone (`Plan`), never by who computes them or when: a resumed run and
several ranks compute the very same batches, and so the same bytes; several shards too, unless they are very small. Which
inputs a shard has is fixed by the listing, whatever its batches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from solution.config import DegradationConfig
from solution.data.degradation import use_one_opencv_thread
from solution.data.faces import locate_once
from solution.data.guard import Watch, guarded, one_by_one
from solution.data.images import Input, Inputs, UnreadableInput, kind_of
from solution.data.processes import LIMIT
from solution.data.views import (
    View,
    choose_found,
    close_views,
    cut_views,
    locators_for,
    open_frames,
    open_picture,
    quiet_worker,
)
from solution.io import cores, stamp
from solution.records import FaceBox
from solution.scoring.ensemble import Ensemble
from solution.scoring.journal import Scored
from solution.scoring.tracks import scene_starts, track_faces
from solution.scoring.verdict import NOBODY_LOOKED

FRAMES = 32  # of a video
BLOCK = 256  # pictures that a shard is dealt at once; the largest batch chosen by itself


# ------------------------------------------------------------------------------------------------ pictures to views
@dataclass
class Prepared:
    """A batch as a worker hands it over: rows without logits; views, per view of the ensemble, (n, S, S, 3) uint8.

    n counts the frames of all readable rows, in order; a picture has one. Where all faces are scored, it counts faces.
    """

    rows: list[Scored]
    views: list[torch.Tensor]

    def pin_memory(self) -> Prepared:
        """Page-locked views: their copies to a GPU then run beside its computing."""
        return Prepared(self.rows, [view.pin_memory() for view in self.views])


class Reader(Dataset):
    """Batches of (index, Input) to `Prepared`: decoded once, one face search, each distinct view cut once.

    degradation, seed: degrade pictures first, drawn from (seed, name) (`views.degraded_picture`). faces: False leaves
    faces out (there is no detector): every view shows the whole picture. people: `one`: the face that stands for the
    picture, or one person through a video; `all`: every face, by the first view's way to locate faces. limit: seconds for
    one file, in a worker.
    """

    def __init__(
        self,
        views: Sequence[View],
        *,
        frames: int = FRAMES,
        degradation: DegradationConfig | None = None,
        seed: int = 0,
        faces: bool = True,
        people: str = "one",
        limit: int = LIMIT,
    ) -> None:
        self.views, self.frames, self.people, self.limit = tuple(views), frames, people, limit
        self.watch = Watch()
        self.degradation, self.seed = degradation, seed
        self.locators = locators_for(self.views) if faces else {}

    def __getitem__(self, batch: Sequence[tuple[int, Input]]) -> Prepared:
        rows: list[Scored] = []
        cut: list[list[np.ndarray]] = [[] for _ in self.views]
        for index, item in batch:
            row = Scored(index, item.name, *stamp(item.path))
            try:
                with self.watch.file(index, item.path):
                    numbers, pictures = self._decode(item)
                    row, seen = self._cut(row._replace(frames=numbers), pictures, video=item.kind == "video")
            except UnreadableInput as error:
                rows.append(row._replace(error=error.reason))
                continue
            for views in seen:
                for place, view in enumerate(views):
                    cut[place].append(view)
            rows.append(row)
        views = [
            torch.from_numpy(np.stack(c)) if c else torch.empty(0, v.view.side, v.view.side, 3, dtype=torch.uint8)
            for c, v in zip(cut, self.views)
        ]
        return Prepared(rows, views)

    def again(self, number: int, waiting: Sequence[Sequence[tuple[int, Input]]]) -> None:
        """As `guarded` wants it: the input of this number, of the batches given, read and no more."""
        for index, item in (entry for batch in waiting for entry in batch):
            if index == number:
                self[[(index, item)]]

    def _cut(
        self, row: Scored, pictures: Sequence[np.ndarray], *, video: bool
    ) -> tuple[Scored, list[list[np.ndarray]]]:
        """The row with its faces, and for each of them the views (S, S, 3)."""
        found = [locate_once(self.locators, picture) for picture in pictures]
        alone = False
        if self.people == "all" and self.locators:
            config, locator = next(iter(self.locators.items()))
            every = [locator.locate_all(picture, faces[config]) for picture, faces in zip(pictures, found)]
            # One face in a picture is seen as `one` sees it, and has its box although it may be too small to be cut out.
            alone = not video and len(every[0]) == len(found[0][config]) == 1
            if any(every) and not alone:
                return self._cut_all(row._replace(found=max(map(len, every))), pictures, every)
        chosen = choose_found(found, [p.shape[:2] for p in pictures], video=video)
        shown = every[0] if alone else [next(iter(by_config.values()), None) for by_config in chosen]
        most = max((len(boxes) for faces in found for boxes in faces.values()), default=NOBODY_LOOKED)
        row = row._replace(faces=[_brief(b) for b in shown], found=most, people=[1] if alone else [])
        return row, [cut_views(picture, self.views, by_config) for picture, by_config in zip(pictures, chosen)]

    def _cut_all(
        self, row: Scored, pictures: Sequence[np.ndarray], every: Sequence[Sequence[FaceBox]]
    ) -> tuple[Scored, list[list[np.ndarray]]]:
        """`_cut` of several people: an entry for every face of every picture or frame."""
        if row.frames:
            numbers = track_faces(every, scene_starts(pictures))
        else:
            numbers = [list(range(1, len(every[0]) + 1))]
        entries = [(at, face, who) for at, faces in enumerate(every) for face, who in zip(faces, numbers[at])]
        row = row._replace(
            frames=[row.frames[at] for at, _, _ in entries] if row.frames else [],
            faces=[_brief(face) for _, face, _ in entries],
            people=[who for _, _, who in entries],
        )
        close = close_views(self.views)
        return row, [
            cut_views(pictures[at], close, {config: face for _, config in close if config}) for at, face, _ in entries
        ]

    def _decode(self, item: Input) -> tuple[list[int], list[np.ndarray]]:
        """Frame numbers (none for a picture) and pictures."""
        how = self.degradation, self.seed
        if item.kind == "video":
            return open_frames(item.path, item.name, self.frames, *how)
        return [], [open_picture(item.path, item.name, *how)]


def _brief(face: FaceBox | None) -> list[float] | None:
    """Box in hundredths of a pixel and score: what the journal and the sidecar keep of a face."""
    return None if face is None else [*(round(v, 2) for v in face[:4]), round(face[4], 5)]


def automatic_workers(device: torch.device) -> int:
    """Loader workers: decoding, faces and views of a 256 px picture take 5 ms, each compact member 15 ms (CPU, bf16),
    so one worker keeps up with several cores that compute; a GPU wants as many as there are.
    """
    count = cores()
    return min(16, max(1, count - 1)) if device.type == "cuda" else max(1, count // 4)


# ------------------------------------------------------------------------------------------------ batches and streams
class Plan:
    """The batches of a run: pictures in listing order, `size` at a time, then each video alone; of a shard, those among
    its inputs. A rank takes every n-th batch (`part`).

    shard: (i, n), from (1, 1) to (n, n). The listing is dealt out to n shards in turn, pictures in blocks and videos one by
    one. That depends on the listing and n alone, so that machines with other batch sizes have no input twice and none
    left out. A block has a power of two of pictures, BLOCK at most, as many as leave each shard four blocks: batches of a
    power of two that is no larger are those of the whole run.
    videos: how many the whole listing has.
    """

    def __init__(self, inputs: Inputs, size: int, shard: tuple[int, int] = (1, 1)) -> None:
        self.inputs = inputs
        video = np.fromiter((i.kind == "video" for i in inputs), bool, len(inputs))
        self.videos = int(video.sum())
        block = min(BLOCK, max(1, (len(inputs) - self.videos) // (4 * shard[1])))
        block = 1 << (block.bit_length() - 1)
        pictures, videos = _dealt(np.flatnonzero(~video), block, shard), _dealt(np.flatnonzero(video), 1, shard)
        self._order = np.concatenate([pictures, videos])  # (n,), of this shard
        starts = range(0, len(pictures), size)
        # (batches + 1,): batch b is order[bounds[b]:bounds[b + 1]]
        self._bounds = np.array([*starts, *range(len(pictures), len(self._order) + 1)])
        self._numbers = np.arange(len(self._bounds) - 1)

    def part(self, index: int, count: int) -> Plan:
        """Every `count`-th of these batches, from `index` (0-based) on."""
        chosen = copy.copy(self)
        chosen._numbers = self._numbers[index::count]
        return chosen

    def _batches(self) -> Iterator[np.ndarray]:
        for number in self._numbers:
            yield self._order[self._bounds[number] : self._bounds[number + 1]]

    def share(self) -> np.ndarray:
        """(N,) bool: the inputs in these batches."""
        mine = np.zeros(len(self.inputs), bool)
        for batch in self._batches():
            mine[batch] = True
        return mine

    def pending(self, todo: np.ndarray) -> Iterator[list[tuple[int, Input]]]:
        """These batches as (index, Input), of what `todo` (N,) bool says is left."""
        for batch in self._batches():
            left = batch[todo[batch]].tolist()
            if left:
                yield [(index, self.inputs[index]) for index in left]


def _dealt(indices: np.ndarray, block: int, shard: tuple[int, int]) -> np.ndarray:
    """What shard (i, n) has of `indices`: every n-th block of them, from the i-th on."""
    index, count = shard
    return indices[np.arange(len(indices)) // block % count == index - 1]


def stream(
    ensemble: Ensemble,
    batches: Iterable[Sequence[tuple[int, Input]]],
    reader: Reader,
    *,
    workers: int | None = None,
) -> Iterator[list[Scored]]:
    """The rows of each batch, in order, with their logits; an unreadable input's row has its error instead.

    Workers prepare batches ahead; a file at which one dies is an unreadable input. Without workers (0) one process reads a
    batch when it is wanted, guarded alike and without shared memory.
    """
    cuda = ensemble.device.type == "cuda"
    if workers is None:
        workers = automatic_workers(ensemble.device)
    use_one_opencv_thread()

    def load(given: Iterable[Sequence[tuple[int, Input]]]) -> DataLoader:
        return DataLoader(
            reader,
            sampler=given,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=quiet_worker,
            pin_memory=cuda,
            prefetch_factor=2,
        )

    reader.watch = Watch(workers, reader.limit)
    if workers:
        loader = guarded(batches, load, reader.watch, reader.again)
    else:
        loader = one_by_one(batches, reader.__getitem__, reader.watch, reader.again, quiet_worker)
    yield from computed(ensemble, loader)


def computed(ensemble: Ensemble, batches: Iterable[Prepared]) -> Iterator[list[Scored]]:
    """The rows of prepared batches, in order, with their logits."""
    for told, logits in ensemble.flow((prepared.rows, prepared.views) for prepared in batches):
        yield _with_logits(ensemble, told, logits)


def _with_logits(ensemble: Ensemble, told: Sequence[Scored], logits: np.ndarray) -> list[Scored]:
    """Rows with their part of the logits (members, n); n counts the frames or faces of those that could be read."""
    start, rows = 0, []
    for row in told:
        if not row.error:
            stop = start + len(row.faces)
            part = logits[:, start:stop].tolist()
            row = row._replace(logits=dict(zip(ensemble.members, part, strict=True)))
            start = stop
        rows.append(row)
    return rows


def score_pictures(
    ensemble: Ensemble,
    items: Sequence[Any],
    *,
    degradation: DegradationConfig | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = 0,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Raw logits (N,) float64 of `items` (`data.Item`, or anything with name and path), by member, in their order.

    degradation, seed: degrade each picture first, at its own size, drawn from (seed, its name). A video file's logit
    is the mean over its frames.

    Raises:
        UnreadableInput: the first picture that cannot be read; scores never come from a substitute.
    """
    from tqdm import tqdm

    size = batch_size or ensemble.batch_size
    listed = [(i, Input(item.name, item.path, kind_of(str(item.path)))) for i, item in enumerate(items)]
    batches = [listed[i : i + size] for i in range(0, len(listed), size)]
    reader = Reader(ensemble.views, degradation=degradation, seed=seed)
    logits = {name: np.empty(len(listed)) for name in ensemble.members}
    with tqdm(total=len(listed), unit="picture", disable=not progress) as bar:
        for rows in stream(ensemble, batches, reader, workers=workers):
            for row in rows:
                if row.error:
                    raise UnreadableInput(items[row.index].path, row.error)
                for name, values in row.logits.items():
                    logits[name][row.index] = np.mean(values)
            bar.update(len(rows))
    return logits
