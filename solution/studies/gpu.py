"""Every claim about speed on a GPU, measured in one call within a budget of seconds.

The sub-command `gpu` of `python -m solution.benchmark`. Towers have random weights, made on the device from a seed;
pictures are seeded, too. Stages run in the order of what they tell; each checks what is left of the budget and says why
it left something out. `gpu.json` is written again after every stage. Shapes: pictures (B, 3, S, S) uint8.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import itertools
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from solution.config import KINDS
from solution.data.drawn import drawn_face
from solution.errors import DeviceError, UsageError
from solution.models.flops import member_flops

STREAMS = ("global", "face", "fusion")
PHOTOS = Path(__file__).resolve().parents[2] / "tests" / "photos"


@dataclass(frozen=True)
class Sizes:
    """How large everything is: on a GPU, or tiny for a rehearsal on CPU.

    preset: of the members. matrix: side of the matrix product. copy: bytes of the copy. batch: rows at once where no
    search says better. batches: searched. parity: pictures that are compared. files: JPEG files; listed: how often each
    is scored by the compact bundle. train: batch of the LoRA step; whole: of the whole fine-tuning, at each of `sides`.
    repeats: timed calls, of which the median counts. workers: loader processes. bundle_members, bundle_batch: of the
    trained bundle; None: all, and the batch that it takes itself.
    """

    preset: str = "giant"
    whole_preset: str = "compact"
    matrix: int = 8192
    copy: int = 1 << 32
    batch: int = 64
    batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    parity: int = 128
    files: int = 2000
    listed: int = 10
    side: int = 400
    giant_files: int = 1024
    plain_files: int = 256
    train: int = 32
    whole: int = 256
    sides: tuple[int, ...] = (112, 168, 224)
    loader_batches: int = 300
    repeats: int = 5
    workers: int = 16
    bundle_members: tuple[str, ...] | None = None
    bundle_batch: int | None = None


TINY = Sizes(
    matrix=64,
    copy=1 << 16,
    batch=4,
    batches=(2, 4),
    parity=8,
    files=6,
    listed=2,
    side=96,
    giant_files=6,
    plain_files=4,
    train=2,
    whole=4,
    sides=(56, 112),
    loader_batches=3,
    repeats=1,
    workers=1,
    bundle_members=("global",),
    bundle_batch=4,
)


class LeftOut(Exception):
    """This is not measured; the message says why (mostly: too little is left of the budget)."""


# ------------------------------------------------------------------------------------------------ entry
def add_gpu(stages: argparse._SubParsersAction) -> None:
    """`gpu`: every claim about speed on a GPU, within a budget of seconds."""
    parser = stages.add_parser("gpu", help="every claim about speed on a GPU, within a budget of seconds")
    add = parser.add_argument
    add("--budget", type=float, default=360, help="seconds for everything")
    add("--out", type=Path, required=True, help="folder of gpu.json")
    add("--weights", default="compact", help="trained bundle (default: compact)")
    add("--stages", help="only these, comma-separated, in the given order")
    add("--workers", type=int, help="loader processes (default: 16)")
    add("--tiny", action="store_true", help="tiny sizes on CPU: a rehearsal")
    parser.set_defaults(run=run_gpu)


def run_gpu(args: argparse.Namespace) -> int:
    """Run the stages, print their table; 1 when one of them failed, 3 without a GPU."""
    begun = time.monotonic()
    import torch

    from solution.data.degradation import use_one_opencv_thread

    if not (args.tiny or torch.cuda.is_available()):
        raise DeviceError("no GPU that torch can use; --tiny rehearses on CPU")
    names = args.stages.split(",") if args.stages else list(STAGES)
    if unknown := [name for name in names if name not in STAGES]:
        raise UsageError(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    use_one_opencv_thread()
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = TINY if args.tiny else Sizes()
    bench = Bench(
        device=torch.device("cpu" if args.tiny else "cuda"),
        sizes=sizes,
        workers=args.workers or sizes.workers,
        weights=args.weights,
        ends=begun + args.budget,
        path=args.out / "gpu.json",
    )
    bench.found = {"budget": args.budget, "tiny": args.tiny, "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        bench.folder = Path(folder)
        for name in names:
            bench.run(name)
    bench.found["seconds"] = round(time.monotonic() - begun, 1)
    bench.write()
    print(table(bench.found))
    states = [stage["state"] for stage in bench.found["stages"].values()]
    return 1 if "failed" in states else 0


@dataclass
class Bench:
    """A run: where, how large, until when, and what was found (`found`, which `path` holds as JSON).

    exact: the members in float32. fast: by precision, the same members made fast. logits: by way, by member.
    batch: the best one found. rates: FLOP/s of a matrix product by type.
    """

    device: Any
    sizes: Sizes
    workers: int
    weights: str
    ends: float
    path: Path
    folder: Path = Path()
    found: dict[str, Any] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    straight: dict[str, float] = field(default_factory=dict)
    fast: dict[str, float] = field(default_factory=dict)
    batch: int = 0

    def left(self) -> float:
        """Seconds left of the budget."""
        return self.ends - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Go on only where so many seconds are left; a rehearsal needs none of them, but some time at all.

        Raises:
            LeftOut: they are not.
        """
        least = 0.0 if self.device.type == "cpu" else seconds
        if self.left() <= least:
            raise LeftOut(f"{what}: {max(0.0, self.left()):.0f} s left, {least:.0f} needed")

    def run(self, name: str) -> None:
        """One stage: its result, the reason it was skipped, or its error, into `found` and the file."""
        import torch

        stage, seconds = STAGES[name]
        begun, entry = time.monotonic(), {}
        self.found["stages"][name] = entry
        try:
            self.need(seconds, name)
            stage(self, entry)
            entry["state"] = "done"
        except LeftOut as error:
            entry |= {"state": "part" if entry else "skipped", "reason": str(error)}
        # Recorded with its trace; the other stages go on and the exit code says it.
        except Exception as error:  # noqa: BLE001
            text = "".join(traceback.format_exception(error))
            entry |= {"state": "failed", "reason": text}
        entry["seconds"] = round(time.monotonic() - begun, 2)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.write()
        print(f"[{self.left():4.0f} s left] {name}: {entry['state']}", flush=True)
        if entry["state"] != "done":
            print(entry["reason"].rstrip(), flush=True)

    def write(self) -> None:
        """`found` as JSON, whole or not at all."""
        from solution.io import write_atomically

        write_atomically(self.path, json.dumps(self.found, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ measuring
def seconds_of(bench: Bench, call: Callable[[], Any], *, repeats: int = 0) -> float:
    """Seconds of a call, the median of several after a warm one; on a GPU by its own events."""
    import torch

    repeats = repeats or bench.sizes.repeats
    call()
    if bench.device.type != "cuda":
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return float(np.median(times))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in itertools.pairwise(marks)])) / 1e3


