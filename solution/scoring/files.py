"""Write, re-read and check CSV, `submission.txt` and the challenge zip, atomically.

Takes rows (name, P(fake)) and paths, and knows no pixels. Files it writes: PREDS.csv (`image,score`), PREDS.txt (the
challenge's `submission.txt`: one value a line in name order), PREDS.zip (exactly that one member), and beside them
PREDS.members.csv (the sidecar, see `sidecar_columns`) and PREDS.run.json.

    python -m solution.scoring.files merge PART.csv ... --out preds.csv    # the parts of `submit.py --shard i/n`
    python -m solution.scoring.files check preds.zip --count 1000
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import secrets
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from solution.errors import UsageError, door
from solution.io import atomic_file, write_atomically

FORMATS = (".csv", ".txt", ".zip")
MEMBER_NAME = "submission.txt"  # the challenge's name for the zip's only member
STATUSES = ("ok", "failed")
TRACK_COLUMNS = ("frames", "first_frame", "last_frame", "score_sd", "share_fake")  # of a `Track`
VERDICTS = ("fake", "real", "unsure", "no_face", "failed")
# Of run.json's `scoring`: what may differ between the machines that score one listing. It changes scores by rounding alone,
# or not at all (where the input lies).
OF_THE_MACHINE = {"input", "device", "batch", "compiled", "merged", "torch"}


class SubmissionError(UsageError):
    """A file of scores that cannot be written, read or accepted: names it, what was found and what was expected."""


class Track(NamedTuple):
    """One person's face through a video: frames it was scored in, the first's and the last's number, the standard
    deviation of its scores, and the share of them at or above the threshold.
    """

    frames: int
    first: int
    last: int
    deviation: float
    share_fake: float


class SidecarRow(NamedTuple):
    """One line of the sidecar: a picture, a video, or a video's frame (`frame` is its number, else None).

    face: (x0, y0, x1, y1, score, ...) px, a `FaceBox`, or None. p_fake, level: by member; empty for what failed.
    verdict: one of `VERDICTS`. who: the number of a face or a track, None on the row of a whole input. track: on the row
    of a track.
    """

    image: str
    status: str
    error: str
    face: Sequence[Any] | None
    p_fake: Mapping[str, float]
    level: Mapping[str, float]
    score: float
    verdict: str
    frame: int | None = None
    who: int | None = None
    track: Track | None = None


class Summary(NamedTuple):
    """What `check_submission` found."""

    count: int
    lowest: float
    highest: float
    distinct: int


# ---------------------------------------------------------------------------------------------------- files
def ensure_writable(path: Path | str) -> None:
    """Make sure before any work that a file can be written at `path`: it writes and removes an empty one beside it.

    Raises:
        SubmissionError: no such folder, no right to write in it, a full or read-only disk, `path` is no regular file.
    """
    path = Path(path)
    folder = Path(os.path.realpath(path)).parent
    probe = folder / f".writing-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        if path.exists():
            if not path.is_file():
                raise SubmissionError(f"{path} is there and is not a regular file")
            open(path, "ab").close()
        if folder.exists() and not folder.is_dir():
            raise SubmissionError(f"{path} cannot be written: {folder} is there and is no folder")
        if not folder.is_dir():
            raise SubmissionError(f"{path} cannot be written: there is no folder {folder}; create it first")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise SubmissionError(f"{path} cannot be written: {error.strerror or error}") from None


def score_format(path: Path | str) -> str:
    """`.csv`, `.txt` or `.zip`, by the suffix of an output.

    Raises:
        SubmissionError: another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise SubmissionError(f"{path}: suffix {suffix!r}; scores are written as {', '.join(FORMATS)}")
    return suffix


def members_path(out: Path | str) -> Path:
    """preds.csv -> preds.members.csv, in the same folder."""
    return Path(out).with_suffix(".members.csv")


def run_path(out: Path | str) -> Path:
    """preds.csv -> preds.run.json, in the same folder."""
    return Path(out).with_suffix(".run.json")


