"""Training: schedule, accumulation, resume to the bit, two processes, phases, overfitting."""

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_smoke_data import write
from safetensors.torch import load_file

from solution import train
from solution.bundles.members import build_member, load_member, random_towers, read_config
from solution.config import AdapterConfig, ConfigError, DegradationConfig, OptimConfig, override
from solution.data.manifest import DropReport, Item, read_manifest
from solution.errors import WeightsError
from solution.models.adapters import adapter_state
from solution.models.optimization import Average, make_optimizer, parameter_groups, phases, rate_factor
from solution.presets import preset
from solution.training import loop
from solution.training.loop import Budget, Run, TrainingError, TrainingSet
from solution.training.processes import Machine, World
from solution.training.start import start_from
from solution.training.validation import score_items, split_aucs, validation_pictures

ROOT = Path(__file__).resolve().parents[2]
STILL = [
    "augment.flip_p=0",
    "augment.rotate_p=0",
    "augment.crop_p=0",
    "augment.self_blend_p=0",
    "augment.colour_p=0",
    "augment.sharpness_p=0",
    "train.average=0",
]
ALONE = World()
CLEAN = [*STILL, "degradation.global_p=0"]


def make_run(folder, name="wide", settings=(), count=16, seed=0, validation=(), world=ALONE):
    config = override(preset("tiny", name), [*settings])
    items, _ = read_manifest(write(folder / "data", train=count, val=8), split="train")
    torch.manual_seed(seed)
    member = build_member(config, random_towers([config]))
    torch.manual_seed(seed)
    machine = Machine(torch.device("cpu"), world, progress=False)
    return Run(member, TrainingSet(items, list(validation)), folder / "out" / name, machine=machine)


def stop_after(run, steps):
    """The run is told to stop within its step number `steps`."""
    step = run._optimizer_step

    def told(*args):
        if run.state.total + 1 == steps:
            run.stop()
        return step(*args)

    run._optimizer_step = told


def weights(run):
    return {k: t.detach().clone() for k, t in run.member.stored_state().items()}


def assert_same(a, b, **tolerance):
    assert set(a) == set(b)
    for key in a:
        if tolerance:
            torch.testing.assert_close(a[key], b[key], **tolerance)
        else:
            assert torch.equal(a[key], b[key]), key


def test_the_rate_follows_its_schedule():
    optim = OptimConfig(lr=1e-4, warmup_steps=10, final_lr=1e-6)
    rates = [rate_factor(s, 110, optim, optim.lr) * optim.lr for s in range(110)]
    assert rates[0] == pytest.approx(1e-6)  # 1 % of the rate
    assert rates[10] == pytest.approx(1e-4)
    assert rates[60] == pytest.approx(1e-6 + 0.5 * (1e-4 - 1e-6))
    last = 1e-6 + 0.5 * (1e-4 - 1e-6) * (1 + math.cos(math.pi * 0.99))
    assert rates[109] == pytest.approx(last)
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rate_factor(50, 100, replace(optim, schedule="constant"), 1e-4) == 1.0


def test_phases_of_fusion_are_the_published_ones():
    head, everything = phases(preset("giant", "fusion"))
    assert (head.name, head.epochs, head.optim.lr, head.optim.warmup_steps) == (
        "head",
        3,
        1e-4,
        500,
    )
    assert (everything.name, everything.epochs, everything.optim.lr) == (
        "all",
        10,
        1e-6,
    )
    assert everything.optim.warmup_steps == 50


def test_layer_decay_slows_the_early_blocks():
    config = override(
        preset("tiny", "wide"),
        ["optim.layer_decay=0.5", "optim.lr=1.0", "optim.head_lr=3.0"],
    )
    member = build_member(config, random_towers([config]))
    groups = parameter_groups(member, phases(config)[0])
    rates = {id(g["params"][0]): g["rate"] for g in groups}
    assert rates[id(member.head.weight)] == 3.0
    assert rates[id(member.tower.layers[2].norm1.weight)] == 1.0
    assert rates[id(member.tower.layers[1].norm1.weight)] == 0.5
    assert rates[id(member.tower.layers[0].norm1.weight)] == 0.25
    assert rates[id(member.tower.model.embeddings.cls_token)] == 0.125
    decays = {id(g["params"][0]): g["weight_decay"] for g in groups}
    assert decays[id(member.head.weight)] == 0.05 and decays[id(member.head.bias)] == 0


