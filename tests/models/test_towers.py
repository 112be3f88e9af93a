"""Towers equal their libraries, adapters stay apart, keys survive a library's renaming."""

import re
from dataclasses import replace

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from tiny import CLIP
from transformers import Dinov2Config, Dinov2Model

from solution.config import DINOV2_IN_CLIP, AdapterConfig, Dinov2Arch, TowerConfig
from solution.errors import WeightsError
from solution.models import blocks, keys, merging
from solution.models.adapters import adapter_state, add_adapter
from solution.models.keys import to_stable
from solution.models.towers import (
    build_tower,
    count_parameters,
    dinov2_as_clip,
    empty_tower,
    load_state,
    patch_attention,
    tower_state,
)
from solution.presets import preset

DINO = Dinov2Arch(width=48, layers=3, heads=4, swiglu=True, image_side=70)
PLAIN = replace(DINO, swiglu=False)


def dino(arch=DINO, seed=0):
    torch.manual_seed(seed)
    return build_tower(TowerConfig("d", "dinov2", arch)).eval()


def clip(arch=CLIP, seed=0):
    torch.manual_seed(seed)
    return build_tower(TowerConfig("c", "clip", arch, statistics="clip")).eval()


def pictures(side=56, count=2, seed=1):
    return torch.randint(
        0,
        256,
        (count, 3, side, side),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("arch", [DINO, PLAIN], ids=["swiglu", "mlp"])
def test_dinov2_equals_transformers(arch):
    tower, images = dino(arch), pictures()
    with torch.no_grad():
        ours = tower(images)
        theirs = tower.model(pixel_values=tower.normalize(images)).last_hidden_state
    torch.testing.assert_close(ours.cls_token, theirs[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.patch_tokens, theirs[:, 1:], atol=1e-6, rtol=0)
    assert ours.grid == (4, 4)


def test_cls_attention_equals_the_eager_last_block():
    tower, images = dino(), pictures()
    config = Dinov2Config(**(tower.model.config.to_dict() | {"attn_implementation": "eager"}))
    eager = Dinov2Model(config).eval()
    eager.load_state_dict(tower.model.state_dict())
    with torch.no_grad():
        last = tower(images).last_input
        ours = tower.cls_attention(last)
        theirs = eager(pixel_values=tower.normalize(images), output_attentions=True).attentions[-1][:, :, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(patch_attention(ours).sum(-1), torch.ones(2))


def test_clip_equals_open_clip():
    torch.manual_seed(0)
    vision = CLIPVisionCfg(
        layers=CLIP.layers,
        width=CLIP.width,
        head_width=CLIP.width // CLIP.heads,
        patch_size=CLIP.patch,
        image_size=CLIP.image_side,
        output_tokens=True,
    )
    text = CLIPTextCfg(width=CLIP.text_width, heads=CLIP.text_heads, layers=CLIP.text_layers)
    theirs = open_clip.CLIP(CLIP.embed_dim, vision, text, quick_gelu=True).eval()
    tower, images = clip(seed=5), pictures()
    load_state(tower_state(tower), to_stable(theirs.state_dict(), "open_clip"), "twin")
    with torch.no_grad():
        ours = tower(images, keep=(1,))
        pooled, tokens = theirs.visual(tower.normalize(images))
    torch.testing.assert_close(ours.patch_tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.cls_token @ tower.model.visual.proj, pooled, atol=1e-5, rtol=0)
    assert ours.hidden[1].shape == (2, 17, CLIP.width)


def test_dinov2_in_clips_layout_is_the_same_function():
    tower, images = dino(PLAIN), pictures()
    arch = replace(CLIP, width=48, text_layers=0, **DINOV2_IN_CLIP)
    twin = build_tower(TowerConfig("t", "clip", arch)).eval()
    load_state(tower_state(twin), dinov2_as_clip(tower_state(tower), arch), "twin")
    with torch.no_grad():
        torch.testing.assert_close(twin(images).cls_token, tower(images).cls_token, atol=1e-5, rtol=0)


def test_uint8_and_float_pictures_agree_and_wrong_sides_are_refused():
    tower, images = dino(), pictures()
    with torch.no_grad():
        torch.testing.assert_close(tower(images).cls_token, tower(images.float() / 255).cls_token)
    with pytest.raises(ValueError, match="multiple of its patch 14"):
        tower(pictures(side=57))
    with pytest.raises(ValueError, match="takes 56x56"):
        clip()(pictures(side=70))


@pytest.mark.parametrize("make", [dino, clip])
@pytest.mark.parametrize("kind", ["lora", "effort"])
def test_adapters_share_a_tower_and_stay_apart(make, kind):
    tower, images = make(), pictures()
    with torch.no_grad():
        plain = tower(images).cls_token
        for name in ("face", "fusion"):
            add_adapter(tower, name, AdapterConfig(kind, rank=2, dropout=0.0))
        # A fresh adapter changes nothing: LoRA's B is zero, Effort's factors are the weight's own.
        torch.testing.assert_close(tower(images, adapter="face").cls_token, plain, atol=1e-6, rtol=0)
        for key, value in adapter_state(tower, "face").items():
            if key.endswith(("lora_B", "effort_s")):
                value += 0.5
        changed = tower(images, adapter="face").cls_token
        assert (changed - plain).abs().max() > 1e-2
        torch.testing.assert_close(tower(images, adapter="fusion").cls_token, plain, atol=1e-6, rtol=0)
        torch.testing.assert_close(tower(images).cls_token, plain)
        torch.testing.assert_close(tower(images, adapter="face").cls_token, changed)


def test_effort_keeps_the_leading_singular_part():
    tower = dino()
    weight = next(tower.blocks()).q.weight.detach().clone()
    add_adapter(tower, "q", AdapterConfig("effort", rank=1))
    factors = next(tower.blocks()).q.factors["q"]
    residual = (factors["u0"] * factors["s0"]) @ factors["v0"]
    expected = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(weight - residual)[:-1], expected[:-1], atol=1e-5, rtol=0)
    assert torch.linalg.svdvals(weight - residual)[-1] < 1e-5


@pytest.mark.parametrize("kind, wanted", [("lora", ("lora_A", "lora_B")), ("effort", (".u", ".s", ".v"))])
def test_gradients_reach_the_adapter_alone(kind, wanted):
    tower = dino()
    add_adapter(tower, "m", AdapterConfig(kind, rank=2, dropout=0.0))
    with torch.no_grad():
        for value in adapter_state(tower, "m").values():
            value += 0.1
    tower(pictures(), adapter="m").cls_token.sum().backward()
    reached = {n for n, p in tower.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trained = {n for n, p in tower.named_parameters() if p.requires_grad}
    assert reached == trained
    assert all(re.search(rf"({'|'.join(map(re.escape, wanted))})(\.|$)", n) for n in trained)


def test_giant_has_the_published_size_without_being_made():
    config = preset("giant", "global")
    tower = build_tower(config.tower, device="meta")
    assert count_parameters(tower)[1] == 1_136_480_768
    add_adapter(tower, "global", config.adapter)
    trainable, total = count_parameters(tower)
    assert trainable == 40 * 4 * 2 * 1536 * 32 == 15_728_640
    assert total == 1_136_480_768 + trainable
    assert all(p.is_meta for p in tower.parameters())


def test_giant_clip_has_the_published_size():
    tower = build_tower(preset("giant", "vlaforge").tower, device="meta")
    # ViT-L/14: 427,616,513 parameters; open_clip counts the logit scale, which is dropped from our keys.
    assert count_parameters(tower)[1] == 427_616_513


def test_old_and_new_library_names_become_the_same_keys():
    new = tower_state(dino())
    old = {}
    renames = [
        ("q_proj", "attention.query"),
        ("k_proj", "attention.key"),
        ("v_proj", "attention.value"),
    ]
    state = dino().model.state_dict()
    for key, tensor in state.items():
        for a, b in [
            *renames,
            ("attention.o_proj", "attention.output.dense"),
            ("down_proj", "weights_out"),
        ]:
            key = key.replace(a, b)
        if "gate_proj" in key:
            up = state[key.replace("gate_proj", "up_proj")]
            old[key.replace("gate_proj", "weights_in")] = torch.cat([tensor, up])
        elif "up_proj" not in key:
            old[key] = tensor
    stable = to_stable(old, "dinov2")
    assert set(stable) == set(new)
    assert all(torch.equal(stable[k], new[k]) for k in new)


def test_a_renamed_library_tree_still_runs_and_saves(monkeypatch):
    tower, images = dino(), pictures()
    with torch.no_grad():
        before, known = tower(images).cls_token, set(tower_state(tower))
    for layer in tower.layers:  # the library of tomorrow
        path, query = blocks._find(layer, "q")
        parent, _, name = path.rpartition(".")
        del layer.get_submodule(parent)._modules[name]
        layer.attention.to_query = query
    with pytest.raises(WeightsError, match="LAYER_ATTRIBUTES"):
        tower(images)
    table = blocks.LAYER_ATTRIBUTES
    monkeypatch.setitem(table, "q", (*table["q"], "attention.to_query"))
    rows = keys.KEY_TABLE["dinov2"]
    row = (
        r"encoder\.layer\.(\d+)\.attention\.to_query\.(weight|bias)",
        r"blocks.\1.attn.q.\2",
    )
    monkeypatch.setitem(keys.KEY_TABLE, "dinov2", (*rows, row))
    with torch.no_grad():
        torch.testing.assert_close(tower(images).cls_token, before)
    assert set(tower_state(tower)) == known


def test_strict_loading_names_the_key():
    tower = dino()
    good = {k: t.clone() for k, t in tower_state(tower).items()}
    missing = {k: t for k, t in good.items() if k != "norm.bias"}
    with pytest.raises(WeightsError, match="norm.bias"):
        load_state(tower_state(tower), missing, "file")
    with pytest.raises(WeightsError, match="surplus"):
        load_state(tower_state(tower), good | {"surplus": torch.zeros(1)}, "file")
    with pytest.raises(WeightsError, match=r"cls has shape \(3,\)"):
        load_state(tower_state(tower), good | {"cls": torch.zeros(3)}, "file")
    with pytest.raises(WeightsError, match="unknown key 'head.weight'"):
        to_stable({"head.weight": torch.zeros(1)}, "dinov2")


@pytest.mark.parametrize("make", [dino, clip])
def test_empty_tower_filled_equals_the_original(make):
    tower, images = make(), pictures()
    twin = empty_tower(tower.config).eval()
    load_state(tower_state(twin), tower_state(tower), "twin")
    with torch.no_grad():
        torch.testing.assert_close(twin(images).cls_token, tower(images).cls_token)
        if tower.config.kind == "clip":
            from open_clip import tokenize

            words = tokenize(["a photo"])
            torch.testing.assert_close(twin.model.encode_text(words), tower.model.encode_text(words))


def test_gradient_checkpointing_changes_nothing_but_memory():
    grads = []
    for checkpointing in (False, True):
        tower = dino().train()
        tower.checkpointing = checkpointing
        tower(pictures()).cls_token.square().sum().backward()
        grads.append(tower.model.embeddings.cls_token.grad.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("make", [dino, clip], ids=["dinov2", "clip"])
def test_who_reads_the_class_token_alone_gets_the_same_one(make):
    tower = make()
    images = pictures(tower.config.arch.image_side)
    with torch.no_grad():
        whole, alone = tower(images), tower(images, patches=False)
        (packed,) = merging.pack([Holder(tower)])
        fast = packed(images, patches=False)
    torch.testing.assert_close(alone.cls_token, whole.cls_token, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.cls_token, whole.cls_token, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.last_input, whole.last_input, atol=0, rtol=0)
    assert alone.patch_tokens.shape[1] == fast.patch_tokens.shape[1] == 0


class Holder(torch.nn.Module):
    """As much of a member as `pack` asks for."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower
