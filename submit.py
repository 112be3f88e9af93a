"""Score pictures: list -> faces -> each member's view -> member -> calibrated P(fake) -> discretized vote -> CSV.

    python submit.py --input DIR --out preds.csv

Takes a folder, a picture, a video or a .txt list; writes `image,score` (P(fake) in [0, 1]) with a row for every input,
beside it PREDS.members.csv (status, face, every member), PREDS.run.json, and PREDS.journal.jsonl, from which the same
command goes on after an interruption. Exit codes: 0 done, 2 usage, 3 environment or weights, 4 done but some inputs
could not be read, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

# What needs torch is imported inside functions: --help answers at once.
SHIPPED = Path(__file__).resolve().parent / "weights" / "compact"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--input", help="folder, picture, video, or a .txt with one path a line")
    add("--out", type=Path, help="preds.csv; .txt: submission.txt; .zip: the challenge's zip")
    add("--weights", default=str(SHIPPED), help="bundle's folder, hf:owner/name[@revision][:subfolder], compact, ntire26 (default: weights/compact)")
    add("--members", help="comma-separated; `all`: those without votes too (default: those with votes)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--batch-size", type=_positive, help="pictures computed at once (default: by the towers' size)")
    add("--workers", type=_count, help="loader processes (default: by the cores)")
    add("--decimals", type=_positive, default=6, help="of the scores (default: 6)")
    add("--on-error", choices=("neutral", "fail"), default="neutral", help="an input that cannot be read gets 0.5, or ends the run")
    add("--frames", type=_positive, default=32, help="of a video (default: 32)")
    add("--video-mean", choices=("score", "logit"), default="score", help="a video's score: the mean of its frames' scores, or the vote on mean logits")
    add("--exact", action="store_true", help="float32 throughout, as trained")
    add("--precision", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the towers (default: the device's fastest)")
    add("--fast", action="store_true", help="no second look in float32 at pictures near the edge of a level: faster, and some levels differ from --exact")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile (auto: GPU and long runs)")
    add("--restart", action="store_true", help="ignore the journal of an earlier run")
    add("--shard", type=_shard, metavar="I/N", help="score the I-th of N parts (1/N .. N/N); join them with python -m solution.submission merge")
    add("--engine", choices=("local", "ray"), default="local", help="ray: batches on a Ray cluster (pip install 'ray[data]')")
    add("--report", action="store_true", help="PREDS.report/report.html: histograms, disagreement, most uncertain, failures")
    add("--explain", type=_explain, metavar="N", help="maps for the N highest scores (or `all`) in PREDS.explain/")
    add("--selftest", action="store_true", help="recompute the bundle's golden logits, and end")
    add("--doctor", action="store_true", help="say what this machine has and lacks, and end")
    return p


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def _count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}; expected I/N, such as 1/3")
    if not 1 <= int(index) <= int(count):
        raise argparse.ArgumentTypeError(f"{text}: the parts are 1/{count} to {count}/{count}")
    return int(index), int(count)


def _explain(text: str) -> int:
    """How many pictures; 0: all."""
    return 0 if text == "all" else _positive(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    p = parser()
    args = p.parse_args(argv)
    if args.doctor:
        from solution import doctor

        return doctor.main(["--weights", args.weights] + ([] if args.device == "auto" else ["--device", args.device]))
    if not args.selftest and not (args.input and args.out):
        p.error("--input and --out are needed (or --selftest, or --doctor)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    from solution.backbones import WeightsError
    from solution.config import ConfigError
    from solution.images import InputError, UnreadableInput
    from solution.submission import SubmissionError, score_format

    try:
        if args.selftest:
            return selftest(args)
        score_format(args.out)
        return score(args)
    except (InputError, UnreadableInput) as error:
        return _fail(2, error)
    except (WeightsError, ConfigError, SubmissionError, RunError, OSError) as error:
        return _fail(3, error)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


class RunError(RuntimeError):
    """A run that cannot go on; says why and what to do."""


def _fail(code: int, error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
