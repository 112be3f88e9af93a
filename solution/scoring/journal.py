"""A run's journal: scores appended as they come, so that the same command goes on where it was stopped.

Takes and returns `Scored` rows. PREDS.journal.jsonl holds a header line and then one line a batch, whole or not at all
(a torn last line is dropped); every rank of a run has its own. Rows count only under the header that they were made
with, and only while the input's size and time of change are the same. The journal stays after the run: a later run
scores only what is new, changed, or failed before.
"""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solution.data.images import Inputs

FORMAT = 2  # 2: how many faces were found
SYNC_SECONDS = 5.0  # between two fsyncs; what is written survives kill -9 without one


class Scored(NamedTuple):
    """One input's outcome.

    index: its place in the listing. size, mtime: bytes and ns, as they were before it was read (-1: no such file).
    error: empty, or why it could not be read; the fields that follow are then empty.
    frames: numbers of a video's frames, empty for a picture. faces: per frame (a picture is one) a `FaceBox`'s box and
    score, or None. logits: by member, one raw logit per frame.
    found: faces of any size in the picture, or at most in one frame; -1 where nobody looked for faces.
    people: where all faces were scored and there are any, whose each logit is: numbers from 1, the number of a face in
    the picture or of a track in the video. `frames`, `faces` and `logits` then have an entry per face and frame.
    """

    index: int
    name: str
    size: int
    mtime: int
    error: str = ""
    frames: Sequence[int] = ()
    faces: Sequence[Sequence[float] | None] = ()
    logits: Mapping[str, Sequence[float]] | None = None
    found: int = -1
    people: Sequence[int] = ()


def journal_path(out: Path | str, rank: int = 0) -> Path:
    """preds.csv -> preds.journal.jsonl; of another rank than 0, preds.journal.RANK.jsonl."""
    return Path(out).with_suffix(f".journal.{rank}.jsonl" if rank else ".journal.jsonl")


