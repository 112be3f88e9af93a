"""The degradation engine: each op against the plain reference, the properties of ops and recipes, the entry."""

import json
import math
from collections import Counter

import cv2
import numpy as np
import pytest
import reference_degradation as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solution import benchmark
from solution.config import OPS, DegradationConfig
from solution.data import degradation
from solution.data import degradation_ops as ops
from solution.data.degradation import (
    Op,
    apply_recipe,
    degrade,
    recipe_from_json,
    recipe_to_json,
    sample_recipe,
)

ALWAYS = DegradationConfig(global_p=1.0)
quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
strengths = st.floats(0, 1)
sides = st.one_of(st.integers(1, 6), st.integers(7, 80))
seeds = st.integers(0, 2**32 - 1)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes with some texture, black and white included, float32 HWC."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-0.3, 1.3, (height // 12 + 2, width // 12 + 2, 3))
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image = image.reshape(height, width, 3) + rng.normal(0, 0.03, (height, width, 3))
    return np.clip(image, 0, 1).astype(np.float32)


def run_op(name, image, params, donor=None):
    extra = {"donor": donor} if name == "distractor" else {}
    return ops.APPLY[name](image, **params, **extra)


def single(name: str, **changes) -> DegradationConfig:
    """Nothing but the op `name`, always."""
    options = {"op_p": 1.0, "cycle_p": 0.0, "distractor_p": 1.0, "ops": (name,)}
    return DegradationConfig(global_p=1.0, **{**options, **changes})


def assert_picture(image, shape):
    assert image.shape == shape
    assert image.dtype == np.float32
    assert image.flags.c_contiguous
    assert np.isfinite(image).all()
    assert image.min() >= 0
    assert image.max() <= 1


# ------------------------------------------------------------------------------------------------ against the reference
TEXT = {
    "characters": "Qg 7#",
    "font": 3,
    "scale": 1.5,
    "thickness": 2,
    "colour": [0.2, 0.7, 1.0],
    "place": [0.7, 0.2],
}
MIX = [[0.2, 0.0, 0.05], [0.1, 0.3, 0.0], [0.0, 0.02, 0.1]]
# Parameters that the specification allows, ends of ranges included.
CASES = {
    "blur": [
        {"kind": "anisotropic", "angle": 0.4, "l1": 12.0, "l2": 3.0},
        {"kind": "anisotropic", "angle": 2.2, "l1": 0.3, "l2": 4.7},
        {"kind": "anisotropic", "angle": 1.0, "l1": 0.2, "l2": 0.9},
        {"kind": "anisotropic", "angle": 3.0, "l1": 30.0, "l2": 29.0},
        {"kind": "isotropic", "size": 7, "sigma": 30.0},
        {"kind": "isotropic", "size": 25, "sigma": 2.0},
        {"kind": "isotropic", "size": 13, "sigma": 0.05},
        {"kind": "box", "side": 3},
        {"kind": "box", "side": 8},
        {"kind": "box", "side": 30},
    ],
    "motion_blur": [
        {"side": side, "angle": angle} for side in (3, 7, 13) for angle in (0.0, 20.0, 50.0, 89.0, 90.0, 110.0, 170.0)
    ],
    "sensor_noise": [
        {"kind": "speckle", "layers": "colour", "level": 0.05, "seed": 1},
        {"kind": "speckle", "layers": "grey", "level": 0.1, "seed": 2},
        {"kind": "speckle", "layers": "correlated", "mix": MIX, "seed": 3},
        {"kind": "salt_pepper", "density": 0.1, "seed": 4},
        {"kind": "salt_pepper", "density": 0.0, "seed": 5},
    ],
    "resize": [
        {"scale": scale, "method": method}
        for scale in (0.1, 0.37, 0.81, 1.0, 1.43)
        for method in ("nearest", "linear", "cubic", "area")
    ],
    "colour": [
        {"kind": "grey"},
        {"kind": "fade", "saturation": 0.1},
        {"kind": "fade", "saturation": 0.8},
        {"kind": "cast", "gains": [0.8, 1.2, 0.8]},
        {"kind": "cast", "gains": [1.4, 0.6, 1.0]},
    ],
    "gaussian_noise": [
        {"layers": "colour", "level": 0.39, "seed": 6},
        {"layers": "grey", "level": 0.2, "seed": 7},
        {"layers": "correlated", "mix": MIX, "seed": 8},
    ],
    "jpeg": [{"quality": quality} for quality in (10, 50, 95)],
    "chroma_subsampling": [{}],
    "banding": [{"levels": levels} for levels in (18, 25, 32)],
    "exposure": [
        {"brightness": 0.02, "contrast": 1.0},
        {"brightness": 2.5, "contrast": 0.1},
        {"brightness": 1.2, "contrast": 0.8},
        {"brightness": 1.0, "contrast": 1.5},
    ],
    "chromatic_aberration": [{"shift": shift} for shift in (1, 2, 4)],
    "moire": [
        {"frequency": 0.5, "angle": 0.0, "blend": 0.15},
        {"frequency": 3.0, "angle": 2.5, "blend": 0.15},
        {"frequency": 1.7, "angle": math.pi / 2, "blend": 0.06},
    ],
    "glitch": [
        {"bands": []},
        {"bands": [{"top": 0.4, "height": 8, "level": 0.63}]},
        {"bands": [{"top": 0.9, "height": 8, "roll": -30}]},
        {
            "bands": [
                {"top": 0.1, "height": 5, "roll": 7},
                {"top": 0.15, "height": 3, "level": 0.0},
                {"top": 0.15, "height": 7, "roll": 30},
            ]
        },
    ],
    "vignette": [{"amount": amount} for amount in (0.4, 0.55, 0.8)],
    "distractor": [
        {"kind": "text", "text": TEXT},
        {"kind": "text", "text": {**TEXT, "place": [0.4, 0.35], "scale": 6.0}},
        {
            "kind": "patch",
            "height": 20,
            "width": 100,
            "source": [0.3, 0.9],
            "place": [0.99, 0.0],
            "text": TEXT,
        },
    ],
}
# float32 against float64. More where kernels end at 4 sigma, YCrCb has OpenCV's three digits, a JPEG decoder is a grey
# level from another.
ROUNDING = {"blur": 1e-3, "chroma_subsampling": 2e-3, "jpeg": 1.01 / 255}


