"""What an MP4 or MOV file says of its video tracks, which OpenCV does not: how long each is, and what its edit list hides.

Takes an opened file; gives `Movie`, or None for a file of another kind. Source: ISO/IEC 14496-12, the boxes of `moov`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_MOST = 1 << 28  # bytes of an index; that of a day of video has 100 MB
_HOLDERS = frozenset({b"edts", b"mdia"})


@dataclass(frozen=True)
class Track:
    """A video track. seconds: of the media in it; shown: of these what its edit list shows; at: of its box's name."""

    seconds: float
    shown: float
    at: int


@dataclass(frozen=True)
class Movie:
    """The video tracks of a file, in its order."""

    tracks: tuple[Track, ...]

    @property
    def longest(self) -> Track:
        """The track that is the video; of equally long ones the first."""
        return max(self.tracks, key=lambda track: track.seconds)

    def with_longest(self, file: BinaryIO) -> BinaryIO:
        """`file` as if the other video tracks were not in it."""
        others = [track.at for track in self.tracks if track is not self.longest]
        return io.BufferedReader(_Without(file, others)) if others else file


def read_movie(file: BinaryIO) -> Movie | None:
    """The index of an MP4 or MOV file; None where there is none (another kind, or cut before it)."""
    end = file.seek(0, io.SEEK_END)
    at = 0
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        size, kind = struct.unpack(">I4s", head[:8])
        header = 8
        if size == 1 and len(head) == 16:
            size, header = struct.unpack(">Q", head[8:])[0], 16
        elif size == 0:
            size = end - at
        if at == 0 and kind not in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
            return None
        if kind == b"moov" and size <= _MOST:
            file.seek(at + header)
            return _movie(file.read(size - header), at + header)
        if size < header:
            return None
        at += size
    return None


def _movie(content: bytes, offset: int) -> Movie | None:
    scale, tracks = 0, []
    for kind, start, end in _boxes(content, 0, len(content)):
        if kind == b"mvhd":
            scale, _ = _scale(content[start:end])
        elif kind == b"trak":
            found = dict(_inner(content, start, end))
            if found.get(b"hdlr", b"")[8:12] != b"vide" or b"mdhd" not in found:
                continue
            units, length = _scale(found[b"mdhd"])
            seconds = length / units if units else 0.0
            shown = _shown(found[b"elst"], scale) if b"elst" in found and scale else seconds
            tracks.append(Track(seconds, min(seconds, shown), offset + start - 4))
    return Movie(tuple(tracks))


def _boxes(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its content begins, where it ends) of the boxes from `start` to `end`."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", content, start)
        if not 8 <= size <= end - start:
            return
        yield kind, start + 8, start + size
        start += size


def _inner(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    for kind, first, last in _boxes(content, start, end):
        if kind in _HOLDERS:
            yield from _inner(content, first, last)
        else:
            yield kind, content[first:last]


def _scale(box: bytes) -> tuple[int, int]:
    """Units a second and the duration in them, of `mvhd` or `mdhd`; zeros for a box that is cut."""
    form = ">4xQQIQ" if box[:1] == b"\1" else ">4xIIII"
    if len(box) < struct.calcsize(form):
        return 0, 0
    return struct.unpack_from(form, box)[2:]


def _shown(box: bytes, scale: int) -> float:
    """Seconds of media that an edit list shows; its empty edits show none."""
    form = ">Qq4x" if box[:1] == b"\1" else ">Ii4x"
    size, entries = struct.calcsize(form), box[8:]
    edits = [struct.unpack_from(form, entries, at) for at in range(0, len(entries) - size + 1, size)]
    return sum(length for length, begin in edits if begin >= 0) / scale


class _Without(io.RawIOBase):
    """A file in which boxes, given by where their names stand, are called `free`: space that nobody reads."""

    def __init__(self, file: BinaryIO, names: list[int]) -> None:
        self.file, self.names = file, names

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:
        start = self.file.tell()
        content = bytearray(self.file.read(len(buffer)))
        for at in self.names:
            for place, letter in enumerate(b"free", start=at - start):
                if 0 <= place < len(content):
                    content[place] = letter
        buffer[: len(content)] = content
        return len(content)
