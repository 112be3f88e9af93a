"""Metrics agree with scikit-learn and with cases solved by hand, and their intervals hold what they promise."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from solution.evaluation import metrics

EXACT = {"rel": 0, "abs": 1e-12}


def scored(seed, n=400, tied=True, separation=1.0):
    """Labels (n,) and probabilities (n,), a few dozen distinct ones if tied."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < rng.uniform(0.2, 0.8)).astype(int)
    labels[:2] = 0, 1
    p = 1 / (1 + np.exp(-rng.normal(size=n) - separation * (labels - 0.5)))
    return labels, np.round(p, 1 if tied else 15)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_scikit_learn_agrees(seed, tied):
    labels, p = scored(seed, tied=tied)
    assert metrics.auc(labels, p) == pytest.approx(reference.roc_auc_score(labels, p), **EXACT)
    assert metrics.average_precision(labels, p) == pytest.approx(reference.average_precision_score(labels, p), **EXACT)
    assert metrics.log_loss(labels, p) == pytest.approx(reference.log_loss(labels, p), **EXACT)
    assert metrics.brier(labels, p) == pytest.approx(reference.brier_score_loss(labels, p), **EXACT)
    assert metrics.accuracy(labels, p, 0.3) == pytest.approx(reference.accuracy_score(labels, p >= 0.3), **EXACT)
    ours = metrics.roc(labels, p)
    theirs = reference.roc_curve(labels, p, drop_intermediate=False)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    for rate in (0.01, 0.05, 0.3):
        assert metrics.tpr_at_fpr(labels, p, rate) == pytest.approx(theirs[1][theirs[0] <= rate].max(), **EXACT)


def test_cases_solved_by_hand():
    assert metrics.auc([0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8]) == 0.875  # one tied pair
    assert metrics.auc([0, 1], [3, 3]) == 0.5
    assert metrics.auc([0, 0, 1], [-math.inf, 0, math.inf]) == 1
    # fpr 0, 0, 1/2, 1/2, 1 and tpr 0, 1/2, 1/2, 1, 1: misses equal false alarms at 1/2.
    assert metrics.eer([1, 0, 1, 0], [4, 3, 2, 1]) == 0.5
    # One threshold for all: the straight line from (0, 0) to (1, 1).
    assert metrics.eer([1, 0], [1, 1]) == 0.5
    assert metrics.eer([0, 0, 1, 1], [1, 2, 3, 4]) == 0
    assert metrics.tpr_at_fpr([1, 1, 0, 0], [4, 2, 3, 1], 0.0) == 0.5
    assert metrics.tpr_at_fpr([1, 1, 0, 0], [4, 2, 3, 1], 0.5) == 1
    assert metrics.average_precision([1, 0, 1], [3, 2, 1]) == pytest.approx(5 / 6)
    # Bins [0, .5) and [.5, 1]: |0 - .2| and |1/2 - .75|, two rows each.
    assert metrics.ece([0, 0, 1, 0], [0.1, 0.3, 0.5, 1.0], bins=2) == pytest.approx(0.225)
    assert metrics.log_loss([1, 0], [0.5, 0.5]) == pytest.approx(math.log(2))
    assert metrics.brier([1, 0], [0.5, 0.5]) == 0.25
    assert metrics.accuracy([0, 1, 1], [0.2, 0.5, 0.4], 0.5) == pytest.approx(2 / 3)


def test_calibrated_probabilities_have_small_ece_and_overconfident_ones_do_not():
    rng = np.random.default_rng(0)
    p = rng.random(100_000)
    labels = (rng.random(len(p)) < p).astype(int)
    assert metrics.ece(labels, p) < 0.01
    assert metrics.ece(labels, np.round(p)) == pytest.approx(0.25, abs=0.01)
    bins = metrics.reliability(labels, p, 10)
    assert bins.counts.sum() == len(p)
    np.testing.assert_allclose(bins.mean_p, bins.share_fake, atol=0.02)


