"""Fit a bundle's calibrators, votes and threshold on validation logits, and say what the choice is worth.

Raw logits (N,) float64 by member, positive = fake, of the same N validation pictures clean and degraded, with labels
(N,), become calibrators, a `VoteConfig` and a comparison of the ways of voting in plain JSON values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from solution import calibration, metrics
from solution.calibration import Calibrator
from solution.config import VoteConfig
from solution.vote import (
    VoteSearch,
    combine,
    search_weights,
    threshold_at_false_alarm,
    unsure_band,
)

WAYS = ("probability", "logit", "levels", "levels_rounded")

Logits = dict[str, np.ndarray]


def fit_ensemble(
    clean: Mapping[str, np.ndarray],
    degraded: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    fitted_on: str = "",
    mean: str = "levels",
    step: float = 0.1,
    max_vote: int = 3,
    penalty: float = 0.002,
    false_alarm: float = 0.05,
    unsure_share: float = 0.1,
    folds: int = 5,
    seed: int = 0,
    draws: int = 1000,
) -> tuple[dict[str, Calibrator], VoteConfig, dict[str, Any]]:
    """Calibrators, votes, threshold and `unsure` band of a bundle, and how they fare on pictures not fitted on.

    clean, degraded: raw validation logits (N,) by member, of the same N pictures in the same order; both are fitted
    together, because a submission does not say which pictures are degraded. The threshold calls at most `false_alarm`
    of these reals (clean and degraded) fake; `unsure_share` of the pictures nearest to it are called unsure.

    Returns the comparison as plain JSON values. All its figures are cross-validated: calibrators, votes, the best
    single member and the threshold are chosen on the other folds, a picture's two versions staying together.
    """
    labels = np.asarray(labels)
    stacked = _stacked(clean, degraded, labels)
    everything = {
        "labels": np.tile(labels, 2),
        "groups": np.tile(np.arange(len(labels)), 2),
        "conditions": np.repeat(["clean", "degraded"], len(labels)),
    }
    options = {"step": step, "max_vote": max_vote, "penalty": penalty}
    rows = np.arange(2 * len(labels))
    calibrators, search = _fit_part(stacked, everything, rows, options, folds, seed)
    calibrators = {
        name: dataclasses.replace(fitted, fitted_on=fitted_on or fitted.fitted_on)
        for name, fitted in calibrators.items()
    }
    p = {name: calibrators[name].apply(x) for name, x in stacked.items()}
    vote = VoteConfig(dict(search.weights), step=step, mean=mean)
    scores = combine(p, vote)
    threshold = threshold_at_false_alarm(everything["labels"], scores, false_alarm)
    vote = dataclasses.replace(
        vote,
        threshold=threshold,
        unsure=unsure_band(scores, threshold, unsure_share),
        false_alarm=false_alarm,
    )
    held = _held_out(stacked, everything, vote, options, folds, seed)
    comparison = _comparison(stacked, everything, held, vote, seed, draws)
    comparison["search"] = {**search._asdict(), **options}
    return calibrators, vote, comparison


def _stacked(
    clean: Mapping[str, np.ndarray],
    degraded: Mapping[str, np.ndarray],
    labels: np.ndarray,
) -> Logits:
    """Clean then degraded logits (2 N,) of each member."""
    if set(clean) != set(degraded) or not clean:
        raise ValueError(
            f"clean logits of {sorted(clean)}, degraded ones of {sorted(degraded)}: expected the same members"
        )
    for logits in (clean, degraded):
        for name, values in logits.items():
            if np.shape(values) != labels.shape:
                raise ValueError(
                    f"{name}: {np.shape(values)} logits for {labels.shape} labels"
                )
    return {name: np.concatenate([clean[name], degraded[name]]) for name in clean}


def _fit_part(
    logits: Logits,
    known: Mapping[str, np.ndarray],
    rows: np.ndarray,
    options: Mapping[str, Any],
    folds: int,
    seed: int,
) -> tuple[dict[str, Calibrator], VoteSearch]:
    """Calibrators and the vote search, fitted on `rows` alone."""
    labels, groups = known["labels"][rows], known["groups"][rows]
    calibrators = {
        name: calibration.fit(x[rows], labels, groups=groups, folds=folds, seed=seed)
        for name, x in logits.items()
    }
    p = {name: calibrators[name].apply(x[rows]) for name, x in logits.items()}
    conditions = known["conditions"][rows]
    return calibrators, search_weights(p, labels, groups=conditions, **options)


def _held_out(
    logits: Logits,
    known: Mapping[str, np.ndarray],
    vote: VoteConfig,
    options: Mapping[str, Any],
    folds: int,
    seed: int,
) -> dict[str, Any]:
    """Scores (2 N,) of every member and every way of voting on pictures that neither fitted nor chose anything."""
    labels, conditions = known["labels"], known["conditions"]
    ways = [way for way in WAYS if way != "levels_rounded" or vote.step in (0.1, 0.01)]
    scores = {
        name: np.empty(len(labels)) for name in [*ways, "equal votes", "best single"]
    }
    p = {name: np.empty(len(labels)) for name in logits}
    fake = np.empty(len(labels), dtype=bool)
    weights = []
    parts = calibration.split(labels, known["groups"], folds=folds, seed=seed)
    for train, held in parts:
        calibrators, search = _fit_part(logits, known, train, options, folds, seed)
        weights.append(dict(search.weights))
        of_train = {n: calibrators[n].apply(x[train]) for n, x in logits.items()}
        of_held = {n: calibrators[n].apply(x[held]) for n, x in logits.items()}
        for name in logits:
            p[name][held] = of_held[name]
        for way in ways:
            config = VoteConfig(search.weights, step=vote.step, mean=way)
            scores[way][held] = combine(of_held, config)
        equal = VoteConfig(dict.fromkeys(logits, 1), step=vote.step)
        scores["equal votes"][held] = combine(of_held, equal)
        areas = {
            name: np.mean(
                [
                    metrics.auc(labels[train][rows], x[rows])
                    for rows in (conditions[train] == c for c in ("clean", "degraded"))
                ]
            )
            for name, x in of_train.items()
        }
        best = max(areas, key=areas.__getitem__)
        scores["best single"][held] = of_held[best]
        config = VoteConfig(search.weights, step=vote.step, mean=vote.mean)
        chosen = combine(of_train, config)
        at = threshold_at_false_alarm(labels[train], chosen, vote.false_alarm)
        fake[held] = combine(of_held, config) >= at
    return {"scores": scores, "p": p, "fake": fake, "weights": weights}


def _comparison(
    logits: Logits,
    known: Mapping[str, np.ndarray],
    held: Mapping[str, Any],
    vote: VoteConfig,
    seed: int,
    draws: int,
) -> dict[str, Any]:
    """What `_held_out` found, per condition: AUCs with intervals, differences to the best single member, ECE."""
    ways: dict[str, Any] = {name: {} for name in held["scores"]}
    members: dict[str, Any] = {name: {} for name in logits}
    alarms = {}
    for condition in ("clean", "degraded"):
        rows = known["conditions"] == condition
        labels = known["labels"][rows]
        single = held["scores"]["best single"][rows]
        for name, scores in held["scores"].items():
            interval = metrics.auc_interval(
                labels, scores[rows], seed=seed, draws=draws
            )
            test = metrics.paired_auc_test(
                labels, scores[rows], single, method="bootstrap", seed=seed
            )
            ways[name][condition] = {
                **interval._asdict(),
                "minus_best_single": {
                    k: getattr(test, k) for k in ("difference", "low", "high", "p")
                },
            }
        for name, p in held["p"].items():
            raw = calibration.sigmoid(logits[name][rows])
            interval = metrics.auc_interval(labels, p[rows], seed=seed, draws=draws)
            members[name][condition] = {
                **interval._asdict(),
                "ece_before": metrics.ece(labels, raw),
                "ece_after": metrics.ece(labels, p[rows]),
                "log_loss_before": metrics.log_loss(labels, raw),
                "log_loss_after": metrics.log_loss(labels, p[rows]),
            }
        fake = held["fake"][rows]
        alarms[condition] = {
            "false_alarms": float(fake[labels == 0].mean()),
            "fakes_found": float(fake[labels == 1].mean()),
        }
    n = len(known["labels"]) // 2
    return {
        "protocol": f"{n} pictures, each clean and degraded; {len(held['weights'])}-fold cross-validation over "
        f"pictures, everything chosen on the other folds; {draws} bootstrap draws, seed {seed}",
        "ways": ways,
        "members": members,
        "weights_by_fold": held["weights"],
        "at_threshold": {"asked": vote.false_alarm, **alarms},
    }