@pytest.mark.parametrize("shape", [(61, 47), (40, 64), (3, 53), (1, 1)])
@pytest.mark.parametrize("name", OPS)
def test_an_op_is_the_specifications_formula(name, shape):
    image, donor = picture(*shape, seed=3), picture(50, 70, 1)
    if name == "jpeg":  # no level between two, where float32 and float64 may part
        image = ops.to_float(ops.to_uint8(image))
    for params in CASES[name]:
        if name == "resize" and not comparable(shape, **params):
            continue
        fast = run_op(name, image, params, donor)
        exact = reference.apply_op(name, image, params, donor)
        off = np.abs(fast - exact)
        if name == "banding":  # float32 falls on the other side of half a band, rarely
            off[np.abs(off - 1 / (params["levels"] - 1)) < 1e-5] = 0
        assert off.max() <= ROUNDING.get(name, 2e-5), params


def comparable(shape, scale, method) -> bool:
    """Whether the resampling is free of ties, where OpenCV's rounding decides which pixel is meant."""
    if method != "area" or scale <= 1:
        return True
    return all(math.gcd(side, max(1, int(side * scale))) == 1 for side in shape)


def distances(config, count=40):
    """Mean absolute difference of `count` degraded pictures from their recipes' steps by the plain ops."""
    found = []
    for seed in range(count):
        image, donor = picture(48, 40, seed), picture(50, 70, 1)
        recipe = sample_recipe(config, np.random.default_rng(seed))
        exact = reference.apply_steps(image, recipe, donor)
        found.append(np.abs(apply_recipe(image, recipe, donor) - exact).mean())
    return found


def test_a_recipe_is_its_steps_one_after_the_other():
    """Whole recipes: the order, the steps' own clipping, the way back to the input size."""
    without = tuple(name for name in OPS if name != "jpeg")
    config = DegradationConfig(global_p=1.0, cycle_p=0.0, ops=without)
    assert max(distances(config)) < 0.1 / 255
    # A rounding can tip a JPEG coefficient, and a resize after JPEG keeps to 8 bits.
    assert np.mean(distances(DegradationConfig(global_p=1.0, cycle_p=1.0))) < 2 / 255


