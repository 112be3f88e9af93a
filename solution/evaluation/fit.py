"""Fit a bundle's calibrators, votes and threshold on validation logits, and say what the choice is worth.

Raw logits (N,) float64 by member, positive = fake, of the same N validation pictures clean and degraded, with what is
known of the pictures, become calibrators, a `VoteConfig` and a comparison of the ways of voting in plain JSON values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from solution.config import VoteConfig
from solution.data.manifest import Item
from solution.evaluation import metrics
from solution.evaluation.measure import rank_correlation
from solution.evaluation.search import (
    VoteSearch,
    false_alarms,
    search_weights,
    stack_weights,
    threshold_at_false_alarm,
    unsure_band,
)
from solution.models import calibration
from solution.models.calibration import Calibrator
from solution.presets import NTIRE26_VOTE
from solution.scoring.vote import combine, decide

# The ways of voting, the simplest first: whose votes, and how they are combined.
WAYS = {
    "equal votes": ("equal", "levels"),
    "levels": ("search", "levels"),
    "levels_rounded": ("search", "levels_rounded"),
    "maximum": ("equal", "maximum"),
    "noisy_or": ("equal", "noisy_or"),
    "equal probability": ("equal", "probability"),
    "probability": ("search", "probability"),
    "logit": ("search", "logit"),
    "stacked": ("stack", "logit"),
}
REFERENCES = ("best single", "published recipe")  # what every way is compared with
LEAST_GENERATORS = 4  # fewer make no folds over generators

Logits = dict[str, np.ndarray]


@dataclass(frozen=True)
class FitOptions:
    """How a vote is fitted.

    step: the grid of a level. max_vote, penalty: of the search; a way of voting less simple must gain `penalty` AUC.
    false_alarm, worst_false_alarm: what the threshold holds, as a mean over real sources and of the worst one.
    unsure_share: of the pictures, those nearest to the threshold. folds: fewer where a class has less than two pictures
    a fold. draws: of the bootstrap.
    """

    step: float = 0.1
    max_vote: int = 3
    penalty: float = 0.002
    false_alarm: float = 0.05
    worst_false_alarm: float = 0.10
    unsure_share: float = 0.1
    folds: int = 5
    seed: int = 0
    draws: int = 1000


class Known(NamedTuple):
    """What is known of pictures, or of the rows of their logits, each (R,).

    labels; sources; generators (empty: real, or not known); unseen: bool, of a generator that nothing trained on;
    groups: a picture's rows, or a person's pictures, stay in one fold; conditions: `clean` or `degraded`.
    """

    labels: np.ndarray
    sources: np.ndarray
    generators: np.ndarray
    unseen: np.ndarray
    groups: np.ndarray
    conditions: np.ndarray

    @classmethod
    def of(cls, items: Sequence[Item]) -> Known:
        """The pictures of a manifest. What an unseen source holds is one generator, however many made it."""
        return cls.plain(
            np.array([item.label for item in items]),
            sources=np.array([item.source for item in items]),
            generators=np.array(
                [
                    (item.source if item.split == "unseen" else item.generator or item.source) if item.label else ""
                    for item in items
                ]
            ),
            unseen=np.array([item.split == "unseen" for item in items]),
            groups=np.array([item.group or item.name for item in items]),
        )

    @classmethod
    def plain(cls, labels: np.ndarray, **given: np.ndarray) -> Known:
        """Pictures of which no more than `given` is known: one source, every picture for itself, none unseen."""
        labels = np.asarray(labels)
        blank = np.full(len(labels), "")
        rest = {"sources": blank, "generators": blank, "conditions": blank}
        rest |= {"unseen": np.zeros(len(labels), bool), "groups": np.arange(len(labels))}
        return cls(labels, **(rest | given))

    def at(self, rows: np.ndarray) -> Known:
        """The same of these rows."""
        return Known(*(values[rows] for values in self))

    def cells(self) -> dict[str, np.ndarray]:
        """Row numbers of `clean` and `degraded`, and of `unseen_clean` and `unseen_degraded` where there are any."""
        found = {}
        for unseen in (False, True):
            for condition in ("clean", "degraded"):
                rows = np.flatnonzero((self.conditions == condition) & (self.unseen == unseen))
                if len(rows):
                    found["unseen_" * unseen + condition] = rows
        return found


class Folds(NamedTuple):
    """`number` (R,): the fold that a row is held out in. over: what a fold holds out, `generators` or `pictures`."""

    number: np.ndarray
    over: str


@dataclass(frozen=True)
class Fitted:
    """What rows alone gave: calibrators, the vote of every way, the member of highest AUC, and the search."""

    calibrators: dict[str, Calibrator]
    votes: dict[str, VoteConfig]
    best_single: str
    search: VoteSearch


def fit_ensemble(
    clean: Mapping[str, np.ndarray],
    degraded: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]],
    pictures: Known,
    options: FitOptions = FitOptions(),
    *,
    fitted_on: str = "",
) -> tuple[dict[str, Calibrator], VoteConfig, dict[str, Any]]:
    """Calibrators, votes, threshold and `unsure` band of a bundle, and how they fare on generators not fitted on.

    clean, degraded: raw validation logits (N,) by member, of the same N pictures in the same order; `degraded` may be
    several, one per seed, and the clean ones then count as often. All are fitted together, because a submission does
    not say which pictures are degraded, nor by which generator. What ranks a way of voting is the mean of its AUCs on
    seen and unseen generators, clean and degraded (`Known.cells`; unseen: the mean over sources).

    Returns the comparison as plain JSON values. All its figures are cross-validated: calibrators, votes, the best
    single member and the threshold are chosen on the other folds, a generator being on one side only.

    Raises:
        ValueError: fewer than four pictures of a class, or logits that do not belong together.
    """
    drawn = [degraded] if isinstance(degraded, Mapping) else list(degraded)
    logits = _stacked(clean, drawn, pictures.labels)
    rarest = _rarest(pictures)
    if rarest < 4:
        raise ValueError(
            f"{rarest} pictures of the rarer class (of different people, where groups are given): fitting an ensemble "
            "needs four real and four fake ones"
        )
    options = replace(options, folds=min(options.folds, rarest // 2))
    versions = 2 * len(drawn)
    known = Known(*(np.tile(values, versions) for values in pictures))
    known = known._replace(conditions=np.repeat(["clean", "degraded"], len(known.labels) // 2))
    folds = make_folds(pictures, options)
    folds = folds._replace(number=np.tile(folds.number, versions))
    held = _held_out(logits, known, folds, options)
    fitted = _fit_part(logits, known, options)
    chosen = _chosen(held["scores"], known, folds, options.penalty)
    calibrators = {n: replace(c, fitted_on=fitted_on or c.fitted_on) for n, c in fitted.calibrators.items()}
    scores = combine(_applied(calibrators, logits), fitted.votes[chosen])
    vote = _with_threshold(fitted.votes[chosen], known, scores, options)
    comparison = _comparison(logits, known, folds, held, options, len(pictures.labels))
    comparison["at_threshold"] = _at_threshold(known, held["fake"][chosen], held["words"][chosen]) | {
        "asked": options.false_alarm,
        "asked_of_worst_source": options.worst_false_alarm,
        "false_alarms_by_source_as_fitted": false_alarms(known.labels, scores >= vote.threshold, known.sources),
    }
    comparison["generators"] = _by_generator(logits, known, folds, {f: x[chosen] for f, x in held["all"].items()})
    comparison["search"] = {**fitted.search._asdict(), "weights_stacked": fitted.votes["stacked"].weights}
    comparison["options"] = asdict(options)
    comparison["chosen"] = chosen
    return calibrators, vote, comparison


def _rarest(known: Known) -> int:
    """How many groups the rarer class has."""
    return min(len(np.unique(known.groups[known.labels == c])) for c in (0, 1))


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


# ------------------------------------------------------------------------------------------------ folds
def make_folds(pictures: Known, options: FitOptions) -> Folds:
    """Folds over generators: all fakes of one are held out together, and with them the reals of a source whose fakes
    one generator made. Other reals are dealt out by group. With too few generators, folds over pictures.
    """
    labels, rng = pictures.labels, np.random.default_rng(options.seed)
    number = np.full(len(labels), -1)
    generators, counts = np.unique(pictures.generators[labels == 1], return_counts=True)
    if len(generators) < LEAST_GENERATORS:
        parts = calibration.split(labels, pictures.groups, folds=options.folds, seed=options.seed)
        for fold, (_, held) in enumerate(parts):
            number[held] = fold
        return Folds(number, "pictures")
    sizes = np.zeros(min(options.folds, len(generators)))
    unseen = [pictures.unseen[(labels == 1) & (pictures.generators == g)].any() for g in generators]
    # Each to the emptiest fold: unseen ones first, so that they do not meet in one, then the largest first.
    for generator in generators[np.lexsort((-counts, ~np.array(unseen)))]:
        rows = (labels == 1) & (pictures.generators == generator)
        fold = int(np.argmin(sizes))
        number[rows] = fold
        sizes[fold] += rows.sum()
    for source in np.unique(pictures.sources):
        reals = (labels == 0) & (pictures.sources == source)
        of_fakes = np.unique(number[(labels == 1) & (pictures.sources == source)])
        if len(of_fakes) == 1 and pictures.unseen[reals].all():
            number[reals] = of_fakes[0]
            continue
        groups, which = np.unique(pictures.groups[reals], return_inverse=True)
        number[reals] = rng.permutation(np.arange(len(groups)) % len(sizes))[which]
    return Folds(number, "generators")


def _held_parts(known: Known, folds: Folds, rows: np.ndarray) -> list[np.ndarray]:
    """The rows of a cell as parts to be ranked apart: of each source where unseen, and of each fold over generators,
    whose calibrators differ."""
    parts = [rows]
    if folds.over == "generators":
        parts = [rows[folds.number[rows] == fold] for fold in np.unique(folds.number[rows])]
    return [part for whole in parts for part in _parts(known, whole) if len(set(known.labels[part])) == 2]


def _parts(known: Known, rows: np.ndarray) -> list[np.ndarray]:
    """A cell's rows, those of unseen generators by source."""
    if not known.unseen[rows].any():
        return [rows]
    return [rows[part] for part in metrics.parts_by_source(known.labels[rows], known.sources[rows])]


