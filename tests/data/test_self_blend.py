"""Self-blended fakes: the picture outside the mask, the mask on the face, randomness as an argument."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage import data as pictures

from solution.data import self_blend as room
from solution.data.self_blend import face_region, self_blend
from solution.records import FaceBox

# The astronaut's face in scikit-image's public-domain picture of 512 px, half size; read off by eye.
LANDMARKS = ((101.0, 54.0), (121.0, 52.0), (113.0, 66.0), (105.0, 77.0), (121.0, 76.0))
FACE = FaceBox(88.0, 30.0, 137.0, 94.0, 0.95, LANDMARKS)
FACES = [None, FACE._replace(landmarks=None), FACE]
IDS = ["no face", "box", "landmarks"]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    cv2.setNumThreads(1)
    return cv2.resize(pictures.astronaut(), (256, 256), interpolation=cv2.INTER_AREA)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("face", FACES, ids=IDS)
def test_shapes_types_range_determinism_and_an_untouched_input(image, face):
    before = image.copy()
    image.setflags(write=False)
    seen = []
    for seed in range(20):
        fake, mask = self_blend(image, face, rng(seed))
        again, mask_again = self_blend(image, face, rng(seed))
        assert fake.dtype == np.uint8 and fake.shape == image.shape
        assert mask.dtype == np.float32 and mask.shape == image.shape[:2]
        assert mask.min() >= 0 and 0.9 < mask.max() <= 1
        assert np.array_equal(fake, again) and np.array_equal(mask, mask_again)
        assert not np.array_equal(fake, image)
        seen.append(fake)
    image.setflags(write=True)
    assert np.array_equal(image, before)
    assert len({fake.tobytes() for fake in seen}) == 20


@pytest.mark.parametrize("seed", range(8))
def test_what_a_network_drew_is_blended_into_the_untouched_picture(image, seed):
    drawn = cv2.GaussianBlur(image, (0, 0), 3)
    before = drawn.copy()
    fake, mask = self_blend(image, FACE, rng(seed), drawn)
    assert np.array_equal(fake[mask == 0], image[mask == 0])
    assert (fake[mask > 0.9] != image[mask > 0.9]).mean() > 0.2
    assert np.array_equal(drawn, before)
    with pytest.raises(ValueError, match="float32"):
        self_blend(image, FACE, rng(seed), drawn.astype(np.float32))


@pytest.mark.parametrize("seed", range(40))
def test_outside_the_mask_stands_one_copy_and_inside_the_other(image, seed):
    """One of the copies is the picture itself: where the mask is 0 the target stands, whole; and the blend differs."""
    fake, mask = self_blend(image, FACE, rng(seed))
    if rng(seed).random() < 0.5:  # the source was changed: the target is the picture
        assert np.array_equal(fake[mask == 0], image[mask == 0])
        assert (fake[mask > 0.9] != image[mask > 0.9]).mean() > 0.2
    else:  # the target was changed, all over
        assert (fake[mask == 0] != image[mask == 0]).mean() > 0.2


@pytest.mark.parametrize("seed", range(30))
def test_masks_lie_on_the_face(image, seed):
    _, mask = self_blend(image, FACE, rng(seed))
    inside = np.zeros_like(mask)
    inside[12:118, 64:162] = 1  # the box with half its size around it
    assert (mask * inside).sum() > 0.97 * mask.sum()
    area = (mask > 0.5).sum() / (49 * 64)
    assert 0.02 < area < 2.0


def test_masks_differ_in_shape_size_and_softness(image):
    masks = [self_blend(image, FACE, rng(s))[1] for s in range(60)]
    areas = np.array([(m > 0.5).sum() for m in masks])
    edges = np.array([((m > 0.05) & (m < 0.95)).sum() / (m > 0.5).sum() for m in masks])
    assert np.quantile(areas, 0.9) > 2 * np.quantile(areas, 0.1)
    assert np.quantile(edges, 0.9) > 2 * np.quantile(edges, 0.1)


def test_the_ratio_is_one_of_the_papers_and_the_mask_is_not_weakened_by_it(monkeypatch):
    """On a picture whose copies are black and white, the blend at the mask's core is the ratio itself."""
    black = np.zeros((128, 128, 3), np.uint8)
    monkeypatch.setattr(room, "_transform", lambda image, rng: np.full_like(image, 255))
    ratios = []
    for seed in range(80):
        fake, mask = self_blend(black, None, rng(seed))
        core = fake[mask > 0.999]
        inside = core.mean() / 255
        ratios.append(round(inside if rng(seed).random() < 0.5 else 1 - inside, 2))
        assert mask.max() > 0.999
    assert set(ratios) == {0.25, 0.5, 0.75, 1.0}
    assert 0.3 < ratios.count(1.0) / 80 < 0.7  # drawn in half the cases


def test_the_mask_follows_the_shifted_source():
    """A white dot on black, blended with a copy of itself: the mask moves with the copy's pixels."""
    mask = np.zeros((200, 200), np.float32)
    mask[80:120, 80:120] = 1
    source = (mask[:, :, None] * 255).astype(np.uint8).repeat(3, axis=2)
    centers = []
    for seed in range(20):
        moved, moved_mask = room._shift_and_resize(source, mask, rng(seed))
        assert np.abs(moved[:, :, 0] / 255 - moved_mask).max() < 0.02
        y, x = np.nonzero(moved_mask > 0.5)
        centers.append((x.mean() - 99.5, y.mean() - 99.5))
    assert 1 < np.abs(centers).max(axis=0)[0] <= 6.5  # 3 % of the width
    assert np.abs(centers).max(axis=0)[1] <= 3.5  # 1.5 % of the height


