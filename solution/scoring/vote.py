"""Discretize and combine scores: P(fake) of each member (N,) to levels on a grid to one vote (N,) in [0, 1].

The published entry (arXiv 2604.25889) rounds each stream's P(fake) to one decimal, takes their weighted mean and rounds
that to one decimal again. `VoteConfig.mean` says which of the six ways of combining is used. Nothing here sees
labels: evaluation/search.py finds the votes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from solution.config import VoteConfig
from solution.models.calibration import sigmoid

LEAST_P = 1e-6  # the logit mean keeps P(fake) this far from 0 and 1
TOLERANCE = 1e-9  # differences between votes below this are rounding noise


# ------------------------------------------------------------------------------------------------ voting
def levels(p: np.ndarray, step: float = 0.1) -> np.ndarray:
    """The multiple of `step` nearest to each p (any shape), float64; a tie goes to the even multiple.

    A tie is judged on the exact binary value of p and the decimal value of `step`, so that step 0.1 gives exactly what
    Python's `float(f"{p:.1f}")` gives: 0.25 -> 0.2, but 0.35, which float64 stores below 0.35, -> 0.3.
    """
    return _grid_values(multiples(p, step), Fraction(repr(float(step))))


def combine(p_by_member: Mapping[str, np.ndarray], vote: VoteConfig) -> np.ndarray:
    """The vote (N,) float64 in [0, 1] of members' P(fake), each (N,), by name.

    `levels`: weighted mean of levels, computed in whole steps so that equal votes are equal numbers.
    `levels_rounded`: that mean rounded again as `numpy.round` does (the published entry).
    `maximum`: the highest level of the members that have votes, whatever their number.
    `noisy_or`: 1 - prod (1 - level)^(votes / all votes): a sure member outweighs several that doubt.
    `probability`, `logit`: weighted mean of P(fake), or the sigmoid of the weighted mean of its logits; no grid.

    Raises:
        ValueError: a member with a vote is missing, a member is not named in the weights, lengths differ, or a
            value is not in [0, 1]. Fewer members never vote silently.
    """
    members = _voters(p_by_member, vote)
    weights = [vote.weights[name] for name in members]
    p = np.stack([probabilities(p_by_member[name], name) for name in members])
    if vote.mean == "probability":
        return np.clip(np.average(p, axis=0, weights=weights), 0.0, 1.0)
    if vote.mean == "logit":
        p = np.clip(p, LEAST_P, 1 - LEAST_P)
        return sigmoid(np.average(np.log(p) - np.log1p(-p), axis=0, weights=weights))
    if vote.mean == "maximum":
        return np.minimum(levels(p.max(axis=0), vote.step), 1.0)
    if vote.mean == "noisy_or":  # a level of 1 keeps a quarter step of doubt, or it would silence the others
        doubt = np.maximum(1 - levels(p, vote.step), vote.step / 4)
        return 1 - np.exp(np.average(np.log(doubt), axis=0, weights=weights))
    if vote.mean not in ("levels", "levels_rounded"):
        raise ValueError(f"vote.mean is {vote.mean!r}: nothing here combines members so")
    votes = np.asarray(weights) @ multiples(p, vote.step)  # (N,) whole steps
    mean = _grid_values(votes, Fraction(repr(float(vote.step))) / sum(weights))
    if vote.mean == "levels":
        return np.minimum(mean, 1.0)
    decimals = round(-math.log10(vote.step))
    if not math.isclose(vote.step, 10.0**-decimals):
        raise ValueError(f"vote.step is {vote.step}: a rounded mean (`levels_rounded`) needs 1, 0.1, 0.01, ...")
    return np.round(mean, decimals)


def decide(scores: np.ndarray, vote: VoteConfig) -> np.ndarray:
    """`fake` at or above the threshold, else `real`; `unsure` nearer to it than `vote.unsure`. (N,) strings."""
    scores = np.asarray(scores, dtype=np.float64)
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} are NaN")
    verdicts = np.where(scores >= vote.threshold, "fake", "real")
    near = np.abs(scores - vote.threshold) < vote.unsure - TOLERANCE
    return np.where(near, "unsure", verdicts)


# ------------------------------------------------------------------------------------------------ whole steps
def multiples(p: np.ndarray, step: float) -> np.ndarray:
    """How many steps the level of each p has, int64, same shape."""
    if not 0 < step <= 1:
        raise ValueError(f"the step is {step}; it must lie in (0, 1]")
    p = probabilities(p, "p")
    quotient = p / step
    nearest = np.array(np.rint(quotient), dtype=np.int64)
    # The quotient is off by rounding noise; only near a half can that change the outcome, and there Fractions decide.
    doubtful = np.abs(quotient - np.floor(quotient) - 0.5) < 1e-9
    exact = Fraction(repr(float(step)))
    for index in np.argwhere(doubtful):
        where = tuple(index)
        nearest[where] = round(Fraction(float(p[where])) / exact)
    return nearest


def _grid_values(multiples: np.ndarray, step: Fraction) -> np.ndarray:
    """multiples * step, same shape, each the float64 nearest to the exact product."""
    table = [float(k * step) for k in range(int(multiples.max(initial=0)) + 1)]
    return np.array(table)[multiples]


def probabilities(p: np.ndarray, name: str) -> np.ndarray:
    """`p` as float64, same shape.

    Raises:
        ValueError: a value outside [0, 1], or NaN; `name` says whose.
    """
    p = np.asarray(p, dtype=np.float64)
    if not (np.greater_equal(p, 0) & np.less_equal(p, 1)).all():
        wrong = p[~(np.greater_equal(p, 0) & np.less_equal(p, 1))]
        raise ValueError(f"{name}: {wrong.size} of {p.size} values are not in [0, 1] (the first is {wrong.flat[0]})")
    return p


def _voters(p_by_member: Mapping[str, np.ndarray], vote: VoteConfig) -> list[str]:
    """The members with a vote, in the order of the weights, all of them present and equally long."""
    voters = [name for name, weight in vote.weights.items() if weight > 0]
    missing = [name for name in voters if name not in p_by_member]
    if missing:
        raise ValueError(
            f"no scores from {', '.join(missing)}: the vote {vote.weights} needs every member that has votes; "
            f"score with the whole bundle or change its weights"
        )
    extra = [name for name in p_by_member if name not in vote.weights]
    if extra:
        raise ValueError(
            f"scores from {', '.join(extra)}, unknown to the vote {vote.weights}; give such a member its weight "
            f"(0 to ignore it) or leave it out"
        )
    lengths = {name: len(p_by_member[name]) for name in voters}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"members scored different numbers of pictures: {lengths}")
    return voters
