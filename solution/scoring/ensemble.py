"""A bundle's members on a device: loaded, made fast, and looked at a second time where half precision could change a level.

Takes views (per distinct view (n, 3, S, S) uint8); gives raw logits (members, n) float64, positive = fake.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from solution.bundles.bundle import Bundle, load_members
from solution.bundles.members import tower_configs
from solution.bundles.store import open_bundle
from solution.config import MemberConfig, VoteConfig
from solution.data.drawn import textured_faces
from solution.data.views import View
from solution.errors import KitError
from solution.models import merging
from solution.models.calibration import Calibrator
from solution.models.devices import PRECISIONS, pick_device, pick_precision, set_threads
from solution.models.member import Member
from solution.scoring.vote import levels

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
# By arithmetic, not yet measured: compiling takes about a minute and saves about a tenth of the time.
COMPILE_FROM = 50_000


class ScoringError(KitError, RuntimeError):
    """Scores that cannot be had: names the member, what was found and what to do."""


@dataclass
class Ensemble:
    """A bundle's members on a device, ready to score.

    precision: of the towers' products, a key of `PRECISIONS`. exact: the same members in float32, for second
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
        return PRECISIONS[self.precision]

    def describe(self) -> str:
        """One line: members, parameters, device, precision, batch."""
        total = sum(p.numel() for p in parameters_of(self.members))
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
            if isinstance(member.tower, merging.PackedTower):
                continue
            member.compile(dynamic=False)
        for tower in merging.towers_of(self.members.values()):
            if isinstance(tower, merging.PackedTower):
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
        `PRECISIONS`. second_look: compute doubtful levels again in float32 (only where votes have levels).
    members: only these; the vote is then among them, each with its votes, or one each where none of them has any.

    Raises:
        WeightsError: nothing there, damaged, or an unknown member.
    """
    bundle = weights
    if not isinstance(weights, Bundle):
        bundle = open_bundle(str(weights), report=report)
    place = pick_device(device)
    set_threads()
    if exact:
        precision = "float32"
    elif precision == "auto":
        precision = pick_precision(place)
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
            found[name] = PRECISIONS[precision]
    return found


def make_fast(ensemble: Ensemble, *, second_look: bool = True) -> Ensemble:
    """Merge, narrow and, for second looks, keep and measure: the members of a freshly loaded ensemble, in place."""
    dtype, members = ensemble.dtype, ensemble.members
    if second_look and ensemble.vote.discrete and dtype != torch.float32 and _room_for_copy(ensemble):
        ensemble.exact = copy.deepcopy(members)
    ensemble.merged = merging.merge_adapters(members, dtype)
    if dtype != torch.float32:
        merging.narrow(members.values(), dtype)
    if dtype != torch.float32 or ensemble.device.type == "cuda":
        merging.pack(members.values())
    if ensemble.exact:
        ensemble.noise = _measure_noise(ensemble)
        ensemble.margins = second_look_margins(ensemble.noise)
    return ensemble


def _room_for_copy(ensemble: Ensemble) -> bool:
    """Whether float32 members fit a second time."""
    size = sum(p.numel() * 4 for p in parameters_of(ensemble.members))
    if ensemble.device.type == "cuda":
        return torch.cuda.mem_get_info(ensemble.device)[0] > 2 * size
    return size <= SECOND_LOOK_BYTES


def parameters_of(members: Mapping[str, Member]) -> list[torch.nn.Parameter]:
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
    towers = merging.towers_of(members.values())
    large = max(sum(p.numel() for p in t.parameters()) for t in towers) > LARGE_TOWER
    if device.type == "cuda":
        return 64 if large else 256
    return 4 if large else 16
