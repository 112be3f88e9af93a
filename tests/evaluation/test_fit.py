"""Fitting a vote: what a fold is scored with has not seen the fold, and every source counts alike."""

import numpy as np
import pytest

from solution.evaluation import fit

QUICK = fit.FitOptions(max_vote=1, folds=3, draws=20)


def five_generators(n=300, seed=0):
    """Two members that see the fakes of five generators; every picture is its own group, so groups are row numbers."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    made_by = np.array([f"g{k}" for k in range(5)])[np.arange(n) // 2 % 5]
    logits = {name: labels * 6 - 3 + rng.normal(size=n) for name in ("global", "face")}
    return logits, fit.Known.plain(
        labels, generators=np.where(labels, made_by, ""), conditions=np.where(rng.random(n) < 0.5, "clean", "degraded")
    )


def spy(monkeypatch, name):
    """The arguments of every call of `fit.<name>`, which does what it did."""
    calls, inner = [], getattr(fit, name)

    def spied(*given):
        calls.append(given)
        return inner(*given)

    monkeypatch.setattr(fit, name, spied)
    return calls


@pytest.mark.parametrize("over", ["generators", "pictures"])
def test_neither_fit_nor_threshold_of_a_fold_sees_its_rows(monkeypatch, over):
    logits, known = five_generators()
    if over == "pictures":
        known = known._replace(generators=np.full(len(known.labels), ""))
    folds = fit.make_folds(known, QUICK)
    assert folds.over == over
    fits, thresholds = spy(monkeypatch, "_fit_part"), spy(monkeypatch, "_with_threshold")
    held = fit._held_out(logits, known, folds, QUICK)
    others = [np.flatnonzero(folds.number != fold) for fold in range(3)]
    assert len(fits) == 3 and len(thresholds) == 3 * len(fit.WAYS)
    for (of_train, those, _), rows in zip(fits, others):
        np.testing.assert_array_equal(those.groups, rows)
        np.testing.assert_array_equal(of_train["face"], logits["face"][rows])
    for number, (vote, those, scores, _) in enumerate(thresholds):
        fold, way = divmod(number, len(fit.WAYS))
        np.testing.assert_array_equal(those.groups, others[fold])
        np.testing.assert_array_equal(scores, held["all"][fold][list(fit.WAYS)[way]][others[fold]])


def test_loud_reals_of_one_fold_are_false_alarms_of_the_others_threshold():
    """They are an eighth of all reals and above every other score: a threshold that had seen them would lie above them."""
    logits, known = five_generators()
    folds = fit.make_folds(known, QUICK)
    loud = np.flatnonzero((folds.number == 1) & (known.labels == 0))[:19]
    for x in logits.values():
        x[loud] += 14
    fake = fit._held_out(logits, known, folds, QUICK)["fake"]["equal probability"]
    assert len(loud) == 19 and fake[loud].all()


def test_in_what_stacking_fits_every_cell_every_source_and_both_classes_count_alike():
    """Seen: a source of six and one of two; unseen: one of four. All of them half real."""
    sources = np.repeat(["large", "small", "far"], [6, 2, 4])
    labels = np.arange(12) % 2
    known = fit.Known.plain(labels, sources=sources, unseen=sources == "far", conditions=np.full(12, "clean"))
    weight = fit._importance(known)
    # Of a class: half to the seen cell, a quarter to each of its sources; half to the unseen one.
    np.testing.assert_allclose(weight, np.repeat([1 / 12, 1 / 4, 1 / 4], [6, 2, 4]))
    labels[:5] = 0
    uneven = fit._importance(known._replace(labels=labels))
    assert [uneven[labels == label].sum() for label in (0, 1)] == pytest.approx([1, 1])
