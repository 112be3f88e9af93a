"""Manifests of three layouts, drops with reasons, balanced plans, views that depend on their seed alone."""

import csv
import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from make_smoke_data import portrait, write

from solution.config import AugmentConfig, ConfigError, DegradationConfig, SamplingConfig, override
from solution.data import training
from solution.data.epochs import Sample, plan_epoch
from solution.data.images import UnreadableInput, decode_mask
from solution.data.manifest import VIDEO, Item, ManifestError, read_manifest, select
from solution.data.training import (
    Augmentation,
    TrainingViews,
    ValidationViews,
    collate,
    locate_faces,
    tell_masks,
    training_loader,
)
from solution.data.views import degraded_picture
from solution.presets import preset
from solution.records import FaceBox


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), portrait(np.random.default_rng(seed)))


def manifest(folder, rows, header=("path", "label", "source", "split", "mask", "video")):
    path = folder / "m.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_csv_manifest_reports_every_dropped_row(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    (tmp_path / "c.mp4").write_bytes(b"x")
    rows = [
        ("a.png", "0", "s", "train", "", ""),
        ("b.png", "fake", "s", "train", "whole", "v1"),
        ("a.png", "0", "s", "train", "", ""),
        ("gone.png", "1", "s", "train", "", ""),
        ("c.mp4", "1", "s", "train", "", ""),
        ("d.png", "1", "s", "val", "", ""),
    ]
    save(tmp_path / "d.png", 1)
    items, report = read_manifest(manifest(tmp_path, rows), split="train")
    assert [(i.name, i.label, i.mask, i.video) for i in items] == [
        ("a.png", 0, "", ""),
        ("b.png", 1, "whole", "v1"),
    ]
    assert dict(report.dropped) == {
        "a.png": "listed twice",
        "gone.png": "file is missing",
        "c.mp4": VIDEO,
    }
    assert "dropped 1: file is missing (e.g. gone.png)" in report.summary()
    with_video, _ = read_manifest(tmp_path / "m.csv", split="train", videos=True)
    assert [i.name for i in with_video] == ["a.png", "b.png", "c.mp4"]


def test_folder_and_deepfakebench_manifests(tmp_path):
    for name in (
        "real/x.png",
        "real/deep/y.png",
        "fake/z.png",
        "frames/000.png",
        "frames/001.png",
    ):
        save(tmp_path / name)
    items, _ = read_manifest(tmp_path)
    assert {(i.name, i.label) for i in items} == {
        ("real/x.png", 0),
        ("real/deep/y.png", 0),
        ("fake/z.png", 1),
    }
    frames = ["frames\\000.png", "frames/001.png", "frames/002.png"]
    tree = {
        "FF": {
            "FF-real": {"train": {"c23": {"01": {"label": "FF-real", "frames": frames[:1]}}}},
            "FF-DF": {"test": {"02_03": {"label": "FF-DF", "frames": frames[1:]}}},
        }
    }
    (tmp_path / "b.json").write_text(json.dumps(tree))
    items, report = read_manifest(tmp_path / "b.json")
    assert [(i.name, i.label, i.source, i.split, i.video) for i in items] == [
        ("frames/000.png", 0, "FF", "train", "FF-real/01"),
        ("frames/001.png", 1, "FF", "test", "FF-DF/02_03"),
    ]
    assert report.dropped == [("frames/002.png", "file is missing")]


def test_deepfakebench_masks_lie_beside_the_frames(tmp_path):
    """Mask of 000 there, of 001 not; a real frame takes none, though a file of that name exists."""
    for name in ("f/frames/1/000.png", "f/frames/1/001.png", "r/frames/2/000.jpg"):
        save(tmp_path / name)
    (tmp_path / "f/masks/1").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "f/masks/1/000.png"), np.full((8, 8), 255, np.uint8))
    save(tmp_path / "r/masks/2/000.png")
    fake = {"v": {"label": "FF-DF", "frames": [f"f/frames/1/00{n}.png" for n in (0, 1)]}}
    real = {"w": {"label": "FF-real", "frames": ["r/frames/2/000.jpg"]}}
    tree = {"FF": {"FF-DF": {"train": fake}, "FF-real": {"train": real}}}
    (tmp_path / "b.json").write_text(json.dumps(tree))
    items, _ = read_manifest(tmp_path / "b.json", split="train")
    mask = str(tmp_path / "f" / "masks" / "1" / "000.png")
    assert [i.mask for i in items] == [mask, "", ""]
    assert tell_masks(items, SamplingConfig()) == "masks: 1 of 2 fakes"
    assert tell_masks(items, SamplingConfig(fully_generated=("FF-DF",))) == "masks: 2 of 2 fakes"


