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


def test_a_cover_picture_before_the_video_is_not_taken_for_it(tmp_path):
    path = tmp_path / "a.mp4"
    whole = clip(path, range(0, 160, 8))

    def box(name, *content):
        body = b"".join(content)
        return struct.pack(">I4s", 8 + len(body), name) + body

    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0), jpeg(255)))
    told = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", cover)))
    index, _ = find(whole, b"moov")
    track, _ = find(whole, b"trak")
    content = whole[:track] + told + whole[track:]
    size = struct.unpack_from(">I", whole, index)[0] + len(told)
    path.write_bytes(content[:index] + struct.pack(">I", size) + content[index + 4 :])
    assert greys(path, 100) == list(range(20))


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


# ------------------------------------------------------------------------------------------------ MKV, WebM and AVI
SHORT, LONG = [200] * 3, list(range(0, 160, 8))  # greys of frames, ten a second


def jpeg(grey):
    return cv2.imencode(".jpg", np.full((48, 64, 3), grey, np.uint8))[1].tobytes()


def element(name, *content):
    body = b"".join(content)
    return bytes.fromhex(name) + struct.pack(">Q", len(body) | 1 << 56) + body


def number(name, value, size=1):
    return element(name, value.to_bytes(size, "big"))


def matroska(*tracks, cover=b"", sound=False):
    """Video tracks of JPEGs; a picture attached; a track of silence."""
    entries, blocks = [], []
    for n, greys in enumerate(tracks, start=1):
        size = element("E0", number("B0", 64), number("BA", 48))
        own = number("D7", n), number("73C5", n), number("83", 1), element("86", b"V_MJPEG"), size
        entries.append(element("AE", *own, number("23E383", 100_000_000, 4)))
        blocks += [(k, n, jpeg(grey)) for k, grey in enumerate(greys)]
    if sound:
        n, how = len(tracks) + 1, element("E1", element("B5", struct.pack(">f", 8000.0)), number("6264", 16))
        own = number("D7", n), number("73C5", n), number("83", 2), element("86", b"A_PCM/INT/LIT"), how
        entries.append(element("AE", *own))
        blocks += [(k, n, bytes(1600)) for k in range(10)]
    packets = [element("A3", struct.pack(">BhB", 128 | n, 100 * k, 128), data) for k, n, data in sorted(blocks)]
    files = [element("466E", b"cover.jpg"), element("4660", b"image/jpeg"), element("465C", cover), number("46AE", 7)]
    segment = [element("1549A966", number("2AD7B1", 1_000_000, 4)), element("1654AE6B", *entries)]
    segment += [element("1941A469", element("61A7", *files))] if cover else []
    segment += [element("1F43B675", number("E7", 0), *packets)]
    return element("1A45DFA3", element("4282", b"matroska")) + element("18538067", *segment)


def chunk(name, *content):
    body = b"".join(content)
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def avi(*tracks):
    """Tracks of JPEGs."""
    most, lists, frames = max(map(len, tracks)), [], []
    for greys in tracks:
        head = b"vidsMJPG" + struct.pack("<10I4h", 0, 0, 0, 1, 10, 0, len(greys), 10_000, 2**32 - 1, 0, 0, 0, 64, 48)
        form = struct.pack("<3I2H4s5I", 40, 64, 48, 1, 24, b"MJPG", 0, 0, 0, 0, 0)
        lists.append(chunk(b"LIST", b"strl", chunk(b"strh", head), chunk(b"strf", form)))
    for k in range(most):
        frames += [chunk(b"%02ddc" % n, jpeg(greys[k])) for n, greys in enumerate(tracks) if k < len(greys)]
    head = chunk(b"avih", struct.pack("<14I", 100_000, 0, 0, 256, most, 0, len(tracks), 0, 64, 48, 0, 0, 0, 0))
    return chunk(b"RIFF", b"AVI ", chunk(b"LIST", b"hdrl", head, *lists), chunk(b"LIST", b"movi", *frames))


@pytest.mark.parametrize("tracks", [(LONG,), (SHORT, LONG), (LONG, SHORT), (SHORT, SHORT, LONG)], ids=len)
@pytest.mark.parametrize("suffix", ["mkv", "webm", "avi"])
def test_the_longest_track_of_other_containers_is_the_video(tmp_path, suffix, tracks):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(avi(*tracks) if suffix == "avi" else matroska(*tracks))
    assert greys(path, 100) == list(range(20))
    assert duration(path) == pytest.approx(1.9)


def test_cover_pictures_are_no_video(tmp_path):
    path = tmp_path / "a.mkv"
    path.write_bytes(matroska(SHORT, LONG, cover=jpeg(255), sound=True))
    assert greys(path, 100) == list(range(20))
    for content in (matroska(cover=jpeg(255), sound=True), matroska(sound=True)):
        path.write_bytes(content)
        with pytest.raises(UnreadableInput, match="no video track"):
            sample_frames(path, 2)


def test_containers_that_are_cut_or_odd_end_in_a_reason(tmp_path):
    for whole, name in ((matroska(SHORT, LONG, sound=True), "a.mkv"), (avi(SHORT, LONG), "a.avi")):
        for end in (3, 12, 40, 90, 200, 400, 700):
            (tmp_path / name).write_bytes(whole[:end])
            with pytest.raises(UnreadableInput):
                sample_frames(tmp_path / name, 2)
        (tmp_path / name).write_bytes(whole[:4] + bytes(range(256)) * 4)
        with pytest.raises(UnreadableInput):
            sample_frames(tmp_path / name, 2)
