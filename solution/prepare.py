"""Entry: a raw data set of pictures or videos to face crops and a manifest that training reads.

`python -m solution.prepare SOURCE --out DIR` finds the layout (FaceForensics++ with DFD, Celeb-DF, DFDC and its preview,
DeepfakeBench, WildDeepfake, DF40, folders of real and fake, Kaggle's tables, the NTIRE challenge's pictures), prints which
folder it took for which label, and leaves in DIR: `images/`, `masks/`, `manifest.csv`, `prepare.json` (counts, what was
passed over and why) and `preview.png` (look at it). The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solution.errors import FAILURES, door, whole
from solution.io import cores, write_atomically

# The libraries are imported where they are used: --help comes at once.
if TYPE_CHECKING:
    from solution.data.raw import Found

LAYOUTS = ["ff++", "celeb-df", "dfdc", "dfdcp", "deepfakebench", "wilddeepfake", "df40", "folders", "kaggle", "ntire"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m solution.prepare",
        description="A raw data set of pictures or videos to face crops and a manifest.",
    )
    parser.add_argument("source", type=Path, help="the data set's folder, or a DeepfakeBench JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and the manifest")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto")
    parser.add_argument("--frames", type=whole(1), default=32, help="of each video, evenly spread (default 32)")
    parser.add_argument(
        "--crop",
        type=_crop,
        help="side of the square crop over the face's longer side, or none (default 1.3; none where a data set ships crops)",
    )
    parser.add_argument("--workers", type=whole(), default=cores(), help="processes; 0: one, which reads nothing ahead")
    parser.add_argument(
        "--splits",
        choices=("official", "group", "random"),
        default="official",
        help="the data set's own, where it has them; by person; or by video whoever is on it (default official)",
    )
    parser.add_argument("--seed", type=whole(), default=0, help="of the splits that are dealt (default 0)")
    parser.add_argument("--quality", type=whole(1, 100), default=95, help="of the JPEGs, 1 to 100 (default 95)")
    parser.add_argument("--limit", type=whole(), default=600, help="seconds of one file; 0: none (default 600)")
    parser.add_argument(
        "--restart", action="store_true", help="remove what an earlier run left in --out, and begin anew"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def _crop(text: str) -> float:
    if text == "none":
        return 0.0
    try:
        crop = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a number such as 1.3, or none") from None
    if not 0.5 <= crop <= 10:
        raise argparse.ArgumentTypeError(f"{text!r}: 0.5 to 10, or none")
    return crop


def prepare(args: argparse.Namespace) -> int:
    """The whole of it; the exit code: 0, or 4 when files could not be read.

    Raises:
        LayoutError, PrepareError: a data set or an output folder that does not fit. FaceDetectorMissing, OSError: see there.
    """
    from solution.data import preparing
    from solution.data.cropping import CropSettings
    from solution.data.faces import detector_file
    from solution.data.layouts import find_entries
    from solution.data.splitting import split_entries

    source, out = args.source, args.out
    root = source if source.is_dir() else source.parent
    if root.resolve().is_relative_to(out.resolve()):
        raise preparing.PrepareError(f"--out {out} holds the data set; choose a folder of its own")
    found = find_entries(source, args.layout, leave_out=out)
    ships_crops = found.cropped and not any(entry.kind == "video" for entry in found.entries)
    crop = args.crop if args.crop is not None else 0.0 if ships_crops else 1.3
    settings = CropSettings(args.frames, crop, args.quality)
    if crop:
        detector_file()
    _say_found(found, settings)
    placed, remarks = split_entries(found.entries, args.splits, args.seed, found.passed)
    journal = preparing.Journal(out, preparing.settings_of(source, found.layout, settings), restart=args.restart)
    start = time.perf_counter()
    entries = [entry for entry, _ in placed]
    how = {"workers": args.workers, "limit": args.limit, "progress": not args.quiet}
    preparing.prepare_entries(entries, root, settings, journal, **how)
    wall = time.perf_counter() - start
    rows = preparing.manifest_rows(placed, journal.records)
    preparing.write_manifest(out / preparing.MANIFEST, rows)
    preparing.write_preview(out / preparing.PREVIEW, out, rows)
    report = _report(args, found, settings, placed, journal.records, rows, remarks) | {
        "speed": _speed(journal.fresh, wall)
    }
    _write_report(out / "prepare.json", report)
    _say_done(out, report)
    return FAILURES if report["failed"] or not rows else 0


def _say_found(found: Found, settings: Any) -> None:
    print(f"layout {found.layout}; taken for")
    lines = found.taken()
    print("\n".join(f"  {line}" for line in lines[:40]))
    if len(lines) > 40:
        print(f"  and {len(lines) - 40} folders more (prepare.json has them all)")
    print(f"crop {settings.crop or 'none'}, {settings.frames} frames of a video", flush=True)


def _report(
    args: argparse.Namespace, found: Found, settings: Any, placed: list, records: dict, rows: list, remarks: list[str]
) -> dict[str, Any]:
    """What prepare.json says."""
    from dataclasses import asdict

    from solution.data.preparing import counts

    failed = []
    for entry, _ in placed:
        record = records[entry.name]
        if record.failed:
            failed.append({"file": entry.files[0], "reason": record.failed})
        for reason, count in record.passed.items():
            found.passed.add(reason, entry.name, count)
        if not record.failed and not record.rows:
            found.passed.add("video or picture of which nothing is left", entry.name)
    return {
        "command": shlex.join(["python", "-m", "solution.prepare", *sys.argv[1:]]),
        "layout": found.layout,
        "settings": asdict(settings) | {"splits": args.splits, "seed": args.seed},
        "labels": {"0": "real", "1": "fake"},
        "taken_for": found.taken(),
        "pictures": len(rows),
        "counts": counts(rows),
        "passed_over": found.passed.rows(),
        "failed": failed,
        "remarks": remarks,
    }


def _speed(records: list, wall: float) -> dict[str, Any]:
    """Of what this run did: pictures/s, and where the processors' seconds went (waiting for others or a disk is none)."""
    pictures = sum(len(record.rows) for record in records)
    cpu = {k: round(sum(r.cpu.get(k, 0.0) for r in records), 2) for k in ("decoding", "faces", "writing")}
    return {"pictures": pictures, "wall_s": round(wall, 2), "pictures_per_s": round(pictures / wall, 1), "cpu_s": cpu}