def read_run(out: Path | str) -> dict[str, Any]:
    """What PREDS.run.json says of the scores in `out`; empty when it is not there.

    Raises:
        SubmissionError: a file that cannot be read or is no such record.
    """
    path = run_path(out)
    if not path.is_file():
        return {}
    try:
        run = json.loads(_decoded(path, _read(path)))
    except json.JSONDecodeError as error:
        raise SubmissionError(f"{path}: not JSON ({error})") from None
    if not isinstance(run, dict):
        raise SubmissionError(f"{path}: expected an object, found {run!r}")
    for key in ("scoring", "listing"):
        if not isinstance(run.get(key, {}), dict):
            raise SubmissionError(f"{path}: expected an object as {key!r}, found {run[key]!r}")
    return run


def listing_record(names: Iterable[str]) -> dict[str, Any]:
    """How many inputs a run lists, and a SHA-256 of their names, given in order: what its shards must have in common."""
    digest, count = hashlib.sha256(), 0
    for name in names:
        digest.update(name.encode() + b"\0")
        count += 1
    return {"inputs": count, "sha256": digest.hexdigest()}


# ---------------------------------------------------------------------------------------------------- scores
def write_scores(rows: Iterable[tuple[str, float]], out: Path | str, decimals: int = 6) -> None:
    """Write (name, P(fake)) rows to `out`: `.csv` in the order given, `.txt` and `.zip` in name order.

    The same rows give the same bytes, the zip's too.

    Raises:
        SubmissionError: a suffix not in `FORMATS`, a name twice, a score that is no number in [0, 1], a name with a
            carriage return (`find_inputs` gives none), which CSV readers disagree on.
        OSError: the disk says no; `out` is then as it was.
    """
    kind = score_format(out)
    checked = _checked(rows, out)
    if kind == ".csv":
        with atomic_file(out) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("image", "score"))
            writer.writerows((name, f"{p:.{decimals}f}") for name, p in checked)
        return
    text = "".join(f"{p:.{decimals}f}\n" for _, p in sorted(checked))
    write_atomically(out, text if kind == ".txt" else _zipped(text))


def _checked(rows: Iterable[tuple[str, float]], out: Path | str) -> Iterator[tuple[str, float]]:
    seen = set()
    for name, p in rows:
        if name in seen:
            raise SubmissionError(f"{out}: {name!r} comes twice; every picture has one row")
        if not 0 <= p <= 1:  # NaN too
            raise SubmissionError(f"{out}: the score of {name!r} is {p}; expected 0 to 1")
        if "\r" in name:
            raise SubmissionError(f"{out}: {name!r} holds a carriage return")
        seen.add(name)
        yield name, p + 0.0  # no "-0.0"


def _zipped(text: str) -> bytes:
    member = zipfile.ZipInfo(MEMBER_NAME, date_time=(1980, 1, 1, 0, 0, 0))
    member.create_system, member.external_attr = 3, 0o644 << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(member, text)
    return packed.getvalue()


def read_scores(path: Path | str) -> dict[str, float]:
    """Name -> P(fake), in file order. A `.txt` or `.zip` holds no names: they read as "line 1", "line 2", ...

    Raises:
        SubmissionError: no such file, another format, another header, a name twice, a value that is no number in
            [0, 1], a zip with anything but exactly one `submission.txt`.
    """
    scores: dict[str, float] = {}
    for where, name, text in _read_rows(Path(path)):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise SubmissionError(f"{path}, {where}: expected a number from 0 to 1, found {text!r}")
        if name in scores:
            raise SubmissionError(f"{path}, {where}: {name!r} comes twice")
        scores[name] = value
    return scores


