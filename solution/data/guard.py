"""A file that crashes, hangs or exhausts the process that reads it ends no run: it is named, and the run goes on.

Takes a data set, batches of what it is asked for, and how to load them; gives what a DataLoader gives, in the same order.
Its workers write down which file they read (`Watch`). When one dies, its file is read once more in a process of its own
(`processes.alone`); a file that ends that one too is given up with the reason, and the loader goes on from the batch where it was.
Without workers one process reads, a batch at a time (`one_by_one`), guarded alike.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from multiprocessing import connection
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from solution.data.degradation import use_one_opencv_thread
from solution.data.images import UnreadableInput
from solution.data.processes import ALARM, LIMIT, Apart, Killed, alone, set_alarm, why
from solution.errors import KitError

_MOST_BARE_DEATHS = 3  # workers that die one after the other, none of them reading a file
_CHUNK = 16  # files that a worker of `look_at` hands over at once


class LoaderError(KitError, RuntimeError):
    """Loader workers that die again and again, and no file to blame."""


# ------------------------------------------------------------------------------------------------ loaders
class Watch:
    """Which file each loader worker reads, seen by the main process when the worker dies; and the files given up.

    lost: by number, why a file was given up.
    """

    def __init__(self, workers: int = 0, seconds: int = LIMIT) -> None:
        """seconds: after which a worker that reads one file is ended; 0: never."""
        self.seconds = seconds
        self.lost: dict[int, str] = {}
        self._deaths: Counter[int] = Counter()
        self.bare_deaths = 0  # since the last batch
        self._owner = os.getpid()
        self._reading = multiprocessing.RawArray("q", 2 * max(1, workers))  # process id and file number, by worker

    @contextlib.contextmanager
    def file(self, number: int, path: Path | str) -> Iterator[None]:
        """Around the reading of a file; `number` is any from 0 that stands for it. Within another, it is the inner one.

        Raises:
            UnreadableInput: the file was given up, or needs more memory than there is.
        """
        if number in self.lost:
            raise UnreadableInput(path, self.lost[number])
        worker = get_worker_info()
        at = 0 if worker is None else 2 * worker.id
        watched = at < len(self._reading) and os.getpid() != self._owner
        before = self._reading[at + 1] if watched and self._reading[at] == os.getpid() else -1
        if watched:
            self._reading[at : at + 2] = [os.getpid(), number]
            set_alarm(self.seconds)
        try:
            yield
        except MemoryError:
            raise UnreadableInput(path, "reading it needs more memory than one process may have here") from None
        except cv2.error as error:
            if error.code != cv2.Error.StsNoMem:
                raise
            raise UnreadableInput(path, "reading it needs more memory than one process may have here") from None
        finally:
            if watched:
                self._reading[at + 1] = before
                set_alarm(self.seconds if before >= 0 else 0)

    def judge(self, dead: Sequence[Any], read_again: Callable[[int], Any]) -> None:
        """Give up, or not, what the processes `dead` were reading: `read_again(number)` reads it in this process's child.

        Raises:
            LoaderError: they died too often while they read nothing.
        """
        pairs = zip(self._reading[::2], self._reading[1::2])
        reading = {pid: number for pid, number in pairs if number >= 0}
        suspects = {reading[p.pid]: p.exitcode for p in dead if p.pid in reading}
        self.bare_deaths = 0 if suspects else self.bare_deaths + 1
        if self.bare_deaths >= _MOST_BARE_DEATHS:
            raise LoaderError(
                f"loader workers end as soon as they start (exit code {dead[0].exitcode}); is there memory for them? "
                "Try fewer --workers"
            )
        for number, code in suspects.items():
            self._deaths[number] += 1
            if code == -ALARM:
                self.lost[number] = why(code, self.seconds)
                continue
            try:
                alone(read_again, number, seconds=self.seconds)
            except Killed as error:
                self.lost[number] = str(error)
                continue
            # Alone it can be read. Once may be chance, a machine short of memory; twice is the file.
            if self._deaths[number] > 1:
                self.lost[number] = why(code, self.seconds)


def guarded(
    batches: Iterable[Any],
    load: Callable[[Iterator[Any]], DataLoader],
    watch: Watch,
    read_again: Callable[[int, Sequence[Any]], Any],
) -> Iterator[Any]:
    """What the DataLoader `load(batches)` gives, in order, one result a batch, though its workers die.

    watch: that of its data set. read_again: reads the file of a number, one of the batches given, as a worker does.

    Raises:
        LoaderError: workers that die while they read nothing. What a worker raises is raised here.
    """
    rest, waiting = iter(batches), deque()
    while True:
        given, waiting = chain(tuple(waiting), rest), deque()
        results, workers = _started(load(_noted(given, waiting)))
        try:
            for result in results:
                waiting.popleft()
                watch.bare_deaths = 0
                yield result
            return
        except Exception as error:  # noqa: BLE001 (raised again unless a worker died)
            if isinstance(error, (EOFError, OSError)):  # a worker that was sending: its end may show a little later
                connection.wait([p.sentinel for p in workers], timeout=1)
            dead = [p for p in workers if p.exitcode]
            # The other workers end here, not when the garbage is collected, as torch's frames would have it.
            del results
            if not dead:
                raise error.with_traceback(None) from None
        watch.judge(dead, _Again(read_again, tuple(waiting)))


def one_by_one(
    batches: Iterable[Any],
    read: Callable[[Any], Any],
    watch: Watch,
    read_again: Callable[[int, Sequence[Any]], Any],
    start: Callable[[int], None],
) -> Iterator[Any]:
    """`read(batch)` of each batch, in order, guarded as `guarded` does, without loader workers: one process reads, nothing
    ahead, and hands over without shared memory.

    start: its first call, as a worker's.

    Raises:
        LoaderError: it dies again and again while it reads nothing. What `read` raises is raised here.
    """
    with Apart(read, start=functools.partial(start, 0)) as reader:
        for batch in batches:
            while True:
                try:
                    result = reader(batch)
                    break
                except Killed:
                    watch.judge([reader.process], _Again(read_again, [batch]))
            watch.bare_deaths = 0
            yield result


def _started(loader: DataLoader) -> tuple[Iterator[Any], list[Any]]:
    """A loader's results and its worker processes."""
    _disarm()
    others = {p.pid for p in multiprocessing.active_children()}
    results = iter(loader)
    return results, [p for p in multiprocessing.active_children() if p.pid not in others]


