"""Files that list pictures, as their makers write them: text, tables, JSON, and DeepfakeBench's layers in it.

Takes a path, or parsed JSON; returns text, rows, content, and `Clip`s with labels of the house's table. Manifests and raw data
sets are read through here alike; what is odd is told to the caller, who refuses or counts it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

from solution.data.images import heads_labels, is_media, labelled
from solution.data.labels import EXPECTED, is_split, label_of, split_of
from solution.errors import UsageError


class ManifestError(UsageError):
    """A manifest that cannot be used: names the file, the row, what was found and what was expected."""


def read_text(source: Path) -> str:
    """A list's text: UTF-8 with or without its mark, or UTF-16 with one.

    Raises:
        ManifestError: another encoding. OSError: a file that cannot be read.
    """
    content = source.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ManifestError(
            f"{source}, line {line}: byte 0x{content[error.start]:02x} is not {'UTF-16' if utf16 else 'UTF-8'}; save the "
            "file as UTF-8 (Excel: CSV UTF-8)"
        ) from None
    if "\0" in text:
        raise ManifestError(f"{source}: no text (NUL bytes), or UTF-16 without its mark, or UTF-32; save it as UTF-8")
    return text


def read_json(source: Path) -> Any:
    """A JSON file's content.

    Raises:
        ManifestError: it is none. OSError: a file that cannot be read.
    """
    text = read_text(source)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ManifestError(f"{source}: no JSON ({error})") from None


# ------------------------------------------------------------------------------------------------ tables
_SEPARATORS = (",", ";", "\t")


def read_table(source: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, row by the header's names) of a table with `,`, `;` or tabs between its columns.

    Without a header, where the first line begins with the name of a picture or video, each line has a path and a label
    (`labelled`), under the columns `path` and `label`; blank lines and those that begin with # are skipped.

    Raises:
        ManifestError: another encoding than `read_text` knows, a column that occurs twice, a row with more fields than the
            header, or no CSV. OSError: a file that cannot be read.
    """
    text = read_text(source)
    lines = [(number, line) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1) if line.strip()]
    first = lines[0][1] if lines else ""
    listed = [(number, line) for number, line in lines if not line.startswith("#")]
    if listed and heads_labels(listed[0][1]) and not any(separator in listed[0][1] for separator in _SEPARATORS):
        del listed[0]
    if listed and is_media(labelled(listed[0][1])[0]):
        return [(number, dict(zip(("path", "label"), labelled(line)))) for number, line in listed]
    return list(_rows_below(source, text, first))


def _rows_below(source: Path, text: str, first: str) -> Iterator[tuple[int, dict[str, str]]]:
    file = io.StringIO(text, newline="")
    excel = re.fullmatch(r"sep=(.)\s*", first)
    if excel:
        file.readline()
    separator = excel[1] if excel else max(_SEPARATORS, key=first.count)
    reader = csv.reader(file, delimiter=separator)
    header: list[str] | None = None
    try:
        for fields in reader:
            number = reader.line_num + (1 if excel else 0)
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = fields
                if twice := [name for name, count in Counter(header).items() if name.strip() and count > 1]:
                    raise ManifestError(f"{source}: column {twice[0]} occurs twice in its header")
                continue
            if any(field.strip() for field in fields[len(header) :]):
                raise ManifestError(
                    f"{source}, line {number}: {len(fields)} fields under {len(header)} columns; a path that has a "
                    f"{separator!r} in it belongs in quotes"
                )
            yield number, dict(zip_longest(header, fields[: len(header)], fillvalue=""))
    except csv.Error as error:
        raise ManifestError(f"{source}, line {reader.line_num}: {error}") from None


# ------------------------------------------------------------------------------------------------ DeepfakeBench
@dataclass(frozen=True)
class Clip:
    """One video of a DeepfakeBench JSON. path: its keys, data set -> label -> split -> [compression] -> video.

    label: 0 real, 1 fake. split: in its usual spelling, another word as it stands, or empty. frames and masks: paths as
    the list writes them, with slashes.
    """

    path: tuple[str, ...]
    label: int
    split: str
    frames: tuple[str, ...]
    masks: tuple[str, ...]

    @property
    def label_name(self) -> str:
        """The key that stands for the label, a real's or a generator's name; empty in a list without that layer."""
        return self.path[1] if len(self.path) > 2 else ""


def is_deepfakebench(content: Any) -> bool:
    """Whether a JSON's first path is data set -> label -> split -> [compression] -> video -> {label, frames}."""
    for _ in range(6):
        if not isinstance(content, dict) or not content:
            return False
        if "frames" in content:
            return True
        content = next((v for v in content.values() if v), None)
    return False


def clips(content: Any, source: str, odd: Callable[[str], None], path: tuple[str, ...] = ()) -> Iterator[Clip]:
    """The videos of a DeepfakeBench JSON, in its order.

    source: the list's name, for messages. odd: told of each place that is no layer or list of paths, in a line; it may
    raise. path: the keys above `content`.

    Raises:
        ManifestError: a label that is not known, or that its key says the opposite of.
    """
    if not isinstance(content, dict):
        odd(
            "not DeepfakeBench's layers, data set -> label -> split -> video -> label and frames: "
            f"{'/'.join(path) or 'data sets'} should be an object, found {json.dumps(content)[:40]}"
        )
        return
    if "frames" in content and path:
        yield _clip(content, source, odd, path)
        return
    for key, value in content.items():
        yield from clips(value, source, odd, (*path, key))


def _clip(row: dict[str, Any], source: str, odd: Callable[[str], None], path: tuple[str, ...]) -> Clip:
    where, key = "/".join(path), path[1] if len(path) > 2 else ""
    said = row.get("label", key)
    label, by_key = label_of(said), label_of(key)
    if label is None:
        raise ManifestError(f"{source}: {where}: label is {said!r}; {EXPECTED}")
    if by_key not in (None, label):
        raise ManifestError(f"{source}: {where}: label is {said!r} under {key!r}, which say the opposite")
    split = next((split_of(part) for part in path[2:-1] if is_split(part)), path[2].strip() if len(path) > 3 else "")
    masks = _paths(row["masks"], f"{where}: masks", odd) if row.get("masks") else ()
    return Clip(path, label, split, _paths(row["frames"], f"{where}: frames", odd), masks)


def _paths(found: Any, what: str, odd: Callable[[str], None]) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
        odd(f"{what} should be a list of paths, found {json.dumps(found)[:40]}")
        return ()
    return tuple(path.replace("\\", "/") for path in found)


def mask_beside(frame: PurePath) -> PurePath | None:
    """Where a DeepfakeBench release has a frame's forgery mask: `masks` for `frames` in its path, a .png."""
    parts = list(frame.parts)
    if "frames" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("frames")] = "masks"
    return type(frame)(*parts).with_suffix(".png")