# ------------------------------------------------------------------------------------------------ fitting
def _applied(calibrators: Mapping[str, Calibrator], logits: Logits) -> Logits:
    """P(fake) of each member."""
    return {name: calibrators[name].apply(x) for name, x in logits.items()}


def _fit_part(logits: Logits, known: Known, options: FitOptions) -> Fitted:
    """Everything that is fitted, on these rows alone."""
    folds = min(options.folds, _rarest(known))
    parts = calibration.split(known.labels, known.groups, folds=folds, seed=options.seed)
    calibrators = {
        name: calibration.fit(x, known.labels, groups=known.groups, parts=parts) for name, x in logits.items()
    }
    p = _applied(calibrators, logits)
    cells = [_parts(known, rows) for rows in known.cells().values()]

    def area(scores: np.ndarray) -> float:
        return _mean_area(known.labels, scores, cells)

    search = search_weights(p, area, max_vote=options.max_vote, penalty=options.penalty, step=options.step)
    weights = {
        "equal": dict.fromkeys(logits, 1),
        "search": search.weights,
        "stack": stack_weights(p, known.labels, _importance(known)),
    }
    votes = {
        way: VoteConfig(weights[whose], step=options.step, mean=mean)
        for way, (whose, mean) in WAYS.items()
        if mean != "levels_rounded" or options.step in (0.1, 0.01)
    }
    return Fitted(calibrators, votes, max(p, key=lambda name: area(p[name])), search)


