"""Files that appear whole or not at all, by what a file is known again, the hash of this kit's own sources, and the cores
that it may use.

Takes paths and text or bytes; leaves a complete file on disk, or what was there before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_file(path: Path | str, *, binary: bool = False) -> Iterator[IO]:
    """A file to write (UTF-8 text, or bytes) that appears at `path`, whole and on disk, when the block ends well.

    When it does not, `path` stays as it was. A link is written through. An error of the system that names no other file,
    such as a full disk, names `path`.
    """
    given, path = path, Path(os.path.realpath(path))
    temporary = path.parent / f".writing-{os.getpid()}-{secrets.token_hex(4)}"
    how: dict[str, Any] = {"mode": "xb"} if binary else {"mode": "x", "encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C too: nothing half-written stays
        with contextlib.suppress(OSError):  # what led here is what is told
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(given)) from None
        raise


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Write `content` to `path` whole or not at all (see `atomic_file`); its folder must exist."""
    with atomic_file(path, binary=isinstance(content, bytes)) as file:
        file.write(content)


UNSEEN = (-1, -1, -1)  # the `stamp` of no file


def stamp(path: Path | str) -> tuple[int, int, int]:
    """(size in bytes, st_mtime_ns, st_ctime_ns) of a file, all -1 when it cannot be seen.

    The last is set by the file system at every change of content, rights or name, and by nobody else: it tells a file
    that was replaced by one of the same size and mtime (`cp -p`, `rsync -t`, `touch -r`), where mtime does not. Over NFS
    it is the server's, the same for all machines. Reading leaves it alone, so a resumed run finds it as it was; after a
    copy, a restored backup or a chmod it is another, and the files are scored again: time lost, never a wrong score.
    Windows has the time of creation in its place.
    """
    try:
        found = os.stat(path)
    except OSError:
        return UNSEEN
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def source_hash(*modules: str) -> str:
    """SHA-256 over the sources of this package's modules, e.g. `data.degradation`, or of a wing's, e.g. `data`.

    What they computed is theirs alone.
    """
    digest = hashlib.sha256()
    for module in modules:
        place = Path(__file__).parent / module.replace(".", "/")
        for path in sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
