"""The one path from a file to what members see: decode -> degrade -> locate -> choose -> cut.

Takes paths or pictures (H, W, 3) uint8 RGB; gives views (side, side, 3) uint8 RGB, one for each distinct `View`.
Training, validation, scoring, the studies and the benchmarks all come through here, so that a member is trained,
measured and asked on the same pixels. Seeds are those of names: nothing depends on the order of the pictures.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from solution.config import DegradationConfig, FaceConfig, MemberConfig, ViewConfig
from solution.data.degradation import degrade
from solution.data.faces import (
    FaceLocator,
    choose_face,
    choose_track,
    locate_once,
    make_view,
    share_locators,
)
from solution.data.images import decode_image, stable_seed
from solution.data.processes import limit_memory
from solution.data.videos import sample_frames
from solution.records import FaceBox

Chosen = Mapping[FaceConfig, FaceBox | None]


class View(NamedTuple):
    """What some members see. face: how faces are located for it; None: it needs none."""

    view: ViewConfig
    face: FaceConfig | None

    @classmethod
    def of(cls, config: MemberConfig) -> View:
        """The view of a member that scores."""
        return cls(config.seen, config.face if config.view.source == "face" else None)


# ------------------------------------------------------------------------------------------------ decode, degrade
def degraded_picture(image: np.ndarray, name: str, degradation: DegradationConfig, seed: int) -> np.ndarray:
    """The picture as every member sees it degraded: drawn from (seed, name) alone. uint8 in, uint8 out.

    The pasted patch of the distractor is cut from the picture's own mirror image: no second file decides a score.
    """
    rng = np.random.default_rng([seed, stable_seed(name)])
    return degrade(image, degradation, rng, image[:, ::-1])


def open_picture(
    path: Path | str, name: str, degradation: DegradationConfig | None = None, seed: int = 0
) -> np.ndarray:
    """The picture at `path`, (H, W, 3) uint8, degraded at its own size where `degradation` is given.

    Raises:
        UnreadableInput: see `decode_image`.
    """
    image = decode_image(path)
    return image if degradation is None else degraded_picture(image, name, degradation, seed)


def open_frames(
    path: Path | str, name: str, count: int, degradation: DegradationConfig | None = None, seed: int = 0
) -> tuple[list[int], list[np.ndarray]]:
    """Numbers and pictures of `count` frames of a video, each degraded as the picture `NAME#NUMBER`.

    Raises:
        UnreadableInput: see `sample_frames`.
    """
    found = sample_frames(path, count)
    numbers, pictures = [n for n, _ in found], [p for _, p in found]
    if degradation is not None:
        pictures = [degraded_picture(p, f"{name}#{n}", degradation, seed) for n, p in found]
    return numbers, pictures


# ------------------------------------------------------------------------------------------------ locate, choose
def locators_for(views: Sequence[View]) -> dict[FaceConfig, FaceLocator]:
    """A locator for every way in which these views locate faces; none where no view needs a face."""
    return share_locators([view.face for view in views if view.face is not None])


def find_face(picture: np.ndarray, locator: FaceLocator) -> FaceBox | None:
    """The face that stands for the picture, searched and chosen as the locator's configuration says."""
    return choose_face(locator.locate(picture), *picture.shape[:2], locator.config)


def choose_faces(
    found: Mapping[FaceConfig, Sequence[FaceBox]], size: tuple[int, int]
) -> dict[FaceConfig, FaceBox | None]:
    """By face configuration, the chosen one of the faces found in a picture of `size` (height, width)."""
    return {config: choose_face(faces, *size, config) for config, faces in found.items()}


def choose_in_all(
    pictures: Sequence[np.ndarray], locators: Mapping[FaceConfig, FaceLocator], *, video: bool
) -> list[dict[FaceConfig, FaceBox | None]]:
    """For each picture, the chosen face by configuration; of a video's frames, one person's through all of them."""
    return choose_found([locate_once(locators, p) for p in pictures], [p.shape[:2] for p in pictures], video=video)


def choose_found(
    found: Sequence[Mapping[FaceConfig, Sequence[FaceBox]]], sizes: Sequence[tuple[int, int]], *, video: bool
) -> list[dict[FaceConfig, FaceBox | None]]:
    """`choose_in_all` of faces that were found before in pictures of these sizes (height, width)."""
    if not video:
        return [choose_faces(faces, size) for faces, size in zip(found, sizes)]
    tracks = {config: choose_track([faces[config] for faces in found], *sizes[0], config) for config in found[0]}
    return [{config: track[number] for config, track in tracks.items()} for number in range(len(found))]


# ------------------------------------------------------------------------------------------------ cut
def cut_views(picture: np.ndarray, views: Sequence[View], chosen: Chosen) -> list[np.ndarray]:
    """Every view (side, side, 3) of a picture (H, W, 3), both uint8; a face view without a face shows all of it."""
    return [make_view(picture, view, chosen.get(face), face or FaceConfig()) for view, face in views]


def close_views(views: Sequence[View]) -> list[View]:
    """The same views for one of several people: face views show the face, however large or small in the picture it is."""
    return [View(view, config and replace(config, min_area=0.0, max_area=1.0)) for view, config in views]


def see(picture: np.ndarray, views: Sequence[View], locators: Mapping[FaceConfig, FaceLocator]) -> list[np.ndarray]:
    """Locate, choose and cut: the views (side, side, 3) uint8 of a picture (H, W, 3) uint8."""
    (chosen,) = choose_in_all([picture], locators, video=False)
    return cut_views(picture, views, chosen)


# ------------------------------------------------------------------------------------------------ loaders
def quiet_worker(_: int) -> None:
    """A loader's worker: one thread of torch, limited memory, deaf to Ctrl-C, which is the main process's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limit_memory()


def stack_views(views: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 views (side, side, 3) -> (B, 3, side, side)."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()
