"""Fit a bundle's calibrators, votes and threshold on validation logits, and say what the choice is worth.

Raw logits (N,) float64 by member, positive = fake, of the same N validation pictures clean and degraded, with labels
(N,), become calibrators, a `VoteConfig` and a comparison of the ways of voting in plain JSON values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from solution.config import VoteConfig
from solution.evaluation import metrics
from solution.evaluation.search import VoteSearch, search_weights, threshold_at_false_alarm, unsure_band
from solution.models import calibration
from solution.models.calibration import Calibrator
from solution.presets import NTIRE26_VOTE
from solution.scoring.vote import combine

WAYS = ("probability", "logit", "levels", "levels_rounded")
REFERENCES = ("best single", "published recipe")  # what every way is compared with

Logits = dict[str, np.ndarray]


class Known(NamedTuple):
    """What is known of the rows (R,) of some logits: label, picture (a group stays in one fold), `clean` or `degraded`."""

    labels: np.ndarray
    groups: np.ndarray
    conditions: np.ndarray

    def at(self, rows: np.ndarray) -> Known:
        """The same of these rows."""
        return Known(*(values[rows] for values in self))


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How an ensemble is fitted.

    mean, step: of the vote. max_vote: the most votes of a member; penalty: AUC that a voter more must bring. false_alarm:
    the share of reals (clean and degraded) that the threshold may call fake; unsure_share: of the pictures nearest to it.
    folds: of the cross-validation; fewer where a class has less than two pictures a fold. seed, draws: of the bootstrap.
    """

    mean: str = "levels"
    step: float = 0.1
    max_vote: int = 3
    penalty: float = 0.002
    false_alarm: float = 0.05
    unsure_share: float = 0.1
    folds: int = 5
    seed: int = 0
    draws: int = 1000


