"""One raw video or picture to face crops and their masks on disk, cut from one track, the same place in both of a pair.

Takes an `Entry` and the root it lies in; writes JPEGs (and PNG masks, 0 or 255) under an output folder, each whole or not at
all, and gives a `Record` of what was written. Square crops stay inside the picture: black corners would tell the label.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from solution.config import FaceConfig
from solution.data.faces import FaceLocator, choose_face, choose_track
from solution.data.images import UnreadableInput, decode_image
from solution.data.raw import WHOLE, Entry
from solution.data.videos import middle_places, sample_frames
from solution.io import atomic_file
from solution.records import FaceBox

MASK_LEVEL = 32  # of 255: above lies what is forged; masks that were compressed as videos ring below it
Square = tuple[int, int, int, int]


@dataclass(frozen=True)
class CropSettings:
    """What decides the pixels. frames: of each video. crop: side of the square over the face's longer side; 0: uncut."""

    frames: int = 32
    crop: float = 1.3
    quality: int = 95


@dataclass
class Record:
    """What became of one entry. rows: (frame, picture, mask), paths relative to the output, frame -1 for a picture.

    squares: frame -> where it was cut; size: (height, width) px of the source; passed: frames left out, by reason; failed:
    why nothing could be read, empty when it could. cpu: seconds of the processor for decoding, faces, writing.
    """

    name: str
    stamp: tuple[int, int] = (0, 0)
    rows: list[tuple[int, str, str]] = field(default_factory=list)
    squares: dict[int, Square] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    passed: dict[str, int] = field(default_factory=dict)
    failed: str = ""
    cpu: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` reads back."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Record:
        """The record that `to_json` wrote."""
        values["squares"] = {int(k): tuple(v) for k, v in values["squares"].items()}
        values["rows"] = [tuple(row) for row in values["rows"]]
        return Record(**values | {"stamp": tuple(values["stamp"]), "size": tuple(values["size"])})

    def count(self, reason: str) -> None:
        """One more frame left out for `reason`."""
        self.passed[reason] = self.passed.get(reason, 0) + 1


def stamp(root: Path, entry: Entry) -> tuple[int, int]:
    """Bytes and newest change (ns) of an entry's files and masks; (-1, -1) where one is not there."""
    try:
        found = [(root / name).stat() for name in (*entry.files, *entry.masks) if name != WHOLE]
    except OSError:
        return -1, -1
    return sum(f.st_size for f in found), max(f.st_mtime_ns for f in found)


def safe_name(name: str) -> str:
    """An entry's name as a path that every file system and CSV takes; other names stay different ones."""
    safe = re.sub(r"[^\w./+@=-]", "_", name, flags=re.ASCII)
    return safe if safe == name else f"{safe}-{zlib.crc32(name.encode('utf-8', 'surrogateescape')):08x}"


class Cropper:
    """Prepares entries of one root into one output folder; holds the face detector of its process."""

    def __init__(self, root: Path, out: Path, settings: CropSettings) -> None:
        self.root, self.out, self.settings = root, out, settings
        # In a raw video a face is small; what is found is cut out, however small.
        self.face = FaceConfig(min_area=0.0)
        self.locator = FaceLocator(self.face)

    def prepare(self, entry: Entry, place: Record | None = None) -> Record:
        """Cut `entry`, at the squares of `place` (the real video of its pair) where those fit; see `Record`.

        Raises:
            FaceDetectorMissing: no face detector here. OSError: the output cannot be written.
        """
        record = Record(entry.name, stamp(self.root, entry))
        start = time.process_time()
        try:
            frames = self._frames(entry, record)
        except UnreadableInput as error:
            record.failed = error.reason
            return record
        try:
            masks = self._masks(entry, [number for number, _ in frames], record)
        except UnreadableInput as error:
            record.count(f"unreadable mask, {error.reason} (frames kept, mask unknown)")
            masks = {}
        decoded = time.process_time()
        record.size = frames[0][1].shape[:2]
        squares = self._squares(entry, frames, place)
        searched = time.process_time()
        for (number, image), square in zip(frames, squares):
            if square is None:
                record.count("no face found")
                continue
            if self.settings.crop:
                record.squares[number] = square
            self._write(entry, number, image, masks.get(number), square, record)
        written = time.process_time()
        record.cpu = {"decoding": decoded - start, "faces": searched - decoded, "writing": written - searched}
        return record

    # -- reading
    def _frames(self, entry: Entry, record: Record) -> list[tuple[int, np.ndarray]]:
        """(frame number, (H, W, 3) uint8 RGB); frames of another size than the first are left out."""
        if entry.kind == "video":
            return sample_frames(self.root / entry.files[0], self.settings.frames)
        if entry.kind == "picture":
            return [(-1, decode_image(self.root / entry.files[0]))]
        names = sorted(entry.files, key=_frame_order)
        chosen = [names[place] for place in middle_places(len(names), self.settings.frames)]
        frames, reason = [], None
        for place, name in enumerate(chosen):
            try:
                image = decode_image(self.root / name)
            except UnreadableInput as error:
                reason = error
                record.count("unreadable frame")
                continue
            if frames and image.shape != frames[0][1].shape and len(entry.files) > 1 and self.settings.crop:
                record.count("frame of another size")
                continue
            frames.append((_frame_number(name, place), image))
        if not frames:
            raise reason or UnreadableInput(self.root / entry.name, "no frames")
        return frames

    def _masks(self, entry: Entry, numbers: Sequence[int], record: Record) -> dict[int, np.ndarray]:
        """Frame number -> (H, W) uint8 mask, 0 or 255, where one is known."""
        if not entry.masks or entry.masks == (WHOLE,):
            return {}
        if len(entry.masks) == 1 and entry.kind == "video" and _is_video(entry.masks[0]):
            found = dict(sample_frames(self.root / entry.masks[0], self.settings.frames))
            masks = {n: _binary(found[n]) for n in numbers if n in found}
        elif entry.kind == "picture":
            masks = {-1: _binary(decode_image(self.root / entry.masks[0]))}
        else:
            names = {
                _frame_number(name, place): name for place, name in enumerate(sorted(entry.masks, key=_frame_order))
            }
            masks = {n: _binary(decode_image(self.root / names[n])) for n in numbers if n in names}
        if missing := len(numbers) - len(masks):
            record.passed["frame without its mask (kept, mask unknown)"] = missing
        return masks

    # -- where to cut
    def _squares(
        self, entry: Entry, frames: Sequence[tuple[int, np.ndarray]], place: Record | None
    ) -> list[Square | None]:
        height, width = frames[0][1].shape[:2]
        if not self.settings.crop:
            return [(0, 0, image.shape[1], image.shape[0]) for _, image in frames]
        if place is not None and place.squares and place.size == (height, width):
            return [_square_at(number, place.squares) for number, _ in frames]
        found = [self.locator.locate(image) for _, image in frames]
        if entry.kind == "picture":
            chosen = [choose_face(found[0], height, width, self.face)]
        else:
            chosen = choose_track(found, height, width, self.face)
        return [None if box is None else inner_square(box, self.settings.crop, height, width) for box in chosen]

    # -- writing
    def _write(
        self, entry: Entry, number: int, image: np.ndarray, mask: np.ndarray | None, square: Square, record: Record
    ) -> None:
        x0, y0, x1, y1 = square
        own = safe_name(entry.name) + ("" if number < 0 else f"/{number:06d}")
        picture, mask_name = f"images/{own}.jpg", ""
        if entry.masks == (WHOLE,):
            mask_name = WHOLE
        elif mask is not None:
            if mask.shape != image.shape[:2]:
                mask = cv2.resize(mask, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_NEAREST)
            mask = mask[y0:y1, x0:x1]
            if mask.any():
                mask_name = f"masks/{own}.png"
                save_picture(self.out / mask_name, mask, [])
            else:
                record.count("empty mask in a fake (kept, mask unknown)")
        options = [
            *(cv2.IMWRITE_JPEG_QUALITY, self.settings.quality),
            # Colour at full resolution: a quarter of it is what a generator's traces can lie in.
            *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
        ]
        save_picture(self.out / picture, cv2.cvtColor(image[y0:y1, x0:x1], cv2.COLOR_RGB2BGR), options)
        record.rows.append((number, picture, mask_name))


def inner_square(face: FaceBox, margin: float, height: int, width: int) -> Square:
    """The square of `margin` times the face's longer side about its centre, moved and if need be shrunk into the picture."""
    side = round(max(face.x1 - face.x0, face.y1 - face.y0) * margin)
    side = max(1, min(side, height, width))
    x0 = min(max(0, round((face.x0 + face.x1 - side) / 2)), width - side)
    y0 = min(max(0, round((face.y0 + face.y1 - side) / 2)), height - side)
    return x0, y0, x0 + side, y0 + side


def _square_at(number: int, squares: Mapping[int, Square]) -> Square:
    """The square of the frame nearest in time: in a pair the frames are the same ones."""
    return squares[min(squares, key=lambda known: abs(known - number))]


def _binary(mask: np.ndarray) -> np.ndarray:
    """A mask picture of any scale or colour, (H, W, 3) uint8 -> (H, W) uint8, 0 or 255."""
    grey = mask.max(axis=2)
    level = 0 if grey.max(initial=0) <= 1 else MASK_LEVEL
    return np.where(grey > level, 255, 0).astype(np.uint8)


def _is_video(name: str) -> bool:
    return name.lower().endswith((".mp4", ".mov", ".avi", ".mkv", ".webm"))


def _frame_number(name: str, place: int) -> int:
    digits = re.findall(r"\d+", name.rpartition("/")[2].rpartition(".")[0])
    return int(digits[-1]) if digits else place


def _frame_order(name: str) -> tuple[int, str]:
    """Frames in the order of their number: 2.png before 10.png."""
    return _frame_number(name, 0), name


def save_picture(path: Path, image: np.ndarray, options: Sequence[int]) -> None:
    """Write `path`, its folder too, as its suffix says: (H, W) grey or (H, W, 3) BGR, whole or not at all."""
    done, data = cv2.imencode(path.suffix, np.ascontiguousarray(image), list(options))
    if not done:
        raise OSError(f"{path}: OpenCV cannot encode {image.shape}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, binary=True) as file:
        file.write(data.tobytes())
