"""Score pictures with members, fast, resumably.

Takes `Input`s or `Item`s; gives raw logits (positive = fake) by member, as `Scored` rows or as (N,) float64 arrays in the
order of the items. Loader workers decode a picture once, search its face once, and cut each distinct view, uint8 RGB
(S, S, 3), once for all members that see it; this process runs the members while the workers prepare what comes next.

Batches are fixed by the listing and their size alone (`Plan`), never by who computes them or when: a resumed run and
several ranks compute the very same batches, and so the same bytes; several shards too, unless they are very small. Which
inputs a shard has is fixed by the listing, whatever its batches.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from solution.bundles.bundle import Bundle, load_members
from solution.bundles.members import tower_configs
from solution.bundles.store import open_bundle
from solution.config import (
    DegradationConfig,
    MemberConfig,
    VoteConfig,
)
from solution.data.degradation import use_one_opencv_thread
from solution.data.drawn import textured_faces
from solution.data.faces import locate_once
from solution.data.guard import Watch, guarded, one_by_one
from solution.data.images import VIDEO_SUFFIXES, Input, Inputs, UnreadableInput
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
from solution.errors import KitError
from solution.io import stamp
from solution.models import merging as fastpath
from solution.models.calibration import Calibrator
from solution.models.member import Member
from solution.records import FaceBox
from solution.scoring.files import SidecarRow, Track
from solution.scoring.journal import Scored
from solution.scoring.tracks import scene_starts, track_faces
from solution.scoring.verdict import NOBODY_LOOKED, deciding, verdict_of
from solution.scoring.vote import combine, levels

FRAMES = 32  # of a video
NEUTRAL = 0.5  # the score of what cannot be read
PROBES = 16  # pictures on which half precision is compared with float32
# A level is looked at a second time when this many times the probes' rms departure could change it. The probes are drawn
# faces with a photograph's spectrum; photographs depart 1.3 to 4 times as far (rms; five S/14 members, two bundles), and
# much alike from member to member (.015 to .032) where the probes do not (.007 to .021). So all members share the median
# of their probes (half of a member's own, where that is more). Of 100 photographs, by how 520 of them departed, .05 have a
# level changed by that (10.1 without second looks), for second looks at 22 % of the rows; about .08 in the bundle before.
# Departures grow with the logit (most where levels are far apart), so a margin that grows with it buys nothing.
DOUBT = 11.0
EVERY_LOOK = 1e6  # a margin in logits that spans all levels
LARGE_TOWER = 200_000_000  # parameters; CLIP ViT-L/14 has 304 M, DINOv2-giant 1,136 M
SECOND_LOOK_BYTES = 1 << 31  # on CPU: no second copy, in float32, of larger towers
BLOCK = 256  # pictures that a shard is dealt at once; the largest batch chosen by itself
# By arithmetic, not yet measured: compiling takes about a minute and saves about a tenth of the time.
COMPILE_FROM = 50_000


class ScoringError(KitError, RuntimeError):
    """Scores that cannot be had: names the member, what was found and what to do."""


# ------------------------------------------------------------------------------------------------ the ensemble
@dataclass
class Ensemble:
    """A bundle's members on a device, ready to score.

    precision: of the towers' products, a key of `fastpath.PRECISIONS`. exact: the same members in float32, for second
    looks; empty when there are none. noise: by member, the rms of half precision's departure from float32 on the probes,
    in logits. margins: by member, how far it may have gone astray, from the probes of all of them.
    batch_size: rows computed at once. limit: what out-of-memory has left of it. looks: second looks so far, by member.
    """

    members: dict[str, Member]
    configs: dict[str, MemberConfig]
    vote: VoteConfig
    calibrators: dict[str, Calibrator]
    hash: str
    device: torch.device
    precision: str
    batch_size: int
    exact: dict[str, Member] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    margins: dict[str, float] = field(default_factory=dict)
    merged: bool = False
    compiled: bool = False
    limit: int = 0
    looks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.limit = self.batch_size
        self.looks = dict.fromkeys(self.members, 0)
        by_member = {name: View.of(config) for name, config in self.configs.items()}
        self.views = tuple(dict.fromkeys(by_member.values()))
        self.view_of = {name: self.views.index(v) for name, v in by_member.items()}

    @property
    def dtype(self) -> torch.dtype:
        """What the towers compute their products in."""
        return fastpath.PRECISIONS[self.precision]

    def describe(self) -> str:
        """One line: members, parameters, device, precision, batch."""
        total = sum(p.numel() for p in _parameters(self.members))
        looks = ", second looks in float32" if self.exact else ""
        made = ", merged" * self.merged + ", compiled" * self.compiled
        return (
            f"{', '.join(self.members)}; {total / 1e6:.1f} M parameters, none trainable; "
            f"{self.device}, {self.precision}{looks}{made}, batches of {self.batch_size}"
        )

    def fingerprint(self) -> dict[str, Any]:
        """What a logit depends on, beside the picture: equal fingerprints give equal logits on equal hardware."""
        return {
            "weights": self.hash,
            "members": list(self.members),
            "device": self.device.type,
            "precision": self.precision,
            "second_look": DOUBT if self.exact else 0,
            "batch": self.batch_size,
            "compiled": self.compiled,
            "torch": torch.__version__,
        }

    # -- compiling
    def compiling_pays(self, pictures: int) -> bool:
        """Whether a run of so many pictures repays torch.compile: on a GPU, from COMPILE_FROM on."""
        return self.device.type == "cuda" and pictures >= COMPILE_FROM

    def compile(self) -> None:
        """Compile for the one shape that batches have (a smaller last batch is filled up to it): a packed tower's one
        block, which takes seconds, or else whole members, which takes a minute each.
        """
        for member in self.members.values():
            if isinstance(member.tower, fastpath.PackedTower):
                continue
            member.compile(dynamic=False)
        for tower in fastpath.towers_of(self.members.values()):
            if isinstance(tower, fastpath.PackedTower):
                tower.compile(dynamic=False)
        self.compiled = True

    # -- scoring
    def launch(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits (members, n) float32 of n rows, still on the device; views: per view of `self.views`, (n, 3, S, S)
        uint8 on the device. Halves the rows on out-of-memory.
        """
        parts, start = [], 0
        while start < len(views[0]):
            stop = start + self.limit  # which may fall on the way
            parts.append(self._rows([view[start:stop] for view in views]))
            start = stop
        return torch.cat(parts, dim=1)

    def _rows(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        count = len(views[0])
        try:
            return self._forward(views)
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        torch.cuda.empty_cache()
        self.limit = min(self.limit, (count + 1) // 2)
        return self.launch(views)

    def _forward(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        count = len(views[0])
        if self.compiled and count < self.limit:  # one shape, compiled once
            spare = self.limit - count
            views = [torch.cat([v, v[-1:].expand(spare, -1, -1, -1)]) for v in views]
        with torch.inference_mode():
            rows = []
            for name, member in self.members.items():
                member.tower.use(member.adapter)
                rows.append(member.judge(views[self.view_of[name]]).float()[:count])
            return torch.stack(rows)

    def finish(self, launched: torch.Tensor, views: Sequence[torch.Tensor]) -> np.ndarray:
        """`launch`'s result on the host, (members, n) float64, doubtful levels looked at again in float32.

        Raises:
            ScoringError: a logit that is not finite in float32 either.
        """
        return self._settled(*self._look_again(_Fetched(launched), views))

    def flow(self, batches: Iterable[tuple[Any, Sequence[torch.Tensor]]]) -> Iterator[tuple[Any, np.ndarray]]:
        """(tag, `finish`'s logits) of every (tag, views on the host: per view (n, S, S, 3) uint8), in order.

        On a GPU two batches are under way: the doubtful rows of one are looked at behind the next one's first look, and
        nothing waits for the card but for what it has done already.
        """
        first: deque[tuple[Any, _Fetched, list[torch.Tensor]]] = deque()
        second: deque[tuple[Any, np.ndarray, list[_Look]]] = deque()
        ahead = 1 if self.device.type == "cuda" else 0

        def onward(ahead: int) -> Iterator[tuple[Any, np.ndarray]]:
            while len(first) > ahead:
                tag, fetched, views = first.popleft()
                second.append((tag, *self._look_again(fetched, views)))
            while len(second) > ahead:
                tag, *looked = second.popleft()
                yield tag, self._settled(*looked)

        for tag, held in batches:
            views = [view.to(self.device, non_blocking=True).permute(0, 3, 1, 2) for view in held]
            launched = self.launch(views) if len(views[0]) else torch.empty(len(self.members), 0)
            first.append((tag, _Fetched(launched), views))
            yield from onward(ahead)
        yield from onward(0)

    def _look_again(self, fetched: _Fetched, views: Sequence[torch.Tensor]) -> tuple[np.ndarray, list[_Look]]:
        """The logits (members, n) float64 of a first look, and second looks under way at the doubtful ones."""
        logits, looks = fetched.numpy(), []
        for row, name in enumerate(self.members):
            again = np.flatnonzero(self._doubtful(name, logits[row]))
            if len(again) and name in self.exact:
                places = torch.from_numpy(again)
                if self.device.type == "cuda":
                    places = places.pin_memory().to(self.device, non_blocking=True)
                seen = views[self.view_of[name]][places]
                looks.append(_Look(row, again, _Fetched(self._exactly(name, seen))))
                self.looks[name] += len(again)
        return logits, looks

    def _settled(self, logits: np.ndarray, looks: Sequence[_Look]) -> np.ndarray:
        """`logits`, the second looks put in."""
        for look in looks:
            logits[look.row, look.places] = look.logits.numpy()
        for row, name in enumerate(self.members):
            wrong = int((~np.isfinite(logits[row])).sum())
            if wrong:
                raise ScoringError(
                    f"{name}: {wrong} of {logits.shape[1]} logits are not finite in "
                    f"{self.precision}; try --exact, and check the weights with --selftest"
                )
        return logits

    def _doubtful(self, name: str, logits: np.ndarray) -> np.ndarray:
        """(n,) bool: whose level the margin could change, and what is no number."""
        wrong = ~np.isfinite(logits)
        if name not in self.margins:
            return wrong
        margin, sure = self.margins[name], np.where(wrong, 0.0, logits)
        low, high = (levels(self.calibrators[name].apply(sure + shift), self.vote.step) for shift in (-margin, margin))
        return wrong | (low != high)

    def _exactly(self, name: str, views: torch.Tensor) -> torch.Tensor:
        """Logits (n,) in float32, on the device."""
        member = self.exact[name]
        member.tower.use(member.adapter)
        with torch.inference_mode():
            parts = [member.judge(p) for p in views.split(max(1, self.limit // 2))]
        return torch.cat(parts)


class _Fetched:
    """A tensor on its way to the host, behind what its device was given to do before."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.to("cpu", non_blocking=True)
        self.arrival = None
        if tensor.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    def numpy(self) -> np.ndarray:
        """It in float64, once it has come."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.tensor.double().numpy()


class _Look(NamedTuple):
    """A second look: of which member (row), at which places (k,), and what it finds (k,)."""

    row: int
    places: np.ndarray
    logits: _Fetched


def load_ensemble(
    weights: str | Bundle,
    device: str = "auto",
    *,
    exact: bool = False,
    precision: str = "auto",
    second_look: bool = True,
    members: Sequence[str] | None = None,
    batch_size: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Ensemble:
    """The members of a bundle on `device`, towers shared, adapters merged, in the fastest precision.

    weights: a bundle, or what `--weights` takes. exact: float32 throughout. precision: `auto` or one of
        `fastpath.PRECISIONS`. second_look: compute doubtful levels again in float32 (only where votes have levels).
    members: only these; the vote is then among them, each with its votes, or one each where none of them has any.

    Raises:
        WeightsError: nothing there, damaged, or an unknown member.
    """
    bundle = weights
    if not isinstance(weights, Bundle):
        bundle = open_bundle(str(weights), report=report)
    place = fastpath.pick_device(device)
    fastpath.set_threads()
    if exact:
        precision = "float32"
    elif precision == "auto":
        precision = fastpath.pick_precision(place)
    chosen = [bundle.configs[n] for n in members or bundle.configs if n in bundle.configs]
    early = narrow_early(chosen, place, precision)
    loaded = load_members(bundle, members, device=place, matrices=early)
    ensemble = Ensemble(
        members=loaded,
        configs={name: bundle.configs[name] for name in loaded},
        vote=vote_among(bundle.vote, list(loaded)) if members else bundle.vote,
        calibrators={name: bundle.calibrators[name] for name in loaded},
        hash=bundle.hash,
        device=place,
        precision=precision,
        batch_size=batch_size or automatic_batch(loaded, place),
    )
    if exact:
        return ensemble
    return make_fast(ensemble, second_look=second_look and not early)


def narrow_early(configs: Iterable[MemberConfig], device: torch.device, precision: str) -> dict[str, torch.dtype]:
    """The towers that take half precision as they are read: large ones, on CPU, where memory is short.

    Not those with Effort: what it trains has to be merged in float32 first.
    """
    configs = list(configs)
    if device.type != "cpu" or precision == "float32":
        return {}
    effort = {c.tower.name for c in configs if c.adapter.kind == "effort"}
    found = {}
    for name, tower in tower_configs(configs).items():
        arch = tower.arch  # its blocks' matrices: four projections, and the MLP's
        size = arch.layers * (4 + 2 * arch.mlp_ratio) * arch.width**2
        if name not in effort and size > LARGE_TOWER:
            found[name] = fastpath.PRECISIONS[precision]
    return found


def make_fast(ensemble: Ensemble, *, second_look: bool = True) -> Ensemble:
    """Merge, narrow and, for second looks, keep and measure: the members of a freshly loaded ensemble, in place."""
    dtype, members = ensemble.dtype, ensemble.members
    if second_look and ensemble.vote.discrete and dtype != torch.float32 and _room_for_copy(ensemble):
        ensemble.exact = copy.deepcopy(members)
    ensemble.merged = fastpath.merge_adapters(members, dtype)
    if dtype != torch.float32:
        fastpath.narrow(members.values(), dtype)
    if dtype != torch.float32 or ensemble.device.type == "cuda":
        fastpath.pack(members.values())
    if ensemble.exact:
        ensemble.noise = _measure_noise(ensemble)
        ensemble.margins = second_look_margins(ensemble.noise)
    return ensemble


def _room_for_copy(ensemble: Ensemble) -> bool:
    """Whether float32 members fit a second time."""
    size = sum(p.numel() * 4 for p in _parameters(ensemble.members))
    if ensemble.device.type == "cuda":
        return torch.cuda.mem_get_info(ensemble.device)[0] > 2 * size
    return size <= SECOND_LOOK_BYTES


def _parameters(members: Mapping[str, Member]) -> list[torch.nn.Parameter]:
    """Every parameter of these members, once."""
    return list({id(p): p for m in members.values() for p in m.parameters()}.values())


@torch.inference_mode()
def _measure_noise(ensemble: Ensemble) -> dict[str, float]:
    noise = {}
    for name, member in ensemble.members.items():
        side = ensemble.configs[name].seen.side
        pictures = torch.from_numpy(textured_faces(side, PROBES)).permute(0, 3, 1, 2).to(ensemble.device)
        fast = member.judge(pictures).double()
        true = ensemble.exact[name].judge(pictures).double()
        noise[name] = (fast - true).square().mean().sqrt().item()
    return noise


def second_look_margins(noise: Mapping[str, float]) -> dict[str, float]:
    """By member, the distance in logits to the edge of a level within which a picture is looked at again.

    noise: the rms departure on the probes. A member whose half precision overflows on one settles no level: every
    picture is looked at again.
    """
    typical = statistics.median([rms for rms in noise.values() if math.isfinite(rms)] or [0.0])
    return {n: DOUBT * max(typical, rms / 2) if math.isfinite(rms) else EVERY_LOOK for n, rms in noise.items()}


def vote_among(vote: VoteConfig, members: Sequence[str]) -> VoteConfig:
    """The vote restricted to `members`: their own votes, or one each when none of them has any."""
    weights = {name: vote.weights.get(name, 0) for name in members}
    if not any(weights.values()):
        weights = dict.fromkeys(members, 1)
    return replace(vote, weights=weights)


def voters(bundle: Bundle) -> list[str]:
    """The members of a bundle that have votes: all that a score needs."""
    return [name for name in bundle.configs if bundle.vote.weights.get(name, 0) > 0]


def automatic_batch(members: Mapping[str, Member], device: torch.device) -> int:
    """Rows computed at once, by the towers' size and the device: machines of one kind make equal batches.

    CPU: throughput is flat from 4 rows on (compact). GPU: 64 rows of a giant tower are 20,000 tokens, enough to fill any
    (by arithmetic, not yet measured).
    """
    towers = fastpath.towers_of(members.values())
    large = max(sum(p.numel() for p in t.parameters()) for t in towers) > LARGE_TOWER
    if device.type == "cuda":
        return 64 if large else 256
    return 4 if large else 16


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
    cores = fastpath.cores()
    return min(16, max(1, cores - 1)) if device.type == "cuda" else max(1, cores // 4)


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
    listed = [(i, Input(item.name, item.path, _kind(item.path))) for i, item in enumerate(items)]
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


def _kind(path: Any) -> str:
    return "video" if str(path).lower().endswith(tuple(VIDEO_SUFFIXES)) else "image"


# ------------------------------------------------------------------------------------------------ rows to verdicts
def judge(
    rows: Sequence[Scored],
    vote: VoteConfig,
    calibrators: Mapping[str, Calibrator],
    *,
    video_mean: str = "score",
) -> list[SidecarRow]:
    """Calibrate, discretize and vote: a row per input, in order, and after a video's row those of its frames.

    Where all faces were scored (`Scored.people`), the input's row is that of its deciding face or track (`deciding`), and
    a row per face follows, or a row per track with those of its frames.
    video_mean: `score`: a video's P(fake) and score are the means of its frames'. `logit`: its members' logits are
    averaged first, and then voted on like a picture's. What could not be read gets the neutral score.
    """
    frames = [row for row in rows for _ in row.faces]  # one entry per scored frame or face
    result: list[SidecarRow] = []
    if frames:
        p, grid, scores = _vote(_joined(rows, calibrators), vote, calibrators)
    start = 0
    for row in rows:
        if row.error:
            result.append(SidecarRow(row.name, "failed", row.error, None, {}, {}, NEUTRAL, "failed"))
            continue
        stop = start + len(row.faces)
        of_frames = [
            SidecarRow(
                row.name,
                "ok",
                "",
                face,
                {name: float(p[name][k]) for name in p},
                {name: float(grid[name][k]) for name in grid},
                float(scores[k]),
                verdict_of(float(scores[k]), vote, row.found),
                number,
                who,
            )
            for k, face, number, who in zip(
                range(start, stop),
                row.faces,
                row.frames or [None] * len(row.faces),
                row.people or [None] * len(row.faces),
            )
        ]
        start = stop
        if row.people:
            result += _of_people(row, of_frames, vote, calibrators, video_mean)
        elif row.frames:
            result += [_of_video(row, of_frames, vote, calibrators, video_mean), *of_frames]
        else:
            result += of_frames
    return result


def _of_people(
    row: Scored,
    entries: Sequence[SidecarRow],
    vote: VoteConfig,
    calibrators: Mapping[str, Calibrator],
    video_mean: str,
) -> list[SidecarRow]:
    """The input's row, and after it a row per face, or per track one and those of its frames."""
    if not row.frames:
        return [deciding(entries)._replace(who=None), *entries]
    tracks, result = [], []
    for who in sorted(set(row.people)):
        places = [k for k, other in enumerate(row.people) if other == who]
        frames = [entries[k] for k in places]
        own = row._replace(logits={name: [z[k] for k in places] for name, z in row.logits.items()})
        scores = np.array([frame.score for frame in frames])
        track = Track(
            len(frames),
            frames[0].frame,
            frames[-1].frame,
            float(scores.std()),
            float(np.mean(scores >= vote.threshold)),
        )
        middle = sorted(frames, key=lambda f: (f.face[2] - f.face[0]) * (f.face[3] - f.face[1]))[len(frames) // 2]
        whole = _of_video(own, frames, vote, calibrators, video_mean)
        tracks.append(whole._replace(face=middle.face, who=who, track=track))
        result += [tracks[-1], *frames]
    return [deciding(tracks)._replace(face=None, who=None, track=None), *result]


def _joined(rows: Sequence[Scored], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Logits (frames,) of every scored frame, by member."""
    return {name: np.concatenate([row.logits[name] for row in rows if not row.error]) for name in names}


def _vote(
    logits: Mapping[str, np.ndarray],
    vote: VoteConfig,
    calibrators: Mapping[str, Calibrator],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """P(fake) and level by member, and the vote, each (n,)."""
    p = {name: calibrators[name].apply(values) for name, values in logits.items()}
    known = {name: values for name, values in p.items() if name in vote.weights}
    grid = {name: levels(values, vote.step) for name, values in p.items()}
    return p, grid, combine(known, vote)


def _of_video(
    row: Scored,
    frames: Sequence[SidecarRow],
    vote: VoteConfig,
    calibrators: Mapping[str, Calibrator],
    video_mean: str,
) -> SidecarRow:
    if video_mean == "logit":
        means = {name: np.array([np.mean(z)]) for name, z in row.logits.items()}
        p, grid, scores = _vote(means, vote, calibrators)
        score = float(scores[0])
    else:
        p = {name: np.array([np.mean([f.p_fake[name] for f in frames])]) for name in row.logits}
        grid = {name: levels(values, vote.step) for name, values in p.items()}
        score = float(np.mean([f.score for f in frames]))
    return SidecarRow(
        row.name,
        "ok",
        "",
        None,
        {name: float(values[0]) for name, values in p.items()},
        {name: float(values[0]) for name, values in grid.items()},
        score,
        verdict_of(score, vote, row.found),
    )


# ------------------------------------------------------------------------------------------------ on a Ray cluster
class RayScorer:
    """An actor of `ray_stream`: an ensemble of its own, and a batch of inputs, as JSON, to its rows, as JSON."""

    def __init__(self, load: Mapping[str, Any], read: Mapping[str, Any]) -> None:
        self.ensemble = load_ensemble(**load)
        self.reader = Reader(self.ensemble.views, **read)

    def __call__(self, given: dict[str, np.ndarray]) -> dict[str, list[str]]:
        (text,) = given["batch"]
        batch = [(index, Input(name, Path(path), kind)) for index, name, path, kind in json.loads(str(text))]
        (rows,) = stream(self.ensemble, [batch], self.reader, workers=0)
        return {"rows": [json.dumps(rows)]}


def ray_stream(
    batches: Iterable[Sequence[tuple[int, Input]]],
    load: Mapping[str, Any],
    read: Mapping[str, Any],
    *,
    gpu: bool,
) -> Iterator[list[Scored]]:
    """`stream` on Ray Data: actors that come and go, each with its own ensemble; batches end in any order.

    load, read: what `load_ensemble` and `Reader` are called with in each actor (weights and inputs at the same paths
    everywhere). gpu: one GPU an actor, else one core.

    Raises:
        ScoringError: Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ScoringError("--engine ray needs Ray: pip install 'ray[data]' (or leave --engine out)") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    total = ray.cluster_resources().get("GPU" if gpu else "CPU", 1)
    listed = [{"batch": json.dumps([(i, x.name, str(x.path), x.kind) for i, x in batch])} for batch in batches]
    if not listed:
        return
    scored = ray.data.from_items(listed).map_batches(
        RayScorer,
        fn_constructor_args=(dict(load), dict(read)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(total))),
        num_gpus=1 if gpu else 0,
        num_cpus=1,
    )
    for row in scored.iter_rows():
        yield [Scored(*fields) for fields in json.loads(row["rows"])]
