"""Members on towers of timm: trained, interrupted, resumed, stored, put into one bundle with others, scored."""

import json
from dataclasses import replace

import pytest
import torch
from make_smoke_data import write
from safetensors.torch import load_file, save_file
from tiny import TIMM, make_pictures, timm_tower

from solution import train
from solution.bundles.bundle import collect, load_members, tower_weights, write_bundle
from solution.bundles.card import model_card, show
from solution.bundles.members import build_member, fill_tower, read_config, save_member
from solution.config import AdapterConfig, VoteConfig, override
from solution.data.images import find_inputs
from solution.data.manifest import read_manifest
from solution.errors import WeightsError
from solution.models.keys import is_norm
from solution.models.towers import build_tower
from solution.presets import preset
from solution.scoring.ensemble import load_ensemble
from solution.scoring.stream import score_pictures
from solution.training.loop import Run, TrainingSet
from solution.training.processes import Machine, World

ADAPTERS = {
    "dinov3": AdapterConfig("lora", rank=4, dropout=0.1, projections=("q", "k", "v"), shared=True),
    "pe": AdapterConfig("norm"),
    "siglip2": AdapterConfig("full"),
    "eva02": AdapterConfig("effort", rank=1, dropout=0.0),
}
SETTINGS = ["train.epochs=1", "train.batch=4", "optim.lr=1e-3", "augment.self_blend_p=0", "view.source=image"]


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Folders as on the Hub, one for each family, by its name."""
    folders = {}
    for family, arch in TIMM.items():
        folder = folders[family] = tmp_path_factory.mktemp(family)
        torch.manual_seed(3)
        model = build_tower(timm_tower(family)).model
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"architecture": arch.model}))
    return folders


def config_of(family, folder):
    base = preset("tiny", "wide")
    config = replace(
        base,
        name=family,
        kind="global",
        view=replace(base.view, resize=32, side=32),
        tower=replace(timm_tower(family), source=str(folder), licence="a-licence"),
        adapter=ADAPTERS[family],
    )
    return override(config, SETTINGS)


def make_run(config, folder, validate=False):
    data = write(folder / "data", train=16, val=8)
    items, _ = read_manifest(data, split="train")
    validation = read_manifest(data, split="val")[0] if validate else []
    torch.manual_seed(0)
    towers = {config.tower.name: fill_tower(config.tower, tower_weights(config.tower))}
    member = build_member(config, towers)
    out = folder / "out" / config.name
    machine = Machine(torch.device("cpu"), World(), progress=False)
    return Run(member, TrainingSet(items, validation), out, machine=machine)


def weights(run):
    return {k: t.detach().clone() for k, t in run.member.stored_state().items()}


@pytest.mark.parametrize("family", TIMM)
def test_interrupted_equals_uninterrupted(family, public, tmp_path):
    config = config_of(family, public[family])
    whole = make_run(config, tmp_path / "a")
    before = weights(whole)
    assert whole.run().total == 4
    first = make_run(config, tmp_path / "b")
    step = first._optimizer_step

    def told(*given):
        if first.state.total == 1:
            first.stop()
        return step(*given)

    first._optimizer_step = told
    first.run()
    resumed = make_run(config, tmp_path / "b")
    assert resumed.run().total == 4
    after, again = weights(whole), weights(resumed)
    assert all(torch.equal(after[key], again[key]) for key in after)
    assert any(not torch.equal(after[key], before[key]) for key in after if not key.startswith("own."))


@pytest.mark.parametrize("family", TIMM)
def test_trained_members_of_all_families_score_from_one_bundle(family, public, tmp_path):
    """Alike in the bundle and out of it, alone and in a batch."""
    config = config_of(family, public[family])
    run = make_run(config, tmp_path, validate=True)
    run.run()
    other = override(preset("tiny", "wide"), ["name=streamed"])
    save_member(build_member(other, {other.tower.name: build_tower(other.tower)}), tmp_path / "out/streamed")
    names = [family, "streamed"]
    collect(tmp_path / "out", tmp_path / "bundle", names)
    bundle = write_bundle(tmp_path / "bundle", names, VoteConfig(dict.fromkeys(names, 1)), {})
    stored = load_file(bundle.folder / family / "model.safetensors")
    tower = f"towers/{config.tower.name}.safetensors"
    if family == "siglip2":  # trained whole, so the weights travel
        assert tower in bundle.files and read_config(bundle.folder / family).tower.source == "bundle"
    else:
        assert tower not in bundle.files and bundle.configs[family].tower.source == str(public[family])
    told, card = show(bundle), model_card(bundle, "someone/something")
    for text in (told, card):
        assert "a-licence" in text and "not stated" in text
    if family == "pe":
        kept = {k.removeprefix("tower.") for k in stored if k.startswith("tower.")}
        assert kept and all(map(is_norm, kept))
    items = find_inputs(make_pictures(tmp_path / "in", 5))
    logits = {}
    for size in (1, 5):
        ensemble = load_ensemble(bundle, "cpu", exact=True, batch_size=size)
        logits[size] = torch.tensor(score_pictures(ensemble, items, progress=False)[family])
    torch.testing.assert_close(logits[1], logits[5], atol=1e-5, rtol=1e-5)
    fast = load_ensemble(bundle, "cpu", precision="bfloat16", second_look=False)
    near = torch.tensor(score_pictures(fast, items, progress=False)[family])
    torch.testing.assert_close(near, logits[5], atol=0.1, rtol=0.1)
    loaded = load_members(bundle)[family]
    for key, value in run.member.stored_state().items():  # saved as float16, the best or the last of the steps
        assert loaded.stored_state()[key].shape == value.shape


def test_tuned_norms_of_a_public_tower_are_nobody_elses(public):
    norm = config_of("pe", public["pe"])
    plain = replace(norm, name="other", adapter=AdapterConfig("lora"))
    with pytest.raises(WeightsError, match="give its tower another name"):
        from solution.bundles.members import tower_configs

        tower_configs([norm, plain])


def test_a_tower_is_swapped_by_name(tmp_path, capsys):
    data = write(tmp_path / "data", train=4, val=4)
    given = ["--member", "vlaforge", "--preset", "tiny", "--data", data, "--out", tmp_path / "out", "--quiet"]
    assert train.main([*map(str, given), "--timm", "vit_tiny_patch16_224.augreg_in21k"]) == 2
    assert "text encoder" in capsys.readouterr().err
    given[1] = "global"
    small = [
        "--random-towers",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--set",
        "train.max_steps=1",
        "--set",
        "tower.arch.layers=1",
    ]
    small += ["--set", "tower.arch.width=48", "--set", "tower.arch.heads=3", "--set", "view.side=32"]
    words = [*map(str, given), *small]
    assert train.main([*words, "--timm", "vit_tiny_patch16_224.augreg_in21k_nothing"]) == 2
    assert "no such pre-trained model" in capsys.readouterr().err
    assert train.main([*words, "--timm", "vit_tiny_patch16_224.augreg_in21k"]) == 0
    found = read_config(tmp_path / "out/global").tower
    assert (found.kind, found.arch.model, found.licence) == ("timm", "vit_tiny_patch16_224", "apache-2.0")
