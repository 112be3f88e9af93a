"""A member's kind is one of the classes, its name is free: two of one kind train, assemble and score in one bundle."""

import csv

import pytest
from make_smoke_data import write
from tiny import make_pictures

import submit
from solution import assemble, train
from solution.bundles.members import CLASSES
from solution.bundles.store import open_bundle
from solution.config import KINDS, override
from solution.models import flops
from solution.presets import preset


def words(*given):
    return [str(word) for word in given]


def test_two_of_one_kind_train_assemble_and_score(tmp_path, capsys):
    data = write(tmp_path / "data", train=8, val=8)
    runs, bundle = tmp_path / "runs", tmp_path / "bundle"
    common = words("--preset", "tiny", "--random-towers", "--workers", 0, "--quiet", "--device", "cpu")
    common += words("--data", data, "--out", runs, "--set", "train.max_steps=1", "--set", "train.epochs=1")
    assert train.main(["--member", "global", *common]) == 0
    twin = words("--set", "name=second-look", "--set", "tower.name=tiny-second", "--set", "train.seed=1")
    assert train.main(["--member", "global", *common, *twin]) == 0
    made = words("--members", runs, "--names", "global,second-look", "--data", data, "--out", bundle)
    assert assemble.main([*made, "--device", "cpu", "--workers", "0", "--quiet"]) == 0
    opened = open_bundle(str(bundle))
    assert {name: c.kind for name, c in opened.configs.items()} == {"global": "global", "second-look": "global"}
    assert {"towers/tiny-global.safetensors", "towers/tiny-second.safetensors"} < set(opened.files)
    pictures, out = make_pictures(tmp_path / "in", 3), tmp_path / "preds.csv"
    given = words("--weights", bundle, "--input", pictures, "--out", out, "--members", "all", "--device", "cpu")
    assert submit.main([*given, "--workers", "0"]) == 0
    with (tmp_path / "preds.members.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    columns = [column for column in rows[0] if "second-look" in column]
    assert columns and any(rows[0][c] != rows[0][c.replace("second-look", "global")] for c in columns)


def test_every_kind_has_its_class_and_what_it_needs():
    assert list(CLASSES) == list(flops._PRODUCTS) == list(KINDS)
    renamed = {kind: override(preset("tiny", kind), ["name=other"]) for kind in KINDS}
    assert {kind: config.kind for kind, config in renamed.items()} == {kind: kind for kind in KINDS}
    assert [kind for kind, config in renamed.items() if config.needs_masks] == ["vlaforge"]
    still = {k: override(c, ["augment.self_blend_p=0", "view.source=image"]) for k, c in renamed.items()}
    assert [kind for kind, config in still.items() if config.needs_faces] == ["vlaforge"]


@pytest.mark.parametrize(
    "source, travels, derived", [("bundle", True, ""), ("bundle:other", True, "other"), ("a/b", False, "")]
)
def test_a_tower_says_where_its_weights_are(source, travels, derived):
    tower = override(preset("tiny", "global"), [f"tower.source={source}"]).tower
    assert (tower.travels, tower.public, tower.derived_from) == (travels, not travels, derived)
    assert tower.stored_name == (derived or tower.name)
