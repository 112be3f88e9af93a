"""A real picture beside a self-blended fake of it, as members see them: what `mechanisms` and `localize` measure on.

Takes an `Item` and views; gives per view uint8 RGB (S, S, 3) of both, and the fake's mask (S, S) float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from solution.config import FaceConfig
from solution.data.faces import FaceLocator, choose_face, locate_once
from solution.data.images import decode_image
from solution.data.manifest import Item
from solution.data.self_blend import blend_draws, self_blend
from solution.data.views import View, choose_faces, cut_views, degraded_picture
from solution.evaluation.measure import Condition


class Twins(NamedTuple):
    """real, fake: per view, (S, S, 3) uint8. masks: per view, (S, S) in [0, 1], 1 where the fake is forged."""

    real: list[np.ndarray]
    fake: list[np.ndarray]
    masks: list[np.ndarray]


def blended_twins(
    item: Item, views: Sequence[View], locators: Mapping[FaceConfig, FaceLocator], how: Condition, seed: int
) -> Twins:
    """A picture and a fake of it, drawn from (seed, name) alone: both under the condition, cut around the face that the
    clean picture has. Masks are cut like the pictures and never degraded. locators: one at least.

    Raises:
        UnreadableInput: see `decode_image`.
    """
    picture = decode_image(item.path)
    found, size = locate_once(locators, picture), picture.shape[:2]
    chosen = choose_faces(found, size)
    config, first = next(iter(found.items()))
    # The blend is there, whoever cuts it out.
    face = choose_face(first, *size, replace(config, min_area=0.0))
    fake, mask = self_blend(picture, face, blend_draws(seed, item.name))

    def seen(image: np.ndarray) -> list[np.ndarray]:
        if how.degradation is not None:
            image = degraded_picture(image, item.name, how.degradation, how.seed)
        return cut_views(image, views, chosen)

    # Resizing may overshoot.
    return Twins(seen(picture), seen(fake), [m.clip(0, 1) for m in cut_views(mask, views, chosen)])
