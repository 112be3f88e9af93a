"""timm's vision transformers by name: equal to the library, adapted, merged, packed, stored under stable names."""

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import TIMM, timm_tower

from solution.bundles.bundle import tower_weights
from solution.bundles.members import build_member, dump_tower, fill_tower
from solution.config import (
    AdapterConfig,
    ConfigError,
    MemberConfig,
    TimmArch,
    TowerConfig,
    from_dict,
    override,
    to_dict,
)
from solution.errors import UsageError, WeightsError
from solution.models import merging, timm_towers
from solution.models.adapters import add_adapter
from solution.models.keys import is_norm, to_stable
from solution.models.towers import (
    build_tower,
    count_parameters,
    empty_tower,
    load_state,
    patch_attention,
    tower_parameters,
    tower_state,
)
from solution.presets import preset

FAMILIES = tuple(TIMM)


def tower_of(family, seed=0):
    torch.manual_seed(seed)
    return shaken(build_tower(timm_tower(family)).eval())


def shaken(module):
    """Norms and scales start at one and zero, and what is not applied would not be noticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def pictures(side=32, count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def library_model(arch, seed=0):
    torch.manual_seed(seed)
    options = {"embed_dim": arch.width, "depth": arch.layers, "num_heads": arch.heads, "mlp_ratio": arch.mlp_ratio}
    model = timm.create_model(
        arch.model,
        num_classes=0,
        img_size=arch.image_side,
        patch_size=arch.patch,
        dynamic_img_size=True,
        global_pool="map" if arch.pool == "attention" else "token",
        **options,
    )
    return shaken(model.eval())


PACKED_GATE = replace(TIMM["eva02"], model="eva02_tiny_patch14_224")
REGISTERS = TimmArch("vit_small_patch14_reg4_dinov2", width=48, layers=2, heads=2, patch=8, image_side=32)


@pytest.mark.parametrize("side", [32, 48])
@pytest.mark.parametrize("arch", [*TIMM.values(), PACKED_GATE, REGISTERS], ids=lambda arch: arch.model)
def test_equals_the_library_at_its_side_and_another(arch, side):
    theirs = library_model(arch)
    tower = build_tower(TowerConfig("t", "timm", arch, statistics="half")).eval()
    layout = "timm_gated" if arch is PACKED_GATE else "timm"
    load_state(tower_state(tower), to_stable(theirs.state_dict(), layout), "twin")
    images = pictures(side)
    with torch.no_grad():
        tokens = theirs.forward_features(tower.normalize(images))
        pooled = theirs.forward_head(tokens, pre_logits=True)
        ours = tower(images, keep=(1,))
    torch.testing.assert_close(ours.patch_tokens, tokens[:, arch.prefix :], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.cls_token, pooled, atol=2e-5, rtol=1e-5)
    assert ours.grid == (side // 8, side // 8)
    assert ours.hidden[1].shape == (3, arch.prefix + (side // 8) ** 2, arch.width)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_scores_alike_alone_and_in_a_batch(family):
    tower, images = tower_of(family), pictures()
    with torch.no_grad():
        alone = torch.cat([tower(image[None]).cls_token for image in images])
        torch.testing.assert_close(alone, tower(images).cls_token, atol=1e-5, rtol=1e-5)
        unread = tower(images, patches=False).cls_token  # the last block without its patches
        torch.testing.assert_close(unread, tower(images).cls_token, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "effort"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_merged_narrowed_and_packed(family, kind):
    config = replace(
        preset("tiny", "global"),
        view=replace(preset("tiny", "global").view, resize=32, side=32),
        tower=timm_tower(family),
        adapter=AdapterConfig(kind, rank=2, dropout=0.0),
    )
    member = build_member(config, {config.tower.name: tower_of(family)}).eval()
    images = pictures()
    with torch.no_grad():
        plain = member(images).logit.clone()
        for key, value in member.stored_state().items():
            if key.endswith(("lora_B", "effort_s")):
                value += 0.3
        expected = member(images).logit
        assert (expected - plain).abs().max() > 1e-3
        merged = copy.deepcopy(member)
        assert merging.merge_adapters({"global": merged}, torch.float32)
        torch.testing.assert_close(merged(images).logit, expected, atol=1e-4, rtol=1e-4)
        packed = copy.deepcopy(merged)
        assert len(merging.pack([packed])) == 1
        torch.testing.assert_close(packed(images).logit, expected, atol=1e-4, rtol=1e-4)
        merging.narrow([merged], torch.bfloat16)
        torch.testing.assert_close(merged(images).logit, expected, atol=0.2, rtol=0.1)
        both = copy.deepcopy(merged)
        assert len(merging.pack([both])) == 1
        torch.testing.assert_close(both(images).logit, merged(images).logit, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_stored_is_what_is_loaded(family, tmp_path):
    tower, images = tower_of(family), pictures()
    dump_tower(tower, tmp_path / "t.safetensors", dtype=torch.float32)
    state = tower_weights(tower.config, str(tmp_path / "t.safetensors"))
    again = fill_tower(tower.config, state).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images).cls_token, tower(images).cls_token, atol=0, rtol=0)


@pytest.mark.parametrize("arch", [*TIMM.values(), PACKED_GATE], ids=lambda arch: arch.model)
def test_a_folder_of_the_hub_is_read_and_its_architecture_checked(arch, tmp_path):
    theirs = library_model(arch)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = TowerConfig("t", "timm", arch, statistics="half")
    with pytest.raises(WeightsError, match=r"config.json: missing, or of no timm"):
        tower_weights(config, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": arch.model}))
    tower, images = fill_tower(config, tower_weights(config, str(tmp_path))).eval(), pictures()
    with torch.no_grad():
        pooled = theirs.forward_head(theirs.forward_features(tower.normalize(images)), pre_logits=True)
        torch.testing.assert_close(tower(images).cls_token, pooled, atol=2e-5, rtol=1e-5)
    other = replace(config, arch=replace(arch, model="vit_base_patch16_224"))
    with pytest.raises(WeightsError, match=f"model is {arch.model}, expected vit_base_patch16_224"):
        tower_weights(other, str(tmp_path))


def test_names_in_the_file_survive_a_renamed_library_module(monkeypatch):
    names = set(tower_state(tower_of("dinov3")))
    create = timm_towers._create

    def tomorrows(*given, **options):
        model = create(*given, **options)
        for block in model.blocks:
            block.attn.out = block.attn._modules.pop("proj")
        return model

    monkeypatch.setattr(timm_towers, "_create", tomorrows)
    with pytest.raises(WeightsError, match=r"_PARTS"):
        tower_of("dinov3")
    monkeypatch.setitem(timm_towers._PARTS, "o", ("attn.proj", "attn.out"))
    assert set(tower_state(tower_of("dinov3"))) == names


def test_norm_tuning_trains_every_layer_norm_and_nothing_else():
    for family, count in {"dinov3": 3 * 2 + 1, "pe": 2 * 2 + 3, "siglip2": 2 * 2 + 2, "eva02": 2 * 4 + 1}.items():
        tower = tower_of(family)
        add_adapter(tower, "m", AdapterConfig("norm"))
        norms = [m for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert len(norms) == count
        trained = {id(p) for p in tower.parameters() if p.requires_grad}
        assert trained == {id(p) for norm in norms for p in norm.parameters()}
        assert trained == {id(p) for key, p in tower_parameters(tower).items() if is_norm(key)}
        tower.train()(pictures()).cls_token.sum().backward()
        reached = {id(p) for p in tower.parameters() if p.grad is not None}
        assert reached == trained


def test_shared_lora_is_lora_on_the_packed_projection():
    tower = tower_of("dinov3")
    qkv = ("q", "k", "v")
    add_adapter(tower, "m", AdapterConfig("lora", rank=4, dropout=0.0, projections=qkv, shared=True))
    # Of a linear layer from D to 3 D: rank (D + 3 D).
    assert count_parameters(tower)[0] == 3 * 4 * (48 + 3 * 48)
    with torch.no_grad():
        block = next(tower.blocks())
        block.q.lora_A["m"].weight.fill_(1)
    assert block.k.lora_A["m"].weight.eq(1).all()
    with pytest.raises(ConfigError, match="adapter.shared"):
        AdapterConfig("effort", shared=True)


def test_checkpointing_changes_nothing_but_memory():
    gradients = []
    for checkpointing in (False, True):
        tower = tower_of("pe").train()
        tower.checkpointing = checkpointing
        tower(pictures()).cls_token.square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.parameters()])
    torch.testing.assert_close(*gradients)


def test_attention_of_the_class_token_is_the_last_blocks():
    tower, images = tower_of("dinov3"), pictures()
    caught = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v):
        caught.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
        return attend(q, k, v)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        last = tower(images).last_input
    with torch.no_grad():
        heads = tower.cls_attention(last)
    torch.testing.assert_close(heads, caught[-1][:, :, 0], atol=1e-5, rtol=1e-5)
    assert patch_attention(heads, tower.prefix).shape == (3, 16)
    with pytest.raises(UsageError, match="no class token"):
        tower_of("siglip2").cls_attention(last)


def test_an_empty_tower_has_its_rotary_positions():
    tower, images = tower_of("pe"), pictures()
    twin = empty_tower(tower.config).eval()
    load_state(tower_state(twin), tower_state(tower), "twin")
    with torch.no_grad():
        torch.testing.assert_close(twin(images).cls_token, tower(images).cls_token, atol=0, rtol=0)


def test_a_tower_is_described_by_its_name_alone():
    found = timm_towers.named_tower("vit_base_patch16_dinov3.lvd1689m")
    assert found.source == "timm/vit_base_patch16_dinov3.lvd1689m"
    assert (found.statistics, found.licence, found.name) == (
        "imagenet",
        "dinov3-license",
        "vit_base_patch16_dinov3-lvd1689m",
    )
    assert found.arch == TimmArch("vit_base_patch16_dinov3", width=768, layers=12, heads=12)
    with pytest.raises(UsageError, match="no such pre-trained model"):
        timm_towers.named_tower("vit_enormous")


@pytest.mark.parametrize(
    "name, why",
    [
        ("resnet18", "no vision transformer"),
        ("vit_small_patch16_36x1_224_", "has no model"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
    ],
)
def test_other_models_are_refused_by_name(name, why):
    with pytest.raises(WeightsError, match=why):
        build_tower(TowerConfig("t", "timm", replace(TIMM["dinov3"], model=name)))


def test_a_geometry_that_the_library_does_not_have_is_refused():
    with pytest.raises(WeightsError, match="prefix 5, the configuration says 1"):
        build_tower(TowerConfig("t", "timm", replace(TIMM["dinov3"], prefix=1)))
    with pytest.raises(ConfigError, match="needs a class token"):
        TimmArch(prefix=0)


def test_the_configuration_survives_json_and_takes_settings():
    config = replace(
        preset("tiny", "global"),
        view=replace(preset("tiny", "global").view, resize=32, side=32),
        tower=timm_tower("eva02"),
    )
    assert from_dict(MemberConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert override(config, ["tower.arch.layers=5"]).tower.arch.layers == 5
