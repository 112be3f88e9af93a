"""Makes tests/photos: seven small pictures from one public-domain photograph, scikit-image's astronaut (NASA).

    python tests/make_photos.py

The pictures are committed; this file says how they came to be and makes them again.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage import data

PHOTOS = Path(__file__).parent / "photos"
FACE = (179, 63, 269, 175)  # the astronaut's face in the photograph: x0, y0, x1, y1 px


def blended(photo: np.ndarray) -> np.ndarray:
    """The face blended into itself: moved, enlarged, recoloured, under a soft ellipse, as a face swap leaves it."""
    x0, y0, x1, y1 = FACE
    centre = ((x0 + x1) / 2, (y0 + y1) / 2)
    move = cv2.getRotationMatrix2D(centre, 3.0, 1.06)
    move[:, 2] += (3, -2)
    height, width = photo.shape[:2]
    donor = cv2.warpAffine(photo, move, (width, height), borderMode=cv2.BORDER_REFLECT)
    donor = cv2.GaussianBlur(donor, (0, 0), 0.8).astype(np.float32)
    donor = donor * (1.06, 0.98, 0.90) + 6
    mask = np.zeros((height, width), np.float32)
    axes = (int((x1 - x0) * 0.46), int((y1 - y0) * 0.46))
    cv2.ellipse(mask, (int(centre[0]), int(centre[1])), axes, 0, 0, 360, 1.0, -1)
    mask = cv2.GaussianBlur(mask, (0, 0), 4)[:, :, None]
    return np.clip(photo * (1 - mask) + donor * mask, 0, 255).astype(np.uint8)


def degraded(photo: np.ndarray) -> np.ndarray:
    """A third of its size and back, noise, darkened."""
    height, width = photo.shape[:2]
    small = cv2.resize(photo, (width // 3, height // 3), interpolation=cv2.INTER_AREA)
    large = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    noise = np.random.default_rng(0).normal(0, 12, photo.shape)
    return np.clip(large * 0.7 + noise, 0, 255).astype(np.uint8)


def make_photos(folder: Path) -> list[Path]:
    """Write the pictures into `folder`, made when missing; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    photo = data.astronaut()  # (512, 512, 3) uint8
    portrait = np.ascontiguousarray(photo[20:276, 96:352])  # 256 px, as the challenge's
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn a quarter to the right to show"
    x0, y0, x1, y1 = FACE
    tight = photo[y0 - 24 : y1 + 4, x0 - 25 : x1 + 25]  # a face crop, 140 px
    for name, picture, options in (
        ("as_it_is.jpg", photo, {"quality": 85}),
        ("blended.png", blended(photo)[20:276, 96:352], {"optimize": True}),
        ("degraded.jpg", degraded(photo), {"quality": 30}),
        ("face_crop.jpg", tight, {"quality": 92}),
        ("grey.jpg", cv2.cvtColor(portrait, cv2.COLOR_RGB2GRAY), {"quality": 85}),
        ("portrait.webp", portrait, {"quality": 80}),
        ("turned.jpg", np.rot90(portrait), {"quality": 85, "exif": exif}),
    ):
        Image.fromarray(np.ascontiguousarray(picture)).save(folder / name, **options)
    return sorted(folder.iterdir())


if __name__ == "__main__":
    for path in make_photos(PHOTOS):
        print(f"{path.relative_to(PHOTOS.parent)}  {path.stat().st_size / 1000:.0f} kB")
