"""Bundles: what is written is loaded, what does not fit is refused by name; renamed libraries; self-test; doctor."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import bundle_config
from torch import nn

from solution import doctor, weights
from solution.bundles import bundle, hub, selftest
from solution.bundles.bundle import About, collect, load_members, read_bundle, tower_weights, write_bundle
from solution.bundles.members import (
    build_member,
    dump_tower,
    fill_tower,
    load_member,
    pack_tower,
    random_towers,
    save_member,
)
from solution.bundles.store import open_bundle
from solution.config import MEMBERS, AdapterConfig, ClipArch, Dinov2Arch, MemberConfig, TowerConfig, VoteConfig
from solution.errors import WeightsError
from solution.models import libraries
from solution.models.blocks import block_of
from solution.models.calibration import Calibrator
from solution.models.towers import build_tower, tower_state
from solution.presets import preset

VOTE = VoteConfig(dict.fromkeys(MEMBERS, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle of all five tiny members on the towers that they train, with a self-test."""
    folder = tmp_path_factory.mktemp("made") / "bundle"
    torch.manual_seed(0)
    for name in (*MEMBERS, "semantic"):
        config = preset("tiny", name) if name in MEMBERS else bundle_config(name)
        save_member(build_member(config, random_towers([config])), folder / name)
    for name in ("global", "face"):  # frozen: no member writes it
        cut = random_towers([preset("tiny", name)])[f"tiny-{name}"]
        dump_tower(cut, folder / f"towers/tiny-{name}.safetensors")
    calibrators = {"face": Calibrator("temperature", (2.0,), fitted_on="a test")}
    report = {"auc": 0.5}
    made = write_bundle(folder, MEMBERS, VOTE, calibrators, report=report, about=About(data="none"))
    return selftest.add_golden(made)


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "bundle")
    return tmp_path / "bundle"


def rehash(folder):
    """Make ensemble.json agree with the files again."""
    path = folder / "ensemble.json"
    record = json.loads(path.read_text())
    record["files"] = {name: hub.sha256(folder / name) for name in record["files"]}
    path.write_text(json.dumps(record))


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def logits(members):
    return selftest.golden_logits(members)


# ------------------------------------------------------------------------------------------------ there and back
def test_a_bundle_comes_back_as_it_was(made):
    opened = open_bundle(str(made.folder))
    assert list(opened.configs) == list(MEMBERS)
    assert opened.configs["qtfp"] == preset("tiny", "qtfp")
    assert opened.vote == VOTE
    assert opened.calibrators["face"].parameters == (2.0,)
    assert opened.calibrators["global"].kind == "identity"
    assert (opened.report, opened.about.data) == ({"auc": 0.5}, "none")
    assert opened.hash == hub.sha256(made.folder / "ensemble.json")
    assert set(opened.files) >= {"golden.json", "towers/tiny-global.safetensors"}
    assert selftest.run_selftest(opened).worst == dict.fromkeys(MEMBERS, 0.0)


def test_members_share_their_towers_and_load_alone(made):
    members = load_members(made)
    assert members["fusion"].tower is members["face"].tower
    alone = load_members(made, ["qtfp"])
    assert logits(alone)["qtfp"] == logits(members)["qtfp"]
    assert not any(member.training for member in members.values())


def test_save_perturb_load_gives_equal_scores(tmp_path):
    config = preset("tiny", "face")
    config = replace(config, adapter=AdapterConfig("full"))
    torch.manual_seed(3)
    member = build_member(config, random_towers([config])).eval()
    save_member(member, tmp_path / "face", dtype=torch.float32)
    before = logits({"face": member})
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert logits({"face": member}) != before
    made = write_bundle(tmp_path, ["face"], VoteConfig({"face": 1}), {})
    assert logits(load_members(made)) == before


def test_a_weight_beyond_float16_is_stored_as_it_is(tmp_path):
    config = preset("tiny", "face")
    towers = random_towers([config])
    member = build_member(config, towers).eval()
    with torch.no_grad():
        member.head.weight[0, 0] = 1e6
    save_member(member, tmp_path / "face")
    again = load_member(tmp_path / "face", towers)
    torch.testing.assert_close(again.head.weight, member.head.weight, atol=0, rtol=0)
    stored = load_file(tmp_path / "face/model.safetensors")
    assert stored["own.head.weight"].dtype == torch.float32 and stored["own.head.bias"].dtype == torch.float16


