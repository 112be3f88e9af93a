"""The vote: the published double rounding against an independent table, refusals, and a search that gives no vote away."""

from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solution.config import VoteConfig
from solution.evaluation import metrics, search
from solution.models.calibration import sigmoid
from solution.presets import NTIRE26_VOTE
from solution.scoring import vote


def table(rows=10_000):
    """(3, rows) probabilities: a third free, a third on the ties k / 20, a third one float64 beside such a tie."""
    rng = np.random.default_rng(26)
    p = rng.random((3, rows))
    ties = rng.integers(0, 21, size=(3, rows)) / 20
    side = np.nextafter(ties, rng.integers(0, 2, size=(3, rows)).astype(float))
    which = rng.integers(0, 3, size=(3, rows))
    return np.choose(which, [p, ties, side])


def test_ntire26_equals_ten_thousand_rows_in_decimal_arithmetic():
    """Decimal(p) is exact, so this shares neither binary rounding nor numpy with the vote."""
    tenth = Decimal("0.1")
    p = table()
    expected = []
    for row in p.T:
        a, b, c = (Decimal(float(x)).quantize(tenth, ROUND_HALF_EVEN) for x in row)
        mean = (2 * a + b + 2 * c) / 5
        expected.append(float(mean.quantize(tenth, ROUND_HALF_EVEN)))
    members = dict(zip(("global", "face", "fusion"), p))
    scores = vote.combine(members, NTIRE26_VOTE)
    np.testing.assert_array_equal(scores, expected)
    assert set(scores) == {float(f"{k / 10:.1f}") for k in range(11)}
    # And as the entry computed it: one-decimal strings, numpy's mean and numpy's round.
    strings = [[float(f"{x:.1f}") for x in row] for row in p.T]
    published = np.round(np.average(strings, axis=1, weights=[2, 1, 2]), 1)
    np.testing.assert_array_equal(scores, published)


def test_known_ties():
    """0.25, 0.5 and 0.75 are exact and go to even; 0.05, 0.15, ... are not, and go where their float64 lies."""
    p = np.arange(21) / 20
    expected = [float(f"{x:.1f}") for x in p]
    assert expected[5] == 0.2 and expected[15] == 0.8 and expected[7] == 0.3
    assert vote.levels(p).tolist() == expected
    assert float(vote.levels(0.25)) == 0.2


@given(st.floats(0, 1))
def test_levels_of_a_tenth_are_python_format(p):
    assert vote.levels(np.array([p]))[0] == float(f"{p:.1f}")
    assert vote.levels(np.array([p]), 0.01)[0] == float(f"{p:.2f}")
    assert vote.levels(np.array([p]), 1.0)[0] == float(f"{p:.0f}")


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=20),
    st.sampled_from([0.05, 0.2, 0.25]),
)
def test_levels_rise_lie_on_the_grid_and_are_near(values, step):
    p = np.sort(values)
    found = vote.levels(p, step)
    assert (np.diff(found) >= 0).all()
    assert np.abs(found - p).max() <= step / 2 + 1e-12
    np.testing.assert_allclose(found / step, np.rint(found / step), atol=1e-9)
    np.testing.assert_array_equal(vote.levels(found, step), found)


def test_maximum_and_noisy_or_let_one_member_speak():
    p = {"a": np.array([0.96, 0.51, 1.0]), "b": np.array([0.1, 0.49, 0.0]), "mute": np.array([1.0, 1.0, 1.0])}
    weights = {"a": 1, "b": 3, "mute": 0}
    assert vote.combine(p, VoteConfig(weights, mean="maximum")).tolist() == [1.0, 0.5, 1.0]
    found = vote.combine(p, VoteConfig(weights, mean="noisy_or"))
    doubt_a, doubt_b = np.array([0.025, 0.5, 0.025]), np.array([0.9, 0.5, 1.0])
    np.testing.assert_allclose(found, 1 - doubt_a**0.25 * doubt_b**0.75)
    assert all(VoteConfig({"a": 1}, mean=mean).discrete for mean in ("levels", "maximum", "noisy_or"))
    assert not VoteConfig({"a": 1}, mean="logit").discrete