def test_a_donor_is_fetched_only_for_a_patch():
    image, other = picture(64, 64, 1), picture(64, 64, 2)
    config = DegradationConfig(global_p=1.0, op_p=0.5, distractor_p=0.5, text_p=0.5)
    fetched = []

    def donor():
        fetched.append(True)
        return other

    for seed in range(60):
        eager = degradation.degrade(image, config, np.random.default_rng(seed), other)
        lazy = degradation.degrade(image, config, np.random.default_rng(seed), donor)
        np.testing.assert_array_equal(eager, lazy)
    assert 1 <= len(fetched) <= 30  # an eighth of the recipes paste


@pytest.mark.parametrize("photons", [100.0, 700.0, 10_000.0])
@pytest.mark.parametrize("grey", [False, True])
def test_photon_noise_is_poisson(photons, grey):
    image = picture(90, 110)
    params = {"kind": "poisson", "photons": photons, "grey": grey, "seed": 5}
    fast = ops.sensor_noise(image, **params)
    exact = reference.apply_op("sensor_noise", image, params)
    off = np.abs(fast - exact) * photons  # in photons
    assert off.max() < 1.01
    assert (off > 0.5).mean() < 0.02


def test_few_photons_are_exact():
    expected = np.random.default_rng(0).uniform(0, ops.EXACT_PHOTONS, 50_000)
    expected = expected.astype(np.float32)
    counts = ops.photon_counts(expected, ops._source(9))
    exact = reference.photons_of(9, expected.astype(np.float64))
    assert (counts != exact).mean() < 1e-3  # float32 at the edges of steps
    assert np.abs(counts - exact).max() <= 1


@pytest.mark.parametrize("l1, l2", [(30, 30), (29.9, 0.01), (9, 2), (5.5, 5), (20, 1)])
@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 4, 1.9])
def test_the_anisotropic_blur_of_any_picture_is_within_a_grey_level(l1, l2, angle):
    """Half the L1 distance of the kernels bounds the error on every picture in [0, 1]."""
    impulse = np.zeros((123, 123, 3), np.float32)
    impulse[61, 61] = 1
    params = {"kind": "anisotropic", "angle": angle, "l1": l1, "l2": l2}
    fast = ops.blur(impulse, **params)
    exact = reference.apply_op("blur", impulse, params)
    assert np.abs(fast - exact)[..., 0].sum() / 2 < 1 / 255


def test_normal_field_is_normal():
    from scipy import stats

    field = ops.normal_field(ops._source(1), (200, 300, 3))
    assert field.dtype == np.float32
    assert stats.kstest(field.ravel(), "norm").pvalue > 0.01
    spectrum = np.abs(np.fft.rfft(field.ravel())) ** 2 / field.size
    assert stats.kstest(spectrum[1:-1], "expon").pvalue > 0.01  # white


def test_correlated_noise_is_what_numpy_draws_for_the_published_matrix():
    rng = np.random.default_rng(2)
    for level in (25 / 255, 0.6 * 100 / 255):
        first, second, diagonal = rng.random((3, 3)), rng.random((3, 3)), rng.random(3)
        published = reference.correlated_covariance(level, first, second, diagonal)
        mix = ops.correlated_mix(level, first, second, diagonal)
        field, scale = ops.noise_layer((500, 400), "correlated", 5, mix=mix.tolist())
        found = np.cov(scale * field.reshape(-1, 3).T)
        # It is neither symmetric nor positive: NumPy goes on from its singular values.
        drawn = np.random.RandomState(3).multivariate_normal(np.zeros(3), published, 200_000, check_valid="ignore")
        np.testing.assert_allclose(found, np.cov(drawn.T), atol=0.015 * level**2)


