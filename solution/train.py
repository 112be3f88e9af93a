"""Entry: train one member.

`python -m solution.train --member NAME --preset compact --data MANIFEST --out DIR`. Leaves in DIR/NAME: the best
weights (`config.json`, `model.safetensors`; a tower trained whole in DIR/towers) and what they make of the validation
pictures (`validation.csv`: logits), `checkpoint.pt` to go on from, `metrics.jsonl`, and the rows that were left out of
training or validation with their reasons (`dropped.csv`). The same command goes on where it stopped, bit for bit on CPU.
`torchrun` spreads it over processes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from solution.config import override
from solution.errors import INTERRUPTED, door, tell
from solution.presets import PRESET_MEMBERS, PRESETS, preset


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m solution.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--member",
        required=True,
        help="; ".join(f"{name}: {', '.join(who)}" for name, who in PRESET_MEMBERS.items()),
    )
    add("--preset", default="compact", choices=list(PRESETS))
    add("--data", required=True, type=Path, help="manifest: CSV, DeepfakeBench JSON, or folder")
    add("--out", required=True, type=Path, help="folder of the trained members")
    add("--tower", action="append", default=[], metavar="NAME=PATH", help="starting weights of a tower")
    tower = parser.add_mutually_exclusive_group()
    tower.add_argument(
        "--timm",
        metavar="NAME",
        help="another tower: a pre-trained vision transformer of timm, e.g. vit_base_patch16_dinov3.lvd1689m",
    )
    tower.add_argument(
        "--open-clip",
        metavar="MODEL/TAG",
        help="another tower: a pre-trained CLIP of open_clip, e.g. ViT-B-16/laion2b_s34b_b88k",
    )
    add("--random-towers", action="store_true", help="towers start at random (smoke runs)")
    add(
        "--start-from",
        type=Path,
        metavar="DIR",
        help="trained member whose weights are the start (of another kind: its adapter)",
    )
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="e.g. optim.lr=1e-5")
    add("--device", default="auto")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), help="loader processes")
    add("--validation-limit", type=int, default=0, help="at most so many validation pictures")
    add(
        "--budget",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="of training steps (one process); the schedule is fitted to it after the warm-up",
    )
    add("--restart", action="store_true", help="ignore an earlier checkpoint")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


@door("train", interrupted="interrupted; the same command goes on from here")
def main(argv: list[str] | None = None) -> int:
    """Train one member; exit codes: 0 done, 2 usage, 3 environment or weights, 130 interrupted and resumable."""
    args = parse(argv)
    from solution.models.devices import pick_device
    from solution.training.processes import Machine, processes
    from solution.training.start import Job, prepare

    device = pick_device(args.device)
    config = preset(args.preset, args.member)
    if args.timm:
        from solution.models.timm_towers import named_tower, on_tower

        config = on_tower(config, named_tower(args.timm))
    if args.open_clip:
        from solution.models.clip_towers import named_clip, on_clip

        config = on_clip(config, named_clip(args.open_clip))
    job = Job(
        config=override(config, args.set),
        data=args.data,
        out=args.out,
        towers=dict(text.partition("=")[::2] for text in args.tower),
        random_towers=args.random_towers,
        start_from=args.start_from,
        limit=args.validation_limit,
        budget=args.budget,
        restart=args.restart,
        command=shlex.join(["python", "-m", "solution.train", *sys.argv[1:]]),
    )
    with processes(device) as world:
        run = prepare(job, Machine(device, world, args.workers, progress=not args.quiet))

        def stop(*_: Any) -> None:
            run.stop()

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            state = run.run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if run.stopping:
        tell("train: interrupted; the same command goes on from here")
        return INTERRUPTED
    if world.leads:
        run.write_history()
        print(f"{run.config.name}: {state.total} steps, best mean validation AUC {state.best:.4f}, in {run.folder}")
        if state.unreadable:
            tell(
                f"{run.config.name}: {state.unreadable} samples were unreadable and left out "
                "(sampling.on_unreadable=drop)"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