def grey(path, *values):
    cv2.imwrite(str(path), np.repeat(np.array(values, np.uint8), 4).reshape(len(values), 4))
    return path


def test_masks_of_every_usual_kind_are_scaled_and_others_refused_by_name(tmp_path):
    expected = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32).reshape(2, 4)
    path = tmp_path / "m.png"
    for values in ((0, 255), (0, 1)):
        found = decode_mask(grey(path, *values))
        assert found.dtype == np.float32 and np.array_equal(found, expected)
    cv2.imwrite(str(path), expected[:, :, None] * np.array([255, 0, 0], np.uint8))  # BGR: blue
    assert np.array_equal(decode_mask(path), expected)
    assert decode_mask(grey(path, 0, 51, 102)).max() == np.float32(0.4)
    with pytest.raises(UnreadableInput, match="m.png: a mask with values up to 3"):
        decode_mask(grey(path, 0, 1, 3))
    save(path)
    with pytest.raises(UnreadableInput, match="m.png: a mask of several colours"):
        decode_mask(path)


def test_masks_that_look_inverted_are_said_at_the_start(tmp_path):
    square = np.zeros((8, 8), np.uint8)
    square[2:6, 2:6] = 255
    for name, mask in (("right", square), ("inverted", 255 - square), ("whole", np.full((8, 8), 255, np.uint8))):
        cv2.imwrite(str(tmp_path / f"{name}.png"), mask)
        items = [Item(f"{n}.png", tmp_path / f"{n}.png", 1, mask=str(tmp_path / f"{name}.png")) for n in range(3)]
        told = tell_masks(items, SamplingConfig())
        assert told.startswith("masks: 3 of 3 fakes") and ("as inverted ones do" in told) == (name == "inverted")


def test_black_and_unreadable_masks_of_fakes_are_said_at_the_start(tmp_path):
    (tmp_path / "text.png").write_text("no mask")
    masks = ["", "whole", str(grey(tmp_path / "one.png", 0, 1)), str(grey(tmp_path / "black.png", 0, 0))]
    items = [Item(f"{n}.png", tmp_path / f"{n}.png", 1, mask=mask) for n, mask in enumerate(masks)]
    black = "masks: 2 of 4 fakes; 1 are black, nothing forged, and count as not known (e.g. of 3.png)"
    assert tell_masks(items, SamplingConfig()) == black
    items[0] = replace(items[0], mask=str(tmp_path / "text.png"))
    with pytest.raises(UnreadableInput, match=r"text.png: not a picture"):
        tell_masks(items, SamplingConfig())
    told = tell_masks(items, SamplingConfig(on_unreadable="drop"))
    assert told == f"{black}; 1 cannot be read, and their pictures are dropped (e.g. of 0.png)"
    save(tmp_path / "3.png")
    sample = TrainingViews([items[3]], preset("tiny", "vlaforge"), {}, 0)[Sample(0, 0, 0, False)]
    assert sample[1] == 1 and not sample[3]  # fake, and its mask is not known


