"""Stages of the GPU benchmark: the card itself, and members on views that lie on it, as they are and made fast."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from solution.models.flops import member_flops
from solution.studies.gpu_bench import (
    STREAMS,
    Bench,
    LeftOut,
    build,
    forward_of,
    held_bytes,
    logits_of,
    peak_gb,
    peak_reset,
    pictures,
    seconds_of,
    shares,
)


# ------------------------------------------------------------------------------------------------ the card
def stage_card(bench: Bench, entry: dict) -> None:
    """What the device is, its rate in large matrix products by type, and its copy bandwidth."""
    import cv2
    import torch
    import transformers

    cuda = bench.device.type == "cuda"
    entry["torch"], entry["transformers"] = torch.__version__, transformers.__version__
    entry["cuda"] = torch.version.cuda
    entry["opencv"] = cv2.__version__
    entry["device"] = "CPU"
    if cuda:
        about = torch.cuda.get_device_properties(bench.device)
        entry["device"] = about.name
        entry["multiprocessors"] = about.multi_processor_count
        entry["memory_gb"] = round(about.total_memory / 1e9, 1)
        entry["cudnn"] = torch.backends.cudnn.version()
    entry["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    side = bench.sizes.matrix
    entry["matrix_side"] = side
    for kind in ("bfloat16", "float16", "float32"):
        bench.rates[kind] = matrix_rate(bench, side, getattr(torch, kind))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    bench.rates["tf32"] = matrix_rate(bench, side, torch.float32)
    torch.set_float32_matmul_precision(before)
    entry["matrix_tflops"] = {k: v / 1e12 for k, v in bench.rates.items()}
    source = torch.randint(0, 255, (bench.sizes.copy,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    spent = seconds_of(bench, lambda: target.copy_(source), repeats=9)
    entry["copy_tb_per_s"] = 2 * bench.sizes.copy / spent / 1e12


def matrix_rate(bench: Bench, side: int, dtype: Any) -> float:
    """FLOP/s of a square matrix product of random numbers, several input sets in turn."""
    import torch

    sets = [[torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2)] for _ in range(2)]
    turns = iter(range(1 << 30))

    def call():
        a, b = sets[next(turns) % len(sets)]
        return a @ b

    call()
    # A third of a second of them in half precision, so that the clocks are those of steady work.
    many = 200 if bench.device.type == "cuda" and dtype != torch.float32 else 11
    return 2 * side**3 / seconds_of(bench, call, repeats=many)


# ------------------------------------------------------------------------------------------------ three streams
def stage_straight(bench: Bench, entry: dict) -> None:
    """Three separate float32 models, eager, adapters unmerged, default matrix precision; global also merged."""
    import torch

    from solution.models import merging

    batch, held, each = bench.sizes.batch, 0, {}
    entry["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    entry["batch"], peak = batch, 0.0
    for name in STREAMS:
        bench.need(15, f"{name} in float32")
        configs, members = build(bench, [name])
        bench.configs |= configs
        member = members[name]
        held += held_bytes(members)
        views = pictures(bench, batch, configs[name].view.side)
        peak_reset(bench)
        spent = seconds_of(bench, forward_of(member, views), repeats=3)
        each[name] = spent / batch
        if bench.device.type == "cuda":
            peak = max(peak, peak_gb(bench) - held_bytes(members) / 1e9)
        entry["members"] = shares(bench, list(each), each, "float32")
        if name == "global":
            merging.merge_adapters(members, torch.float32)
            spent = seconds_of(bench, forward_of(member, views), repeats=3)
            entry["global_merged_pictures_per_s"] = batch / spent
        del member, members, views
    bench.straight = each
    entry["held_gb"] = held / 1e9
    entry["peak_gb"] = held / 1e9 + peak if bench.device.type == "cuda" else None


def stage_float16(bench: Bench, entry: dict) -> None:
    """Ours in float16: shared tower, merged, packed; the best batch, each member, peak memory, parity logits."""
    prepare_exact(bench)
    ours(bench, entry, "float16", search=True)


def stage_bfloat16(bench: Bench, entry: dict) -> None:
    """Ours in bfloat16 at the batch that float16 found best."""
    prepare_exact(bench)
    ours(bench, entry, "bfloat16", search=False)


def prepare_exact(bench: Bench) -> None:
    """The three streams in float32 on one shared tower, and what they make of the parity pictures."""
    if bench.exact:
        return
    bench.configs, bench.exact = build(bench, STREAMS)
    bench.batch = bench.batch or bench.sizes.batch
    for name in STREAMS:
        views = pictures(bench, bench.sizes.parity, bench.configs[name].view.side)
        exact = logits_of(bench.exact[name], views, bench.sizes.batch)
        bench.logits.setdefault("float32", {})[name] = exact


def made_fast(bench: Bench, kind: str) -> dict[str, Any]:
    """A copy of the exact members: merged, narrowed and packed."""
    import torch

    from solution.models import merging

    members = copy.deepcopy(bench.exact)
    dtype = getattr(torch, kind)
    if not merging.merge_adapters(members, dtype):
        raise RuntimeError("the adapters were not merged: too little memory for copies")
    merging.narrow(members.values(), dtype)
    merging.pack(members.values())
    return members


def ours(bench: Bench, entry: dict, kind: str, *, search: bool) -> None:
    """Time the fast members eager and compiled, and keep their logits of the parity pictures."""
    members = made_fast(bench, kind)
    entry["held_gb"] = held_bytes(members) / 1e9
    if search:
        entry["global_pictures_per_s_by_batch"] = tried = {}
        for batch in bench.sizes.batches:
            bench.need(12, f"batch {batch}")
            views = pictures(bench, batch, bench.configs["global"].view.side)
            spent = seconds_of(bench, forward_of(members["global"], views))
            tried[str(batch)] = batch / spent
        # The smallest within one per cent of the best: less memory, shorter waits.
        best = max(tried.values())
        bench.batch = min(int(b) for b, rate in tried.items() if rate >= 0.99 * best)
    entry["batch"] = bench.batch
    time_streams(bench, entry, members, kind, "eager")
    if bench.device.type == "cpu":
        compile_towers(members, backend="eager")
    else:
        bench.need(45, f"compiling in {kind}")
        compile_towers(members)
    begun = time.monotonic()
    for name, member in members.items():
        side = bench.configs[name].view.side
        forward_of(member, pictures(bench, bench.batch, side))()
    entry["compiling_s"] = time.monotonic() - begun
    time_streams(bench, entry, members, kind, "compiled")


def time_streams(bench: Bench, entry: dict, members: Mapping[str, Any], kind: str, way: str) -> None:
    """Pictures/s of each stream and of all at the batch, peak memory, against the straightforward way; logits."""
    peak_reset(bench)
    each, found = {}, {}
    for name, member in members.items():
        views = pictures(bench, bench.batch, bench.configs[name].view.side)
        each[name] = seconds_of(bench, forward_of(member, views)) / bench.batch
        views = pictures(bench, bench.sizes.parity, bench.configs[name].view.side)
        found[name] = logits_of(member, views, bench.batch)
    entry[way] = shares(bench, STREAMS, each, kind) | {"peak_gb": peak_gb(bench)}
    if len(bench.straight) == len(STREAMS):
        ratio = sum(bench.straight.values()) / sum(each.values())
        entry[way]["times_the_straightforward_way"] = ratio
    bench.logits[f"{kind} {way}"] = found
    bench.fast[f"{kind} {way}"] = sum(each.values())


def compile_towers(members: Mapping[str, Any], **options) -> None:
    """Compile the members' packed towers, from nothing."""
    import torch

    from solution.models import merging

    torch.compiler.reset()
    for tower in merging.towers_of(members.values()):
        if isinstance(tower, merging.PackedTower):
            tower.compile(dynamic=False, fullgraph=True, **options)


