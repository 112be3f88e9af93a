"""Pure pixel ops of the extreme degradation engine: draw an op's parameters, apply an op to a picture.

Every op is a pair: `draw_NAME(strength, rng) -> params` (plain JSON values; strength in [0, 1]) and
`NAME(image, **params) -> image`. Pictures are float32 RGB HWC in [0, 1], contiguous, in and out; an op returns a new
array and never writes its input. Noise ops carry an integer seed, so the same parameters give the same bytes.

Places are stored as fractions of the working picture, sizes in its pixels. Except for `resize`, which the engine
undoes at the end, no op moves pixels beyond the picture's own grid: localisation masks stay valid.

Source: arXiv 2604.25889, the compound degradation engine; the defects of the published code are mended.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import cv2
import numpy as np

Params = dict[str, Any]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG and OpenCV use
MIRROR = cv2.BORDER_REFLECT_101
INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}
SMOOTH = ("linear", "cubic", "area")
# Above this many taps OpenCV's filter2D leaves its sparse direct loop for a block-wise DFT, which is slower.
DIRECT_TAPS = 121
# Gaussian mass beyond this many standard deviations is under 0.04 % in two dimensions (1/255 is 0.39 %).
GAUSSIAN_REACH = 4.0
TEXT_CHARACTERS = "".join(chr(code) for code in range(32, 127))
HERSHEY_FONTS = 8
# A text's baseline starts up to so many px left of the picture or below it.
TEXT_MARGIN = 100
# Below this many expected photons a pixel's count is drawn exactly; above, from a skewed Gaussian.
EXACT_PHOTONS = 6.0


# ------------------------------------------------------------------------------------------------ small tools
def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] to float32 [0, 1]; float32 pictures pass unchanged. Any shape."""
    if image.dtype == np.float32:
        return image
    return np.multiply(image, np.float32(1 / 255), dtype=np.float32)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float32 [0, 1] to uint8, rounded to nearest; uint8 pictures pass unchanged. Any shape."""
    if image.dtype == np.uint8:
        return image
    return cv2.convertScaleAbs(image, alpha=255.0).reshape(image.shape)


def _clip(image: np.ndarray) -> np.ndarray:
    """`image` with its values brought into [0, 1], in place (only for arrays an op has just made)."""
    return np.clip(image, 0.0, 1.0, out=image)


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _integer(rng: np.random.Generator, low: int, high: int) -> int:
    """A uniform integer in low..high, both included."""
    return int(rng.integers(low, high + 1))


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))


def _grey(image: np.ndarray) -> np.ndarray:
    """Luma, (H, W)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _spread(plane: np.ndarray) -> np.ndarray:
    """(H, W) repeated to (H, W, 3)."""
    return cv2.cvtColor(plane, cv2.COLOR_GRAY2RGB)


# ------------------------------------------------------------------------------------------------ random fields
def _source(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))


