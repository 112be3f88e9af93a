"""The specification's ops again, read from its table alone: plain, slow, float64. What the tests hold the engine to.

Each function stands under its row of the table and takes the parameters of a recipe. Nothing here draws: the ranges
stand, as numbers of the table, in `test_degradation_distribution.py`. Pictures are (H, W, 3) in [0, 1].

A recipe's noise seed means: 16-bit words of an SFC64 stream, in reading order, w -> u = (w + 0.5) / 65536, and every
random value is the u-quantile of its law.
"""

import io
import math

import cv2
import numpy as np
from PIL import Image
from scipy import linalg, stats


# ------------------------------------------------------------------------------------------------ helpers
def uniforms(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    stream, count = np.random.Generator(np.random.SFC64(seed)), math.prod(shape)
    drawn = stream.integers(0, 2**64, (count + 3) // 4, dtype=np.uint64)
    return (drawn.view(np.uint16)[:count].reshape(shape) + 0.5) / 65536


def normals(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return stats.norm.ppf(uniforms(seed, shape))


def photons_of(seed: int, expected: np.ndarray) -> np.ndarray:
    return stats.poisson.ppf(uniforms(seed, expected.shape), expected)


def luma(image: np.ndarray) -> np.ndarray:
    """ITU-R BT.601, (H, W, 1)."""
    red, green, blue = np.split(image, 3, axis=2)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def filtered(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Sum over the kernel (rows, columns) about its middle, "mirror border": the edge pixel is not repeated."""
    height, width = image.shape[:2]
    up, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    down, right = kernel.shape[0] - 1 - up, kernel.shape[1] - 1 - left
    padded = np.pad(image, ((up, down), (left, right), (0, 0)), mode="reflect")
    total = np.zeros_like(image)
    for row, column in zip(*np.nonzero(kernel)):
        part = padded[row : row + height, column : column + width]
        total += kernel[row, column] * part
    return total


def resampled(image: np.ndarray, size: int, method: str) -> np.ndarray:
    """The first axis brought to `size`; pixel i covers [i, i + 1), as in OpenCV."""
    old = len(image)
    ratio, rows = old / size, []
    for i in range(size):
        weights = np.zeros(old)
        if method == "nearest":
            weights[min(int(i * ratio), old - 1)] = 1
        elif method == "area":
            for j in range(old):
                weights[j] = max(0, min((i + 1) * ratio, j + 1) - max(i * ratio, j))
        else:
            centre = (i + 0.5) * ratio - 0.5
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                edge = min(max(j, 0), old - 1)
                weights[edge] += {"linear": tent, "cubic": keys}[method](j - centre)
        rows.append(weights / weights.sum())
    return np.tensordot(np.array(rows), image, 1)


def tent(x: float) -> float:
    return max(0.0, 1 - abs(x))


def keys(x: float, a: float = -0.75) -> float:
    """Keys' cubic with OpenCV's constant."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resized(image: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    tall = resampled(image, height, method)
    return resampled(tall.swapaxes(0, 1), width, method).swapaxes(0, 1)


# ------------------------------------------------------------------------------------------------ the table
# 0 blur: "anisotropic Gaussian, angle, **variances** l1, l2, kernel 2*int(max(l1,l2))+1; isotropic Gaussian, kernel
# [size], sigma; box, side. Mirror border"
def blur(image, kind, **p):
    if kind == "box":
        return filtered(image, np.ones((p["side"], p["side"])) / p["side"] ** 2)
    if kind == "isotropic":
        radius, covariance = p["size"] // 2, p["sigma"] ** 2 * np.eye(2)
    else:
        radius = int(max(p["l1"], p["l2"]))
        along = np.array([math.cos(p["angle"]), math.sin(p["angle"])])
        across = np.array([-along[1], along[0]])
        covariance = p["l1"] * np.outer(along, along) + p["l2"] * np.outer(across, across)
    precision = np.linalg.inv(covariance + 1e-6 * np.eye(2))
    at = np.stack(np.meshgrid(*[np.arange(-radius, radius + 1)] * 2), axis=-1)
    kernel = np.exp(-0.5 * np.einsum("yxi,ij,yxj->yx", at, precision, at))
    return filtered(image, kernel / kernel.sum())


# 1 motion blur: "line kernel, side [odd], angle" in degrees; "use a real line rasteriser"
def motion_blur(image, side, angle):
    kernel, radius, turn = np.zeros((side, side)), side // 2, math.radians(angle)
    end_x, end_y = radius * math.cos(turn), radius * math.sin(turn)
    if abs(end_x) >= abs(end_y):
        reach, slope = round(abs(end_x)), end_y / end_x
        points = [(x, round(x * slope)) for x in range(-reach, reach + 1)]
    else:
        reach, slope = round(abs(end_y)), end_x / end_y
        points = [(round(y * slope), y) for y in range(-reach, reach + 1)]
    for x, y in points:
        kernel[radius + y, radius + x] = 1 / len(points)
    return filtered(image, kernel)


# 2 and 5: noise at a level: "colour, grey, channel-correlated"
def layer(shape, layers, seed, level=None, mix=None):
    if layers == "grey":
        return level * normals(seed, (*shape, 1))
    noise = normals(seed, (*shape, 3))
    if layers == "colour":
        return level * noise
    return np.einsum("ij,yxj->yxi", np.array(mix), noise)


# "covariance |L^2 O^T D O'|, O and O' the orthogonal bases of two random 3x3 matrices, D diagonal"
def correlated_covariance(level, first, second, diagonal):
    d = np.diag(diagonal)
    return np.abs(level**2 * linalg.orth(first).T @ d @ linalg.orth(second))


# 2 sensor noise: "speckle at level; Poisson with [n] photons (colour, grey); salt and pepper with density"
def sensor_noise(image, kind, **p):
    shape = image.shape[:2]
    if kind == "speckle":
        return image + image * layer(shape, **p)
    if kind == "poisson":
        counted = luma(image) if p["grey"] else image
        expected = counted * p["photons"]
        if p["grey"]:
            expected = expected[:, :, 0]
        found = photons_of(p["seed"], expected).reshape(counted.shape) / p["photons"]
        return image + (found - counted)
    u, noisy = uniforms(p["seed"], shape), image.copy()
    noisy[u < p["density"] / 2] = 0
    noisy[u > 1 - p["density"] / 2] = 1
    return noisy


# 3 resize: "shrink by [scale]; grow by [scale]; none; nearest, linear, cubic, area"
def resize(image, scale, method):
    height, width = image.shape[:2]
    return resized(image, max(1, int(height * scale)), max(1, int(width * scale)), method)


# 4 colour: "grey; fade (saturation); per-channel cast"
def colour(image, kind, saturation=None, gains=None):
    if kind == "grey":
        return np.repeat(luma(image), 3, axis=2)
    if kind == "fade":
        return saturation * image + (1 - saturation) * luma(image)
    return np.stack([image[:, :, c] * gains[c] for c in range(3)], axis=2)


# 5 Gaussian noise
def gaussian_noise(image, **p):
    return image + layer(image.shape[:2], **p)


# 6 JPEG: "quality"
def jpeg(image, quality):
    stored = io.BytesIO()
    pixels = Image.fromarray(np.rint(image * 255).astype(np.uint8))
    pixels.save(stored, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(stored)) / 255.0


# 7 chroma subsampling: "YCrCb, chroma halved (area) and restored (nearest)"
def chroma_subsampling(image):
    height, width = image.shape[:2]
    y = luma(image)
    chroma = np.concatenate([(image[:, :, :1] - y) / 1.402, (image[:, :, 2:] - y) / 1.772], axis=2)
    small = resized(chroma, max(1, height // 2), max(1, width // 2), "area")
    chroma = resized(small, height, width, "nearest")
    red, blue = y + 1.402 * chroma[:, :, :1], y + 1.772 * chroma[:, :, 1:]
    return np.concatenate([red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue], axis=2)


# 8 banding: "[so many] levels per channel"
def banding(image, levels):
    return np.floor(image * (levels - 1) + 0.5) / (levels - 1)


# 9 exposure: "darken; brighten then contrast; mild brightness or contrast"; contrast about the mean luma, as PIL
def exposure(image, brightness, contrast):
    bright = np.minimum(image * brightness, 1)
    return luma(bright).mean() * (1 - contrast) + bright * contrast


# 10 chromatic aberration: "red d down and d right, blue d up and d left; the strip that nothing moves into keeps its
# old values (one diagonal, always the same)"
def chromatic_aberration(image, shift):
    moved = image.copy()
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            if y + shift < height and x + shift < width:
                moved[y + shift, x + shift, 0] = image[y, x, 0]
            if y - shift >= 0 and x - shift >= 0:
                moved[y - shift, x - shift, 2] = image[y, x, 2]
    return moved


# 11 moire: "one plane wave (sin(f(x cos a + y sin a)) + 1) / 2, f in rad/px, blended into the picture"
def moire(image, frequency, angle, blend):
    y, x = np.indices(image.shape[:2])
    wave = np.sin(frequency * (x * math.cos(angle) + y * math.sin(angle))) + 1
    return image + blend * (wave[:, :, None] / 2 - image)


# 12 glitch: "bands of [height] px: a drop-out whose value is [level]; else a horizontal roll of [roll] px"
def glitch(image, bands):
    broken = image.copy()
    for band in bands:
        top = int(band["top"] * len(image))
        for y in range(top, min(top + band["height"], len(image))):
            row = broken[y].copy()
            for x in range(len(row)):
                if "level" in band:
                    broken[y, x] = band["level"]
                else:
                    broken[y, (x + band["roll"]) % len(row)] = row[x]
    return broken


# 13 vignette: "radial darkening [amount] at the corner": none in the middle, in proportion to the radius
def vignette(image, amount):
    height, width = image.shape[:2]
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    radius = np.sqrt((x**2 + y**2) / 2)
    return image * (1 - amount * radius[:, :, None])


# 14 distractor: "random printable text (font, scale, thickness, colour, place, may lie partly outside); a pasted patch
# of another image". A text's place is a share of the picture with 100 px more on its left and below it.
def distractor(image, kind, text, donor=None, **p):
    changed = image.copy()
    height, width = image.shape[:2]
    if kind == "patch" and donor is not None:
        rows, columns = (
            min(p[side], image.shape[axis], donor.shape[axis]) for axis, side in enumerate(("height", "width"))
        )
        x0 = int(p["source"][0] * (donor.shape[1] - columns + 1))
        y0 = int(p["source"][1] * (donor.shape[0] - rows + 1))
        x1 = int(p["place"][0] * (width - columns + 1))
        y1 = int(p["place"][1] * (height - rows + 1))
        patch = donor[y0 : y0 + rows, x0 : x0 + columns]
        changed[y1 : y1 + rows, x1 : x1 + columns] = patch
        return changed
    ink = np.zeros((height, width), np.uint8)
    place = (
        math.floor(text["place"][0] * (width + 100)) - 100,
        math.floor(text["place"][1] * (height + 100)),
    )
    style = (text["font"], text["scale"], 255, text["thickness"])
    cv2.putText(ink, text["characters"], place, *style)
    changed[ink > 0] = text["colour"]
    return changed


TABLE = (
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


def apply_op(name: str, image: np.ndarray, params: dict, donor=None) -> np.ndarray:
    """The op's exact result, float64 in [0, 1]; `donor` in [0, 1] too."""
    extra = {"donor": donor} if name == "distractor" else {}
    op = {op.__name__: op for op in TABLE}[name]
    return np.clip(op(image.astype(np.float64), **params, **extra), 0, 1)


def apply_steps(image: np.ndarray, steps, donor=None) -> np.ndarray:
    """A recipe's steps one after the other; "at the end the image is resized back to its input size"."""
    work = image.astype(np.float64)
    for name, params in steps:
        if name == "restore":
            work = np.clip(resized(work, *image.shape[:2], params["method"]), 0, 1)
        else:
            work = apply_op(name, work, params, donor)
    return work