def peak_reset(bench: Bench) -> None:
    """Count peak memory anew."""
    import torch

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gb(bench: Bench) -> float | None:
    """GB allocated on the GPU at most since `peak_reset`; None on CPU."""
    import torch

    if bench.device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def pictures(bench: Bench, count: int, side: int, seed: int = 0):
    """(count, 3, side, side) uint8 on the device: seeded coarse patches under fine noise."""
    import torch
    import torch.nn.functional as F

    drawn = torch.Generator(bench.device).manual_seed(seed)
    coarse, fine = (torch.rand(count, 3, size, size, generator=drawn, device=bench.device) for size in (8, side))
    grown = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    return (255 * (0.8 * grown + 0.2 * fine)).clamp(0, 255).to(torch.uint8)


def config_of(bench: Bench, preset_name: str, name: str) -> Any:
    """The member's configuration; in a rehearsal with its towers cut down, sharing and adapters as they are."""
    from solution.presets import preset

    config = preset(preset_name, name)
    tiny = preset("tiny", name)
    if bench.sizes != TINY or KINDS[config.kind].text:
        return tiny if bench.sizes == TINY else config

    def small(tower):
        arch = replace(tower.arch, width=32, layers=2, heads=2, image_side=56)
        return replace(tower, arch=arch)

    return replace(
        config,
        view=tiny.view,
        tower=small(config.tower),
        clip=config.clip and small(config.clip),
        qtfp=tiny.qtfp,
    )


