"""Every claim about speed on a GPU, measured in one call within a budget of seconds.

The sub-command `gpu` of `python -m solution.benchmark`. Towers have random weights, made on the device from a seed;
pictures are seeded, too. Stages run in the order of what they tell; each checks what is left of the budget and says why
it left something out. `gpu.json` is written again after every stage. Shapes: pictures (B, 3, S, S) uint8.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from solution.errors import FAILURES, DeviceError, UsageError
from solution.studies import gpu_pipeline, gpu_towers
from solution.studies.gpu_bench import TINY, Bench, Sizes


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
    """Run the stages, print their table; 4 when one of them failed, 3 without a GPU."""
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
            bench.run(name, *STAGES[name])
    bench.found["seconds"] = round(time.monotonic() - begun, 1)
    bench.write()
    print(table(bench.found))
    states = [stage["state"] for stage in bench.found["stages"].values()]
    return FAILURES if "failed" in states else 0


# Name -> (stage, seconds without which it is not begun).
STAGES: dict[str, tuple[Callable[[Bench, dict], None], float]] = {
    "card": (gpu_towers.stage_card, 8),
    "straight": (gpu_towers.stage_straight, 25),
    "float16": (gpu_towers.stage_float16, 25),
    "kernels": (gpu_towers.stage_kernels, 20),
    "five": (gpu_towers.stage_five, 15),
    "pipeline_giant": (gpu_pipeline.stage_pipeline_giant, 40),
    "bfloat16": (gpu_towers.stage_bfloat16, 25),
    "parity": (gpu_towers.stage_parity, 0),
    "pipeline_compact": (gpu_pipeline.stage_pipeline_compact, 25),
    "training": (gpu_pipeline.stage_training, 20),
    "training_loader": (gpu_pipeline.stage_training_loader, 15),
    "compact_parity": (gpu_pipeline.stage_compact_parity, 15),
    "syncs": (gpu_pipeline.stage_syncs, 6),
    "autotune": (gpu_towers.stage_autotune, 60),
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
