"""What a video file says of its video tracks, which OpenCV does not: how long each is, and what its edit list hides.

Takes an opened file; gives `Movie`, or None for a file of another kind than MP4, MOV, MKV, WebM and AVI. Sources: ISO/IEC
14496-12, the boxes of `moov`; RFC 8794 and 9559, the elements of Matroska; the RIFF chunks of AVI 1.0.
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
    """A video track. seconds: of the media in it, None where only its packets say that; shown: of these what its edit list
    shows. hidden: the bytes that make it none in the eyes of FFmpeg, and where they stand.
    """

    seconds: float | None
    shown: float
    hidden: tuple[int, bytes]


@dataclass(frozen=True)
class Movie:
    """The video tracks of a file, in its order. cover: as `Track.hidden`, of boxes with a picture that stands for the sound."""

    tracks: tuple[Track, ...]
    cover: tuple[tuple[int, bytes], ...] = ()

    def with_only(self, chosen: Track, file: BinaryIO) -> BinaryIO:
        """`file` as if it had neither its other video tracks nor a cover picture."""
        others = [*self.cover, *(track.hidden for track in self.tracks if track is not chosen)]
        return io.BufferedReader(_Without(file, others)) if others else file


def read_movie(file: BinaryIO) -> Movie | None:
    """The index of a video file; None where there is none (another kind, or cut before it)."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(12)
    if start[:4] == _EBML:
        return _matroska(file, end)
    if start[:4] == b"RIFF" and start[8:] == b"AVI ":
        return _avi(file)
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
    scale, tracks, cover = 0, [], []
    for kind, start, end in _boxes(content, 0, len(content)):
        if kind in (b"udta", b"meta") and b"covr" in content[start:end]:
            cover.append((offset + start - 4, b"free"))
        if kind == b"mvhd":
            scale, _ = _scale(content[start:end])
        elif kind == b"trak":
            found = dict(_inner(content, start, end))
            if found.get(b"hdlr", b"")[8:12] != b"vide" or b"mdhd" not in found:
                continue
            units, length = _scale(found[b"mdhd"])
            seconds = length / units if units else 0.0
            shown = _shown(found[b"elst"], scale) if b"elst" in found and scale else seconds
            tracks.append(Track(seconds, min(seconds, shown), (offset + start - 4, b"free")))
    return Movie(tuple(tracks), tuple(cover))


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


# ------------------------------------------------------------------------------------------------ MKV and WebM
_EBML, _SEGMENT, _TRACKS, _ENTRY, _KIND = (bytes.fromhex(i) for i in ("1A45DFA3", "18538067", "1654AE6B", "AE", "83"))
_VIDEO, _LOGO = b"\1", b"\x10"  # kinds of tracks; nobody decodes the second


def _matroska(file: BinaryIO, end: int) -> Movie | None:
    for segment, start, stop in _elements(file, 0, end):
        for tracks, first, last in _elements(file, start, stop) if segment == _SEGMENT else ():
            if tracks == _TRACKS and last - first <= _MOST:
                return Movie(tuple(_matroska_tracks(file, first, last)))
    return None


def _matroska_tracks(file: BinaryIO, start: int, end: int) -> Iterator[Track]:
    for entry, first, last in _elements(file, start, end):
        for kind, at, after in _elements(file, first, last) if entry == _ENTRY else ():
            file.seek(at)
            if kind == _KIND and after == at + 1 and file.read(1) == _VIDEO:
                yield Track(None, 0.0, (at, _LOGO))


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(id, where its content begins, where it ends) of the elements from `start` to `end`; one of unknown size is the last."""
    while start < end:
        file.seek(start)
        head = file.read(12)
        wide = 9 - head[0].bit_length() if head else 9
        if wide > 4 or len(head) <= wide or not head[wide]:
            return
        long = 9 - head[wide].bit_length()
        size = int.from_bytes(head[wide : wide + long], "big") & ((1 << 7 * long) - 1)
        first = start + wide + long
        unknown = size == (1 << 7 * long) - 1
        yield head[:wide], first, end if unknown else min(end, first + size)
        start = end if unknown else first + size


# ------------------------------------------------------------------------------------------------ AVI
_CHUNKS_OF_AVI = 1 << 20  # bytes at the beginning in which its header ends


def _avi(file: BinaryIO) -> Movie | None:
    file.seek(0)
    content = file.read(_CHUNKS_OF_AVI)
    for kind, start, end in _chunks(content, 12, len(content)):
        if kind == b"LIST" and content[start : start + 4] == b"hdrl":
            return Movie(tuple(_avi_tracks(content, start + 4, end)))
    return None


def _avi_tracks(content: bytes, start: int, end: int) -> Iterator[Track]:
    for kind, first, last in _chunks(content, start, end):
        if kind == b"LIST" and content[first : first + 4] == b"strl":
            for name, at, after in _chunks(content, first + 4, last):
                if name == b"strh" and content[at : at + 4] == b"vids" and after - at >= 36:
                    scale, rate, _, length = struct.unpack_from("<4I", content, at + 20)
                    seconds = length * scale / rate if rate else 0.0
                    yield Track(seconds, seconds, (at, b"txts"))


def _chunks(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its content begins, where it ends) of the RIFF chunks from `start` to `end`."""
    while start + 8 <= end:
        kind, size = struct.unpack_from("<4sI", content, start)
        yield kind, start + 8, min(end, start + 8 + size)
        start += 8 + size + size % 2


# ------------------------------------------------------------------------------------------------ one track alone
class _Without(io.RawIOBase):
    """A file that has other bytes at some places: (where they stand, the bytes)."""

    def __init__(self, file: BinaryIO, changes: list[tuple[int, bytes]]) -> None:
        self.file, self.changes = file, changes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:
        start = self.file.tell()
        content = bytearray(self.file.read(len(buffer)))
        for at, changed in self.changes:
            for place, letter in enumerate(changed, start=at - start):
                if 0 <= place < len(content):
                    content[place] = letter
        buffer[: len(content)] = content
        return len(content)
