"""Adapters merged into towers: whoever else looks through a tower sees it as it was."""

from dataclasses import replace

import pytest
import torch

from solution.bundles.members import build_member, random_towers
from solution.config import AdapterConfig
from solution.models import merging
from solution.models.adapters import adapter_state
from solution.presets import preset

SIDE = preset("tiny", "fusion").view.side
IMAGES = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def adapted(configs):
    """The members, by name, on shared random towers; their adapters do something."""
    torch.manual_seed(0)
    towers = random_towers(configs)
    members = {config.name: build_member(config, towers).eval() for config in configs}
    with torch.no_grad():
        for member in members.values():
            for key, value in adapter_state(member.tower, member.adapter).items() if member.adapter else ():
                if key.endswith(("lora_B", "effort_s")):
                    value += 0.5
    return members


def logits(members):
    with torch.no_grad():
        return {name: member.judge(IMAGES) for name, member in members.items()}


def on(tower, name, kind):
    return replace(preset("tiny", "global"), name=name, tower=tower, adapter=AdapterConfig(kind, rank=2, dropout=0.0))


@pytest.mark.parametrize("second", [True, False], ids=["fusion's second tower", "a stream's own"])
def test_who_looks_through_a_tower_that_another_member_adapts_sees_it_plain(second):
    fusion = preset("tiny", "fusion")
    plain = fusion if second else on(fusion.clip, "plain", "none")
    members = adapted([plain, on(fusion.clip, "other", "lora")])
    before = logits(members)
    assert merging.merge_adapters(members, torch.float32)
    torch.testing.assert_close(logits(members), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind, merged", [("effort", True), ("lora", False)])
def test_effort_is_merged_whatever_memory_it_takes(monkeypatch, kind, merged):
    monkeypatch.setattr(merging, "MERGED_BYTES", {"cpu": 0})
    tower = preset("tiny", "face").tower
    members = adapted([on(tower, "a", kind), on(tower, "b", kind)])
    before = logits(members)
    assert merging.merge_adapters(members, torch.float32) == merged
    projection = next(members["a"].tower.blocks()).q
    assert isinstance(projection, merging.MergedLinear) == merged
    torch.testing.assert_close(logits(members), before, atol=1e-5, rtol=0)
