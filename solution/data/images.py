"""Find and decode pictures and video frames to uint8 RGB HWC, or fail naming the file.

Takes paths; returns `Input` records and (H, W, 3) uint8 RGB arrays, row 0 at the top as a viewer shows the picture.
Pictures go through Pillow: OpenCV's JPEG decoder gives the same pixels 1.4 times as fast (0.19 ms against 0.27 ms on
224 px faces), but fills what a truncated file lacks with grey and does not say so.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, overload

import cv2
import numpy as np
from PIL import Image, ImageFile

from solution.errors import KitError, UsageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow's names
MAX_PIXELS = 1 << 27  # 134 M: a 108-megapixel phone picture passes, 400 MB decoded

_TURN = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ERRORS_ONLY = 2  # of OpenCV's log levels
_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class InputError(UsageError):
    """Nothing to score, or a list that cannot be read: names the path, what was found and what was expected."""


class UnreadableInput(KitError):
    """One picture or video that cannot be read: `path`, and `reason` (what was found, what was expected)."""

    def __init__(self, path: Path | str, reason: str = "") -> None:
        # A loader's worker hands on its message alone, as the first argument.
        super().__init__(path, reason)  # both, so that it survives pickling to and fro
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return ": ".join(filter(None, (printable(str(self.path)), self.reason)))


class Input(NamedTuple):
    """One thing to score. `name` is its POSIX path relative to the input folder: scores join by it."""

    name: str
    path: Path
    kind: str  # "image" or "video"


class Inputs(Sequence[Input]):
    """A read-only list of `Input` that keeps names only, so that a million of them cost about 100 MB and no more."""

    def __init__(self, root: Path, names: list[str], renamed: dict[str, str]) -> None:
        self._root, self._names, self._renamed = root, names, renamed

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Input: ...
    @overload
    def __getitem__(self, index: slice) -> Inputs: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Inputs(self._root, self._names[index], self._renamed)
        name = self._names[index]
        return Input(name, self._root / self._renamed.get(name, name), _kind(name))


def _kind(name: str) -> str:
    return "video" if _suffix(name) in VIDEO_SUFFIXES else "image"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def printable(name: str) -> str:
    r"""`name` with control characters and bytes that are not UTF-8 written as \xNN; equal when there are none."""
    return _UNPRINTABLE.sub(lambda m: f"\\x{ord(m[0]) & 0xFF:02x}", name)


# ---------------------------------------------------------------------------------------------------- finding
def find_inputs(source: Path) -> Inputs:
    """The pictures and videos that `source` names, sorted by name.

    source: a folder (walked with its sub-folders and links), a picture, a video, or a .txt file with one path a line
        (relative to the list's folder; blank lines and lines that begin with # are skipped; what it names is taken for
        a picture unless its suffix says video).

    What a suffix of `IMAGE_SUFFIXES` or `VIDEO_SUFFIXES` promises is listed even if it turns out unreadable, an empty
    folder called x.png included. A name with control characters or bytes that are not UTF-8 is written with \\xNN.

    Raises:
        InputError: nothing there, nothing to score in it, a folder that may not be read, a name listed twice.
    """
    source = Path(source)
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise InputError(
            f"{printable(str(source))}: {error.strerror or error}; expected a folder, a picture, a video, "
            "or a .txt list of paths"
        ) from None
    if stat.S_ISDIR(mode):
        names = list(_walk(str(source), "", frozenset()))
        if not names:
            known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise InputError(f"{source}: no pictures or videos in it; looked for {known}")
        return _inputs(source, names)
    if _suffix(source.name) == ".txt":
        return _inputs(source.parent, _read_list(source))
    if _suffix(source.name) in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return _inputs(source.parent, [source.name])
    known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    raise InputError(
        f"{printable(str(source))}: suffix {source.suffix!r} is not known; expected a folder, "
        f"a .txt list of paths, or one of {known}"
    )


def _inputs(root: Path, names: list[str]) -> Inputs:
    """Names as the file system has them -> `Inputs` whose names print and are unique."""
    taken, renamed, shown = set(names), {}, []
    for name in sorted(names):
        clean = printable(name)
        if clean != name:
            while clean in taken:  # a file may really be called a\x0ab.png
                clean = "_" + clean
            taken.add(clean)
            renamed[clean] = name
        shown.append(clean)
    return Inputs(root, sorted(shown), renamed)


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """POSIX names below `folder`, each with `prefix`; `above` are the folders around it, so that a link cannot loop."""
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    try:
        here = os.stat(folder)
        inside = above | {(here.st_dev, here.st_ino)}
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(
            f"{printable(folder)}: {error.strerror or error}; a folder that cannot be read may hide pictures: "
            "make it readable or take it out"
        ) from None
    for entry in entries:
        empty = True
        if _is_folder(entry):
            found = os.stat(entry.path)
            if (found.st_dev, found.st_ino) not in inside:
                for name in _walk(entry.path, f"{prefix}{entry.name}/", inside):
                    empty = False
                    yield name
        if empty and _suffix(entry.name) in known:
            yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points at itself: no folder, and its suffix says whether it is listed
        return False


def _read_list(source: Path) -> list[str]:
    try:
        text = source.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}") from None
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("#"):
            continue
        name = PurePosixPath(line).as_posix()
        if name in seen:
            raise InputError(
                f"{source}, line {number}: {printable(name)} stands on line {seen[name]} already; "
                "scores join by name, so list each picture once"
            )
        seen[name] = number
    if not seen:
        raise InputError(f"{source}: the list is empty; expected one path a line")
    return list(seen)


# ---------------------------------------------------------------------------------------------------- pictures
def decode_image(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture at `path` as (H, W, 3) uint8 RGB.

    The content decides, not the suffix (a GIF or a multi-page TIFF gives its first frame). EXIF orientation is
    applied; grey, palette, YCbCr and CMYK become RGB (an embedded colour profile is not applied); 16 bits are scaled
    to 8; transparent parts become black, as the padding of a face crop is.

    max_pixels: larger pictures are refused before they are decoded (Pillow itself refuses above 179 M).

    Raises:
        UnreadableInput: no regular file, no picture, truncated (never a part of a picture), damaged, too large.
    """
    with _open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is either harmless or refused here
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # a process-wide switch that some libraries leave on
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise UnreadableInput(
                        path,
                        f"{image.width}x{image.height} px; at most {max_pixels} px",
                    )
                image.load()
                return _to_rgb(_upright(image))
        except UnreadableInput:
            raise
        except Image.UnidentifiedImageError:
            raise UnreadableInput(path, f"not a picture of a kind read here ({', '.join(FORMATS)})") from None
        except Image.DecompressionBombError as error:
            raise UnreadableInput(path, f"too large: {error}") from None
        except Exception as error:  # Pillow's plugins raise anything on damaged files
            raise UnreadableInput(path, f"damaged picture ({type(error).__name__}: {error})") from error