@pytest.mark.parametrize("angle", [0, 22.5, 45, 60, 89, 90, 91, 135, 179.9])
@pytest.mark.parametrize("side", [3, 7, 13])
def test_a_motion_kernel_is_a_line_at_every_angle(side, angle):
    kernel = ops.line_kernel(side, angle)
    rows, columns = np.nonzero(kernel)
    dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    across = (columns - side // 2) * dy - (rows - side // 2) * dx
    along = (columns - side // 2) * dx + (rows - side // 2) * dy
    assert np.abs(across).max() <= 0.51
    assert along.max() - along.min() >= side - 2
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_array_equal(kernel, kernel[::-1, ::-1])


def test_banding_grows_with_strength_and_always_happens():
    levels = [ops.draw_banding(s, np.random.default_rng(0))["levels"] for s in (0, 1)]
    assert levels == [32, 18]
    image = picture(40, 40)
    assert len(np.unique(ops.banding(image, 5))) == 5


def test_text_is_plain_ink():
    image = np.full((80, 120, 3), 0.5, np.float32)
    text = {
        "characters": "Az",
        "font": 4,
        "scale": 2.0,
        "thickness": 3,
        "colour": [0.1, 0.9, 0.3],
        "place": [0.5, 0.4],
    }
    written = ops.distractor(image, "text", text)
    colours = np.unique(written.reshape(-1, 3), axis=0)
    np.testing.assert_allclose(colours, [[0.1, 0.9, 0.3], [0.5] * 3], atol=1e-6)


def test_every_font_and_place_can_be_drawn():
    rng = np.random.default_rng(0)
    for font in range(ops.HERSHEY_FONTS):
        for scale in (0.0, 1e-3, 0.4, 8.0):
            for thickness in (1, 8):
                text = {**ops._draw_text(rng), "font": font, "scale": scale}
                text |= {"thickness": thickness, "characters": 'W~q"\\ '}
                for place in ([0.0, 0.0], [0.5, 0.9], [0.9, 0.2], [0.999, 0.999]):
                    text["place"] = place
                    image = picture(30, 30)
                    assert_picture(ops.distractor(image, "text", text), (30, 30, 3))


def test_a_patch_comes_from_the_donor_or_gives_way_to_text():
    config = single("distractor", text_p=0.0)
    recipe = sample_recipe(config, np.random.default_rng(0))
    assert recipe[0].params["kind"] == "patch"
    image = np.zeros((120, 120, 3), np.float32)
    donor = np.full((60, 300, 3), 255, np.uint8)
    pasted = apply_recipe(image, recipe, donor)
    rows, columns, _ = np.nonzero(pasted)
    size = recipe[0].params["height"], recipe[0].params["width"]
    found = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert found == (min(size[0], 60), size[1])
    assert pasted.max() == 1.0
    text = recipe[0].params["text"]
    as_text = apply_recipe(image, (Op("distractor", {"kind": "text", "text": text}),))
    np.testing.assert_array_equal(apply_recipe(image, recipe), as_text)


@pytest.mark.parametrize("name", ["blur", "motion_blur", "chromatic_aberration"])
def test_no_kernel_moves_the_picture(name):
    """Masks stay valid: the centroid of a blob stays within the half pixel of an even box."""
    image = np.zeros((121, 121, 3), np.float32)
    image[55:66, 55:66] = 1
    y, x = np.mgrid[:121, :121]
    rng = np.random.default_rng(0)
    for _ in range(30):
        out = run_op(name, image, ops.DRAW[name](rng.random(), rng)).mean(axis=2)
        centre = (out * y).sum() / out.sum(), (out * x).sum() / out.sum()
        assert np.abs(np.array(centre) - 60).max() < 0.51


# ------------------------------------------------------------------------------------------------ properties of ops
@pytest.mark.parametrize("name", OPS)
@quick
@given(strength=strengths, height=sides, width=sides, seed=seeds)
def test_an_op_keeps_the_contract(name, strength, height, width, seed):
    image = picture(height, width, seed)
    before = image.copy()
    params = ops.DRAW[name](strength, np.random.default_rng(seed))
    assert json.loads(json.dumps(params)) == params
    first = run_op(name, image, params, image[:, ::-1])
    second = run_op(name, image, params, image[:, ::-1])
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(first, second)
    assert not np.shares_memory(first, image)
    if name == "resize":
        grown = [max(1, int(side * params["scale"])) for side in (height, width)]
        assert_picture(first, (*grown, 3))
    else:
        assert_picture(first, image.shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 1024), (1024, 1), (1024, 1024)])
@pytest.mark.parametrize("name", OPS)
def test_an_op_takes_extreme_sizes(name, shape):
    image = picture(*shape)
    rng = np.random.default_rng(1)
    for _ in range(1 if shape == (1024, 1024) else 6):
        degraded = degrade(image, single(name, strength=1.0), rng, image)
        assert_picture(degraded, image.shape)


