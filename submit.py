"""Score pictures: list -> faces -> each member's view -> member -> calibrated P(fake) -> discretized vote -> CSV.

    python submit.py --input DIR --out preds.csv

Takes a folder, a picture, a video or a .txt list; writes `image,score` (P(fake) in [0, 1]) with a row for every input,
beside it PREDS.members.csv (status, face, every member), PREDS.run.json, and PREDS.journal.jsonl, from which the same
command goes on after an interruption. Exit codes: 0 done, 2 usage, 3 environment or weights, or with --on-error fail an
input that cannot be read, 4 done but some inputs could not be read, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from solution.errors import KitError, UsageError, door, reason, tell, whole

# What needs torch is imported inside functions: --help answers at once.
SHIPPED = Path(__file__).resolve().parent / "weights" / "compact"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--input", help="folder, picture, video, or a .txt with one path a line")
    add(
        "--out",
        type=Path,
        help="preds.csv; .txt: submission.txt; .zip: the challenge's zip",
    )
    add(
        "--weights",
        default=str(SHIPPED),
        help="bundle's folder, hf:owner/name[@revision][:subfolder], compact, ntire26 (default: weights/compact)",
    )
    add(
        "--members",
        help="comma-separated; `all`: those without votes too (default: those with votes)",
    )
    add(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1 (default: the GPU if there is one)",
    )
    add(
        "--batch-size",
        type=whole(1),
        help="pictures computed at once (default: by the towers' size)",
    )
    add(
        "--workers",
        type=whole(0, 256),
        help="loader processes, up to 256 (default: by the cores); 0: one, nothing ahead, no shared memory",
    )
    add("--limit", type=whole(0, (1 << 31) - 1), default=600, help="seconds to read one file; 0: none (default: 600)")
    add("--decimals", type=whole(1, 17), default=6, help="of the scores, 1 to 17 (default: 6)")
    add(
        "--on-error",
        choices=("neutral", "fail"),
        default="neutral",
        help="an input that cannot be read gets 0.5, or ends the run",
    )
    add(
        "--faces",
        choices=("one", "all"),
        default="one",
        help="all: a row per face, or per track of a video, in the sidecar; the most fake-looking one decides (default: one)",
    )
    add("--frames", type=whole(1), default=32, help="of a video (default: 32)")
    add(
        "--video-mean",
        choices=("score", "logit"),
        default="score",
        help="a video's score: the mean of its frames' scores, or the vote on mean logits",
    )
    add("--exact", action="store_true", help="float32 throughout, as trained")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the towers (default: the device's fastest)",
    )
    add(
        "--fast",
        action="store_true",
        help="no second look in float32 at pictures near the edge of a level: faster, and some levels differ from --exact",
    )
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile (auto: GPU and long runs)",
    )
    add("--restart", action="store_true", help="ignore the journal of an earlier run")
    add(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="score the I-th of N parts (1/N .. N/N); join them with python -m solution.scoring.files merge",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: batches on a Ray cluster (pip install 'ray[data]')",
    )
    add(
        "--report",
        action="store_true",
        help="PREDS.report/report.html: every verdict, videos over time, histograms, disagreement, failures",
    )
    add(
        "--explain",
        type=_explain,
        metavar="N",
        help="maps for the N highest scores (or `all`) in PREDS.explain/; of a video, for its most telling frame",
    )
    add(
        "--selftest",
        action="store_true",
        help="recompute the bundle's golden logits, and end",
    )
    add(
        "--doctor",
        action="store_true",
        help="say what this machine has and lacks, and end",
    )
    return p


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}; expected I/N, such as 1/3")
    if not 1 <= int(index) <= int(count):
        raise argparse.ArgumentTypeError(f"{text}: the parts are 1/{count} to {count}/{count}")
    return int(index), int(count)


def _explain(text: str) -> int:
    """How many pictures; 0: all."""
    return 0 if text == "all" else whole(1)(text)


@door("submit", interrupted="interrupted; the same command goes on from here")
def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    p = parser()
    args = p.parse_args(argv)
    if args.doctor:
        from solution import doctor

        given = [] if args.weights == str(SHIPPED) else ["--weights", args.weights]
        given += [] if args.device == "auto" else ["--device", args.device]
        return doctor.main(given)
    if not args.selftest and not (args.input and args.out):
        p.error("--input and --out are needed (or --selftest, or --doctor)")
    # As Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return selftest(args) if args.selftest else score(args, prepare(args))


def prepare(args: argparse.Namespace):
    """The inputs, and a place for every output, found before anything slow begins."""
    from solution.data.images import find_inputs
    from solution.scoring import files as submission
    from solution.scoring.journal import journal_path

    submission.score_format(args.out)
    inputs = find_inputs(args.input)
    if args.out.exists() and args.out.samefile(args.input):
        raise UsageError(f"--out {args.out} is the --input, which it would overwrite; choose another name")
    check_shard(args)
    places = [args.out, submission.members_path(args.out), submission.run_path(args.out)]
    places.append(journal_path(args.out, _rank()))
    # Of a folder that is not there yet, the files above have tried the place.
    pages = {"report.html": args.report, "explain.html": args.explain is not None}
    folders = {page: args.out.with_suffix(f".{Path(page).stem}") for page, wanted in pages.items() if wanted}
    places += [folder / page for page, folder in folders.items() if folder.exists()]
    try:
        for path in places:
            submission.ensure_writable(path)
    except submission.SubmissionError as error:
        # The command line is right; the machine has no such place.
        raise KitError(str(error)) from error
    return inputs


def check_shard(args: argparse.Namespace) -> None:
    """Refuse to put a shard's scores in the place of other scores."""
    from solution.scoring import files as submission

    if not (args.shard and args.out.exists()):
        return
    there = submission.read_run(args.out)
    if there and there.get("shard") != _shard_name(args):
        whose = f"shard {there['shard']}" if "shard" in there else "a run without --shard"
        raise UsageError(
            f"--out {args.out} has the scores of {whose}, which those of shard {_shard_name(args)} would replace; give "
            "each shard an --out of its own, then join them with python -m solution.scoring.files merge"
        )


