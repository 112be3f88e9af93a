"""The GPU benchmark's rehearsal, what it does without time, and the packed towers that it measures."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny import make_bundle

from solution import benchmark
from solution.bundles.members import build_member, random_towers
from solution.config import ClipArch
from solution.evaluation import maps
from solution.models import merging
from solution.presets import preset
from solution.studies import gpu as benchmark_gpu
from solution.studies import gpu_pipeline
from solution.studies.gpu_bench import STREAMS


def numbers(value):
    if isinstance(value, dict):
        for inside in value.values():
            yield from numbers(inside)
    elif isinstance(value, float):
        yield value


def run(folder, *words):
    code = benchmark.main(["gpu", "--tiny", "--out", str(folder), *words])
    return code, json.loads((folder / "gpu.json").read_text())["stages"]


# ------------------------------------------------------------------------------------------------ the command
def test_the_rehearsal_measures_every_stage(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "tiny", ("global",))
    code, stages = run(tmp_path, "--budget", "3600", "--weights", str(bundle.folder), "--workers", "1")
    told = capsys.readouterr().out
    assert {n: s.get("reason") for n, s in stages.items() if s["state"] != "done"} == {}
    assert code == 0 and list(stages) == list(benchmark_gpu.STAGES)
    for name, stage in stages.items():
        found = list(numbers(stage))
        assert all(0 <= n < float("inf") for n in found), name
        assert f"\n{name}: " in told
    for way in ("eager", "compiled"):
        three = [1 / stages["float16"][way][n]["pictures_per_s"] for n in STREAMS]
        theirs = 1 / stages["straight"]["members"]["all"]["pictures_per_s"]
        ratio = stages["float16"][way]["times_the_straightforward_way"]
        assert ratio == pytest.approx(theirs / sum(three))
    # The four ways that half precision was computed in, and what they changed.
    assert sum(isinstance(v, dict) for v in stages["parity"].values()) == 5


def test_without_time_every_stage_says_so(tmp_path):
    code, stages = run(tmp_path, "--budget", "0")
    assert code == 0 and list(stages) == list(benchmark_gpu.STAGES)
    for name, stage in stages.items():
        assert stage["state"] == "skipped"
        assert stage["reason"].startswith(f"{name}: ") and "left" in stage["reason"]


def test_a_stage_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(bench, entry):
        entry["before"] = 1
        raise ValueError("no such thing")

    monkeypatch.setitem(benchmark_gpu.STAGES, "straight", (broken, 0))
    code, stages = run(tmp_path, "--stages", "straight,card")
    assert code == 4 and stages["card"]["state"] == "done"
    assert stages["straight"]["state"] == "failed" and stages["straight"]["before"] == 1
    assert "ValueError: no such thing" in stages["straight"]["reason"]


def test_an_unknown_stage_is_named(tmp_path, capsys):
    words = ["gpu", "--tiny", "--out", str(tmp_path), "--stages", "card,nonsense"]
    assert benchmark.main(words) == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_rate_leaves_out_what_all_workers_begin_with(monkeypatch):
    now = iter([0.0, 10.0, 11.0, 12.0, 14.0])  # the start, then a part's end each
    monkeypatch.setattr(gpu_pipeline.time, "perf_counter", lambda: next(now))
    assert gpu_pipeline.steady_rate([5, 5, 6, 6], skip=2) == 12 / 3


# ------------------------------------------------------------------------------------------------ packed towers
def lively(swiglu, quick_gelu=False):
    """The four members of whole forwards on shared towers, with adapters and scales that do something."""
    torch.manual_seed(1)
    configs = {}
    for name in ("global", "face", "fusion", "qtfp"):
        config, tiny = preset("giant", name), preset("tiny", name)
        tower, clip = preset("tiny", "global").tower, config.clip
        tower = replace(tower, arch=replace(tower.arch, swiglu=swiglu))
        if clip is not None:
            clip = preset("tiny", "fusion").clip
            assert isinstance(clip.arch, ClipArch)
            own = replace(clip.arch, quick_gelu=quick_gelu, layer_scale=not quick_gelu)
            clip = replace(clip, arch=own)
        adapter = replace(config.adapter, kind="lora", rank=4, alpha=4.0)
        if name == "global":
            adapter = replace(adapter, kind="none")
        configs[name] = replace(
            config,
            view=tiny.view,
            tower=tower,
            clip=clip,
            adapter=adapter,
            qtfp=tiny.qtfp,
        )
    towers = random_towers(configs.values())
    members = {n: build_member(c, towers).eval() for n, c in configs.items()}
    for member in members.values():
        for name, value in member.named_parameters():
            if any(part in name for part in ("lora_B", "lambda1", "gamma")):
                value.data.normal_(0.5, 0.2)
    return configs, members


def scores(configs, members):
    torch.manual_seed(2)
    found = {}
    for name, member in members.items():
        side = configs[name].view.side
        images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
        with torch.inference_mode():
            member.tower.use(member.adapter)
            found[name] = torch.stack([member(images).logit for _ in range(2)])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("swiglu", [False, True])
def test_packed_towers_score_as_unpacked_ones(swiglu, dtype):
    configs, members = lively(swiglu, quick_gelu=swiglu)
    assert merging.merge_adapters(members, dtype)
    if dtype != torch.float32:
        merging.narrow(members.values(), dtype)
    plain = scores(configs, members)
    weights = sum(p.numel() for m in members.values() for p in m.parameters())
    unpacked = copy.deepcopy(members)
    packed = merging.pack(members.values())
    assert packed and packed == merging.towers_of(members.values())
    assert sum(p.numel() for m in members.values() for p in m.parameters()) == weights
    digits = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for name, found in scores(configs, members).items():
        assert torch.equal(found[0], found[1])  # positions: made, then kept
        torch.testing.assert_close(found, plain[name], atol=digits, rtol=digits)
    # What goes through the blocks one by one finds the same weights.
    for name, member in members.items():
        for ours, theirs in zip(member.tower.blocks(), unpacked[name].tower.blocks(), strict=True):
            member.tower.use(member.adapter)
            unpacked[name].tower.use(member.adapter)
            h = torch.ones(1, 2, member.tower.width, dtype=dtype)
            for role in "qkvo":
                assert torch.equal(getattr(ours, role)(h), getattr(theirs, role)(h))


def test_a_packed_matrix_is_held_once():
    _, members = lively(swiglu=True)
    merging.merge_adapters(members, torch.float32)
    (tower,) = merging.pack([members["global"], members["face"]])
    for block, weights in zip(tower.blocks(), tower.packed["face"], strict=True):
        tower.use("face")
        parts = [block.q, block.k, block.v]
        held = torch.cat([p.lora_A["face"] for p in parts])
        assert torch.equal(held, weights.qkv)
        start = parts[0].lora_A["face"].untyped_storage().data_ptr()
        assert start == weights.qkv.untyped_storage().data_ptr()


def test_a_tower_with_adapters_apart_stays_as_it_is():
    _, members = lively(swiglu=False)
    towers = [m.tower for m in members.values()]
    packed = merging.pack([members["global"]])
    assert packed == [] and members["global"].tower is towers[0]


def test_a_compiled_packed_tower_scores_the_same_and_takes_few_shapes():
    configs, members = lively(swiglu=True)
    merging.merge_adapters(members, torch.float32)
    plain = scores(configs, members)
    towers = merging.pack(members.values())
    for tower in towers:
        # Traced, not generated.
        tower.compile(dynamic=False, backend="eager", fullgraph=True)
    for name, found in scores(configs, members).items():
        torch.testing.assert_close(found, plain[name], atol=1e-5, rtol=1e-5)
    side = configs["face"].view.side
    images = torch.zeros(9, 3, side, side, dtype=torch.uint8)
    with torch.inference_mode():
        whole = members["face"](images).logit
        for count in range(1, 9):
            part = members["face"](images[:count]).logit
            torch.testing.assert_close(part, whole[:count], atol=1e-5, rtol=1e-5)
    assert all(len(t._shapes) <= merging.MOST_SHAPES for t in towers)


def test_maps_see_a_packed_tower():
    configs, members = lively(swiglu=False)
    merging.merge_adapters(members, torch.float32)
    unpacked = copy.deepcopy(members)
    merging.pack(members.values())
    side = configs["qtfp"].view.side
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    with torch.inference_mode():
        for name in ("face", "qtfp"):
            ours, theirs = (maps.look(m[name], images) for m in (members, unpacked))
            for part in ("logit", "last_input"):
                torch.testing.assert_close(getattr(ours, part), getattr(theirs, part), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                maps.attention_map(members[name], ours),
                maps.attention_map(unpacked[name], theirs),
            )
