"""Faces through sampled frames: who is whom, where a scene ends, and which of several faces decides."""

import cv2
import numpy as np
import pytest
from people import group_photo, two_people
from skimage import data

from solution.config import FaceConfig
from solution.data.faces import FaceLocator, overlap
from solution.data.videos import sample_frames
from solution.records import FaceBox
from solution.scoring.files import SidecarRow, Track
from solution.scoring.tracks import scene_starts, track_faces
from solution.scoring.verdict import deciding


def box(x, y, side=40.0, score=0.9):
    return FaceBox(x, y, x + side, y + side, score)


def scene(frames):
    return [True, *[False] * (len(frames) - 1)]


# ------------------------------------------------------------------------------------------------ tracks
def test_two_people_who_walk_keep_their_numbers_whatever_the_order_of_their_boxes():
    frames = [[box(10 + 15 * k, 10), box(300 - 15 * k, 120, 60)] for k in range(6)]
    frames[3].reverse()
    assert track_faces(frames, scene(frames)) == [[2, 1]] * 3 + [[1, 2]] + [[2, 1]] * 2


def test_people_who_pass_each_other_are_assigned_together_and_not_one_by_one():
    # The right one has moved to where both are near; taken greedily, the left one would get its place.
    frames = [[box(0, 0), box(50, 0)], [box(24, 0), box(70, 0)]]
    assert track_faces(frames, scene(frames)) == [[1, 2], [1, 2]]


def test_a_face_of_another_size_at_the_same_place_is_another():
    frames = [[box(100, 100, 40)], [box(60, 60, 120)]]
    assert track_faces(frames, scene(frames)) == [[1], [2]]


@pytest.mark.parametrize(("hidden", "numbers"), [(2, [1, 1]), (3, [1, 2])])
def test_a_face_may_be_hidden_for_a_while(hidden, numbers):
    frames = [[box(10, 10)], *[[]] * hidden, [box(14, 10)]]
    found = track_faces(frames, scene(frames))
    assert [found[0][0], found[-1][0]] == numbers


def test_a_cut_ends_every_track_though_the_boxes_are_the_same():
    frames = [[box(10, 10)]] * 4
    assert track_faces(frames, [True, False, True, False]) == [[1], [1], [2], [2]]
    assert track_faces([], []) == []


# ------------------------------------------------------------------------------------------------ cuts
def test_pans_light_and_noise_are_no_cuts_and_another_picture_is_one():
    photo, other = data.astronaut(), cv2.resize(data.coffee(), (512, 512))
    pan = [photo[8 * k : 8 * k + 300, 20 * k : 20 * k + 300] for k in range(6)]
    assert scene_starts(pan) == [True] + [False] * 5
    dark = (photo * 0.4).astype(np.uint8)
    noisy = np.clip(photo + np.random.default_rng(0).normal(0, 40, photo.shape), 0, 255).astype(np.uint8)
    assert scene_starts([photo, dark, noisy, photo]) == [True, False, False, False]
    grey, black = np.full_like(photo, 128), np.zeros_like(photo)
    assert scene_starts([photo, photo, other, other, grey, black]) == [True, False, True, False, True, False]
    assert scene_starts([]) == []


# ------------------------------------------------------------------------------------------------ with the detector
def test_every_face_of_a_group_is_found_a_small_one_too():
    picture, places = group_photo()
    locator = FaceLocator(FaceConfig())
    found = locator.locate_all(picture, locator.locate(picture))
    assert len(found) == len(places) == 5
    for place in places:
        assert max(overlap(FaceBox(*place, 1.0), face) for face in found) > 0.5
    assert [f.x1 - f.x0 for f in found] == sorted((f.x1 - f.x0 for f in found), reverse=True)


def test_a_clip_of_two_people_and_a_cut_has_three_tracks(tmp_path):
    clip = two_people(tmp_path / "two.mp4")
    numbers, pictures = zip(*sample_frames(clip.path, 16))
    locator = FaceLocator(FaceConfig())
    faces = [locator.locate_all(p, locator.locate(p)) for p in pictures]
    starts = scene_starts(pictures)
    assert [n for n, start in zip(numbers, starts) if start] == [numbers[0], next(n for n in numbers if n >= clip.cut)]
    tracks = track_faces(faces, starts)
    seen = {who: [n for n, of in zip(numbers, tracks) if who in of] for who in (1, 2, 3)}
    assert seen[1] == [n for n in numbers if n < clip.cut]
    assert seen[2] == [n for n in numbers if clip.enters <= n < clip.cut]
    assert seen[3] == [n for n in numbers if n >= clip.cut]
    for faces_, of in zip(faces, tracks):
        side = {who: f.x0 > clip.width / 2 for f, who in zip(faces_, of)}
        assert side.get(1, False) is False and side.get(2, True) is True


# ------------------------------------------------------------------------------------------------ who decides
def row(score, side, frames=None):
    track = frames and Track(frames, 0, 9, 0.0, 0.0)
    return SidecarRow("x", "ok", "", (0, 0, side, side, 1.0), {}, {}, score, "real", track=track)


def test_the_most_fake_looking_face_of_those_large_enough_decides():
    assert deciding([row(0.2, 200), row(0.6, 100), row(0.9, 40)]).score == 0.6  # 40 px are a 25th of its area
    assert deciding([row(0.2, 40), row(0.9, 31)]).score == 0.2
    assert deciding([row(0.2, 20), row(0.9, 10)]).score == 0.9  # nobody is large enough
    assert deciding([row(0.2, 100, 32), row(0.9, 100, 3), row(0.4, 100, 4)]).score == 0.4