def test_the_average_forgets_its_start():
    """After one step it keeps 2/11 of the start, after two 3/12 of that; its own decay comes with the steps."""
    parameter = torch.nn.Parameter(torch.tensor([8.0]))
    average = Average([parameter], decay=0.9)
    for step, value in ((1, 19.0), (2, 4.0)):
        parameter.data.fill_(value)
        average.update(step)
    first = 8 * 2 / 11 + 19 * 9 / 11
    assert average.values[0].item() == pytest.approx(first / 4 + 4 * 3 / 4)
    average.update(10_000)
    assert average.values[0].item() == pytest.approx((first / 4 + 3) * 0.9 + 4 * 0.1)


def test_efforts_starting_part_is_stored_and_not_trained():
    config = replace(preset("tiny", "face"), adapter=AdapterConfig("effort", rank=1, dropout=0.0))
    member = build_member(config, random_towers([config]))
    state = adapter_state(member.tower, member.adapter)
    start = {id(p) for key, p in state.items() if key.endswith("0")}
    trained = {id(p) for group in make_optimizer(member, phases(config)[0]).param_groups for p in group["params"]}
    assert len(state) == 2 * len(start) > 0  # u, s, v and what each started from
    assert not trained & start and {id(p) for p in state.values()} - start < trained
    assert not any(p.requires_grad for p in state.values() if id(p) in start)


def test_a_budget_is_spent_on_steps():
    """Ten steps of warm-up, the first two slow: 1 s each from the third on; the budget counts from the first step's end."""
    budget, ends = Budget(100.0, warmup_steps=10), itertools.chain([50, 60], itertools.count(61))
    told = [budget.steps(step, now) for step, now in zip(range(1, 11), ends)]
    assert told[:9] == [(0, 0.0)] * 9
    assert told[9] == (10 + 100 - 18, 1.0)
    resumed = Budget(100.0, warmup_steps=10)  # after its warm-up: one step to start with, one to measure
    assert [resumed.steps(20, 0.0), resumed.steps(21, 2.0)] == [(0, 0.0), (21 + 49, 2.0)]
    spent = Budget(1.0, warmup_steps=0)
    assert [spent.steps(1, 0.0), spent.steps(2, 9.0)] == [(0, 0.0), (3, 9.0)]


def test_accumulation_equals_the_big_batch(tmp_path):
    base = [
        *CLEAN,
        "train.epochs=1",
        "optim.clip_norm=0",
        "optim.warmup_steps=0",
        "optim.lr=1e-3",
        "stream.focal_gamma=2",
    ]
    big = make_run(tmp_path / "a", settings=[*base, "train.batch=8"])
    small = make_run(tmp_path / "b", settings=[*base, "train.batch=2", "train.accumulate=4"])
    assert_same(weights(big), weights(small))
    before = weights(big)
    assert big.run().total == small.run().total == 2
    # A tenth of one step: where a gradient is nearly 0, Adam steps by the last digits of a sum.
    assert_same(weights(big), weights(small), atol=1e-4, rtol=0)
    assert any(not torch.equal(before[k], weights(big)[k]) for k in before)


def test_the_gradient_that_is_stepped_by_is_clipped(tmp_path):
    run = make_run(tmp_path, settings=["train.max_steps=1", "optim.clip_norm=0.01"])
    run.run()
    left = [p.grad for p in run.member.parameters() if p.grad is not None]
    assert run.history[0]["grad_norm"] > 0.02  # as it was
    assert torch.nn.utils.get_total_norm(left).item() == pytest.approx(0.01, rel=1e-3)


