"""Entry: Score-CAM, attention entropy, feature stability.

    python -m solution.explain pictures --input DIR --weights BUNDLE --out DIR
    python -m solution.explain drift --data MANIFEST --weights BUNDLE --out DIR

`pictures` (also `submit.py --explain`) draws where each member looked: `explain.html`, self-contained, and `contact.png`.
`drift` measures how that moves as pictures degrade: `drift.json`, `drift.md` and figures for light and dark pages, from
`measured/`, where every finished condition is kept: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from solution.config import SCORE_CAM_CHANNELS
from solution.data.images import InputError, UnreadableInput, find_inputs
from solution.errors import UsageError, door, tell, whole

if TYPE_CHECKING:
    from solution.scoring.ensemble import Ensemble

STRENGTHS = tuple(round(0.1 * k, 1) for k in range(11))  # the paper's


def _load(args: argparse.Namespace, *, second_look: bool) -> Ensemble:
    from solution.scoring.ensemble import load_ensemble

    ensemble = load_ensemble(
        args.weights,
        args.device,
        exact=args.exact,
        second_look=second_look,
        members=args.members and args.members.split(","),
        batch_size=args.batch_size,
        report=tell,
    )
    tell(ensemble.describe())
    return ensemble


def run_drift(args: argparse.Namespace) -> Path:
    """The whole measurement; the path of its tables."""
    from solution.studies.drift import Settings
    from solution.studies.drift_study import DriftJob, drift_items, measure_drift

    job = DriftJob(
        args.data,
        args.out,
        args.weights,
        Settings(args.cam, args.channels, args.full_check, args.seed),
        args.strengths,
        split=args.split,
        limit=args.limit,
        workers=args.workers,
        progress=not args.quiet,
    )
    items = drift_items(job)
    return measure_drift(job, items, _load(args, second_look=False))


def run_pictures(args: argparse.Namespace) -> Path:
    """Maps of every picture of --input; the page's path."""
    from solution.evaluation.explainer import Target, explain_pictures

    found = find_inputs(args.input)
    for line in found.notes:
        tell(line)
    inputs = [item for item in found if item.kind == "image"]
    if not inputs:
        raise InputError(f"{args.input}: no picture in it; videos have no maps")
    ensemble = _load(args, second_look=True)
    title = f"What the members looked at: {args.input.name}"
    settings = {"channels": args.channels, "title": title, "progress": not args.quiet}
    return explain_pictures(ensemble, [Target(item) for item in inputs], args.out, **settings).written[0]


def _channels(text: str) -> int | None:
    if text == "all":
        return None
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: at least 2 channels, or `all`")
    return int(text)


def _strengths(text: str) -> list[float]:
    values = sorted({float(part) for part in text.split(",")})
    if not (0 <= values[0] and values[-1] <= 1):
        raise argparse.ArgumentTypeError(f"{text}: strengths lie in [0, 1]")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m solution.explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pictures = commands.add_parser("pictures", help="maps of pictures, as a page")
    pictures.add_argument("--input", type=Path, required=True, help="folder, picture, or .txt")
    measure = commands.add_parser("drift", help="what degradation does to maps and features")
    add = measure.add_argument
    add("--data", type=Path, required=True, help="manifest: CSV, JSON, or a folder")
    add("--split", help="rows of this split only (default: all)")
    add(
        "--limit",
        type=whole(),
        default=0,
        help="pictures, drawn from each source and label (default: all)",
    )
    add(
        "--strengths",
        type=_strengths,
        default=list(STRENGTHS),
        help="such as 0,.5,1 (default: 0,.1,..1)",
    )
    add("--cam", type=whole(), default=32, help="pictures with Score-CAM (default: 32)")
    add(
        "--full-check",
        type=whole(),
        default=4,
        metavar="N",
        help="of these, compared with the pass over all channels (default: 4)",
    )
    add(
        "--seed",
        type=int,
        default=7,
        help="of the degradation and every draw (default: 7)",
    )
    add("--workers", type=whole(), default=0, help="loader processes (default: 0)")
    for command in (pictures, measure):
        add = command.add_argument
        add("--weights", required=True, help="a bundle")
        add("--out", type=Path, required=True, help="folder for what comes out")
        add(
            "--channels",
            type=_channels,
            default=SCORE_CAM_CHANNELS,
            metavar="K",
            help=f"of Score-CAM: the strongest K, or all (default: {SCORE_CAM_CHANNELS})",
        )
        add("--members", help="comma-separated (default: all of the bundle)")
        add("--device", default="auto")
        add(
            "--batch-size",
            type=int,
            help="views computed at once (default: by the towers' size)",
        )
        add("--exact", action="store_true", help="float32 throughout")
        add("--quiet", action="store_true", help="no progress bar")
    return parser


@door("explain", interrupted="interrupted; drift goes on from here by the same command")
def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 2 usage or unreadable data, 3 environment or weights, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        print(run_drift(args) if args.command == "drift" else run_pictures(args))
    except UnreadableInput as error:
        raise UsageError(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