def build(bench: Bench, names: Sequence[str], seed: int = 0, preset_name: str = ""):
    """(configs, members) by name, towers shared, random weights made on the device, adapters that do something."""
    import torch

    from solution.bundles.members import build_member, random_towers

    torch.manual_seed(seed)
    chosen = preset_name or bench.sizes.preset
    configs = {n: config_of(bench, chosen, n) for n in names}
    towers = random_towers(configs.values(), device=str(bench.device))
    members = {}
    for name, config in configs.items():
        member = build_member(config, towers, decompose=False)
        members[name] = member.to(bench.device).eval()
    done = set()
    for member in members.values():
        for name, value in member.named_parameters():
            started = "lora_B" in name or name.rpartition(".")[2] in ("u", "s", "v")
            if started and id(value) not in done:
                value.data.normal_(0.0, 0.02)
                done.add(id(value))
    return configs, members


def forward_of(member: Any, views: Any) -> Callable[[], Any]:
    """A call that scores `views` with the member."""
    import torch

    def call():
        with torch.inference_mode():
            member.tower.use(member.adapter)
            return member(views).logit

    return call


def logits_of(member: Any, views: Any, batch: int) -> np.ndarray:
    """(N,) float64 logits of `views`, `batch` at once; a last smaller batch is filled up."""
    import torch

    found = []
    for start in range(0, len(views), batch):
        part = views[start : start + batch]
        spare = batch - len(part)
        if spare:
            part = torch.cat([part, part[-1:].expand(spare, -1, -1, -1)])
        logits = forward_of(member, part)()
        found.append(logits.double().cpu().numpy()[: batch - spare])
    return np.concatenate(found)


def held_bytes(members: Mapping[str, Any]) -> int:
    """Bytes of all weights, what is shared once."""
    storages = {}
    for member in members.values():
        for value in (*member.parameters(), *member.buffers()):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def shares(bench: Bench, names: Sequence[str], each: Mapping[str, float], kind: str):
    """Pictures/s of each stream and of all, with FLOP/s and its share of the measured rate of `kind`.

    each: seconds a picture.
    """
    flops = {n: member_flops(bench.configs[n], adapters=False) for n in names}
    rows = {name: (flops[name], each[name]) for name in names}
    rows["all"] = (sum(flops.values()), sum(each[name] for name in names))
    result = {}
    for name, (work, spent) in rows.items():
        result[name] = {
            "pictures_per_s": 1 / spent,
            "gflop_per_picture": work / 1e9,
            "tflops": work / spent / 1e12,
        }
        if kind in bench.rates:
            result[name]["share_of_matrix_rate"] = work / spent / bench.rates[kind]
    return result


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

    from solution.models import merging as fastpath

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
            fastpath.merge_adapters(members, torch.float32)
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

    from solution.models import merging as fastpath

    members = copy.deepcopy(bench.exact)
    dtype = getattr(torch, kind)
    if not fastpath.merge_adapters(members, dtype):
        raise RuntimeError("the adapters were not merged: too little memory for copies")
    fastpath.narrow(members.values(), dtype)
    fastpath.pack(members.values())
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

    from solution.models import merging as fastpath

    torch.compiler.reset()
    for tower in fastpath.towers_of(members.values()):
        if isinstance(tower, fastpath.PackedTower):
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

    from solution.models import merging as fastpath

    names, batch = ("qtfp", "vlaforge"), bench.batch or bench.sizes.batch
    configs, members = build(bench, names)
    fastpath.merge_adapters(members, torch.float16)
    fastpath.narrow(members.values(), torch.float16)
    fastpath.pack(members.values())
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


# ------------------------------------------------------------------------------------------------ end to end
def draw_files(bench: Bench) -> list:
    """`Input`s: JPEG files of photographs and drawn faces, cut and brought to sizes by a seed, made once."""
    import cv2

    from solution.data.images import Input, decode_image

    folder = bench.folder / "pictures"
    if not folder.exists():
        folder.mkdir()
        photos = [decode_image(p) for p in sorted(PHOTOS.glob("*"))] if PHOTOS.is_dir() else []
        rng = np.random.default_rng(0)
        kinds = min(bench.sizes.files, 96)
        for index in range(kinds):
            side = int(bench.sizes.side * rng.uniform(0.6, 1.4))
            if photos and index % 2:
                picture = photos[int(rng.integers(len(photos)))]
                height = max(32, round(side * picture.shape[0] / picture.shape[1]))
                picture = cv2.resize(picture, (side, height), interpolation=cv2.INTER_AREA)
            else:
                picture = drawn_face(side, index)
            noisy = picture + rng.normal(0, 4, picture.shape)
            picture = np.clip(noisy, 0, 255).astype(np.uint8)
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))]
            path = folder / f"{index:05d}.jpg"
            cv2.imwrite(str(path), picture[:, :, ::-1].copy(), quality)
        for index in range(kinds, bench.sizes.files):
            shutil.copyfile(folder / f"{index % kinds:05d}.jpg", folder / f"{index:05d}.jpg")
    return [Input(path.name, path, "image") for path in sorted(folder.iterdir())]


