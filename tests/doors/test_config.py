"""Configs check themselves, survive JSON, and take typed settings."""

import json
from dataclasses import replace

import pytest

from solution.config import (
    ConfigError,
    DegradationConfig,
    MemberConfig,
    VoteConfig,
    from_dict,
    override,
    to_dict,
)
from solution.presets import PRESET_MEMBERS, PRESETS, preset

PAIRS = [(p, m) for p in PRESETS for m in PRESET_MEMBERS[p]]


@pytest.mark.parametrize("name, member", PAIRS)
def test_every_preset_survives_json(name, member):
    config = preset(name, member)
    assert from_dict(MemberConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_published_numbers():
    streams = {m: preset("giant", m) for m in ("global", "face", "fusion")}
    for config in streams.values():
        assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (
            32,
            64.0,
            0.15,
        )
        assert config.train.batch * config.train.accumulate == (256 if config.name == "fusion" else 512)
        assert config.optim.weight_decay == 5e-4
    assert (streams["global"].view.resize, streams["global"].view.side) == (256, 252)
    assert streams["face"].view.source == "face"
    assert streams["fusion"].train.head_epochs == 3 and streams["fusion"].train.head_lr == 1e-4
    assert preset("ntire26", "fusion").clip.statistics == "imagenet"
    assert preset("giant", "fusion").clip.statistics == "clip"
    assert preset("giant", "qtfp").adapter.kind == "effort"


def test_unknown_fields_and_wrong_types_fail_by_name():
    values = to_dict(preset("compact", "global"))
    with pytest.raises(ConfigError, match="optim: unknown field speed"):
        from_dict(MemberConfig, values | {"optim": values["optim"] | {"speed": 1}})
    with pytest.raises(ConfigError, match=r"train.batch: expected int, found '8'"):
        from_dict(MemberConfig, values | {"train": values["train"] | {"batch": "8"}})
    with pytest.raises(ConfigError, match="expected int, found True"):
        from_dict(MemberConfig, values | {"train": values["train"] | {"batch": True}})


def test_override_types_by_field():
    config = preset("compact", "qtfp")
    settings = [
        "optim.lr=1e-5",
        "qtfp.queries=1",
        "degradation.ops=blur,jpeg",
        "degradation.strength=0.5",
    ]
    changed = override(config, [*settings, "optim.decoupled=false"])
    assert changed.optim.lr == 1e-5 and changed.qtfp.queries == 1
    assert changed.degradation.ops == ("blur", "jpeg") and changed.degradation.strength == 0.5
    assert changed.optim.decoupled is False
    assert override(changed, ["degradation.strength=none"]).degradation.strength is None


@pytest.mark.parametrize(
    "setting, message",
    [
        ("optim.lr", "expected field=value"),
        ("optim.speed=1", "unknown field 'speed'"),
        ("train.batch=1.5", "expected int"),
        ("optim.decoupled=maybe", "expected true or false"),
        ("tower=x", "one by one"),
        ("optim.lr.x=1", "has no fields"),
        ("degradation.op_p=1.5", r"lie in \[0, 1\]"),
        ("degradation.ops=blurr", "unknown"),
    ],
)
def test_bad_settings_explain_themselves(setting, message):
    with pytest.raises(ConfigError, match=message):
        override(preset("compact", "global"), [setting])


def test_vlaforge_loss_presets():
    code = override(preset("giant", "vlaforge"), ["vlaforge.losses=code"]).vlaforge
    assert (code.w_global, code.w_localization, code.w_intra) == (10.0, 200.0, 20.0)
    paper = override(preset("giant", "vlaforge"), ["vlaforge.losses=code", "vlaforge.losses=paper"]).vlaforge
    assert paper == preset("giant", "vlaforge").vlaforge


def test_impossible_configs_are_refused():
    config = preset("compact", "global")
    with pytest.raises(ConfigError, match="multiple of the tower's patch"):
        replace(config, view=replace(config.view, side=config.view.side - 1))
    with pytest.raises(ConfigError, match="belongs to the fusion"):
        replace(config, clip=preset("compact", "fusion").clip)
    with pytest.raises(ConfigError, match="somebody must vote"):
        VoteConfig({"global": 0})
    with pytest.raises(ConfigError, match="jpeg_quality"):
        DegradationConfig(jpeg_quality=(95, 10))
    with pytest.raises(ConfigError, match="unknown; known"):
        preset("huge", "global")


@pytest.mark.parametrize("name", ["giant", "compact", "tiny"])
def test_a_preset_makes_no_member_that_it_has_no_branch_for(name, monkeypatch):
    monkeypatch.setitem(PRESET_MEMBERS, name, (*PRESET_MEMBERS[name], "another"))
    with pytest.raises(ConfigError, match="has no member 'another'"):
        preset(name, "another")