def _read_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where it stands, name, value as written) of each row."""
    kind = score_format(path)
    if kind != ".csv":
        content = _read(path)
        text = _unzipped(path, content) if kind == ".zip" else _decoded(path, content)
        for number, line in enumerate(text.splitlines(), start=1):
            yield f"line {number}", f"line {number}", line
        return
    reader = csv.reader(io.StringIO(_decoded(path, _read(path)), newline=""))
    header = next(reader, [])
    if header != ["image", "score"]:
        raise SubmissionError(f"{path}: expected the header image,score, found {','.join(header)!r}")
    for row in reader:
        where = f"line {reader.line_num}"
        if len(row) != 2:
            raise SubmissionError(f"{path}, {where}: expected two columns, found {len(row)}")
        yield where, row[0], row[1]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SubmissionError(f"{path}: {error.strerror or error}") from None


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SubmissionError(f"{path}: not UTF-8 text ({error})") from None


def _unzipped(path: Path, content: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            if names != [MEMBER_NAME]:
                raise SubmissionError(f"{path}: expected exactly one member {MEMBER_NAME}, found {names}")
            return _decoded(path, archive.read(MEMBER_NAME))
    except zipfile.BadZipFile as error:
        raise SubmissionError(f"{path}: not a sound zip ({error})") from None


def check_submission(path: Path | str, expected_count: int | None = None) -> Summary:
    """Read a submission back as the challenge would and say what is in it.

    Raises:
        SubmissionError: what `read_scores` refuses, no scores at all, or not `expected_count` of them.
    """
    values = list(read_scores(path).values())
    if not values:
        raise SubmissionError(f"{path}: no scores in it")
    if expected_count is not None and len(values) != expected_count:
        raise SubmissionError(f"{path}: {len(values)} scores; expected {expected_count}")
    return Summary(len(values), min(values), max(values), len(set(values)))


def order_warning(names: Iterable[str]) -> str | None:
    """A warning when name order and numeric order differ (10.png before 9.png), else None."""
    previous, before = "", []
    for name in sorted(names):
        key = _numeric(name)
        if key < before:
            return (
                f"name order is not numeric order: {previous!r} comes before {name!r}; "
                "submission.txt has no names and follows name order"
            )
        previous, before = name, key
    return None


def _numeric(name: str) -> list[tuple[str, int]]:
    """A sort key that differs from name order only in taking a run of digits for its number."""
    return [("0", int(run)) if run[0] in "0123456789" else (run, 0) for run in re.findall("[0-9]+|[^0-9]", name)]


# ---------------------------------------------------------------------------------------------------- sidecar
def sidecar_columns(members: Sequence[str], *, frames: bool = False, people: bool = False) -> list[str]:
    """The sidecar's header: image, status (`ok` or `failed`), error, the chosen face's box in px and its score, then
    NAME_p and NAME_level of each member, then score and verdict (one of `VERDICTS`).

    frames: the run has videos: a column `frame` follows `image`, empty on the row of a picture or of a whole video.
    people: all faces were scored: a column `face` follows `image`, the number of a face in its picture or of a track in
    its video, empty on the row of the whole input; and the columns `TRACK_COLUMNS` end the row, filled for tracks.
    """
    return [
        "image",
        *(["face"] if people else []),
        *(["frame"] if frames else []),
        *("status", "error", "face_x0", "face_y0", "face_x1", "face_y1", "face_score"),
        *(f"{name}_{what}" for name in members for what in ("p", "level")),
        "score",
        "verdict",
        *(TRACK_COLUMNS if people else ()),
    ]


def write_sidecar(
    rows: Iterable[SidecarRow],
    out: Path | str,
    members: Sequence[str],
    *,
    decimals: int = 6,
    frames: bool = False,
    people: bool = False,
) -> None:
    """Write `rows`, as they come, to `out` (see `members_path`), whole or not at all.

    Raises:
        SubmissionError: a status not in `STATUSES`, a verdict not in `VERDICTS`, a frame's row although `frames` is
            False, or a face's although `people` is.
    """
    with atomic_file(out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(sidecar_columns(members, frames=frames, people=people))
        for row in rows:
            for what, found, allowed in (("status", row.status, STATUSES), ("verdict", row.verdict, VERDICTS)):
                if found not in allowed:
                    raise SubmissionError(
                        f"{out}: {row.image!r} has {what} {found!r}; expected one of {', '.join(allowed)}"
                    )
            if row.frame is not None and not frames:
                raise SubmissionError(f"{out}: {row.image!r} has frames; pass frames=True")
            if row.who is not None and not people:
                raise SubmissionError(f"{out}: {row.image!r} has faces; pass people=True")
            writer.writerow(_cells(row, members, decimals, frames=frames, people=people))


def _cells(row: SidecarRow, members: Sequence[str], decimals: int, *, frames: bool, people: bool) -> Iterator[Any]:
    yield row.image
    if people:
        yield "" if row.who is None else row.who
    if frames:
        yield "" if row.frame is None else row.frame
    yield row.status
    yield " ".join(row.error.replace("\0", " ").split())  # one line
    if row.face is None:
        yield from [""] * 5
    else:
        yield from (f"{value:.1f}" for value in row.face[:4])
        yield f"{row.face[4]:.4f}"
    for name in members:
        yield f"{row.p_fake[name]:.{decimals}f}" if name in row.p_fake else ""
        yield f"{row.level[name]:g}" if name in row.level else ""
    yield f"{row.score:.{decimals}f}"
    yield row.verdict
    if people and row.track is None:
        yield from [""] * len(TRACK_COLUMNS)
    elif people:
        yield from row.track[:3]
        yield from (f"{value:.{decimals}f}" for value in row.track[3:])


# ---------------------------------------------------------------------------------------------------- merging
def merge(parts: Sequence[Path], out: Path) -> int | None:
    """Merge the parts of a sharded run into `out`, in name order, with their sidecars when every part has one.

    A part's run.json may say `"shard": "i/n"` (1 <= i <= n): then all must, all n must be there once, of one listing, and
    together they must have a row for each of its inputs. Parts whose run.json name different `weights`, or whose `scoring`
    differs in more than `OF_THE_MACHINE`, are refused too. The merged run.json holds the parts' own.

    Returns:
        how many rows the sidecars call failed; None when a part has no sidecar, so that nobody knows.

    Raises:
        SubmissionError: a missing or repeated shard, shards of different listings, inputs without a row, a picture in two
            parts, different weights or options, an unreadable part.
    """
    score_format(out)
    for path in (out, members_path(out), run_path(out)):
        ensure_writable(path)
    runs = {str(part): read_run(part) for part in parts}
    _check_scoring(runs)
    listing = _check_shards(runs)
    scores: dict[str, str] = {}
    for part in parts:
        read_scores(part)  # every value is sound
        for where, name, text in _read_rows(_named(part)):
            if name in scores:
                raise SubmissionError(f"{part}, {where}: {name!r} is in another part too")
            scores[name] = text
    if listing and listing_record(sorted(scores)) != listing:
        raise SubmissionError(
            f"{', '.join(runs)}: {len(scores)} rows, which are not those of the {listing.get('inputs')} inputs that run.json "
            "counts; score all shards again"
        )
    decimals = max((len(t.partition(".")[2]) for t in scores.values()), default=6)
    sidecars = [members_path(part) for part in parts]
    failed = None
    if all(path.is_file() for path in sidecars):
        failed = _merge_sidecars(sidecars, members_path(out))
    if any(runs.values()):
        record = {"merged": runs}
        write_atomically(run_path(out), json.dumps(record, indent=1) + "\n")
    write_scores(((name, float(scores[name])) for name in sorted(scores)), out, decimals)
    return failed


def _named(part: Path) -> Path:
    if score_format(part) != ".csv":
        raise SubmissionError(f"{part}: parts are joined by name; expected a .csv, which has names")
    return part


def _check_scoring(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse parts of different weights, or scored with different options."""
    weights = {json.dumps(run["weights"], sort_keys=True) for run in runs.values() if "weights" in run}
    if len(weights) > 1:
        raise SubmissionError(
            f"the parts {', '.join(runs)} were scored with different weights; score them again with the same"
        )
    told = {part: run["scoring"] for part, run in runs.items() if "scoring" in run}
    first = next(iter(told), "")
    for part, scoring in told.items():
        for key in sorted((scoring | told[first]).keys() - OF_THE_MACHINE):
            if scoring.get(key) != told[first].get(key):
                raise SubmissionError(
                    f"{first} and {part} were scored differently: {key} is {told[first].get(key)!r} in one and "
                    f"{scoring.get(key)!r} in the other; score them again with the same options"
                )