def fit_ensemble(
    clean: Mapping[str, np.ndarray],
    degraded: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]],
    labels: np.ndarray,
    *,
    fitted_on: str = "",
    settings: FitSettings | None = None,
) -> tuple[dict[str, Calibrator], VoteConfig, dict[str, Any]]:
    """Calibrators, votes, threshold and `unsure` band of a bundle, and how they fare on pictures not fitted on.

    clean, degraded: raw validation logits (N,) by member, of the same N pictures in the same order; `degraded` may be
    several, one per seed, and the clean ones then count as often. Both are fitted together, because a submission does
    not say which pictures are degraded. Four of each class are the least.

    Returns the comparison as plain JSON values. All its figures are cross-validated: calibrators, votes, the best
    single member and the threshold are chosen on the other folds, a picture's versions staying together.
    """
    settings = settings or FitSettings()
    labels, seed = np.asarray(labels), settings.seed
    drawn = [degraded] if isinstance(degraded, Mapping) else list(degraded)
    logits = _stacked(clean, drawn, labels)
    rarest = int(min(np.sum(labels == 0), np.sum(labels == 1)))
    if rarest < 4:
        raise ValueError(
            f"{rarest} pictures of the rarer class: fitting an ensemble needs four real and four fake ones"
        )
    folds = min(settings.folds, rarest // 2)
    versions = 2 * len(drawn)
    index = np.tile(np.arange(len(labels)), versions)
    conditions = np.repeat(["clean", "degraded"], len(index) // 2)
    known = Known(np.tile(labels, versions), index, conditions)
    options = {"step": settings.step, "max_vote": settings.max_vote, "penalty": settings.penalty}
    calibrators, search = _fit_part(logits, known, options, folds, seed)
    calibrators = {
        name: dataclasses.replace(fitted, fitted_on=fitted_on or fitted.fitted_on)
        for name, fitted in calibrators.items()
    }
    vote = VoteConfig(search.weights, step=settings.step, mean=settings.mean, false_alarm=settings.false_alarm)
    held = _held_out(logits, known, vote, options, folds, seed)
    chosen = _chosen(held["scores"], known, settings.mean, settings.penalty)
    if chosen == "equal votes":
        vote = dataclasses.replace(vote, weights=dict.fromkeys(logits, 1))
    held["fake"] = held["fake"][chosen]
    scores = combine(_applied(calibrators, logits), vote)
    threshold = threshold_at_false_alarm(known.labels, scores, settings.false_alarm)
    band = unsure_band(scores, threshold, settings.unsure_share)
    vote = dataclasses.replace(vote, threshold=threshold, unsure=band)
    comparison = _comparison(logits, known, held, seed, settings.draws)
    comparison["at_threshold"]["asked"] = settings.false_alarm
    comparison["search"] = {**search._asdict(), **options}
    comparison["chosen"] = chosen
    return calibrators, vote, comparison


def _stacked(
    clean: Mapping[str, np.ndarray],
    drawn: Sequence[Mapping[str, np.ndarray]],
    labels: np.ndarray,
) -> Logits:
    """(2 S N,) logits of each member: the clean ones S times, then those of the S seeds."""
    if not clean or not drawn or any(set(d) != set(clean) for d in drawn):
        raise ValueError(
            f"clean logits of {sorted(clean)}, degraded ones of {[sorted(d) for d in drawn]}: expected the same members"
        )
    for logits in (clean, *drawn):
        for name, values in logits.items():
            if np.shape(values) != labels.shape:
                raise ValueError(f"{name}: {np.shape(values)} logits for {labels.shape} labels")
    return {name: np.concatenate([clean[name]] * len(drawn) + [d[name] for d in drawn]) for name in clean}


def _applied(calibrators: Mapping[str, Calibrator], logits: Logits) -> Logits:
    """P(fake) of each member."""
    return {name: calibrators[name].apply(x) for name, x in logits.items()}


def _fit_part(
    logits: Logits, known: Known, options: Mapping[str, Any], folds: int, seed: int
) -> tuple[dict[str, Calibrator], VoteSearch]:
    """Calibrators and the vote search, fitted on these rows alone."""
    calibrators = {
        name: calibration.fit(x, known.labels, groups=known.groups, folds=folds, seed=seed)
        for name, x in logits.items()
    }
    p = _applied(calibrators, logits)
    search = search_weights(p, known.labels, groups=known.conditions, **options)
    return calibrators, search


def _held_out(
    logits: Logits,
    known: Known,
    vote: VoteConfig,
    options: Mapping[str, Any],
    folds: int,
    seed: int,
) -> dict[str, Any]:
    """Every member and every way of voting on pictures that neither fitted nor chose anything: `p` and `scores` (R,) by
    name, `fake` (R,) bool verdicts at the threshold by the way the votes were found, and each fold's `weights`."""
    count = len(known.labels)
    ways = [way for way in WAYS if way != "levels_rounded" or vote.step in (0.1, 0.01)]
    names = [*ways, "equal votes", "best single"]
    scores = {name: np.empty(count) for name in names}
    p = {name: np.empty(count) for name in logits}
    fake = {way: np.empty(count, dtype=bool) for way in ("search", "equal votes")}
    weights = []
    parts = calibration.split(known.labels, known.groups, folds=folds, seed=seed)
    for train, held in parts:
        of_train = {name: x[train] for name, x in logits.items()}
        at_train = known.at(train)
        calibrators, search = _fit_part(of_train, at_train, options, folds, seed)
        weights.append(search.weights)
        p_train = _applied(calibrators, of_train)
        p_held = _applied(calibrators, {n: x[held] for n, x in logits.items()})
        for name in logits:
            p[name][held] = p_held[name]
        for way in ways:
            config = VoteConfig(search.weights, step=vote.step, mean=way)
            scores[way][held] = combine(p_held, config)
        equal = VoteConfig(dict.fromkeys(logits, 1), step=vote.step, mean=vote.mean)
        scores["equal votes"][held] = combine(p_held, equal)
        scores["best single"][held] = p_held[_best_single(p_train, at_train)]
        sought = VoteConfig(search.weights, step=vote.step, mean=vote.mean)
        for way, config in (("search", sought), ("equal votes", equal)):
            votes = combine(p_train, config)
            at = threshold_at_false_alarm(at_train.labels, votes, vote.false_alarm)
            fake[way][held] = combine(p_held, config) >= at
    if set(NTIRE26_VOTE.weights) <= set(logits):  # fits nothing: every row is held out
        raw = {n: calibration.sigmoid(logits[n]) for n in NTIRE26_VOTE.weights}
        scores["published recipe"] = combine(raw, NTIRE26_VOTE)
    return {"scores": scores, "p": p, "fake": fake, "weights": weights}


def _chosen(scores: Mapping[str, np.ndarray], known: Known, mean: str, penalty: float) -> str:
    """`search`, or `equal votes` where those rank the held-out pictures better by more than `penalty`.

    A search over hundreds of votes on some thousand pictures also fits their noise, and may drop a member that would
    have helped on others; to ask everybody has to earn what the search asks of a further voter.
    """
    gain = _area(scores["equal votes"], known) - _area(scores[mean], known)
    return "equal votes" if gain > penalty else "search"


def _area(scores: np.ndarray, known: Known) -> float:
    """AUC, averaged over the conditions."""
    parts = [known.conditions == c for c in np.unique(known.conditions)]
    areas = [metrics.auc(known.labels[rows], scores[rows]) for rows in parts]
    return float(np.mean(areas))


def _best_single(p: Logits, known: Known) -> str:
    """The member of highest AUC, averaged over the conditions."""
    return max(p, key=lambda name: _area(p[name], known))


def _comparison(logits: Logits, known: Known, held: Mapping[str, Any], seed: int, draws: int) -> dict[str, Any]:
    """What `_held_out` found, per condition: AUCs with intervals, differences to the best single member and to the
    published recipe (2:1:2 of the three streams, uncalibrated, rounded twice), ECE with its floor."""
    ways: dict[str, Any] = {name: {} for name in held["scores"]}
    members: dict[str, Any] = {name: {} for name in logits}
    alarms = {}
    count = len(np.unique(known.groups))
    labels = known.labels[:count]  # the same pictures, in the same order, in every run

    def area(runs: np.ndarray) -> dict[str, float]:
        found = metrics.auc_interval(labels, runs, seed=seed, draws=draws)
        return found._asdict()

    for condition in ("clean", "degraded"):
        rows = known.conditions == condition

        def runs(values: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
            return values[rows].reshape(-1, count)  # (S, N)

        for name, scores in held["scores"].items():
            ways[name][condition] = area(runs(scores))
            for other in REFERENCES:
                if other not in held["scores"]:
                    continue
                test = metrics.paired_auc_test(
                    labels,
                    runs(scores),
                    runs(held["scores"][other]),
                    method="bootstrap",
                    seed=seed,
                    draws=draws,
                )
                told = {k: getattr(test, k) for k in ("difference", "low", "high", "p")}
                ways[name][condition][f"minus_{other.replace(' ', '_')}"] = told
        for name, p in held["p"].items():
            found = area(runs(p))
            raw = calibration.sigmoid(logits[name])
            for when, x in (("before", runs(raw)), ("after", runs(p))):
                for measured in (metrics.ece, metrics.log_loss):
                    mean = float(np.mean([measured(labels, run) for run in x]))
                    found[f"{measured.__name__}_{when}"] = mean
            found |= metrics.ece_floors(runs(p))
            members[name][condition] = found
        fake = runs(held["fake"])
        alarms[condition] = {
            "false_alarms": float(fake[:, labels == 0].mean()),
            "fakes_found": float(fake[:, labels == 1].mean()),
        }
    seeds = len(known.labels) // (2 * count)
    return {
        "protocol": f"{count} pictures, each clean and degraded ({seeds} seeds); {len(held['weights'])}-fold "
        f"cross-validation over pictures, everything chosen on the other folds; {draws} bootstrap draws, seed {seed}",
        "ways": ways,
        "members": members,
        "weights_by_fold": held["weights"],
        "at_threshold": alarms,
    }
