"""Find the votes of a bundle's members, the threshold and the band of doubt around it, from scores and labels.

Takes P(fake) (N,) by member and labels (N,) 0 real, 1 fake; returns whole votes by member, and numbers in [0, 1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from solution.models.calibration import sigmoid
from solution.scoring.vote import LEAST_P, TOLERANCE, multiples, probabilities


class VoteSearch(NamedTuple):
    """What the search found: `weights` for every member, their mean AUC, the same less its penalty, and sets tried."""

    weights: dict[str, int]
    auc: float
    objective: float
    tried: int


def search_weights(
    p_by_member: Mapping[str, np.ndarray],
    area: Callable[[np.ndarray], float],
    *,
    max_vote: int = 3,
    penalty: float = 0.002,
    step: float = 0.1,
) -> VoteSearch:
    """Try every set of whole votes 0..max_vote and keep the best AUC less a penalty for complexity.

    The objective is `area` of the `levels` vote (N,), less `penalty` for every voting member after the first and a
    tenth of it for every further vote. So a member must earn `penalty` AUC to be asked at all. Sets that are multiples
    of others are left out; of equals, the one with fewer voters, then fewer votes, then more votes for the earlier
    member wins. No randomness.
    """
    names = list(p_by_member)
    if not names or max_vote < 1:
        raise ValueError("the search needs a member and max_vote of at least 1")
    steps = np.stack([multiples(probabilities(p_by_member[n], n), step) for n in names])
    candidates = [
        weights for weights in itertools.product(range(max_vote + 1), repeat=len(names)) if math.gcd(*weights) == 1
    ]
    # Simplest first, so that a later one must be better by more than rounding noise.
    candidates.sort(key=lambda w: (sum(map(bool, w)), sum(w), [-v for v in w]))
    best: tuple[float, float, tuple[int, ...]] = (-math.inf, 0.0, candidates[0])
    for weights in candidates:
        found = area(np.asarray(weights) @ steps)
        voters = sum(map(bool, weights))
        objective = found - penalty * (voters - 1) - penalty / 10 * (sum(weights) - voters)
        if objective > best[0] + TOLERANCE:
            best = objective, found, weights
    objective, found, weights = best
    return VoteSearch(dict(zip(names, weights)), found, objective, len(candidates))


RIDGE = 1e-3  # on the squared weights of stacking


def stack_weights(p_by_member: Mapping[str, np.ndarray], labels: np.ndarray, importance: np.ndarray) -> dict[str, int]:
    """Votes in hundredths of the largest, for the `logit` mean: logistic stacking with weights of at least 0.

    labels, importance (N,): each row's share of the cross-entropy.
    """
    from scipy.optimize import minimize

    names = list(p_by_member)
    p = np.stack([np.clip(probabilities(p_by_member[n], n), LEAST_P, 1 - LEAST_P) for n in names], axis=1)
    x = np.log(p) - np.log1p(-p)  # (N, members)
    share = importance / importance.sum()

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        z = x @ weights + bias
        slope = share * (sigmoid(z) - labels)
        value = float(np.sum(share * (np.logaddexp(0, z) - labels * z)) + RIDGE * np.sum(weights**2))
        return value, np.append(x.T @ slope + 2 * RIDGE * weights, slope.sum())

    start = np.append(np.full(len(names), 1 / len(names)), 0.0)
    bounds = [(0, None)] * len(names) + [(None, None)]
    weights = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B").x[:-1]
    if weights.max() <= 0:
        raise ValueError("no member's score rises with the label: stacking finds nobody to ask")
    return {name: round(100 * w / weights.max()) for name, w in zip(names, weights)}


SMALL_SOURCE = 30  # reals: fewer than that are no source of their own, but one together


def real_sources(labels: np.ndarray, sources: np.ndarray) -> dict[str, np.ndarray]:
    """(N,) bool by source of real pictures; those with fewer than `SMALL_SOURCE` rows are together `others`."""
    labels, sources = np.asarray(labels), np.asarray(sources)
    real = labels == 0
    found = {str(s): real & (sources == s) for s in np.unique(sources[real])}
    small = [name for name, rows in found.items() if rows.sum() < SMALL_SOURCE]
    if len(small) > 1 or (small and len(found) > 1):
        found["others"] = np.logical_or.reduce([found.pop(name) for name in small])
    return found


def false_alarms(labels: np.ndarray, fake: np.ndarray, sources: np.ndarray) -> dict[str, float]:
    """Which share of the real pictures of each of `real_sources` is called `fake` (N,) bool."""
    return {name: float(np.mean(fake[rows])) for name, rows in real_sources(labels, sources).items()}


def threshold_at_false_alarm(
    labels: np.ndarray,
    scores: np.ndarray,
    rate: float,
    *,
    sources: np.ndarray | None = None,
    worst: float = 1.0,
) -> float:
    """The lowest threshold (fake at or above) that calls at most `rate` of the real pictures fake.

    sources (N,): each source of real pictures counts alike, and of none more than `worst` is called fake.

    It lies halfway between two scores that occur, so that rounding noise decides nothing. If already the highest score
    is shared by more reals than allowed, it lies just above it and nothing is called fake.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the false-alarm rate is {rate}; it must lie in [0, 1)")
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if np.isnan(scores).any() or not (labels == 0).any():
        raise ValueError("a threshold needs real pictures and scores that are numbers")
    sources = np.zeros(len(labels)) if sources is None else sources
    at = np.unique(scores)  # (K,) rising
    rates = []  # of each source, at each score
    for rows in real_sources(labels, sources).values():
        of_source = np.sort(scores[rows])
        rates.append(1 - np.searchsorted(of_source, at, "left") / len(of_source))
    allowed = (np.mean(rates, axis=0) <= rate + TOLERANCE) & (np.max(rates, axis=0) <= worst + TOLERANCE)
    if not allowed.any():
        return float(np.nextafter(at[-1], np.inf))
    first = int(np.argmax(allowed))  # rates fall
    return float(at[first] if first == 0 else (at[first - 1] + at[first]) / 2)


def unsure_band(scores: np.ndarray, threshold: float, share: float) -> float:
    """The widest half-width around `threshold` that makes at most `share` of these scores `unsure`."""
    if not 0 <= share < 1:
        raise ValueError(f"the unsure share is {share}; it must lie in [0, 1)")
    distances = np.sort(np.abs(np.asarray(scores, dtype=np.float64) - threshold))
    return float(distances[int(share * len(distances) + TOLERANCE)])