def test_the_face_cache_knows_size_and_time_of_its_files(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png", 1)
    items, cache = [Item(n, tmp_path / n, 0) for n in ("a.png", "b.png")], tmp_path / "out" / "faces.jsonl"
    config = preset("tiny", "face")
    first = locate_faces(items, config, cache, progress=False)
    assert set(first) == {"a.png", "b.png"} and len(cache.read_text().splitlines()) == 2
    assert locate_faces(items, config, cache, progress=False) == first
    assert len(cache.read_text().splitlines()) == 2
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    again = locate_faces(items, config, cache, progress=False)
    assert again == {"a.png": None, "b.png": first["b.png"]}
    with cache.open("a") as file:
        file.write('["b.png", [1, 2, 3')  # torn
    assert locate_faces(items, config, cache, progress=False) == again
    assert len(cache.read_text().splitlines()) == 4


def test_rows_without_a_split_are_never_in_both(tmp_path):
    for index in range(60):
        save(tmp_path / ("real", "fake")[index % 2] / f"{index}.png", index)
    train, val = ({i.name for i in read_manifest(tmp_path, split=s)[0]} for s in ("train", "val"))
    assert not train & val and len(train | val) == 60 and 1 <= len(val) <= 15


def test_a_generator_called_whichisreal_is_fake(tmp_path):
    save(tmp_path / "a.png")
    for name, label in [
        ("whichisreal_Fake", 1),
        ("DFDC_Real", 0),
        ("FF-real", 0),
        ("FF-DF", 1),
        ("FF-FH", 1),
        ("DFDCP_FakeA", 1),
    ]:
        tree = {"D": {name: {"test": {"v": {"label": name, "frames": ["a.png"]}}}}}
        (tmp_path / "b.json").write_text(json.dumps(tree))
        assert read_manifest(tmp_path / "b.json")[0][0].label == label


@pytest.mark.parametrize(
    "rows, header, message",
    [
        ([("a.png", "maybe")], ("path", "label"), "line 2: label is 'maybe'"),
        ([("a.png",)], ("path",), "column label is missing"),
        ([("gone.png", "1")], ("path", "label"), "no usable picture"),
    ],
)
def test_bad_manifests_say_why(tmp_path, rows, header, message):
    with pytest.raises(ManifestError, match=message):
        read_manifest(manifest(tmp_path, rows, header))
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(tmp_path / "none.csv")


def test_caps_drops_and_frames(tmp_path):
    path = write(tmp_path, train=40, val=0)
    items, _ = read_manifest(path)
    counts = Counter((i.source, i.label) for i in items)
    assert counts[("drawn0", 1)] == 10
    kept, report = select(items, SamplingConfig(cap=("drawn0/fake=3",), drop=("drawn1/real=0.5",)), 0)
    counts = Counter((i.source, i.label) for i in kept)
    assert counts == {
        ("drawn0", 0): 10,
        ("drawn0", 1): 3,
        ("drawn1", 0): 5,
        ("drawn1", 1): 10,
    }
    assert len(kept) + len(report.dropped) == 40
    assert (
        select(items, SamplingConfig(cap=("drawn0/fake=3",)), 0)[0]
        == select(items, SamplingConfig(cap=("drawn0/fake=3",)), 0)[0]
    )
    video = [replace(i, video="v") for i in items if i.label and i.source == "drawn0"]
    kept, _ = select(video, SamplingConfig(frames=4), 0)
    assert kept == [video[place] for place in (1, 3, 6, 8)]  # of ten
    for wrong in ({"drop": ("drawn0/fake=1.5",)}, {"cap": ("drawn0/fake=-1",)}):
        with pytest.raises(ConfigError, match="must lie between 0 and"):
            select(items, SamplingConfig(**wrong), 0)
    with pytest.raises(ConfigError, match="drawn9"):
        select(items, SamplingConfig(cap=("drawn9/fake=3",)), 0)


def test_a_generator_that_is_left_out_loses_its_fakes_alone():
    """A real picture stays, though its row names the generator of the fakes beside it."""
    made = [(0, ""), (0, "gan"), (1, "gan"), (1, "diffusion"), (1, "gan")]
    items = [Item(f"{n}.png", Path(), label, generator=generator) for n, (label, generator) in enumerate(made)]
    kept, report = select(items, SamplingConfig(leave_out=("gan",)), 0)
    assert kept == [items[0], items[1], items[3]]
    assert report.dropped == [(name, "generator gan is left out") for name in ("2.png", "4.png")]
    with pytest.raises(ConfigError, match=r"leave_out names \['vae'\]; the manifest has \['diffusion', 'gan'\]"):
        select(items, SamplingConfig(leave_out=("gan", "vae")), 0)


def test_a_real_and_a_fake_video_of_one_name_are_two_videos():
    """Each keeps its own middle frame of two stretches."""
    items = [Item(f"{label}/{n}.png", Path(), label, "s", video="000") for label in (0, 1) for n in range(6)]
    kept, _ = select(items, SamplingConfig(frames=2), 0)
    assert [item.name for item in kept] == ["0/1.png", "0/4.png", "1/1.png", "1/4.png"]


def plan_of(labels, sources=None, **changes):
    settings = {"sampling": SamplingConfig(), "blend_p": 0.0, "batch": 8, "seed": 0}
    sources = sources or ["s"] * len(labels)
    return plan_epoch(labels, sources, **(settings | {"epoch": 0} | changes))


def test_paired_batches_hold_a_real_picture_of_each_fakes_group():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    groups = ["a", "a", "b", "", "a", "b", "b", "a", "c", ""]  # c has no real picture, and two have no group
    paired = SamplingConfig(paired=True)
    plan = plan_of(labels, sampling=paired, groups=groups, batch=2, batches=40)
    seen = set()
    for real, fake in plan:
        assert (labels[real.index], labels[fake.index]) == (0, 1)
        if groups[fake.index] in ("a", "b"):
            assert groups[real.index] == groups[fake.index]
        seen.add(real.index)
    assert seen == {0, 1, 2, 3}
    assert plan == plan_of(labels, sampling=paired, groups=groups, batch=2, batches=40)
    with pytest.raises(ConfigError, match="column `group`"):
        plan_of(labels, sampling=paired, groups=[""] * 10, batch=2)
    with pytest.raises(ConfigError, match="needs sampling.balance"):
        SamplingConfig(paired=True, balance="none")
    with pytest.raises(ConfigError, match="even train.batch"):
        override(preset("tiny", "global"), ["sampling.paired=true", "train.batch=3"])


def test_paired_batches_hold_the_picture_that_a_self_blended_fake_is_made_of():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    plan = plan_of(labels, sampling=SamplingConfig(paired=True), groups=[""] * 10, blend_p=0.5, batch=2, batches=60)
    blended = [(real.index, fake.index) for real, fake in plan if fake.blend]
    assert 15 < len(blended) < 45 and all(real == fake for real, fake in blended)
    assert {real for real, _ in blended} == {0, 1, 2, 3}
    alone = [(real, fake) for real, fake in plan if not fake.blend]
    assert all((labels[real.index], labels[fake.index]) == (0, 1) for real, fake in alone)
    odd = plan_of(labels, sampling=SamplingConfig(paired=True), groups=[""] * 10, blend_p=1.0, batch=3)
    assert [len(samples) for samples in odd] == [3, 3, 3]


def test_balanced_batches_are_half_and_half():
    labels = np.array([0] * 90 + [1] * 10)
    plan = plan_of(labels)
    assert len(plan) == 12
    for samples in plan:
        assert sum(labels[s.index] for s in samples) == 4
        assert sum(labels[s.index] for s in samples[:4]) == 2  # so is each of two ranks' shares
    again = plan_of(labels)
    other = plan_of(labels, epoch=1)
    assert plan == again and plan != other
    with pytest.raises(ConfigError, match="needs both classes"):
        plan_of(labels[:90])


@pytest.mark.parametrize("balance", ["none", "balanced", "temperature"])
def test_an_epoch_of_so_many_batches_whatever_the_size_of_the_data(balance):
    labels = np.array([0] * 30 + [1] * 10)
    sampling = SamplingConfig(balance=balance)
    for batch, batches in ((8, 3), (8, 25), (3, 7), (1, 5)):
        settings = {"sampling": sampling, "batch": batch, "batches": batches}
        plan = plan_of(labels, **settings)
        assert [len(samples) for samples in plan] == [batch] * batches
        positions = [s.position for samples in plan for s in samples]
        assert positions == list(range(batch * batches))
        assert plan == plan_of(labels, **settings) != plan_of(labels, epoch=1, **settings)
    counts = np.bincount(
        [s.index for samples in plan_of(labels, **(settings | {"batch": 8, "batches": 25})) for s in samples],
        minlength=40,
    )
    if balance == "none":
        assert counts.tolist() == [5] * 40  # 200 of 40: five whole passes
    elif balance == "balanced":
        assert set(counts[:30]) == {3, 4} and set(counts[30:]) == {10}


def test_temperature_weights_sources_by_the_square_root():
    labels = np.array([0, 1] * 5000)
    sources = ["big"] * 9900 + ["small"] * 100
    sampling = SamplingConfig(balance="temperature", temperature=0.5)
    plan = plan_of(labels, sources, sampling=sampling, batch=100)
    small = np.mean([sources[s.index] == "small" for samples in plan for s in samples])
    expected = 50**0.5 / (50**0.5 + 4950**0.5)  # n * n ** -0.5 of each class
    assert small == pytest.approx(expected, abs=0.01)


def test_blended_slots_take_real_pictures():
    labels = np.array([0, 1] * 500)
    plan = plan_of(labels, blend_p=0.3, batch=10)
    samples = [s for batch in plan for s in batch]
    blended = [s for s in samples if s.blend]
    assert all(labels[s.index] == 0 for s in blended)
    assert len(blended) / (len(samples) / 2) == pytest.approx(0.3, abs=0.06)


def test_geometry_moves_picture_and_mask_together():
    rng = np.random.default_rng(0)
    image = np.zeros((64, 64, 3), np.uint8)
    image[10:30, 5:25] = 255
    mask = (image[:, :, 0] / 255).astype(np.float32)
    moved = 0
    geometry = Augmentation(AugmentConfig(flip_p=0.5, rotate_p=1.0, crop_p=0.5, side=64))
    for _ in range(20):
        out, out_mask = geometry(image, mask, rng)
        assert out.shape == image.shape and out.dtype == np.uint8 and out_mask.dtype == np.float32
        assert np.abs(out[:, :, 0] / 255 - out_mask).mean() < 0.02
        moved += np.abs(out.astype(int) - image).mean() > 5
    assert moved > 15


def test_the_parts_of_an_augmentation_fire_independently():
    """albumentations gives one seed to all that it composes: unless they are seeded apart they fire together."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    augment = Augmentation(AugmentConfig(flip_p=0.5, rotate_p=0.5, crop_p=0, colour_p=0.5, sharpness_p=0.5, side=32))
    seen = []
    for _ in range(400):
        augment(image, None, rng)
        seen.append(
            [t.py_random.random() for t in (*augment.compose.transforms, *augment.compose.transforms[-1].transforms)]
        )
    tied = np.abs(np.corrcoef(np.array(seen).T) - np.eye(len(seen[0])))
    assert tied.max() < 0.2
    plain = Augmentation(AugmentConfig(flip_p=0.5, rotate_p=0.5, crop_p=0, side=32))
    drawn = [plain(image, None, rng)[0] for _ in range(400)]
    assert np.mean([np.array_equal(x, image) for x in drawn]) == pytest.approx(0.25, abs=0.08)
    assert np.mean([np.array_equal(x, image[:, ::-1]) for x in drawn]) == pytest.approx(0.25, abs=0.08)


def test_masks_lie_on_a_face_that_is_too_small_to_be_cut_out(tmp_path):
    """The whole picture is seen, and what is forged in it is the face, not its middle; without a face nothing is known."""
    picture = np.random.default_rng(0).integers(0, 256, (360, 640, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    face = FaceBox(540, 20, 600, 90, 0.9)
    config = override(
        preset("tiny", "vlaforge"),
        ["augment.flip_p=0", "augment.rotate_p=0", "degradation.global_p=0", "face.min_area=0.1", "face.max_area=1"],
    )
    config = override(config, ["augment.crop_p=0", "sampling.fully_generated=gan"])
    side = config.view.side

    def seen(label, blend, box):
        item = Item("a.png", tmp_path / "a.png", label, generator="gan" if label else "")
        views = TrainingViews([item], config, {"a.png": box}, seed=3)
        _, _, mask, known, _ = views[Sample(0, 0, 0, blend)]
        return mask, known

    for label, blend in ((1, False), (0, True)):
        mask, known = seen(label, blend, face)
        y, x = np.nonzero(mask > 0.5)
        assert known and x.min() > 0.7 * side and y.max() < 0.4 * side
    assert not seen(1, False, None)[1]


def test_a_mask_is_cut_with_the_face(tmp_path):
    """What is forged is white in the picture too: view and mask show the same."""
    forged = np.zeros((200, 200), np.uint8)
    forged[40:75, 110:135] = 255
    cv2.imwrite(str(tmp_path / "a.png"), np.repeat(forged[:, :, None], 3, axis=2))
    cv2.imwrite(str(tmp_path / "mask.png"), forged)
    still = ["augment.flip_p=0", "augment.rotate_p=0", "augment.crop_p=0", "augment.colour_p=0"]
    config = override(preset("tiny", "vlaforge"), [*still, "augment.sharpness_p=0", "degradation.global_p=0"])
    assert config.view.source == "face"
    views = TrainingViews(
        [Item("a.png", tmp_path / "a.png", 1, mask=str(tmp_path / "mask.png"))],
        config,
        {"a.png": FaceBox(100, 30, 160, 90, 0.9)},
        seed=3,
    )
    image, _, mask, known, _ = views[Sample(0, 0, 0, False)]
    assert known and 0.05 < mask.mean() < 0.5  # 2 % of the whole picture
    np.testing.assert_allclose(image[:, :, 0] / 255, mask, atol=0.1)  # bytes are clipped at every resize


@pytest.mark.parametrize("name", ["global", "face", "vlaforge"])
def test_training_views_are_a_function_of_their_sample(tmp_path, name):
    items, _ = read_manifest(write(tmp_path), split="train")
    config = preset("tiny", name)
    views = TrainingViews(items, config, {}, seed=3)
    plan = plan_epoch(
        np.array([i.label for i in items]),
        [i.source for i in items],
        sampling=config.sampling,
        blend_p=0.5,
        batch=4,
        seed=3,
        epoch=0,
    )
    twin = TrainingViews(items, config, {}, seed=3)
    for sample in plan[0] + plan[1]:
        (image, label, mask, known, _), other = views[sample], twin[sample]
        np.testing.assert_array_equal(image, other[0])
        side = config.view.side
        assert image.shape == (side, side, 3) and image.dtype == np.uint8
        assert label == (1 if sample.blend else items[sample.index].label)
        if name == "vlaforge":
            assert mask.shape == (side, side) and 0 <= mask.min() and mask.max() <= 1
            assert known == (label == 0 or sample.blend)
            assert (mask.max() > 0.3) == sample.blend
    batch = next(iter(training_loader(views, plan, workers=0)))
    assert batch.images.shape == (4, 3, side, side) and batch.labels.tolist() == [
        0,
        1,
        0,
        1,
    ]


def test_an_unreadable_picture_stops_or_is_dropped_by_policy(tmp_path):
    items, _ = read_manifest(write(tmp_path), split="train")
    items[0].path.write_bytes(b"no picture")
    config = preset("tiny", "global")
    bad, good = Sample(0, 0, 0, False), Sample(0, 1, 3, False)
    with pytest.raises(UnreadableInput, match=items[0].path.name):
        TrainingViews(items, config, {}, 0)[bad]
    dropping = replace(config, sampling=replace(config.sampling, on_unreadable="drop"))
    views = TrainingViews(items, dropping, {}, 0)
    assert views[bad] is None
    assert len(collate([views[bad], views[good]]).labels) == 1


def test_a_picture_that_kills_its_loader_stops_by_name_or_is_dropped(tmp_path, monkeypatch):
    items, _ = read_manifest(write(tmp_path), split="train")
    decode, killer = training.decode_image, items[2].path

    def decode_image(path):
        if path == killer:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path)

    monkeypatch.setattr(training, "decode_image", decode_image)
    config = preset("tiny", "global")
    config = replace(config, degradation=replace(config.degradation, global_p=0.0))
    plan = [[Sample(0, 2 * b + i, 2 * b + i, False) for i in range(2)] for b in range(3)]
    views = TrainingViews(items, config, {}, 0)
    with pytest.raises(UnreadableInput, match=f"{killer.name}: reading it killed its process"):
        list(training_loader(views, plan, workers=1))
    dropping = replace(config, sampling=replace(config.sampling, on_unreadable="drop"))
    views = TrainingViews(items, dropping, {}, 0)
    batches = list(training_loader(views, plan, workers=1))
    assert [batch.names for batch in batches] == [
        (items[0].name, items[1].name),
        (items[3].name,),
        (items[4].name, items[5].name),
    ]
    cache = tmp_path / "faces.jsonl"
    found = locate_faces(items[:4], dropping, cache, workers=1, progress=False)
    assert list(found) == [items[0].name, items[1].name, items[3].name]


def test_degraded_validation_depends_on_the_name_alone(tmp_path):
    items, _ = read_manifest(write(tmp_path), split="val")
    config, engine = preset("tiny", "global"), DegradationConfig(global_p=1.0, op_p=1.0)
    forward = ValidationViews(items, config, engine, 7)
    backward = ValidationViews(items[::-1], config, engine, 7)
    np.testing.assert_array_equal(forward[2], backward[len(items) - 3])
    picture = portrait(np.random.default_rng(0))
    first, again = (degraded_picture(picture, "a", engine, 1) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - degraded_picture(picture, "b", engine, 1)).mean() > 1