def test_the_four_means():
    p = {"global": np.array([0.12, 0.97]), "face": np.array([0.58, 0.0])}
    weights = {"global": 2, "face": 1}

    def scores(mean):
        return vote.combine(p, VoteConfig(weights, mean=mean))

    np.testing.assert_allclose(scores("levels"), [0.8 / 3, 2 / 3])
    np.testing.assert_allclose(scores("levels_rounded"), [0.3, 0.7])
    np.testing.assert_allclose(scores("probability"), [0.82 / 3, 1.94 / 3])
    logits = np.log([0.12 / 0.88, 0.58 / 0.42])
    expected = 1 / (1 + np.exp(-(2 * logits[0] + logits[1]) / 3))
    assert scores("logit")[0] == pytest.approx(expected)
    assert 0 < scores("logit")[1] < 1  # one certain member is no infinity


def test_equal_votes_are_equal_numbers():
    """0.1 + 0.2 + 0.3 and 0.2 + 0.2 + 0.2 differ in float64; a tie must stay a tie."""
    p = {
        "a": np.array([0.1, 0.2]),
        "b": np.array([0.2, 0.2]),
        "c": np.array([0.3, 0.2]),
    }
    scores = vote.combine(p, VoteConfig({"a": 1, "b": 1, "c": 1}))
    assert scores[0] == scores[1] == 0.2
    ones = {name: np.ones(1) for name in p}
    for mean in ("levels", "levels_rounded", "probability"):
        config = VoteConfig({"a": 3, "b": 1, "c": 3}, mean=mean)
        assert vote.combine(ones, config)[0] == 1


def test_missing_and_unknown_members_refuse():
    p = {"global": np.array([0.1]), "face": np.array([0.2])}
    with pytest.raises(ValueError, match="no scores from fusion"):
        vote.combine(p, NTIRE26_VOTE)
    with pytest.raises(ValueError, match="no scores from face"):
        vote.combine({"global": p["global"]}, VoteConfig({"global": 1, "face": 1}))
    with pytest.raises(ValueError, match="face, unknown to the vote"):
        vote.combine(p, VoteConfig({"global": 1}))
    # A member known to give no vote may be there or not.
    silent = VoteConfig({"global": 1, "face": 0})
    assert vote.combine(p, silent) == vote.combine({"global": p["global"]}, silent)


def test_what_is_no_probability_refuses():
    for bad in (np.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"a: 1 of 2 values are not in \[0, 1\]"):
            vote.combine({"a": np.array([0.5, bad])}, VoteConfig({"a": 1}))
    with pytest.raises(ValueError, match="different numbers of pictures"):
        vote.combine({"a": np.ones(2), "b": np.ones(3)}, VoteConfig({"a": 1, "b": 1}))
    with pytest.raises(ValueError, match="needs 1, 0.1, 0.01"):
        config = VoteConfig({"a": 1}, step=0.25, mean="levels_rounded")
        vote.combine({"a": np.ones(2)}, config)


def test_rounding_twice_ties_pictures():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    p = {m: np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1) for m in "abc"}
    weights = {"a": 2, "b": 1, "c": 2}
    area = {
        mean: metrics.auc(labels, vote.combine(p, VoteConfig(weights, mean=mean)))
        for mean in ("probability", "levels", "levels_rounded")
    }
    assert area["levels_rounded"] < area["levels"] < area["probability"] + 0.002


def test_decide_and_the_unsure_band():
    config = VoteConfig({"a": 1}, threshold=0.5, unsure=0.1)
    scores = np.array([0.0, 0.4, 0.41, 0.5, 0.59, 0.6, 1.0])
    assert vote.decide(scores, config).tolist() == (["real", "real", "unsure", "unsure", "unsure", "fake", "fake"])
    sharp = VoteConfig({"a": 1}, threshold=0.5)
    assert vote.decide(scores, sharp).tolist() == ["real"] * 3 + ["fake"] * 4
    with pytest.raises(ValueError, match="NaN"):
        vote.decide(np.array([np.nan]), sharp)