def _shard_name(args: argparse.Namespace) -> str:
    return "{}/{}".format(*args.shard)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))  # torchrun's


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def selftest(args: argparse.Namespace) -> int:
    """Recompute the bundle's golden logits on the device, in float32; 0 when they agree, else 3."""
    from solution.bundles.selftest import run_selftest
    from solution.bundles.store import open_bundle
    from solution.models.devices import pick_device

    bundle = open_bundle(args.weights, report=tell)
    result = run_selftest(bundle, pick_device(args.device))
    print(f"{bundle.name} {bundle.hash[:12]}: {result}")
    print("passed" if result.passed else "FAILED: these weights do not compute here what they should")
    return 0 if result.passed else 3


def score(args: argparse.Namespace, inputs) -> int:
    """The whole pipeline; 0 done, 4 done with inputs that could not be read. The journal is this run's until the end."""
    from solution.bundles.store import open_bundle
    from solution.io import source_hash
    from solution.scoring.ensemble import load_ensemble
    from solution.scoring.journal import SCORING, Journal
    from solution.scoring.stream import Plan

    rank, ranks = _rank(), _ranks()
    bundle = open_bundle(args.weights, report=tell)
    members = chosen_members(args.members, bundle)
    ensemble = load_ensemble(bundle, **loading(args, members, args.batch_size))
    if args.compile == "on" or (args.compile == "auto" and ensemble.compiling_pays(len(inputs))):
        ensemble.compile()
    plan = Plan(inputs, ensemble.batch_size, args.shard or (1, 1))
    mine = plan.part(rank, ranks)
    faces = faces_available(ensemble)
    header = {
        **ensemble.fingerprint(),
        "code": source_hash(*SCORING),
        "input": os.path.realpath(args.input),
        "frames": args.frames,
        "faces": faces,
        "people": args.faces,
    }
    with Journal(args.out, inputs, header, rank=rank, ranks=ranks, restart=args.restart) as journal:
        if journal.discarded:
            tell(f"an earlier journal is not used: {journal.discarded}")
        found = int((plan.share() & journal.done).sum())
        todo = mine.share() & ~journal.done
        announce(ensemble, bundle, plan, found, rank, ranks)
        seconds = run(args, ensemble, mine.pending(todo), journal, todo, faces=faces, rank=rank)
        if ranks > 1:
            wait_for_ranks()
            if rank:
                return 0
            journal.gather(ranks)
        failed = write(args, ensemble, bundle, plan, journal, found, seconds)
        maps = None if args.explain is None else explain(args, ensemble, inputs)
        if args.report:
            write_report(args, ensemble, bundle, inputs, maps)
    return 4 if failed else 0


def loading(args, members: list[str], batch_size: int | None) -> dict:
    """What `load_ensemble` is called with, beside the weights."""
    return {
        "device": args.device,
        "exact": args.exact,
        "precision": args.precision,
        "second_look": not args.fast,
        "members": members,
        "batch_size": batch_size,
    }


def chosen_members(text: str | None, bundle) -> list[str]:
    """The members to score with: those with votes, all, or those named.

    Raises:
        UsageError: a comma with no name before or behind it.
    """
    from solution.scoring.ensemble import voters

    if text is None:
        return voters(bundle)
    names = list(bundle.configs) if text.strip() == "all" else [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f"--members {text!r}: expected names with a comma between, of {', '.join(bundle.configs)}")
    return names


