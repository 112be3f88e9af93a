"""What the engine draws, against the numbers of the specification's table, written here once more from its text.

Every test draws some thousand parameters with a fixed seed and holds each to its stated law: uniform values to their
range and to a Kolmogorov-Smirnov test, mixtures to a chi-square test. The least p is 1e-4, over some hundred tests.
"""

import math
from collections import Counter

import cv2
import numpy as np
import pytest
import reference_degradation as reference
from scipy import stats

from solution.config import OPS, DegradationConfig
from solution.data import degradation_ops as ops
from solution.data.degradation import degrade, sample_recipe
from solution.data.drawn import photo_like

LEAST = 1e-4
COUNT = 3000
STRENGTHS = (0.05, 0.2, 0.45, 0.8, 1.0)
at_strengths = pytest.mark.parametrize("s", STRENGTHS)


def draws(name: str, s: float, count: int = COUNT) -> list[dict]:
    rng = np.random.default_rng([OPS.index(name), round(100 * s)])
    return [ops.DRAW[name](s, rng) for _ in range(count)]


def assert_uniform(values, low: float, high: float) -> None:
    values = np.array(values)
    assert len(values) > 100
    assert values.min() >= low - 1e-12
    assert values.max() <= high + 1e-12
    if high > low:
        law = stats.uniform(low, high - low)
        assert stats.kstest(values, law.cdf).pvalue > LEAST, (low, high)


def assert_shares(values, shares: dict) -> None:
    """`shares`: of every value that may occur."""
    found = Counter(values)
    assert set(found) <= set(shares), found
    expected = np.array(list(shares.values())) * len(values)
    assert expected.sum() == pytest.approx(len(values))
    if len(shares) > 1:
        counts = [found[value] for value in shares]
        assert stats.chisquare(counts, expected).pvalue > LEAST, found


def assert_integers(values, low: int, high: int, step: int = 1) -> None:
    allowed = range(low, high + 1, step)
    assert_shares(values, dict.fromkeys(allowed, 1 / len(allowed)))


def kinds(drawn: list[dict], key: str = "kind") -> dict[str, list[dict]]:
    return {k: [p for p in drawn if p.get(key) == k] for k in {p[key] for p in drawn}}


# ------------------------------------------------------------------------------------------------ the table
@at_strengths
def test_blur(s):
    """One third each; variances U(0, 30 s) both; kernel odd in 7..25, sigma U(0, 30 s); box 3..max(3, 30 s)."""
    drawn = draws("blur", s)
    third = dict.fromkeys(("anisotropic", "isotropic", "box"), 1 / 3)
    assert_shares([p["kind"] for p in drawn], third)
    of = kinds(drawn)
    for key, high in (("angle", math.pi), ("l1", 30 * s), ("l2", 30 * s)):
        assert_uniform([p[key] for p in of["anisotropic"]], 0, high)
    assert_uniform([p["sigma"] for p in of["isotropic"]], 0, 30 * s)
    assert_integers([p["size"] for p in of["isotropic"]], 7, 25, step=2)
    assert_integers([p["side"] for p in of["box"]], 3, max(3, int(30 * s)))


@at_strengths
def test_motion_blur(s):
    """Side int(max(3, 12 s)) made odd, angle U(0, 180)."""
    drawn = draws("motion_blur", s)
    side = {0.05: 3, 0.2: 3, 0.45: 5, 0.8: 9, 1.0: 13}[s]
    assert {p["side"] for p in drawn} == {side}
    assert_uniform([p["angle"] for p in drawn], 0, 180)


@at_strengths
def test_sensor_noise(s):
    """One third each: speckle, int U(2, 25) s / 255; Poisson, 10**U(2, 4) photons; salt and pepper, 0.1 s."""
    drawn = draws("sensor_noise", s, 6000)
    third = dict.fromkeys(("speckle", "poisson", "salt_pepper"), 1 / 3)
    assert_shares([p["kind"] for p in drawn], third)
    of = kinds(drawn)
    layers = {"colour": 0.4, "grey": 0.4, "correlated": 0.2}
    assert_shares([p["layers"] for p in of["speckle"]], layers)
    levels = [p["level"] * 255 / s for p in of["speckle"] if "level" in p]
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-9)
    assert_integers([round(level) for level in levels], 2, 25)
    assert_correlated(of["speckle"], 25 * s / 255)
    assert_uniform([math.log10(p["photons"]) for p in of["poisson"]], 2, 4)
    assert_shares([p["grey"] for p in of["poisson"]], {True: 0.5, False: 0.5})
    densities = [p["density"] for p in of["salt_pepper"]]
    np.testing.assert_allclose(densities, 0.1 * s)