def stage_parity(bench: Bench, entry: dict) -> None:
    """Each way's P(fake) against float32's on the parity pictures, random weights; logits brought to a spread of 2."""
    if not bench.exact:
        raise LeftOut("parity: needs the stage float16 or bfloat16 first")
    exact = bench.logits["float32"]
    entry["pictures"] = bench.sizes.parity
    entry["float32_logit_std"] = {n: float(z.std()) for n, z in exact.items()}
    for way, found in bench.logits.items():
        if way == "float32":
            continue
        entry[way] = {}
        for name, logits in found.items():
            middle, scale = np.median(exact[name]), 2 / exact[name].std()
            ours_p, true_p = (1 / (1 + np.exp(-(z - middle) * scale)) for z in (logits, exact[name]))
            rms = float(np.sqrt(np.mean((logits - exact[name]) ** 2)))
            entry[way][name] = departure(ours_p, true_p) | {"logit_rms": rms}


def departure(p: np.ndarray, exact: np.ndarray, step: float = 0.1) -> dict[str, float]:
    """Max and mean |difference| of P(fake) (N,), and the share of levels that differ."""
    from solution.scoring.vote import levels

    gap = np.abs(p - exact)
    changed = float(np.mean(levels(p, step) != levels(exact, step)))
    return {
        "max_dp": float(gap.max()),
        "mean_dp": float(gap.mean()),
        "levels_changed": changed,
    }


