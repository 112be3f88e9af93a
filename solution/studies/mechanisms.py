"""Entry: does a trained bundle use what its papers claim? Each mechanism taken away, and what that does to the scores.

    python -m solution.studies.mechanisms --weights BUNDLE --data MANIFEST [--split val,unseen] [--limit 200] --out DIR

The pictures of every split, and beside them self-blended fakes of its real ones, go clean and degraded through every
member as it is and under each intervention. Leaves in DIR `mechanisms.json`, the same as tables (`mechanisms.md`, also
printed) and a figure a set. `BUNDLE/claims.json`, a JSON list of `MEMBER/MECHANISM` in the table's words (`ensemble`
counts as a member), says what the bundle's card claims: exit code 1 when something claimed is dead or not measured.

Logits are (N,) float64, positive = fake, by member and mechanism; the member as it is goes by `BUILT`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata

from solution.bundles.bundle import CLAIMS, Bundle, load_members
from solution.bundles.store import open_bundle
from solution.config import AdapterConfig, FaceConfig, MemberConfig
from solution.data.degradation import use_one_opencv_thread
from solution.data.faces import choose_face, locate_once, make_view
from solution.data.images import decode_image, stable_seed
from solution.data.manifest import Item, read_manifest
from solution.data.self_blend import self_blend
from solution.data.views import View, degraded_picture
from solution.errors import door
from solution.evaluation import metrics
from solution.evaluation.conditions import degraded_conditions, limit_items
from solution.evaluation.measure import CLEAN, ENSEMBLE, Condition, EvaluationError, rank_correlation
from solution.evaluation.report import axes_style
from solution.models import merging as fastpath
from solution.models.calibration import sigmoid
from solution.models.member import Member
from solution.models.qtfp import (
    Qtfp,
    QtfpOutput,
    fake_likelihood_weights,
    overlap,
    read_gathered,
)
from solution.models.streams import Fusion, as_two_class, two_class_logit
from solution.models.towers import WeightsError
from solution.models.vlaforge import Vlaforge, mix_scores
from solution.scoring.ensemble import ScoringError
from solution.scoring.files import write_atomically
from solution.scoring.vote import combine
from solution.studies.drift import Bootstrap, cosine, locators_of, see
from solution.studies.drift_figures import COLOURS

BUILT = ""
LEAST_CHANGE = 0.01  # mean |change of P(fake)| from which on a mechanism acts
ALIKE = 0.9  # correlation from which on two queries look at the same patches
SAME = 0.9  # cosine, or predictability, from which on two halves are the same features
FORGED_SHARE = 0.1  # of a patch's area: forged from there on, as the VLAForge code has it
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MIXTURES = {
    share: {0.0: "local score alone", 1.0: "global score alone"}.get(share, f"alpha {share:g}") for share in ALPHAS
}
SCORES = ("global score", "local score")
HALVES = ("first half", "second half")
FOLDS = 5
# What fails a claim.
FAILED = ("dead", "alike", "blind", "same features", "not measured")

Numbers = dict[str, Any]
Rows = list[dict[str, Any]]


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
    kinds = {"qtfp": _probe_qtfp, "vlaforge": _probe_vlaforge, "fusion": _probe_fusion}
    logits, told = kinds.get(member.config.kind, _probe_stream)(member, given)
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


def _probe_stream(member: Member, given: Given) -> Probed:
    return Probed({BUILT: member(given.images).logit}, {})


def _probe_fusion(member: Fusion, given: Given) -> Probed:
    """Its halves are replaced by their means once all pictures were seen (`halves_at_mean`)."""
    output = member(given.images)
    return Probed({BUILT: output.logit}, {"pooled": output.features})


@torch.inference_mode()
def halves_at_mean(member: Fusion, pooled: np.ndarray) -> dict[str, np.ndarray]:
    """Logits (N,) of joined features (N, D + D_clip), each half in turn the same for all: its mean."""
    found, cut = {}, member.tower.width
    features = torch.from_numpy(pooled).to(member.head[0].weight)
    for name, half in zip(HALVES, (slice(0, cut), slice(cut, None))):
        changed = features.clone()
        changed[:, half] = features[:, half].mean(dim=0)
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
            if face and config.kind == "face":
                wanted.append(View(replace(config.view, source="image"), None))
            views += [view for view in wanted if view not in views]
            places = [views.index(view) for view in wanted]
            self.of[name] = (places[0], places[1] if len(places) > 1 else None)
        self.views = tuple(views)
        self.locators = locators_of(self.views)

    def plain(self, item: Item, how: Condition) -> list[Shown]:
        """A picture under a condition, faces located in it as it is then."""
        picture = _changed(decode_image(item.path), item, how)
        cut = see(picture, self.views, self.locators).views
        return [Shown(item.name, item.label, cut)]

    def blended(self, item: Item, how: Condition, seed: int) -> list[Shown]:
        """A real picture and a self-blended fake of it, drawn from (seed, name), degraded and cut alike."""
        picture = decode_image(item.path)
        found = locate_once(self.locators, picture)
        size = picture.shape[:2]
        faces = {config: choose_face(f, *size, config) for config, f in found.items()}
        rng = np.random.default_rng([seed, stable_seed(item.name)])
        fake, mask = self_blend(picture, next(iter(faces.values())), rng)

        def cut(image: np.ndarray) -> list[np.ndarray]:
            return [make_view(image, view, faces.get(config), config or FaceConfig()) for view, config in self.views]

        # Resizing may overshoot.
        masks = [m.clip(0, 1) for m in cut(mask)]
        return [
            Shown(item.name, 0, cut(_changed(picture, item, how)), masks),
            Shown(item.name, 1, cut(_changed(fake, item, how)), masks),
        ]


def _changed(picture: np.ndarray, item: Item, how: Condition) -> np.ndarray:
    if how.degradation is None:
        return picture
    return degraded_picture(picture, item.name, how.degradation, how.seed)


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
        if member.config.kind == "fusion":
            logits |= halves_at_mean(member, told["pooled"])
        elif member.config.kind == "vlaforge":
            logits |= scores_at_mean(member.config.vlaforge.alpha, told)
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


# ------------------------------------------------------------------------------------------------ numbers and words
@dataclass(frozen=True)
class Draws:
    """How intervals are drawn: 95 %, percentiles over resampled pictures."""

    seed: int
    count: int

    def mean(self, values: np.ndarray) -> Numbers | None:
        """Mean of what is not nan in (N,) with its interval; None of nothing."""
        return Bootstrap(len(values), self.seed, self.count).mean(values)


class Scores(NamedTuple):
    """What ranks N pictures, their P(fake), and the same before calibration."""

    rank: np.ndarray
    p: np.ndarray
    raw: np.ndarray


def compare(labels: np.ndarray, before: Scores, after: Scores, draws: Draws) -> Numbers:
    """A score with and without a mechanism on the same pictures (N,).

    change: mean |change of P(fake)|, its interval; shift: its mean with the sign. auc: before, after, and after less
    before (`mean`, `low`, `high`; paired bootstrap within each class); None of one class. sd: of P(fake) before
    calibration, without the mechanism.
    """
    found: Numbers = {
        "n_real": int(np.sum(labels == 0)),
        "n_fake": int(np.sum(labels == 1)),
        "change": draws.mean(np.abs(after.p - before.p)),
        "shift": float(np.mean(after.p - before.p)),
        "sd": float(np.std(after.raw)),
        "auc": None,
    }
    if found["n_real"] and found["n_fake"]:
        options = {"method": "bootstrap", "seed": draws.seed, "draws": draws.count}
        test = metrics.paired_auc_test(labels, after.rank, before.rank, **options)
        found["auc"] = {
            "before": test.auc_b,
            "after": test.auc_a,
            "mean": test.difference,
            "low": test.low,
            "high": test.high,
        }
    return found


def word_of(conditions: Mapping[str, Numbers]) -> str:
    """`acts and helps`: without it the AUC is lower under some condition, its interval below 0; `acts`: P(fake)
    changes by `LEAST_CHANGE` or more on average under some; else `dead`.
    """
    told = list(conditions.values())
    if any(t["auc"] is not None and t["auc"]["high"] < 0 for t in told):
        return "acts and helps"
    acts = any(t["change"]["mean"] >= LEAST_CHANGE for t in told)
    return "acts" if acts else "dead"


def interventions(measured: Mapping[str, Measured], bundle: Bundle, draws: Draws) -> Rows:
    """A row for every member and mechanism, and for the vote less each voter; measured: by condition."""
    rows: dict[tuple[str, str], dict[str, Numbers]] = {}
    for condition, found in measured.items():
        for name, logits in found.logits.items():
            # Ranked by logit: where P(fake) saturates, ties are none of the member's.
            scores = {
                mechanism: Scores(z, bundle.calibrators[name].apply(z), sigmoid(z)) for mechanism, z in logits.items()
            }
            before = scores.pop(BUILT)
            for mechanism in set(MIXTURES.values()) & set(scores):
                z = logits[mechanism]
                scores[mechanism] = scores[mechanism]._replace(p=in_order(before.p, z))
            for mechanism, after in scores.items():
                numbers = compare(found.labels, before, after, draws)
                rows.setdefault((name, mechanism), {})[condition] = numbers
        for mechanism, numbers in _without_each(found, bundle, draws):
            rows.setdefault((ENSEMBLE, mechanism), {})[condition] = numbers
    return [
        {"member": who, "mechanism": what, "word": word_of(told), "conditions": told}
        for (who, what), told in rows.items()
    ]


def in_order(p: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The values of p (N,) in the order of `logits` (N,), equal logits getting the same: P(fake) calibrated anew.

    Another mixture of the same two scores is on another scale than its calibrator was fitted on.
    """
    return np.interp(rankdata(logits) - 1, np.arange(len(p)), np.sort(p))