def _mean_area(labels: np.ndarray, scores: np.ndarray, cells: Sequence[Sequence[np.ndarray]]) -> float:
    """The mean over the cells that have both classes of the mean AUC over a cell's parts.

    scores (R,): floats, or whole steps.
    """
    measured = metrics.auc_of_steps if scores.dtype.kind == "i" else metrics.auc
    told = [[measured(labels[p], scores[p]) for p in parts if 0 < labels[p].mean() < 1] for parts in cells]
    return float(np.mean([np.mean(areas) for areas in told if areas]))


def _importance(known: Known) -> np.ndarray:
    """(R,) every cell counts alike, in it every source, and in it both classes as they are."""
    weight = np.zeros(len(known.labels))
    for rows in known.cells().values():
        for source in np.unique(known.sources[rows]):
            of_source = rows[known.sources[rows] == source]
            weight[of_source] = 1 / len(of_source)
        weight[rows] /= weight[rows].sum()
    for label in (0, 1):
        weight[known.labels == label] /= weight[known.labels == label].sum()
    return weight


def _with_threshold(vote: VoteConfig, known: Known, scores: np.ndarray, options: FitOptions) -> VoteConfig:
    """The vote with the threshold and the `unsure` band that its scores (R,) of these rows ask for."""
    threshold = threshold_at_false_alarm(
        known.labels, scores, options.false_alarm, sources=known.sources, worst=options.worst_false_alarm
    )
    return replace(
        vote,
        threshold=threshold,
        unsure=unsure_band(scores, threshold, options.unsure_share),
        false_alarm=options.false_alarm,
        worst_false_alarm=options.worst_false_alarm,
    )