def stamp(path: Path | str) -> tuple[int, int]:
    """(size in bytes, time of change in ns) of a file, (-1, -1) when it cannot be seen."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


class Journal:
    """The scored part of a run over `inputs`, on disk; in memory 12 bytes an input.

    out: the run's output; the journals lie beside it. header: what scores depend on; other journals do not count.
    rank: whose journal is written. restart: take nothing up. `discarded` says why an existing journal was not used.
    """

    def __init__(
        self,
        out: Path | str,
        inputs: Inputs,
        header: dict[str, Any],
        *,
        rank: int = 0,
        restart: bool = False,
    ) -> None:
        self.inputs, self.rank = inputs, rank
        self.header = {"journal": FORMAT, **header}
        self.path = journal_path(out, rank)
        self.discarded = ""
        self._out = Path(out)
        self._file = np.full(len(inputs), -1, np.int32)  # whose journal, by rank
        self._offset = np.zeros(len(inputs), np.int64)  # of the line in it
        self._read_to: dict[int, int] = {}  # rank -> offset behind its last whole line
        self._line: tuple[int, int, dict[str, list[Any]]] = (-1, -1, {})
        if not restart:
            for other in self._ranks():
                self._take_up(other, check=True)
        self._open()
        self._synced = time.monotonic()

    # -- writing
    def _open(self) -> None:
        """Open this rank's journal at the end of what was taken up, or anew."""
        whole = self._read_to.get(self.rank, 0)
        how = "r+b" if whole else "wb"
        self._stream = open(self.path, how, buffering=0)  # noqa: SIM115 (see close)
        self._stream.truncate(whole)
        self._stream.seek(whole)
        if not whole:
            self._write(self.header)

    def _write(self, record: Any) -> int:
        """Append a line in one write; its offset."""
        line = json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n"
        offset = self._stream.tell()
        written = self._stream.write(line.encode())
        if written != len(line):
            raise OSError(28, "No space left on device", str(self.path))
        self._read_to[self.rank] = offset + written
        return offset

    def append(self, rows: Sequence[Scored]) -> None:
        """Write the rows of one batch, whole or not at all."""
        offset = self._write(rows)
        for row in rows:
            self._file[row.index], self._offset[row.index] = self.rank, offset
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Bring everything to disk."""
        if not self._stream.closed:
            os.fsync(self._stream.fileno())
            self._stream.close()

    # -- reading
    def _ranks(self) -> list[int]:
        """Ranks whose journal is there."""
        stem = self._out.with_suffix("").name + ".journal."
        found = []
        for path in self._out.parent.glob(f"{glob.escape(stem)}*jsonl"):
            middle = path.name[len(stem) :].removesuffix("jsonl").rstrip(".")
            if middle == "" or middle.isdigit():
                found.append(int(middle or 0))
        return sorted(set(found))

    def _take_up(self, rank: int, *, check: bool) -> None:
        """Note the rows of a rank's journal from where it was last read.

        check: only rows whose input is unchanged and that did not fail.
        """
        path = journal_path(self._out, rank)
        start = self._read_to.get(rank, 0)
        with open(path, "rb") as file:
            first = file.readline()
            reason = self._mismatch(first)
            if reason:
                self.discarded = self.discarded or f"{path}: {reason}"
                return
            file.seek(start or len(first))
            offset, places = file.tell(), _Places(self.inputs)
            for line in file:
                try:
                    rows = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    rows = None
                if rows is None:  # torn: nothing from here on counts
                    break
                for row in rows:
                    self._note(Scored(*row), rank, offset, check, places)
                offset += len(line)
        self._read_to[rank] = offset

    def _note(self, row: Scored, rank: int, offset: int, check: bool, places: _Places) -> None:
        index = places.of(row)
        if index is None:
            return
        usable = not check or (not row.error and (row.size, row.mtime) == stamp(self.inputs[index].path))
        if usable:
            self._file[index], self._offset[index] = rank, offset

    def _mismatch(self, first: bytes) -> str:
        """Why a journal with this first line does not belong to this run; empty when it does."""
        try:
            found = json.loads(first)
        except ValueError:
            return "no header in it"
        if not isinstance(found, dict):
            return "no header in it"
        wanted = json.loads(json.dumps(self.header))
        different = [k for k in wanted | found if wanted.get(k) != found.get(k)]
        return f"made with another {', '.join(different)}" if different else ""

    def gather(self, ranks: int) -> None:
        """Note what the other ranks of this run have written by now."""
        for rank in range(ranks):
            if rank != self.rank and journal_path(self._out, rank).is_file():
                self._take_up(rank, check=False)

    @property
    def done(self) -> np.ndarray:
        """(N,) bool: which inputs have a row."""
        return self._file >= 0

    def rows(self, indices: Sequence[int]) -> Iterator[Scored]:
        """The rows of these inputs, all of which must be done, read from disk a line at a time."""
        streams: dict[int, Any] = {}
        with ExitStack() as stack:
            for index in indices:
                rank, offset = int(self._file[index]), int(self._offset[index])
                if rank not in streams:
                    path = journal_path(self._out, rank)
                    streams[rank] = stack.enter_context(open(path, "rb"))
                row = self._row(streams[rank], rank, offset, self.inputs[index].name)
                yield row._replace(index=int(index))

    def _row(self, stream: Any, rank: int, offset: int, name: str) -> Scored:
        if self._line[:2] != (rank, offset):
            stream.seek(offset)
            rows = {row[1]: row for row in json.loads(stream.readline())}
            self._line = (rank, offset, rows)
        return Scored(*self._line[2][name])


class _Places:
    """A row's place in today's listing: where it stood, if the same name stands there, else by name."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.by_name: dict[str, int] | None = None

    def of(self, row: Scored) -> int | None:
        if row.index < len(self.inputs) and self.inputs[row.index].name == row.name:
            return row.index
        if self.by_name is None:
            self.by_name = {item.name: i for i, item in enumerate(self.inputs)}
        return self.by_name.get(row.name)