def _without_each(found: Measured, bundle: Bundle, draws: Draws) -> Iterator[tuple[str, Numbers]]:
    """The vote less each of its voters, the others' votes as they are."""
    vote = bundle.vote
    p = {n: bundle.calibrators[n].apply(found.logits[n][BUILT]) for n in vote.weights}
    voters = [name for name, weight in vote.weights.items() if weight]
    whole = combine(p, vote)
    for name in voters if len(voters) > 1 else ():
        rest = combine(p, replace(vote, weights=vote.weights | {name: 0}))
        scores = (Scores(votes, votes, votes) for votes in (whole, rest))
        yield f"without {name}", compare(found.labels, *scores, draws)


def measurements(measured: Mapping[str, Measured], members: Mapping[str, Member], draws: Draws) -> Rows:
    """What members do as they are: queries that differ, maps that find the forgery, halves that are two."""
    rows: dict[tuple[str, str], dict[str, Numbers]] = {}
    for condition, found in measured.items():
        for name, told in found.told.items():
            quantities = dict(_quantities(found.labels, told, members[name].tower.width))
            for quantity, values in quantities.items():
                numbers = draws.mean(values) if values.ndim else _plain(values)
                if numbers is not None:
                    rows.setdefault((name, quantity), {})[condition] = numbers
    return [
        {"member": who, "mechanism": what, "word": measured_word(what, told)} | {"conditions": told}
        for (who, what), told in rows.items()
    ]