def _held_out(logits: Logits, known: Known, folds: Folds, options: FitOptions) -> dict[str, Any]:
    """Every member and every way of voting on rows that neither fitted nor chose anything: `p` and `scores` (R,) by
    name, by way `fake` (R,) bool, at the threshold or above, and `words` (R,) of `vote.decide`, and each fold's `weights`
    of the search; `all`: by fold, the ways on all rows."""
    count = len(known.labels)
    p = {name: np.empty(count) for name in logits}
    scores: dict[str, np.ndarray] = {}
    fake: dict[str, np.ndarray] = {}
    words: dict[str, np.ndarray] = {}
    weights = []
    everywhere: dict[int, dict[str, np.ndarray]] = {}
    for fold in np.unique(folds.number):
        train, held = np.flatnonzero(folds.number != fold), np.flatnonzero(folds.number == fold)
        of_train = {name: x[train] for name, x in logits.items()}
        fitted = _fit_part(of_train, known.at(train), options)
        weights.append(fitted.search.weights)
        p_all = _applied(fitted.calibrators, logits)
        everywhere[int(fold)] = votes = {way: combine(p_all, vote) for way, vote in fitted.votes.items()}
        for name in logits:
            p[name][held] = p_all[name][held]
        for way, of_all in votes.items():
            scores.setdefault(way, np.empty(count))[held] = of_all[held]
            vote = _with_threshold(fitted.votes[way], known.at(train), of_all[train], options)
            fake.setdefault(way, np.empty(count, bool))[held] = of_all[held] >= vote.threshold
            words.setdefault(way, np.empty(count, "<U6"))[held] = decide(of_all[held], vote)
        scores.setdefault("best single", np.empty(count))[held] = p_all[fitted.best_single][held]
    if set(NTIRE26_VOTE.weights) <= set(logits):  # fits nothing: every row is held out
        raw = {n: calibration.sigmoid(logits[n]) for n in NTIRE26_VOTE.weights}
        scores["published recipe"] = combine(raw, NTIRE26_VOTE)
    return {"scores": scores, "p": p, "fake": fake, "words": words, "weights": weights, "all": everywhere}


def _chosen(scores: Mapping[str, np.ndarray], known: Known, folds: Folds, penalty: float) -> str:
    """The simplest way of voting whose held-out area (`_mean_area` over the cells) is within `penalty` of the best.

    A search over hundreds of votes on some thousand pictures also fits their noise, and may drop a member that would
    have helped on others; what is less simple has to earn it.
    """
    cells = [_held_parts(known, folds, rows) for rows in known.cells().values()]
    areas = {way: _mean_area(known.labels, scores[way], cells) for way in WAYS if way in scores}
    return next(way for way, area in areas.items() if area >= max(areas.values()) - penalty)


# ------------------------------------------------------------------------------------------------ what it is worth
def _comparison(
    logits: Logits, known: Known, folds: Folds, held: Mapping[str, Any], options: FitOptions, count: int
) -> dict[str, Any]:
    """What `_held_out` found, per cell: AUCs with intervals, differences to the best single member and to the published
    recipe (2:1:2 of the three streams, uncalibrated, rounded twice), ECE with its floor."""
    ways: dict[str, Any] = {name: {} for name in held["scores"]}
    members: dict[str, Any] = {name: {} for name in logits}
    for cell, rows in known.cells().items():
        seeds = rows.reshape(-1, int(np.sum(rows < rows[0] + count)))  # (S, n): the same pictures in every seed
        first = known.at(seeds[0])
        alone = folds._replace(number=folds.number[seeds[0]])
        parts = _held_parts(first, alone, np.arange(len(first.labels)))
        if not parts:
            continue  # one class only: nothing to rank
        named = {name: values[seeds] for name, values in (held["scores"] | held["p"]).items()}
        told = metrics.mean_aucs(first.labels, named, parts, seed=options.seed, draws=options.draws)
        for name in named:
            of_cell = _interval(*told[name])
            if name in ways:
                for other in REFERENCES:
                    if other in told:
                        of_cell[f"minus_{other.replace(' ', '_')}"] = _difference(told[name], told[other])
                ways[name][cell] = of_cell
            else:
                members[name][cell] = of_cell | _calibration_errors(first.labels, logits[name], held["p"][name], seeds)
    over = folds.over
    return {
        "protocol": f"{count} pictures, each clean and degraded ({len(known.labels) // (2 * count)} seeds); "
        f"{len(held['weights'])}-fold cross-validation over {over}, everything chosen on the other folds; AUC "
        f"{'inside each held-out fold, mean over folds' if over == 'generators' else 'over all pictures'}"
        f"{', of unseen generators the mean over sources' if known.unseen.any() else ''}; "
        f"{options.draws} bootstrap draws, seed {options.seed}",
        "ways": ways,
        "members": members,
        "rank_correlation": _rank_correlations(logits, known),
        "weights_by_fold": held["weights"],
    }


