"""Pictures and clips of several people, from one public-domain photograph (scikit-image's astronaut, NASA)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from make_photos import FACE, blended
from skimage import data

SIDE = 256
CUT = (96, 20)  # x, y of the portrait in the photograph


def portraits() -> list[np.ndarray]:
    """Four portraits (256, 256, 3) uint8: as it is, mirrored, in other colours, and self-blended."""
    photo = data.astronaut()
    whole = [photo, photo[:, ::-1], np.clip(photo[..., ::-1] * 0.8 + 20, 0, 255).astype(np.uint8), blended(photo)]
    x, y = CUT
    starts = [x, photo.shape[1] - x - SIDE, x, x]
    return [np.ascontiguousarray(p[y : y + SIDE, x0 : x0 + SIDE]) for p, x0 in zip(whole, starts)]


def _face(mirrored: bool) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = FACE[0] - CUT[0], FACE[1] - CUT[1], FACE[2] - CUT[0], FACE[3] - CUT[1]
    return (SIDE - x1, y0, SIDE - x0, y1) if mirrored else (x0, y0, x1, y1)


def collage() -> tuple[np.ndarray, list[tuple[float, ...]]]:
    """(512, 512, 3) uint8 of four portraits, the last self-blended, and where their faces are, px."""
    a, b, c, d = portraits()
    places = []
    for index in range(4):
        shift = np.tile([SIDE * (index % 2), SIDE * (index // 2)], 2)
        places.append(tuple((np.array(_face(index == 1)) + shift).tolist()))
    return np.vstack([np.hstack([a, b]), np.hstack([c, d])]), places


def group_photo() -> tuple[np.ndarray, list[tuple[float, ...]]]:
    """The collage on a large canvas with a fifth, small person beside it, and where the faces are, px."""
    picture, places = collage()
    canvas = np.full((1100, 1600, 3), 90, np.uint8)
    canvas[:1024, :1024] = cv2.resize(picture, (1024, 1024), interpolation=cv2.INTER_CUBIC)
    places = [tuple(2 * v for v in place) for place in places]
    small = cv2.resize(portraits()[0], (80, 80), interpolation=cv2.INTER_AREA)
    canvas[700:780, 1300:1380] = small
    scale, (x0, y0, x1, y1) = 80 / SIDE, _face(False)
    places.append((1300 + x0 * scale, 700 + y0 * scale, 1300 + x1 * scale, 700 + y1 * scale))
    return canvas, places


class Clip(NamedTuple):
    """A clip: someone stands left; someone enters right at frame `enters`; at `cut` another scene begins."""

    path: Path
    frames: int
    enters: int
    cut: int
    width: int


def two_people(path: Path) -> Clip:
    """Write the clip: 48 frames of 512 x 256 px, the camera unsteady; after the cut the left person's face is where it
    was before, on another ground.
    """
    left, right, other, _ = portraits()
    clip = Clip(path, 48, 9, 30, 2 * SIDE)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12, (2 * SIDE, SIDE))
    empty = cv2.resize(data.coffee(), (SIDE, SIDE))
    for number in range(clip.frames):
        if number < clip.cut:
            frame = np.hstack([left, right if number >= clip.enters else np.full_like(right, 60)])
        else:
            frame = np.hstack([other, empty])
        shift = np.roll(frame, number % 4, axis=1)
        writer.write(np.ascontiguousarray(shift[:, :, ::-1]))
    writer.release()
    return clip
