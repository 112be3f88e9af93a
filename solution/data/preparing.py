"""Entries of a raw data set through processes to pictures on disk, resumably; and what is told of them afterwards.

Takes `Entry`s and `CropSettings`; gives a `Record` an entry, kept in `prepared.jsonl` as they come. A file that kills the
process that reads it is named and passed over. Then `write_manifest`, `summary` and `write_preview` say what is there.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from solution.data.cropping import Cropper, CropSettings, Record, stamp
from solution.data.degradation import use_one_opencv_thread
from solution.data.images import decode_image, resize_image
from solution.data.processes import Apart, Killed, alone, limit_memory, set_alarm
from solution.data.raw import JOURNAL, WHOLE, Entry
from solution.errors import UsageError
from solution.io import atomic_file

MANIFEST, PREVIEW = "manifest.csv", "preview.png"
COLUMNS = ("path", "label", "source", "split", "generator", "group", "mask", "video")
_CHUNK = 16  # pictures of one job: handing over one at a time costs more than a small picture's decoding


class PrepareError(UsageError):
    """An output folder that does not belong to this run; says what differs and what to do."""


@dataclass(frozen=True)
class Job:
    """What one process does in one go: the entry that others take their place from, and those others or a few pictures."""

    entries: tuple[Entry, ...]
    place: Record | None = None


# ---------------------------------------------------------------------------------------------------- the journal
class Journal:
    """What is done already, a JSON line an entry, in the output folder; its first line says with which settings."""

    def __init__(self, out: Path, settings: dict[str, Any], *, restart: bool) -> None:
        """Raises:
        PrepareError: the folder holds pictures made with other settings, or by something else.
        """
        self.path = out / JOURNAL
        self.records: dict[str, Record] = {}
        self.fresh: list[Record] = []  # of this run
        if self.path.exists() and restart:
            for name in ("images", "masks"):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in (JOURNAL, MANIFEST, PREVIEW, "prepare.json"):
                (out / name).unlink(missing_ok=True)
        if not self.path.exists():
            if taken := [name for name in ("images", "masks", MANIFEST) if (out / name).exists()]:
                raise PrepareError(
                    f"{out} holds {', '.join(taken)} that this command did not make; choose another --out"
                )
            out.mkdir(parents=True, exist_ok=True)
        else:
            self._read(settings)
        with atomic_file(self.path) as file:
            lines = [{"settings": settings}, *(record.to_json() for record in self.records.values())]
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _read(self, settings: dict[str, Any]) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        before = json.loads(lines[0])["settings"] if lines else {}
        if before != settings:
            differ = [
                f"{k} {before.get(k)!r}, now {settings.get(k)!r}" for k in settings if before.get(k) != settings.get(k)
            ]
            raise PrepareError(f"{self.path.parent} was made with {'; '.join(differ)}. --restart makes it anew")
        for number, line in enumerate(lines[1:], start=2):
            try:
                record = Record.from_json(json.loads(line))
            except json.JSONDecodeError:
                # The torn last line of an interrupted run is done again; a torn one before it is damage.
                if number < len(lines):
                    raise PrepareError(f"{self.path}, line {number}: damaged. --restart makes it anew") from None
                continue
            self.records[record.name] = record

    def done(self, root: Path, entry: Entry) -> bool:
        """Whether `entry` needs no second look: it was read, and its files are as they were."""
        record = self.records.get(entry.name)
        return record is not None and not record.failed and record.stamp == stamp(root, entry)

    def add(self, records: Iterable[Record]) -> None:
        """Keep what is finished."""
        with self.path.open("a", encoding="utf-8") as file:
            for record in records:
                self.records[record.name] = record
                self.fresh.append(record)
                file.write(json.dumps(record.to_json()) + "\n")


# ---------------------------------------------------------------------------------------------------- processes
_cropper: Cropper | None = None  # of a worker process
_limit = 0  # seconds, of a worker process
Setup = tuple[Path, Path, CropSettings, int]  # root, output, settings, limit


def prepare_entries(
    entries: Sequence[Entry],
    root: Path,
    settings: CropSettings,
    journal: Journal,
    *,
    workers: int,
    limit: int = 0,
    progress: bool = True,
) -> None:
    """Prepare what `journal` does not have yet, in `workers` processes (0: one, nothing ahead), and keep it in its folder.

    limit: seconds after which a file's process is ended; 0: none.

    Raises:
        FaceDetectorMissing: no face detector here. OSError: the output cannot be written.
    """
    from tqdm import tqdm

    jobs, out = plan_jobs(entries, root, journal), journal.path.parent
    for entry in (entry for job in jobs for entry in job.entries):
        _remove(out, journal.records.get(entry.name))
    total = sum(len(job.entries) for job in jobs)
    with tqdm(total=total, desc="prepare", unit="file", disable=not progress or not total) as bar:
        for records in _run(jobs, (root, out, settings, limit), min(workers, len(jobs))):
            journal.add(records)
            bar.update(len(records))


def plan_jobs(entries: Sequence[Entry], root: Path, journal: Journal) -> list[Job]:
    """Jobs of what is not done: a real video before the fakes that take its place, pictures a few at a time."""
    waiting = {entry.name for entry in entries if not journal.done(root, entry)}
    # A pair is cut at one place: where the real video is new, its fakes are too.
    todo = [entry for entry in entries if entry.name in waiting or entry.place in waiting]
    families: dict[str, list[Entry]] = defaultdict(list)
    singles: list[Entry] = []
    for entry in todo:
        if entry.kind == "picture" and not entry.place:
            singles.append(entry)
        else:
            families[entry.place or entry.name].append(entry)
    jobs = []
    for name, members in sorted(families.items()):
        members.sort(key=lambda entry: entry.name != name)
        place = None if name in waiting else journal.records.get(name)
        jobs.append(Job(tuple(members), place))
    jobs += [Job(tuple(singles[at : at + _CHUNK])) for at in range(0, len(singles), _CHUNK)]
    return jobs


def _remove(out: Path, record: Record | None) -> None:
    """What was made of a file that has changed since."""
    for _, *names in record.rows if record else ():
        for name in names:
            if name not in ("", WHOLE):
                (out / name).unlink(missing_ok=True)


def _start(root: Path, out: Path, settings: CropSettings, limit: int) -> None:
    global _cropper, _limit
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    use_one_opencv_thread()
    limit_memory()
    _cropper, _limit = Cropper(root, out, settings), limit


def _work(job: Job) -> list[Record]:
    assert _cropper is not None
    known = {} if job.place is None else {job.place.name: job.place}
    records = []
    for entry in job.entries:
        set_alarm(_limit)
        record = _cropper.prepare(entry, known.get(entry.place))
        known[entry.name] = record
        records.append(record)
    set_alarm(0)
    return records


def _run(jobs: Sequence[Job], setup: Setup, workers: int) -> Iterator[list[Record]]:
    if workers < 1:
        use_one_opencv_thread()  # a forked process would inherit more, and hang
        with Apart(_work, start=partial(_start, *setup)) as apart:
            for job in jobs:
                try:
                    yield apart(job)
                except Killed:
                    yield _one_by_one(job, setup)
        return
    rest = list(reversed(jobs))
    pending: dict[Future, Job] = {}
    pool = _pool(setup, workers)
    try:
        while rest or pending:
            while rest and len(pending) < 2 * workers:
                job = rest.pop()
                pending[pool.submit(_work, job)] = job
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                if isinstance(future.exception(), BrokenProcessPool):
                    break
                del pending[future]
                yield future.result()
            else:
                continue
            # One of these killed its process: each again, alone.
            for job in pending.values():
                yield _one_by_one(job, setup)
            pending.clear()
            pool.shutdown(wait=True, cancel_futures=True)
            pool = _pool(setup, workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _context() -> Any:
    # A fork of this process would inherit OpenCV's threads and hang; a server imports once and forks clean children.
    kinds = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    if "forkserver" in kinds:
        context.set_forkserver_preload(["solution.data.cropping"])
    return context


def _pool(setup: Setup, workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, _context(), initializer=_start, initargs=setup)


def _one_by_one(job: Job, setup: Setup) -> list[Record]:
    known = {} if job.place is None else {job.place.name: job.place}
    records = []
    for entry in job.entries:
        try:
            record = alone(_prepare_one, setup, entry, known.get(entry.place), seconds=setup[3], context=_context())
        except Killed as error:
            record = Record(entry.name, stamp(setup[0], entry), failed=str(error))
        known[entry.name] = record
        records.append(record)
    return records


def _prepare_one(setup: Setup, entry: Entry, place: Record | None) -> Record:
    use_one_opencv_thread()
    return Cropper(*setup[:3]).prepare(entry, place)


# ---------------------------------------------------------------------------------------------------- what is told
def manifest_rows(placed: Sequence[tuple[Entry, str]], records: dict[str, Record]) -> list[dict[str, Any]]:
    """The manifest's rows (see `COLUMNS`) of entries with their split and group, from what was written of them."""
    rows = []
    for entry, group in placed:
        record = records.get(entry.name)
        for _, picture, mask in () if record is None or record.failed else record.rows:
            video = "" if entry.kind == "picture" else entry.name
            values = (picture, entry.label, entry.source, entry.split, entry.generator, group, mask, video)
            rows.append(dict(zip(COLUMNS, values)))
    return rows


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as CSV, whole or not at all."""
    with atomic_file(path) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in row.items()}
            )


def counts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pictures, videos and masks by split, label and generator, one dictionary each."""
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["split"], row["label"], row["generator"]].append(row)
    return [
        {
            "split": split,
            "label": label,
            "name": ("real", "fake")[label],
            "generator": generator,
            "pictures": len(group),
            "videos": len({row["video"] for row in group if row["video"]}),
            "masks": sum(bool(row["mask"]) for row in group),
        }
        for (split, label, generator), group in sorted(cells.items())
    ]


