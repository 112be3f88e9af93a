"""Raw data sets in miniature: the layouts as their authors ship them, with clips and pictures of one public-domain face.

    python tests/raw_sets.py --out SET [--pictures 1000] [--pairs 0]

writes real and fake pictures of 512 px, or a FaceForensics++ tree of so many pairs: what prepare's speed is measured on.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import cv2
import numpy as np

FACE = (96, 56, 158, 140)  # about where the face lies in a frame: x0, y0, x1, y1 px


@cache
def portrait() -> np.ndarray:
    """scikit-image's astronaut (NASA), (192, 256, 3) uint8 RGB."""
    from skimage import data

    return np.ascontiguousarray(data.astronaut()[10:202, 100:356])


def frame(number: int = 0, *, fake: bool = False) -> np.ndarray:
    """The portrait a few pixels further to the right each frame; a fake has a recoloured face."""
    image = np.roll(portrait(), number, axis=1).copy()
    if fake:
        x0, y0, x1, y1 = FACE
        image[y0:y1, x0 + number : x1 + number, 2] //= 2
    return image


def mask_frame(number: int = 0) -> np.ndarray:
    """Where `frame(number, fake=True)` differs, as a white rectangle."""
    mask = np.zeros_like(portrait())
    x0, y0, x1, y1 = FACE
    mask[y0:y1, x0 + number : x1 + number] = 255
    return mask


def clip(path: Path, *, fake: bool = False, mask: bool = False, count: int = 6) -> Path:
    """A video of `count` frames at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = portrait().shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (width, height))
    for number in range(count):
        image = mask_frame(number) if mask else frame(number, fake=fake)
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def picture(path: Path, number: int = 0, *, fake: bool = False, mask: bool = False) -> Path:
    """A picture at `path`, its format by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = mask_frame(number) if mask else frame(number, fake=fake)
    cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return path


def write_json(path: Path, content: object) -> Path:
    """A JSON file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def empty(root: Path, *names: str) -> None:
    """Files of nothing, for what looks at names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def faceforensics(root: Path, *, pairs: int = 3, count: int = 6) -> Path:
    """Pairs 000/001, 002/003, ...: reals, their Deepfakes with masks, and split lists that give the last pair to val."""
    numbers = [(f"{2 * i:03d}", f"{2 * i + 1:03d}") for i in range(pairs)]
    for a, b in numbers:
        for own, other in ((a, b), (b, a)):
            clip(root / f"original_sequences/youtube/c23/videos/{own}.mp4", count=count)
            clip(root / f"manipulated_sequences/Deepfakes/c23/videos/{own}_{other}.mp4", fake=True, count=count)
            clip(root / f"manipulated_sequences/Deepfakes/masks/videos/{own}_{other}.mp4", mask=True, count=count)
    write_json(root / "splits/train.json", numbers[:-1])
    write_json(root / "splits/val.json", numbers[-1:])
    write_json(root / "splits/test.json", [])
    return root


def pictures(root: Path, count: int) -> Path:
    """`count` JPEGs of 512 px, half of them fake, no two alike."""
    from skimage import data

    photo = data.astronaut()
    for number in range(count):
        image = np.roll(photo, (number % 23, number % 61), axis=(0, 1))
        name, noise = ("real", "fake")[number % 2], np.random.default_rng(number).normal(0, 4, image.shape)
        path = root / name / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.clip(image + noise, 0, 255).astype(np.uint8)[:, :, ::-1])
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=0)
    args = parser.parse_args()
    print(faceforensics(args.out, pairs=args.pairs, count=100) if args.pairs else pictures(args.out, args.pictures))
