"""How fast scoring is, stage by stage, against the straightforward way, and what low precision changes.

The sub-commands `inference` and `parity` of `python -m solution.benchmark`. Pictures are uint8 RGB JPEG files that the
benchmark draws, towers have random weights unless a bundle is named; every figure is measured where it is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from solution.data.drawn import drawn_face
from solution.errors import FAILURES, KitError, UsageError

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


# ------------------------------------------------------------------------------------------------ inference
def add_inference(stages: argparse._SubParsersAction) -> None:
    """`inference`: the scoring pipeline, stage by stage, against the authors' way."""
    parser = stages.add_parser(
        "inference",
        help="scoring, stage by stage, against three separate float32 models",
    )
    add = parser.add_argument
    add("--preset", default="compact", help="giant, compact (default) or tiny")
    add("--random-weights", action="store_true", help="needed without --weights")
    add("--weights", help="a bundle instead of a preset")
    add("--members", default="global,face,fusion", help="comma-separated")
    add("--device", default="auto")
    add("--precision", default="auto", help="auto, float32, bfloat16, float16")
    add("--compile", action="store_true")
    add("--batch", type=int, help="pictures at once (default: by size)")
    add("--pictures", type=int, help="(default: 8 batches)")
    add("--side", type=int, default=256, help="px of the JPEG files")
    add("--workers", type=int, help="(default: by the cores)")
    add("--threads", type=int, default=0, help="of torch; 0: as it chooses")
    add("--no-authors", action="store_true", help="leave their way out")
    add("--way", choices=("ours", "authors"), help=argparse.SUPPRESS)
    parser.set_defaults(run=run_inference)


def run_inference(args: argparse.Namespace) -> int:
    """Time our way and the authors' way, each in a process of its own so that its peak memory is its own."""
    if not (args.weights or args.random_weights):
        raise UsageError("name a bundle with --weights, or say --random-weights")
    if args.way:
        found = (_ours if args.way == "ours" else _authors)(args)
        print("RESULT " + json.dumps(found))
        return 0
    ways = ("ours",) if args.no_authors or args.weights else ("ours", "authors")
    found = {way: _apart(args, way) for way in ways}
    if "authors" in found:
        ours, theirs = found["ours"], found["authors"]
        print(
            f"ours {ours['speed']:.2f} pictures/s, {ours['held']:.2f} GB of weights, {ours['memory']:.2f} GB at most; "
            f"authors' way {theirs['speed']:.2f} pictures/s, {theirs['held']:.2f} GB of weights (a model at a time: "
            f"{theirs['memory']:.2f} GB at most): {ours['speed'] / theirs['speed']:.1f} times as fast"
        )
    return 0


def _apart(args: argparse.Namespace, way: str) -> dict:
    """This command with `--way`, in a new process whose lines are passed on; what it found."""
    words = [sys.executable, "-m", "solution.benchmark", "inference", "--way", way]
    for name, value in vars(args).items():
        if name in ("run", "stage", "way", "no_authors") or value in (None, False):
            continue
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    result = None
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
            else:
                print(line, end="", flush=True)
    if child.returncode or result is None:
        raise KitError(f"the part `{way}` ended with code {child.returncode}; see above")
    return result