def test_the_floor_is_what_ece_shows_of_labels_drawn_from_p():
    rng = np.random.default_rng(1)
    p = rng.beta(2, 3, size=1300)
    drawn = [metrics.ece((rng.random(len(p)) < p).astype(int), p) for _ in range(600)]
    mean, high = metrics.ece_floor(p)
    assert mean == pytest.approx(np.mean(drawn), rel=0.05)
    assert high == pytest.approx(np.quantile(drawn, 0.95), rel=0.05)
    assert mean > 0.025  # a bar of .03 is hardly above it at this size
    assert metrics.ece_floor(np.tile(p, 16))[0] == pytest.approx(mean / 4, rel=0.1)
    assert metrics.ece_floor(np.array([0.0, 1.0])) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        metrics.ece_floor(np.array([1.5]))


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_ranking_ignores_every_rising_map_and_mirrors(seed):
    labels, p = scored(seed, n=60)
    area = metrics.auc(labels, p)
    assert metrics.auc(labels, np.exp(3 * p)) == area
    assert metrics.auc(labels, -p) == pytest.approx(1 - area, **EXACT)
    assert metrics.auc(1 - labels, -p) == pytest.approx(area, **EXACT)
    assert metrics.eer(labels, np.exp(3 * p)) == pytest.approx(metrics.eer(labels, p), **EXACT)


def test_bootstrap_covers_the_truth():
    """The bar: 93 to 97 % of 1,000 simulated data sets (60 real and 60 fake, true AUC .802)."""
    separation = 1.2
    truth = NormalDist().cdf(separation / math.sqrt(2))
    labels = np.repeat([0, 1], 60)
    covered = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=120) + separation * labels
        interval = metrics.auc_interval(labels, scores, seed=seed)
        covered += interval.low <= truth <= interval.high
    assert 930 <= covered <= 970


def test_interval_is_seeded_holds_the_value_and_narrows():
    labels, p = scored(3, n=200, tied=False)
    first = metrics.auc_interval(labels, p, seed=1)
    assert first == metrics.auc_interval(labels, p, seed=1)
    assert first != metrics.auc_interval(labels, p, seed=2)
    assert first.low < first.value < first.high
    many = metrics.auc_interval(np.tile(labels, 16), np.tile(p, 16), seed=1)
    ratio = (first.high - first.low) / (many.high - many.low)
    assert ratio == pytest.approx(4, rel=0.15)
    narrow = metrics.auc_interval(labels, p, seed=1, level=0.5)
    assert first.low < narrow.low < narrow.high < first.high
    perfect = metrics.auc_interval([0, 0, 1, 1], [1, 2, 3, 4], seed=0)
    assert perfect[:3] == (1, 1, 1)


def test_delong_variance_is_that_of_the_pairwise_kernel():
    """Variance from the pairwise kernel written out in full, against the placements."""
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], [30, 20])
    a, b = np.round(rng.normal(size=(2, 50)) + labels, 1)
    kernels = []
    for s in (a, b):
        x, y = s[labels == 1][:, None], s[labels == 0][None]
        kernels.append((x > y) + 0.5 * (x == y))
    difference = kernels[0] - kernels[1]
    variance = difference.mean(1).var(ddof=1) / 20 + difference.mean(0).var(ddof=1) / 30
    test = metrics.paired_auc_test(labels, a, b)
    assert test.difference == pytest.approx(difference.mean(), **EXACT)
    z = difference.mean() / math.sqrt(variance)
    assert test.p == pytest.approx(2 * NormalDist().cdf(-abs(z)), rel=1e-9)
    assert (test.high - test.low) / 2 == pytest.approx(1.959963985 * math.sqrt(variance))


@pytest.mark.parametrize("method", ["delong", "bootstrap"])
def test_paired_test_finds_a_difference_and_only_a_difference(method):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 300)
    good = rng.normal(size=600) + 1.5 * labels
    bad = good + 2 * rng.normal(size=600)
    better = metrics.paired_auc_test(labels, good, bad, method=method)
    assert better.difference > 0 and better.low > 0 and better.p < 0.01
    mirrored = metrics.paired_auc_test(labels, bad, good, method=method)
    assert mirrored.difference == -better.difference and mirrored.high < 0
    same = metrics.paired_auc_test(labels, good, np.exp(good), method=method)
    assert (same.difference, same.p) == (0, 1)
    twin = metrics.paired_auc_test(labels, good, rng.normal(size=600) + 1.5 * labels, method=method)
    assert twin.p > 0.01 and twin.low < 0 < twin.high


