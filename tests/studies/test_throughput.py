"""The inference benchmark: what it counts, what it builds, and that its commands run."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_smoke_data import write
from tiny import TIMM, make_bundle, timm_tower
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from solution import benchmark
from solution.bundles.bundle import load_members
from solution.bundles.members import build_member, random_towers
from solution.config import MEMBERS, AdapterConfig, ViewConfig, VoteConfig
from solution.data.drawn import drawn_face
from solution.data.faces import FaceLocator
from solution.models.calibration import Calibrator
from solution.models.flops import member_flops
from solution.presets import preset
from solution.scoring.ensemble import load_ensemble
from solution.studies import throughput


def test_flops_of_a_stream_by_hand():
    adapter = AdapterConfig("lora", rank=16)
    config = replace(preset("compact", "wide"), adapter=adapter)
    assert config.view.side == 168
    # 12 x 12 patches and the class token; DINOv2 ViT-S/14 with LoRA of rank 16 on four projections.
    tokens, width, rank = 145, 384, 16
    matrices = 4 * (width * width + 2 * rank * width) + 2 * 4 * width * width
    block = tokens * matrices + 2 * tokens * tokens * width
    patches = 144 * 3 * 14 * 14 * width
    # The last block makes keys and values of the patches, and no more.
    unread = 144 * (2 * (width * width + 2 * rank * width) + 2 * 4 * width * width + 2 * tokens * width)
    assert member_flops(config) == 2 * (12 * block - unread + patches + 2 * width)
    merged = (12 * tokens * 4 - 144 * 2) * 2 * rank * width
    assert member_flops(config, adapters=False) == member_flops(config) - 2 * merged


def counted(member, images):
    """FLOP by torch's counter, which sees attention only where its plain kernel is all there is."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            member(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def shallow(config):
    """The member at its width with one block instead of forty: every block costs the same."""
    tower = replace(config.tower, arch=replace(config.tower.arch, layers=1))
    clip = config.clip
    if clip is not None:
        clip = replace(clip, arch=replace(clip.arch, layers=1))
    own = replace(config.vlaforge, fusion_layers=(1, 1, 1), adapter=False)
    return replace(config, tower=tower, clip=clip, vlaforge=own)


def variants(config):
    """Every way in which a member's configuration changes what it computes."""
    yield config
    if config.kind == "qtfp":
        for more in ({"pool": "cls"}, {"key_width": 0, "readout": "mean"}):
            yield replace(config, qtfp=replace(config.qtfp, **more))
        for kind in ("lora", "effort"):
            yield replace(config, adapter=AdapterConfig(kind, rank=3))
    if config.kind == "vlaforge":
        for more in ({"adapter": True}, {"copy_gain": 1.0}):
            yield replace(config, vlaforge=replace(config.vlaforge, **more))


@pytest.mark.parametrize(
    ("size", "name"),
    [("tiny", name) for name in MEMBERS]
    + [("compact", name) for name in MEMBERS]
    + [("giant", name) for name in MEMBERS if name != "face"],  # the same as global
)
def test_flops_by_arithmetic_are_those_of_the_forward(size, name):
    config = preset(size, name)
    if size == "giant":
        config = shallow(config)
    for one in variants(config) if size == "tiny" else [config]:
        member = build_member(one, random_towers([one], device="meta"))
        throughput.materialize(member.eval(), torch.device("cpu"))
        images = torch.zeros(1, 3, one.view.side, one.view.side)
        with torch.no_grad():
            assert counted(member, images) == member_flops(one)


@pytest.mark.parametrize("family", TIMM)
def test_flops_of_timm_towers_by_arithmetic(family):
    config = replace(preset("tiny", "global"), tower=timm_tower(family), view=ViewConfig("face", 48, 48))
    member = build_member(replace(config, adapter=AdapterConfig("lora", rank=3)), random_towers([config])).eval()
    with torch.no_grad():
        assert counted(member, torch.zeros(1, 3, 48, 48)) == member_flops(member.config)