def damage(name, strength, trials=24):
    """Mean absolute change of a picture over random draws of one op."""
    image = picture(96, 96)
    rng = np.random.default_rng(3)
    config = single(name, strength=strength)
    return np.mean([np.abs(degrade(image, config, rng, image) - image).mean() for _ in range(trials)])


@pytest.mark.parametrize("name", sorted(set(OPS) - {"jpeg", "chroma_subsampling", "distractor"}))
def test_more_strength_does_more_damage(name):
    assert damage(name, 0.15) < damage(name, 0.55) < damage(name, 1.0)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("blur", "anisotropic"),
        ("blur", "isotropic"),
        ("sensor_noise", "speckle"),
        ("sensor_noise", "salt_pepper"),
        ("gaussian_noise", None),
        ("moire", None),
        ("glitch", None),
    ],
)
def test_strength_zero_changes_nothing(name, kind):
    image = picture(50, 60)
    rng = np.random.default_rng(0)
    seen = 0
    while seen < 10:
        params = ops.DRAW[name](0.0, rng)
        if kind in (None, params.get("kind")):
            np.testing.assert_allclose(run_op(name, image, params), image, atol=1e-6)
            seen += 1


def test_strength_zero_nearly_changes_nothing():
    image = picture(50, 60)
    rng = np.random.default_rng(0)
    banded = ops.banding(image, **ops.draw_banding(0.0, rng))
    assert np.abs(banded - image).max() <= 0.5 / 31 + 1e-6
    scales = [ops.draw_resize(0.0, rng)["scale"] for _ in range(200)]
    assert np.mean(np.array(scales) == 1.0) > 0.7
    gains = [p["gains"] for p in (ops.draw_colour(0.0, rng) for _ in range(200)) if "gains" in p]
    assert all(g in ([1.0] * 3, [0.8, 1.2, 0.8]) for g in gains)


# ------------------------------------------------------------------------------------------------ recipes
@quick
@given(height=sides, width=sides, seed=seeds, op_p=st.floats(0, 1))
def test_a_recipe_keeps_the_contract_and_replays(height, width, seed, op_p):
    image = picture(height, width, seed)
    before, donor = image.copy(), picture(33, 44, 2)
    config = DegradationConfig(global_p=1.0, op_p=op_p, cycle_p=op_p)
    recipe = sample_recipe(config, np.random.default_rng(seed))
    assert recipe == sample_recipe(config, np.random.default_rng(seed))
    degraded = apply_recipe(image, recipe, donor)
    assert_picture(degraded, image.shape)
    np.testing.assert_array_equal(image, before)
    assert not np.shares_memory(degraded, image)
    replayed = apply_recipe(image, recipe_from_json(recipe_to_json(recipe)), donor)
    np.testing.assert_array_equal(degraded, replayed)


@pytest.mark.slow
def test_twenty_thousand_random_recipes():
    rng = np.random.default_rng(0)
    for trial in range(20_000):
        height, width = np.exp(rng.uniform(0, math.log(200), 2)).astype(int)
        image = picture(height, width, trial)
        donor = None if trial % 3 else picture(40, 30, trial)
        config = DegradationConfig(global_p=1.0, op_p=rng.random(), cycle_p=rng.random(), distractor_p=1.0)
        recipe = sample_recipe(config, rng)
        try:
            assert_picture(apply_recipe(image, recipe, donor), image.shape)
        except Exception as error:
            raise AssertionError(f"{image.shape}: {recipe_to_json(recipe)}") from error


def test_uint8_in_uint8_out():
    image = (picture(60, 40) * 255).astype(np.uint8)
    before = image.copy()
    rng = np.random.default_rng(0)
    for _ in range(30):
        degraded = degrade(image, ALWAYS, rng, image)
        assert degraded.shape == image.shape
        assert degraded.dtype == np.uint8
        assert not np.shares_memory(degraded, image)
    np.testing.assert_array_equal(image, before)


def test_uint8_and_float_pictures_degrade_alike():
    image = (picture(60, 40) * 255).astype(np.uint8)
    smooth = ("blur", "moire", "vignette", "resize")  # JPEG amplifies a rounding
    config = DegradationConfig(global_p=1.0, cycle_p=0.0, op_p=0.6, ops=smooth)
    for seed in range(40):
        whole = degrade(image, config, np.random.default_rng(seed))
        real = degrade(ops.to_float(image), config, np.random.default_rng(seed))
        assert np.abs(whole / 255 - real).max() < 3 / 255