def _plain(value: np.ndarray) -> Numbers:
    return {"mean": float(value), "low": None, "high": None, "n": None}


def _quantities(labels: np.ndarray, told: Mapping[str, np.ndarray], cut: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (N,) or a lone number) of everything told; cut: where the joined features' second half starts."""
    for name, values in told.items():
        if name == "correlation":
            for label, word in enumerate(("reals", "fakes")):
                part = np.where(labels == label, values, np.nan)
                yield f"correlation between queries, {word}", part
        elif name == "entropy":
            yield "entropy of attention / ln P", values
        elif name.startswith("inside: "):
            what = name.removeprefix("inside: ")
            yield f"{what} inside a fake", np.where(labels == 1, values, np.nan)
            # Forgeries lie in the middle of faces, and so may a map that sees nothing.
            twins = values[labels == 1] - values[labels == 0]
            yield f"{what} inside a fake, less its real twin", twins
        elif name == "pooled":
            first, second = values[:, :cut], values[:, cut:]
            if first.shape == second.shape:
                yield "cosine of the halves", cosine(first, second)
            yield "second half from the first", predictability(first, second)
            yield "first half from the second", predictability(second, first)


def measured_word(quantity: str, conditions: Mapping[str, Numbers]) -> str:
    """`differ` or `alike` (queries), `finds` or `blind` (maps), `different` or `same features` (halves); else ''."""
    told = list(conditions.values())
    if quantity.startswith("correlation"):
        return "alike" if any(t["mean"] >= ALIKE for t in told) else "differ"
    if "inside a fake" in quantity:
        chance = 0.0 if quantity.endswith("twin") else 0.5
        return "finds" if any(t["low"] > chance for t in told) else "blind"
    if "half" in quantity or "halves" in quantity:
        return "same features" if any(t["mean"] >= SAME for t in told) else "different"
    return ""


