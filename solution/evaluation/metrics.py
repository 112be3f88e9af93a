"""Everything that compares scores with labels: AUC with interval, AP, EER, ECE, TPR at FPR, frame and video level.

Takes numpy arrays of one row per picture (or video): `labels` (N,) with 0 real and 1 fake, `scores` (N,) real numbers
where larger means more fake, or `p` (N,) probabilities in [0, 1]. Returns plain Python numbers, small records and
numpy arrays. Ties between a real and a fake picture count half everywhere. What cannot be computed (one class only,
a NaN score) is a `ValueError` that says so; a NaN is never returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np

# Entries of one block of bootstrap counts (draws x distinct scores): 2**21 float64 are 16 MiB.
BLOCK = 2**21
BINS = 15  # of the calibration error
FLOOR_DRAWS = 1000  # of the labels of a calibrated scorer
Scorer = TypeVar("Scorer")


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval at `level`."""

    value: float
    low: float
    high: float
    level: float


class Roc(NamedTuple):
    """Operating points of rising false-positive rate: call fake at `thresholds` or above. Each (K,)."""

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray


class Reliability(NamedTuple):
    """Equal-width bins of p. `edges` (bins + 1,); `counts`, `mean_p`, `share_fake` (bins,), 0 where a bin is empty."""

    edges: np.ndarray
    counts: np.ndarray
    mean_p: np.ndarray
    share_fake: np.ndarray


class Videos(NamedTuple):
    """One row per video: `keys` (source, label, video), `labels` (V,), mean `scores` (V,), `frames` (V,) counts."""

    keys: tuple[tuple[str, int, str], ...]
    labels: np.ndarray
    scores: np.ndarray
    frames: np.ndarray


@dataclass(frozen=True)
class PairedTest:
    """Is A better than B on the same pictures? `difference` = AUC(A) - AUC(B) with its interval and two-sided p."""

    auc_a: float
    auc_b: float
    difference: float
    low: float
    high: float
    p: float
    level: float
    method: str
    n: int


@dataclass(frozen=True)
class Summary:
    """All numbers of one set of scores; rates are in [0, 1]. `threshold`: fake at or above."""

    n: int
    n_real: int
    n_fake: int
    auc: float
    auc_low: float
    auc_high: float
    average_precision: float
    eer: float
    tpr_at_fpr_1: float
    tpr_at_fpr_5: float
    threshold: float
    accuracy: float
    accuracy_real: float
    accuracy_fake: float
    ece: float
    log_loss: float
    brier: float


