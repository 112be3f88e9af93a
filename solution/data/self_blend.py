"""Self-blended fakes with their forgery masks, from real faces (Shiohara and Yamasaki, CVPR 2022).

Takes uint8 RGB (H, W, 3) and a `FaceBox` in its pixels; returns uint8 RGB (H, W, 3) and a float32 mask (H, W) in
[0, 1], 1 where forged. A picture is blended with a slightly changed copy of itself: what is left to learn is the
mismatch that any face swap leaves (colour, sharpness, geometry, a blending boundary), not one generator's trace.

`python -m solution.data.self_blend --input DIR --out DIR` writes examples for the eye: picture, fake and mask side by side.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import cv2
import numpy as np

from solution.config import FaceConfig
from solution.data.degradation import use_one_opencv_thread
from solution.data.faces import FaceLocator
from solution.data.images import UnreadableInput, decode_image, find_inputs, stable_seed
from solution.errors import FAILURES, KitError, door, tell
from solution.records import FaceBox

# A frontal face in units of the eye distance, origin between the eyes, x to the viewer's right, y down.
# The five points are in the order of `FaceBox.landmarks` (the subject's right eye is on the viewer's left).
_ANCHORS = np.array([(-0.5, 0.0), (0.5, 0.0), (0.0, 0.6), (-0.41, 1.15), (0.41, 1.15)], np.float32)
# Outlines whose convex hulls are swapped: the whole face, the inner face, the mouth and jaw, the eyes and brows.
_JAW = [(-0.97, 0.75), (-0.82, 1.25), (-0.48, 1.72), (0.0, 1.88)]
_BROW = [(-1.0, 0.1), (-0.88, -0.4), (-0.45, -0.58), (0.0, -0.55)]
_REGIONS = {
    "face": _BROW + _JAW,
    "inner": [(-0.85, -0.2), (-0.4, -0.45), (-0.75, 0.7), (-0.55, 1.4), (0.0, 1.5)],
    "mouth": [(-0.75, 0.65), (-0.3, 0.4), *_JAW[1:]],
    "eyes": [(-0.95, 0.2), *_BROW[1:], (-0.45, 0.5), (0.0, 0.75)],
}
_REGION_P = (0.55, 0.25, 0.1, 0.1)
# Without landmarks: an ellipse in the face box (fractions of its sides), or in a picture that is itself a face crop.
_BOX_ELLIPSE, _CROP_ELLIPSE = (0.47, 0.52), (0.33, 0.42)
_RATIOS = (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)  # SBI's blending ratios
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_MASK_SIDE = 256  # masks of larger pictures are made at this longer side and resized


def self_blend(
    image: np.ndarray, face: FaceBox | None, rng: np.random.Generator, drawn: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A fake made of `image` alone, and where it is forged (SBI).

    The source-target step changes colour and sharpness of one of two copies; the source is resized and shifted; the
    mask is a deformed face region with a random soft edge; they are blended with a ratio drawn from 0.25 .. 1.

    Args:
        image: (H, W, 3) uint8 RGB, left untouched.
        face: in the pixels of `image`; None takes the ellipse at the picture's centre (a picture that is a face crop).
        rng: every draw comes from it.
        drawn: (H, W, 3) uint8, the same picture as a network draws it again: it is blended in instead of a changed copy, its
            colour changed in half of the cases.

    Returns:
        fake: (H, W, 3) uint8 RGB, and mask: (H, W) float32 in [0, 1]. The mask is the blending shape before the ratio:
        a region blended at 0.25 is forged too.

    Raises:
        ValueError: not uint8 (H, W, 3), or a face that does not overlap the picture.
    """
    _check(image)
    source, target = image, image
    if drawn is not None:
        _check(drawn)
        source = _colour(drawn, rng) if rng.random() < 0.5 else drawn
    elif rng.random() < 0.5:
        source = _transform(image, rng)
    else:
        target = _transform(image, rng)
    near, face = _close_up(image.shape[:2], face)
    shape = _blend_mask(target[near].shape[:2], face, rng)
    source, shape = _shift_and_resize(np.ascontiguousarray(source[near]), shape, rng)
    ratio = _RATIOS[rng.integers(len(_RATIOS))]
    weight = shape * np.float32(ratio)
    fake, mask = target.copy(), np.zeros(image.shape[:2], np.float32)
    below = np.ascontiguousarray(target[near])
    fake[near], mask[near] = cv2.blendLinear(source, below, weight, 1 - weight), shape
    return fake, mask