def predictability(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of y (N, G) a linear map of x (N, F) tells about pictures it was not fitted on, as a lone number.

    R^2 of ridge regression over held-out fifths, divided by that of y from itself: few pictures fix few directions.
    """
    own = _held_out(y, y)
    return np.array(max(0.0, _held_out(x, y)) / own if own > 0 else 0.0)


def _held_out(x: np.ndarray, y: np.ndarray) -> float:
    """R^2 over all of y's columns together, each fifth of the rows predicted from the others."""
    fold = np.arange(len(x)) % min(FOLDS, len(x))
    wrong = total = 0.0
    for k in range(fold.max() + 1):
        fit, test = fold != k, fold == k
        centre, mean = x[fit].mean(axis=0), y[fit].mean(axis=0)
        gram = (x[fit] - centre) @ (x[fit] - centre).T
        ridge = 1e-3 * np.trace(gram) / len(gram) + np.finfo(np.float64).tiny
        weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), y[fit] - mean)
        told = (x[test] - centre) @ (x[fit] - centre).T @ weights
        wrong += np.sum((y[test] - mean - told) ** 2)
        total += np.sum((y[test] - mean) ** 2)
    return 1 - wrong / total if total > 0 else 0.0


def correlations(measured: Mapping[str, Measured]) -> Rows:
    """Spearman's correlation between every two members, by condition."""
    return [
        {
            "condition": condition,
            "members": list(found.logits),
            "rank_correlation": rank_correlation([z[BUILT] for z in found.logits.values()]),
        }
        for condition, found in measured.items()
    ]


# ------------------------------------------------------------------------------------------------ claims
def read_claims(bundle: Bundle) -> list[str]:
    """What the bundle says that its mechanisms do: `MEMBER/MECHANISM`; nothing where it has no such file.

    Raises:
        WeightsError: no list of such names, or of a member that the bundle has not.
    """
    path = bundle.folder / CLAIMS
    if not path.is_file():
        return []
    try:
        claims = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: no JSON ({error})") from None
    if not (isinstance(claims, list) and all(isinstance(c, str) for c in claims)):
        raise WeightsError(f"{path}: expected a list of MEMBER/MECHANISM")
    known = {*bundle.configs, ENSEMBLE}
    for claim in claims:
        if claim.partition("/")[0] not in known:
            raise WeightsError(f"{path}: {claim!r} names no member; there are {', '.join(sorted(known))}")
    return claims


