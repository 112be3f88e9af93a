"""Sample the frames of a video, uint8 RGB HWC, evenly and without decoding all of them, or fail naming the file.

Takes paths; returns frame numbers from 0 with (H, W, 3) uint8 RGB arrays, upright as a player shows them. Decoding is
OpenCV's FFmpeg, fed from an opened file.

Damage is told where a frame is missing, not where it is wrong: what FFmpeg cannot decode of a frame it fills from the
frames around it, and says so in its log alone. OpenCV opens the decoder without options (`err_detect` in
OPENCV_FFMPEG_CAPTURE_OPTIONS reaches the container's reader only) and hands no mark of it on. With 4,000 random bytes
among its data a video in MPEG-4, VP8 or VP9 is read as if it were sound, and so is one in Motion JPEG unless they hit
the beginning of a frame.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np

from solution.data.images import UnreadableInput, open_regular
from solution.data.movie import Track, read_movie

_ERRORS_ONLY = 2  # of OpenCV's log levels
_NO_VIDEO = "no video track in it: sound, perhaps with a cover picture"
_COVER_RATE = 1000  # frames/s; FFmpeg gives a cover picture 90,000


class _Clip(NamedTuple):
    """What a pass over the packets tells, without decoding any: 5 to 15 ms for a ten-second clip."""

    times: list[float]  # ms, of each frame in the order shown
    keyframes: list[int]  # positions among the packets where decoding can begin
    claimed: int  # frames that the header promises, 0 when it does not say
    fps: float


def middle_places(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of `total` places, rising; every place where there are no more than `count`."""
    if total <= count:
        return list(range(total))
    return [int((i + 0.5) * total / count) for i in range(count)]


def sample_frames(path: Path | str, count: int) -> list[tuple[int, np.ndarray]]:
    """`count` evenly spaced frames of a video: (frame number from 0, (H, W, 3) uint8 RGB), in order.

    The middle frames of `count` equal parts; every frame when the video has no more than `count`. Stored rotation is
    applied. Of several video tracks the longest one is sampled, without the frames
    that an edit list hides. Frames are skipped by seeking where a keyframe lies on the way (going from frame to frame is 3 to 6 times
    as fast as asking OpenCV to seek to each of 32 frames of a ten-second clip with keyframes 250 apart), and a frame
    found by seeking must carry the expected time stamp, else the video is read from its beginning. Memory: the
    frames, 6 MB each at 1920x1080.

    Raises:
        UnreadableInput: no regular file, no video, sound alone, no frames, more than 2 % of what the header promises is
            missing, or the decoder gives no frame where one is wanted (it conceals most damage: see above).
    """
    if count < 1:
        raise ValueError(f"count is {count}; at least one frame must be asked for")
    with open_regular(path) as opened, _quiet():
        file, clip = _chosen(path, opened)
        total = len(clip.times)
        wanted = middle_places(total, count)
        frames, _ = _read_frames(path, file, wanted, clip, seek=True)
        if frames is None:
            frames, reached = _read_frames(path, file, wanted, clip, seek=False)
        if frames is None:
            raise UnreadableInput(
                path,
                f"frame {reached} of {total} cannot be decoded; the video is damaged",
            )
    return frames


def duration(path: Path | str) -> float:
    """Seconds from the first to the last frame's time.

    Raises:
        UnreadableInput: see `sample_frames`.
    """
    with open_regular(path) as file, _quiet():
        times = _chosen(path, file)[1].times
    return (times[-1] - times[0]) / 1000


def _chosen(path: Path | str, opened: BinaryIO) -> tuple[BinaryIO, _Clip]:
    """The file as if its longest video track were the only one, and what that holds."""
    movie = read_movie(opened)
    if movie is None:
        return opened, _scan(path, opened, None)
    if not movie.tracks:
        raise UnreadableInput(path, _NO_VIDEO)
    if all(track.seconds is not None for track in movie.tracks):
        longest = max(movie.tracks, key=lambda track: track.seconds or 0.0)  # of equally long ones the first
        file = movie.with_only(longest, opened)
        return file, _scan(path, file, longest)
    found, reason = [], None
    for track in movie.tracks:
        file = movie.with_only(track, opened)
        try:
            found.append((file, _scan(path, file, None)))
        except UnreadableInput as error:
            reason = error
    if not found:
        raise reason or UnreadableInput(path, _NO_VIDEO)
    return max(found, key=lambda one: one[1].times[-1] - one[1].times[0])


def _open_video(path: Path | str, file: BinaryIO, *options: int) -> cv2.VideoCapture:
    # From a stream: OpenCV cannot take a name that is not UTF-8, and FFmpeg gives some names a meaning.
    file.seek(0)
    capture = cv2.VideoCapture(file, cv2.CAP_FFMPEG, list(options))
    if not capture.isOpened():
        raise UnreadableInput(path, "not a video that can be read, or truncated before its index")
    return capture


def _scan(path: Path | str, file: BinaryIO, track: Track | None) -> _Clip:
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
    if len(times) == 1 and fps >= _COVER_RATE:
        raise UnreadableInput(path, _NO_VIDEO)
    packets = max(claimed, len(times))
    if track is not None and track.seconds and track.seconds - track.shown >= 1.5 * track.seconds / packets:
        return _visible(path, file, track, packets)
    # A stored count is exact; one estimated from duration and rate can be far off (variable rate), the time is not.
    frame = 1000 / fps if fps > 0 else 0.0
    short = claimed - len(times) > max(2, 0.02 * claimed)
    if short and times[-1] - times[0] + 3 * frame < 0.98 * claimed * frame:
        raise UnreadableInput(path, f"truncated: {len(times)} of {claimed} frames are there")
    return _Clip(times, keyframes, claimed, fps)


def _visible(path: Path | str, file: BinaryIO, track: Track, packets: int) -> _Clip:
    """The clip without the frames that its edit list hides (cut without encoding anew), found by decoding it once."""
    capture, times = _open_video(path, file), []
    fps = capture.get(cv2.CAP_PROP_FPS)
    while capture.grab():
        times.append(capture.get(cv2.CAP_PROP_POS_MSEC))
    capture.release()
    expected = packets * track.shown / track.seconds
    if not times or len(times) < 0.98 * expected - 2:
        raise UnreadableInput(
            path, f"{len(times)} of the {round(expected)} frames that it shows can be decoded; damaged"
        )
    # Without keyframes: what seeks to a hidden one would begin elsewhere.
    return _Clip(times, [], 0, fps)


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