def test_every_level_survives_the_crossing():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(ops.to_uint8(ops.to_float(levels)), levels)
    assert ops.to_uint8(np.full((1, 1, 3), 0.999, np.float32)).max() == 255


def test_a_clean_picture_is_an_equal_copy():
    config = DegradationConfig(global_p=0.0)
    assert sample_recipe(config, np.random.default_rng(0)) == ()
    image = picture(20, 30)
    clean = degrade(image, config, np.random.default_rng(0))
    np.testing.assert_array_equal(clean, image)
    assert not np.shares_memory(clean, image)


def test_non_contiguous_pictures_are_taken():
    image = picture(40, 50)[:, ::-1]
    recipe = sample_recipe(ALWAYS, np.random.default_rng(4))
    np.testing.assert_array_equal(apply_recipe(image, recipe), apply_recipe(image.copy(), recipe))


def test_the_working_picture_is_bounded():
    rng = np.random.default_rng(0)
    config = DegradationConfig(global_p=1.0, cycle_p=1.0, op_p=1.0, ops=("resize",) * 6, growth=1.5)
    largest = 0
    for _ in range(300):
        work = np.zeros((40, 60, 3), np.float32)
        for op in sample_recipe(config, rng):
            work = degradation.apply_op(work, op, (40, 60))
            largest = max(largest, work.shape[1])
        assert work.shape == (40, 60, 3)
    assert 85 <= largest <= 90


def test_a_sweep_fixes_every_strength():
    config = DegradationConfig(global_p=1.0, op_p=1.0, cycle_p=0.0, strength=0.5)
    for seed in range(20):
        recipe = {op.name: op.params for op in sample_recipe(config, np.random.default_rng(seed))}
        assert recipe["motion_blur"]["side"] == 7
        assert recipe["banding"]["levels"] == 25
        assert recipe["chromatic_aberration"]["shift"] == 2
        assert recipe["vignette"]["amount"] == pytest.approx(0.6)
        assert len(recipe["glitch"]["bands"]) == 5


def test_only_the_named_ops_are_drawn():
    config = DegradationConfig(global_p=1.0, op_p=1.0, cycle_p=0.0, ops=("jpeg",), jpeg_quality=(40, 40))
    recipe = sample_recipe(config, np.random.default_rng(0))
    assert recipe[:-1] == (Op("jpeg", {"quality": 40}),)


def test_json_is_refused_with_a_reason():
    for text in ("{", '{"a": 1}', '[["jpeg"]]', '[["jpeg", 3]]', '[["sharpen", {}]]'):
        with pytest.raises(ValueError, match="recipe"):
            recipe_from_json(text)


def test_wrong_pictures_are_refused():
    for wrong in (float, np.float16, np.int32):
        with pytest.raises(TypeError, match=np.dtype(wrong).name):
            apply_recipe(np.zeros((4, 4, 3), wrong), ())
    with pytest.raises(TypeError, match="uint16"):
        degrade(np.zeros((4, 4, 3), np.uint16), ALWAYS, np.random.default_rng(0))
    for shape in ((4, 4), (4, 4, 1), (0, 4, 3), (4, 4, 4)):
        with pytest.raises(ValueError, match="RGB"):
            apply_recipe(np.zeros(shape, np.float32), ())
    image = np.zeros((8, 8, 3), np.float32)
    with pytest.raises(ValueError, match="sharpen"):
        apply_recipe(image, (Op("sharpen", {}),))
    with pytest.raises(ValueError, match="restore"):
        apply_recipe(image, (Op("resize", {"scale": 0.5, "method": "area"}),))


def test_opencv_is_brought_to_one_thread():
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        assert cv2.getNumThreads() == 2
        degradation.use_one_opencv_thread()
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)


# ------------------------------------------------------------------------------------------------ what is drawn
def many(count=4000, **changes):
    config = DegradationConfig(**{"global_p": 1.0, **changes})
    rng = np.random.default_rng(8)
    return [sample_recipe(config, rng) for _ in range(count)]


