"""One piece of work in a process of its own, with a limit on its time and memory: what ends it does not end the run.

Takes a function and its arguments; gives its result, or raises what it raised, or how its process ended.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from solution.errors import KitError

LIMIT = 600  # seconds for one file; a video of 4K frames with few keyframes takes a minute of a slow core
ALARM = getattr(signal, "SIGALRM", 0)


class Killed(KitError):
    """A process that ended before it had a result; the message says how."""


def alone(work: Callable[..., Any], *args: Any, seconds: int = 0, context: Any = multiprocessing) -> Any:
    """`work(*args)`, done in a process of its own, whose memory is limited (`limit_memory`).

    seconds: after which it is ended, in the middle of a decoder too; 0: never. context: as `multiprocessing.get_context`.

    Raises:
        Killed: the process crashed, was killed, or took too long. What `work` raises is raised here.
    """
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_alone, args=(send, seconds, work, args), daemon=True)
    process.start()
    send.close()
    try:
        done, result = receive.recv()
    except EOFError:
        process.join()
        raise Killed(why(process.exitcode, seconds)) from None
    finally:
        receive.close()
    process.join()
    if not done:
        raise result
    return result


def _alone(send: Any, seconds: int, work: Callable[..., Any], args: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limit_memory()
    set_alarm(seconds)
    try:
        result = True, work(*args)
    except Exception as error:  # noqa: BLE001 (raised again where it was asked for)
        result = False, error
    set_alarm(0)
    send.send(result)


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