def batches_of(inputs: Sequence, count: int, size: int) -> list[list[tuple[int, Any]]]:
    """Batches of (index, Input) of `count` inputs, from the first on again when they are used up."""
    listed = [(i, inputs[i % len(inputs)]) for i in range(count)]
    return [listed[i : i + size] for i in range(0, count, size)]


def steady_rate(parts: Iterable[int], skip: int) -> float:
    """Items/s of what yields how many items it made, from the `skip`-th part on (at least one is timed).

    All workers finish their first part at about the same time; without it, the rest is theirs at their own pace.
    """
    marks, total = [], 0
    begun = time.perf_counter()
    for count in parts:
        total += count
        marks.append((time.perf_counter(), total))
    if len(marks) == 1:
        return total / (marks[0][0] - begun)
    start, before = marks[min(skip, len(marks) - 1) - 1]
    end, _ = marks[-1]
    return (total - before) / (end - start)


def loader_only(bench: Bench, views: Sequence, batches: list) -> float:
    """Pictures/s of the scoring loader alone: decoding, faces, views, by its workers."""
    from torch.utils.data import DataLoader

    from solution.data.views import quiet_worker
    from solution.scoring import ensemble as predict

    loader = DataLoader(
        predict.Reader(views),
        sampler=batches,
        batch_size=None,
        num_workers=bench.workers,
        worker_init_fn=quiet_worker,
        pin_memory=bench.device.type == "cuda",
        prefetch_factor=2,
    )
    return steady_rate((len(part.rows) for part in loader), bench.workers)


