"""A run's journal: scores appended as they come, so that the same command goes on where it was stopped.

Takes and returns `Scored` rows. PREDS.journal.jsonl holds a header line and then one line a batch, whole or not at all
(a torn last line is dropped); every rank of a run has its own, and holds it alone while it runs. Rows count only under
the header that they were made with, and only while the input is the same file (`io.stamp`). The journal stays after the
run: a later run scores only what is new, changed, or failed before. One under another header is kept beside it, as
PREDS.journal.old.jsonl.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from solution.data.images import Inputs
from solution.errors import KitError
from solution.io import stamp

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing is locked
    fcntl = None

FORMAT = 3  # 3: the time of a file's last change of any kind
SYNC_SECONDS = 5.0  # between two fsyncs; what is written survives kill -9 without one
# The wings whose code makes a logit of a picture (see `io.source_hash`): what another code made is scored again.
SCORING = ("data", "models", "bundles", "scoring")


class Scored(NamedTuple):
    """One input's outcome.

    index: its place in the listing. size, mtime, ctime: its `io.stamp` before it was read.
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
    ctime: int
    error: str = ""
    frames: Sequence[int] = ()
    faces: Sequence[Sequence[float] | None] = ()
    logits: Mapping[str, Sequence[float]] | None = None
    found: int = -1
    people: Sequence[int] = ()


def journal_path(out: Path | str, rank: int = 0) -> Path:
    """preds.csv -> preds.journal.jsonl; of another rank than 0, preds.journal.RANK.jsonl."""
    return Path(out).with_suffix(f".journal.{rank}.jsonl" if rank else ".journal.jsonl")


class Journal:
    """The scored part of a run over `inputs`, on disk; in memory 12 bytes an input. To be closed; until then no other run
    can open it.

    out: the run's output; the journals lie beside it. header: what scores depend on; other journals do not count.
    rank: whose journal is written, of `ranks`; rank 0 also sees to journals that higher ranks of an earlier run left.
    restart: take nothing up, and empty what is there. `discarded` says why an existing journal was not used, and where it
    is kept.

    Raises:
        KitError: another run writes this journal.
    """

    def __init__(
        self,
        out: Path | str,
        inputs: Inputs,
        header: dict[str, Any],
        *,
        rank: int = 0,
        ranks: int = 1,
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
        self._stream = self._locked()
        for other in self._ranks():
            different = "" if restart else self._take_up(other, check=True)
            if other == rank or (rank == 0 and other >= ranks):
                self._clear(other, different, restart)
        self._begin()
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- writing
    def _locked(self) -> Any:
        """This rank's journal, made if need be, open at its end, and nobody else's until it is closed."""
        stream = open(self.path, "ab", buffering=0)  # noqa: SIM115 (see close)
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.close()
                raise KitError(
                    f"{self.path}: another run writes it; wait for that one to end, or choose another --out"
                ) from None
            except OSError:  # a file system without locks
                pass
        _OPEN.add(self)
        return stream

    def _clear(self, rank: int, different: str, restart: bool) -> None:
        """Do away with a rank's journal on a restart, and with one that is another run's (different: how) once a copy of
        it is kept. This rank's own is emptied by `_begin`.
        """
        path = journal_path(self._out, rank)
        if different:
            kept = _unused(path)
            shutil.copyfile(path, kept)
            self.discarded = self.discarded or f"{path}: {different}; kept as {kept}"
        if rank != self.rank and (different or restart):
            path.unlink()

    def _begin(self) -> None:
        """Go to the end of what was taken up of this rank's journal, and begin it where that is nothing."""
        whole = self._read_to.get(self.rank, 0)
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
            self.sync()

    def sync(self) -> None:
        """Bring everything to disk."""
        os.fsync(self._stream.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Bring everything to disk, and let other runs have the journal."""
        if not self._stream.closed:
            self.sync()
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(self._stream, fcntl.LOCK_UN)  # for a child, too, that was forked a moment ago
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

    def _take_up(self, rank: int, *, check: bool) -> str:
        """Note the rows of a rank's journal from where it was last read; how it is another run's, empty when it is not.

        check: only rows whose input is unchanged and that did not fail.
        """
        path = journal_path(self._out, rank)
        start = self._read_to.get(rank, 0)
        try:
            file = open(path, "rb")  # noqa: SIM115 (just below)
        except FileNotFoundError:  # a rank that wrote none, or cleared by rank 0 in the meantime
            return ""
        with file:
            first = file.readline()
            if not first:  # another rank is about to begin it
                return ""
            different = self._mismatch(first)
            if different:
                return different
            file.seek(start or len(first))
            offset, places = file.tell(), _Places(self.inputs)
            for line in file:
                rows = _scored(line)
                if rows is None:  # torn: nothing from here on counts
                    break
                for row in rows:
                    self._note(row, rank, offset, check, places)
                offset += len(line)
        self._read_to[rank] = offset
        return ""

    def _note(self, row: Scored, rank: int, offset: int, check: bool, places: _Places) -> None:
        index = places.of(row)
        if index is None:
            return
        usable = not check or (not row.error and (row.size, row.mtime, row.ctime) == stamp(self.inputs[index].path))
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
        """Note what the other ranks of this run have written by now.

        Raises:
            KitError: a rank that runs with other options.
        """
        for rank in range(ranks):
            different = "" if rank == self.rank else self._take_up(rank, check=False)
            if different:
                path = journal_path(self._out, rank)
                raise KitError(f"{path}: {different} than rank {self.rank} has; all ranks need the same command")

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


_OPEN: weakref.WeakSet[Journal] = weakref.WeakSet()


def _let_go() -> None:
    """A forked process, such as a loader's worker, has the open file too, and would keep it from the next run for as long
    as it outlives this one.
    """
    for journal in _OPEN:
        journal._stream.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _unused(path: Path) -> Path:
    """Beside preds.journal.jsonl the first of preds.journal.old.jsonl, preds.journal.old2.jsonl, ... that is not there."""
    names = (path.with_suffix(f".old{n if n > 1 else ''}.jsonl") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def _scored(line: bytes) -> list[Scored] | None:
    """The rows of one batch's line; None where it is torn, or holds anything else."""
    try:
        rows = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(rows, list) or any(not isinstance(r, list) or len(r) != len(Scored._fields) for r in rows):
        return None
    scored = [Scored(*row) for row in rows]
    return scored if all(type(row.index) is int and isinstance(row.name, str) for row in scored) else None


class _Places:
    """A row's place in today's listing: where it stood, if the same name stands there, else by name."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.by_name: dict[str, int] | None = None

    def of(self, row: Scored) -> int | None:
        if 0 <= row.index < len(self.inputs) and self.inputs[row.index].name == row.name:
            return row.index
        if self.by_name is None:
            self.by_name = {item.name: i for i, item in enumerate(self.inputs)}
        return self.by_name.get(row.name)