def test_dropout_differs_between_ranks_and_steps_and_not_between_runs(tmp_path):
    def drawn(folder, rank):
        """What the generator gives in each of two steps of a process that is alone, whatever its rank."""
        run, seen = make_run(tmp_path / folder, settings=["train.max_steps=2"], world=World(rank, 1)), []

        def step(*_):
            seen.append(torch.rand(1).item())
            return {"loss": 0.0}, 4

        run._optimizer_step = step
        run.run()
        return seen

    first, second = drawn("a", 0), drawn("b", 1)
    assert len(set(first + second)) == 4
    assert drawn("c", 0) == first


@pytest.mark.parametrize("name", ["fusion", "qtfp"])
@pytest.mark.parametrize("stop", [1, 5])
def test_interrupted_equals_uninterrupted_to_the_bit(tmp_path, name, stop):
    whole = make_run(tmp_path / "a", name)
    whole.run()
    first = make_run(tmp_path / "b", name)
    stop_after(first, stop)
    first.run()
    assert first.state.total == stop
    resumed = make_run(tmp_path / "b", name)
    with torch.no_grad():  # whatever it starts with, the checkpoint decides
        for tensor in resumed.member.stored_state().values():
            tensor.add_(1)
    assert resumed.run().total == whole.state.total == 8
    assert_same(weights(whole), weights(resumed))


def test_epochs_of_so_many_steps_resume_in_their_middle(tmp_path):
    """Six steps of four of sixteen pictures, two epochs: the second one, interrupted after its first step, goes on."""
    settings = ["train.steps_per_epoch=6", "train.accumulate=2", "train.batch=2"]
    whole = make_run(tmp_path / "a", settings=settings)
    assert whole.steps_per_epoch() == 6
    first, second = whole.epoch_plan(0), whole.epoch_plan(1)
    assert [len(batch) for batch in first + second] == [2] * 24 and first != second
    assert whole.run().total == 12
    stopped = make_run(tmp_path / "b", settings=settings)
    stop_after(stopped, 7)
    stopped.run()
    resumed = make_run(tmp_path / "b", settings=settings)
    assert resumed.run().total == 12 and resumed.state.pictures == 48
    assert_same(weights(whole), weights(resumed))
    giant = preset("giant", "vlaforge").train
    assert giant.epochs * giant.steps_per_epoch == 18_000


def test_another_configuration_does_not_resume(tmp_path):
    run = make_run(tmp_path, settings=["train.max_steps=1"])
    run.run()
    with pytest.raises(ConfigError, match="--restart"):
        make_run(tmp_path, settings=["train.max_steps=2"]).run()


def test_other_pictures_or_processes_do_not_resume(tmp_path):
    run = make_run(tmp_path, settings=["train.max_steps=1"])
    run.run()
    other = make_run(tmp_path, settings=["train.max_steps=1"])
    other.data.train.pop(0)
    with pytest.raises(ConfigError, match="another training set; go on"):
        other.run()
    shared = make_run(tmp_path, settings=["train.max_steps=1"], world=World(1, 2))
    with pytest.raises(ConfigError, match="another number of processes"):
        shared.run()


def test_other_validation_pictures_do_not_resume(tmp_path):
    """The best figure so far would be compared with figures of other pictures."""
    items, _ = read_manifest(write(tmp_path / "data", val=8), split="val")
    settings = ["train.max_steps=1"]
    make_run(tmp_path, "face", settings, validation=items).run()
    with pytest.raises(ConfigError, match="another validation set; go on"):
        make_run(tmp_path, "face", settings, validation=items[2:]).run()


def test_unreadable_pictures_are_dropped_and_named(tmp_path, capsys):
    data = write(tmp_path / "data", train=16, val=8)
    broken = {}
    for split in ("train", "val"):
        item = read_manifest(data, split=split)[0][0]
        item.path.write_bytes(b"no picture")
        broken[split] = item
    call = arguments(tmp_path / "out", data, "--set", "train.max_steps=3")
    assert train.main(call) == 3
    assert broken["val"].path.name in capsys.readouterr().err  # before the first step
    dropping = [*call, "--set", "sampling.on_unreadable=drop"]
    assert train.main(dropping) == 0
    text = (tmp_path / "out" / "wide" / "dropped.csv").read_text()
    _, *rows = csv.reader(text.splitlines())
    reasons = dict(rows)
    assert reasons[broken["train"].name] == "unreadable"
    assert reasons[broken["val"].name].startswith("validation: not a pic")
    scores = (tmp_path / "out" / "wide" / "validation.csv").read_text().splitlines()
    assert len(scores) == 8 and broken["val"].name not in "".join(scores)