def _ours(args: argparse.Namespace) -> dict:
    """Every stage of the pipeline alone, then all of them overlapped."""
    import torch

    from solution.scoring.ensemble import parameters_of
    from solution.scoring.judge import judge
    from solution.scoring.stream import Plan, Reader, stream

    if args.threads:
        torch.set_num_threads(args.threads)
    ensemble = _ensemble(args)
    if args.compile:
        ensemble.compile()
    batch = ensemble.batch_size
    count = args.pictures or 8 * batch
    print(f"ours: {ensemble.describe()}; {torch.get_num_threads()} threads")
    rate = matrix_rate(ensemble.device, ensemble.dtype)
    print(f"  matrix product, {ensemble.precision}: {rate / 1e12:.2f} TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        inputs = _draw_files(Path(folder), count, args.side)
        views = _preparation(ensemble, inputs)
        _members(ensemble, views, rate)
        reader = Reader(ensemble.views)
        plan = Plan(inputs, batch).pending(np.ones(count, bool))
        rows, begun = [], 0.0
        for done in stream(ensemble, plan, reader, workers=args.workers):
            begun = begun or time.perf_counter()  # workers have started
            rows.append(done)
        speed = (count - len(rows[0])) / (time.perf_counter() - begun)
    scored = [row for done in rows for row in done]
    begun = time.perf_counter()
    judge(scored, ensemble.vote, ensemble.calibrators)
    _line("vote", len(scored) / (time.perf_counter() - begun))
    memory = peak_memory(ensemble.device)
    looks = sum(ensemble.looks.values()) / len(scored) / len(ensemble.members)
    told = f", {looks:.1%} looked at again" if ensemble.exact else ""
    parameters = parameters_of(ensemble.members)
    held = sum(p.numel() * p.element_size() for p in parameters) / 1e9
    _line("end to end", speed, f"overlapped{told}; peak memory {memory:.2f} GB")
    return {"speed": speed, "memory": memory, "held": held}


def _line(stage: str, rate: float, more: str = "") -> None:
    print(f"  {stage:12} {rate:12.2f} pictures/s   {more}".rstrip(), flush=True)


def _preparation(ensemble, inputs) -> list:
    """Time decoding, faces and views on one core, and the transfer; returns a batch of views on the device."""
    import torch

    from solution.data.faces import detector_file
    from solution.data.views import choose_in_all, cut_views, locators_for, open_picture

    begun = time.perf_counter()
    pictures = [open_picture(item.path, item.name) for item in inputs]
    _line("decode", len(pictures) / (time.perf_counter() - begun), "one core")
    locators = locators_for(ensemble.views)
    faces = [{} for _ in pictures]
    if locators:
        detector_file()
        choose_in_all(pictures[:1], locators, video=False)  # loads the network
        begun = time.perf_counter()
        faces = choose_in_all(pictures, locators, video=False)
        _line("faces", len(pictures) / (time.perf_counter() - begun), "one core")
    begun = time.perf_counter()
    cut = list(zip(*(cut_views(p, ensemble.views, chosen) for p, chosen in zip(pictures, faces))))
    spent = time.perf_counter() - begun
    _line("views", len(pictures) / spent, f"{len(cut)} distinct, one core")
    size = ensemble.batch_size
    held = [torch.from_numpy(np.resize(np.stack(c), (size, *c[0].shape))) for c in cut]
    if ensemble.device.type == "cuda":
        held = [view.pin_memory() for view in held]

    def move():
        return [view.to(ensemble.device, non_blocking=True) for view in held]

    if ensemble.device.type != "cpu":
        _line("transfer", size / timed(move, ensemble.device))
    return [view.permute(0, 3, 1, 2) for view in move()]


def _members(ensemble, views, rate: float) -> None:
    """Time each member's forward alone, and all of them; rate: the device's FLOP/s in matrix products."""
    import torch

    from solution.models.flops import scoring_flops

    size, total, operations = len(views[0]), 0.0, 0.0
    for name, member in ensemble.members.items():
        seen = views[ensemble.view_of[name]]

        def forward(member=member, seen=seen):
            member.tower.use(member.adapter)
            with torch.inference_mode():
                return member.judge(seen)

        spent = timed(forward, ensemble.device)
        apart = adapters_apart(member)
        flops = size * scoring_flops(ensemble.configs[name], adapters=apart)
        share = f"{flops / spent / 1e12:.2f} TFLOP/s, {flops / spent / rate:.0%} of the matrix product"
        _line(name, size / spent, share)
        total, operations = total + spent, operations + flops
    share = f"{operations / total / 1e12:.2f} TFLOP/s, {operations / total / rate:.0%} of the matrix product"
    _line("all members", size / total, share)


def _authors(args: argparse.Namespace) -> dict:
    """Three separate float32 models, one after the other, each decoding every picture for itself; our own code."""
    import torch

    from solution.bundles.members import build_member, random_towers
    from solution.data.views import View, locators_for, open_picture, see, stack_views
    from solution.models.devices import pick_device
    from solution.presets import preset

    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    names = args.members.split(",")
    spent, held = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            config = preset(args.preset, name)
            member = build_member(config, random_towers([config], device="meta"))
            materialize(member.eval(), device)
            held += sum(p.numel() * p.element_size() for p in member.parameters())
            size = args.batch or automatic_size(member, device)
            inputs = _draw_files(Path(folder), args.pictures or 2 * size, args.side)
            seen = (View.of(config),)
            locators = locators_for(seen)

            def views(batch, seen=seen, locators=locators):
                pictures = [open_picture(item.path, item.name) for item in batch]
                return stack_views([see(p, seen, locators)[0] for p in pictures]).to(device)

            with torch.inference_mode():
                member(views(inputs[:size])).logit.cpu()  # warms up
                begun = time.perf_counter()
                for start in range(0, len(inputs), size):
                    member(views(inputs[start : start + size])).logit.cpu()
            each = (time.perf_counter() - begun) / len(inputs)
            _line(f"  {name}", 1 / each, "authors' way: float32, a model of its own")
            spent += each
            del member
    memory = peak_memory(device)
    _line("all of them", 1 / spent, f"authors' way; peak memory {memory:.2f} GB")
    return {"speed": 1 / spent, "memory": memory, "held": held / 1e9}


def automatic_size(member, device) -> int:
    """The batch that our way would take."""
    from solution.scoring.ensemble import automatic_batch

    return automatic_batch({member.config.name: member}, device)


# ------------------------------------------------------------------------------------------------ what is timed
def _ensemble(args: argparse.Namespace):
    """The bundle's ensemble, or one of random weights that never holds more than its precision needs."""
    import torch

    from solution.bundles.members import build_member, random_towers
    from solution.config import VoteConfig
    from solution.models.calibration import Calibrator
    from solution.models.devices import pick_device, pick_precision
    from solution.presets import preset
    from solution.scoring.ensemble import Ensemble, automatic_batch, load_ensemble, make_fast, narrow_early

    names = args.members.split(",")
    if args.weights:
        return load_ensemble(
            args.weights,
            args.device,
            members=names,
            precision=args.precision,
            batch_size=args.batch,
        )
    device = pick_device(args.device)
    precision = args.precision
    if precision == "auto":
        precision = pick_precision(device)
    configs = {name: preset(args.preset, name) for name in names}
    towers = random_towers(configs.values(), device="meta")
    early = narrow_early(configs.values(), device, precision)
    for name, dtype in early.items():
        for module in towers[name].matrices():
            module.to(dtype)
    members = {name: build_member(c, towers).eval() for name, c in configs.items()}
    for member in members.values():
        materialize(member, device)
    ensemble = Ensemble(
        members=members,
        configs=configs,
        vote=VoteConfig(dict.fromkeys(names, 1)),
        calibrators={name: Calibrator() for name in names},
        hash="random",
        device=torch.device(device),
        precision=precision,
        batch_size=args.batch or automatic_batch(members, device),
    )
    return make_fast(ensemble, second_look=False)


def materialize(module, device) -> None:
    """Fill everything in `module` that is on the meta device with small random numbers on `device`, in its own type."""
    import torch

    made: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and value.is_meta:
                if id(value) not in made:
                    tensor = torch.empty_like(value, device=device)
                    tensor = tensor.detach().uniform_(-0.03, 0.03)
                    made[id(value)] = torch.nn.Parameter(tensor, requires_grad=False)
                part._parameters[name] = made[id(value)]
        for name, value in part._buffers.items():
            if value is not None:
                filled = torch.ones_like(value, device=device) if value.is_meta else value
                part._buffers[name] = filled.to(device)


def _draw_files(folder: Path, count: int, side: int):
    """`count` JPEG files that hold a face, from a few drawings."""
    from PIL import Image

    from solution.data.images import find_inputs

    drawings = [drawn_face(side, seed) for seed in range(min(count, 8))]
    for index in range(count):
        picture = Image.fromarray(drawings[index % len(drawings)])
        picture.save(folder / f"{index:05d}.jpg", quality=90)
    return find_inputs(folder)


def timed(call: Callable, device, *, least: float = 0.5) -> float:
    """Seconds a call takes: the best of several, as many as fill `least` seconds but three at least."""
    import torch

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    best, spent, done = float("inf"), 0.0, 0
    while done < 3 or spent < least:
        begun = time.perf_counter()
        call()
        wait()
        took = time.perf_counter() - begun
        best, spent, done = min(best, took), spent + took, done + 1
    return best


def matrix_rate(device, dtype) -> float:
    """FLOP/s of this device in a large square matrix product of `dtype`."""
    import torch

    side = MATRIX_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b, device, least=2.0)


