"""A member's kind is one of the classes, its name is free: two of one kind train, assemble and score in one bundle."""

import csv
import json

import huggingface_hub
import numpy as np
import pytest
import torch
from make_smoke_data import write
from tiny import make_bundle, make_pictures

import submit
from solution import assemble, evaluate, train
from solution.bundles.bundle import load_members
from solution.bundles.card import model_card, show
from solution.bundles.members import CLASSES
from solution.bundles.selftest import run_selftest
from solution.bundles.store import open_bundle
from solution.config import KINDS, MEMBERS, override
from solution.data.manifest import Item
from solution.models import flops
from solution.presets import preset
from solution.scoring.ensemble import load_ensemble
from solution.scoring.stream import score_pictures
from solution.training.processes import Machine
from solution.training.validation import score_items


def words(*given):
    return [str(word) for word in given]


def test_two_of_one_kind_train_assemble_and_score(tmp_path, capsys):
    data = write(tmp_path / "data", train=8, val=8)
    runs, bundle = tmp_path / "runs", tmp_path / "bundle"
    common = words("--preset", "tiny", "--random-towers", "--workers", 0, "--quiet", "--device", "cpu")
    common += words("--data", data, "--out", runs, "--set", "train.max_steps=1", "--set", "train.epochs=1")
    assert train.main(["--member", "wide", *common]) == 0
    twin = words("--set", "name=second-look", "--set", "tower.name=tiny-second", "--set", "train.seed=1")
    assert train.main(["--member", "wide", *common, *twin]) == 0
    claims = tmp_path / "claimed.json"
    claims.write_text('["wide/spread at its mean"]')
    made = words("--members", runs, "--names", "wide,second-look", "--data", data, "--out", bundle, "--claims", claims)
    alarms = ["--false-alarms", "0.2", "--worst-false-alarms", "0.4"]
    assert assemble.main([*made, *alarms, "--device", "cpu", "--workers", "0", "--quiet"]) == 0
    opened = open_bundle(str(bundle))
    assert (opened.vote.false_alarm, opened.vote.worst_false_alarm) == (0.2, 0.4)
    assert {name: c.kind for name, c in opened.configs.items()} == {"wide": "global", "second-look": "global"}
    assert {"towers/tiny-wide.safetensors", "towers/tiny-second.safetensors"} < set(opened.files)
    assert "claims.json" in opened.files and (bundle / "claims.json").read_text() == claims.read_text()
    card = huggingface_hub.ModelCard(model_card(opened, "me/mine"))
    told = opened.report["ways"][opened.report["chosen"]]["clean"]
    assert f"| seen generators | clean | {told['value']:.3f} ({told['low']:.3f}-{told['high']:.3f}) |" in card.text
    assert "| real, clean |" in card.text and "Not measured" not in card.text
    assert round(told["value"], 4) in [result.metric_value for result in card.data.eval_results]
    configs = [result.dataset_config for result in card.data.eval_results]
    assert len(configs) == len(set(configs)) > 2  # else the Hub shows one of them
    pictures, out = make_pictures(tmp_path / "in", 3), tmp_path / "preds.csv"
    given = words("--weights", bundle, "--input", pictures, "--out", out, "--members", "all", "--device", "cpu")
    assert submit.main([*given, "--workers", "0"]) == 0
    with (tmp_path / "preds.members.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    columns = [column for column in rows[0] if "second-look" in column]
    assert columns and any(rows[0][c] != rows[0][c.replace("second-look", "wide")] for c in columns)


GIANT_SHRUNK = {  # its configuration at a geometry of thousands of weights
    "dino": ("arch.width=24", "arch.layers=2", "arch.heads=2", "arch.image_side=56"),
    "clip": ("arch.width=32", "arch.layers=3", "arch.heads=2", "arch.image_side=56", "arch.embed_dim=16"),
    "text": ("arch.text_width=16", "arch.text_layers=1", "arch.text_heads=2"),
    "vlaforge": (
        *("width=24", "blocks=3", "heads=3", "queries=8", "input_side=64", "decoder_hidden=16", "decoder_out=8"),
        *("fusion_after=1", "fusion_layers=1", "adapter_after=1", "adapter_width=24"),
    ),
}


def shrunk(member):
    """`--set` arguments that make the giant preset's member small, everything else as it is."""

    def of(part, *groups):
        return [f"{part}.{setting}" for group in groups for setting in GIANT_SHRUNK[group]]

    side = 64 if member == "vlaforge" else 56
    found = [f"view.resize={side}", f"view.side={side}", "train.batch=4", "train.accumulate=1", "train.max_steps=1"]
    if member in ("qtfp", "vlaforge"):
        found += of("tower", "clip", *["text"] * (member == "vlaforge"))
    else:
        found += of("tower", "dino") + (of("clip", "clip") if member == "fusion" else [])
    found += ["qtfp.key_width=8"] if member == "qtfp" else of("vlaforge", "vlaforge") * (member == "vlaforge")
    found += [f"train.epochs={2 if member == 'fusion' else 1}"]
    return found + (["train.head_epochs=1"] if member == "fusion" else [])


def test_the_giant_configuration_goes_from_end_to_end_with_no_hub(tmp_path, capsys):
    """Public towers are random and their bundle says so; it trains, assembles, scores and evaluates."""
    data = write(tmp_path / "data", train=8, val=8)
    runs, bundle = tmp_path / "runs", tmp_path / "bundle"
    for member in MEMBERS:
        sets = [word for setting in shrunk(member) for word in ("--set", setting)]
        given = words("--preset", "giant", "--random-towers", "--workers", 0, "--quiet", "--device", "cpu")
        assert train.main([*given, *words("--member", member, "--data", data, "--out", runs), *sets]) == 0, member
    names = words("--members", runs, "--names", ",".join(MEMBERS), "--data", data, "--out", bundle)
    assert assemble.main([*names, "--device", "cpu", "--workers", "0", "--quiet"]) == 0
    towers = json.loads((bundle / "ensemble.json").read_text())["towers"]
    assert towers["dinov2-giant"] == towers["clip-vit-l14"] == {"random": 0}
    assert not (bundle / "towers").exists()
    opened = open_bundle(str(bundle))
    assert opened.configs["global"].tower == opened.configs["fusion"].tower
    assert "random weights" in show(opened)
    pictures, out = make_pictures(tmp_path / "in", 2), tmp_path / "preds.csv"
    asked = words("--weights", bundle, "--input", pictures, "--out", out, "--members", "all", "--device", "cpu")
    assert submit.main([*asked, "--workers", "0", "--exact"]) == 0
    assert len(out.read_text().splitlines()) == 3
    measured = words("--weights", bundle, "--data", data, "--split", "val", "--out", tmp_path / "eval", "--draws", 10)
    assert evaluate.main([*measured, "--device", "cpu", "--workers", "0", "--quiet"]) == 0
    passed = run_selftest(opened)
    assert passed.passed


def test_every_kind_has_its_class_and_what_it_needs():
    assert list(CLASSES) == list(flops._PRODUCTS) == list(KINDS)
    renamed = {kind: override(preset("tiny", kind), ["name=other"]) for kind in KINDS}
    assert {kind: config.kind for kind, config in renamed.items()} == {kind: kind for kind in KINDS}
    assert [kind for kind, config in renamed.items() if config.needs_masks] == ["vlaforge"]
    still = {k: override(c, ["augment.self_blend_p=0", "view.source=image"]) for k, c in renamed.items()}
    assert [kind for kind, config in still.items() if config.needs_faces] == ["vlaforge"]


def test_every_kind_scores_from_one_bundle_what_training_validated(tmp_path):
    """The seven of them on towers that some share: each by its own class, its own way, and the same by both doors."""
    kinds = tuple(KINDS)
    bundle = make_bundle(tmp_path / "bundle", kinds)
    members = load_members(bundle)
    assert {kind: type(member) for kind, member in members.items()} == CLASSES
    items = [Item(path.name, path, 0) for path in sorted(make_pictures(tmp_path / "in", 2).iterdir())]
    scored = score_pictures(load_ensemble(bundle, "cpu", exact=True), items, progress=False)
    assert set(scored) == set(kinds)
    machine = Machine(torch.device("cpu"), progress=False)
    for kind, member in members.items():
        validated = score_items(member, items, None, machine=machine, bf16=False)
        np.testing.assert_allclose(scored[kind], validated, atol=1e-4)
    logits = np.concatenate([scored[kind] for kind in kinds])
    assert np.isfinite(logits).all() and np.diff(np.sort(logits)).min() > 1e-5


@pytest.mark.parametrize(
    "source, travels, derived",
    [("bundle", True, ""), ("bundle:other", True, "other"), ("a/b", False, ""), ("random:7", False, "")],
)
def test_a_tower_says_where_its_weights_are(source, travels, derived):
    tower = override(preset("tiny", "global"), [f"tower.source={source}"]).tower
    assert (tower.travels, tower.derived_from) == (travels, derived)
    assert tower.public == (source == "a/b") and tower.seed == (7 if source == "random:7" else None)
    assert tower.stored_name == (derived or tower.name)