def test_what_the_loader_cannot_read_is_counted(tmp_path):
    settings = ["train.max_steps=4", "sampling.on_unreadable=drop"]
    run = make_run(tmp_path, settings=settings)
    run.data.train[0].path.write_bytes(b"no picture")
    run.run()
    seen = [s.index for batch in run.epoch_plan(0)[:4] for s in batch]
    assert run.state.unreadable == seen.count(0) > 0
    assert run.state.pictures == len(seen) - seen.count(0)


def test_another_tower_does_not_resume(tmp_path):
    make_run(tmp_path, settings=["train.max_steps=1"]).run()
    other = make_run(tmp_path, settings=["train.max_steps=1"], seed=5)
    with pytest.raises(ConfigError, match="another tower"):
        other.run()


def test_eight_pictures_overfit(tmp_path):
    settings = [
        *CLEAN,
        "train.batch=8",
        "train.epochs=100",
        "optim.lr=1e-3",
        "optim.layer_decay=1",
    ]
    run = make_run(tmp_path, settings=[*settings, "optim.warmup_steps=5"], count=8)
    run.run()
    losses = [line["loss"] for line in run.history if "loss" in line]
    assert losses[0] > 0.1 and losses[-1] < 0.02


def test_a_nan_loss_stops_the_run_and_names_the_batch(tmp_path):
    run = make_run(tmp_path)
    with torch.no_grad():
        run.member.head.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss is nan.*train/"):
        run.run()