def test_paired_false_positive_rate_is_its_level():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 60)
    found = 0
    for _ in range(500):
        common = rng.normal(size=120) + labels
        a, b = common + rng.normal(size=(2, 120))
        found += metrics.paired_auc_test(labels, a, b).p < 0.05
    assert 0.03 <= found / 500 <= 0.08


def test_summary_repeats_the_single_numbers():
    labels, p = scored(7)
    s = metrics.summarize(labels, p, threshold=0.4, seed=3)
    assert (s.n, s.n_real + s.n_fake, s.n_fake) == (len(p), len(p), labels.sum())
    assert s.auc == metrics.auc(labels, p) and s.auc_low < s.auc < s.auc_high
    assert s.ece == metrics.ece(labels, p) and s.eer == metrics.eer(labels, p)
    weighted = (s.accuracy_real * s.n_real + s.accuracy_fake * s.n_fake) / s.n
    assert weighted == pytest.approx(s.accuracy)


def test_runs_on_the_same_pictures_are_averaged_and_share_their_resamples():
    labels, p = scored(8, n=300, tied=False)
    again = np.clip(p + np.random.default_rng(0).normal(0, 0.2, 300), 0, 1)
    runs = np.stack([p, again])
    both = metrics.summarize(labels, runs, seed=1)
    one, two = (metrics.summarize(labels, run, seed=1) for run in runs)
    for name in ("auc", "eer", "ece", "log_loss", "accuracy_fake", "tpr_at_fpr_5"):
        mean = (getattr(one, name) + getattr(two, name)) / 2
        assert getattr(both, name) == pytest.approx(mean, **EXACT)
    # The same picture twice is no second picture: a run repeated leaves the interval as it is.
    repeated = metrics.auc_interval(labels, np.stack([p, p]), seed=1)
    assert repeated == metrics.auc_interval(labels, p, seed=1)
    for method in ("delong", "bootstrap"):
        test = metrics.paired_auc_test(labels, runs, runs[::-1], method=method)
        assert test.difference == pytest.approx(0, **EXACT) and test.p > 0.99


def test_a_video_is_its_source_its_label_and_its_folder():
    """Folder `000_003` occurs real and fake and in two sets: four videos, never one."""
    sources = ["a", "a", "a", "b", "b", "a", "a"]
    labels = np.array([0, 0, 1, 1, 1, 1, 0])
    names = ["000_003"] * 5 + ["", "x"]
    scores = np.array([0.1, 0.3, 0.9, 0.5, 0.7, 0.0, 0.4])
    videos = metrics.video_level(sources, labels, names, scores)
    assert videos.keys == (
        ("a", 0, "000_003"),
        ("a", 1, "000_003"),
        ("b", 1, "000_003"),
        ("a", 0, "x"),
    )
    np.testing.assert_allclose(videos.scores, [0.2, 0.9, 0.6, 0.4])
    assert videos.labels.tolist() == [0, 1, 1, 0]
    assert videos.frames.tolist() == [2, 1, 2, 1]
    order = np.random.default_rng(0).permutation(7)
    shuffled = metrics.video_level(
        [sources[i] for i in order],
        labels[order],
        [names[i] for i in order],
        scores[order],
    )
    assert dict(zip(shuffled.keys, shuffled.scores)) == pytest.approx(dict(zip(videos.keys, videos.scores)))
    none = metrics.video_level(["a"], np.array([1]), [""], np.array([0.5]))
    assert none.keys == () and len(none.scores) == 0


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 1], [0.1, 0.2], "all 2 labels are fake"),
        ([0, 0], [0.1, 0.2], "all 2 labels are real"),
        ([0, 1], [0.1, math.nan], "1 of 2 are NaN"),
        ([0, 2], [0.1, 0.2], "labels are 0"),
        ([0, 1, 1], [0.1, 0.2], "equally long"),
        ([], [], "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_says_so(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metrics.auc(labels, scores)
    with pytest.raises(ValueError, match=message):
        metrics.summarize(labels, scores)


def test_probabilities_must_be_probabilities():
    for measure in (metrics.ece, metrics.log_loss, metrics.brier):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            measure([0, 1], [0.5, 1.5])
