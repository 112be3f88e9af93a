"""What members make of pictures as they are, and with each of their mechanisms taken away.

Takes members and pools of `Item`s; gives logits (N,) float64, positive = fake, by member and mechanism; the member as it is
goes by `BUILT`. Beside a pool's pictures may stand self-blended fakes of its real ones, with their masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from solution.bundles.members import CLASSES
from solution.config import AdapterConfig, MemberConfig
from solution.data.manifest import Item
from solution.data.views import View, open_picture
from solution.evaluation import metrics
from solution.evaluation.explainer import locators_of, see
from solution.evaluation.measure import Condition, EvaluationError
from solution.models.member import Member
from solution.models.qtfp import Qtfp, QtfpOutput, fake_likelihood_weights, overlap, read_gathered
from solution.models.streams import Fusion, Stream, as_two_class, two_class_logit
from solution.models.vlaforge import Vlaforge, mix_scores
from solution.scoring.ensemble import ScoringError
from solution.studies.blends import blended_twins

BUILT = ""
FORGED_SHARE = 0.1  # of a patch's area: forged from there on, as the VLAForge code has it
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MIXTURES = {
    share: {0.0: "local score alone", 1.0: "global score alone"}.get(share, f"alpha {share:g}") for share in ALPHAS
}
SCORES = ("global score", "local score")
HALVES = ("first half", "second half")


# ------------------------------------------------------------------------------------------------ interventions
class Given(NamedTuple):
    """A batch as one member sees it, on its device.

    images: (B, 3, S, S) uint8. other: (B,) int64, for each picture another one of the batch. seed: of permutations.
    whole: the same pictures uncut, for a member of faces. masks: (B, S, S) in [0, 1], 1 where the picture, or the
        fake made of it, is forged; None where nobody knows.
    """

    images: torch.Tensor
    other: torch.Tensor
    seed: int = 0
    whole: torch.Tensor | None = None
    masks: torch.Tensor | None = None


class Probed(NamedTuple):
    """logits: by mechanism, (B,), `BUILT` first. told: quantities of the member as it is, (B,) or (B, F), by name."""

    logits: dict[str, torch.Tensor]
    told: dict[str, torch.Tensor]


def probe(member: Member, given: Given) -> Probed:
    """A member as it is, and under every intervention that its kind and configuration allow."""
    logits, told = _probe(member, given)
    if given.whole is not None:
        logits["whole picture"] = logits[BUILT].clone()
        cut = (given.whole != given.images).flatten(1).any(dim=1)
        if bool(cut.any()):  # most pictures may be faces that fill them
            logits["whole picture"][cut] = member(given.whole[cut]).logit
    if member.adapter is not None:
        with without_adapter(member):
            logits["adapter off"] = member(given.images).logit
    return Probed(logits, told)


@contextmanager
def without_adapter(member: Member) -> Iterator[None]:
    """Inside, the member's forward uses its tower plain: as it was before LoRA or Effort."""
    built = member.config
    member.config = replace(built, adapter=AdapterConfig("none"))
    try:
        yield
    finally:
        member.config = built


@singledispatch
def _probe(member: Member, given: Given) -> Probed:
    """What this class of member makes of pictures as it is, and without each of its own mechanisms."""
    return Probed({BUILT: member(given.images).logit}, {})


@_probe.register(Stream)
def _probe_stream(member: Stream, given: Given) -> Probed:
    """Parts of what its head reads are replaced by their means once all pictures were seen (`parts_at_mean`)."""
    output = member(given.images)
    return Probed({BUILT: output.logit}, {"pooled": output.features})


@torch.inference_mode()
def parts_at_mean(member: Stream, pooled: np.ndarray) -> dict[str, np.ndarray]:
    """Logits (N,) of pooled features (N, F), each part in turn the same for all: its mean.

    Parts: the halves of a fusion, and the spread of the patches where the head reads that.
    """
    cut = member.pooled_width
    parts = dict(zip(HALVES, (slice(0, cut), slice(cut, None)))) if isinstance(member, Fusion) else {}
    if member.config.stream.spread:
        parts["spread"] = slice(member.tower.width, cut)
    found, features = {}, torch.from_numpy(pooled).to(next(member.head.parameters()))
    for name, part in parts.items():
        changed = features.clone()
        changed[:, part] = features[:, part].mean(dim=0)
        found[f"{name} at its mean"] = _numpy(two_class_logit(member.head(changed)))
    return found