def _check_shards(runs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Refuse shards that are not all there, or of different listings; the `listing_record` of all, empty if unknown."""
    shards = {part: run.get("shard") for part, run in runs.items()}
    if not any(shards.values()):
        return {}
    found: dict[int, str] = {}
    total = 0
    for part, shard in shards.items():
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", str(shard))
        if match is None:
            raise SubmissionError(f'{run_path(part)}: expected "shard": "i/n" as in the other parts, found {shard!r}')
        index, count = int(match[1]), int(match[2])
        if total and count != total:
            raise SubmissionError(f"{part} is shard {shard}, another part is one of {total}")
        if index in found:
            raise SubmissionError(f"{part} and {found[index]} are both shard {shard}")
        found[index], total = part, count
    missing = [f"{i}/{total}" for i in range(1, total + 1) if i not in found]
    if missing:
        raise SubmissionError(f"shard {', '.join(missing)} is missing; name all {total} parts")
    listings = {part: run.get("listing", {}) for part, run in runs.items()}
    first, listing = next(iter(listings.items()))
    for part, other in listings.items():
        if other != listing:
            raise SubmissionError(
                f"{first} and {part} are shards of different listings, of {listing.get('inputs', 'unknown')} and "
                f"{other.get('inputs', 'unknown')} inputs; score them again with an --input that holds the same files "
                "everywhere"
            )
    return listing


def _merge_sidecars(paths: Sequence[Path], out: Path) -> int:
    """The rows of several sidecars in name order, a video's rows as they stand; returns how many failed."""
    header: list[str] = []
    rows = []
    for path in paths:
        reader = csv.DictReader(io.StringIO(_decoded(path, _read(path)), newline=""))
        columns = list(reader.fieldnames or ())
        if header and not set(columns) ^ set(header) <= {"frame"}:
            raise SubmissionError(f"{path}: columns {','.join(columns)}; expected {','.join(header)}")
        header = max(header, columns, key=len)
        rows += list(reader)
    rows.sort(key=lambda row: row["image"])  # stable: frames keep their order
    with atomic_file(out) as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return sum(row["status"] == "failed" for row in rows)


# ---------------------------------------------------------------------------------------------------- entry
@door("files")
def main(argv: Sequence[str] | None = None) -> int:
    """Entry. Returns 0 done, 2 a file that is refused, 4 merged but with rows that failed when they were scored.

    Without sidecars nobody knows of such rows: 0, and the line says so.
    """
    parser = argparse.ArgumentParser(prog="python -m solution.scoring.files")
    commands = parser.add_subparsers(dest="command", required=True)
    joining = commands.add_parser("merge", help="join the parts of a sharded run")
    joining.add_argument("parts", nargs="+", type=Path, metavar="PART.csv")
    joining.add_argument("--out", type=Path, required=True, help=f"{', '.join(FORMATS)}")
    checking = commands.add_parser("check", help="read a submission as the judges do")
    checking.add_argument("file", type=Path)
    checking.add_argument("--count", type=int, help="how many scores are expected")
    given = parser.parse_args(argv)
    if given.command == "merge":
        failed = merge(given.parts, given.out)
        found = check_submission(given.out)
        unknown = [str(members_path(part)) for part in given.parts if not members_path(part).is_file()]
        told = f"; how many of them failed is unknown: there is no {', '.join(unknown)}" if failed is None else ""
        print(f"{given.out}: {found.count} scores from {len(given.parts)} parts{told}")
        if failed:
            print(f"{failed} rows failed when scored, see their error", end=" ")
            print(f"in {members_path(given.out)}")
        return 4 if failed else 0
    found = check_submission(given.file, given.count)
    print(f"{given.file}: {found.count} scores, {found.lowest:g} to {found.highest:g}, {found.distinct} distinct")
    return 0


if __name__ == "__main__":
    sys.exit(main())
