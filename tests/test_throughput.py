"""The inference benchmark: what it counts, what it builds, and that its commands run."""

import numpy as np
import pytest
import torch
from make_smoke_data import write
from tiny_bundle import make_bundle

from solution import benchmark, throughput
from solution.calibration import Calibrator
from solution.config import Dinov2Arch, VoteConfig, preset
from solution.faces import FaceLocator
from solution.members import build_member, random_towers


def test_flops_are_those_of_the_architecture():
    config = preset("tiny", "face")
    member = build_member(config, random_towers([config])).eval()
    arch, count, rank = config.tower.arch, 3, config.adapter.rank
    assert isinstance(arch, Dinov2Arch)
    tokens, width = (config.view.side // arch.patch) ** 2 + 1, arch.width
    # A block's matrices: four projections, each with its LoRA, and the MLP.
    matrices = 4 * (width**2 + 2 * rank * width) + 2 * arch.mlp_ratio * width**2
    block = tokens * matrices + 2 * tokens**2 * width
    patches = (tokens - 1) * 3 * arch.patch**2 * width
    expected = 2 * count * (arch.layers * block + patches + 2 * width)
    images = torch.zeros(
        count, 3, config.view.side, config.view.side, dtype=torch.uint8
    )
    with torch.no_grad():
        assert throughput.count_flops(lambda: member(images)) == expected


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
    found = [
        bool(locator.locate(throughput.drawn_face(256, seed))) for seed in range(8)
    ]
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


def test_the_parity_command_passes_on_the_default_path(tmp_path, capsys):
    vote = VoteConfig({"global": 1, "face": 1})
    made = make_bundle(tmp_path / "tiny", ("global", "face"), vote=vote)
    assert made.calibrators["face"] == Calibrator("temperature", (0.5,))
    manifest = write(tmp_path / "data", train=2, val=16)
    words = ["parity", "--weights", str(made.folder), "--data", str(manifest)]
    assert benchmark.main([*words, "--device", "cpu", "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert told.count("default") == 3 and "within bounds" in told  # speed, 2 members


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