def scores_at_mean(alpha: float, told: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits (N,) of VLAForge's mixture, each of its two `SCORES` in turn the same for all: its mean P(fake).

    Other than with alpha 0 or 1, what is mixed in keeps its weight, so that a constant score changes nothing.
    """
    found = {}
    for changed in SCORES:
        logits = {name: torch.from_numpy(told[name]) for name in SCORES}
        mean = logits[changed].sigmoid().mean()
        logits[changed] = mean.logit(eps=1e-12).expand(len(told[changed]))
        both = (as_two_class(logits[name]) for name in SCORES)
        found[f"{changed} at its mean"] = _numpy(mix_scores(*both, alpha))
    return found


@_probe.register(Qtfp)
def _probe_qtfp(member: Qtfp, given: Given) -> Probed:
    output = member(given.images)
    logits = {BUILT: output.logit}
    if member.pool is None:
        return Probed(logits, {})
    looked = output.query_attention  # (B, K, P)
    queries, patches = looked.shape[1:]
    attentions = {
        "uniform attention": torch.full_like(looked, 1 / patches),
        "CLS attention": member.cls_attention(output, given.images)[:, None],
        "attention of another picture": looked[given.other],
    }
    # The others give all heads one attention, and so change more than where it lies.
    if member.config.qtfp.heads > 1:
        attentions["attention averaged over heads"] = looked
    for name, attention in attentions.items():
        logits[name] = regathered(member, output, attention=attention)
    told = {"entropy": _entropy(looked).mean(dim=1)}
    if queries > 1:
        told["correlation"] = overlap(looked)
        for k in range(queries):
            keep = torch.arange(queries, device=looked.device) != k
            logits[f"query {k + 1} dropped"] = regathered(member, output, keep=keep)
    if given.masks is not None:
        forged = forged_patches(given.masks, output.evidence["query_attention"])
        w = fake_likelihood_weights(output.patch_tokens, member.prototypes.mean)
        told["inside: w"] = auc_inside(w, forged)
        told["inside: query attention"] = auc_inside(looked.mean(dim=1), forged)
    return Probed(logits, told)


def regathered(
    member: Qtfp,
    output: QtfpOutput,
    *,
    attention: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logit (B,) of `Qtfp.forward` with these options, from tokens that the tower has already made."""
    gathered, _ = member.pool(output.patch_tokens, attention=attention)
    read = read_gathered(gathered, member.config.qtfp.readout, keep)
    return two_class_logit(member.head(read))


def _entropy(attention: torch.Tensor) -> torch.Tensor:
    """Of rows that sum to one (..., P) -> (...), as a share of ln P: 1 for a uniform one."""
    tiny = torch.finfo(attention.dtype).tiny
    nats = -(attention * attention.clamp_min(tiny).log()).sum(dim=-1)
    return nats / math.log(attention.shape[-1])


@_probe.register(Vlaforge)
def _probe_vlaforge(member: Vlaforge, given: Given) -> Probed:
    """CLIP's plain pass and what the perceiver says are made once; every intervention starts from them."""
    images, other = given.images.to(member.tower.mean.dtype) / 255, given.other
    seen, alpha = member.look(images), member.config.vlaforge.alpha
    _, maps, bias = member.perceive(images, seen)
    _, blind_maps, blind_bias = member.perceive(torch.full_like(images, 0.5), seen)
    vla = member.read(seen)[1]  # (B, 2, h, w)
    scores = member.global_score(seen, bias)[1], member.local_score(maps, vla)

    def directed(bias: torch.Tensor, maps: torch.Tensor = maps) -> torch.Tensor:
        local = member.local_score(maps, vla)
        return mix_scores(member.global_score(seen, bias)[1], local, alpha)

    def compared(maps: torch.Tensor, vla: torch.Tensor) -> torch.Tensor:
        return mix_scores(scores[0], member.local_score(maps, vla), alpha)

    def known_as(cls_token: torch.Tensor) -> torch.Tensor:
        return compared(maps, member.read(seen._replace(cls_token=cls_token))[1])

    draw = torch.Generator().manual_seed(given.seed)
    order = torch.randperm(bias.shape[-1], generator=draw).to(bias.device)
    logits = {
        BUILT: mix_scores(*scores, alpha),
        "bias zeroed": directed(torch.zeros_like(bias)),
        "bias permuted over patches": directed(bias[..., order]),
        "bias of another picture": directed(bias[other]),
        "perceiver without pixels": directed(blind_bias, blind_maps),
        "identity zeroed": known_as(torch.zeros_like(seen.cls_token)),
        "identity of another picture": known_as(seen.cls_token[other]),
        "prompts swapped": compared(maps, vla.flip(1)),
        "VLA map of another picture": compared(maps, vla[other]),
        "maps of another picture": compared(maps[other], vla),
    }
    for share in ALPHAS:
        if share != alpha:
            logits[MIXTURES[share]] = mix_scores(*scores, share)
    if member.adapter_of_patches is not None:
        logits["patch adapter off"] = _without_patch_adapter(member, given.images)
    told = {name: two_class_logit(score) for name, score in zip(SCORES, scores)}
    if given.masks is not None:
        told |= _vlaforge_inside(member, given.masks, maps, vla)
    return Probed(logits, told)


def _vlaforge_inside(
    member: Vlaforge, masks: torch.Tensor, maps: torch.Tensor, vla: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What ranks patches as M_VLA and M_loc do, also where softmax and sigmoid have run into 0 or 1."""
    forged = forged_patches(masks, maps)
    apart = (vla[:, 1] - vla[:, 0]).flatten(1)
    localized = member.localize(maps).flatten(1)
    return {
        "inside: VLA map": auc_inside(apart, forged),
        "inside: localisation": auc_inside(localized, forged),
    }


def _without_patch_adapter(member: Vlaforge, images: torch.Tensor) -> torch.Tensor:
    adapter = member.adapter_of_patches
    share, adapter.share = adapter.share, 0.0
    try:
        return member(images).logit
    finally:
        adapter.share = share


def forged_patches(masks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, P) bool: the patches of the grid of `like` (..., h, w) more than `FORGED_SHARE` of whose mask is forged."""
    share = F.adaptive_avg_pool2d(masks[:, None].float(), like.shape[-2:])
    return share.flatten(1) > FORGED_SHARE


def auc_inside(scores: torch.Tensor, forged: torch.Tensor) -> torch.Tensor:
    """By picture, the AUC of `scores` (B, P) for forged against untouched patches, `forged` (B, P): (B,) float64.

    nan where all patches are forged, or none.
    """
    found = torch.full((len(scores),), float("nan"), dtype=torch.float64)
    mixed = forged.any(dim=1) & ~forged.all(dim=1)
    for i in mixed.nonzero().flatten().tolist():
        patches = forged[i].cpu().numpy().astype(np.int64)
        found[i] = metrics.auc(patches, _numpy(scores[i]))
    return found


@singledispatch
def at_means(member: Member, told: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits (N,) with a part of the member the same for all N pictures, by mechanism: known once all were seen."""
    return {}


@at_means.register(Stream)
def _stream_at_means(member: Stream, told: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return parts_at_mean(member, told["pooled"])


@at_means.register(Vlaforge)
def _vlaforge_at_means(member: Vlaforge, told: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return scores_at_mean(member.config.vlaforge.alpha, told)


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.cpu().double().numpy()


# ------------------------------------------------------------------------------------------------ pictures
class Shown(NamedTuple):
    """One picture as the members see it. views: per view, (S, S, 3) uint8; masks: per view, (S, S), where known.

    name: of the file; a fake made of a picture has its name, and the picture the fake's masks.
    """

    name: str
    label: int
    views: list[np.ndarray]
    masks: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Pool:
    """Pictures that are measured together. blended: each item is real and stands there with a fake made of it."""

    name: str
    items: tuple[Item, ...]
    blended: bool = False

    def __post_init__(self) -> None:
        if len(self.items) < 2:
            raise EvaluationError(
                f"{self.name}: {len(self.items)} pictures, at least 2 are needed; "
                "raise --limit or choose another --split"
            )

    def chunks(self, size: int) -> Iterator[tuple[Item, ...]]:
        """The items of each batch of about `size` pictures; none is alone, for it could not be given another's."""
        step = max(2, size // 2 if self.blended else size)
        starts = list(range(0, len(self.items), step))
        if len(starts) > 1 and len(self.items) - starts[-1] == 1:
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], len(self.items)]):
            yield self.items[start:stop]


class Eyes:
    """The distinct views of some members, and how faces are located for them.

    of: by member, the place of its view in `views`, and for members of faces that of the same view uncut (else None).
    """

    def __init__(self, configs: Mapping[str, MemberConfig]) -> None:
        views: list[View] = []
        self.of: dict[str, tuple[int, int | None]] = {}
        for name, config in configs.items():
            face = config.view.source == "face"
            wanted = [View(config.view, config.face if face else None)]
            if face and CLASSES[config.kind] is Stream:  # it sees nothing else
                wanted.append(View(replace(config.view, source="image"), None))
            views += [view for view in wanted if view not in views]
            places = [views.index(view) for view in wanted]
            self.of[name] = (places[0], places[1] if len(places) > 1 else None)
        self.views = tuple(views)
        self.locators = locators_of(self.views)

    def plain(self, item: Item, how: Condition) -> list[Shown]:
        """A picture under a condition, faces located in it as it is then."""
        picture = open_picture(item.path, item.name, how.degradation, how.seed)
        cut = see(picture, self.views, self.locators).views
        return [Shown(item.name, item.label, cut)]

    def blended(self, item: Item, how: Condition, seed: int) -> list[Shown]:
        """A real picture and a self-blended fake of it, drawn from (seed, name), degraded and cut alike."""
        real, fake, masks = blended_twins(item, self.views, self.locators, how, seed)
        return [Shown(item.name, 0, real, masks), Shown(item.name, 1, fake, masks)]


def others(names: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """(B,) int64: for each picture one drawn from those of the batch that have another name."""
    known = np.array(names)
    return np.array([rng.choice(np.flatnonzero(known != name)) for name in names])


# ------------------------------------------------------------------------------------------------ one condition
@dataclass
class Measured:
    """A pool under one condition. labels: (N,). logits, told: by member, then as in `Probed`, over all N pictures."""

    labels: np.ndarray
    logits: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    told: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


@torch.inference_mode()
def measure_pool(
    members: Mapping[str, Member],
    eyes: Eyes,
    pool: Pool,
    how: Condition,
    *,
    seed: int,
    batch: int = 16,
    done: Callable[[int], Any] = lambda n: None,
) -> Measured:
    """Every member as it is and under its interventions, on a pool under one condition; done: called with progress.

    Raises:
        UnreadableInput: the first picture that cannot be read. ScoringError: a logit that is not finite.
    """
    labels: list[int] = []
    parts: dict[str, list[Probed]] = {name: [] for name in members}
    for number, items in enumerate(pool.chunks(batch)):
        shown: list[Shown] = []
        for item in items:
            shown += eyes.blended(item, how, seed) if pool.blended else eyes.plain(item, how)
        labels += [s.label for s in shown]
        other = others([s.name for s in shown], np.random.default_rng([seed, number]))
        for name, member in members.items():
            given = _given(shown, eyes.of[name], other, seed, member.tower.mean.device)
            parts[name].append(probe(member, given))
        done(len(shown))
    measured = Measured(np.array(labels))
    for name, member in members.items():
        logits, told = _joined(parts[name])
        logits |= at_means(member, told)
        for mechanism, values in logits.items():
            if not np.isfinite(values).all():
                what = f"{name}, {mechanism or 'as it is'}, {how.name}"
                raise ScoringError(f"{what}: logits that are not finite")
        measured.logits[name], measured.told[name] = logits, told
    return measured


def _given(
    shown: Sequence[Shown],
    places: tuple[int, int | None],
    other: np.ndarray,
    seed: int,
    device: torch.device,
) -> Given:
    def images(place: int) -> torch.Tensor:
        cut = torch.from_numpy(np.stack([s.views[place] for s in shown]))
        return cut.permute(0, 3, 1, 2).to(device)

    view, whole = places
    masks = None
    if shown[0].masks is not None:
        masks = torch.from_numpy(np.stack([s.masks[view] for s in shown])).to(device)
    return Given(
        images(view),
        torch.from_numpy(other).to(device),
        seed,
        None if whole is None else images(whole),
        masks,
    )


def _joined(parts: Sequence[Probed]) -> tuple[dict[str, np.ndarray], ...]:
    """Batches one after the other: logits and told."""
    return tuple({key: np.concatenate([_numpy(p[i][key]) for p in parts]) for key in parts[0][i]} for i in (0, 1))