def judge_claims(claims: Sequence[str], rows: Rows) -> dict[str, str]:
    """Claim -> its word in the pool where it does best, or `not measured`; rows: of all pools."""
    found: dict[str, str] = {}
    for claim in claims:
        words = [r["word"] for r in rows if f"{r['member']}/{r['mechanism']}" == claim]
        alive = [w for w in words if w and w not in FAILED]
        best = "acts and helps" if "acts and helps" in alive else None
        found[claim] = best or (*alive, *filter(None, words), "not measured")[0]
    return found


# ------------------------------------------------------------------------------------------------ tables
def markdown(results: Mapping[str, Any]) -> str:
    """Every number as tables, with the protocol above them."""
    lines = ["# What acts in the trained members", ""]
    lines += [f"- {name}: {text}" for name, text in results["protocol"].items()]
    for claim, word in results["claims"].items():
        lines.append(f"- claimed: {claim}: {word}")
    for name, pool in results["pools"].items():
        lines += ["", f"## {name}", "", pool["pictures"]]
        if pool["interventions"]:
            lines += ["", *_intervention_table(pool["interventions"])]
        if pool["measurements"]:
            lines += ["", *_measurement_table(pool["measurements"])]
        for found in pool["rank_correlations"]:
            lines += ["", f"Rank correlation, {found['condition']}:", ""]
            body = [
                [who, *("-" if v is None else f"{v:.3f}" for v in values)]
                for who, values in zip(found["members"], found["rank_correlation"])
            ]
            lines += _table(["", *found["members"]], body)
    return "\n".join(lines) + "\n"


def _intervention_table(rows: Rows) -> list[str]:
    head = ["member", "without or instead", "word"]
    conditions = list(rows[0]["conditions"])
    for condition in conditions:
        head += [f"change of P, {condition}", "AUC", "change of AUC", "sd of P"]
    body = []
    for row in rows:
        cells = [row["member"], row["mechanism"], row["word"]]
        for condition in conditions:
            told = row["conditions"][condition]
            auc = told["auc"]
            cells.append(f"{told['change']['mean']:.4f}")
            cells.append(f"{auc['before']:.3f} to {auc['after']:.3f}" if auc else "-")
            cells += [_interval(auc, "+.4f"), f"{told['sd']:.3f}"]
        body.append(cells)
    return _table(head, body)


def _measurement_table(rows: Rows) -> list[str]:
    conditions = list(dict.fromkeys(c for row in rows for c in row["conditions"]))
    body = [
        [row["member"], row["mechanism"], row["word"] or "-"]
        + [_interval(row["conditions"].get(c), ".3f") for c in conditions]
        for row in rows
    ]
    return _table(["member", "as it is", "word", *conditions], body)


def _interval(told: Mapping[str, Any] | None, form: str) -> str:
    """`mean (low to high)`, or what of it is known."""
    if told is None:
        return "-"
    if told["low"] is None:
        return format(told["mean"], form)
    return "{} ({} to {})".format(*(format(told[k], form) for k in ("mean", "low", "high")))


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


