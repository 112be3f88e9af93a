"""Finding and decoding: every picture upright, whole and RGB, or named with its reason."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from make_clip import CLIP, coded_frame, read_code
from odd_files import make_odd_files
from PIL import Image, ImageFile, features
from skimage import data

from solution.data import videos
from solution.data.images import (
    Input,
    InputError,
    Inputs,
    UnreadableInput,
    decode_image,
    find_inputs,
    resize_image,
)
from solution.data.videos import sample_frames


def small_face() -> np.ndarray:
    return resize_image(data.astronaut()[:200, 130:330], 64, 48)


def save(path: Path, picture: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(picture)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


# ---------------------------------------------------------------------------------------------------- finding
def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_folder_is_walked_and_sorted_by_name(tmp_path):
    touch(tmp_path, "b.PNG", "a/z.jpeg", "a.tiff", "notes.md", "c.MP4", ".png", "a/10")
    found = find_inputs(tmp_path)
    assert [f.name for f in found] == ["a.tiff", "a/z.jpeg", "b.PNG", "c.MP4"]
    assert [f.kind for f in found] == ["image", "image", "image", "video"]
    assert found[1] == Input("a/z.jpeg", tmp_path / "a" / "z.jpeg", "image")


def test_one_file_is_its_own_folder(tmp_path):
    touch(tmp_path, "b.webp", "a.png")
    assert list(find_inputs(tmp_path / "b.webp")) == [Input("b.webp", tmp_path / "b.webp", "image")]


def test_a_list_names_pictures_relative_to_its_folder(tmp_path):
    touch(tmp_path, "x/b.png", "a.dat", "clip.webm")
    elsewhere = tmp_path / "else" / "e.jpg"
    text = f"# mine\n\nx//b.png\r\n./a.dat\n{elsewhere}\nclip.webm\ngone.png"
    (tmp_path / "list.txt").write_text(text)
    found = find_inputs(tmp_path / "list.txt")
    assert [f.name for f in found] == sorted(["x/b.png", "a.dat", elsewhere.as_posix(), "clip.webm", "gone.png"])
    by_name = {f.name: f for f in found}
    assert by_name[elsewhere.as_posix()].path == elsewhere
    assert by_name["clip.webm"].kind == "video"
    assert by_name["a.dat"].kind == "image"


def test_odd_lists_are_read_where_their_files_are(tmp_path):
    touch(tmp_path, "a.jpg", "sub/b.jpg", "c d.jpg", "e.jpg ", "sub\\f.jpg")
    expected = ["a.jpg", "c d.jpg", "sub/b.jpg"]
    for content in (
        b"a.jpg\0sub/b.jpg\0c d.jpg\0",
        "a.jpg\r\nsub/b.jpg\r\nc d.jpg\r\n".encode("utf-16"),
        b'a.jpg  \nsub/b.jpg\t\n"c d.jpg"\n',
        b"a.jpg\r\nsub\\b.jpg\r\nc d.jpg\r\n",
    ):
        (tmp_path / "list.txt").write_bytes(content)
        found = find_inputs(tmp_path / "list.txt")
        assert [f.name for f in found] == expected and all(f.path.is_file() for f in found)
    (tmp_path / "list.txt").write_text("e.jpg \nsub\\f.jpg\ngone.jpg \n")  # these names are right as they stand
    found = find_inputs(tmp_path / "list.txt")
    assert [f.name for f in found] == ["e.jpg ", "gone.jpg ", "sub\\f.jpg"]
    (tmp_path / "list.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(InputError, match="begins as UTF-16 does"):
        find_inputs(tmp_path / "list.txt")


def test_a_line_that_begins_with_a_hash_is_a_comment_unless_a_file_is_called_so(tmp_path):
    touch(tmp_path, "#1.jpg", "a.jpg", "#folder/b.jpg")
    (tmp_path / "list.txt").write_text("# a.jpg\n#1.jpg\na.jpg\n#gone.jpg\n#folder\n# of https://example.com\n")
    assert [f.name for f in find_inputs(tmp_path / "list.txt")] == ["#1.jpg", "a.jpg"]
    (tmp_path / "list.txt").write_text("# image label\n#1.jpg 0\na.jpg 1\n")
    assert [f.name for f in find_inputs(tmp_path / "list.txt")] == ["#1.jpg", "a.jpg"]


def test_an_address_is_refused_and_not_made_a_path(tmp_path):
    touch(tmp_path, "a.jpg", "odd:/b.jpg")
    for line in ("https://example.com/a.jpg", "s3://store/a.jpg 1", '"http://example.com/a.jpg"'):
        (tmp_path / "list.txt").write_text(f"a.jpg\n{line}\n")
        with pytest.raises(
            InputError, match="list.txt, line 2: .*://.* is an address, not a path; .*download it first"
        ):
            find_inputs(tmp_path / "list.txt")
    with pytest.raises(InputError, match="https:/example.com/a.jpg is an address, not a path; .*download it first"):
        find_inputs(Path("https://example.com/a.jpg"))
    (tmp_path / "list.txt").write_text("odd://b.jpg\n")  # a path as it stands
    assert [f.name for f in find_inputs(tmp_path / "list.txt")] == ["odd:/b.jpg"]


def test_hidden_files_are_no_inputs_and_what_is_passed_over_is_counted(tmp_path):
    touch(
        tmp_path,
        "a.jpg",
        "._a.jpg",
        ".thumbs/a.jpg",
        "__MACOSX/a.jpg",
        "x/.b.png",
        "Thumbs.db",
        "x/notes.md",
        "x/LICENSE",
    )
    found = find_inputs(tmp_path)
    assert [f.name for f in found] == ["a.jpg"]
    assert found.passed_over == {"hidden": 4, ".db": 1, ".md": 1, "no suffix": 1}
    assert pickle.loads(pickle.dumps(found[:1])).passed_over == found.passed_over


@pytest.mark.parametrize(
    "text",
    [
        "a.png 0\nmy b.png 1\n",
        "a.png\treal\nmy b.png\tfake\n",
        'image,label\n"a.png",0\n"my b.png",1\n',
        "0 a.png\n1 my b.png\n",
    ],
)
def test_labels_in_a_list_are_left_out_and_said(tmp_path, text):
    for name in ("a.png", "my b.png", "odd 1"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text(text)
    found = find_inputs(tmp_path / "list.txt")
    assert [item.name for item in found] == ["a.png", "my b.png"]
    assert len(found.notes) == 1 and "labels" in found.notes[0] and "not read" in found.notes[0]
    # What names a file is a name, whatever it ends in.
    (tmp_path / "list.txt").write_text("a.png\nmy b.png\nodd 1\n")
    found = find_inputs(tmp_path / "list.txt")
    assert [item.name for item in found] == ["a.png", "my b.png", "odd 1"] and not found.notes


def test_lists_with_labels_here_and_there_are_refused(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    for text, said in (
        ("a.png 0\nb.png\n", "line 1 has a label behind its path, and line 2 has none"),
        ("a.png 0\nb.png perhaps\n", "line 2: no file is called 'b.png perhaps', though 'b.png' is there"),
    ):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(InputError, match=said):
            find_inputs(tmp_path / "list.txt")


def test_a_name_listed_twice_is_refused_with_both_lines(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\nb.png\n./a.png\n")
    with pytest.raises(InputError, match="line 3.*line 1"):
        find_inputs(tmp_path / "list.txt")


@pytest.mark.parametrize("name", ["nothing", "empty", "empty.txt", "table.csv"])
def test_nothing_to_score_is_one_clear_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "empty", "readme.md")
    (tmp_path / "empty.txt").write_text("# only a comment\n")
    touch(tmp_path, "table.csv")
    with pytest.raises(InputError, match=name):
        find_inputs(tmp_path / name)


def test_names_that_do_not_print_are_escaped_and_stay_unique(tmp_path):
    touch(tmp_path, "a\nb.png", "a\\x0ab.png")
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(b"y")
    found = {f.name: f.path for f in find_inputs(tmp_path)}
    assert set(found) == {"a\\x0ab.png", "_a\\x0ab.png", "\\xff.png"}
    assert found["\\xff.png"].read_bytes() == b"y"
    assert found["_a\\x0ab.png"].name == "a\nb.png"
    "".join(found).encode("utf-8")


def test_folders_named_like_files_and_links_in_circles(tmp_path):
    touch(tmp_path, "clip.mp4/0.png", "real/1.png")
    (tmp_path / "void.png").mkdir()
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "also").symlink_to(tmp_path / "real")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    names = [f.name for f in find_inputs(tmp_path)]
    # a folder of frames is no video; a link back up ends there; every way to a picture is a name of its own
    assert names == [
        "also/1.png",
        "clip.mp4/0.png",
        "real/1.png",
        "self.jpg",
        "void.png",
    ]


def test_only_the_innermost_empty_folder_of_a_files_name_is_listed(tmp_path):
    for folder in ("a.png/b.png", "c.png/d", "e.png/f/g.mp4/h.gif"):
        (tmp_path / folder).mkdir(parents=True)
    touch(tmp_path, "e.png/f/g.mp4/notes.md", "i.jpg/j/k.png")
    assert [f.name for f in find_inputs(tmp_path)] == ["a.png/b.png", "c.png", "e.png/f/g.mp4/h.gif", "i.jpg/j/k.png"]


@contextlib.contextmanager
def nested(top: Path, name: str, levels: int) -> Iterator[None]:
    """Folders called `name`, each in the one before, made from within: their path may be longer than any may be.

    They are taken away here: pytest's own removal of them recurses.
    """
    here = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("a.png", os.O_WRONLY | os.O_CREAT, dir_fd=here))
    os.close(here)
    try:
        yield
    finally:
        for _ in range(levels - 1):
            (top / name / name).rename(top / "inner")
            (top / name).rmdir()
            (top / "inner").rename(top / name)
        shutil.rmtree(top / name)


def test_folders_lie_in_each_other_by_the_thousand(tmp_path):
    with nested(tmp_path, "d", 1100):
        assert [f.name for f in find_inputs(tmp_path)] == ["d/" * 1100 + "a.png"]


def test_names_longer_than_the_system_takes_are_refused_in_words(tmp_path):
    said = "longer than a path may be here; move what is in it further up"
    with nested(tmp_path, 200 * "d", 25), pytest.raises(InputError, match=said):  # 5,000 characters; Linux takes 4,096
        find_inputs(tmp_path)
    long = 300 * "a" + ".png"
    with pytest.raises(InputError, match="File name too long; expected a folder"):
        find_inputs(tmp_path / long)
    (tmp_path / "list.txt").write_text(f"{long}\n#{long}\n")
    (listed,) = find_inputs(tmp_path / "list.txt")
    with pytest.raises(UnreadableInput, match="File name too long"):
        decode_image(listed.path)


def test_a_million_inputs_cost_their_names_only():
    inputs = Inputs(Path("/data"), [f"{i:07d}.png" for i in range(50_000)], {})
    sum(len(f.path.name) for f in inputs)  # pathlib interns names in one table of the process, which may grow
    tracemalloc.start()
    total = sum(len(f.path.name) for f in inputs)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert total == 50_000 * 11
    assert grown < 60 * 50_000  # bytes; a list of them keeps 450 for each
    assert list(inputs[3::20_000]) == [inputs[3], inputs[20_003], inputs[40_003]]
    assert list(pickle.loads(pickle.dumps(inputs[:5]))) == list(inputs[:5])
    assert inputs[-1].name == "0049999.png"
    with pytest.raises(IndexError):
        inputs[50_000]


# ---------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize(("suffix", "kind"), [("jpe", "JPEG"), ("jfif", "JPEG"), ("gif", "GIF"), ("avif", "AVIF")])
def test_further_suffixes_are_listed_and_read(tmp_path, suffix, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    path = tmp_path / f"x.{suffix}"
    more = {"save_all": True, "append_images": [Image.new("RGB", (20, 10), (0, 0, 255))]} if kind == "GIF" else {}
    Image.new("RGB", (20, 10), (200, 0, 0)).save(path, kind, **more)
    (found,) = find_inputs(tmp_path)
    assert found.kind == "image"
    assert np.abs(decode_image(found.path).astype(int) - (200, 0, 0)).max() < 12  # the first frame


def test_a_heic_picture_says_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("a.heic", "called.jpg"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
        with pytest.raises(UnreadableInput, match="a HEIC picture; to read it: pip install pillow-heif"):
            decode_image(tmp_path / name)
    assert len(find_inputs(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_a_truncated_avif_or_heic_is_called_so(tmp_path, monkeypatch, kind):
    path = tmp_path / "x.jpg"
    if kind == "AVIF":
        if not features.check("avif"):
            pytest.skip("this Pillow reads no AVIF")
        content = save(tmp_path / "x.avif", small_face()).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    else:

        def refuse(*_):  # as pillow_heif does
            raise SyntaxError("Invalid input")

        monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: None))
        monkeypatch.setitem(Image.OPEN, "HEIF", (refuse, None))
        path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.raises(UnreadableInput, match=f"x.jpg: damaged or truncated {kind} picture$"):
        decode_image(path)


def test_forty_odd_files_each_decode_or_name_their_reason(tmp_path):
    expected = make_odd_files(tmp_path / "odd")
    found = {f.name: f.path for f in find_inputs(tmp_path / "odd")}
    assert set(found) == set(expected) and len(found) == 40
    readable = {}
    for name, path in found.items():
        try:
            picture = decode_image(path)
            assert picture.dtype == np.uint8 and picture.shape[2] == 3
            readable[name] = True
        except UnreadableInput as error:
            assert error.reason and error.path == path and "\n" not in str(error)
            readable[name] = False
    assert readable == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, kind):
    face = small_face()
    lay = {  # how a camera held so stores the scene
        1: face,
        2: face[:, ::-1],
        3: face[::-1, ::-1],
        4: face[::-1],
        5: face.transpose(1, 0, 2),
        6: np.rot90(face),
        7: np.rot90(face, 2).transpose(1, 0, 2),
        8: np.rot90(face, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(kind, {})
    path = save(tmp_path / f"x.{kind}", np.ascontiguousarray(lay), exif=exif, **options)
    picture = decode_image(path)
    assert picture.shape == face.shape
    assert np.abs(picture.astype(int) - face).mean() < (4 if kind == "jpg" else 0.01)


def test_sixteen_bits_are_scaled_and_rounded(tmp_path):
    values = np.linspace(0, 65535, 64 * 32).round().astype(np.uint16).reshape(32, 64)
    for suffix in ("png", "tif"):
        picture = decode_image(save(tmp_path / f"x.{suffix}", values))
        assert np.array_equal(picture[..., 0], np.round(values / 257).astype(np.uint8))
        assert np.array_equal(picture[..., 0], picture[..., 2])


def test_colour_sixteen_bits_keep_their_colours(tmp_path):
    face = small_face()
    wide = (face.astype(np.uint16) * 257)[:, :, ::-1]
    assert cv2.imwrite(str(tmp_path / "x.png"), wide)
    assert cv2.imwrite(str(tmp_path / "x.tif"), wide)
    assert np.array_equal(decode_image(tmp_path / "x.png"), face)
    assert np.array_equal(decode_image(tmp_path / "x.tif"), face)


def test_transparent_parts_are_black(tmp_path):
    face = small_face()
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    path = save(tmp_path / "x.png", np.dstack([face, alpha]))
    expected = face * (alpha[..., None] / 255.0)
    assert np.abs(decode_image(path) - expected).max() <= 1
    keyed = Image.fromarray(face).quantize(16)
    keyed.save(tmp_path / "p.png", transparency=bytes([0] * 8 + [255] * 8))
    shown, index = decode_image(tmp_path / "p.png"), np.asarray(keyed)
    assert not shown[index < 8].any()
    plain = np.asarray(keyed.convert("RGB"))
    assert np.array_equal(shown[index >= 8], plain[index >= 8])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "1", "P"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    face = small_face()
    kind = "tif" if mode in ("YCbCr", "1") else "png" if mode == "P" else "jpg"
    options = {"quality": 95} if kind == "jpg" else {}
    path = save(tmp_path / f"x.{kind}", face, mode, **options)
    expected = np.asarray(Image.fromarray(face).convert(mode).convert("RGB"))
    picture = decode_image(path).astype(int)
    assert picture.shape == face.shape
    assert np.abs(picture - expected).mean() < 3
    if mode == "CMYK":  # not inverted, as a careless reader of Adobe's JPEG has it
        assert np.abs(picture - face).mean() < 3


def test_thirty_two_bits_have_no_range_and_are_refused(tmp_path):
    path = save(tmp_path / "x.tif", np.ones((9, 9), np.float32))
    with pytest.raises(UnreadableInput, match="8 or 16 bits"):
        decode_image(path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
    ],
)
def test_a_truncated_file_is_an_error_or_complete(tmp_path, kind, options, monkeypatch):
    # A library that other code of the process uses may have asked Pillow to show what is there.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    buffer = io.BytesIO()
    Image.fromarray(small_face()).save(buffer, kind, **options)
    content, path = buffer.getvalue(), tmp_path / "x.jpg"
    path.write_bytes(content)
    whole = decode_image(path)
    refused = 0
    for length in (*range(1, len(content), len(content) // 40), len(content) - 3):
        path.write_bytes(content[:length])
        try:
            assert np.array_equal(decode_image(path), whole), length
        except UnreadableInput:
            refused += 1
    assert refused >= 39


def test_a_jpeg_that_was_closed_after_its_cut_is_read_with_grey_as_the_docstring_owns(tmp_path):
    content = save(tmp_path / "x.jpg", data.astronaut(), quality=90).read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    picture = decode_image(tmp_path / "x.jpg")
    assert (picture[-100:] == 128).all()  # should this fail, libjpeg's warning reaches us: refuse the file


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    path = save(tmp_path / "x.png", np.zeros((50, 100, 3), np.uint8))
    assert decode_image(path, max_pixels=5000).shape == (50, 100, 3)
    with pytest.raises(UnreadableInput, match="100x50 px; at most 4999"):
        decode_image(path, max_pixels=4999)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UnreadableInput, match="not a regular file"):
        decode_image(find_inputs(tmp_path)[0].path)


def test_the_error_survives_a_worker(tmp_path):
    with pytest.raises(UnreadableInput) as caught:
        decode_image(tmp_path / "gone.png")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and copy.path == tmp_path / "gone.png"
    assert "No such file" in str(copy)


def test_a_decoded_picture_may_be_written_to(tmp_path):
    for suffix in ("png", "jpg", "webp", "tif"):
        assert decode_image(save(tmp_path / f"x.{suffix}", small_face())).flags.writeable


# ---------------------------------------------------------------------------------------------------- resizing
def test_resizing_leaves_the_right_size_alone():
    face = small_face()
    assert resize_image(face, 64, 48) is face


def test_shrinking_averages_and_growing_is_cubic():
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    halved = noise.reshape(20, 2, 30, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize_image(noise, 30, 20) - halved).max() <= 0.5
    grown = cv2.resize(noise, (120, 80), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(resize_image(noise, 120, 80), grown)


def test_one_axis_shrinks_while_the_other_grows():
    strip = np.zeros((3, 20000, 3), np.uint8)
    strip[:, ::2] = 200  # area gives 100 everywhere, point sampling stripes
    view = resize_image(strip, 224, 224)
    assert view.shape == (224, 224, 3)
    assert np.abs(view.astype(int) - 100).max() <= 2


def test_masks_are_resized_too():
    mask = np.zeros((10, 10), np.float32)
    mask[:5] = 1
    assert resize_image(mask, 5, 5).shape == (5, 5)
    assert resize_image(mask, 2, 2).tolist() == [[1, 1], [0, 0]]


# ---------------------------------------------------------------------------------------------------- video
def write_video(path: Path, frames: int, codec: str) -> Path:
    with videos._quiet():  # FFmpeg takes its log level at its first use
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25.0, (160, 48))
    assert writer.isOpened(), f"this OpenCV cannot write {codec}"
    for number in range(frames):
        writer.write(coded_frame(number))
    writer.release()
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v"), ("a.mov", "mp4v")],
)
@pytest.mark.parametrize("count", [1, 4, 31])
def test_the_frames_are_those_whose_numbers_they_bear(tmp_path, name, codec, count):
    path = write_video(tmp_path / name, 240, codec)
    frames = sample_frames(path, count)
    assert [number for number, _ in frames] == [int((i + 0.5) * 240 / count) for i in range(count)]
    for number, frame in frames:
        assert frame.shape == (48, 160, 3) and frame.dtype == np.uint8
        assert read_code(frame) == number


def test_seeking_happens_and_changes_nothing(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 240, "mp4v")
    jumps, pays = [], videos._seek_pays

    def watch(*given):
        jumps.append(pays(*given))
        return jumps[-1]

    monkeypatch.setattr(videos, "_seek_pays", watch)
    sought = sample_frames(path, 4)
    assert jumps.count(True) >= 3
    monkeypatch.setattr(videos, "_seek_pays", lambda *given: False)
    walked = sample_frames(path, 4)
    for (a, first), (b, second) in zip(sought, walked, strict=True):
        assert a == b and np.array_equal(first, second)


def test_a_seek_that_lands_elsewhere_is_noticed(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 240, "mp4v")
    reads, read, scan = [], videos._read_frames, videos._scan

    def shifted(*given):
        clip = scan(*given)
        return clip._replace(times=[time + 40 for time in clip.times])

    def watch(*given, seek):
        reads.append(seek)
        return read(*given, seek=seek)

    monkeypatch.setattr(videos, "_scan", shifted)
    monkeypatch.setattr(videos, "_read_frames", watch)
    assert [read_code(f) for _, f in sample_frames(path, 4)] == [30, 90, 150, 210]
    assert reads == [True, False]


def test_a_short_video_gives_every_frame_once(tmp_path):
    path = write_video(tmp_path / "a.avi", 5, "MJPG")
    assert [number for number, _ in sample_frames(path, 32)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least one"):
        sample_frames(path, 0)


def test_colours_are_rgb(tmp_path):
    path = str(tmp_path / "a.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 25.0, (64, 48))
    for _ in range(3):
        writer.write(np.full((48, 64, 3), (20, 60, 220), np.uint8))  # BGR: red
    writer.release()
    mean = sample_frames(path, 1)[0][1].mean(axis=(0, 1))
    assert np.abs(mean - (220, 60, 20)).max() < 12


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_video_says_so_and_nothing_else(tmp_path, name, part, capfd):
    codec = "MJPG" if name == "a.avi" else "mp4v"
    path = write_video(tmp_path / name, 100, codec)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    capfd.readouterr()
    with pytest.raises(UnreadableInput, match="truncated|empty"):
        sample_frames(path, 8)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "codec", "told"), [("a.avi", "MJPG", True), ("a.mp4", "mp4v", False)])
def test_damage_is_told_where_a_frame_is_missing_and_not_where_it_is_concealed(tmp_path, name, codec, told):
    path = tmp_path / name
    noise = np.random.default_rng(0)
    with videos._quiet():
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25.0, (320, 240))
    for _ in range(40):
        writer.write(noise.integers(0, 256, (240, 320, 3), np.uint8))
    writer.release()
    content = bytearray(path.read_bytes())
    start = len(content) // 3
    if told:
        start = content.index(b"\xff\xd8", start)  # a frame's beginning
    content[start : start + 4000] = noise.bytes(4000)
    path.write_bytes(content)
    if told:
        with pytest.raises(UnreadableInput, match="frame .* of 40 cannot be decoded; the video is damaged"):
            sample_frames(path, 40)
    else:
        assert len(sample_frames(path, 40)) == 40  # should this fail, OpenCV tells of it: correct videos.py


def test_a_text_called_mp4_and_a_name_that_is_not_utf8(tmp_path):
    (tmp_path / "x.mp4").write_text("no video\n" * 99)
    with pytest.raises(UnreadableInput, match="not a video"):
        sample_frames(tmp_path / "x.mp4", 2)
    (tmp_path / "x.mp4").unlink()
    write_video(tmp_path / "a.avi", 5, "MJPG")
    os.rename(os.fsencode(tmp_path / "a.avi"), os.fsencode(tmp_path) + b"/%02d\xff.avi")
    (found,) = find_inputs(tmp_path)
    assert found.kind == "video" and len(sample_frames(found.path, 2)) == 2


def test_frames_of_an_h264_clip_are_those_of_reading_it_through():
    frames = dict(sample_frames(CLIP, 3))
    assert list(frames) == [100, 300, 500]
    capture = cv2.VideoCapture(str(CLIP))
    for number in range(501):
        assert capture.grab()
        if number in frames:
            assert read_code(frames[number]) == number
            shown = cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
            assert np.array_equal(shown, frames[number])