def assert_correlated(drawn: list[dict], level: float) -> None:
    """The drawn mixes have the law of the table's matrix at `level`: total variance and the share of grey in it."""
    mixes = [np.array(p["mix"]) for p in drawn if p["layers"] == "correlated"]
    rng, matrices = np.random.default_rng(1), []
    for _ in range(1000):
        first, second, diagonal = rng.random((3, 3)), rng.random((3, 3)), rng.random(3)
        published = reference.correlated_covariance(level, first, second, diagonal)
        # What NumPy draws for a matrix that is no covariance: see test_degradation.
        _, sizes, right = np.linalg.svd(published)
        matrices.append(right.T @ np.diag(sizes) @ right)
    for measure in (np.trace, np.sum, lambda c: np.linalg.det(c) / np.trace(c) ** 3):
        found = [measure(mix @ mix.T) for mix in mixes]
        expected = [measure(matrix) for matrix in matrices]
        assert stats.ks_2samp(found, expected).pvalue > LEAST


@at_strengths
def test_resize(s):
    """70 % shrink by U(0.25 / s, 1) clipped to [0.1, 1], half of them nearest; 20 % grow by U(1, 2); 10 % none."""
    drawn = draws("resize", s)
    grown = [p for p in drawn if p["scale"] > 1]
    same = [p for p in drawn if p["scale"] == 1]
    shrunk = [p for p in drawn if p["scale"] < 1]
    if s <= 0.25:
        assert not shrunk
        shares = {"grown": 0.2, "same": 0.8, "shrunk": 0.0}
        assert len(grown) == pytest.approx(0.2 * COUNT, abs=100)
        nearest = sum(p["method"] == "nearest" for p in same) / len(same)
        assert nearest == pytest.approx(0.35 / 0.8, abs=0.04)
    else:
        shares = {"grown": 0.2, "same": 0.1, "shrunk": 0.7}
        names = ["grown"] * len(grown) + ["same"] * len(same)
        assert_shares(names + ["shrunk"] * len(shrunk), shares)
        assert_uniform([p["scale"] for p in shrunk], 0.25 / s, 1)
        sixth = dict.fromkeys(("linear", "cubic", "area"), 1 / 6)
        assert_shares([p["method"] for p in shrunk], {"nearest": 1 / 2, **sixth})
    assert_uniform([p["scale"] for p in grown], 1, 2)
    third = dict.fromkeys(("linear", "cubic", "area"), 1 / 3)
    assert_shares([p["method"] for p in grown], third)


@at_strengths
def test_colour(s):
    """20 % grey; else 30 % fade U(0.1, max(0.2, 1 - s)); else cast U(1 - 0.4 s, 1 + 0.4 s), one in five green."""
    drawn = draws("colour", s)
    green = [0.8, 1.2, 0.8]
    names = ["green" if p.get("gains") == green else p["kind"] for p in drawn]
    shares = {"grey": 0.2, "fade": 0.8 * 0.3, "cast": 0.8 * 0.7 * 0.8}
    assert_shares(names, {**shares, "green": 0.8 * 0.7 * 0.2})
    fades = [p["saturation"] for p in drawn if p["kind"] == "fade"]
    assert_uniform(fades, 0.1, max(0.2, 1 - s))
    gains = [p["gains"] for p, name in zip(drawn, names) if name == "cast"]
    for channel in np.transpose(gains):
        assert_uniform(channel, 1 - 0.4 * s, 1 + 0.4 * s)
    assert np.abs(np.corrcoef(np.transpose(gains))[np.triu_indices(3, 1)]).max() < 0.15


@at_strengths
def test_gaussian_noise(s):
    """Level U(60, 100) s (80 %) or U(2, 100) s (20 %), of 255; 70 % colour, 20 % grey, 10 % correlated at 100 s."""
    drawn = draws("gaussian_noise", s, 6000)
    layers = {"colour": 0.7, "grey": 0.2, "correlated": 0.1}
    assert_shares([p["layers"] for p in drawn], layers)
    levels = np.array([p["level"] * 255 / s for p in drawn if "level" in p])
    assert levels.min() >= 2
    assert levels.max() <= 100

    def law(x):
        return 0.8 * np.clip((x - 60) / 40, 0, 1) + 0.2 * np.clip((x - 2) / 98, 0, 1)

    assert stats.kstest(levels, law).pvalue > LEAST
    assert_correlated(drawn, 100 * s / 255)


def test_a_noise_sweep_fixes_every_layers_level():
    rng = np.random.default_rng(0)
    drawn = [ops.draw_gaussian_noise(0.3, rng, sigma=40) for _ in range(6000)]
    assert {p["level"] for p in drawn if "level" in p} == {40 / 255}
    assert_correlated(drawn, 40 / 255)


@at_strengths
def test_jpeg(s):
    """Quality 10..95."""
    assert_integers([p["quality"] for p in draws("jpeg", s)], 10, 95)