def test_half_precision_weights_see_full_precision_pictures(made):
    members = load_members(made, dtype=torch.bfloat16)
    for member in members.values():
        assert {p.dtype for p in member.parameters()} == {torch.bfloat16}
        assert member.tower.mean.dtype == torch.float32
    assert selftest.run_selftest(made, dtype=torch.bfloat16).passed


def test_members_are_collected_from_a_training_folder(made, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    shutil.copytree(made.folder, runs)
    (runs / "face/checkpoint.pt").write_bytes(b"not for the bundle")
    names, vote = ["face", "qtfp"], VoteConfig({"face": 2, "qtfp": 1})
    collect(runs, out, names)
    collected = write_bundle(out, names, vote, {}, name="two")
    assert collected.name == "two" and not (out / "face/checkpoint.pt").exists()
    selftest.add_golden(collected)
    collect(runs, out, names)
    again = write_bundle(out, names, vote, {}, name="two")
    assert "golden.json" not in again.files  # of weights that may be others now
    expected = logits(load_members(made, names))
    shutil.rmtree(runs)
    assert logits(load_members(open_bundle(str(out)))) == expected


def test_the_manifest_is_written_last_and_whole(copy, monkeypatch):
    before = (copy / "ensemble.json").read_bytes()

    def full_disk(path, content):
        raise OSError("no space left")

    monkeypatch.setattr(bundle, "write_atomically", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_bundle(copy, ["face"], VoteConfig({"face": 1}), {})
    assert (copy / "ensemble.json").read_bytes() == before
    assert read_bundle(copy).configs.keys() == set(MEMBERS)


# ------------------------------------------------------------------------------------------------ refusals
def safetensors_of(folder):
    listed = json.loads((folder / "ensemble.json").read_text())["files"]
    return sorted(folder / name for name in listed if name.endswith(".safetensors"))


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["header", "middle", "end"])
def test_a_flipped_byte_in_any_safetensors_is_named(copy, place):
    for path in safetensors_of(copy):
        content = bytearray(path.read_bytes())
        content[min(int(place * len(content)), len(content) - 1)] ^= 1
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="SHA-256") as caught:
            open_bundle(str(copy))
        assert str(path) in str(caught.value)
        content[min(int(place * len(content)), len(content) - 1)] ^= 1
        path.write_bytes(content)
    assert open_bundle(str(copy))


@pytest.mark.parametrize("damage", [lambda c: c[:100], lambda c: b"\xff" * 200])
def test_an_unreadable_safetensors_is_named_even_unverified(copy, damage):
    for path in safetensors_of(copy):
        content = path.read_bytes()
        path.write_bytes(damage(content))
        with pytest.raises(WeightsError) as caught:
            load_members(open_bundle(str(copy), verify=False))
        assert str(path) in str(caught.value) and "damaged" in str(caught.value)
        path.write_bytes(content)


def change_keys(change):
    def apply(path):
        state = load_file(path)
        change(state)
        save_file(state, path)

    return apply


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("face/model.safetensors", lambda s: s.pop("own.head.bias"), "own.head.bias"),
        (
            "face/model.safetensors",
            lambda s: s.update({"own.heed.bias": s.pop("own.head.bias")}),
            "own.head.bias own.heed.bias",
        ),
        ("qtfp/model.safetensors", lambda s: s.update(x=torch.ones(1)), "unexpected x"),
        (
            "face/model.safetensors",
            lambda s: s.update({"own.head.bias": torch.ones(3)}),
            "own.head.bias (3,) (2,)",
        ),
        (
            "towers/tiny-global.safetensors",
            lambda s: s.pop("blocks.1.attn.q.weight"),
            "blocks.1.attn.q.weight",
        ),
        (
            "towers/tiny-global.safetensors",
            lambda s: s.update({"norm.bias": torch.ones(5)}),
            "norm.bias (5,) (32,)",
        ),
    ],
    ids=["missing", "renamed", "extra", "misshaped", "tower-missing", "tower-shape"],
)
def test_a_key_that_does_not_fit_is_named(copy, file, change, words):
    change_keys(change)(copy / file)
    rehash(copy)
    with pytest.raises(WeightsError) as caught:
        load_members(open_bundle(str(copy)))
    for word in [file, *words.split()]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(format=9), "format 9, expected 1"),
        (lambda r: r.update(label_order=["fake", "real"]), "label_order"),
        (lambda r: r.pop("vote"), "missing fields ['vote']"),
        (lambda r: r.update(extra=1), "unknown fields ['extra']"),
        (lambda r: r["vote"]["weights"].update(other=1), "other"),
        (lambda r: r["vote"].update(step=7.0), "vote.step"),
        (lambda r: r["calibrators"].pop("face"), "calibrators"),
        (lambda r: r["files"].update({"../../secret": "0"}), "no path inside"),
        (lambda r: r["files"].update({"/etc/passwd": "0"}), "no path inside"),
        (lambda r: r["files"].update({"face/gone": "0"}), "face/gone: missing"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, change, words):
    edit(copy / "ensemble.json", change)
    with pytest.raises(WeightsError) as caught:
        open_bundle(str(copy))
    assert words in str(caught.value)


