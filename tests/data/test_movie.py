"""Videos as phones, cutters and downloads leave them: edit lists, several tracks, rotation, sound with a cover picture."""

import struct

import cv2
import numpy as np
import pytest

from solution.data.images import UnreadableInput
from solution.data.movie import read_movie
from solution.data.videos import duration, sample_frames

HOLDERS = (b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl")


def clip(path, values, size=(64, 48), rate=10):
    """An MP4 of frames of one grey each."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    for value in values:
        writer.write(np.full((size[1], size[0], 3), value, np.uint8))
    writer.release()
    return path.read_bytes()


def boxes(content, start=0, end=None):
    """(name, where its box begins, where it ends) of every box, those within others after them."""
    end = len(content) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", content, start)
        yield kind, start, start + size
        if kind in HOLDERS:
            yield from boxes(content, start + 8, start + size)
        start += size


def find(content, name):
    return next((start, end) for kind, start, end in boxes(content) if kind == name)


def put(content, name, offset, new):
    """`content` with bytes at an offset in a box replaced."""
    at = find(content, name)[0] + 8 + offset
    return content[:at] + new + content[at + len(new) :]


def greys(path, count):
    return [round(float(frame.mean()) / 8) for _, frame in sample_frames(path, count)]


def with_edit(content, first, frames):
    """The clip with an edit list that shows `frames` frames from `first` on."""
    movie_scale, media_scale = (
        struct.unpack_from(">I", content, find(content, box)[0] + 8 + 12)[0] for box in (b"mvhd", b"mdhd")
    )
    entry = struct.pack(">Iii", frames * movie_scale // 10, first * media_scale // 10, 1 << 16)
    edit = struct.pack(">I4sI4sII", 36, b"edts", 28, b"elst", 0, 1) + entry
    content = bytearray(content)
    if b"edts" in (kind for kind, _, _ in boxes(content)):
        start, end = find(content, b"edts")
        content[start:end] = edit
        return bytes(content)
    _, after = find(content, b"tkhd")
    for box in (b"trak", b"moov"):
        at = find(content, box)[0]
        content[at : at + 4] = struct.pack(">I", struct.unpack_from(">I", content, at)[0] + len(edit))
    content[after:after] = edit
    return bytes(content)


def test_frames_that_an_edit_list_hides_are_none(tmp_path):
    path = tmp_path / "a.mp4"
    whole = clip(path, range(0, 240, 8))
    assert greys(path, 100) == list(range(30))
    path.write_bytes(with_edit(whole, 0, 20))
    assert greys(path, 100) == list(range(20))
    assert greys(path, 2) == [5, 15]
    # It begins within: what is hidden is decoded, as the frames after it need it, and not shown.
    path.write_bytes(with_edit(whole, 6, 12))
    assert greys(path, 100) == list(range(6, 18))


def test_the_longest_of_several_video_tracks_is_the_video(tmp_path):
    short, long = clip(tmp_path / "a.mp4", [0] * 3), clip(tmp_path / "b.mp4", range(0, 160, 8))
    start, end = find(long, b"mdat")
    media = long[start:end]
    track = bytearray(long[slice(*find(long, b"trak"))])
    moov, _ = find(short, b"moov")
    # The second file's media stand where the first one's index stood, and its chunks say so.
    table = track.index(b"stco") + 8
    for chunk in range(struct.unpack_from(">I", track, table)[0]):
        at = table + 4 + 4 * chunk
        track[at : at + 4] = struct.pack(">I", struct.unpack_from(">I", track, at)[0] + moov - start)
    track[track.index(b"tkhd") + 16 : track.index(b"tkhd") + 20] = struct.pack(">I", 2)  # its number
    index = bytearray(short[moov:] + track)
    index[:4] = struct.pack(">I", len(index))
    both = tmp_path / "both.mp4"
    both.write_bytes(short[:moov] + media + index)
    with both.open("rb") as file:
        assert [round(t.seconds, 3) for t in read_movie(file).tracks] == [0.3, 2.0]
    assert greys(both, 100) == list(range(20))
    assert duration(both) == pytest.approx(1.9)


def test_a_turned_video_is_upright(tmp_path):
    path = tmp_path / "a.mp4"
    content = clip(path, [80] * 4)
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(put(content, b"tkhd", 40, quarter))
    assert [frame.shape for _, frame in sample_frames(path, 2)] == [(64, 48, 3)] * 2


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(put(clip(path, [80] * 4), b"hdlr", 8, b"soun"))
    with pytest.raises(UnreadableInput, match="no video track"):
        sample_frames(path, 2)


def test_files_of_another_kind_and_cut_ones_have_no_index(tmp_path):
    path = tmp_path / "a.mp4"
    content = clip(path, range(0, 80, 8))
    for part in (b"", b"RIFF" * 9, content[:40], content[:4] + b"free" + bytes(30), b"\0\0\0\1ftyp"):
        path.write_bytes(part)
        with path.open("rb") as file:
            assert read_movie(file) is None
    path.write_bytes(content[:-200])
    with pytest.raises(UnreadableInput):
        sample_frames(path, 2)