def blend_draws(seed: int, name: str) -> np.random.Generator:
    """What the fake of the picture `name` is drawn from: not the stream that its degradation is drawn from (`degraded_picture`
    takes the same seed and name), or the one would foretell the other."""
    return np.random.default_rng([seed, stable_seed(name), 404])


def _close_up(size: tuple[int, int], face: FaceBox | None) -> tuple[tuple[slice, slice], FaceBox | None]:
    """The part of a picture, twice as wide as its face, that shifts are measured by, and the face in its pixels.

    Shifts and scales are shares of a picture that its face fills; in a large frame they would double a small face.
    """
    if face is None:
        return (slice(0, size[0]), slice(0, size[1])), None
    reach = max(face.x1 - face.x0, face.y1 - face.y0)
    x, y = (face.x0 + face.x1) / 2, (face.y0 + face.y1) / 2
    left, top = max(0, int(x - reach)), max(0, int(y - reach))
    right, bottom = (
        min(size[1], math.ceil(x + reach)),
        min(size[0], math.ceil(y + reach)),
    )
    if right - left < 2 or bottom - top < 2:
        return (slice(0, size[0]), slice(0, size[1])), face  # beside the picture
    points = face.landmarks
    if points is not None:
        points = tuple((px - left, py - top) for px, py in points)
    moved = FaceBox(
        *(face.x0 - left, face.y0 - top, face.x1 - left, face.y1 - top),
        face.score,
        points,
    )
    return (slice(top, bottom), slice(left, right)), moved


def face_region(image_shape: tuple[int, ...], face: FaceBox | None) -> np.ndarray:
    """The whole face as a mask, for a picture whose face is generated as a whole.

    Args:
        image_shape: (H, W, ...) of the picture.
        face: in its pixels; None takes the centre ellipse, as `self_blend` does.

    Returns:
        (H, W) float32, 0 or 1.

    Raises:
        ValueError: the face does not overlap the picture.
    """
    height, width = image_shape[:2]
    outline = _outline(height, width, face, "face")
    return _fill(height, width, outline, face)


# ------------------------------------------------------------------------------------------------ the mask
def _outline(height: int, width: int, face: FaceBox | None, region: str) -> np.ndarray:
    """(K, 2) float32 points in px whose convex hull is the region."""
    if face is not None and face.landmarks is not None:
        half = np.array(_REGIONS[region], np.float32)
        points = np.concatenate([half, half * (-1, 1)]).astype(np.float32)
        fit = _affine_fit(np.array(face.landmarks, np.float32))
        if fit is not None:
            return points @ fit[:2] + fit[2]
    if face is None:
        x, y, w, h = width / 2, height / 2, width, height
        rx, ry = _CROP_ELLIPSE
    else:
        x, y = (face.x0 + face.x1) / 2, (face.y0 + face.y1) / 2
        w, h = face.x1 - face.x0, face.y1 - face.y0
        rx, ry = _BOX_ELLIPSE
    angle = np.arange(24, dtype=np.float32) * (2 * math.pi / 24)
    points = np.stack([np.cos(angle) * rx * w, np.sin(angle) * ry * h], axis=1)
    if region == "mouth":  # the parts of a face that has no landmarks: lower, upper
        points = points[points[:, 1] > 0.1 * h]
    elif region == "eyes":
        points = points[points[:, 1] < 0.05 * h]
    elif region == "inner":
        points = points * 0.75
    return (points + (x, y)).astype(np.float32)