# ------------------------------------------------------------------------------------------------ ranking
def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a fake outscores a real picture, ties counting half.

    Raises:
        ValueError: only one class, unequal lengths, labels other than 0 and 1, or a score that is not a number.
    """
    labels, scores = _checked(labels, scores)
    real, fake, _ = _counts_by_score(labels, scores)
    return float(_auc_from_counts(real[None], fake[None])[0])


def auc_of_steps(labels: np.ndarray, steps: np.ndarray) -> float:
    """`auc` of scores that are whole numbers from 0 on, (N,) int64, unchecked: for searches over thousands of votes."""
    kinds = int(steps.max()) + 1
    fake = np.bincount(steps, weights=labels, minlength=kinds)
    real = np.bincount(steps, minlength=kinds) - fake
    return float(_auc_from_counts(real[None], fake[None])[0])


def parts_by_source(labels: np.ndarray, sources: np.ndarray) -> list[np.ndarray]:
    """(N,) bool masks: each source that has both classes, and the pictures of all others together.

    The rest is left out where it has one class only and there are other parts.
    """
    labels, sources = np.asarray(labels), np.asarray(sources)
    both = [s for s in np.unique(sources) if len(set(labels[sources == s])) == 2]
    parts = [sources == s for s in both]
    rest = ~np.isin(sources, both)
    if len(set(labels[rest])) == 2 or not parts:
        parts.append(rest)
    return parts


def auc_by_source(labels: np.ndarray, scores: np.ndarray, sources: np.ndarray) -> float:
    """The mean AUC over `parts_by_source`.

    Raises:
        ValueError: as `auc`; also when the pictures of the sources with one class are all there is, of one class.
    """
    labels, scores = _checked(labels, scores)
    return float(np.mean([auc(labels[part], scores[part]) for part in parts_by_source(labels, sources)]))


def mean_aucs(
    labels: np.ndarray,
    scores: Mapping[Scorer, np.ndarray],
    parts: Sequence[np.ndarray],
    *,
    seed: int,
    draws: int = 1000,
) -> dict[Scorer, tuple[float, np.ndarray]]:
    """By scorer, the mean AUC over `parts` (masks or rows) and over its runs (S, N), and (draws,) bootstrap draws of it.

    Every part is resampled for itself, within each class; all scorers over the same resamples, so that differences of
    draws are those of a paired test.
    """
    runs = np.concatenate(list(scores.values()))  # (scorers S, N)
    values, drawn = np.zeros(len(runs)), np.zeros((len(runs), draws))
    for number, part in enumerate(parts):
        of_part, checked = _checked_runs(labels[part], runs[:, part])
        values += [auc(of_part, run) for run in checked]
        drawn += _bootstrap_aucs(of_part, checked, seed + number, draws)
    values = (values / len(parts)).reshape(len(scores), -1).mean(axis=1)
    drawn = (drawn / len(parts)).reshape(len(scores), -1, draws).mean(axis=1)
    return {name: (float(value), of) for name, value, of in zip(scores, values, drawn)}


def ends(drawn: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap draws."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def auc_interval(
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    seed: int,
    draws: int = 1000,
    level: float = 0.95,
) -> Interval:
    """AUC with its bias-corrected and accelerated bootstrap interval (Efron 1987), resampled within each class.

    The acceleration comes from the DeLong placements, which are the AUC's influence values. Scores that separate the
    classes perfectly give the interval (1, 1): every resample separates too, which is no proof of certainty.

    scores: (N,), or (S, N) for S runs on the same pictures (degradation seeds): then value and interval are those of
    the mean AUC of the runs, the pictures being what is resampled.
    """
    labels, runs = _checked_runs(labels, scores)
    value = float(np.mean([auc(labels, run) for run in runs]))
    drawn = _bootstrap_aucs(labels, runs, seed, draws).mean(axis=0)
    low, high = _corrected_quantiles(drawn, value, _acceleration(labels, runs), level)
    return Interval(value, low, high, level)


def roc(labels: np.ndarray, scores: np.ndarray) -> Roc:
    """The ROC curve with a point for every distinct score, from (0, 0) at threshold infinity to (1, 1)."""
    labels, scores = _checked(labels, scores)
    real, fake, distinct = _counts_by_score(labels, scores)
    fpr = np.concatenate([[0.0], np.cumsum(real[::-1]) / real.sum()])
    tpr = np.concatenate([[0.0], np.cumsum(fake[::-1]) / fake.sum()])
    return Roc(fpr, tpr, np.concatenate([[np.inf], distinct[::-1]]))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Precision averaged over the recall steps, without interpolation (fakes are what is looked for)."""
    labels, scores = _checked(labels, scores)
    real, fake, _ = _counts_by_score(labels, scores)
    found, false = np.cumsum(fake[::-1]), np.cumsum(real[::-1])
    return float(np.sum(fake[::-1] / fake.sum() * (found / (found + false))))


def eer(labels: np.ndarray, scores: np.ndarray) -> float:
    """Equal error rate: where the ROC curve, drawn with straight lines, has as many misses as false alarms."""
    fpr, tpr, _ = roc(labels, scores)
    gap = fpr - (1 - tpr)  # rises from -1 at (0, 0) to 1 at (1, 1)
    after = int(np.argmax(gap >= 0))
    before = after - 1
    share = -gap[before] / (gap[after] - gap[before])
    return float(fpr[before] + share * (fpr[after] - fpr[before]))


def tpr_at_fpr(labels: np.ndarray, scores: np.ndarray, fpr: float) -> float:
    """The largest share of fakes found by a threshold whose false alarms stay at or below `fpr` (no interpolation)."""
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr is {fpr}; a rate lies in [0, 1]")
    curve = roc(labels, scores)
    return float(curve.tpr[curve.fpr <= fpr].max())


# ------------------------------------------------------------------------------------------------ probabilities
def reliability(labels: np.ndarray, p: np.ndarray, bins: int = BINS) -> Reliability:
    """The reliability diagram of p = P(fake): per bin [k / bins, (k + 1) / bins), the last one closed."""
    labels, p = _checked(labels, p, both_classes=False, probability=True)
    which = np.minimum((p * bins).astype(int), bins - 1)
    counts = np.bincount(which, minlength=bins)
    divisor = np.maximum(counts, 1)
    mean_p = np.bincount(which, weights=p, minlength=bins) / divisor
    share = np.bincount(which, weights=labels, minlength=bins) / divisor
    return Reliability(np.linspace(0, 1, bins + 1), counts, mean_p, share)


