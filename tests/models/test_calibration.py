"""Calibrators find a known distortion, keep the order, survive JSON, and are chosen by held-out log-loss."""

import json
import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from solution.config import ConfigError
from solution.evaluation import metrics
from solution.models import calibration
from solution.models.calibration import Calibrator


def distorted(seed, distort, n=4000):
    """Raw logits whose true P(fake) is sigmoid(x) of a hidden x, and labels drawn from that probability."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2, n)
    labels = (rng.random(n) < calibration.sigmoid(x)).astype(int)
    return distort(x), labels


DISTORTIONS = {
    "identity": lambda x: x,
    "temperature": lambda x: 3 * x,
    "platt": lambda x: 2.5 * x + 4,
    "isotonic": lambda x: np.sign(x) * np.sqrt(np.abs(x)) * 2 + (x > 1) * 3,
}


@pytest.mark.parametrize("kind", calibration.KINDS)
def test_the_simplest_kind_that_fits_is_chosen_and_calibrates(kind):
    logits, labels = distorted(0, DISTORTIONS[kind])
    fitted = calibration.fit(logits, labels)
    assert fitted.kind == kind
    assert fitted.fitted_on == "4000 pictures"
    assert (fitted.n_real, fitted.n_fake) == (np.sum(labels == 0), labels.sum())
    assert set(fitted.considered) == set(calibration.KINDS)
    fresh, fresh_labels = distorted(1, DISTORTIONS[kind])
    after = metrics.ece(fresh_labels, fitted.apply(fresh))
    assert after < 0.03
    if kind != "identity":
        before = metrics.ece(fresh_labels, calibration.sigmoid(fresh))
        assert after < before / 2


def test_temperature_and_platt_find_their_numbers():
    logits, labels = distorted(2, DISTORTIONS["temperature"], n=50_000)
    (temperature,) = calibration.fit_kind("temperature", logits, labels).parameters
    assert temperature == pytest.approx(3, rel=0.03)
    logits, labels = distorted(2, DISTORTIONS["platt"], n=50_000)
    slope, offset = calibration.fit_kind("platt", logits, labels).parameters
    assert slope == pytest.approx(1 / 2.5, rel=0.03)
    assert offset == pytest.approx(-4 / 2.5, rel=0.03)
    plain = LogisticRegression(C=math.inf, tol=1e-8).fit(logits[:, None], labels)
    assert slope == pytest.approx(plain.coef_[0, 0], rel=1e-3)
    assert offset == pytest.approx(plain.intercept_[0], rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["identity", "temperature", "platt"])
def test_scaling_never_changes_the_auc(kind, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 500)
    logits = np.round(rng.normal(labels, 1) * 10) / 10 * rng.choice([1, 1.0, 8])
    fitted = calibration.fit_kind(kind, logits, labels)
    assert metrics.auc(labels, fitted.apply(logits)) == metrics.auc(labels, logits)


def test_isotonic_rises_inside_its_knots_and_stays_inside_zero_and_one():
    logits, labels = distorted(3, DISTORTIONS["isotonic"], n=600)
    fitted = calibration.fit_kind("isotonic", logits, labels)
    p = fitted.apply(np.sort(logits))
    assert (np.diff(p) >= 0).all() and 0 < p.min() and p.max() < 1
    assert len(np.unique(p)) > 0.8 * len(p)  # steps would leave some twenty values
    change = metrics.auc(labels, fitted.apply(logits)) - metrics.auc(labels, logits)
    assert abs(change) < 0.005
    ends = fitted.apply(np.array([-1e9, 1e9]))
    assert ends.tolist() == [p.min(), p.max()]


@pytest.mark.parametrize("kind", calibration.KINDS)
def test_json_round_trip_is_exact_and_strict(kind):
    logits, labels = distorted(4, DISTORTIONS[kind], n=500)
    fitted = calibration.fit(logits, labels, kinds=[kind])
    values = json.loads(json.dumps(calibration.to_dict(fitted)))
    again = calibration.from_dict(values)
    assert again == fitted
    np.testing.assert_array_equal(again.apply(logits), fitted.apply(logits))
    with pytest.raises(ConfigError, match="face: unknown field temperatur"):
        calibration.from_dict(values | {"temperatur": 2.0}, "face")
    with pytest.raises(ConfigError, match="calibrator.n_real: expected int"):
        calibration.from_dict(values | {"n_real": "many"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "beta"}, "allowed: identity"),
        ({"kind": "temperature"}, "has 1 finite"),
        ({"kind": "temperature", "parameters": (-1.0,)}, "must be positive"),
        ({"kind": "platt", "parameters": (-1.0, 0.0)}, "reverse the order"),
        ({"kind": "platt", "parameters": (1.0, math.nan)}, "has 2 finite"),
        ({"kind": "isotonic"}, "at least two pairs"),
        ({"kind": "isotonic", "knots": ((0.0, 0.5), (0.0, 0.6))}, "must rise"),
        ({"kind": "isotonic", "knots": ((0.0, 0.5), (1.0, 1.5))}, "probabilities"),
        ({"kind": "identity", "knots": ((0.0, 0.5),)}, "belong to isotonic"),
    ],
)
def test_impossible_calibrators_refuse(fields, message):
    with pytest.raises(ConfigError, match=message):
        Calibrator(**fields)


def test_separable_and_backward_and_constant_logits_stay_finite():
    labels = np.repeat([0, 1], 50)
    separable = np.where(labels == 1, 9.0, -9.0) + np.linspace(0, 1, 100)
    for kind in ("temperature", "platt"):
        p = calibration.fit_kind(kind, separable, labels).apply(separable)
        assert metrics.auc(labels, p) == 1 and 0.005 < p.min() < p.max() < 0.995
    rng = np.random.default_rng(0)
    backward = rng.normal(-labels, 1)
    fitted = calibration.fit_kind("platt", backward, labels)
    assert metrics.auc(labels, fitted.apply(backward)) == metrics.auc(labels, backward)
    np.testing.assert_allclose(fitted.apply(backward), 0.5, atol=0.01)
    constant = np.full(100, 3.0)
    np.testing.assert_allclose(calibration.fit_kind("platt", constant, labels).apply(constant), 0.5, atol=0.01)
    with pytest.raises(ValueError, match="two different"):
        calibration.fit_kind("isotonic", constant, labels)


def test_versions_of_a_picture_stay_in_one_fold():
    labels = np.tile(np.repeat([0, 1], 30), 2)
    groups = np.tile(np.arange(60), 2)
    folds = calibration.split(labels, groups, folds=5, seed=0)
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(120))
    for train, held in folds:
        assert not set(groups[train]) & set(groups[held])
        assert 0.4 < labels[held].mean() < 0.6


def test_memorised_labels_do_not_win():
    """Isotonic on 40 pictures fits its own labels best; held-out log-loss must not be fooled."""
    logits, labels = distorted(6, DISTORTIONS["identity"], n=40)
    own = {
        kind: metrics.log_loss(labels, calibration.fit_kind(kind, logits, labels).apply(logits))
        for kind in calibration.KINDS
    }
    assert own["isotonic"] < own["identity"]
    assert calibration.fit(logits, labels).kind != "isotonic"


def test_bad_input_refuses():
    logits, labels = distorted(0, DISTORTIONS["identity"], n=50)
    with pytest.raises(ValueError, match="needs both"):
        calibration.fit(logits, np.zeros(50, int))
    with pytest.raises(ValueError, match="1 of 50 logits are not finite"):
        calibration.fit(np.r_[np.nan, logits[1:]], labels)
    with pytest.raises(ValueError, match="allowed: identity"):
        calibration.fit(logits, labels, kinds=["beta"])
    with pytest.raises(ValueError, match="cannot make 5 folds"):
        calibration.fit(logits[:6], np.array([0, 0, 0, 1, 1, 1]))
    with pytest.raises(ValueError, match="1 of 2 logits are NaN"):
        Calibrator().apply(np.array([0.0, np.nan]))