def test_what_is_no_bundle_is_told_apart(copy, tmp_path):
    refusals = {
        str(copy / "face"): "one member's folder",
        str(tmp_path): "no ensemble.json",
        str(tmp_path / "gone"): "no such folder",
        "giant": "no weights are published",
        "hf:nonsense": "no place on the Hub",
    }
    for text, words in refusals.items():
        with pytest.raises(WeightsError, match=words):
            open_bundle(text)
    (copy / "ensemble.json").write_text("{")
    with pytest.raises(WeightsError, match="no JSON"):
        open_bundle(str(copy))


def test_unknown_members_and_towers_are_named(made):
    with pytest.raises(WeightsError, match="no member other; it holds global"):
        load_members(made, ["other"])
    with pytest.raises(WeightsError, match="no tower dino; it has tiny"):
        load_members(made, towers_from={"dino": "x"})


def test_a_vote_for_the_absent_is_refused(copy):
    with pytest.raises(WeightsError, match="names qtfp, not in the bundle"):
        write_bundle(copy, ["face"], VoteConfig({"face": 1, "qtfp": 1}), {})
    with pytest.raises(WeightsError, match="missing"):
        write_bundle(copy / "new", ["face"], VoteConfig({"face": 1}), {})


# ------------------------------------------------------------------------------------------------ towers
def as_on_the_hub(folder, tower):
    """A DINOv2 tower as a folder in the Hub's layout."""
    folder.mkdir()
    save_file(tower.model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(tower.model.config.to_json_string())
    return str(folder)


SMALL = Dinov2Arch(width=24, layers=2, heads=3, image_side=28)


def small_tower(**changes):
    return TowerConfig("small", "dinov2", replace(SMALL, **changes), source="bundle")


@pytest.mark.parametrize("swiglu", [True, False])
def test_a_tower_starts_from_a_folder_or_a_file(tmp_path, swiglu):
    config = small_tower(swiglu=swiglu)
    tower = build_tower(config)
    folder = as_on_the_hub(tmp_path / "hub", tower)
    dump_tower(tower, tmp_path / "own.safetensors", dtype=torch.float32)
    expected = tower_state(tower)
    for source in (
        folder,
        f"{folder}/model.safetensors",
        str(tmp_path / "own.safetensors"),
    ):
        state = tower_weights(config, source)
        assert isinstance(state, Mapping) and set(state) == set(expected)
        for key, tensor in state.items():
            assert torch.equal(tensor, expected[key]), (source, key)
        fill_tower(config, state)


def test_a_fusion_of_one_tower_with_itself_is_refused(copy):
    twin = copy / "towers/tiny-semantic.safetensors"
    shutil.copyfile(copy / "towers/tiny-face.safetensors", twin)
    rehash(copy)
    with pytest.raises(WeightsError, match="both halves of fusion are the tower 'tiny-face'"):
        read_bundle(copy)
    path = copy / "fusion/config.json"
    record = json.loads(path.read_text())
    record["member"]["clip"]["source"] = "bundle:tiny-face"
    path.write_text(json.dumps(record))
    rehash(copy)
    with pytest.raises(WeightsError, match="the same features twice"):
        read_bundle(copy)


def test_a_packed_tower_is_half_as_large_and_nearly_the_same(tmp_path):
    config = small_tower(width=120)
    tower = build_tower(config)
    path = tmp_path / "own.safetensors"
    dump_tower(tower, path)
    whole, size = dict(tower_weights(config, str(path))), path.stat().st_size
    error = pack_tower(path)
    assert 0 < error < 0.02 and path.stat().st_size < 0.6 * size
    packed = tower_weights(config, str(path))
    assert set(packed) == set(whole)
    changed = [k for k in whole if not torch.equal(packed[k].float(), whole[k].float())]
    assert changed and all(whole[k].ndim == 2 for k in changed)
    for key in changed:  # no entry moves by more than half a step of its row
        half_step = whole[key].float().abs().amax(dim=1, keepdim=True) / 127 * 0.51
        assert ((packed[key] - whole[key].float()).abs() <= half_step + 1e-7).all(), key
    fill_tower(config, packed)
    pictures = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        a, b = (fill_tower(config, s)(pictures).cls_token for s in (whole, packed))
    assert torch.nn.functional.cosine_similarity(a, b).min() > 0.999
    scale = next(k for k in load_file(path) if k.endswith("/scale"))
    save_file({k: t for k, t in load_file(path).items() if k != scale}, path)
    with pytest.raises(WeightsError, match="scale"):
        dict(tower_weights(config, str(path)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_tower_that_is_cut_is_its_first_blocks_and_its_last_norm(packed, tmp_path, capsys):
    config = small_tower(width=96, layers=3)
    tower = build_tower(config).eval()
    whole, part = tmp_path / "whole.safetensors", tmp_path / "towers/part.safetensors"
    dump_tower(tower, whole, dtype=torch.float32)
    if packed:
        pack_tower(whole)
        tower = fill_tower(config, tower_weights(config, str(whole))).eval()
    assert weights.main(["cut", str(whole), "--blocks", "2", "--out", str(part)]) == 0
    assert "tower part, 2 blocks" in capsys.readouterr().out
    config = replace(config, name="part", arch=replace(config.arch, layers=2))
    cut = fill_tower(config, tower_weights(config, str(part))).eval()
    pictures = selftest.golden_pictures(28)
    with torch.inference_mode():
        expected = tower.last_norm(tower(pictures, keep=(2,)).hidden[2])
        found = cut(pictures)
    torch.testing.assert_close(found.cls_token, expected[:, 0])
    torch.testing.assert_close(found.patch_tokens, expected[:, 1:])


def test_a_tower_that_cannot_be_cut_is_named(tmp_path, capsys):
    path, out = tmp_path / "own.safetensors", tmp_path / "part.safetensors"
    dump_tower(build_tower(small_tower(layers=2)), path)
    for blocks in (0, 2):
        assert weights.main(["cut", str(path), "--blocks", str(blocks), "--out", str(out)]) == 3
        assert "has 2 blocks; cut it to 1 to 1" in capsys.readouterr().err
    save_file(load_file(path), tmp_path / "hub.safetensors")
    save_file(load_file(path), tmp_path / "newer.safetensors", {"tower": '{"format": 99}'})
    expected = {"hub": "does not say which tower", "none": "no .safetensors file", "newer": "format 99, expected 1"}
    for name, words in expected.items():
        assert weights.main(["cut", str(tmp_path / f"{name}.safetensors"), "--blocks", "1", "--out", str(out)]) == 3
        assert words in capsys.readouterr().err
    assert not out.exists()


def test_a_clip_image_tower_leaves_the_text_behind(tmp_path):
    arch = ClipArch(width=16, layers=1, heads=2, embed_dim=8, image_side=28)
    arch = replace(arch, text_width=8, text_layers=1, text_heads=1, vocab=20, context=5)
    full = build_tower(TowerConfig("clip", "clip", arch))
    (tmp_path / "clip").mkdir()
    save_file(full.model.state_dict(), tmp_path / "clip/open_clip_model.safetensors")
    config = TowerConfig("image", "clip", replace(arch, text_layers=0))
    state = tower_weights(config, str(tmp_path / "clip"))
    image = fill_tower(config, state).eval()
    whole = fill_tower(full.config, tower_weights(full.config, str(tmp_path / "clip")))
    pictures = selftest.golden_pictures(28)
    with torch.inference_mode():
        found, expected = image(pictures), whole.eval()(pictures)
    assert torch.equal(found.cls_token, expected.cls_token)


def test_a_derived_clip_reads_the_tower_it_is_derived_from(made):
    config = made.configs["vlaforge"].tower
    assert config.source == "bundle:tiny-face"
    file = made.folder / "towers/tiny-global.safetensors"
    state = tower_weights(config, str(file))
    assert set(state) == set(load_file(file))


def test_a_tower_that_does_not_fit_is_refused(tmp_path):
    tower = build_tower(small_tower())
    folder = as_on_the_hub(tmp_path / "hub", tower)
    with pytest.raises(WeightsError, match="heads is 3, expected 4 for tower small"):
        tower_weights(small_tower(heads=4), folder)
    clip = TowerConfig("clip", "clip", ClipArch(text_layers=0))
    with pytest.raises(WeightsError, match="layout dinov2, expected a clip"):
        tower_weights(clip, folder)
    with pytest.raises(WeightsError, match="neither a file nor a public repository"):
        tower_weights(small_tower())
    (tmp_path / "hub/config.json").unlink()
    with pytest.raises(WeightsError, match="config.json: missing"):
        tower_weights(small_tower(), folder)
    (tmp_path / "hub/model.safetensors").unlink()
    with pytest.raises(WeightsError, match="found none of model.safetensors"):
        tower_weights(small_tower(), folder)
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no tower in a known layout"):
        tower_weights(small_tower(), str(tmp_path / "other.safetensors"))


# ------------------------------------------------------------------------------------------------ renamed libraries
class OldSwiGLU(nn.Module):
    """DINOv2's gated MLP as transformers 4 had it: gate and up in one linear."""

    def __init__(self, new):
        super().__init__()
        width, inner = new.gate_proj.in_features, new.gate_proj.out_features
        like = {"device": new.gate_proj.weight.device}
        self.weights_in = nn.Linear(width, 2 * inner, **like)
        self.weights_out = nn.Linear(inner, width, **like)

    def forward(self, x):
        gate, up = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(nn.functional.silu(gate) * up)


def with_old_names(build):
    """`libraries._dinov2` under another library release: the modules carry transformers 4's names."""

    def renamed(arch):
        model = build(arch)
        for layer in model.encoder.layer:
            q, k, v, o = (getattr(block_of(layer), role) for role in "qkvo")
            old = nn.Module()
            old.attention, old.output = nn.Module(), nn.Module()
            old.attention.query, old.attention.key, old.attention.value = q, k, v
            old.output.dense = o
            layer.attention = old
            if arch.swiglu and not hasattr(layer.mlp, "weights_in"):
                layer.mlp = OldSwiGLU(layer.mlp)
        return model

    return renamed


@pytest.mark.parametrize("adapter", ["lora", "effort", "full"])
@pytest.mark.parametrize("swiglu", [True, False])
def test_a_bundle_outlives_a_renamed_library(tmp_path, monkeypatch, adapter, swiglu):
    tiny = preset("tiny", "face")
    arch = replace(tiny.tower.arch, swiglu=swiglu)
    tower = replace(tiny.tower, arch=arch)
    adapter = AdapterConfig(adapter, rank=2)
    config = MemberConfig("face", tiny.view, tower, adapter)
    torch.manual_seed(5)
    member = build_member(config, random_towers([config]))
    with torch.no_grad():
        for tensor in member.stored_state().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    save_member(member, tmp_path / "face", dtype=torch.float32)
    dump_tower(member.tower, tmp_path / f"towers/{tower.name}.safetensors", dtype=torch.float32)
    made = selftest.add_golden(write_bundle(tmp_path, ["face"], VoteConfig({"face": 1}), {}))
    monkeypatch.setattr(libraries, "_dinov2", with_old_names(libraries._dinov2))
    names = [n for n, _ in load_members(made)["face"].named_parameters()]
    assert any("attention.attention.query" in name for name in names)
    assert not any("q_proj" in name for name in names)
    result = selftest.run_selftest(made)
    assert max(result.worst.values()) < 1e-5


# ------------------------------------------------------------------------------------------------ self-test
def test_golden_pictures_are_the_same_everywhere():
    pictures = selftest.golden_pictures(28)
    assert (pictures.shape, pictures.dtype) == ((3, 3, 28, 28), torch.uint8)
    assert 40 < pictures.float().std() < 90
    assert selftest._picture_hash(28).startswith("77c96d48adbabe9b")


def test_the_selftest_sees_changed_weights(copy):
    change_keys(lambda s: s["own.head.weight"].mul_(-1))(copy / "face/model.safetensors")
    rehash(copy)
    result = selftest.run_selftest(open_bundle(str(copy)))
    assert not result.passed and "DIFFERS" in str(result)
    assert [n for n, w in result.worst.items() if w > result.tolerance] == ["face"]


def test_the_selftest_sees_not_a_number(copy):
    change = change_keys(lambda s: s["own.head.weight"].fill_(float("nan")))
    change(copy / "global/model.safetensors")
    rehash(copy)
    assert not selftest.run_selftest(open_bundle(str(copy))).passed


def test_the_selftest_sees_one_logit_that_is_not_a_number(made, monkeypatch):
    """After one that is right, whose departure of 0 it does not compare as larger than."""
    given = json.loads((made.folder / "golden.json").read_text())["logits"]
    given["face"][1] = float("nan")
    monkeypatch.setattr(selftest, "golden_logits", lambda members: given)
    result = selftest.run_selftest(made)
    assert not result.passed and [name for name, worst in result.worst.items() if worst] == ["face"]


def test_the_selftest_says_what_it_lacks(copy):
    edit(copy / "golden.json", lambda r: r["pictures"].update({"56": "0"}))
    rehash(copy)
    with pytest.raises(WeightsError, match="side 56 come out differently"):
        selftest.run_selftest(open_bundle(str(copy)))
    edit(copy / "golden.json", lambda r: r.update(pictures={}))
    edit(copy / "golden.json", lambda r: r["logits"].pop("face"))
    rehash(copy)
    with pytest.raises(WeightsError, match="make it again"):
        selftest.run_selftest(open_bundle(str(copy)))
    (copy / "golden.json").unlink()
    without = write_bundle(copy, MEMBERS, VOTE, {})
    with pytest.raises(WeightsError, match="python -m solution.weights golden"):
        selftest.run_selftest(without)


# ------------------------------------------------------------------------------------------------ entry and doctor
def test_the_entry_shows_and_verifies(made, copy, capsys):
    assert weights.main(["show", str(made.folder)]) == 0
    table = capsys.readouterr().out
    for word in (*MEMBERS, "temperature", made.hash, "towers/tiny-global.safetensors"):
        assert word in table
    assert weights.main(["verify", str(copy)]) == 0
    assert "files match" in capsys.readouterr().out
    (copy / "face/model.safetensors").write_bytes(b"")
    assert weights.main(["verify", str(copy)]) == 3
    told = capsys.readouterr().err
    assert "face/model.safetensors" in told and told.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        weights.main(["burn", "x"])
    assert caught.value.code == 2


def test_golden_is_added_by_the_entry(copy, capsys):
    (copy / "golden.json").unlink()
    write_bundle(copy, MEMBERS, VOTE, {})
    assert weights.main(["golden", str(copy)]) == 0
    assert selftest.run_selftest(open_bundle(str(copy))).passed


def test_the_doctor_says_cpu_and_checks_the_bundle(made, copy, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: "")
    assert doctor.main(["--weights", str(made.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in told["checks"]}
    assert told["ok"] and len(checks) == 11
    assert checks["device"]["found"].startswith("CPU")
    assert "tiny member on cpu" in checks["forward pass"]["found"]
    assert "hashes match" in checks["weights"]["found"]
    (copy / "face/model.safetensors").write_bytes(b"")
    assert doctor.main(["--weights", str(copy)]) == 3
    assert "face/model.safetensors" in capsys.readouterr().out


def test_the_doctor_outlives_what_is_broken(monkeypatch):
    def no_torch(name):
        raise ImportError(f"no {name} today")

    monkeypatch.setattr(doctor.importlib, "import_module", no_torch)
    found = {check.name: check for check in doctor.examine(device="cpu")}
    assert found["torch pair"].status == "FAIL"
    assert "no torch today" in found["torch pair"].found
    assert found["python"].status == "ok"


def test_the_doctor_names_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: "550.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    check = doctor.check_device()
    assert check.status == "note" and "built for CUDA" in check.advice


def test_the_doctor_names_what_requirements_lack(monkeypatch, tmp_path):
    (tmp_path / "requirements.txt").write_text("torch>=999  # no\nnot-there\nnumpy\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    check = doctor.check_packages()
    assert check.status == "FAIL" and "numpy" not in check.found
    assert "torch" in check.found and "not-there (not installed)" in check.found