def settings_of(root: Path, layout: str, settings: CropSettings) -> dict[str, Any]:
    """What must be equal for a run to go on: it decides the pictures."""
    return {"source": str(root.resolve()), "layout": layout} | asdict(settings)


# ---------------------------------------------------------------------------------------------------- a sheet to look at
_TILE, _ACROSS, _MOST_ROWS, _CAPTION = 128, 8, 24, 16
_INK = {0: (0, 130, 60), 1: (200, 30, 30)}  # green and red


def write_preview(path: Path, out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A sheet of the prepared pictures, a line a label and generator, with the label printed on each; masks outlined."""
    lines: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        lines[row["label"], row["generator"]].append(row)
    shown = sorted(lines.items())[:_MOST_ROWS]
    height = _CAPTION + len(shown) * (_TILE + 2 * _CAPTION)
    sheet = Image.new("RGB", (_ACROSS * _TILE, height), "white")
    pen = ImageDraw.Draw(sheet)
    more = f"; {len(lines) - len(shown)} more generators not shown" if len(lines) > len(shown) else ""
    pen.text((4, 2), f"label 0 = REAL, label 1 = FAKE; red outline: forgery mask{more}", fill="black")
    for line, ((label, generator), group) in enumerate(shown):
        top = _CAPTION + line * (_TILE + 2 * _CAPTION)
        title = f"{('REAL (0)', 'FAKE (1)')[label]} {generator}  {len(group)} pictures".encode(
            "ascii", "replace"
        ).decode()
        pen.text((4, top + 2), title, fill=_INK[label])
        places = np.unique(np.linspace(0, len(group) - 1, _ACROSS).astype(int))
        for across, place in enumerate(places):
            _tile(sheet, pen, out, group[place], across * _TILE, top + _CAPTION)
    with atomic_file(path, binary=True) as file:
        sheet.save(file, "PNG")


def _tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, out: Path, row: dict[str, Any], left: int, top: int) -> None:
    image = decode_image(out / row["path"])
    scale = _TILE / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    image = np.ascontiguousarray(resize_image(image, *size))
    if row["mask"] not in ("", WHOLE):
        mask = resize_image(decode_image(out / row["mask"])[:, :, 0], *size)
        outline, _ = cv2.findContours((mask > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(image, outline, -1, (255, 0, 0), 1)
    sheet.paste(Image.fromarray(image), (left, top))
    word = f"{('REAL', 'FAKE')[row['label']]} {row['split']}"
    pen.text((left + 2, top + _TILE + 2), word, fill=_INK[row["label"]])
