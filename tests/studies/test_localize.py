"""Localisation on self-blended fakes: figures by hand, masks that follow the view, the command on a tiny bundle."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from tiny import CLIP, VLAFORGE, make_faces

from solution.bundles.bundle import load_members, write_bundle
from solution.bundles.members import build_member, dump_tower, fill_tower, save_member
from solution.config import (
    DINOV2_IN_CLIP,
    AdapterConfig,
    Dinov2Arch,
    FaceConfig,
    MemberConfig,
    TowerConfig,
    ViewConfig,
    VoteConfig,
)
from solution.data.manifest import read_manifest
from solution.errors import UsageError
from solution.evaluation.conditions import degraded_conditions
from solution.evaluation.measure import CLEAN
from solution.models.towers import build_tower, tower_state
from solution.records import MemberOutput
from solution.studies import localize


@pytest.fixture
def manifest(tmp_path):
    make_faces(tmp_path, 3)
    rows = ["path,label,split", "0.png,0,val", "1.png,0,val", "2.png,1,val"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "manifest.csv"


def config(source: str = "image") -> MemberConfig:
    arch = replace(CLIP, context=11, vocab=12, **DINOV2_IN_CLIP)
    settings = replace(VLAFORGE, train_text=True)
    return MemberConfig(
        "vlaforge",
        ViewConfig(source, 64, 64),
        TowerConfig("tiny-clip", "clip", arch, source="bundle:tiny-dino"),
        AdapterConfig("none"),
        vlaforge=settings,
    )


@pytest.fixture
def bundle(tmp_path):
    """A bundle of a member with a learned text tower on the DINOv2 tower that travels with it, and the member."""
    torch.manual_seed(0)
    arch = Dinov2Arch(width=32, layers=3, heads=4, swiglu=False, image_side=56)
    dino = build_tower(TowerConfig("tiny-dino", "dinov2", arch))
    folder, chosen = tmp_path / "bundle", config()
    clip = fill_tower(chosen.tower, tower_state(dino))
    member = build_member(chosen, {"tiny-clip": clip}).eval()
    save_member(member, folder / "vlaforge", dtype=torch.float32)
    dump_tower(dino, folder / "towers" / "tiny-dino.safetensors", dtype=torch.float32)
    return write_bundle(folder, ["vlaforge"], VoteConfig({"vlaforge": 1}), {}), member


def test_a_saved_member_scores_and_localises_as_before(bundle):
    opened, member = bundle
    loaded = load_members(opened)["vlaforge"]
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        before, after = member(images), loaded(images)
    assert torch.equal(before.logit, after.logit)
    assert torch.equal(before.localization, after.localization)
    assert not after.logit.requires_grad and not loaded.training


def test_overlap_and_pixel_auc_by_hand():
    mask = np.zeros((4, 4), np.float32)
    mask[:2, :2] = 1
    found = np.zeros((4, 4), np.float32)
    found[:2, 1:3] = 0.9  # two of four pixels right, two of four wrong
    overlap, area = localize.compare(found, mask)
    assert overlap == pytest.approx(2 / 6)
    # forged: 2 at 0.9, 2 at 0; others: 2 at 0.9, 10 at 0.
    wins = 2 * 10 + 0.5 * (2 * 2 + 2 * 10)
    assert area == pytest.approx(wins / (4 * 12))
    assert localize.compare(mask, mask) == (1.0, 1.0)
    overlap, area = localize.compare(np.zeros((4, 4)), np.zeros((4, 4)))
    assert overlap == 1.0 and np.isnan(area)


@pytest.mark.parametrize("source", ["image", "face"])
def test_the_mask_lies_where_the_view_was_changed(manifest, source):
    items, _ = read_manifest(manifest, split="val")
    chosen = replace(
        config(source),
        view=ViewConfig(source, 96, 80),
        face=FaceConfig(min_area=0.01),
    )
    source_changed = 0
    for seed in range(6):
        for blend in localize.blends(items[:2], chosen, CLEAN, seed):
            assert blend.real.shape == blend.fake.shape == (80, 80, 3)
            assert blend.mask.shape == (80, 80) and blend.mask.max() > 0.5
            change = np.abs(blend.fake.astype(int) - blend.real).mean(axis=2)
            assert change[blend.mask > 0.9].mean() > 0.3
            if change[:4].max() == 0:  # the target is the picture itself: so all around
                source_changed += 1
                assert np.quantile(change[blend.mask == 0], 0.99) == 0
    assert source_changed >= 3


def test_degradation_leaves_the_mask_alone(manifest):
    items, _ = read_manifest(manifest, split="val")
    conditions = (CLEAN, *degraded_conditions([1]))
    clean, degraded = (list(localize.blends(items[:2], config(), how, 1)) for how in conditions)
    for a, b in zip(clean, degraded):
        assert np.array_equal(a.mask, b.mask) and not np.array_equal(a.fake, b.fake)


def test_a_member_that_maps_no_forgery_is_named(bundle, monkeypatch):
    _, member = bundle
    views = [np.zeros((64, 64, 3), np.uint8)] * 2

    def maps(*names):
        evidence = {name: torch.rand(2, 1, 4, 4) for name in names}
        monkeypatch.setattr(member, "forward", lambda _: MemberOutput(torch.zeros(2), torch.zeros(2, 3), evidence))
        return localize.maps_of(member, views)[1]

    assert list(maps("localization", "other")) == ["localization"]
    with pytest.raises(UsageError, match="member vlaforge has no map 'localization' .* its maps: other"):
        maps("other")


def test_the_command_writes_figures_and_pictures(manifest, bundle, tmp_path, capsys):
    opened, _ = bundle
    out = tmp_path / "out"
    given = ["--data", str(manifest), "--out", str(out), "--pictures", "1"]
    assert localize.main(["--weights", str(opened.folder), *given]) == 0
    record = json.loads((out / "localization.json").read_text())
    assert record["pictures"] == 2 and record["bundle"] == opened.hash
    assert 0 <= record["iou_mean"] <= 1 and 0 <= record["pixel_auc_mean"] <= 1
    assert [p.name for p in out.glob("*.png")] == ["001.png"]
    assert cv2.imread(str(out / "001.png")).shape == (64, 4 * 64, 3)
    assert json.loads(capsys.readouterr().out)["pictures"] == 2
    nothing = ["--weights", str(opened.folder), *given, "--split", "test"]
    assert localize.main(nothing) == 2
    assert localize.main(["--weights", str(tmp_path / "nowhere"), *given]) == 3
    capsys.readouterr()
    assert localize.main(["--weights", str(opened.folder), *given, "--member", "face"]) == 2
    assert "--member face: " in (said := capsys.readouterr().err) and "localize are vlaforge" in said