def _write_report(path: Path, report: dict[str, Any]) -> None:
    from solution.data.images import printable

    text = json.dumps(report, indent=2, ensure_ascii=False)
    write_atomically(path, "\n".join(map(printable, text.split("\n"))) + "\n")


def _say_done(out: Path, report: dict[str, Any]) -> None:
    from solution.data.images import printable

    for cell in report["counts"]:
        name = f"{cell['name'].upper()} ({cell['label']}) {cell['generator']}".rstrip()
        masks = f", {cell['masks']} masks" if cell["masks"] else ""
        print(f"  {cell['split'] or '-':5}  {name}: {cell['pictures']} pictures, {cell['videos']} videos{masks}")
    for row in report["passed_over"]:
        print(f"passed over {row['count']}: {row['reason']} (e.g. {row['example']})", file=sys.stderr)
    for row in report["failed"][:20]:
        print(f"failed: {printable(row['file'])}: {row['reason']}", file=sys.stderr)
    if len(report["failed"]) > 20:
        print(f"failed: {len(report['failed']) - 20} more, in prepare.json", file=sys.stderr)
    for remark in report["remarks"]:
        print(f"note: {remark}", file=sys.stderr)
    speed, manifest = report["speed"], out / "manifest.csv"
    print(
        f"{report['pictures']} pictures in {manifest} ({speed['pictures_per_s']} a second); look at {out / 'preview.png'}"
    )


@door("prepare", interrupted="interrupted; the same command goes on from here")
def main(argv: list[str] | None = None) -> int:
    """Prepare; exit codes: 0 done, 2 usage, 3 environment, 4 done with failures, 130 interrupted and resumable."""
    return prepare(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