def _by_generator(logits: Logits, known: Known, folds: Folds, votes: Mapping[int, np.ndarray]) -> list[dict[str, Any]]:
    """AUC of each generator's fakes per condition, of every member's logits and of the vote: against the reals of its own
    source where it has any, else against all reals of seen sources. votes: by fold, of all rows (R,) as the rows outside
    that fold fitted it; a generator's is the one that was fitted without its fakes."""
    told = []
    for generator in np.unique(known.generators[known.labels == 1]):
        for condition in ("clean", "degraded"):
            fakes = (known.generators == generator) & (known.labels == 1) & (known.conditions == condition)
            sources = np.unique(known.sources[fakes])
            real = (known.labels == 0) & (known.conditions == condition)
            own = real & np.isin(known.sources, sources)
            against = own if own.any() else real & ~known.unseen
            rows = np.flatnonzero(fakes | against)
            if not fakes.any() or not against.any():
                continue
            scores = {"vote": votes[int(folds.number[fakes][0])], **logits}
            told.append(
                {
                    "generator": str(generator),
                    "source": ", ".join(map(str, sources)),
                    "condition": condition,
                    "unseen": bool(known.unseen[fakes].any()),
                    "reals": "its source's" if own.any() else "all seen",
                    "n_fake": int(fakes.sum()),
                    "n_real": int(against.sum()),
                    "auc": {who: metrics.auc(known.labels[rows], values[rows]) for who, values in scores.items()},
                }
            )
    return told


def _interval(value: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = metrics.ends(drawn)
    return {"value": value, "low": low, "high": high, "level": 0.95}


def _difference(a: tuple[float, np.ndarray], b: tuple[float, np.ndarray]) -> dict[str, float]:
    drawn = a[1] - b[1]
    side = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    told = _interval(a[0] - b[0], drawn)
    p = min(1.0, 2 * (side + 1) / (len(drawn) + 1))
    return {"difference": told["value"], "low": told["low"], "high": told["high"], "p": float(p)}


def _calibration_errors(labels: np.ndarray, logits: np.ndarray, p: np.ndarray, seeds: np.ndarray) -> dict[str, float]:
    """ECE and log-loss before and after calibration, means over the seeds (S, n)."""
    found = {}
    for when, x in (("before", calibration.sigmoid(logits)), ("after", p)):
        for measured in (metrics.ece, metrics.log_loss):
            found[f"{measured.__name__}_{when}"] = float(np.mean([measured(labels, x[rows]) for rows in seeds]))
    return found | metrics.ece_floors(p[seeds])


def _rank_correlations(logits: Logits, known: Known) -> dict[str, dict[str, float | None]]:
    """Spearman's correlation of every two members' logits, per cell, as `a b`."""
    names, found = list(logits), {}
    for cell, rows in known.cells().items():
        table = rank_correlation([logits[name][rows] for name in names])
        found[cell] = {f"{a} {b}": table[i][j] for i, a in enumerate(names) for j, b in enumerate(names) if i < j}
    return found


def _at_threshold(known: Known, fake: np.ndarray, words: np.ndarray) -> dict[str, Any]:
    """Held-out verdicts by cell: which share lies at the threshold or above (false alarms, fakes found), and which share
    is `called` what, given the `unsure` band; then false alarms by real source, of all pictures and of clean ones."""
    told: dict[str, Any] = {}
    for cell, rows in known.cells().items():
        of = {"real": rows[known.labels[rows] == 0], "fake": rows[known.labels[rows] == 1]}
        told[cell] = {
            "false_alarms": float(fake[of["real"]].mean()) if len(of["real"]) else None,
            "fakes_found": float(fake[of["fake"]].mean()) if len(of["fake"]) else None,
            "called": {
                kind: {word: float(np.mean(words[those] == word)) for word in ("fake", "unsure", "real")}
                for kind, those in of.items()
                if len(those)
            },
        }
    clean = np.flatnonzero(known.conditions == "clean")
    return told | {
        "false_alarms_by_source": false_alarms(known.labels, fake, known.sources),
        "false_alarms_by_source_clean": false_alarms(known.labels[clean], fake[clean], known.sources[clean]),
    }
