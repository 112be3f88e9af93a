"""Draws a handful of seeded "portraits", half of them with a foreign patch, and their manifest: data for smoke runs."""

import argparse
import csv
from pathlib import Path

import cv2
import numpy as np


def portrait(rng: np.random.Generator, side: int = 96) -> np.ndarray:
    """A shaded oval on a gradient with grain, (side, side, 3) uint8 RGB."""
    ramp = np.linspace(0, 1, side)[:, None, None] * rng.uniform(40, 120, 3)
    image = np.broadcast_to(ramp + rng.uniform(20, 90, 3), (side, side, 3)).copy()
    centre = (side // 2, side // 2)
    axes = (int(side * 0.28), int(side * 0.38))
    cv2.ellipse(image, centre, axes, 0, 0, 360, rng.uniform(120, 230, 3).tolist(), -1)
    for x in (-0.11, 0.11):
        eye = (int(side * (0.5 + x)), int(side * 0.42))
        cv2.circle(image, eye, side // 24, (30, 25, 20), -1)
    image = cv2.GaussianBlur(image, (0, 0), 1.0) + rng.normal(0, 6, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def forge(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture with a smooth, colour-shifted patch where the face is."""
    side = image.shape[0]
    mask = np.zeros(image.shape[:2], np.float32)
    cv2.ellipse(mask, (side // 2, side // 2), (side // 5, side // 4), 0, 0, 360, 1.0, -1)
    mask = cv2.GaussianBlur(mask, (0, 0), 2)[:, :, None]
    patch = cv2.GaussianBlur(image, (0, 0), 3).astype(np.float32)
    patch += rng.uniform(15, 40, 3)
    return np.clip(image * (1 - mask) + patch * mask, 0, 255).astype(np.uint8)


def write(folder: Path, *, train: int = 24, val: int = 16, seed: int = 0) -> Path:
    """Pictures and `manifest.csv` in `folder`; returns the manifest's path."""
    rng = np.random.default_rng(seed)
    rows = []
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            label = index % 2
            image = portrait(rng)
            image = forge(image, rng) if label else image
            name = f"{split}/{('real', 'fake')[label]}/{index:03d}.png"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image[:, :, ::-1])
            rows.append([name, label, f"drawn{index // 2 % 2}", split])
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "source", "split"])
        writer.writerows(rows)
    return manifest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    print(write(parser.parse_args().out))
