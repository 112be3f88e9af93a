"""Find the votes of a bundle's members, the threshold and the band of doubt around it, from scores and labels.

Takes P(fake) (N,) by member and labels (N,) 0 real, 1 fake; returns whole votes by member, and numbers in [0, 1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from solution.evaluation import metrics
from solution.scoring.vote import TOLERANCE, multiples, probabilities


class VoteSearch(NamedTuple):
    """What the search found: `weights` for every member, their mean AUC, the same less its penalty, and sets tried."""

    weights: dict[str, int]
    auc: float
    objective: float
    tried: int


def search_weights(
    p_by_member: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    max_vote: int = 3,
    penalty: float = 0.002,
    step: float = 0.1,
    groups: np.ndarray | None = None,
) -> VoteSearch:
    """Try every set of whole votes 0..max_vote and keep the best AUC less a penalty for complexity.

    The objective is the AUC of the `levels` vote, averaged over `groups` (N,) where given (clean and degraded scores
    are ranked apart), less `penalty` for every voting member after the first and a tenth of it for every further vote.
    So a member must earn `penalty` AUC to be asked at all. Sets that are multiples of others are left out; of
    equals, the one with fewer voters, then fewer votes, then more votes for the earlier member wins. No randomness.
    """
    names = list(p_by_member)
    labels = np.asarray(labels)
    if not names or max_vote < 1:
        raise ValueError("the search needs a member and max_vote of at least 1")
    steps = np.stack([multiples(probabilities(p_by_member[n], n), step) for n in names])
    groups = np.zeros(len(labels)) if groups is None else np.asarray(groups)
    parts = [groups == group for group in np.unique(groups)]
    candidates = [
        weights for weights in itertools.product(range(max_vote + 1), repeat=len(names)) if math.gcd(*weights) == 1
    ]
    # Simplest first, so that a later one must be better by more than rounding noise.
    candidates.sort(key=lambda w: (sum(map(bool, w)), sum(w), [-v for v in w]))
    best: tuple[float, float, tuple[int, ...]] = (-math.inf, 0.0, candidates[0])
    for weights in candidates:
        votes = np.asarray(weights) @ steps
        area = float(np.mean([metrics.auc(labels[r], votes[r]) for r in parts]))
        voters = sum(map(bool, weights))
        objective = area - penalty * (voters - 1) - penalty / 10 * (sum(weights) - voters)
        if objective > best[0] + TOLERANCE:
            best = objective, area, weights
    objective, area, weights = best
    return VoteSearch(dict(zip(names, weights)), area, objective, len(candidates))


def threshold_at_false_alarm(labels: np.ndarray, scores: np.ndarray, rate: float) -> float:
    """The lowest threshold (fake at or above) that calls at most `rate` of the real pictures fake.

    It lies halfway between two scores that occur, so that rounding noise decides nothing. If already the highest score
    is shared by more than `rate` of the reals, it lies just above it and nothing is called fake.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the false-alarm rate is {rate}; it must lie in [0, 1)")
    curve = metrics.roc(labels, scores)  # thresholds fall, false alarms rise
    last = int(np.flatnonzero(curve.fpr <= rate)[-1])
    if last == 0:
        return float(np.nextafter(curve.thresholds[1], np.inf))
    if last + 1 == len(curve.thresholds):
        return float(curve.thresholds[last])
    return float((curve.thresholds[last] + curve.thresholds[last + 1]) / 2)


def unsure_band(scores: np.ndarray, threshold: float, share: float) -> float:
    """The widest half-width around `threshold` that makes at most `share` of these scores `unsure`."""
    if not 0 <= share < 1:
        raise ValueError(f"the unsure share is {share}; it must lie in [0, 1)")
    distances = np.sort(np.abs(np.asarray(scores, dtype=np.float64) - threshold))
    return float(distances[int(share * len(distances) + TOLERANCE)])