@at_strengths
def test_the_ops_that_strength_alone_decides(s):
    """int(max(4, 32 - 14 s)) levels; d = int(max(1, 4 s)); 0.4 + 0.4 s at the corner; chroma is halved."""
    levels = {0.05: 31, 0.2: 29, 0.45: 25, 0.8: 20, 1.0: 18}[s]
    shift = {0.05: 1, 0.2: 1, 0.45: 1, 0.8: 3, 1.0: 4}[s]
    assert draws("banding", s, 50) == [{"levels": levels}] * 50
    assert draws("chromatic_aberration", s, 50) == [{"shift": shift}] * 50
    for drawn in draws("vignette", s, 50):
        assert drawn == {"amount": pytest.approx(0.4 + 0.4 * s)}
    assert draws("chroma_subsampling", s, 50) == [{}] * 50


@at_strengths
def test_exposure(s):
    """45 % darken to U(max(0.02, 1 - 0.98 s), 1).

    45 % haze: brighten U(1, 1 + 1.5 s), then contrast U(max(0.1, 1 - 0.9 s), 0.8). 10 % mild: brightness or contrast
    U(max(0.5, 1 - 0.5 s), 1 + 0.5 s).
    """
    drawn = draws("exposure", s, 6000)
    haze = [p for p in drawn if p["contrast"] != 1 and p["brightness"] != 1]
    contrasts = [p["contrast"] for p in drawn if p["brightness"] == 1]
    brightness = [p["brightness"] for p in drawn if p["contrast"] == 1]
    names = ["haze"] * len(haze) + ["contrast"] * len(contrasts)
    names += ["brightness"] * len(brightness)
    assert_shares(names, {"haze": 0.45, "contrast": 0.05, "brightness": 0.5})
    assert_uniform([p["brightness"] for p in haze], 1, 1 + 1.5 * s)
    ends = sorted((max(0.1, 1 - 0.9 * s), 0.8))
    assert_uniform([p["contrast"] for p in haze], *ends)
    low, high = max(0.5, 1 - 0.5 * s), 1 + 0.5 * s
    assert_uniform(contrasts, low, high)
    darkest = max(0.02, 1 - 0.98 * s)

    def law(x):
        dark = np.clip((x - darkest) / (1 - darkest), 0, 1)
        return 0.9 * dark + 0.1 * np.clip((x - low) / (high - low), 0, 1)

    assert min(brightness) >= darkest
    assert max(brightness) <= high
    assert stats.kstest(brightness, law).pvalue > LEAST


@at_strengths
def test_moire(s):
    """f U(0.5, 3) rad/px, a U(0, pi), blended at 0.15 s."""
    drawn = draws("moire", s)
    assert_uniform([p["frequency"] for p in drawn], 0.5, 3)
    assert_uniform([p["angle"] for p in drawn], 0, math.pi)
    np.testing.assert_allclose([p["blend"] for p in drawn], 0.15 * s)


@at_strengths
def test_glitch(s):
    """int(10 s) bands of 1..8 s px: 40 % a drop-out of 0, 1 or U(0.2, 0.8), a third each; else a roll of up to 30 s."""
    drawn = draws("glitch", s)
    count = {0.05: 0, 0.2: 2, 0.45: 4, 0.8: 8, 1.0: 10}[s]
    assert {len(p["bands"]) for p in drawn} == {count}
    bands = [band for p in drawn for band in p["bands"]]
    if not bands:
        return
    assert_uniform([band["top"] for band in bands], 0, 1)
    assert_integers([band["height"] for band in bands], 1, max(1, int(8 * s)))
    levels = [band["level"] for band in bands if "level" in band]
    names = [{0: "black", 1: "white"}.get(level, "grey") for level in levels]
    names += ["roll"] * (len(bands) - len(levels))
    third = dict.fromkeys(("black", "white", "grey"), 0.4 / 3)
    assert_shares(names, {**third, "roll": 0.6})
    assert_uniform([level for level in levels if level not in (0, 1)], 0.2, 0.8)
    reach = int(30 * s)
    assert_integers([b["roll"] for b in bands if "roll" in b], -reach, reach)


