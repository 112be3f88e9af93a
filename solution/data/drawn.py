"""Drawn pictures for measurements that need no data: seeded, uint8 RGB (S, S, 3), the same function of their arguments."""

from __future__ import annotations

import cv2
import numpy as np


def photo_like(side: int, seed: int = 0) -> np.ndarray:
    """(side, side, 3) uint8: a seeded random picture with the 1/f spectrum and the channel correlation of photographs."""
    rng = np.random.default_rng(seed)
    down, across = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    radius = np.hypot(down, across)
    radius[0, 0] = np.inf
    noise = rng.standard_normal((3, side, side))
    planes = np.fft.irfft2(np.fft.rfft2(noise) / radius, s=(side, side))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    picture = 128 + 50 * (0.9 * planes[:1] + 0.44 * planes)
    return np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def drawn_face(side: int, seed: int) -> np.ndarray:
    """(side, side, 3) uint8: a drawn face on a noisy ground."""
    rng = np.random.default_rng(seed)
    unit = side / 256
    picture = np.full((side, side, 3), rng.integers(60, 120, 3), np.uint8)

    def blob(x, y, a, b, colour):
        centre, axes = (int(x * unit), int(y * unit)), (int(a * unit), int(b * unit))
        cv2.ellipse(picture, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA)

    skin = [int(v) for v in np.array([224, 172, 140]) + rng.integers(-20, 20, 3)]
    blob(128, 110, 86, 108, (50, 35, 30))
    blob(128, 132, 70, 92, skin)
    for x in (100, 156):
        blob(x, 116, 14, 8, (245, 245, 245))
        blob(x, 116, 6, 7, (40, 30, 25))
        blob(x, 99, 17, 4, (60, 40, 35))
    blob(128, 148, 8, 14, [int(0.85 * v) for v in skin])
    blob(128, 182, 24, 8, (160, 60, 70))
    picture = cv2.GaussianBlur(picture, (0, 0), 1.2 * unit).astype(np.float32)
    return np.clip(picture + rng.normal(0, 5, picture.shape), 0, 255).astype(np.uint8)


def textured_faces(side: int, count: int) -> np.ndarray:
    """(count, side, side, 3) uint8: drawn faces, half covered with a photograph's spectrum."""
    pairs = [(drawn_face(side, seed), photo_like(side, seed)) for seed in range(count)]
    return np.stack([((face.astype(np.uint16) + photo) // 2).astype(np.uint8) for face, photo in pairs])
