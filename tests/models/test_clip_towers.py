"""CLIP models of open_clip by name: their geometry is the library's, and members are built on them."""

import pytest
import torch

from solution.bundles.members import build_member, random_towers
from solution.config import MemberConfig, from_dict, to_dict
from solution.errors import UsageError
from solution.models.clip_towers import named_clip, on_clip
from solution.models.towers import build_tower, count_parameters
from solution.presets import preset


def test_a_clip_is_described_by_its_name_alone():
    found = named_clip("ViT-B-16/laion2b_s34b_b88k")
    assert (found.source, found.statistics) == ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "clip")
    assert (found.arch.patch, found.arch.image_side, found.arch.quick_gelu) == (16, 224, False)
    # The published size of CLIP ViT-B/16.
    assert count_parameters(build_tower(found, device="meta"))[1] == 149_620_737
    assert named_clip("ViT-L-14/openai").arch == preset("giant", "vlaforge").tower.arch


@pytest.mark.parametrize(
    "name, why",
    [
        ("ViT-Q-99/openai", "no model 'ViT-Q-99'"),
        ("ViT-B-16/nobody", "one of openai"),
        ("ViT-B-16", "expected MODEL/TAG"),
        ("ViT-L-16-SigLIP2-256/webli", "not CLIP's own architecture"),
        ("EVA02-L-14/merged2b_s4b_b131k", "not CLIP's own architecture"),
        ("RN50/yfcc15m", "ResNet"),
    ],
)
def test_other_models_are_refused_by_name(name, why):
    with pytest.raises(UsageError, match=why):
        named_clip(name)


@pytest.mark.parametrize("kind", ["vlaforge", "qtfp", "global"])
def test_members_are_built_on_it(kind):
    config = on_clip(preset("giant", kind), named_clip("ViT-B-32/laion2b_s34b_b79k"))
    assert from_dict(MemberConfig, to_dict(config)) == config
    member = build_member(config, random_towers([config], device="meta"), decompose=False)
    assert member.tower.width == 768
    if kind == "vlaforge":
        assert config.vlaforge.input_side == 7 * 16 and max(config.vlaforge.fusion_layers) <= 12
        assert any(p.requires_grad for p in member.perceiver.parameters())
        assert isinstance(member.to_joint, torch.nn.Linear)
    else:
        assert config.view.side == 224 and config.tower.arch.text_layers == 0
