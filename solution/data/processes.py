"""Work in a process of its own, with a limit on its time and memory: what ends it does not end the run.

Takes a function and its arguments; gives its result, or raises what it raised, or how its process ended.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from solution.errors import KitError

LIMIT = 600  # seconds for one file; a video of 4K frames with few keyframes takes a minute of a slow core
ALARM = getattr(signal, "SIGALRM", 0)


class Killed(KitError):
    """A process that ended before it had a result; the message says how."""


class Apart:
    """A process that does one kind of work, piece by piece; what ends it is told, and the next piece gets a new one.

    Its memory is limited (`limit_memory`). Arguments and results go through a pipe, as pickles: no shared memory.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        *,
        start: Callable[[], None] | None = None,
        seconds: int = 0,
        context: Any = multiprocessing,
    ) -> None:
        """start: the process's first call. seconds: after which a piece of work is ended, in the middle of a decoder too;
        0: never. context: as `multiprocessing.get_context`.
        """
        self.work, self.start, self.seconds, self.context = work, start, seconds, context
        self.process: Any = None  # the last one that began
        self._pipe: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any) -> Any:
        """`work(*args)`.

        Raises:
            Killed: the process crashed, was killed, or took too long. What `work` raises is raised here.
        """
        if self._pipe is not None and not self.process.is_alive():  # while it had nothing to do
            self.close()
        self.begin()
        try:
            self._pipe.send_bytes(pickle.dumps(args))
            done, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.close()
            raise Killed(why(self.process.exitcode, self.seconds)) from None
        except BaseException:  # Ctrl-C: what it answers later belongs to no question
            self.close()
            raise
        if not done:
            raise result
        return result

    def begin(self) -> None:
        """Start the process where there is none, so that the first piece of work need not wait for it."""
        if self._pipe is None:
            self._pipe, theirs = self.context.Pipe()
            given = theirs, self._pipe, self.seconds, self.start, self.work
            self.process = self.context.Process(target=_serve, args=given, daemon=True)
            self.process.start()
            theirs.close()

    def close(self) -> None:
        """End the process."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
            self.process.terminate()
            self.process.join()


def alone(work: Callable[..., Any], *args: Any, seconds: int = 0, context: Any = multiprocessing) -> Any:
    """`work(*args)`, done in a process of its own: one piece of work of `Apart`.

    Raises:
        Killed: the process crashed, was killed, or took too long. What `work` raises is raised here.
    """
    with Apart(work, seconds=seconds, context=context) as apart:
        return apart(*args)


def _serve(pipe: Any, other: Any, seconds: int, start: Callable[[], None] | None, work: Callable[..., Any]) -> None:
    other.close()  # else this process would not see that the main one is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limit_memory()
    if start is not None:
        start()
    while True:
        try:
            args = pipe.recv()
        except EOFError:
            return
        set_alarm(seconds)
        try:
            result = True, work(*args)
        except Exception as error:  # noqa: BLE001 (raised again where it was asked for)
            error.add_note(traceback.format_exc())
            result = False, error
        set_alarm(0)
        pipe.send_bytes(pickle.dumps(result))


def set_alarm(seconds: int) -> None:
    """End this process after `seconds`, wherever it is (nobody handles the signal); 0: call that off."""
    if ALARM:
        signal.alarm(seconds)


def why(code: int | None, seconds: int = 0) -> str:
    """How a process ended, by its exit code."""
    if code == -ALARM and seconds:
        return f"reading it took more than {seconds} s"
    if code == -getattr(signal, "SIGKILL", 9):
        return "reading it killed its process (out of memory?)"
    name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return f"reading it crashed its process ({name})"


def limit_memory() -> None:
    """Let this process grow by half of the machine's memory and no more, on Linux: a greedy file then fails alone."""
    if sys.platform != "linux":
        return
    import resource

    page = os.sysconf("SC_PAGE_SIZE")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * page
    allowed = used + os.sysconf("SC_PHYS_PAGES") * page // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or allowed < soft:
        resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