def test_merged_adapters_are_counted_no_more(tmp_path):
    made = make_bundle(tmp_path / "tiny", ("global", "face", "fusion", "qtfp"))
    apart = load_members(made)
    assert all(throughput.adapters_apart(member) for member in apart.values())
    ensemble = load_ensemble(made, "cpu", precision="float32")
    for name, member in ensemble.members.items():
        assert not throughput.adapters_apart(member)
        side = member.config.view.side
        images = torch.zeros(1, 3, side, side)
        member.tower.use(member.adapter)
        with torch.no_grad():
            assert counted(member, images) == member_flops(ensemble.configs[name], adapters=False)


def test_a_member_on_the_meta_device_is_filled_where_it_should_be():
    for name in ("fusion", "vlaforge"):
        config = preset("tiny", name)
        member = build_member(config, random_towers([config], device="meta")).eval()
        throughput.materialize(member, torch.device("cpu"))
        side = config.view.side
        images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        with torch.no_grad():
            assert torch.isfinite(member(images).logit).all()
        assert not any(p.is_meta for p in member.parameters())


def test_drawn_faces_are_found():
    locator = FaceLocator(preset("compact", "face").face)
    found = [bool(locator.locate(drawn_face(256, seed))) for seed in range(8)]
    assert sum(found) >= 6  # else the benchmark would time the retries


def test_parity_tells_what_keeps_from_what_departs():
    rng = np.random.default_rng(0)
    exact, labels = rng.uniform(size=2000), rng.integers(0, 2, 2000)
    assert throughput.compared(exact, exact, labels, 0.1)[0]
    assert throughput.compared(exact, exact, np.ones(2000, int), 0.1)[0]
    nearby = np.clip(exact + rng.normal(0, 0.003, 2000), 0, 1)
    fits, text = throughput.compared(nearby, exact, labels, 0.1)
    assert not fits and "%" in text  # about 2 % of the levels change
    assert not throughput.compared(1 - exact, exact, labels, 1.0)[0]  # the AUC does
    low, high = np.sort(rng.uniform(0.41, 0.44, (2, 2000)), axis=0)  # all within one level, in two orders
    assert not throughput.compared(low, high, labels, 0.1)[0]


def test_parity_keeps_every_level_and_the_order_of_the_vote_alone():
    """A member's order within a level moves no score; a level that changes, or a vote of another order, does."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    low, high = np.log(p := np.sort(rng.uniform(0.41, 0.44, (2, 2000)), axis=0)) - np.log1p(-p)
    sure = np.where(labels == 1, 3.0, -3.0)
    members, plain = {"a": None, "b": None}, Calibrator("identity")

    def fits(logits, exact, **mean):
        ensemble = SimpleNamespace(
            vote=VoteConfig({"a": 1, "b": 1}, **mean),
            members=members,
            calibrators=dict.fromkeys(members, plain),
            noise={},
        )
        return throughput.told("fast", np.stack(logits), np.stack(exact), labels, ensemble, {})

    assert fits((low, sure), (high, sure))
    assert not fits((low, sure), (high, -sure))  # levels
    assert not fits((low, low), (high, high), mean="probability")  # no level, but the vote's order


def test_the_parity_command_passes_on_the_default_path(tmp_path, capsys):
    vote = VoteConfig({"global": 1, "face": 1})
    made = make_bundle(tmp_path / "tiny", ("global", "face"), vote=vote)
    assert made.calibrators["face"] == Calibrator("temperature", (0.5,))
    manifest = write(tmp_path / "data", train=2, val=16)
    words = ["parity", "--weights", str(made.folder), "--data", str(manifest)]
    assert benchmark.main([*words, "--device", "cpu", "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert told.count("default") == 4 and "within bounds" in told  # speed, 2 members, the vote


@pytest.mark.slow
def test_the_inference_command_prints_every_stage(capfd):
    words = ["inference", "--preset", "tiny", "--random-weights", "--device", "cpu"]
    words += ["--pictures", "8", "--batch", "4", "--members", "global,face"]
    assert benchmark.main(words) == 0
    told = capfd.readouterr().out
    for stage in ("decode", "faces", "views", "global", "face", "vote", "end to end"):
        assert f"  {stage} " in told
    assert "authors' way" in told and "times as fast" in told


def test_inference_without_weights_says_what_to_name(capsys):
    assert benchmark.main(["inference"]) == 2
    assert "--random-weights" in capsys.readouterr().err