def near(found: float, expected: float, count: int) -> bool:
    """Within four standard deviations of a share."""
    return abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_ops_fire_at_their_rates():
    recipes = many(cycle_p=0.0)
    fired = Counter(op.name for recipe in recipes for op in recipe)
    for name in OPS:
        rate = 0.3 * 0.15 if name == "distractor" else 0.3
        assert near(fired[name] / len(recipes), rate, len(recipes)), name
    clean = sum(recipe == () for recipe in many(global_p=0.5))
    assert near(clean / len(recipes), 0.5 + 0.5 * 0.7 * 0.7**14 * 0.955, len(recipes))


def test_ops_come_in_any_order():
    recipes = many(cycle_p=0.0, op_p=1.0, count=2000)
    first = Counter(recipe[0].name for recipe in recipes)
    for name in OPS[:14]:
        assert 0.04 < first[name] / len(recipes) < 0.1
    assert all(recipe[-1].name == degradation.RESTORE for recipe in recipes)


def test_cycles_alternate():
    recipes = many(op_p=0.0)
    cycled = [[op.name for op in recipe[:-1]] for recipe in recipes if recipe]
    assert near(len(cycled) / len(recipes), 0.3, len(recipes))
    lengths = Counter(len(names) for names in cycled)
    assert sorted(lengths) == [2, 4, 6, 8, 10]
    assert min(lengths.values()) > 0.15 * len(cycled)
    for names in cycled:
        assert set(names[::2]) | set(names[1::2]) == {"jpeg", "resize"}
        assert len(set(names[::2])) == len(set(names[1::2])) == 1
    assert near(np.mean([n[0] == "jpeg" for n in cycled]), 0.5, len(cycled))


# ------------------------------------------------------------------------------------------------ entries
def test_the_grid_is_drawn_and_its_recipes_replayed(tmp_path, capsys):
    source, out, log = (tmp_path / name for name in ("in.jpg", "a.png", "a.jsonl"))
    cv2.imwrite(str(source), (picture(90, 120) * 255).astype(np.uint8))
    command = ["--image", str(source), "--out", str(out), "--side", "64"]
    assert degradation.main([*command, "--log", str(log)]) == 0
    grid = cv2.imread(str(out))
    assert grid.shape[0] > (len(OPS) + 3) * 64
    assert str(out) in capsys.readouterr().out
    recipes = [recipe_from_json(line) for line in log.read_text().splitlines()]
    assert len(recipes) == 12
    replay = tmp_path / "b.png"
    command[3] = str(replay)
    assert degradation.main([*command, "--recipe", str(log)]) == 0
    again = cv2.imread(str(replay))
    bottom = grid[-again.shape[0] - 4 : -4, : again.shape[1]]
    np.testing.assert_array_equal(again, bottom)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no recipe"),
        ("[[", "not a recipe"),
        ('[["sharpen", {}]]', "sharpen"),
        ('[["jpeg", {"quality": "high"}]]', "cannot be applied"),
        ('[["moire", {}]]', "frequency"),
        ('[["resize", {"scale": 0.5, "method": "area"}]]', "restore"),
        (None, "No such file"),
    ],
)
def test_a_wrong_recipe_is_refused_in_a_line(tmp_path, capsys, text, reason):
    source, recipe = tmp_path / "in.png", tmp_path / "recipe.json"
    cv2.imwrite(str(source), (picture(70, 70) * 255).astype(np.uint8))
    if text is not None:
        recipe.write_text(text)
    command = ["--image", str(source), "--out", str(tmp_path / "out.png")]
    with pytest.raises(SystemExit) as stop:
        degradation.main([*command, "--recipe", str(recipe)])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_wrong_paths_are_refused(tmp_path):
    source = tmp_path / "in.png"
    cv2.imwrite(str(source), (picture(70, 70) * 255).astype(np.uint8))
    command = ["--image", str(source), "--out", str(tmp_path / "out.png")]
    for wrong in (
        ["--out", str(tmp_path)],
        ["--out", str(tmp_path / "none" / "out.png")],
        ["--image", str(tmp_path / "none.jpg")],
        ["--log", str(tmp_path)],
    ):
        with pytest.raises(SystemExit) as stop:
            degradation.main(command + wrong)
        assert stop.value.code == 2


def test_the_benchmark_reports(capsys):
    command = ["degrade", "--side", "48", "--count", "30"]
    assert benchmark.main(command) == 0
    report = capsys.readouterr().out
    for word in ("pictures/s", "p50", "p95", "p99", "max", "jpeg", "share"):
        assert word in report