@given(st.integers(0, 999), st.sampled_from([0.0, 0.01, 0.05, 0.2]), st.booleans())
def test_threshold_holds_its_false_alarm_rate_and_is_the_lowest(seed, rate, tied):
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(0, 2, 100)]
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    scores = vote.levels(scores) if tied else scores
    threshold = search.threshold_at_false_alarm(labels, scores, rate)
    assert np.mean(scores[labels == 0] >= threshold) <= rate
    below = scores[scores < threshold]
    if len(below):
        assert np.mean(scores[labels == 0] >= below.max()) > rate


def test_the_threshold_weighs_real_sources_alike_and_bounds_the_worst():
    rng = np.random.default_rng(0)
    sources = np.repeat(["large", "small", "odd", "few"], [2000, 100, 100, 10])
    labels = np.zeros(len(sources), int)
    scores = rng.random(len(sources)) * np.where(sources == "odd", 1.0, 0.5)
    alike = search.threshold_at_false_alarm(labels, scores, 0.05, sources=sources)
    rates = search.false_alarms(labels, scores >= alike, sources)
    assert set(rates) == {"large", "small", "odd", "others"}
    assert 0.04 < np.mean(list(rates.values())) <= 0.05 and rates["odd"] > 0.1
    bound = search.threshold_at_false_alarm(labels, scores, 0.05, sources=sources, worst=0.1)
    rates = search.false_alarms(labels, scores >= bound, sources)
    assert 0.08 < rates["odd"] <= 0.1 and bound > alike
    pooled = search.threshold_at_false_alarm(labels, scores, 0.05)
    assert pooled < alike


def test_stacking_asks_who_knows_and_never_the_other_way_round():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    p = {name: sigmoid(s * (2 * labels - 1) + 2 * rng.normal(size=2000)) for name, s in (("a", 2), ("b", 1), ("c", -1))}
    weights = search.stack_weights(p, labels, np.ones(2000))
    assert weights["a"] == 100 and 30 < weights["b"] < 70 and weights["c"] == 0
    with pytest.raises(ValueError, match="nobody to ask"):
        search.stack_weights({"c": p["c"]}, labels, np.ones(2000))


def test_unsure_band_holds_its_share():
    scores = np.random.default_rng(0).random(1000)
    half = search.unsure_band(scores, 0.6, 0.1)
    config = VoteConfig({"a": 1}, threshold=0.6, unsure=half)
    share = np.mean(vote.decide(scores, config) == "unsure")
    assert 0.09 < share <= 0.1
    assert search.unsure_band(np.full(9, 0.5), 0.5, 0.1) == 0  # all tied: none unsure


def searched(seed, **kinds):
    """Members of three kinds on 800 pictures: `good` see the label, `noise` sees nothing, `copy` repeats good_0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 800)
    noise = rng.normal(size=800)
    p = {f"good_{i}": sigmoid(rng.normal(2 * labels - 1, 1.5)) for i in range(2)}
    p["noise"] = sigmoid(noise)
    p["copy"] = p["good_0"]
    return search.search_weights(p, lambda votes: metrics.auc(labels, votes), **kinds), p, labels


@pytest.mark.parametrize("seed", range(4))
def test_a_member_that_does_not_help_gets_no_vote(seed):
    found, p, labels = searched(seed)
    assert found.weights["noise"] == 0
    assert found.weights["good_1"] > 0
    # The copy adds nothing of its own: one of the two carries the vote.
    assert (found.weights["good_0"] > 0) + (found.weights["copy"] > 0) == 1
    scores = vote.combine(p, VoteConfig(found.weights))
    assert found.auc == pytest.approx(metrics.auc(labels, scores), abs=1e-12)
    assert found.auc > max(metrics.auc(labels, vote.levels(x)) for x in p.values())


def test_the_penalty_prices_members_and_votes():
    free, _, _ = searched(0, penalty=0.0)
    dear, p, labels = searched(0, penalty=1.0)
    assert free.auc >= searched(0)[0].auc
    assert sorted(dear.weights.values()) == [0, 0, 0, 1]
    best = max(metrics.auc(labels, vote.levels(x)) for x in p.values())
    assert dear.auc == dear.objective == best
