"""What a training step of QTFP costs at giant scale: seconds and peak memory.

Takes a member (random weights do) and batch sizes; gives a `StepCost` each.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from solution.config import override
from solution.models.adapters import add_adapter
from solution.models.qtfp import Qtfp
from solution.models.towers import build_tower, count_parameters
from solution.presets import preset
from solution.records import Batch


@dataclass(frozen=True)
class StepCost:
    """Seconds of the fastest measured training step, and the peak memory of the process or GPU in bytes."""

    batch: int
    seconds: float
    peak: int


def _peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on every system, and for this measurement alone

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_steps(member: Qtfp, sizes: tuple[int, ...], *, device: str, repeats: int) -> Iterator[StepCost]:
    """Train `member` for 1 + `repeats` steps on noise at each batch size (rising; half real, half fake).

    The first step fills the prototypes, so that FLCL takes part in the others. On a GPU under bf16.
    """
    side = member.config.view.side
    trained = [p for p in member.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=member.config.optim.lr)
    for size in sizes:
        images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
        batch = Batch(images, torch.arange(size, device=device) % 2)
        fastest = float("inf")
        for _ in range(1 + repeats):
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                output = member(batch.images)
                loss, parts = member.loss(output, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            member.after_step(output, batch)
            del output, loss
            if device == "cuda":
                torch.cuda.synchronize()
            if "raal" in parts and "skipped" not in parts:
                fastest = min(fastest, time.perf_counter() - start)
        if fastest == float("inf"):
            raise RuntimeError(f"no step of {size} pictures had all of its losses: {parts}")
        yield StepCost(size, fastest, _peak_memory(device))


def report_memory() -> None:
    """Print what steps of several sizes cost on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = override(preset("giant", "qtfp"), ["qtfp.raal_warmup=0"])  # a step past the warm-up has all its losses
    start = time.perf_counter()
    tower = build_tower(config.tower)
    # Random weights, and Effort's factors left at zero: the same tensors and operations, without 96 decompositions.
    add_adapter(tower, config.name, config.adapter, decompose=False)
    member = Qtfp(config, tower).to(device).train()
    trained, total = count_parameters(member)
    where = "GPU, bf16" if device == "cuda" else "CPU, float32"
    print(
        f"{config.tower.name} at {config.view.side} px, effort rank {config.adapter.rank}, on {where}, "
        f"{torch.get_num_threads()} CPU threads: {trained:,} of {total:,} parameters train; "
        f"built in {time.perf_counter() - start:.0f} s, weights {total * 4 / 1e9:.2f} GB, "
        f"peak so far {_peak_memory(device) / 1e9:.2f} GB"
    )
    sizes = (2, 4, 16) if device == "cuda" else (2, 4)
    costs = []
    for cost in measure_steps(member, sizes, device=device, repeats=2):
        costs.append(cost)
        print(
            f"batch {cost.batch}: {cost.seconds:.2f} s a step, peak {cost.peak / 1e9:.2f} GB",
            flush=True,
        )
    _print_batch_16(costs[0], costs[1])
    patches = (config.view.side // config.tower.arch.patch) ** 2
    rows, columns = 8 * patches, 16 * patches
    print(
        f"on top of that FLCL's matrix, which grows with the square: {rows} fake rows x {columns} patches = "
        f"{rows * columns * 4 / 1e6:.1f} MB in float32, {rows * columns * 2 / 1e6:.1f} MB in bf16, one at a time; "
        f"qtfp.chunk=256 makes it {256 * columns * 2 / 1e6:.1f} MB in bf16"
    )


def _print_batch_16(small: StepCost, large: StepCost) -> None:
    """The straight line through two measured batch sizes, drawn to 16."""
    pictures, further = large.batch - small.batch, 16 - large.batch
    for title, a, b, unit in (
        ("peak", small.peak / 1e9, large.peak / 1e9, "GB"),
        ("step", small.seconds, large.seconds, "s"),
    ):
        slope = (b - a) / pictures
        print(
            f"{title} at batch 16, extrapolated: ({b:.2f} - {a:.2f}) / {pictures} = {slope:.3f} {unit} a picture; "
            f"{b:.2f} + {further} x {slope:.3f} = {b + further * slope:.1f} {unit}"
        )