def faces_available(ensemble) -> bool:
    """Whether faces are looked for; says so when they should be and cannot."""
    from solution.data.faces import FaceDetectorMissing, detector_file

    if all(view.face is None for view in ensemble.views):
        return False
    try:
        detector_file()
    except FaceDetectorMissing as error:
        tell(f"no faces are looked for, every member sees whole pictures: {error}")
        return False
    return True


def announce(ensemble, bundle, plan, found: int, rank: int, ranks: int) -> None:
    """What is about to happen, in three lines; found: how many inputs the journal has."""
    if rank:
        return
    votes = [f"{name} x{n}" for name, n in ensemble.vote.weights.items() if n]
    tell(f"{bundle.name} {bundle.hash[:12]}: {ensemble.describe()}")
    tell(f"vote: {ensemble.vote.mean} of {', '.join(votes)}")
    others = f"; the bar shows rank 0 of {ranks}" if ranks > 1 else ""
    tell(f"{int(plan.share().sum())} inputs, {found} scored before{others}")
    for line in (*filter(None, [plan.inputs.passed()]), *plan.inputs.notes):
        tell(line)


def run(args, ensemble, batches, journal, todo, *, faces: bool, rank: int) -> float:
    """Score `batches` into the journal; the seconds it took."""
    import time

    from tqdm import tqdm

    from solution.data.images import UnreadableInput
    from solution.scoring.cluster import ray_stream
    from solution.scoring.stream import Reader, stream

    settings = {"frames": args.frames, "faces": faces, "people": args.faces}
    if _ranks() > 1:
        join_ranks()
    if args.engine == "ray":
        load = loading(args, list(ensemble.members), ensemble.batch_size)
        load["weights"] = str(Path(args.weights).resolve()) if Path(args.weights).is_dir() else args.weights
        gpu = ensemble.device.type == "cuda"
        rows_of = ray_stream(batches, load, settings, gpu=gpu)
    else:
        reader = Reader(ensemble.views, limit=args.limit, **settings)
        rows_of = stream(ensemble, batches, reader, workers=args.workers)
    begun = time.monotonic()
    try:
        with tqdm(total=int(todo.sum()), unit=" images", disable=rank > 0) as bar:
            for rows in rows_of:
                for row in rows:
                    if row.error and args.on_error == "fail":
                        raise UnreadableInput(journal.inputs[row.index].path, row.error)
                    if row.error:
                        tqdm.write(f"cannot be read: {row.name}: {row.error}", file=sys.stderr)
                journal.append(rows)
                bar.update(len(rows))
    finally:
        journal.sync()
    return time.monotonic() - begun


def join_ranks() -> None:
    """Meet the other ranks of torchrun; nothing is exchanged until all are done."""
    from datetime import timedelta

    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30))


def wait_for_ranks() -> None:
    """Wait until every rank's journal is complete."""
    from torch import distributed

    distributed.barrier()
    distributed.destroy_process_group()


def write(args, ensemble, bundle, plan, journal, found: int, seconds: float) -> int:
    """The sidecar, run.json, and last the scores, each whole; how many inputs failed."""
    import json

    import numpy as np

    from solution.scoring import files as submission

    indices, names = np.flatnonzero(plan.share()), list(ensemble.members)
    missing = int((~journal.done[indices]).sum())
    if missing:
        raise KitError(
            f"{missing} inputs have no score: all ranks must see the folder of {args.out}; run the same command again"
        )
    scores = np.empty(len(journal.inputs))
    counts = {"inputs": len(indices), "from_journal": found, "failed": 0}
    counts["verdicts"] = dict.fromkeys(submission.VERDICTS, 0)
    submission.write_sidecar(
        verdicts(args, ensemble, journal, indices, scores, counts),
        submission.members_path(args.out),
        names,
        decimals=args.decimals,
        frames=plan.videos > 0 or args.faces == "all",
        people=args.faces == "all",
    )
    scored = len(indices) - found
    speed = scored / seconds if scored else None
    record = run_record(args, ensemble, bundle, journal) | {
        "counts": {**counts, "scored_now": scored},
        "passed_over": journal.inputs.passed_over,
        "notes": list(journal.inputs.notes),
        "seconds": round(seconds, 3),
        "images_per_second": speed and round(speed, 2),
    }
    text = json.dumps(record, indent=1) + "\n"
    submission.write_atomically(submission.run_path(args.out), text)
    if args.out.suffix.lower() != ".csv":
        warning = submission.order_warning(journal.inputs[i].name for i in indices)
        if warning:
            tell(f"warning: {warning}")
    rows = ((journal.inputs[i].name, scores[i]) for i in indices)
    submission.write_scores(rows, args.out, args.decimals)
    told = f"; {speed:.1f} images/s" if speed else ""
    say(f"{args.out}: {len(indices)} rows, {counts['failed']} could not be read{told}", args.out)
    return counts["failed"]