def test_distractor():
    """90 % text: 0..10 printable characters, random font, scale U(0, 8), thickness 1..8; 10 % a patch, 20..100 px."""
    drawn = draws("distractor", 0.5)
    assert_shares([p["kind"] for p in drawn], {"text": 0.9, "patch": 0.1})
    texts = [p["text"] for p in drawn]
    assert_integers([len(text["characters"]) for text in texts], 0, 10)
    written = [c for text in texts for c in text["characters"]]
    printable = [chr(code) for code in range(32, 127)]
    assert_shares(written, dict.fromkeys(printable, 1 / 95))
    assert_integers([text["font"] for text in texts], 0, 7)
    assert_uniform([text["scale"] for text in texts], 0, 8)
    assert_integers([text["thickness"] for text in texts], 1, 8)
    for channel in np.transpose([text["colour"] for text in texts]):
        assert_uniform(channel, 0, 1)
    for axis in np.transpose([text["place"] for text in texts]):
        assert_uniform(axis, 0, 1)
    patches = [p for p in drawn if p["kind"] == "patch"]
    for side in ("height", "width"):
        assert_uniform([p[side] + 0.5 for p in patches], 20, 101)
    for places in ("source", "place"):
        for axis in np.transpose([p[places] for p in patches]):
            assert_uniform(axis, 0, 1)


# ------------------------------------------------------------------------------------------------ the two parts
class Counting(np.random.Generator):
    """A generator that counts the strengths drawn from it."""

    betas = 0

    def beta(self, a, b, size=None):
        assert (a, b) == (1.2, 1.2)
        self.betas += 1
        return super().beta(a, b, size)


@pytest.mark.parametrize("seed", range(5))
def test_a_strength_is_redrawn_for_every_op_and_once_for_the_cycles(seed):
    options = {"global_p": 1.0, "distractor_p": 1.0}
    rng = Counting(np.random.PCG64(seed))
    sample_recipe(DegradationConfig(op_p=1.0, cycle_p=0.0, **options), rng)
    assert rng.betas == 15
    rng = Counting(np.random.PCG64(seed))
    sample_recipe(DegradationConfig(op_p=0.0, cycle_p=1.0, **options), rng)
    assert rng.betas == 1


def test_strengths_are_beta():
    config = DegradationConfig(global_p=1.0, op_p=1.0, cycle_p=0.0, ops=("vignette",))
    rng = np.random.default_rng(4)
    amounts = [sample_recipe(config, rng)[0].params["amount"] for _ in range(COUNT)]
    strengths = (np.array(amounts) - 0.4) / 0.4
    assert stats.kstest(strengths, stats.beta(1.2, 1.2).cdf).pvalue > LEAST


def test_about_four_ops_fire_and_the_way_back_is_smooth():
    rng = np.random.default_rng(5)
    config = DegradationConfig(global_p=1.0, cycle_p=0.0)
    recipes = [sample_recipe(config, rng) for _ in range(COUNT)]
    fired = np.mean([max(0, len(recipe) - 1) for recipe in recipes])
    assert fired == pytest.approx(14 * 0.3 + 0.3 * 0.15, abs=0.15)
    third = dict.fromkeys(("linear", "cubic", "area"), 1 / 3)
    assert_shares([r[-1].params["method"] for r in recipes if r], third)


def test_the_measures_see_a_misreading():
    rng = np.random.default_rng(6)
    with pytest.raises(AssertionError):
        assert_uniform(rng.uniform(0.1, 0.8, COUNT), 0.2, 0.8)
    with pytest.raises(AssertionError):
        assert_uniform(rng.uniform(0.2, 0.7, COUNT), 0.2, 0.8)
    with pytest.raises(AssertionError):
        assert_shares(["a"] * 480 + ["b"] * 520, {"a": 0.4, "b": 0.6})
    with pytest.raises(AssertionError):
        assert_shares(["a"] * 480 + ["c"], {"a": 1.0})
    drawn = draws("gaussian_noise", 0.5, 6000)
    with pytest.raises(AssertionError):  # the mean level instead of the upper
        assert_correlated(drawn, 74 * 0.5 / 255)


# ------------------------------------------------------------------------------------------------ the growth bound
def statistics(image: np.ndarray) -> list[float]:
    """Mean, deviation, gradient, Laplacian, saturation, dark and bright share, JPEG size of a uint8 picture."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return [
        image.mean(),
        image.std(),
        np.abs(np.diff(grey.astype(float), axis=1)).mean(),
        np.abs(cv2.Laplacian(grey, cv2.CV_32F)).mean(),
        np.ptp(image, axis=2).mean(),
        (grey < 26).mean(),
        (grey > 229).mean(),
        len(cv2.imencode(".jpg", image)[1]),
    ]


@pytest.mark.slow
def test_the_growth_bound_goes_unnoticed():
    """The published engine grows without bound; the pictures' statistics cannot tell."""
    sources = [photo_like(96, seed) for seed in range(16)]
    found = []
    for growth in (2.0, 100.0):
        config = DegradationConfig(global_p=1.0, growth=growth)
        found.append(
            [
                statistics(degrade(sources[index % 16], config, rng, sources[0]))
                for index in range(3000)
                for rng in [np.random.default_rng([int(growth), index])]
            ]
        )
    for bounded, free in zip(np.transpose(found[0]), np.transpose(found[1])):
        assert stats.ks_2samp(bounded, free).pvalue > 0.01