def _open(path: Path | str) -> BinaryIO:
    """A regular, non-empty file, opened; a named pipe would wait for ever and a device never end."""
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise UnreadableInput(path, "a folder, not a file")
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableInput(path, "not a regular file")
        if found.st_size == 0:
            raise UnreadableInput(path, "the file is empty (0 bytes)")
        return open(path, "rb")
    except OSError as error:
        raise UnreadableInput(path, error.strerror or str(error)) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURN.get(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, KeyError, TypeError, OSError):
        turn = None  # damaged metadata around sound pixels: viewers show them as they lie
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """A loaded Pillow picture of any mode -> (H, W, 3) uint8."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        grey = ((grey * 255 + 32767) // 65535).astype(np.uint8)  # rounded, 65535 -> 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed range; save as 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return np.array(image.convert("RGB"))


def resize_image(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """`image` (H, W) or (H, W, C) brought to (height, width): area when shrinking, cubic when growing.

    An axis that shrinks while the other grows is shrunk first. Nothing is resampled when the size is right already.
    Source: the published streams' preprocessing.
    """
    for w, h, how in (
        (min(width, image.shape[1]), min(height, image.shape[0]), cv2.INTER_AREA),
        (width, height, cv2.INTER_CUBIC),
    ):
        if (h, w) != image.shape[:2]:
            image = cv2.resize(image, (w, h), interpolation=how)
    return image


# ---------------------------------------------------------------------------------------------------- video
class _Clip(NamedTuple):
    """What a pass over the packets tells, without decoding any: 5 to 15 ms for a ten-second clip."""

    times: list[float]  # ms, of each frame in the order shown
    keyframes: list[int]  # positions among the packets where decoding can begin
    claimed: int  # frames that the header promises, 0 when it does not say
    fps: float


def sample_frames(path: Path | str, count: int) -> list[tuple[int, np.ndarray]]:
    """`count` evenly spaced frames of a video: (frame number from 0, (H, W, 3) uint8 RGB), in order.

    The middle frames of `count` equal parts; every frame when the video has no more than `count`. Stored rotation is
    applied. Frames are skipped by seeking where a keyframe lies on the way (going from frame to frame is 3 to 6 times
    as fast as asking OpenCV to seek to each of 32 frames of a ten-second clip with keyframes 250 apart), and a frame
    found by seeking must carry the expected time stamp, else the video is read from its beginning. Memory: the
    frames, 6 MB each at 1920x1080.

    Raises:
        UnreadableInput: no regular file, no video, no frames, or more than 2 % of what the header promises is missing.
    """
    if count < 1:
        raise ValueError(f"count is {count}; at least one frame must be asked for")
    with _open(path) as file, _quiet():
        clip = _scan(path, file)
        total = len(clip.times)
        wanted = [int((i + 0.5) * total / count) for i in range(count)]
        if total <= count:
            wanted = list(range(total))
        frames, _ = _read_frames(path, file, wanted, clip, seek=True)
        if frames is None:
            frames, reached = _read_frames(path, file, wanted, clip, seek=False)
        if frames is None:
            raise UnreadableInput(
                path,
                f"frame {reached} of {total} cannot be decoded; the video is damaged",
            )
    return frames


def _open_video(path: Path | str, file: BinaryIO, *options: int) -> cv2.VideoCapture:
    # From a stream: OpenCV cannot take a name that is not UTF-8, and FFmpeg gives some names a meaning.
    file.seek(0)
    capture = cv2.VideoCapture(file, cv2.CAP_FFMPEG, list(options))
    if not capture.isOpened():
        raise UnreadableInput(path, "not a video that can be read, or truncated before its index")
    return capture


def _scan(path: Path | str, file: BinaryIO) -> _Clip:
    raw = _open_video(path, file, cv2.CAP_PROP_FORMAT, -1)  # packets, not pictures
    claimed = max(0, int(raw.get(cv2.CAP_PROP_FRAME_COUNT)))
    fps = raw.get(cv2.CAP_PROP_FPS)
    times, keyframes = [], []
    while raw.grab():
        if raw.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME):
            keyframes.append(len(times))
        times.append(raw.get(cv2.CAP_PROP_POS_MSEC))
    raw.release()
    times.sort()  # packets come in decoding order
    if not times:
        raise UnreadableInput(path, "no video frames in it; empty or truncated")
    # A stored count is exact; one estimated from duration and rate can be far off (variable rate), the time is not.
    frame = 1000 / fps if fps > 0 else 0.0
    short = claimed - len(times) > max(2, 0.02 * claimed)
    if short and times[-1] - times[0] + 3 * frame < 0.98 * claimed * frame:
        raise UnreadableInput(path, f"truncated: {len(times)} of {claimed} frames are there")
    return _Clip(times, keyframes, claimed, fps)


def _read_frames(
    path: Path | str, file: BinaryIO, wanted: list[int], clip: _Clip, *, seek: bool
) -> tuple[list[tuple[int, np.ndarray]] | None, int]:
    """The frames `wanted` (rising), or None when one is not there or not the right one; and how far it came."""
    capture = _open_video(path, file)
    frames, position = [], 0  # position: number of the frame that grab() gives next
    for index in wanted:
        jumped = seek and _seek_pays(clip.keyframes, position, index)
        if jumped:
            if not capture.set(cv2.CAP_PROP_POS_FRAMES, index):
                return None, position
            position = index
        while position <= index:
            if not capture.grab():
                return None, position
            position += 1
        if jumped and abs(capture.get(cv2.CAP_PROP_POS_MSEC) - clip.times[index]) > 1.0:
            return None, position
        ok, frame = capture.retrieve()
        if not ok:
            return None, position
        frames.append((index, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
    capture.release()
    return frames, position


def _seek_pays(keyframes: list[int], position: int, index: int) -> bool:
    # OpenCV seeks to the last keyframe at least 16 frames ahead of the goal and decodes from there; it must skip
    # some frames to be worth the decoder's restart.
    before = bisect.bisect_right(keyframes, index - 16)
    return before > 0 and keyframes[before - 1] > position + 16


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No messages of OpenCV and FFmpeg on stderr: what goes wrong is raised."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read once, at the first video
    # OpenCV 4.12 has these two at its top, 4.14 there alone.
    logging = getattr(cv2.utils, "logging", cv2)
    level = logging.getLogLevel()
    logging.setLogLevel(_ERRORS_ONLY)
    try:
        yield
    finally:
        logging.setLogLevel(level)