def say(line: str, out: Path) -> None:
    """Print a line to standard output, at once, when the scores in `out` are written.

    Raises:
        KitError: standard output takes no more.
    """
    try:
        print(line, flush=True)
    except OSError as error:
        # What it holds back would be tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise KitError(f"standard output: {reason(error)}; the scores are in {out}") from None


def verdicts(args, ensemble, journal, indices, scores, counts):
    """The sidecar's rows, some at a time; fills in `scores` (N,) and counts what failed on the way."""
    from solution.scoring.judge import judge

    for start in range(0, len(indices), 1024):
        part = indices[start : start + 1024]
        places = iter(part)
        for row in judge(
            list(journal.rows(part)),
            ensemble.vote,
            ensemble.calibrators,
            video_mean=args.video_mean,
        ):
            if row.frame is None and row.who is None:
                scores[next(places)] = row.score
                counts["failed"] += row.status == "failed"
                counts["verdicts"][row.verdict] += 1
            yield row


def run_record(args, ensemble, bundle, journal) -> dict:
    """What PREDS.run.json says of how the scores came to be."""
    import platform

    import cv2
    import numpy
    import PIL
    import torch
    import transformers

    from solution.config import to_dict
    from solution.scoring.files import listing_record
    from solution.scoring.verdict import RULES, threshold_record

    libraries = torch, transformers, numpy, cv2, PIL
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in libraries},
        },
        "weights": {"name": bundle.name, "hash": bundle.hash, "files": bundle.files},
        **({"shard": _shard_name(args)} if args.shard else {}),
        "listing": listing_record(item.name for item in journal.inputs),
        "scoring": {
            **journal.header,
            "merged": ensemble.merged,
            "video_mean": args.video_mean,
        },
        "ensemble": ensemble.describe(),
        "vote": to_dict(ensemble.vote),
        "verdict": {**threshold_record(bundle, ensemble.vote), "faces": RULES[args.faces]},
        "calibrators": {n: to_dict(c) for n, c in ensemble.calibrators.items()},
        "config": {n: to_dict(c) for n, c in ensemble.configs.items()},
        "second_looks": {**ensemble.looks},
    }


def read_judged(args, inputs):
    """The sidecar back from disk: all that has a verdict of its own."""
    from solution.evaluation.verdicts import read_judged
    from solution.scoring import files as submission

    return read_judged(submission.members_path(args.out), inputs)


def write_report(args, ensemble, bundle, inputs, maps) -> None:
    """The label-free report of this run's sidecar; maps: the pages of --explain, or None."""
    import csv

    from solution.evaluation import report, verdicts
    from solution.scoring import files as submission
    from solution.scoring.verdict import threshold_record

    with submission.members_path(args.out).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not (row.get("frame") or row.get("face"))]
    paths = {item.name: item.path for item in inputs if item.kind == "image"}
    for row in rows:
        row["path"] = paths.get(row["image"])
    folder = args.out.with_suffix(".report")
    title, threshold = f"Scores of {Path(args.input).name}", ensemble.vote.threshold
    places = {} if maps is None else maps.places
    judged = read_judged(args, inputs)
    targets = ((j.key, explained(args, ensemble, j).name) for j in judged)
    table = verdicts.verdict_section(
        judged,
        record=threshold_record(bundle, ensemble.vote),
        frames=args.frames,
        why={
            key: {"href": f"../{args.out.with_suffix('.explain').name}/{places[name][0]}", "uri": places[name][1]}
            for key, name in targets
            if name in places
        },
    )
    page = report.write_submission_report(rows, folder, title=title, threshold=threshold, verdicts=table)
    say(str(page), args.out)


def explain(args, ensemble, inputs):
    """Maps of the pictures, or faces and persons, with the highest scores, in PREDS.explain/; its pages."""
    from solution.evaluation.explainer import explain_pictures

    judged = sorted((j for j in read_judged(args, inputs) if j.verdict != "failed"), key=lambda j: -j.score)
    chosen = [explained(args, ensemble, j) for j in judged[: args.explain or None]]
    pages = explain_pictures(ensemble, chosen, args.out.with_suffix(".explain"))
    say(str(pages.written[0]), args.out)
    return pages


def explained(args, ensemble, judged):
    """What is shown of why something was judged as it was: the picture, its face, or a video's most telling frame."""
    from solution.evaluation.explainer import Target
    from solution.evaluation.verdicts import face_of

    if judged.frames:
        (row,) = judged.telling(1, ensemble.vote.threshold)
        return Target(judged.item, judged.who, face_of(row), int(row["frame"]), args.frames)
    return Target(judged.item, judged.who, face_of(judged.row) if judged.who is not None else None)


if __name__ == "__main__":
    sys.exit(main())