def test_best_weights_are_validated_saved_and_reload_to_the_same_scores(tmp_path):
    items, _ = read_manifest(write(tmp_path / "data", val=8), split="val")
    run = make_run(tmp_path, "face", validation=items)
    run.run()
    lines = [json.loads(text) for text in (run.folder / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "clean" in line]
    assert len(validated) == 2 and run.state.best == max(line["mean"] for line in validated)
    assert read_config(run.folder) == run.config
    record = json.loads((run.folder / "config.json").read_text())
    assert record["training"]["best"]["mean"] == run.state.best
    towers = {n: t for n, t in zip([run.config.tower.name], [run.member.tower])}
    from solution.models.towers import build_tower, load_state, tower_state

    fresh = build_tower(run.config.tower)
    load_state(tower_state(fresh), tower_state(towers[run.config.tower.name]), "twin")
    twin = load_member(run.folder, {run.config.tower.name: fresh})
    stored = load_file(run.folder / "model.safetensors")
    # A tower trained in place lies apart.
    own = {k: t for k, t in twin.stored_state().items() if not k.startswith("tower.")}
    assert set(stored) == set(own)
    assert all(torch.equal(stored[k].float(), t.float()) for k, t in own.items())
    with (run.folder / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [item.name for item in items]
    conditions = {"clean": None, "degraded": DegradationConfig(global_p=1.0)}
    for condition, how in conditions.items():
        told = np.array([float(row[condition]) for row in rows])
        scores = score_items(twin, items, how, machine=run.machine, bf16=False)
        np.testing.assert_allclose(scores, told, atol=1e-3)  # float16 on disk
        assert np.ptp(told) > 0.02


def scripted(monkeypatch, *areas):
    """Validations of alternately real and fake pictures that find these AUCs, 1 or 0.5, one after the other."""
    drawn = iter([area for area in areas for _ in ("clean", "degraded")])

    def score(member, items, how, **_):
        return np.array([float(item.label) for item in items]) * (next(drawn) - 0.5)

    monkeypatch.setattr(loop, "score_items", score)


def test_the_best_of_all_validations_stays_and_of_equals_the_first(tmp_path, monkeypatch):
    items, _ = read_manifest(write(tmp_path / "data", val=8), split="val")
    run = make_run(tmp_path, "face", ["train.validate_every=1", "train.max_steps=4"], validation=items)
    scripted(monkeypatch, 0.5, 1.0, 1.0, 0.5)
    saved, validate = [], run.validate

    def watched():
        validate()
        saved.append((run.folder / "model.safetensors").read_bytes())

    run.validate = watched
    run.run()
    assert saved[0] != saved[1] == saved[2] == saved[3]
    assert json.loads((run.folder / "config.json").read_text())["training"]["best"]["step"] == 2


def test_the_average_is_what_is_validated_and_saved(tmp_path, monkeypatch):
    items, _ = read_manifest(write(tmp_path / "data", val=8), split="val")
    run = make_run(tmp_path, "face", ["train.max_steps=3", "train.average=0.9", "optim.head_lr=0.1"], validation=items)
    seen = []

    def score(member, *_, **__):
        seen.append(member.head.weight.detach().clone())
        return np.arange(len(items))

    monkeypatch.setattr(loop, "score_items", score)
    run.run()
    last = run.member.head.weight
    (average,) = (v for v, p in zip(run.average.values, run.average.parameters) if p is last)
    assert (average - last).abs().max() > 0.01
    stored = load_file(run.folder / "model.safetensors")
    torch.testing.assert_close(stored["own.head.weight"], average.half())
    assert len(seen) == 2 and all(torch.equal(weight, average) for weight in seen)


def test_unseen_generators_count_by_source_and_seen_ones_together():
    """Both splits are ranked right within each of two sources, and wrong between them."""

    def of(split):
        return [Item("", Path(), label, source, split) for source in ("a", "b") for label in (0, 1)]

    scores = np.array([0.0, 1.0, 2.0, 3.0])
    found = split_aucs([*of("val"), *of("unseen")], {"clean": np.tile(scores, 2)})
    assert found == {"clean": 0.75, "unseen_clean": 1.0, "mean": 0.875}


def test_the_validation_seed_draws_degradations_and_pictures(tmp_path):
    data = write(tmp_path, train=0, val=24)
    configs = [override(preset("tiny", "face"), [f"train.validation_seed={seed}"]) for seed in (7, 8)]
    machine = Machine(torch.device("cpu"), progress=False)
    drawn = [validation_pictures(data, c, DropReport(), limit=6, machine=machine)[0] for c in configs]
    assert len(drawn[0]) == len(drawn[1]) == 6 and drawn[0] != drawn[1]
    member = build_member(configs[0], random_towers(configs[:1]))

    def scores(config, how):
        member.config = config
        return score_items(member, drawn[0], how, machine=machine, bf16=False)

    degraded = [scores(config, DegradationConfig(global_p=1.0)) for config in configs]
    assert np.abs(degraded[0] - degraded[1]).max() > 1e-3
    np.testing.assert_array_equal(scores(configs[0], DegradationConfig(global_p=1.0)), degraded[0])
    np.testing.assert_array_equal(scores(configs[0], None), scores(configs[1], None))


def arguments(out, data, *more, member="wide"):
    base = [
        "--member",
        member,
        "--preset",
        "tiny",
        "--random-towers",
        "--workers",
        "0",
    ]
    base += ["--quiet", "--device", "cpu", "--data", data, "--out", out]
    return [str(word) for word in [*base, *more]]


def entry(out, data, *more):
    command = [sys.executable, "-m", "solution.train", *arguments(out, data, *more)]
    # Sums differ in their last bit with the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def wait_for(path, process):
    """Until `path` is there; a process that ends first has failed."""
    while not path.exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)


def test_killed_at_any_moment_the_same_command_gives_the_same_weights(tmp_path):
    data = write(tmp_path / "data", train=48)
    more = [
        "--set",
        "train.epochs=2",
        "--set",
        "train.save_every=5",
        "--set",
        "augment.self_blend_p=0",
    ]
    assert train.main(arguments(tmp_path / "a", data, *more)) == 0
    killed = entry(tmp_path / "b", data, *more)
    checkpoint = tmp_path / "b/wide/checkpoint.pt"
    wait_for(checkpoint, killed)
    time.sleep(float(np.random.default_rng().uniform(0, 0.3)))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert train.main(arguments(tmp_path / "b", data, *more)) == 0
    for name in ("wide/model.safetensors", "towers/tiny-wide.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupt_is_told_and_resumable(tmp_path):
    data = write(tmp_path / "data", train=48)
    more = [
        "--set",
        "train.epochs=200",
        "--set",
        "train.save_every=1",
        "--set",
        "augment.self_blend_p=0",
    ]
    run = entry(tmp_path / "a", data, *more)
    wait_for(tmp_path / "a/wide/checkpoint.pt", run)
    run.send_signal(signal.SIGINT)
    assert run.wait() == 130
    assert b"goes on from here" in run.stderr.read()


def in_two_processes(words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "solution.train", *words],
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_two_processes_train_what_no_loss_reads(tmp_path):
    """Weights of 0 leave heads without a gradient, as the compact and tiny vlaforge's maps are trained first."""
    data = write(tmp_path / "data", train=16)
    sets = ["train.batch=4", "train.max_steps=2", "vlaforge.w_global=0", "vlaforge.w_local=0"]
    more = (word for s in sets for word in ("--set", s))
    done = in_two_processes(arguments(tmp_path / "out", data, *more, member="vlaforge"))
    assert done.returncode == 0, done.stderr[-2000:]


def test_usage_and_weights_errors_have_their_codes(tmp_path, capsys):
    data = write(tmp_path / "data")
    base = [
        "--member",
        "wide",
        "--preset",
        "tiny",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--quiet",
    ]
    assert train.main([*base, "--data", str(tmp_path / "none.csv")]) == 2
    assert "no such manifest" in capsys.readouterr().err
    assert train.main([*base, "--data", str(data)]) == 3
    assert "--tower tiny-wide=PATH" in capsys.readouterr().err


def test_two_processes_equal_one_with_the_batch_of_both(tmp_path):
    data = write(tmp_path / "data", train=16)
    settings = [*CLEAN, "train.epochs=2", "optim.warmup_steps=0"]
    sets = [word for s in settings for word in ("--set", s)]
    one = arguments(tmp_path / "one", data, *sets, "--set", "train.batch=8")
    assert train.main(one) == 0
    done = in_two_processes(arguments(tmp_path / "two", data, *sets, "--set", "train.batch=4"))
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (torch.load(tmp_path / n / "wide/checkpoint.pt", weights_only=True)["weights"] for n in ("one", "two"))
    assert_same(a, b, atol=1e-4, rtol=0)


def test_fusion_starts_from_the_trained_global_stream(tmp_path):
    lora = ["adapter.kind=lora", "adapter.rank=2"]
    first = make_run(tmp_path / "g", settings=lora)
    for tensor in first.member.stored_state().values():
        torch.nn.init.normal_(tensor.data, std=0.1)
    from solution.bundles.members import save_member

    save_member(first.member, tmp_path / "global", dtype=torch.float32)
    fusion = make_run(tmp_path / "f", "fusion", settings=lora).member
    start_from(fusion, tmp_path / "global")
    a, b = first.member.stored_state(), fusion.stored_state()
    adapters = [k for k in b if k.startswith("adapter.")]
    assert adapters and all(torch.equal(a[k], b[k]) for k in adapters)
    save_member(
        make_run(tmp_path / "w", settings=["adapter.kind=none"]).member, tmp_path / "without", dtype=torch.float32
    )
    with pytest.raises(WeightsError, match="with no adapter, to start a fusion with an"):
        start_from(fusion, tmp_path / "without")
    bare = make_run(tmp_path / "b", "fusion", settings=["adapter.kind=none"]).member
    with pytest.raises(WeightsError, match="with no adapter, to start a fusion with none"):
        start_from(bare, tmp_path / "without")


def test_ranks_share_an_epoch_without_overlap(tmp_path):
    shares = [make_run(tmp_path / str(r), world=World(r, 2)).epoch_plan(0) for r in range(2)]
    positions = [[s.position for batch in plan for s in batch] for plan in shares]
    assert not set(positions[0]) & set(positions[1])
    assert sorted(positions[0] + positions[1]) == list(range(16))