# ------------------------------------------------------------------------------------------------ figure
def draw(rows: Rows, title: str, path: Path) -> None:
    """Two panels over one row a mechanism: mean |change of P|, and the change of AUC with its interval."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = COLOURS["light"]
    style = axes_style(colours) | {"font.size": 8.5, "axes.titlesize": 9.5}
    conditions = list(rows[0]["conditions"])
    with matplotlib.rc_context(style):
        size = (10.5, 1.5 + 0.27 * len(rows))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        left, right = figure.subplots(1, 2, sharey=True)
        for place, condition in enumerate(conditions):
            colour = colours["members"][place]
            y = np.arange(len(rows)) + 0.34 * (place - (len(conditions) - 1) / 2)
            told = [row["conditions"][condition] for row in rows]
            _bars(left, y, [t["change"] for t in told], colour, condition)
            _points(right, y, [t["auc"] for t in told], colour)
        left.axvline(LEAST_CHANGE, color=colours["muted"], linewidth=0.8, linestyle=":")
        left.set_title(f"Mean |change of P(fake)|; dotted: {LEAST_CHANGE:g}, acts")
        right.axvline(0, color=colours["muted"], linewidth=0.8)
        right.set_title("Change of AUC without it, 95 %; left of 0: it helps")
        _label(left, right, rows, colours)
        figure.legend(loc="outside lower right", ncols=2, frameon=False)
        figure.savefig(path, dpi=150)


def _bars(axes: Any, y: np.ndarray, told: Sequence[Numbers], colour: str, name: str):
    axes.barh(y, [t["mean"] for t in told], height=0.32, color=colour, label=name)
    ends = [t["low"] for t in told], [t["high"] for t in told]
    axes.hlines(y, *ends, color="#1b1d20", linewidth=0.7)


def _points(axes: Any, y: np.ndarray, told: Sequence[Numbers | None], colour: str):
    known = [k for k, t in enumerate(told) if t is not None]
    ends = [told[k]["low"] for k in known], [told[k]["high"] for k in known]
    axes.hlines(y[known], *ends, color=colour, linewidth=1.6)
    axes.plot([told[k]["mean"] for k in known], y[known], "o", color=colour, ms=3.2)


def _label(left: Any, right: Any, rows: Rows, colours: Mapping[str, Any]) -> None:
    """Names at the left, words at the right, a line between members."""
    left.set_yticks(range(len(rows)), [f"{row['member']}: {row['mechanism']}" for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(visible=False, axis="y")
        for k in range(1, len(rows)):
            if rows[k]["member"] != rows[k - 1]["member"]:
                axes.axhline(k - 0.5, color=colours["grid"], linewidth=1)
    for k, row in enumerate(rows):
        right.text(
            1.01,
            k,
            row["word"],
            transform=right.get_yaxis_transform(),
            va="center",
            color="#b3261e" if row["word"] == "dead" else colours["fg"],
        )


# ------------------------------------------------------------------------------------------------ entry
def pools_of(data: Path, splits: Sequence[str], limit: int, seed: int) -> list[Pool]:
    """By split at most `limit` pictures in a drawn order, and its real ones beside self-blended fakes of them."""
    pools = []
    for split in splits:
        items, lost = read_manifest(data, split=split)
        if lost.dropped:
            print(lost.summary(), file=sys.stderr)
        items = limit_items(items, limit, seed)
        order = np.random.default_rng(seed).permutation(len(items))
        drawn = tuple(items[i] for i in order)
        pools.append(Pool(split, drawn))
        real = tuple(item for item in drawn if item.label == 0)
        if len(real) > 1:
            pools.append(Pool(f"{split}, self-blended", real, blended=True))
    return pools


def study(bundle: Bundle, members: Mapping[str, Member], pools: Sequence[Pool], args: Any) -> dict[str, Any]:
    """Everything that `mechanisms.json` holds but the protocol and the claims: by pool."""
    from tqdm import tqdm

    eyes = Eyes(bundle.configs)
    draws = Draws(args.seed, args.draws)
    conditions = {
        "clean": CLEAN,
        "degraded": degraded_conditions([args.seed])[0],
    }
    total = sum(len(p.items) * (1 + p.blended) for p in pools) * len(conditions)
    found = {}
    with tqdm(total=total, unit="picture", disable=args.quiet) as bar:
        for pool in pools:
            bar.set_description(pool.name)
            options = {"seed": args.seed, "batch": args.batch_size, "done": bar.update}
            measured = {name: measure_pool(members, eyes, pool, how, **options) for name, how in conditions.items()}
            labels = measured["clean"].labels
            found[pool.name] = {
                "pictures": f"{np.sum(labels == 0)} real, {np.sum(labels == 1)} fake",
                "interventions": interventions(measured, bundle, draws),
                "measurements": measurements(measured, members, draws),
                "rank_correlations": correlations(measured),
            }
    return found


def _protocol(args: argparse.Namespace, bundle: Bundle, device: Any) -> dict[str, str]:
    engine = degraded_conditions([args.seed])[0]
    return {
        "weights": f"{bundle.name} {bundle.hash[:12]}, float32, {device}",
        "data": f"{args.data.name}, split {args.split}, at most {args.limit or 'all'} pictures each, seed {args.seed}",
        "degraded": f"{engine.text}, drawn from ({args.seed}, picture name)",
        "self-blended": "the split's real pictures and a fake of each (SBI), faces located in the clean real one",
        "another picture": f"drawn from the same batch of {args.batch_size}, in a drawn order",
        "P": "calibrated P(fake), for other mixtures (alpha) with the built one's values in their order; AUC ranks by "
        "logit; sd of P: without the mechanism, before calibration",
        "inside a fake": "AUC of forged against untouched patches; the real twin's map is asked at the same place",
        "intervals": f"95 %, {args.draws} paired bootstrap draws over pictures",
        "words": f"acts and helps: without it the AUC falls, interval below 0, clean or degraded; acts: P changes by "
        f"{LEAST_CHANGE:g} or more on average; dead: neither",
    }


def write(results: Mapping[str, Any], out: Path) -> str:
    """`mechanisms.json`, `mechanisms.md` and a figure a pool (the first is `mechanisms.png`); the Markdown's text."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "mechanisms.json", json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    write_atomically(out / "mechanisms.md", text)
    for number, (name, pool) in enumerate(results["pools"].items()):
        if pool["interventions"]:
            ending = "-" + name.replace(", ", "-").replace("/", "-") if number else ""
            title = f"{name}: {pool['pictures']}"
            draw(pool["interventions"], title, out / f"mechanisms{ending}.png")
    return text


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; 1 when something claimed is dead, else 0."""
    use_one_opencv_thread()
    fastpath.set_threads()
    bundle = open_bundle(args.weights)
    claims = read_claims(bundle)
    splits = [split.strip() for split in args.split.split(",")]
    pools = pools_of(args.data, splits, args.limit, args.seed)
    device = fastpath.pick_device(args.device)
    members = load_members(bundle, device=device)
    found = study(bundle, members, pools, args)
    rows = [row for pool in found.values() for row in (*pool["interventions"], *pool["measurements"])]
    words = judge_claims(claims, rows)
    results = {
        "protocol": _protocol(args, bundle, device),
        "bundle": bundle.hash,
        "claimed": claims,
        "claims": words,
        "pools": found,
    }
    print(write(results, args.out))
    failed = [f"{claim} ({word})" for claim, word in words.items() if word in FAILED]
    for claim in failed:
        print(f"mechanisms: claimed, but not alive: {claim}", file=sys.stderr)
    return 1 if failed else 0


def _count(text: str, least: int = 0) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}; at least {least}")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m solution.studies.mechanisms",
        description="Take every mechanism of a trained bundle away, and say what that changes.",
    )
    add = parser.add_argument
    add("--weights", required=True, help="a bundle")
    add("--data", type=Path, required=True, help="manifest: CSV, JSON, or a folder")
    add("--out", type=Path, required=True, help="folder for table, JSON and figures")
    add("--split", default="val", help="comma-separated, results apart (default val)")
    add("--limit", type=_count, default=200, help="pictures of each split; 0: all")
    add("--seed", type=int, default=7, help="of the degradation and every draw")
    add("--device", default="auto")
    add("--batch-size", type=lambda t: _count(t, 2), default=16)
    add("--draws", type=lambda t: _count(t, 10), default=1000, help="of the bootstrap")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


@door("mechanisms", interrupted="interrupted; nothing was written")
def main(argv: list[str] | None = None) -> int:
    """0 done, 1 a claim is dead, 2 usage, 3 environment, weights or an unreadable picture, 130 interrupted."""
    return run(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
