"""Import of the published checkpoints: the authors' numbers, every key, strange towers, code in a pickle, memory.

Files with the published layout are written here from random weights (`write_published`), tiny, or of the true size for
the memory check:  python -m pytest tests/bundles/test_ntire26.py -m slow -s
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from solution import weights
from solution.bundles import selftest, store
from solution.bundles.bundle import load_members, read_bundle
from solution.bundles.ntire26 import FILES, import_ntire26
from solution.errors import WeightsError

ROOT = Path(__file__).resolve().parents[2]
# Miniature twins of the three published files, made with the authors' model classes and random weights, and what those
# classes say of three random pictures each (`p_fake`).
REFERENCE = ROOT / "tests" / "fixtures" / "reference"
PREFIX = "backbone.vision_model.base_model.model."


# ------------------------------------------------------------------------------------------------ files to import
def write_published(
    folder,
    *,
    width=24,
    layers=2,
    heads=3,
    side=518,
    clip=(16, 2, 2),
    rank=4,
    members=tuple(FILES),
    spoil=None,
):
    """The published files' layout with random weights: the files, and dino/ and clip/ as transformers 4 saves towers.

    spoil(member, state) may change a file's state before it is written.
    """
    torch.manual_seed(26)
    folder.mkdir(parents=True, exist_ok=True)
    dino, dino_json = old_dinov2(width, layers, heads, side)
    save_tower(folder / "dino", dino, dino_json)
    tower, clip_json = clip_vision(*clip)
    save_tower(folder / "clip", tower, clip_json)
    for member in members:
        state = {PREFIX + based(key): t for key, t in dino.items()}
        for key in [k for k in state if k.endswith("base_layer.weight")]:
            stem = key.removesuffix("base_layer.weight")
            state[f"{stem}lora_A.default.weight"] = torch.randn(rank, width) * 0.1
            state[f"{stem}lora_B.default.weight"] = torch.randn(width, rank) * 0.1
        if member == "fusion":
            state |= {f"backbone.clip_model.{key}": t for key, t in tower.items()}
            head = {"0": (512, width + clip[0]), "3": (2, 512)}
            names = {f"fusion_head.{i}": shape for i, shape in head.items()}
        else:
            names = {"last_layer": (2, width)}
        for name, shape in names.items():
            state[f"backbone.{name}.weight"] = torch.randn(shape) * 0.1
            state[f"backbone.{name}.bias"] = torch.randn(shape[0]) * 0.1
        if spoil:
            spoil(member, state)
        torch.save(state, folder / FILES[member])
    return folder


def based(key):
    """A DINOv2 key as peft names it: adapted linears keep their weights in base_layer."""
    for name in ("query", "key", "value", "output.dense"):
        key = key.replace(f"{name}.weight", f"{name}.base_layer.weight")
        key = key.replace(f"{name}.bias", f"{name}.base_layer.bias")
    return key


def old_dinov2(width, layers, heads, side):
    """Random weights under transformers 4's names, SwiGLU; and their config.json."""
    inner = (int(width * 4 * 2 / 3) + 7) // 8 * 8
    n = (side // 14) ** 2
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, n + 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for i in range(layers):
        stem = f"encoder.layer.{i}."
        for name in ("query", "key", "value"):
            shapes[f"{stem}attention.attention.{name}.weight"] = (width, width)
            shapes[f"{stem}attention.attention.{name}.bias"] = (width,)
        shapes |= {
            f"{stem}attention.output.dense.weight": (width, width),
            f"{stem}attention.output.dense.bias": (width,),
            f"{stem}mlp.weights_in.weight": (2 * inner, width),
            f"{stem}mlp.weights_in.bias": (2 * inner,),
            f"{stem}mlp.weights_out.weight": (width, inner),
            f"{stem}mlp.weights_out.bias": (width,),
        }
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[stem + name] = (width,)
        for name in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
            shapes[stem + name] = (width,)
    config = {"model_type": "dinov2", "use_swiglu_ffn": True, "hidden_size": width}
    config |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    config |= {"image_size": side, "patch_size": 14, "mlp_ratio": 4}
    return {k: torch.randn(shape).mul_(0.1) for k, shape in shapes.items()}, config


def clip_vision(width, layers, heads):
    """A random CLIP vision tower as transformers saves it, and its config.json."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=14,
    )
    state = CLIPVisionModel(config).state_dict()
    names = {key.removeprefix("vision_model.") for key in state}
    state = {n: state.get(n, state.get(f"vision_model.{n}")) for n in names}
    state = {f"vision_model.{n}": t for n, t in state.items() if "position_ids" not in n}
    return state, config.to_dict()


def save_tower(folder, state, config):
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def importing(folder, out=None, **options):
    towers = {"dino": str(folder / "dino"), "clip": str(folder / "clip")}
    return import_ntire26(out or folder / "bundle", source=str(folder), **{**towers, **options})


def spoiled(member, change):
    """A `spoil` that changes one member's state."""
    return lambda name, state: change(state) if name == member else None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"))


# ------------------------------------------------------------------------------------------------ the numbers
@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "bundle"
    arguments = ["--from", REFERENCE, "--out", out, "--dino", REFERENCE / "dinov2-tiny"]
    arguments += ["--clip", REFERENCE / "clip-tiny"]
    assert weights.main(["import-ntire26", *map(str, arguments)]) == 0
    return out


@pytest.mark.parametrize("member", FILES)
def test_the_authors_numbers(reference, member):
    name = Path(FILES[member]).stem
    expected = json.loads((REFERENCE / "expected.json").read_text())[name]
    pictures = torch.load(REFERENCE / f"{name}.input_uint8.pt", weights_only=True)
    bundle = store.open_bundle(str(reference))
    loaded = load_members(bundle, [member])[member]
    assert bundle.configs[member].view.side == expected["side"] == pictures.shape[-1]
    with torch.inference_mode():
        p_fake = loaded(pictures).logit.sigmoid()
    torch.testing.assert_close(p_fake, torch.tensor(expected["p_fake"]), rtol=0, atol=1e-5)


def test_the_reference_bundle_is_the_published_protocol(reference):
    bundle = read_bundle(reference)
    views = {n: (c.view.source, c.view.resize, c.view.side) for n, c in bundle.configs.items()}
    assert views == {
        "global": ("image", 256, 252),
        "face": ("face", 256, 252),
        "fusion": ("image", 224, 224),
    }
    assert bundle.vote.weights == {"global": 2, "face": 1, "fusion": 2}
    assert (bundle.vote.mean, bundle.vote.step) == ("levels_rounded", 0.1)
    assert {c.kind for c in bundle.calibrators.values()} == {"identity"}
    assert {t.statistics for t in bundle.towers.values()} == {"imagenet"}
    assert selftest.run_selftest(bundle).passed
    # heads leave no trace in the files: they come from the towers' config.json
    assert bundle.configs["fusion"].tower.arch.heads == 4
    assert bundle.configs["fusion"].clip.arch.heads == 2


def test_merged_weights_in_transformers_give_the_same_logits(files, tmp_path):
    """W + 2 B A, put into transformers' own model, is what the imported member computes."""
    member = load_members(importing(files, tmp_path / "b"), ["global"])["global"]
    state = torch.load(files / FILES["global"], weights_only=True)
    merged = {}
    for key, tensor in state.items():
        if key.startswith(PREFIX) and "lora" not in key:
            if key.endswith("base_layer.weight"):
                stem = key.removesuffix("base_layer.weight")
                b = state[f"{stem}lora_B.default.weight"]
                tensor = tensor + 2 * b @ state[f"{stem}lora_A.default.weight"]
            merged[key.removeprefix(PREFIX).replace("base_layer.", "")] = tensor
    folder = tmp_path / "merged"
    save_tower(folder, merged, json.loads((files / "dino/config.json").read_text()))
    model = Dinov2Model.from_pretrained(folder).eval()
    assert isinstance(model.config, Dinov2Config)
    pictures = selftest.golden_pictures(252, 2)
    with torch.inference_mode():
        pooled = model(member.tower.normalize(pictures)).pooler_output
        head = state["backbone.last_layer.weight"], state["backbone.last_layer.bias"]
        logits = torch.nn.functional.linear(pooled, *head)
        found = member(pictures).logit
    torch.testing.assert_close(found, logits[:, 1] - logits[:, 0], rtol=0, atol=1e-5)


def test_lora_stays_lora_and_the_tower_stays_out(files, tmp_path):
    bundle = importing(files, tmp_path / "bundle")
    published = torch.load(files / FILES["face"], weights_only=True)
    kept = load_file(tmp_path / "bundle/face/model.safetensors")
    layer = f"{PREFIX}encoder.layer.1.attention."
    pairs = {
        "own.head.weight": "backbone.last_layer.weight",
        "adapter.blocks.1.attn.q.lora_A": f"{layer}attention.query.lora_A.default.weight",
        "adapter.blocks.1.attn.o.lora_B": f"{layer}output.dense.lora_B.default.weight",
    }
    for mine, theirs in pairs.items():
        assert torch.equal(kept[mine], published[theirs])
    assert all(key.startswith(("own.", "adapter.")) for key in kept)
    adapter = bundle.configs["face"].adapter
    assert (adapter.kind, adapter.rank, adapter.alpha) == ("lora", 4, 8.0)
    assert not (tmp_path / "bundle/towers").exists()


def test_a_leading_module_changes_nothing(files, tmp_path):
    plain = importing(files, tmp_path / "plain")
    again = tmp_path / "again"
    shutil.copytree(files, again, ignore=shutil.ignore_patterns("bundle"))
    state = torch.load(again / FILES["global"], weights_only=True)
    torch.save({f"module.{k}": t for k, t in state.items()}, again / FILES["global"])
    prefixed = importing(again, tmp_path / "prefixed")
    name = "global/model.safetensors"
    assert plain.files[name] == prefixed.files[name]


# ------------------------------------------------------------------------------------------------ refusals
QUERY = f"{PREFIX}encoder.layer.1.attention.attention.query."
LORA = QUERY + "lora_A.default.weight"
FIRST = LORA.replace("layer.1", "layer.0")


def renamed(state):
    state[LORA.replace("query", "q_proj")] = state.pop(LORA)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, [LORA, "missing", LORA.replace("query", "q_proj"), "unknown"]),
        (lambda s: s.pop(QUERY + "base_layer.bias"), [QUERY + "base_layer.bias"]),
        (lambda s: s.update(surprise=torch.ones(1)), ["unknown", "surprise"]),
        (lambda s: s.update({LORA: torch.ones(4, 25)}), [LORA, "(4, 25)", "(4, 24)"]),
        (lambda s: s.update({FIRST: torch.ones(5, 24)}), [FIRST, "(5, 24)", "(4, 24)"]),
        (
            lambda s: s.update({QUERY + "base_layer.weight": torch.ones(24, 23)}),
            [QUERY + "base_layer.weight", "(24, 23)", "(24, 24)"],
        ),
        (
            lambda s: s.update({"backbone.last_layer.weight": torch.ones(1, 24)}),
            ["backbone.last_layer.weight", "(1, 24)", "(2, 24)"],
        ),
        (lambda s: s.update(epoch=3), ["'epoch'", "int"]),
        (lambda s: s.update({LORA: torch.ones(4, 24).int()}), [LORA, "int32"]),
    ],
    ids=[
        "renamed",
        "missing",
        "extra",
        "lora-shape",
        "first-lora-rank",
        "tower-shape",
        "head-shape",
        "no-tensor",
        "integer",
    ],
)
def test_a_wrong_key_is_refused_by_name(tmp_path, change, words):
    folder = write_published(tmp_path, spoil=spoiled("face", change))
    with pytest.raises(WeightsError) as caught:
        importing(folder)
    for word in [FILES["face"], *words]:
        assert word in str(caught.value)
    assert not (folder / "bundle/ensemble.json").exists()