def adapters_apart(member) -> bool:
    """Whether the tower still computes adapters beside its projections: none of them, or not all, are merged."""
    from solution.models.blocks import EffortLinear

    parts = member.tower.modules()
    return any(hasattr(p, "lora_B") or isinstance(p, EffortLinear) for p in parts)


def peak_memory(device) -> float:
    """GB: on a GPU the most that was allocated there, else this process's largest resident size."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9


# ------------------------------------------------------------------------------------------------ parity
def add_parity(stages: argparse._SubParsersAction) -> None:
    """`parity`: what the default precision changes against float32."""
    parser = stages.add_parser("parity", help="low precision against float32, member by member")
    add = parser.add_argument
    add("--weights", default="compact", help="bundle (default: compact)")
    add("--data", type=Path, required=True, help="manifest with labels")
    add("--split", default="val", help="comma-separated (default: val)")
    add("--limit", type=int, default=0, help="at most so many pictures of each, seeded")
    add("--degraded", action="store_true", help="each picture through the engine too (global_p 1, seed 7)")
    add("--device", default="auto")
    add("--precision", default="auto")
    add("--batch", type=int)
    add("--workers", type=int, default=1)
    add("--compile", action="store_true")
    add("--keep", type=Path, help="an .npz for the logits: by way (members, N), and labels (N,)")
    parser.set_defaults(run=run_parity)


def run_parity(args: argparse.Namespace) -> int:
    """Score the same views in float32, in half precision without second looks, and by default; 4 when that departs too far.

    Too far: the levels of more than 0.1 % of the pictures differ (any member's), or an AUC by more than 0.0005. Pictures/s
    are those of the towers and second looks, decoded views waiting in memory.
    """
    from solution.bundles.store import open_bundle
    from solution.scoring.ensemble import load_ensemble

    bundle = open_bundle(args.weights)
    options = {"precision": args.precision, "batch_size": args.batch}
    ways = {"float32": {"exact": True, "batch_size": args.batch}}
    ways |= {"fast": {**options, "second_look": False}, "default": options}
    found, batches, labels = {}, [], np.empty(0)
    for way, given in ways.items():
        ensemble = load_ensemble(bundle, args.device, **given)
        if not batches:
            batches, labels = _views_in_memory(args, ensemble)
        if args.compile and way != "float32":
            ensemble.compile()
        logits, rate = _timed_flow(ensemble, batches)
        looked = {name: n / len(labels) for name, n in ensemble.looks.items()}
        found[way] = logits
        share = f", {np.mean(list(looked.values())):.2%} of the rows looked at again" if ensemble.exact else ""
        print(f"{way:8} {rate:8.2f} pictures/s   {ensemble.describe()}{share}", flush=True)
    if args.keep:
        np.savez(args.keep, labels=labels, **found)
    print(
        f"{len(labels)} views; noise: rms of the logit's departure, over that on the probes where these were measured"
    )
    print(f"{'':20}     noise     /probes  99.9 %/rms  max/rms  max |dp|  levels changed  AUC difference  second looks")
    within = True
    for way in ("fast", "default"):
        fits = told(way, found[way], found["float32"], labels, ensemble, looked if way == "default" else {})
        within &= fits or way == "fast"
    print("within bounds" if within else "the default departs too far from float32")
    return 0 if within else FAILURES


def _views_in_memory(args: argparse.Namespace, ensemble) -> tuple[list, np.ndarray]:
    """Every batch's views as a loader hands them over, and the labels (N,): clean pictures, then degraded ones."""
    from torch.utils.data import DataLoader

    from solution.config import DegradationConfig
    from solution.data.images import Input
    from solution.data.manifest import draw_items, read_manifest
    from solution.data.views import quiet_worker
    from solution.scoring.stream import Reader

    items = []
    for split in args.split.split(","):
        items += draw_items(read_manifest(args.data, split=split)[0], args.limit, 0)
    listed = [(i, Input(item.name, item.path, "image")) for i, item in enumerate(items)]
    size, batches, labels = ensemble.batch_size, [], []
    for degradation in (None, DegradationConfig(global_p=1.0))[: 1 + args.degraded]:
        reader = Reader(ensemble.views, degradation=degradation, seed=7)
        parts = [listed[i : i + size] for i in range(0, len(listed), size)]
        how = {"batch_size": None, "num_workers": args.workers, "worker_init_fn": quiet_worker}
        for prepared in DataLoader(reader, sampler=parts, **how):
            batches.append((len(prepared.rows), [view.clone() for view in prepared.views]))
            labels += [items[row.index].label for row in prepared.rows if not row.error]
    return batches, np.array(labels)


def _timed_flow(ensemble, batches: list) -> tuple[np.ndarray, float]:
    """The logits (members, N) of all batches, and pictures/s; a first batch warms up and is not counted."""
    if ensemble.device.type == "cuda":
        batches = [(tag, [view.pin_memory() for view in views]) for tag, views in batches]
    for _ in ensemble.flow(batches[:1]):
        pass
    ensemble.looks = dict.fromkeys(ensemble.looks, 0)
    begun = time.perf_counter()
    logits = np.concatenate([found for _, found in ensemble.flow(batches)], axis=1)
    return logits, logits.shape[1] / (time.perf_counter() - begun)


def told(way: str, logits: np.ndarray, exact: np.ndarray, labels: np.ndarray, ensemble, looked: dict) -> bool:
    """Print how logits (members, N) of a way depart from `exact`, by member and of the vote; whether within bounds.

    Within them are the levels of every member and the vote's AUC. A member's own AUC is told: its order within a level
    moves with the rounding, and no score with it.
    looked: by member, the share of rows that were looked at again.
    """
    from solution.scoring.vote import combine, levels

    step, p, true = ensemble.vote.step, {}, {}
    for row, name in enumerate(ensemble.members):
        calibrate = ensemble.calibrators[name].apply
        p[name], true[name] = calibrate(logits[row]), calibrate(exact[row])
        gap = np.abs(logits[row] - exact[row])
        rms = max(float(np.sqrt(np.mean(gap**2))), 1e-12)
        probes = ensemble.noise.get(name)
        noise = f"{rms:9.6f}  {rms / probes:8.2f}" if probes else f"{rms:9.6f}  {'':8}"
        tails = f"{np.quantile(gap, 0.999) / rms:10.2f}  {gap.max() / rms:7.2f}"
        _, text = compared(p[name], true[name], labels, step)
        again = f"{looked[name]:12.2%}" if name in looked else ""
        print(f"{way:8} {name:10} {noise}  {tails}  {text} {again}")
    changed = np.any([levels(p[n], step) != levels(true[n], step) for n in p], axis=0)
    votes = [combine({n: v for n, v in way.items() if n in ensemble.vote.weights}, ensemble.vote) for way in (p, true)]
    fits, text = compared(*votes, labels, step)
    print(f"{way:8} the vote: {text}; pictures with any level changed: {changed.mean():.3%} ({int(changed.sum())})")
    return fits and bool(changed.mean() <= 0.001)


def compared(p: np.ndarray, exact: np.ndarray, labels: np.ndarray, step: float) -> tuple[bool, str]:
    """Whether P(fake) (N,) keeps to `exact` (N,): at most 0.1 % of levels and 0.0005 of AUC differ; and its line.

    Where pictures are few, one pair of them may change places.
    """
    from solution.evaluation.metrics import auc
    from solution.scoring.vote import levels

    gap = np.abs(p - exact)
    changed = float(np.mean(levels(p, step) != levels(exact, step)))
    pairs = float(labels.sum() * (len(labels) - labels.sum()))
    difference = auc(labels, p) - auc(labels, exact) if pairs else 0.0
    text = f"{gap.max():9.6f}  {gap.mean():9.6f}  {changed:14.3%}  {difference:+14.6f}"
    return changed <= 0.001 and abs(difference) <= max(0.0005, 1.01 / max(pairs, 1)), text