def _affine_fit(landmarks: np.ndarray) -> np.ndarray | None:
    """(3, 2) least-squares map of the canonical face onto five landmarks; None where they lie (nearly) on a line.

    Affine rather than similar: a turned head narrows its face.
    """
    system = np.concatenate([_ANCHORS, np.ones((5, 1), np.float32)], axis=1)
    fit = np.linalg.lstsq(system, landmarks, rcond=None)[0]  # (3, 2)
    across, down = np.linalg.norm(fit[0]), np.linalg.norm(fit[1])
    area = abs(np.linalg.det(fit[:2]))
    if min(across, down) < 0.25 * max(across, down) or area < 0.5 * across * down:
        return None
    return fit.astype(np.float32)


def _fill(height: int, width: int, points: np.ndarray, face: FaceBox | None) -> np.ndarray:
    """The convex hull of points (K, 2) as a mask (H, W) float32."""
    mask = np.zeros((height, width), np.float32)
    hull = cv2.convexHull(np.rint(points).astype(np.int32))
    cv2.fillConvexPoly(mask, hull, 1.0)
    if not mask.any():
        raise ValueError(
            f"{face} does not overlap its picture of {width}x{height} px; give the face in the pixels of this picture"
        )
    return mask


def _blend_mask(shape: tuple[int, int], face: FaceBox | None, rng: np.random.Generator) -> np.ndarray:
    """A deformed region of the face with a random soft edge: (H, W) float32 in [0, 1], its maximum 1."""
    height, width = shape
    scale = min(1.0, _MASK_SIDE / max(height, width))
    small = max(1, round(height * scale)), max(1, round(width * scale))
    region = str(rng.choice(list(_REGIONS), p=_REGION_P))
    points = _outline(height, width, face, region)
    extent = np.ptp(points, axis=0)  # (2,) px
    points = points + rng.normal(0, 0.04, points.shape) * extent
    mask = _fill(*small, points * (small[1] / width, small[0] / height), face)
    reach = max(2.0, float(extent.mean()) * scale)  # px of the small mask
    shape_mask = _elastic(mask, reach, rng)
    # Blurred and cut at a random level, the outline shrinks or grows and loses its corners; the second blur is the
    # blending edge, from nearly hard to a tenth of the face.
    rounded = _blur(shape_mask, reach * rng.uniform(0.01, 0.06))
    cut = (rounded > rng.uniform(0.25, 0.85)).astype(np.float32)
    if not cut.any():
        cut = mask
    soft = _blur(cut, reach * rng.uniform(0.005, 0.06))
    soft /= soft.max()
    if small != shape:
        soft = cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR)
    return soft


def _elastic(mask: np.ndarray, reach: float, rng: np.random.Generator) -> np.ndarray:
    """`mask` moved by a smooth random field of up to about a tenth of `reach` px."""
    height, width = mask.shape
    nodes = int(rng.integers(4, 9))
    strength = reach * rng.uniform(0.01, 0.06)
    field = rng.normal(0, strength, (nodes, nodes, 2)).astype(np.float32)
    field = cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    field[:, :, 0] += np.arange(width, dtype=np.float32)
    field[:, :, 1] += np.arange(height, dtype=np.float32)[:, None]
    return cv2.remap(mask, field, None, cv2.INTER_LINEAR)