def test_a_nested_checkpoint_is_refused(tmp_path):
    folder = write_published(tmp_path, members=["face", "fusion"])
    torch.save({"state_dict": {}}, folder / FILES["global"])
    with pytest.raises(WeightsError, match="'state_dict' is a dict"):
        importing(folder)


class Payload:
    """Unpickling this would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, capsys):
    folder = write_published(tmp_path, members=["face", "fusion"])
    torch.save({"x": Payload(str(tmp_path / "hacked"))}, folder / FILES["global"])
    arguments = ["--from", folder, "--dino", folder / "dino", "--clip", folder / "clip"]
    arguments = map(str, [*arguments, "--out", tmp_path / "bundle"])
    assert weights.main(["import-ntire26", *arguments]) == 3
    told = capsys.readouterr().err
    for word in (FILES["global"], "code", "mkdir"):
        assert word in told
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("damage", ["truncated", "no zip", "absent"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    folder = write_published(tmp_path, members=["global"])
    path = folder / FILES["global"]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4000])
    elif damage == "no zip":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        path.unlink()
    with pytest.raises(WeightsError, match=FILES["global"]):
        importing(folder)


# ------------------------------------------------------------------------------------------------ the tower inside
def drift(state):
    key = QUERY + "base_layer.weight"
    state[key] = state[key].clone()
    state[key][3, 5] += 1e-6


def test_another_tower_inside_is_refused(tmp_path):
    folder = write_published(tmp_path, spoil=spoiled("face", drift))
    with pytest.raises(WeightsError) as caught:
        importing(folder)
    for word in (FILES["face"], QUERY + "base_layer.weight", "--keep-tower"):
        assert word in str(caught.value)


def test_another_clip_inside_is_refused(tmp_path):
    key = "backbone.clip_model.vision_model.post_layernorm.bias"
    change = spoiled("fusion", lambda state: state[key].add_(1e-3))
    folder = write_published(tmp_path, spoil=change)
    with pytest.raises(WeightsError, match=key):
        importing(folder)


def test_another_tower_can_be_kept_whole(files, tmp_path):
    def change(member, state):
        if member != "global":  # two files with one and the same other tower
            drift(state)

    folder = write_published(tmp_path, spoil=change)
    bundle = importing(folder, keep_tower=True)
    configs = bundle.configs
    assert configs["global"].tower.public
    kept = configs["face"].tower
    assert kept == configs["fusion"].tower and kept.source == "bundle"
    assert [p.name for p in (folder / "bundle/towers").iterdir()] == [f"{kept.name}.safetensors"]
    stored = load_file(folder / "bundle/towers" / f"{kept.name}.safetensors")
    published = torch.load(folder / FILES["face"], weights_only=True)
    query = published[QUERY + "base_layer.weight"]
    assert torch.equal(stored["blocks.1.attn.q.weight"], query)
    assert load_members(bundle).keys() == set(FILES)


def test_heads_of_another_tower_are_refused_on_loading(files, tmp_path):
    """The number of heads leaves no trace in shapes: only config.json can tell."""
    bundle = importing(files, tmp_path / "bundle")
    other = tmp_path / "other"
    shutil.copytree(files / "dino", other)
    told = json.loads((other / "config.json").read_text()) | {"num_attention_heads": 4}
    (other / "config.json").write_text(json.dumps(told))
    with pytest.raises(WeightsError, match="heads is 4, expected 3"):
        load_members(bundle, ["global"], towers_from={"dino": str(other)})


# ------------------------------------------------------------------------------------------------ memory
@pytest.mark.slow
def test_memory_of_a_giant_import(request, tmp_path):
    """Three files of the true size (4.6, 4.6 and 5.8 GB, random) are imported with less than 7 GB resident."""
    if "slow" not in (request.config.getoption("-m") or ""):
        pytest.skip("writes 16 GB: run with -m slow -s")
    if shutil.disk_usage(tmp_path).free < 25e9:
        pytest.skip("needs 25 GB of free disk")
    make = (
        "import sys, pathlib, test_ntire26 as t; "
        "t.write_published(pathlib.Path(sys.argv[1]), width=1536, layers=40, heads=24, clip=(1024, 24, 16), rank=32, "
        "members=['global', 'fusion'])"
    )
    load = (
        "import sys, resource; from solution import weights; code = weights.main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    folder = tmp_path / "files"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), "."])}
    options = {"cwd": ROOT / "tests" / "bundles", "env": environment}
    try:
        subprocess.run([sys.executable, "-c", make, str(folder)], check=True, **options)
        (folder / FILES["face"]).symlink_to(folder / FILES["global"])
        arguments = ["import-ntire26", "--from", folder, "--out", tmp_path / "bundle"]
        arguments += [
            "--dino",
            folder / "dino",
            "--clip",
            folder / "clip",
            "--no-golden",
        ]
        command = [sys.executable, "-c", load, *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options)
        peak = int(done.stdout.splitlines()[-1]) * 1024
        bundle = read_bundle(tmp_path / "bundle")
        size = sum((bundle.folder / name).stat().st_size for name in bundle.files)
        print(f"\npeak {peak / 1e9:.2f} GB resident; bundle {size / 1e6:.0f} MB")
        assert peak < 7e9
        assert size < 200e6
        assert bundle.configs["global"].tower.arch.layers == 40
    finally:
        shutil.rmtree(tmp_path)