def test_colour_changes_keep_grey_greyish_and_move_means():
    grey = np.full((8, 8, 3), 128, np.uint8)
    shifted = 0
    for seed in range(100):
        changed = room._colour(grey, rng(seed)).astype(int)
        if np.ptp(changed[0, 0]) > 1:  # hue and saturation leave grey alone
            shifted += 1
        assert 60 < changed.mean() < 200
    assert 15 < shifted < 45  # the RGB shift's 30 %


def test_the_hue_turns_about_grey():
    third = room._hue_rotation(2 * np.pi / 3)
    np.testing.assert_allclose(np.abs(third).sum(axis=1), 1, atol=1e-5)  # R, G, B cycle
    np.testing.assert_allclose(third @ np.ones(3), 1, atol=1e-6)


def test_softened_and_sharpened_copies_are_what_they_say(image):
    def detail(x):
        return cv2.Laplacian(x.astype(np.float32), cv2.CV_32F).std()

    assert detail(room._soften(image, 4)) < detail(room._soften(image, 2))
    assert detail(room._soften(image, 2)) < detail(image)
    assert detail(image) < detail(room._sharpen(image, 0.2))
    assert detail(room._sharpen(image, 0.2)) < detail(room._sharpen(image, 0.6))


def test_the_whole_face_covers_its_landmarks_and_scales_with_the_picture(image):
    for face in FACES:
        mask = face_region(image.shape, face)
        assert mask.dtype == np.float32 and set(np.unique(mask)) == {0.0, 1.0}
    mask = face_region(image.shape, FACE)
    for x, y in LANDMARKS:
        assert mask[round(y), round(x)] == 1
    box = np.zeros_like(mask)
    box[22:102, 78:147] = 1  # the detector's box and a sixth around it
    assert (mask * box).sum() > 0.98 * mask.sum()
    double = FaceBox(*(2 * v for v in FACE[:4]), 0.9, tuple((2 * x, 2 * y) for x, y in LANDMARKS))
    large = face_region((512, 512), double)
    assert large.sum() == pytest.approx(4 * mask.sum(), rel=0.05)
    ellipse = face_region((200, 100), None)
    assert ellipse.sum() == pytest.approx(np.pi * 33 * 84, rel=0.05)


def test_a_turned_head_narrows_its_region_and_landmarks_on_a_line_fall_back_to_the_box():
    turned = FACE._replace(landmarks=tuple((88 + (x - 88) * 0.6, y) for x, y in LANDMARKS))
    frontal = face_region((256, 256), FACE).any(axis=0).sum()
    assert face_region((256, 256), turned).any(axis=0).sum() < 0.75 * frontal
    line = FACE._replace(landmarks=tuple((100.0, float(y)) for y in (50, 50, 60, 70, 70)))
    boxed = face_region((256, 256), FACE._replace(landmarks=None))
    assert np.array_equal(face_region((256, 256), line), boxed)


def test_masks_of_large_and_narrow_pictures_have_their_shape(image):
    for height, width in ((700, 500), (64, 300), (3, 3)):
        picture = cv2.resize(image, (width, height))
        fake, mask = self_blend(picture, None, rng(0))
        assert fake.shape == (height, width, 3) and mask.shape == (height, width)


def test_bad_input_is_named(image):
    with pytest.raises(ValueError, match="float32"):
        self_blend(image.astype(np.float32), None, rng(0))
    with pytest.raises(ValueError, match="does not overlap"):
        self_blend(image, FaceBox(400, 400, 500, 500, 0.9), rng(0))
    with pytest.raises(ValueError, match="does not overlap"):
        face_region(image.shape, FaceBox(400, 400, 500, 500, 0.9))


def test_the_command_writes_examples_and_names_what_it_cannot_read(image, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "more").mkdir(parents=True)
    cv2.imwrite(str(source / "a.png"), image[:, :, ::-1])
    cv2.imwrite(str(source / "more" / "a.png"), image[::-1, :, ::-1])
    (source / "broken.png").write_bytes(b"no picture")
    assert room.main(["--input", str(source), "--out", str(out)]) == 4
    told = capsys.readouterr()
    assert "broken.png" in told.err and "2 examples" in told.out
    assert sorted(p.name for p in out.iterdir()) == ["a.png.png", "more_a.png.png"]
    panel = cv2.imread(str(out / "a.png.png"))[:, :, ::-1]
    assert panel.shape == (256, 3 * 256, 3)
    assert np.array_equal(panel[:, :256], image)
    assert not np.array_equal(panel[:, 256:512], image)
    mask = panel[:, 512:, 0]
    assert mask[20:110, 70:160].max() > 240  # a mask on the face, none in the corner
    assert mask[200:].max() == 0
    assert room.main(["--input", str(tmp_path / "nowhere"), "--out", str(out)]) == 2


def test_a_mask_is_drawn_small_however_large_the_picture(image, monkeypatch):
    """What is slow (random fields, wide blurs) happens on a copy of bounded side: a loader can afford it."""
    drawn, elastic, blur = [], room._elastic, room._blur

    def watched(call):
        def watch(mask, *given):
            drawn.append(mask.shape)
            return call(mask, *given)

        return watch

    monkeypatch.setattr(room, "_elastic", watched(elastic))
    monkeypatch.setattr(room, "_blur", watched(blur))
    large = cv2.resize(image, (1024, 1024), interpolation=cv2.INTER_CUBIC)
    face = FaceBox(*(4 * value for value in FACE[:4]), FACE.score)
    _, mask = self_blend(large, face, rng(0))
    assert mask.shape == (1024, 1024) and 0.9 < mask.max() <= 1
    assert len(drawn) == 3 and max(max(shape) for shape in drawn) == room._MASK_SIDE
