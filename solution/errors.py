"""What ends a command in one line: errors that carry their exit code, and the runner that every door goes through.

Exit codes: 0 done, 2 usage, 3 environment or weights, 4 done with failures, 130 interrupted and resumable. Whatever a user
can cause is a `KitError` (or an `OSError` that names its cause); a traceback means a mistake in this code.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

USAGE, ENVIRONMENT, FAILURES, INTERRUPTED = 2, 3, 4, 130


class KitError(Exception):
    """Why something cannot go on, in one line: what was found, what was expected, and what to do."""

    exit_code = ENVIRONMENT


class UsageError(KitError, ValueError):
    """What was asked for cannot be: the message names the argument and what is allowed."""

    exit_code = USAGE


class DeviceError(KitError):
    """A device that this machine does not have."""


class WeightsError(KitError, RuntimeError):
    """Weights that do not fit: the message names the file or key, what was found and expected, and what to do."""


class MemberError(UsageError, WeightsError):
    """A member that was asked for and that the bundle does not have."""


def whole(least: int = 0, most: int | None = None) -> Callable[[str], int]:
    """What reads a whole number of a door's option (argparse's `type`): between `least` and `most`, both allowed."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no whole number from {least}" + ("" if most is None else f" to {most}")
            )
        return int(text)

    return read


def tell(line: str) -> None:
    """Print a line to people: standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """An error in one line; of the system's own, the file first: `preds.csv: Permission denied`."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    elif isinstance(error, json.JSONDecodeError):
        text = f"no JSON: {error}"
    return " ".join(text.split())


def exit_code(error: BaseException, refused: tuple[type[Exception], ...] = ()) -> int | None:
    """The exit code that an error stands for; None for one that is a mistake in the code and shows its traceback.

    refused: further classes that mean usage.
    """
    if isinstance(error, KitError):
        return error.exit_code
    if isinstance(error, (json.JSONDecodeError, *refused)):
        return USAGE
    # A full disk, no permission, a folder where a file belongs; without a number it is nothing that the system said.
    if isinstance(error, OSError) and error.errno is not None:
        return ENVIRONMENT
    return None


def door(
    prog: str,
    *,
    interrupted: str = "interrupted",
    refused: tuple[type[Exception], ...] = (),
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make a `main(argv) -> exit code` a door: what a user can cause ends in the line `PROG: message` and its exit code.

    interrupted: the line on Ctrl-C, before 130. refused: further classes of errors that mean usage here.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*args: Any, **kwargs: Any) -> int:
            try:
                return main(*args, **kwargs)
            except KeyboardInterrupt:
                # On a line of its own: the terminal shows ^C and perhaps half a progress bar.
                tell(f"\n{prog}: {interrupted}")
                return INTERRUPTED
            except Exception as error:
                code = exit_code(error, refused)
                if code is None:
                    raise
                tell(f"{prog}: {reason(error)}")
                return code

        return run

    return decorate