def _blur(mask: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(mask, (0, 0), max(0.5, sigma))


# ------------------------------------------------------------------------------------------------ the two copies
def _transform(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """SBI's source-target step: colour, then sharper or softer; uint8 in and out."""
    changed = _colour(image, rng)
    if rng.random() < 0.5:
        return _sharpen(changed, rng.uniform(0.2, 0.6))
    return _soften(changed, int(rng.choice((2, 4))))


def _colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """RGB shift, hue, saturation, value, contrast and brightness, as one affine map of RGB without rounding between.

    The ranges are SBI's: +-20 of 255 per channel in 30 % of the pictures, hue, saturation and value +-30 % of
    albumentations' HSV scale, brightness and contrast +-10 %.
    """
    turn = math.radians(rng.uniform(-12, 12))
    saturation, value = 1 + rng.uniform(-0.3, 0.3), 1 + rng.uniform(-0.12, 0.12)
    contrast = 1 + rng.uniform(-0.1, 0.1)
    offset = np.full(3, rng.uniform(-0.1, 0.1) * 255, np.float32)
    if rng.random() < 0.3:
        offset += rng.uniform(-20, 20, 3).astype(np.float32)
    grey = np.tile(_LUMA, (3, 1))
    colour = saturation * (np.eye(3, dtype=np.float32) - grey)
    matrix = contrast * value * (grey + colour @ _hue_rotation(turn))
    offset += 127.5 * (1 - contrast)
    return cv2.transform(image, np.column_stack([matrix, offset]))


def _hue_rotation(angle: float) -> np.ndarray:
    """(3, 3) rotation of RGB about the grey axis (Rodrigues)."""
    axis = np.full(3, 1 / math.sqrt(3), np.float32)
    return cv2.Rodrigues(axis * angle)[0].astype(np.float32)


def _sharpen(image: np.ndarray, amount: float) -> np.ndarray:
    soft = cv2.GaussianBlur(image, (0, 0), 1.2)
    return cv2.addWeighted(image, 1 + 2 * amount, soft, -2 * amount, 0)


def _soften(image: np.ndarray, factor: int) -> np.ndarray:
    """Down by `factor` and up again, each with a plain nearby filter, as SBI's downscaling does."""
    height, width = image.shape[:2]
    small = max(1, width // factor), max(1, height // factor)
    down = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(down, (width, height), interpolation=cv2.INTER_LINEAR)


def _shift_and_resize(source: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Source and mask moved by up to 3 % and 1.5 % of the sides and scaled by up to 5 % (SBI's ranges)."""
    height, width = mask.shape
    scale = rng.uniform(0.95, 1 / 0.95)
    dx, dy = rng.uniform(-0.03, 0.03) * width, rng.uniform(-0.015, 0.015) * height
    x, y = width / 2, height / 2
    move = np.array([[scale, 0, x * (1 - scale) + dx], [0, scale, y * (1 - scale) + dy]], np.float32)
    size = (width, height)
    source = cv2.warpAffine(source, move, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return source, cv2.warpAffine(mask, move, size, flags=cv2.INTER_LINEAR)


def _check(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 RGB (H, W, 3), found {image.dtype} {image.shape}")


# ------------------------------------------------------------------------------------------------ examples
def side_by_side(*parts: np.ndarray) -> np.ndarray:
    """Pictures (H, W, 3) uint8 and maps (H, W) in [0, 1] of one height -> one picture (H, sum of W, 3) uint8."""
    panels = [
        part if part.ndim == 3 else np.repeat(np.rint(part * 255).astype(np.uint8)[:, :, None], 3, axis=2)
        for part in parts
    ]
    return np.concatenate(panels, axis=1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m solution.data.self_blend",
        description="Write self-blended fakes of real faces: picture, fake and mask side by side.",
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="a folder of pictures of real faces")
    add("--out", type=Path, required=True, help="a folder for the examples")
    add("--count", type=int, default=24, help="how many pictures (default 24)")
    add("--seed", type=int, default=0, help="another seed, other fakes (default 0)")
    return parser.parse_args(argv)


@door("self_blend")
def main(argv: list[str] | None = None) -> int:
    """Write the examples; exit codes: 0 done, 2 usage, 3 no face detector or no place, 4 done with unreadable pictures."""
    args = parse(argv)
    from solution.data.views import find_face  # with torch: --help answers at once

    use_one_opencv_thread()
    locator, failed, written = FaceLocator(FaceConfig()), 0, 0
    inputs = [i for i in find_inputs(args.input) if i.kind == "image"]
    args.out.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(inputs[: args.count]):
        try:
            image = decode_image(item.path)
        except UnreadableInput as error:
            tell(f"self_blend: {error}")
            failed += 1
            continue
        rng = np.random.default_rng([args.seed, number])
        panel = side_by_side(image, *self_blend(image, find_face(image, locator), rng))
        path = args.out / f"{item.name.replace('/', '_')}.png"
        if not cv2.imwrite(str(path), panel[:, :, ::-1]):
            raise KitError(f"{path}: cannot be written")
        written += 1
    print(f"{written} examples in {args.out}, {failed} pictures unreadable")
    return FAILURES if failed else 0


if __name__ == "__main__":
    sys.exit(main())