def ece(labels: np.ndarray, p: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of P(fake): |share of fakes - mean p| over equal-width bins, weighted by count."""
    _, counts, mean_p, share = reliability(labels, p, bins)
    return float(np.sum(counts * np.abs(share - mean_p)) / counts.sum())


def ece_floor(p: np.ndarray) -> tuple[float, float]:
    """What `ece` shows of a perfectly calibrated scorer with these P(fake), (N,): its mean and 95 % quantile.

    Labels are drawn from p itself. The estimate is biased upwards: a bin of n pictures strays by about
    sqrt(p (1 - p) / n), so a small ECE of few pictures cannot be told from none (Roelofs et al. 2022, section 3).
    """
    p = np.asarray(p, dtype=np.float64)
    _checked(np.zeros(len(p)), p, both_classes=False, probability=True)
    which = np.minimum((p * BINS).astype(int), BINS - 1)
    member = which == np.arange(BINS)[:, None]  # (BINS, N)
    expected = member @ p
    rng = np.random.default_rng(0)
    drawn = np.empty(FLOOR_DRAWS)
    block = max(1, BLOCK // len(p))
    for start in range(0, FLOOR_DRAWS, block):
        size = min(block, FLOOR_DRAWS - start)
        fakes = (rng.random((size, len(p))) < p) @ member.T.astype(np.float64)
        drawn[start : start + size] = np.abs(fakes - expected).sum(axis=1) / len(p)
    return float(drawn.mean()), float(np.quantile(drawn, 0.95))


def ece_floors(runs: Sequence[np.ndarray]) -> dict[str, float]:
    """`ece_floor` of several runs, averaged: `ece_floor` and, its 95 % quantile, `ece_floor_high`."""
    mean, high = np.mean([ece_floor(p) for p in runs], axis=0)
    return {"ece_floor": float(mean), "ece_floor_high": float(high)}


def log_loss(labels: np.ndarray, p: np.ndarray) -> float:
    """Mean negative log-likelihood in nats; p is kept off 0 and 1 by the float64 epsilon, as scikit-learn does."""
    labels, p = _checked(labels, p, both_classes=False, probability=True)
    p = np.clip(p, np.finfo(np.float64).eps, 1 - np.finfo(np.float64).eps)
    return float(-np.mean(np.where(labels == 1, np.log(p), np.log1p(-p))))


def brier(labels: np.ndarray, p: np.ndarray) -> float:
    """Mean squared distance of p from the label."""
    labels, p = _checked(labels, p, both_classes=False, probability=True)
    return float(np.mean((p - labels) ** 2))


def accuracy(labels: np.ndarray, p: np.ndarray, threshold: float) -> float:
    """Share of pictures on the right side of `threshold` (fake at or above)."""
    labels, p = _checked(labels, p, both_classes=False)
    return float(np.mean((p >= threshold) == (labels == 1)))


# ------------------------------------------------------------------------------------------------ comparisons
def paired_auc_test(
    labels: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    method: str = "delong",
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> PairedTest:
    """Compare two detectors' scores of the same pictures by AUC; (N,), or (S, N) each for the mean AUC of S runs.

    `delong`: the normal approximation with the covariance of the placements (DeLong, DeLong and Clarke-Pearson 1988).
    `bootstrap`: percentiles of the difference over resamples of the pictures, the same for both, within each class;
    its p is twice the smaller share of resamples on one side of zero, counted with one more draw.
    """
    labels, a = _checked_runs(labels, a)
    labels, b = _checked_runs(labels, b)
    auc_a, auc_b = (float(np.mean([auc(labels, r) for r in s])) for s in (a, b))
    difference = auc_a - auc_b
    if method == "delong":
        deviation = math.sqrt(_difference_variance(labels, a, b))
        reach = NormalDist().inv_cdf((1 + level) / 2) * deviation
        low, high = difference - reach, difference + reach
        if deviation > 0:
            p = math.erfc(abs(difference) / deviation / math.sqrt(2))
        else:
            p = 1.0 if difference == 0 else 0.0
    elif method == "bootstrap":
        drawn = _bootstrap_aucs(labels, np.concatenate([a, b]), seed, draws)
        drawn = drawn[: len(a)].mean(axis=0) - drawn[len(a) :].mean(axis=0)
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        side = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
        p = min(1.0, 2 * (side + 1) / (draws + 1))
    else:
        raise ValueError(f"method is {method!r}; allowed: delong, bootstrap")
    return PairedTest(
        auc_a,
        auc_b,
        difference,
        float(low),
        float(high),
        float(p),
        level,
        method,
        len(labels),
    )


def summarize(
    labels: np.ndarray,
    p: np.ndarray,
    *,
    threshold: float = 0.5,
    seed: int = 0,
    draws: int = 1000,
) -> Summary:
    """Every number of this room for p = P(fake), (N,), or the mean of each over S runs (S, N); both classes present."""
    labels, runs = _checked_runs(labels, p, probability=True)
    interval = auc_interval(labels, runs, seed=seed, draws=draws)
    real, fake = labels == 0, labels == 1

    def mean(measure: Callable[..., float], *arguments: float) -> float:
        return float(np.mean([measure(labels, run, *arguments) for run in runs]))

    def accuracy_of(rows: np.ndarray) -> float:
        return float(np.mean([accuracy(labels[rows], r[rows], threshold) for r in runs]))

    return Summary(
        n=len(labels),
        n_real=int(real.sum()),
        n_fake=int(fake.sum()),
        auc=interval.value,
        auc_low=interval.low,
        auc_high=interval.high,
        average_precision=mean(average_precision),
        eer=mean(eer),
        tpr_at_fpr_1=mean(tpr_at_fpr, 0.01),
        tpr_at_fpr_5=mean(tpr_at_fpr, 0.05),
        threshold=float(threshold),
        accuracy=mean(accuracy, threshold),
        accuracy_real=accuracy_of(real),
        accuracy_fake=accuracy_of(fake),
        ece=mean(ece),
        log_loss=mean(log_loss),
        brier=mean(brier),
    )


def video_level(
    sources: Sequence[str],
    labels: np.ndarray,
    videos: Sequence[str],
    scores: np.ndarray,
) -> Videos:
    """Mean frame score of each video, a video being (source, label, video): folder names repeat across sets and labels.

    Every argument has one entry per frame (N); rows whose video is empty are single pictures and are left out. Videos
    come in the order of their first frame. Nothing is left if no row names a video.
    """
    labels, scores = _checked(labels, scores, both_classes=False)
    if not len(sources) == len(videos) == len(scores):
        raise ValueError(f"{len(sources)} sources and {len(videos)} videos for {len(scores)} scores")
    position: dict[tuple[str, int, str], int] = {}
    rows, which = [], []
    for row, (source, label, video) in enumerate(zip(sources, labels, videos)):
        if video:
            rows.append(row)
            key = (str(source), int(label), str(video))
            which.append(position.setdefault(key, len(position)))
    which_video = np.array(which, dtype=int)
    frames = np.bincount(which_video, minlength=len(position))
    sums = np.bincount(which_video, weights=scores[rows], minlength=len(position))
    keys = tuple(position)
    return Videos(keys, np.array([k[1] for k in keys], dtype=int), sums / frames, frames)


# ------------------------------------------------------------------------------------------------ inside
def _checked(
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    both_classes: bool = True,
    probability: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`labels` as int64 and `scores` as float64, both (N,), or a `ValueError` that says what is wrong."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be (N,) and equally long")
    if len(labels) == 0:
        raise ValueError("no scores: there is nothing to measure")
    unknown = np.setdiff1d(labels, [0, 1])
    if len(unknown):
        raise ValueError(f"labels are 0 (real) or 1 (fake); found {unknown[:5]}")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} are NaN")
    if probability and not (0 <= scores.min() and scores.max() <= 1):
        raise ValueError(f"probabilities span {scores.min():g} to {scores.max():g}; they must lie in [0, 1]")
    if both_classes and labels.min() == labels.max():
        name = "fake" if labels[0] else "real"
        raise ValueError(f"all {len(labels)} labels are {name}: a ranking needs both real and fake pictures")
    return labels.astype(np.int64), scores


def _checked_runs(labels: np.ndarray, scores: np.ndarray, **checks: bool) -> tuple[np.ndarray, np.ndarray]:
    """`labels` (N,) and `scores` as (S, N), each run checked."""
    pairs = [_checked(labels, run, **checks) for run in np.atleast_2d(scores)]
    return pairs[0][0], np.stack([run for _, run in pairs])


def _counts_by_score(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Real counts (K,), fake counts (K,) and the K distinct scores, rising."""
    distinct, rank = np.unique(scores, return_inverse=True)
    fake = np.bincount(rank, weights=labels, minlength=len(distinct))
    real = np.bincount(rank, minlength=len(distinct)) - fake
    return real, fake, distinct


def _auc_from_counts(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """(D, K) counts over rising scores -> (D,) AUCs; all sums are exact, being multiples of one half."""
    below = np.cumsum(real, axis=1) - real / 2
    total = real.sum(axis=1) * fake.sum(axis=1)
    return np.einsum("dk,dk->d", fake, below) / total


def _bootstrap_aucs(labels: np.ndarray, runs: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """(S, N) scores -> (S, draws) AUCs, all runs over the same resamples of the pictures within each class."""
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(labels == c) for c in (0, 1)]
    ranks = [np.unique(run, return_inverse=True)[1] for run in runs]
    aucs = np.empty((len(runs), draws))
    block = max(1, BLOCK // len(labels))
    for start in range(0, draws, block):
        part = slice(start, min(start + block, draws))
        size = part.stop - part.start
        drawn = [r[rng.integers(len(r), size=(size, len(r)))] for r in rows]
        for run, rank in enumerate(ranks):
            counts = [_count_rows(rank[d], int(rank.max()) + 1) for d in drawn]
            aucs[run, part] = _auc_from_counts(*counts)
    return aucs


def _count_rows(ranks: np.ndarray, kinds: int) -> np.ndarray:
    """(D, N) values in [0, kinds) -> (D, kinds) how often each occurs in its row, as float64."""
    size = len(ranks)
    flat = ranks + kinds * np.arange(size)[:, None]
    counts = np.bincount(flat.ravel(), minlength=size * kinds)
    return counts.reshape(size, kinds).astype(np.float64)


def _placements(labels: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per real, the share of fakes that outscore it (R,); per fake, of reals it outscores (F,); means of the runs."""
    of_real, of_fake = [], []
    for scores in runs:
        real, fake = scores[labels == 0], scores[labels == 1]
        of_real.append(1 - _share_below(np.sort(fake), real))
        of_fake.append(_share_below(np.sort(real), fake))
    return np.mean(of_real, axis=0), np.mean(of_fake, axis=0)


def _share_below(rising: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(V,) which share of `rising` lies below each value, ties counting half."""
    below = np.searchsorted(rising, values, "left")
    return (below + np.searchsorted(rising, values, "right")) / (2 * len(rising))


def _difference_variance(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """DeLong's variance of AUC(a) - AUC(b): the placements' differences, per class, over its size."""
    total = 0.0
    for of_a, of_b in zip(_placements(labels, a), _placements(labels, b)):
        if len(of_a) < 2:
            raise ValueError("DeLong's test needs at least two real and two fake rows")
        total += float(np.var(of_a - of_b, ddof=1)) / len(of_a)
    return total


def _acceleration(labels: np.ndarray, runs: np.ndarray) -> float:
    """Efron's acceleration for two samples: third over second moment of the influence values, a sixth of it."""
    second = third = 0.0
    for placed in _placements(labels, runs):
        influence = (placed - placed.mean()) / len(placed)
        second += float(np.sum(influence**2))
        third += float(np.sum(influence**3))
    return third / (6 * second**1.5) if second > 0 else 0.0


def _corrected_quantiles(drawn: np.ndarray, value: float, acceleration: float, level: float) -> tuple[float, float]:
    """The quantiles of `drawn` that bias correction and acceleration pick (Efron 1987, equation 2.3)."""
    below = np.mean(drawn < value) + np.mean(drawn == value) / 2
    floor = 1 / (2 * len(drawn))
    bias = NormalDist().inv_cdf(float(np.clip(below, floor, 1 - floor)))
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + NormalDist().inv_cdf(tail)
        z = bias + shifted / (1 - acceleration * shifted)
        ends.append(float(np.quantile(drawn, NormalDist().cdf(z))))
    return ends[0], ends[1]