def _words(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` independent uniform 16-bit words, uint16."""
    return rng.integers(0, 2**64, -(-count // 4), dtype=np.uint64).view(np.uint16)[:count]


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """The standard normal's 65,536 equally likely quantiles, (65536,) float32."""
    inverse = statistics.NormalDist().inv_cdf
    half = np.array([inverse((i + 0.5) / 65536) for i in range(32768)], np.float32)
    return np.concatenate([half, -half[::-1]])


def normal_field(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Independent standard normal values, float32, of `shape`.

    Looked up from 16-bit words: six times faster than the ziggurat of `standard_normal`, with |z| up to 4.3.
    """
    words = _words(rng, math.prod(shape))
    return np.take(_normal_quantiles(), words, mode="wrap").reshape(shape)


# ------------------------------------------------------------------------------------------------ 0 blur
def draw_blur(strength: float, rng: np.random.Generator) -> Params:
    """One third each: anisotropic Gaussian (variances), isotropic Gaussian (sigma), box."""
    kind = _choice(rng, ("anisotropic", "isotropic", "box"))
    if kind == "anisotropic":
        return {
            "kind": kind,
            "angle": _uniform(rng, 0.0, math.pi),
            "l1": _uniform(rng, 0.0, 30.0 * strength),
            "l2": _uniform(rng, 0.0, 30.0 * strength),
        }
    if kind == "isotropic":
        size = 2 * _integer(rng, 3, 12) + 1
        return {
            "kind": kind,
            "size": size,
            "sigma": _uniform(rng, 0.0, 30.0 * strength),
        }
    return {"kind": kind, "side": _integer(rng, 3, max(3, int(30.0 * strength)))}


def blur(image: np.ndarray, kind: str, **params: Any) -> np.ndarray:
    """Blur with the kernel `kind` (`anisotropic`, `isotropic`, `box`), mirror border."""
    kernels = {
        "anisotropic": _blur_anisotropic,
        "isotropic": _blur_isotropic,
        "box": _blur_box,
    }
    return kernels[kind](image, **params)


def _blur_box(image: np.ndarray, side: int) -> np.ndarray:
    return _clip(cv2.blur(image, (side, side), borderType=MIRROR))


def _blur_isotropic(image: np.ndarray, size: int, sigma: float) -> np.ndarray:
    if sigma < 0.1:  # the neighbour's weight is under exp(-50)
        return image.copy()
    kernel = cv2.getGaussianKernel(size, sigma, cv2.CV_32F)
    return _clip(cv2.sepFilter2D(image, -1, kernel, kernel, borderType=MIRROR))


def anisotropic_kernel(angle: float, l1: float, l2: float) -> np.ndarray:
    """The rotated Gaussian with variances `l1` along `angle` (rad) and `l2` across it, sampled on the pixel grid.

    (k, k) float32 of sum 1, k = 2 int(max(l1, l2)) + 1, or less where the rest lies beyond 4 standard deviations.
    """
    radius = int(max(l1, l2))
    l1, l2 = max(l1, 1e-6), max(l2, 1e-6)
    radius = min(radius, math.ceil(GAUSSIAN_REACH * math.sqrt(max(l1, l2))))
    cos, sin = math.cos(angle), math.sin(angle)
    grid = np.arange(-radius, radius + 1, dtype=np.float64)
    along = grid[None, :] * cos + grid[:, None] * sin
    across = grid[:, None] * cos - grid[None, :] * sin
    kernel = np.exp(-0.5 * (along**2 / l1 + across**2 / l2))
    return (kernel / kernel.sum()).astype(np.float32)


def _blur_anisotropic(image: np.ndarray, angle: float, l1: float, l2: float) -> np.ndarray:
    kernel = anisotropic_kernel(angle, l1, l2)
    if kernel.size == 1:
        return image.copy()
    if kernel.size <= DIRECT_TAPS:
        return _clip(cv2.filter2D(image, -1, kernel, borderType=MIRROR))
    return _clip(_convolve_fourier(image, kernel))


def _convolve_fourier(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlation with a centrally symmetric (k, k) kernel in the Fourier domain, mirror border."""
    height, width = image.shape[:2]
    radius = kernel.shape[0] // 2
    rows = cv2.getOptimalDFTSize(height + 2 * radius)
    columns = cv2.getOptimalDFTSize(width + 2 * radius)
    below, after = rows - height - radius, columns - width - radius
    padded = cv2.copyMakeBorder(image, radius, below, radius, after, MIRROR)
    placed = np.zeros((rows, columns), np.float32)
    placed[: 2 * radius + 1, : 2 * radius + 1] = kernel
    transfer = cv2.dft(placed, dst=placed)
    back = cv2.DFT_INVERSE | cv2.DFT_REAL_OUTPUT | cv2.DFT_SCALE
    blurred = np.empty_like(image)
    plane = np.empty((rows, columns), np.float32)  # one buffer: the allocator is slow
    for channel in range(3):
        cv2.extractChannel(padded, channel, dst=plane)
        cv2.dft(plane, dst=plane)
        cv2.mulSpectrums(plane, transfer, 0, plane)
        cv2.dft(plane, dst=plane, flags=back)
        cut = plane[2 * radius : 2 * radius + height, 2 * radius : 2 * radius + width]
        cv2.insertChannel(cut, blurred, channel)
    return blurred


# ------------------------------------------------------------------------------------------------ 1 motion blur
def draw_motion_blur(strength: float, rng: np.random.Generator) -> Params:
    """A line of odd side int(max(3, 12 s)) at an angle in degrees."""
    side = int(max(3.0, 12.0 * strength))
    return {"side": side + 1 - side % 2, "angle": _uniform(rng, 0.0, 180.0)}


def line_kernel(side: int, angle: float) -> np.ndarray:
    """A line of length `side` through the centre at `angle` degrees, (side, side) float32 of sum 1.

    One pixel for each step along the line's steeper axis, so that no angle collapses to a point.
    """
    radius = side // 2
    dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    steep = max(abs(dx), abs(dy))
    reach = round(radius * steep)
    steps = np.arange(-reach, reach + 1)
    kernel = np.zeros((side, side), np.float32)
    columns = np.rint(steps * (dx / steep)).astype(int) + radius
    rows = np.rint(steps * (dy / steep)).astype(int) + radius
    kernel[rows, columns] = 1.0 / len(steps)
    return kernel


def motion_blur(image: np.ndarray, side: int, angle: float) -> np.ndarray:
    """Blur along a line, mirror border."""
    kernel = line_kernel(side, angle)
    if kernel.size <= DIRECT_TAPS:
        return _clip(cv2.filter2D(image, -1, kernel, borderType=MIRROR))
    height, width = image.shape[:2]
    radius, half = side // 2, side // 2 + 1
    padded = cv2.copyMakeBorder(image, radius, radius, radius, radius, MIRROR)
    upper = cv2.filter2D(padded, -1, kernel[:half], anchor=(0, 0))
    lower = cv2.filter2D(padded, -1, kernel[half:], anchor=(0, 0))
    total = cv2.add(upper[:height, :width], lower[half : half + height, :width])
    return _clip(total)


# ------------------------------------------------------------------------------------------------ 2 sensor noise
def draw_sensor_noise(strength: float, rng: np.random.Generator) -> Params:
    """One third each: speckle, Poisson, salt and pepper."""
    kind = _choice(rng, ("speckle", "poisson", "salt_pepper"))
    if kind == "speckle":
        level = _integer(rng, 2, 25) * strength / 255.0
        upper = 25.0 * strength / 255.0
        return {"kind": kind, **_draw_layers(level, upper, 0.4, 0.4, rng)}
    if kind == "poisson":
        photons = 10.0 ** _uniform(rng, 2.0, 4.0)
        grey = bool(rng.random() < 0.5)
        return {"kind": kind, "photons": photons, "grey": grey, "seed": _seed(rng)}
    return {"kind": kind, "density": 0.1 * strength, "seed": _seed(rng)}


def _draw_layers(level: float, upper: float, colour: float, grey: float, rng: np.random.Generator) -> Params:
    """Noise of standard deviation `level`: independent channels, one grey layer, or correlated channels (the rest).

    Correlated channels always take `upper`, the end of the range that `level` was drawn from.
    """
    draw = rng.random()
    if draw < colour:
        return {"layers": "colour", "level": level, "seed": _seed(rng)}
    if draw < colour + grey:
        return {"layers": "grey", "level": level, "seed": _seed(rng)}
    mix = correlated_mix(upper, *rng.random((2, 3, 3)), rng.random(3))
    return {"layers": "correlated", "mix": mix.tolist(), "seed": _seed(rng)}


def correlated_mix(level: float, first: np.ndarray, second: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """The (3, 3) matrix M that turns independent unit noise z into channel-correlated noise M z.

    The published covariance is C = |level**2 O' D P| with O, P the orthogonal bases (left singular vectors) of the
    (3, 3) matrices `first` and `second` and D = diag(`diagonal`). C is not symmetric; NumPy's sampler, to which it was
    given, reads it as V' S V of its singular values and right vectors, and so does M M'.
    """
    bases = np.linalg.svd(np.stack([first, second]))[0]
    covariance = np.abs(level**2 * bases[0].T @ np.diag(diagonal) @ bases[1])
    _, sizes, right = np.linalg.svd(covariance)
    return right.T * np.sqrt(sizes)


def noise_layer(
    shape: tuple[int, int],
    layers: str,
    seed: int,
    level: float = 0.0,
    mix: list[list[float]] | None = None,
) -> tuple[np.ndarray, float]:
    """An (H, W, 3) float32 noise field and the factor that scales it to its level."""
    rng = _source(seed)
    if layers == "grey":
        return _spread(normal_field(rng, shape)), level
    field = normal_field(rng, (*shape, 3))
    if layers == "colour":
        return field, level
    return cv2.transform(field, np.array(mix, np.float32)), 1.0


def sensor_noise(image: np.ndarray, kind: str, **params: Any) -> np.ndarray:
    """Noise of the sensor `kind`: `speckle`, `poisson`, `salt_pepper`."""
    kinds = {"speckle": _speckle, "poisson": _poisson, "salt_pepper": _salt_pepper}
    return kinds[kind](image, **params)


def _speckle(image: np.ndarray, **layer: Any) -> np.ndarray:
    """Noise in proportion to the pixel: x + x n."""
    field, level = noise_layer(image.shape[:2], **layer)
    field *= image
    return _clip(cv2.scaleAdd(field, level, image))


def photon_counts(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Poisson counts (float32) of the means `expected` (float32, any shape).

    Exact below `EXACT_PHOTONS`; above, a Gaussian with the Poisson's skewness (Cornish and Fisher's first term),
    rounded to whole photons: one photon off the exact inversion in under 2 % of the pixels.
    """
    words = _words(rng, expected.size)
    flat = expected.ravel()
    z = np.take(_normal_quantiles(), words, mode="wrap")
    counts = np.sqrt(flat)
    counts *= z
    counts += flat
    z *= z
    z -= 1.0
    z *= np.float32(1 / 6)
    counts += z
    np.rint(counts, out=counts)
    few = np.flatnonzero(flat < EXACT_PHOTONS)
    for start in range(0, few.size, 32768):  # blocks that stay in the cache
        block = few[start : start + 32768]
        counts[block] = _exact_counts(flat[block], words[block])
    return counts.reshape(expected.shape)


def _exact_counts(expected: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Poisson counts (n,) float32 of small means (n,), by inversion: as many as there are k with P(N <= k) < u."""
    uniform = (words + np.float32(0.5)) * np.float32(1 / 65536)
    mass = np.exp(-expected)
    below = mass.copy()
    counts = np.zeros_like(expected)
    for k in range(1, 4 * int(EXACT_PHOTONS)):
        above = uniform > below
        if not above.any():
            break
        counts += above
        mass *= expected
        mass *= np.float32(1.0 / k)
        below += mass
    return counts


def _poisson(image: np.ndarray, photons: float, grey: bool, seed: int) -> np.ndarray:
    """Shot noise at `photons` photons for a white pixel; `grey` counts the luma and adds its error to all channels."""
    rng = _source(seed)
    scale = np.float32(photons)
    if not grey:
        counts = photon_counts(image * scale, rng)
        counts *= np.float32(1 / photons)
        return _clip(counts)
    luma = _grey(image)
    error = photon_counts(luma * scale, rng)
    error *= np.float32(1 / photons)
    error -= luma
    return _clip(cv2.add(image, _spread(error)))


def _salt_pepper(image: np.ndarray, density: float, seed: int) -> np.ndarray:
    """A share `density` of the pixels becomes black or white, half each."""
    height, width = image.shape[:2]
    words = _words(_source(seed), height * width)
    half = round(density * 32768)
    noisy = image.copy()
    pixels = noisy.reshape(-1, 3)
    pixels[np.flatnonzero(words < half)] = 0.0
    pixels[np.flatnonzero(words >= 65536 - half)] = 1.0
    return noisy


# ------------------------------------------------------------------------------------------------ 3 resize
def draw_resize(strength: float, rng: np.random.Generator) -> Params:
    """70 % shrink to U(0.25 / s, 1) within [0.1, 1], 20 % grow to U(1, 2), 10 % as it is."""
    draw = rng.random()
    if draw < 0.7:
        low = 0.25 / max(strength, 1e-6)
        scale = min(max(_uniform(rng, low, 1.0), 0.1), 1.0)
        nearest = rng.random() < 0.5
        method = "nearest" if nearest else _choice(rng, SMOOTH)
    else:
        scale = _uniform(rng, 1.0, 2.0) if draw < 0.9 else 1.0
        method = _choice(rng, SMOOTH)
    return {"scale": scale, "method": method}


def resize(image: np.ndarray, scale: float, method: str) -> np.ndarray:
    """Resize by `scale` (at least one pixel remains) with `method`. Also takes and returns uint8."""
    height, width = image.shape[:2]
    return resize_to(image, (max(1, int(height * scale)), max(1, int(width * scale))), method)


def resize_to(image: np.ndarray, shape: tuple[int, int], method: str) -> np.ndarray:
    """Resize to `shape` (H, W) with `method`. Also takes and returns uint8."""
    if image.shape[:2] == shape:
        return image.copy()
    resized = cv2.resize(image, shape[::-1], interpolation=INTERPOLATIONS[method])
    if method != "nearest" and resized.dtype == np.float32:  # cubic overshoots
        _clip(resized)  # and the weights of the others sum to 1 up to rounding
    return resized


# ------------------------------------------------------------------------------------------------ 4 colour
def draw_colour(strength: float, rng: np.random.Generator) -> Params:
    """20 % grey; else 30 % fade, 70 % cast (one in five of them the fixed green cast)."""
    if rng.random() < 0.2:
        return {"kind": "grey"}
    if rng.random() < 0.3:
        high = max(0.2, 1.0 - strength)
        return {"kind": "fade", "saturation": _uniform(rng, 0.1, high)}
    if rng.random() < 0.2:
        return {"kind": "cast", "gains": [0.8, 1.2, 0.8]}
    low, high = 1.0 - 0.4 * strength, 1.0 + 0.4 * strength
    return {"kind": "cast", "gains": [_uniform(rng, low, high) for _ in range(3)]}


def colour(
    image: np.ndarray,
    kind: str,
    saturation: float = 0.0,
    gains: list[float] | None = None,
) -> np.ndarray:
    """`grey`: luma in all channels. `fade`: towards luma, keeping `saturation`. `cast`: `gains` per channel."""
    if kind == "cast":
        matrix = np.diag(gains)
    else:
        matrix = saturation * np.eye(3) + (1.0 - saturation) * np.tile(LUMA, (3, 1))
    return _clip(cv2.transform(image, matrix.astype(np.float32)))


# ------------------------------------------------------------------------------------------------ 5 Gaussian noise
def draw_gaussian_noise(strength: float, rng: np.random.Generator, sigma: float | None = None) -> Params:
    """Level U(60, 100) s (80 %) or U(2, 100) s (20 %), of 255; 70 % colour, 20 % grey, 10 % correlated.

    sigma: this level instead, of 255 (a sweep over noise).
    """
    low = 60.0 if rng.random() < 0.8 else 2.0
    level = _uniform(rng, low, 100.0) * strength / 255.0
    upper = 100.0 * strength / 255.0
    if sigma is not None:
        level = upper = sigma / 255.0
    return _draw_layers(level, upper, 0.7, 0.2, rng)


def gaussian_noise(image: np.ndarray, **layer: Any) -> np.ndarray:
    """Add a Gaussian noise layer (see `noise_layer`)."""
    field, level = noise_layer(image.shape[:2], **layer)
    return _clip(cv2.scaleAdd(field, level, image))


# ------------------------------------------------------------------------------------------------ 6 JPEG
def draw_jpeg(strength: float, rng: np.random.Generator, quality: tuple[int, int] = (10, 95)) -> Params:
    """Quality in 10..95 whatever the strength."""
    return {"quality": _integer(rng, *quality)}


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Through a baseline 4:2:0 JPEG file. Takes uint8 or float32 and returns the same."""
    bgr = cv2.cvtColor(to_uint8(image), cv2.COLOR_RGB2BGR)
    written, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not written:
        raise RuntimeError(f"OpenCV could not write a JPEG of shape {image.shape} at quality {quality}")
    bgr = cv2.imdecode(data, cv2.IMREAD_COLOR)
    decoded = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=bgr)
    return decoded if image.dtype == np.uint8 else to_float(decoded)


# ------------------------------------------------------------------------------------------------ 7 chroma
def draw_chroma_subsampling(strength: float, rng: np.random.Generator) -> Params:
    """Nothing to draw."""
    return {}


def chroma_subsampling(image: np.ndarray) -> np.ndarray:
    """Halve the chroma planes of YCrCb (area) and restore them (nearest)."""
    height, width = image.shape[:2]
    half = (max(1, width // 2), max(1, height // 2))
    luma, red, blue = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb))
    planes = [luma]
    for chroma in (red, blue):
        small = cv2.resize(chroma, half, interpolation=cv2.INTER_AREA)
        restored = cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)
        planes.append(restored)
    return _clip(cv2.cvtColor(cv2.merge(planes), cv2.COLOR_YCrCb2RGB))


# ------------------------------------------------------------------------------------------------ 8 banding
def draw_banding(strength: float, rng: np.random.Generator) -> Params:
    """int(max(4, 32 - 14 s)) levels; always applied (the published code skips it the more the stronger it is)."""
    return {"levels": int(max(4.0, 32.0 - 14.0 * strength))}


def banding(image: np.ndarray, levels: int) -> np.ndarray:
    """Round every channel to `levels` evenly spaced levels, black and white among them."""
    bands = image * np.float32(levels - 1)
    np.rint(bands, out=bands)
    bands *= np.float32(1.0 / (levels - 1))
    return _clip(bands)


# ------------------------------------------------------------------------------------------------ 9 exposure
def draw_exposure(strength: float, rng: np.random.Generator) -> Params:
    """45 % darken, 45 % haze (brighten, then less contrast), 10 % mild brightness or contrast (half each)."""
    draw = rng.random()
    if draw < 0.45:
        low = max(0.02, 1.0 - 0.98 * strength)
        return {"brightness": _uniform(rng, low, 1.0), "contrast": 1.0}
    if draw < 0.9:
        brightness = _uniform(rng, 1.0, 1.0 + 1.5 * strength)
        contrast = _uniform(rng, max(0.1, 1.0 - 0.9 * strength), 0.8)
        return {"brightness": brightness, "contrast": contrast}
    gain = _uniform(rng, max(0.5, 1.0 - 0.5 * strength), 1.0 + 0.5 * strength)
    if rng.random() < 0.5:
        return {"brightness": gain, "contrast": 1.0}
    return {"brightness": 1.0, "contrast": gain}


def exposure(image: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Multiply by `brightness`, then by `contrast` about the picture's mean luma; clipped after each."""
    exposed = _clip(image * np.float32(brightness))
    if contrast == 1.0:
        return exposed
    mean = float(np.dot(LUMA, cv2.mean(exposed)[:3]))
    exposed *= np.float32(contrast)
    exposed += np.float32(mean * (1.0 - contrast))
    return _clip(exposed)


# ------------------------------------------------------------------------------------------------ 10 aberration
def draw_chromatic_aberration(strength: float, rng: np.random.Generator) -> Params:
    """int(max(1, 4 s)) px."""
    return {"shift": int(max(1.0, 4.0 * strength))}


def chromatic_aberration(image: np.ndarray, shift: int) -> np.ndarray:
    """Move red down and right by `shift` px, blue up and left, green nowhere.

    The strips that nothing moves into keep their own values.
    """
    moved = image.copy()
    if shift < min(image.shape[:2]):
        moved[shift:, shift:, 0] = image[:-shift, :-shift, 0]
        moved[:-shift, :-shift, 2] = image[shift:, shift:, 2]
    return moved


# ------------------------------------------------------------------------------------------------ 11 moire
def draw_moire(strength: float, rng: np.random.Generator) -> Params:
    """One plane wave: frequency in rad/px, angle in rad, blend 0.15 s."""
    return {
        "frequency": _uniform(rng, 0.5, 3.0),
        "angle": _uniform(rng, 0.0, math.pi),
        "blend": 0.15 * strength,
    }


def moire(image: np.ndarray, frequency: float, angle: float, blend: float) -> np.ndarray:
    """Blend in (sin(f (x cos a + y sin a)) + 1) / 2, the same in all channels.

    sin(ux + vy) = sin ux cos vy + cos ux sin vy, so only rows and columns need a sine.
    """
    height, width = image.shape[:2]
    across = frequency * math.cos(angle) * np.arange(width)
    down = frequency * math.sin(angle) * np.arange(height)
    columns = np.stack([np.sin(across), np.cos(across), np.ones(width)])
    rows = np.stack([np.cos(down), np.sin(down), np.ones(height)], axis=1)
    rows *= 0.5 * blend
    columns = np.repeat(columns.astype(np.float32), 3, axis=1)
    wave = rows.astype(np.float32) @ columns
    blended = cv2.scaleAdd(image.reshape(height, 3 * width), 1.0 - blend, wave)
    return _clip(blended).reshape(image.shape)


# ------------------------------------------------------------------------------------------------ 12 glitch
def draw_glitch(strength: float, rng: np.random.Generator) -> Params:
    """int(10 s) bands of 1..8 s px: 40 % a drop-out, else rolled by up to 30 s px.

    A drop-out is black, white or a grey in U(0.2, 0.8), a third each.
    """
    bands = []
    reach = int(30.0 * strength)
    for _ in range(int(10.0 * strength)):
        band = {
            "top": float(rng.random()),
            "height": _integer(rng, 1, max(1, int(8.0 * strength))),
        }
        if rng.random() < 0.4:
            kind = _choice(rng, ("black", "white", "grey"))
            grey = _uniform(rng, 0.2, 0.8)
            band["level"] = {"black": 0.0, "white": 1.0, "grey": grey}[kind]
        else:
            band["roll"] = _integer(rng, -reach, reach)
        bands.append(band)
    return {"bands": bands}


def glitch(image: np.ndarray, bands: list[Params]) -> np.ndarray:
    """Bands of rows drop out to a `level` or roll sideways within themselves by `roll` px."""
    broken = image.copy()
    height, width = image.shape[:2]
    for band in bands:
        top = int(band["top"] * height)
        rows = broken[top : top + band["height"]]
        if "level" in band:
            rows[:] = band["level"]
        else:
            rows[:] = np.roll(rows, band["roll"] % width, axis=1)
    return broken


# ------------------------------------------------------------------------------------------------ 13 vignette
def draw_vignette(strength: float, rng: np.random.Generator) -> Params:
    """Darkening at the corner, 0.4 + 0.4 s."""
    return {"amount": 0.4 + 0.4 * strength}


def vignette(image: np.ndarray, amount: float) -> np.ndarray:
    """Multiply by 1 - amount r, r the distance from the centre: 1 at the corner pixels, on a picture seen as a square."""
    height, width = image.shape[:2]
    # r**2 is the mean of both axes' squares, so the factor amount goes under the root squared.
    down = np.linspace(-1.0, 1.0, height) ** 2 * (amount**2 / 2)
    across = np.linspace(-1.0, 1.0, width) ** 2 * (amount**2 / 2)
    shade = np.add.outer(down.astype(np.float32), across.astype(np.float32))
    np.sqrt(shade, out=shade)
    np.subtract(1.0, shade, out=shade)
    shaded = _spread(shade)  # within [0, 1], so the product is too
    shaded *= image
    return shaded


# ------------------------------------------------------------------------------------------------ 14 distractor
def draw_distractor(strength: float, rng: np.random.Generator, text_p: float = 0.9) -> Params:
    """Random text (`text_p`), or a patch of another picture, with a text to draw where there is no other picture."""
    text = _draw_text(rng)
    if rng.random() < text_p:
        return {"kind": "text", "text": text}
    return {
        "kind": "patch",
        "height": _integer(rng, 20, 100),
        "width": _integer(rng, 20, 100),
        "source": [float(rng.random()), float(rng.random())],
        "place": [float(rng.random()), float(rng.random())],
        "text": text,
    }


def _draw_text(rng: np.random.Generator) -> Params:
    """0..10 printable characters; `place` is the left end of the baseline, fractions (x, y) of where it may lie."""
    picks = rng.integers(len(TEXT_CHARACTERS), size=_integer(rng, 0, 10))
    return {
        "characters": "".join(TEXT_CHARACTERS[i] for i in picks),
        "font": _integer(rng, 0, HERSHEY_FONTS - 1),
        "scale": _uniform(rng, 0.0, 8.0),
        "thickness": _integer(rng, 1, 8),
        "colour": [float(value) for value in rng.random(3)],
        "place": [float(rng.random()), float(rng.random())],
    }


def distractor(
    image: np.ndarray,
    kind: str,
    text: Params,
    donor: np.ndarray | None = None,
    **patch: Any,
) -> np.ndarray:
    """Draw `text`, or paste a patch of `donor` (uint8 or float32 HWC); the patch falls back to the text without one."""
    if kind == "patch" and donor is not None:
        return _paste(image, donor, **patch)
    return _write(image, **text)


def _write(
    image: np.ndarray,
    characters: str,
    font: int,
    scale: float,
    thickness: int,
    colour: list[float],
    place: list[float],
) -> np.ndarray:
    """Text in a Hershey font, plain 8-connected lines: OpenCV's anti-aliased ones can crash outside the picture."""
    written = image.copy()
    height, width = image.shape[:2]
    across = int(place[0] * (width + TEXT_MARGIN)) - TEXT_MARGIN
    origin = (across, int(place[1] * (height + TEXT_MARGIN)))
    # Through a mask of bytes: OpenCV 5 writes into no float picture.
    mask = np.zeros((height, width), np.uint8)
    cv2.putText(mask, characters, origin, font, scale, 255, thickness, cv2.LINE_8)
    written[mask > 0] = np.float32(colour)
    return written


def _paste(
    image: np.ndarray,
    donor: np.ndarray,
    height: int,
    width: int,
    source: list[float],
    place: list[float],
) -> np.ndarray:
    """A `height` x `width` patch of `donor`, cut and placed at fractions of the room there is; cut down to fit both."""
    height = min(height, image.shape[0], donor.shape[0])
    width = min(width, image.shape[1], donor.shape[1])
    top = int(source[1] * (donor.shape[0] - height + 1))
    left = int(source[0] * (donor.shape[1] - width + 1))
    patch = to_float(np.ascontiguousarray(donor[top : top + height, left : left + width]))
    pasted = image.copy()
    top = int(place[1] * (image.shape[0] - height + 1))
    left = int(place[0] * (image.shape[1] - width + 1))
    pasted[top : top + height, left : left + width] = patch
    return pasted


DRAW = {
    "blur": draw_blur,
    "motion_blur": draw_motion_blur,
    "sensor_noise": draw_sensor_noise,
    "resize": draw_resize,
    "colour": draw_colour,
    "gaussian_noise": draw_gaussian_noise,
    "jpeg": draw_jpeg,
    "chroma_subsampling": draw_chroma_subsampling,
    "banding": draw_banding,
    "exposure": draw_exposure,
    "chromatic_aberration": draw_chromatic_aberration,
    "moire": draw_moire,
    "glitch": draw_glitch,
    "vignette": draw_vignette,
    "distractor": draw_distractor,
}
APPLY = {
    "blur": blur,
    "motion_blur": motion_blur,
    "sensor_noise": sensor_noise,
    "resize": resize,
    "colour": colour,
    "gaussian_noise": gaussian_noise,
    "jpeg": jpeg,
    "chroma_subsampling": chroma_subsampling,
    "banding": banding,
    "exposure": exposure,
    "chromatic_aberration": chromatic_aberration,
    "moire": moire,
    "glitch": glitch,
    "vignette": vignette,
    "distractor": distractor,
}