@functools.cache
def _disarm() -> None:
    """Take away torch's handler of a worker's death, which raises wherever the main process happens to be.

    Torch sets it once, at a process's first loader: that is this one. Without it a death is seen where a result is awaited.
    """
    list(DataLoader([0], num_workers=1, generator=torch.Generator()))  # else it draws from everybody's
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if (getattr(handler, "__module__", "") or "").startswith("torch."):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class _Again:
    """`read_again` with the batches that wait; a class, for a spawned process takes no closure."""

    def __init__(self, read_again: Callable[[int, Sequence[Any]], Any], waiting: Sequence[Any]) -> None:
        self.read_again, self.waiting = read_again, waiting

    def __call__(self, number: int) -> None:
        self.read_again(number, self.waiting)


def _noted(batches: Iterator[Any], waiting: deque) -> Iterator[Any]:
    for batch in batches:
        waiting.append(batch)
        yield batch


# ------------------------------------------------------------------------------------------------ files by themselves
class _Looks(Dataset):
    def __init__(self, paths: Sequence[Path], look: Callable[[Path], Any], watch: Watch) -> None:
        self.paths, self.look, self.watch = list(paths), look, watch

    def __getitem__(self, numbers: Sequence[int]) -> list[tuple[Any, str]]:
        return [self._one(number) for number in numbers]

    def _one(self, number: int) -> tuple[Any, str]:
        path = self.paths[number]
        try:
            with self.watch.file(number, path):
                return self.look(path), ""
        except UnreadableInput as error:
            return None, error.reason

    def again(self, number: int, _: Sequence[Any]) -> None:
        """As `read_again` of `guarded`."""
        self.look(self.paths[number])


def look_at(
    paths: Sequence[Path],
    look: Callable[[Path], Any],
    *,
    workers: int,
    start: Callable[[int], None],
    seconds: int = LIMIT,
) -> Iterator[tuple[Any, str]]:
    """`look(path)` of each path, in order, in `workers` processes (0: `one_by_one`), and why it cannot be read.

    look: raises `UnreadableInput`; a function of a module, or an object that pickles. start: a worker's first call.
    """
    use_one_opencv_thread()
    looks = _Looks(paths, look, Watch(workers, seconds))
    chunks = [range(at, min(at + _CHUNK, len(paths))) for at in range(0, len(paths), _CHUNK)]

    def load(batches: Iterable[Any]) -> DataLoader:
        return DataLoader(
            looks,
            sampler=batches,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=start,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else starting it would draw from everybody's
        )

    if workers:
        results = guarded(chunks, load, looks.watch, looks.again)
    else:
        results = one_by_one(chunks, looks.__getitem__, looks.watch, looks.again, start)
    for chunk in results:
        yield from chunk


def _as_it_is(value: Any) -> Any:
    return value
