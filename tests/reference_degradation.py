"""The compound degradation engine again: plain, slow, obviously right; what the tests measure the fast one against.

Everything is float64 and follows the table of the paper's engine op by op: direct convolutions, per-pixel formulas,
matrices that resample. `apply_op` takes the parameters of the fast engine's ops; `reference_degrade` draws its own, with
its own code. A `seed` is either the integer of a recipe (16-bit words of a SFC64 stream, mapped through the normal's
quantile function) or a numpy Generator, whose own `standard_normal` and `poisson` are then used.
"""

from __future__ import annotations

import io
import math

import cv2
import numpy as np
from PIL import Image
from scipy import linalg, ndimage, stats

LUMA = np.array([0.299, 0.587, 0.114])


# ------------------------------------------------------------------------------------------------ helpers
def words(seed: int, count: int) -> np.ndarray:
    stream = np.random.Generator(np.random.SFC64(seed))
    drawn = stream.integers(0, 2**64, (count + 3) // 4, dtype=np.uint64)
    return drawn.view(np.uint16)[:count]


def uniform_field(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return (words(seed, math.prod(shape)).reshape(shape) + 0.5) / 65536


def normal_field(seed, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(seed, np.random.Generator):
        return seed.standard_normal(shape)
    return stats.norm.ppf(uniform_field(seed, shape))


def poisson_field(seed, expected: np.ndarray) -> np.ndarray:
    if isinstance(seed, np.random.Generator):
        return seed.poisson(expected).astype(np.float64)
    return stats.poisson.ppf(uniform_field(seed, expected.shape), expected)


def filtered(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Direct correlation, mirror border (the edge pixel not repeated)."""
    return ndimage.correlate(image, kernel[:, :, None], mode="mirror")


def resample_matrix(size: int, new: int, method: str) -> np.ndarray:
    """(new, size): each new pixel's weights over the old ones."""
    matrix = np.zeros((new, size))
    ratio = size / new
    for i in range(new):
        if method == "nearest":
            matrix[i, min(int(i * (1 / (new / size))), size - 1)] = 1
        elif method == "area":  # the share of the new pixel that each old one covers
            for j in range(size):
                covered = min((i + 1) * ratio, j + 1) - max(i * ratio, j)
                matrix[i, j] = max(0.0, covered) / ratio
        else:
            centre = (i + 0.5) * ratio - 0.5
            first = math.floor(centre)
            for j in range(first - 1, first + 3):
                weight = (linear if method == "linear" else cubic)(centre - j)
                matrix[i, min(max(j, 0), size - 1)] += weight
    return matrix


def linear(x: float) -> float:
    return max(0.0, 1 - abs(x))


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' kernel with OpenCV's constant."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized(image: np.ndarray, shape: tuple[int, int], method: str) -> np.ndarray:
    if image.shape[:2] == tuple(shape):
        return image
    rows = resample_matrix(image.shape[0], shape[0], method)
    columns = resample_matrix(image.shape[1], shape[1], method)
    return np.einsum("ij,jkc,lk->ilc", rows, image, columns, optimize=True)


def to_grey(image: np.ndarray) -> np.ndarray:
    return image @ LUMA


# ------------------------------------------------------------------------------------------------ the ops
def blur(image, kind, **p):
    if kind == "box":
        return filtered(image, np.full((p["side"], p["side"]), 1 / p["side"] ** 2))
    if kind == "isotropic":
        radius, precision = p["size"] // 2, np.eye(2) / max(p["sigma"], 1e-9) ** 2
    else:
        radius = int(max(p["l1"], p["l2"]))
        cos, sin = math.cos(p["angle"]), math.sin(p["angle"])
        turn = np.array([[cos, -sin], [sin, cos]])
        variances = np.maximum([p["l1"], p["l2"]], 1e-6)
        precision = turn @ np.diag(1 / variances) @ turn.T
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            at = np.array([x, y])
            kernel[y + radius, x + radius] = math.exp(-0.5 * at @ precision @ at)
    return filtered(image, kernel / kernel.sum())


def motion_blur(image, side, angle):
    """A line of pixels through the centre, one for each step along its steeper axis."""
    kernel = np.zeros((side, side))
    dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    reach = round(side // 2 * max(abs(dx), abs(dy)))
    for step in range(-reach, reach + 1):
        x, y = (step * v / max(abs(dx), abs(dy)) for v in (dx, dy))
        kernel[side // 2 + round(y), side // 2 + round(x)] = 1
    return filtered(image, kernel / kernel.sum())


def layer(shape, layers, seed, level=0.0, mix=None):
    if layers == "grey":
        return level * np.repeat(normal_field(seed, shape)[:, :, None], 3, axis=2)
    field = normal_field(seed, (*shape, 3))
    if layers == "colour":
        return level * field
    return field @ np.array(mix).T


def sensor_noise(image, kind, **p):
    shape = image.shape[:2]
    if kind == "speckle":
        return image + image * layer(shape, **p)
    if kind == "poisson":
        if not p["grey"]:
            return poisson_field(p["seed"], image * p["photons"]) / p["photons"]
        grey = to_grey(image)
        error = poisson_field(p["seed"], grey * p["photons"]) / p["photons"] - grey
        return image + error[:, :, None]
    if isinstance(p["seed"], np.random.Generator):
        draw = p["seed"].random(shape)
    else:
        draw = uniform_field(p["seed"], shape)
    noisy = image.copy()
    noisy[draw < p["density"] / 2] = 0
    noisy[draw > 1 - p["density"] / 2] = 1
    return noisy


def resize(image, scale, method):
    height, width = (max(1, int(side * scale)) for side in image.shape[:2])
    return resized(image, (height, width), method)


def colour(image, kind, saturation=None, gains=None):
    grey = to_grey(image)[:, :, None]
    if kind == "grey":
        return np.repeat(grey, 3, axis=2)
    if kind == "fade":
        return grey + saturation * (image - grey)
    return image * np.array(gains)


def gaussian_noise(image, **p):
    return image + layer(image.shape[:2], **p)


def jpeg(image, quality):
    stored = io.BytesIO()
    pixels = np.rint(image * 255).astype(np.uint8)
    Image.fromarray(pixels).save(stored, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(stored)) / 255.0


def chroma_subsampling(image):
    grey = to_grey(image)
    red, blue = 0.713 * (image[..., 0] - grey), 0.564 * (image[..., 2] - grey)
    chroma = np.stack([red, blue], axis=2)
    half = [max(1, side // 2) for side in grey.shape]
    chroma = resized(resized(chroma, half, "area"), grey.shape, "nearest")
    red, blue = chroma[..., 0], chroma[..., 1]
    green = grey - 0.714 * red - 0.344 * blue
    return np.stack([grey + 1.403 * red, green, grey + 1.773 * blue], axis=2)


def banding(image, levels):
    return np.rint(image * (levels - 1)) / (levels - 1)


def exposure(image, brightness, contrast):
    image = np.clip(image * brightness, 0, 1)
    mean = to_grey(image).mean()
    return mean + contrast * (image - mean)


def chromatic_aberration(image, shift):
    moved = image.copy()
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            if y >= shift and x >= shift:
                moved[y, x, 0] = image[y - shift, x - shift, 0]
            if y + shift < height and x + shift < width:
                moved[y, x, 2] = image[y + shift, x + shift, 2]
    return moved


def moire(image, frequency, angle, blend):
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float64)
    wave = np.sin(frequency * (x * math.cos(angle) + y * math.sin(angle)))
    return (1 - blend) * image + blend * ((wave + 1) / 2)[:, :, None]


def glitch(image, bands):
    broken = image.copy()
    for band in bands:
        top = int(band["top"] * len(image))
        for row in range(top, min(top + band["height"], len(image))):
            if "level" in band:
                broken[row] = band["level"]
            else:
                broken[row] = np.roll(broken[row], band["roll"], axis=0)
    return broken


def vignette(image, amount):
    height, width = image.shape[:2]
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    radius = np.hypot(x, y) / np.hypot(1, 1)
    return image * (1 - amount * radius)[:, :, None]


def distractor(image, kind, text, donor=None, **p):
    changed = image.copy()
    height, width = image.shape[:2]
    if kind == "patch" and donor is not None:
        donor = donor / 255.0 if donor.dtype == np.uint8 else donor
        rows = min(p["height"], height, donor.shape[0])
        columns = min(p["width"], width, donor.shape[1])
        x0 = int(p["source"][0] * (donor.shape[1] - columns + 1))
        y0 = int(p["source"][1] * (donor.shape[0] - rows + 1))
        x1 = int(p["place"][0] * (width - columns + 1))
        y1 = int(p["place"][1] * (height - rows + 1))
        patch = donor[y0 : y0 + rows, x0 : x0 + columns]
        changed[y1 : y1 + rows, x1 : x1 + columns] = patch
        return changed
    ink = np.zeros((height, width), np.uint8)
    u, v = text["place"]
    place = (int(u * (width + 100)) - 100, int(v * (height + 100)))
    style = (text["font"], text["scale"], 255, text["thickness"])
    cv2.putText(ink, text["characters"], place, *style)
    changed[ink > 0] = text["colour"]
    return changed


OPS = (
    blur,
    motion_blur,
    sensor_noise,
    resize,
    colour,
    gaussian_noise,
    jpeg,
    chroma_subsampling,
    banding,
    exposure,
    chromatic_aberration,
    moire,
    glitch,
    vignette,
    distractor,
)
BY_NAME = {op.__name__: op for op in OPS}


def apply_op(name: str, image: np.ndarray, params: dict, donor=None) -> np.ndarray:
    """float64 HWC in [0, 1] of the op's exact result."""
    extra = {"donor": donor} if name == "distractor" else {}
    changed = BY_NAME[name](image.astype(np.float64), **params, **extra)
    return np.clip(changed, 0, 1)


# ------------------------------------------------------------------------------------------------ drawing
def draw_layer(level, upper, colour_share, grey_share, rng):
    kind = rng.choice(
        ["colour", "grey", "correlated"],
        p=[colour_share, grey_share, 1 - colour_share - grey_share],
    )
    if kind != "correlated":
        return {"layers": kind, "level": level, "seed": rng}
    first, second = linalg.orth(rng.random((3, 3))), linalg.orth(rng.random((3, 3)))
    covariance = np.abs(upper**2 * first.T @ np.diag(rng.random(3)) @ second)
    # Any factor F with F F' = (C' C)**.5 gives noise of the distribution that NumPy draws for C.
    spread = linalg.sqrtm(covariance.T @ covariance).real
    values, vectors = np.linalg.eigh((spread + spread.T) / 2)
    mix = vectors @ np.diag(np.sqrt(np.maximum(values, 0)))
    return {"layers": "correlated", "mix": mix, "seed": rng}


def draw(name: str, s: float, rng: np.random.Generator) -> dict:
    """The parameters of the op `name` at strength `s`, straight from the table."""
    u = rng.uniform
    if name == "blur":
        kind = rng.choice(["anisotropic", "isotropic", "box"])
        if kind == "anisotropic":
            l1, l2 = u(0, 30 * s), u(0, 30 * s)
            return {"kind": kind, "angle": u(0, math.pi), "l1": l1, "l2": l2}
        if kind == "isotropic":
            size = rng.choice(np.arange(7, 26, 2))
            return {"kind": kind, "size": size, "sigma": u(0, 30 * s)}
        return {"kind": kind, "side": rng.integers(3, max(3, int(30 * s)) + 1)}
    if name == "motion_blur":
        side = int(max(3, 12 * s))
        return {"side": side if side % 2 else side + 1, "angle": u(0, 180)}
    if name == "sensor_noise":
        kind = rng.choice(["speckle", "poisson", "salt_pepper"])
        if kind == "speckle":
            level = rng.integers(2, 26) * s / 255
            return {"kind": kind, **draw_layer(level, 25 * s / 255, 0.4, 0.4, rng)}
        if kind == "poisson":
            photons, grey = 10 ** u(2, 4), rng.random() < 0.5
            return {"kind": kind, "photons": photons, "grey": grey, "seed": rng}
        return {"kind": kind, "density": 0.1 * s, "seed": rng}
    if name == "resize":
        kind = rng.choice(["shrink", "grow", "none"], p=[0.7, 0.2, 0.1])
        smooth = rng.choice(["linear", "cubic", "area"])
        if kind == "shrink":
            low = 0.25 / s if s > 0 else 1.0
            scale = np.clip(u(min(low, 1), max(low, 1)), 0.1, 1)
            return {
                "scale": scale,
                "method": "nearest" if rng.random() < 0.5 else smooth,
            }
        return {"scale": u(1, 2) if kind == "grow" else 1.0, "method": smooth}
    if name == "colour":
        if rng.random() < 0.2:
            return {"kind": "grey"}
        if rng.random() < 0.3:
            return {"kind": "fade", "saturation": u(0.1, max(0.2, 1 - s))}
        if rng.random() < 1 / 5:
            return {"kind": "cast", "gains": (0.8, 1.2, 0.8)}
        return {"kind": "cast", "gains": u(1 - 0.4 * s, 1 + 0.4 * s, 3)}
    if name == "gaussian_noise":
        level = u(60, 100) if rng.random() < 0.8 else u(2, 100)
        return draw_layer(level * s / 255, 100 * s / 255, 0.7, 0.2, rng)
    if name == "jpeg":
        return {"quality": int(rng.integers(10, 96))}
    if name == "chroma_subsampling":
        return {}
    if name == "banding":
        return {"levels": int(max(4, 32 - 14 * s))}
    if name == "exposure":
        kind = rng.choice(["darken", "haze", "mild"], p=[0.45, 0.45, 0.1])
        if kind == "darken":
            return {"brightness": u(max(0.02, 1 - 0.98 * s), 1), "contrast": 1}
        if kind == "haze":
            low = max(0.1, 1 - 0.9 * s)
            contrast = u(min(low, 0.8), max(low, 0.8))
            return {"brightness": u(1, 1 + 1.5 * s), "contrast": contrast}
        gain = u(max(0.5, 1 - 0.5 * s), 1 + 0.5 * s)
        if rng.random() < 0.5:
            return {"brightness": gain, "contrast": 1}
        return {"brightness": 1, "contrast": gain}
    if name == "chromatic_aberration":
        return {"shift": int(max(1, 4 * s))}
    if name == "moire":
        angle = u(0, math.pi)
        return {"frequency": u(0.5, 3), "angle": angle, "blend": 0.15 * s}
    if name == "glitch":
        bands = []
        for _ in range(int(10 * s)):
            height = rng.integers(1, max(1, int(8 * s)) + 1)
            band = {"top": rng.random(), "height": height}
            if rng.random() < 0.4:
                band["level"] = rng.choice([0, 1, u(0.2, 0.8)])
            else:
                band["roll"] = rng.integers(-int(30 * s), int(30 * s) + 1)
            bands.append(band)
        return {"bands": bands}
    if name == "vignette":
        return {"amount": 0.4 + 0.4 * s}
    text = {
        "characters": "".join(
            chr(code) for code in rng.integers(32, 127, rng.integers(0, 11))
        ),
        "font": int(rng.integers(0, 8)),
        "scale": u(0, 8),
        "thickness": int(rng.integers(1, 9)),
        "colour": rng.random(3),
        "place": rng.random(2),
    }
    if rng.random() < 0.9:
        return {"kind": "text", "text": text}
    height, width = rng.integers(20, 101, 2)
    places = {"source": rng.random(2), "place": rng.random(2)}
    return {"kind": "patch", "height": height, "width": width, "text": text, **places}


def reference_degrade(
    image: np.ndarray,
    rng: np.random.Generator,
    donor: np.ndarray | None = None,
    op_p: float = 0.3,
    cycle_p: float = 0.3,
    ops: tuple[str, ...] = tuple(BY_NAME),
    strength: float | None = None,
    growth: float = 2.0,
) -> np.ndarray:
    """float64 HWC in [0, 1]: one degraded picture, drawn and made the plain way (global_p = 1)."""

    def next_strength() -> float:
        return rng.beta(1.2, 1.2) if strength is None else strength

    steps = []
    if rng.random() < cycle_p:
        s = next_strength()
        first, second = ("jpeg", "resize") if rng.random() < 0.5 else ("resize", "jpeg")
        for _ in range(rng.integers(1, 6)):
            steps += [(first, s), (second, s)]
    for name in rng.permutation(ops):
        if rng.random() < op_p and (name != "distractor" or rng.random() < 0.15):
            steps.append((name, next_strength()))
    work = image.astype(np.float64)
    for name, s in steps:
        params = draw(name, s, rng)
        if name == "resize":
            room = growth * max(image.shape[:2]) / max(work.shape[:2])
            params["scale"] = min(params["scale"], room)
        work = apply_op(name, work, params, donor)
    method = rng.choice(["linear", "cubic", "area"])
    return np.clip(resized(work, image.shape[:2], method), 0, 1)