# ------------------------------------------------------------------------------------------------ inside a tower
def stage_kernels(bench: Bench, entry: dict) -> None:
    """What takes the time: the products of a block alone, attention by backend, the kernels of a forward."""
    import torch

    prepare_exact(bench)
    block_products(bench, entry)
    attention_rates(bench, entry)
    members = made_fast(bench, "float16")
    views = pictures(bench, bench.batch, bench.configs["global"].view.side)
    call = forward_of(members["global"], views)
    call()
    entry["eager_kernels"] = kernels_of(bench, call)
    bench.need(25, "kernels of the compiled tower")
    compile_towers(members, **({"backend": "eager"} if bench.device.type == "cpu" else {}))
    call()
    entry["compiled_kernels"] = kernels_of(bench, call)
    del members
    torch.compiler.reset()


def block_products(bench: Bench, entry: dict) -> None:
    """TFLOP/s of each matrix product of a block of `global` alone, float16, at the batch: the ceiling of its tower."""
    import torch
    import torch.nn.functional as F

    arch = bench.configs["global"].tower.arch
    tokens = (bench.configs["global"].view.side // arch.patch) ** 2 + 1
    rows, width = bench.batch * tokens, arch.width
    block = next(iter(bench.exact["global"].tower.blocks()))
    ups = [m for m in block.mlp.modules() if isinstance(m, torch.nn.Linear)]
    shapes = {
        "qkv": (width, 3 * width),
        "o": (width, width),
        "up": (width, sum(m.out_features for m in ups[:-1])),
        "down": (ups[-1].in_features, width),
    }
    entry["products"], work, total = {}, 0.0, 0.0
    for name, (inside, out) in shapes.items():
        given = [
            torch.randn(*size, device=bench.device).half() * 0.05 for size in ((rows, inside), (out, inside), (out,))
        ]
        spent = seconds_of(bench, functools.partial(F.linear, *given), repeats=11)
        flops = 2 * rows * inside * out
        entry["products"][name] = {"tflops": flops / spent / 1e12, "ms": spent * 1e3}
        work, total = work + flops, total + spent
    entry["products"]["all"] = {"tflops": work / total / 1e12, "ms": total * 1e3}


def attention_rates(bench: Bench, entry: dict) -> None:
    """Milliseconds and TFLOP/s of one block's attention by backend, on packed q, k, v as the tower has them."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    arch = bench.configs["global"].tower.arch
    tokens = (bench.configs["global"].view.side // arch.patch) ** 2 + 1
    qkv = torch.randn(
        bench.batch,
        tokens,
        3,
        arch.heads,
        arch.width // arch.heads,
        device=bench.device,
    )
    q, k, v = (part.transpose(1, 2) for part in qkv.half().unbind(2))
    flops = 4 * bench.batch * tokens**2 * arch.width
    backends = {
        "chosen": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    entry["attention"] = {}
    for name, backend in backends.items():
        if bench.device.type == "cpu" and backend is not None:
            continue
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            try:
                spent = seconds_of(bench, lambda: F.scaled_dot_product_attention(q, k, v), repeats=11)
            except RuntimeError as error:
                entry["attention"][name] = {"refused": str(error).splitlines()[0]}
                continue
        entry["attention"][name] = {"ms": spent * 1e3, "tflops": flops / spent / 1e12}


def kernels_of(bench: Bench, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The fifteen kernels that take most of a call: name, ms, calls, share."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    kinds = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=kinds) as profiler:
        call()
        if cuda:
            import torch

            torch.cuda.synchronize()
    events = profiler.key_averages()

    def spent(event):
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    total = sum(map(spent, events)) or 1
    first = sorted(events, key=spent, reverse=True)[:15]
    return [
        {
            "kernel": event.key[:120],
            "ms": spent(event) / 1e3,
            "calls": event.count,
            "share": spent(event) / total,
        }
        for event in first
    ]


def stage_autotune(bench: Bench, entry: dict) -> None:
    """`global` in float16, compiled with inductor's search over matrix kernels (long), against compiled without."""
    prepare_exact(bench)
    members = made_fast(bench, "float16")
    alone = {"global": members["global"]}
    views = pictures(bench, bench.batch, bench.configs["global"].view.side)
    entry["batch"] = bench.batch
    modes = {"default": {}, "autotuned": {"mode": "max-autotune-no-cudagraphs"}}
    for name, options in modes.items():
        bench.need(5 if name == "default" else 60, f"compiling {name}")
        if bench.device.type == "cpu":
            options = {"backend": "eager"}
        compile_towers(alone, **options)
        begun = time.monotonic()
        forward_of(alone["global"], views)()
        entry[f"{name}_compiling_s"] = time.monotonic() - begun
        spent = seconds_of(bench, forward_of(alone["global"], views))
        each = {"global": spent / bench.batch}
        entry[name] = shares(bench, ["global"], each, "float16")["global"]


# ------------------------------------------------------------------------------------------------ five members
def stage_five(bench: Bench, entry: dict) -> None:
    """qtfp and vlaforge in float16; all five of ours against their three in float32."""
    import torch

    from solution.models import merging

    names, batch = ("qtfp", "vlaforge"), bench.batch or bench.sizes.batch
    configs, members = build(bench, names)
    merging.merge_adapters(members, torch.float16)
    merging.narrow(members.values(), torch.float16)
    merging.pack(members.values())
    entry["batch"], each = batch, {}
    for name in names:
        bench.need(5, name)
        views = pictures(bench, batch, configs[name].view.side)
        call = forward_of(members[name], views)
        flops = member_flops(configs[name], adapters=False)
        peak_reset(bench)
        each[name] = seconds_of(bench, call) / batch
        entry[name] = {
            "pictures_per_s": 1 / each[name],
            "gflop_per_picture": flops / 1e9,
            "tflops": flops / each[name] / 1e12,
            "peak_gb": peak_gb(bench),
        }
    straight = sum(bench.straight.values())
    for way, three in bench.fast.items():
        five = three + sum(each.values())
        entry[f"five, {way}"] = {"pictures_per_s": 1 / five}
        if straight:
            entry[f"five, {way}"]["times_their_three"] = straight / five