def towers_only(bench: Bench, ensemble: Any) -> float:
    """Pictures/s of an ensemble on views that lie on the device, a transfer of its logits a batch."""
    import torch

    size = ensemble.batch_size
    views = [pictures(bench, size, v.view.side) for v in ensemble.views]
    ensemble.launch(views)
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    begun, before = time.perf_counter(), None
    rounds = max(4, min(20, 1024 // size)) if bench.device.type == "cuda" else 1
    for _ in range(rounds):
        launched = ensemble.launch(views)
        if before is not None:
            before.double().cpu()
        before = launched
    before.double().cpu()
    return rounds * size / (time.perf_counter() - begun)


def both(bench: Bench, ensemble: Any, batches: list) -> float:
    """Pictures/s of files to logits, as submit.py does it."""
    from solution.scoring import ensemble as predict

    rows = predict.stream(ensemble, batches, predict.Reader(ensemble.views), workers=bench.workers)
    skip = min(bench.workers, max(1, len(batches) // 4))
    return steady_rate((len(done) for done in rows), skip)


def pipeline(bench: Bench, entry: dict, ensemble: Any, inputs: list, count: int) -> None:
    """Loader alone, towers alone and both; which of them starves the other, and second looks."""
    batches = batches_of(inputs, count, ensemble.batch_size)
    entry["ensemble"], entry["pictures"] = ensemble.describe(), count
    entry["batch"], entry["workers"] = ensemble.batch_size, bench.workers
    entry["towers_only"] = towers_only(bench, ensemble)
    # Small batches, so that many of them come from every worker.
    small = batches_of(inputs, count, min(16, ensemble.batch_size))
    entry["loader_only"] = loader_only(bench, ensemble.views, small)
    slower = "loader" if entry["loader_only"] < entry["towers_only"] else "towers"
    entry["bound_by"] = slower
    entry["end_to_end"] = both(bench, ensemble, batches)
    looks = sum(ensemble.looks.values()) / count / len(ensemble.members)
    entry["second_looks"] = looks


def trained(bench: Bench, **options) -> Any:
    """The trained bundle's ensemble."""
    from solution.scoring import ensemble as predict

    return predict.load_ensemble(
        bench.weights,
        str(bench.device),
        members=bench.sizes.bundle_members,
        batch_size=bench.sizes.bundle_batch,
        **options,
    )


def stage_pipeline_compact(bench: Bench, entry: dict) -> None:
    """The trained bundle, as submit.py scores it: with and without second looks, and compiled."""
    need_bundle(bench)
    inputs = draw_files(bench)
    count = bench.sizes.files * bench.sizes.listed
    for name, looks in (("without_second_looks", False), ("default", True)):
        bench.need(10, name)
        ensemble = trained(bench, second_look=looks)
        pipeline(bench, entry.setdefault(name, {}), ensemble, inputs, count)


def need_bundle(bench: Bench) -> None:
    """Go on only where the trained bundle is.

    Raises:
        LeftOut: it is not.
    """
    from solution.bundles.store import COMPACT

    folder = COMPACT if bench.weights == "compact" else Path(bench.weights)
    if not folder.is_dir():
        raise LeftOut(f"no bundle {bench.weights} here")


def stage_pipeline_giant(bench: Bench, entry: dict) -> None:
    """Three giant streams from files: ours with and without second looks, against three float32 runs of their own."""
    import torch

    from solution.config import VoteConfig
    from solution.models.calibration import Calibrator
    from solution.scoring import ensemble as predict

    prepare_exact(bench)
    inputs = draw_files(bench)
    calibrators = {}
    for name, exact in bench.logits["float32"].items():
        slope = 2 / max(float(exact.std()), 1e-9)
        calibrators[name] = Calibrator("platt", (slope, -slope * float(np.median(exact))))

    def ensemble(names, members, kind, batch):
        return predict.Ensemble(
            members=members,
            configs={name: bench.configs[name] for name in names},
            vote=VoteConfig(dict.fromkeys(names, 1)),
            calibrators={name: calibrators[name] for name in names},
            hash="random",
            device=bench.device,
            precision=kind,
            batch_size=batch,
        )

    for name, looks in (("without_second_looks", False), ("with_second_looks", True)):
        bench.need(20, name)
        made = ensemble(STREAMS, copy.deepcopy(bench.exact), "float16", bench.batch)
        predict.make_fast(made, second_look=looks)
        pipeline(bench, entry.setdefault(name, {}), made, inputs, bench.sizes.giant_files)
        del made
    spent = 0.0
    for name in STREAMS:
        bench.need(15, f"{name} alone in float32")
        alone = {name: copy.deepcopy(bench.exact[name])}
        made = ensemble([name], alone, "float32", min(16, bench.sizes.batch))
        batches = batches_of(inputs, bench.sizes.plain_files, made.batch_size)
        spent += 1 / both(bench, made, batches)
        del made, alone
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    entry["straightforward_end_to_end"] = 1 / spent
    ours_rate = entry["without_second_looks"]["end_to_end"]
    entry["times_the_straightforward_way"] = ours_rate * spent


def engine(config: Any) -> Any:
    """The degradation without drawn text where OpenCV, from 5 on, draws none on float pictures."""
    import cv2

    return replace(config, text_p=0.0) if int(cv2.__version__[0]) >= 5 else config


def stage_compact_parity(bench: Bench, entry: dict) -> None:
    """The trained bundle on the bundled photographs, degraded many ways: default and plain half against float32."""
    from solution.config import DegradationConfig
    from solution.data.manifest import Item
    from solution.scoring import ensemble as predict

    need_bundle(bench)
    photos = sorted(PHOTOS.glob("*")) if PHOTOS.is_dir() else []
    if not photos:
        raise LeftOut("the bundled photographs are not here")
    each = max(1, 8 * bench.sizes.parity // len(photos) // 2)
    items = [Item(f"{p.name}#{k}", p, 0) for p in photos for k in range(each)]
    entry["pictures"] = len(items)
    ways = {
        "float32": {"exact": True},
        "default": {},
        "without_second_looks": {"second_look": False},
        "bfloat16": {"second_look": False, "precision": "bfloat16"},
    }
    exact: dict[str, np.ndarray] = {}
    for way, options in ways.items():
        bench.need(8, way)
        ensemble = trained(bench, **options)
        logits = predict.score_pictures(
            ensemble,
            items,
            degradation=engine(DegradationConfig(global_p=1.0)),
            batch_size=min(32, ensemble.batch_size),
            workers=bench.workers,
            progress=False,
        )
        p = {n: ensemble.calibrators[n].apply(z) for n, z in logits.items()}
        if way == "float32":
            exact = p
            continue
        entry[way] = {n: departure(v, exact[n], ensemble.vote.step) for n, v in p.items()}
        pairs = [(v, exact[n]) for n, v in p.items()]
        joined = (np.concatenate(part) for part in zip(*pairs))
        entry[way]["all"] = departure(*joined, ensemble.vote.step)
        looks = sum(ensemble.looks.values()) / len(items) / len(p)
        entry[way]["second_looks"] = looks


# ------------------------------------------------------------------------------------------------ training
def stage_training(bench: Bench, entry: dict) -> None:
    """A LoRA step of giant `global`, checkpointing off and on; the compact tower's whole fine-tuning at its sides."""
    import torch

    bench.exact = {}
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    configs, members = build(bench, ["global"])
    batch = bench.sizes.train
    for slim in (False, True):
        bench.need(10, "a LoRA step")
        members["global"].tower.checkpointing = slim
        name = "lora, checkpointing" if slim else "lora"
        entry[name] = train_rate(bench, members["global"], batch, configs["global"].view.side)
    del members
    configs, members = build(bench, ["global"], preset_name=bench.sizes.whole_preset)
    for side in bench.sizes.sides:
        bench.need(8, f"whole fine-tuning at {side} px")
        name = f"whole, {side} px"
        entry[name] = train_rate(bench, members["global"], bench.sizes.whole, side)


def train_rate(bench: Bench, member: Any, batch: int, side: int) -> dict[str, Any]:
    """Pictures/s of training steps in bfloat16 autocast by when they read their numbers, and peak memory.

    pictures_per_s: once a step, as train.py does. reads_at_once: each as soon as it is asked for. without_reads: never.
    """
    from solution.models.optimization import make_optimizer, phases

    member.train()
    optimizer = make_optimizer(member, phases(member.config)[-1])
    data = training_batch(bench, batch, side)
    peak_reset(bench)
    result: dict[str, Any] = {"batch": batch}
    ways = {
        "pictures_per_s": "once",
        "reads_at_once": "at once",
        "without_reads": "never",
    }
    for name, reads in ways.items():
        spent = step_seconds(bench, member, optimizer, data, reads)
        result[name] = batch / spent
    result["peak_gb"] = peak_gb(bench)
    return result


def training_batch(bench: Bench, batch: int, side: int):
    """A `Batch` of half real, half fake pictures, on the host, page-locked for a GPU."""
    import torch

    from solution.records import Batch

    images = pictures(bench, batch, side).cpu()
    if bench.device.type == "cuda":
        images = images.pin_memory()
    return Batch(images=images, labels=torch.arange(batch) % 2)


def step_seconds(bench: Bench, member: Any, optimizer: Any, data: Any, reads: str) -> float:
    """Wall seconds a training step; reads: of loss and gradient norm, `once` (late), `at once`, or `never`."""
    import torch
    from torch import nn

    from solution.models.optimization import phases
    from solution.models.streams import as_two_class, focal_loss

    limit = phases(member.config)[-1].optim.clip_norm
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step():
        optimizer.zero_grad(set_to_none=True)
        batch = data.to(bench.device)
        with torch.autocast(bench.device.type, torch.bfloat16):
            output = member(batch.images)
            loss = focal_loss(as_two_class(output.logit), batch.labels)
        if reads == "at once":
            # Finite or not, its part for the log, and itself.
            float(torch.isfinite(loss)), loss.item(), loss.item()
        loss.backward()
        if reads == "once" and not np.isfinite(loss.item()):
            raise RuntimeError("the loss of a training step is not finite")
        if limit:
            norm = nn.utils.clip_grad_norm_(trained, limit)
            if reads == "at once":
                norm.item()
        optimizer.step()
        if limit and reads == "once":
            norm.item()

    cuda = bench.device.type == "cuda"
    rounds = 10 if cuda else 1
    for _ in range(3 if cuda else 1):
        step()
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(rounds):
        step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / rounds


def stage_training_loader(bench: Bench, entry: dict) -> None:
    """Pictures/s of the training loader alone (decoding, augmentation, the engine), beside the steps' rates."""
    from solution.data.epochs import Sample
    from solution.data.manifest import Item
    from solution.data.training import TrainingViews, training_loader

    items = [Item(given.name, given.path, index % 2) for index, given in enumerate(draw_files(bench))]
    batch, entry["workers"] = min(32, bench.sizes.whole), bench.workers
    for name in dict.fromkeys((bench.sizes.whole_preset, bench.sizes.preset)):
        bench.need(12, f"the loader of {name}")
        config = config_of(bench, name, "global")
        config = replace(config, degradation=engine(config.degradation))
        plan = [
            [Sample(0, b * batch + i, (b * batch + i) % len(items), False) for i in range(batch)]
            for b in range(bench.sizes.loader_batches)
        ]
        views = TrainingViews(items, config, {}, 0)
        loader = training_loader(views, plan, workers=bench.workers)
        entry[name] = steady_rate((len(part.labels) for part in loader), bench.workers)
    steps = bench.found["stages"].get("training", {})
    for name, step in steps.items():
        if isinstance(step, dict):
            preset_name = bench.sizes.whole_preset if "whole" in name else bench.sizes.preset
            faster = entry[preset_name] > step["pictures_per_s"]
            entry[f"{name} is bound by"] = "the step" if faster else "the loader"


def stage_syncs(bench: Bench, entry: dict) -> None:
    """What waiting for numbers costs: each batch's logits at once, one batch late, or at the end; small steps."""
    import torch

    configs, members = build(bench, ["global"], preset_name=bench.sizes.whole_preset)
    member, side = members["global"], configs["global"].view.side
    for batch in dict.fromkeys((bench.sizes.train, bench.sizes.whole)):
        views = pictures(bench, batch, side)
        call = forward_of(member, views)
        rounds = 30 if bench.device.type == "cuda" else 1
        found: dict[str, float] = {}
        for way in ("at the end", "one late", "at once"):
            call()
            waiting: list[Any] = []
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(rounds):
                waiting.append(call())
                if way == "at once" or (way == "one late" and len(waiting) > 1):
                    waiting.pop(0).double().cpu()
            for left in waiting:
                left.double().cpu()
            found[way] = rounds * batch / (time.perf_counter() - begun)
        entry[f"scoring, batch {batch}, pictures_per_s"] = found
        bench.need(4, "training steps")
        entry[f"training, batch {batch}"] = train_rate(bench, member, batch, side)
        member.eval()


# Name -> (stage, seconds without which it is not begun).
STAGES: dict[str, tuple[Callable[[Bench, dict], None], float]] = {
    "card": (stage_card, 8),
    "straight": (stage_straight, 25),
    "float16": (stage_float16, 25),
    "kernels": (stage_kernels, 20),
    "five": (stage_five, 15),
    "pipeline_giant": (stage_pipeline_giant, 40),
    "bfloat16": (stage_bfloat16, 25),
    "parity": (stage_parity, 0),
    "pipeline_compact": (stage_pipeline_compact, 25),
    "training": (stage_training, 20),
    "training_loader": (stage_training_loader, 15),
    "compact_parity": (stage_compact_parity, 15),
    "syncs": (stage_syncs, 6),
    "autotune": (stage_autotune, 60),
}


# ------------------------------------------------------------------------------------------------ the table
def table(found: Mapping[str, Any]) -> str:
    """What was found: a line for every group of numbers, by its path."""
    lines = []

    def walk(path: str, group: Mapping[str, Any]) -> None:
        cells = []
        for key, value in group.items():
            if isinstance(value, float):
                cells.append(f"{key} {value:.4g}")
            elif isinstance(value, int | str) and "\n" not in str(value):
                cells.append(f"{key} {value}")
        lines.append(f"{path}: " + ", ".join(cells))
        for key, value in group.items():
            if isinstance(value, Mapping):
                walk(f"{path} / {key}", value)

    for name, stage in found["stages"].items():
        walk(name, stage)
    return "\n".join(lines)
