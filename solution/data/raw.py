"""A raw data set's files before anyone has looked into them: entries, the tree they lie in, its lists, its words.

Takes a folder; gives the names of its pictures, videos and lists (`Tree`), and the types that `layouts` makes of them. A
name that the tables do not know is nobody's label.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solution.data import lists
from solution.data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, printable
from solution.data.labels import FAKE, REAL, is_split, label_of, split_of
from solution.errors import UsageError

JOURNAL = "prepared.jsonl"  # in an output folder: what is done; such a folder is no data set
WHOLE = "whole"  # stands for the mask of a picture that is generated from edge to edge


class LayoutError(UsageError):
    """A data set that cannot be read without guessing: names what was found and what is known."""


@dataclass(frozen=True)
class Entry:
    """One video, folder of a video's frames, or picture of a raw data set; paths are POSIX, relative to its root.

    name: its path without the suffix, unique. kind: `video`, `frames` or `picture`. label: 0 real, 1 fake. people: who or
    what must not stand on both sides of a split. masks: a mask video, one mask a frame (equal stem), one of a picture, or
    `WHOLE`. place: name of the entry in which its face is looked for, so that a pair is cut alike; its own when empty.
    """

    name: str
    files: tuple[str, ...]
    kind: str
    label: int
    source: str
    split: str = ""
    generator: str = ""
    people: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    place: str = ""


class PassedOver:
    """What was left out: how many by reason, and one example of each."""

    def __init__(self) -> None:
        self.reasons: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count `count` more things left out for `reason`."""
        before, first = self.reasons.get(reason, (0, printable(example)))
        self.reasons[reason] = (before + count, first)

    def rows(self) -> list[dict[str, Any]]:
        """`reason`, `count` and `example`, most frequent first."""
        ranked = sorted(self.reasons.items(), key=lambda item: (-item[1][0], item[0]))
        return [{"reason": reason, "count": count, "example": first} for reason, (count, first) in ranked]


@dataclass
class Found:
    """A raw data set read. cropped: its pictures are face crops already, which need no second cut."""

    layout: str
    entries: list[Entry]
    passed: PassedOver
    cropped: bool = False

    def taken(self) -> list[str]:
        """One line a folder: which label it was taken for, and how many videos and pictures are in it."""
        counts: Counter[tuple[str, int, str]] = Counter()
        for entry in self.entries:
            folder = entry.name.rpartition("/")[0] or "."
            counts[folder if entry.kind != "picture" else _trunk(folder), entry.label, entry.kind] += 1
        words = {"video": "videos", "frames": "folders of frames", "picture": "pictures"}
        return [
            f"{('REAL (0)', 'FAKE (1)')[label]}  {printable(folder)}: {count} {words[kind]}"
            for (folder, label, kind), count in sorted(counts.items())
        ]


def _trunk(folder: str) -> str:
    """The first four folders of a path: pictures can lie in a folder a person."""
    return "/".join(folder.split("/")[:4])


# ---------------------------------------------------------------------------------------------------- known names
KNOWN = (
    f"real: {', '.join(sorted(REAL))}; fake: {', '.join(sorted(FAKE))}; with real_, _images, 0_, 1_, train_ and the like before "
    "or behind"
)


def plain(name: object) -> str:
    """A name in lower case, its words joined by `_`."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).strip().lower()).strip("_")


def known_split(name: object) -> str:
    """`train`, `val` or `test`, empty for any other word."""
    return split_of(str(name)) if is_split(str(name)) else ""


def folder_meaning(name: str) -> tuple[int | None, str]:
    """The label and the split that a folder's name says, each None or empty when it does not.

    A generator's name says no label, nor does a bare number: people are numbered too.
    """
    if name.isdecimal():
        return None, ""
    words = [word for word in plain(name).split("_") if word]
    splits = [known_split(word) for word in words if is_split(word)]
    rest = "_".join(word for word in words if not is_split(word))
    label = label_of(rest, generators=False) if rest else None
    if len(splits) > 1 or (rest and label is None):
        return None, ""
    return label, "".join(splits)


_STRONG = frozenset(("real", "reals", "fake", "fakes"))


def folder_label(path: str) -> tuple[int | None, str, int]:
    """The label and split that the folders of `path` say, and how many folders stand above what is below them."""
    label, split, below = None, "", 0
    for at, part in enumerate(path.split("/")[:-1], start=1):
        said, when = folder_meaning(part)
        if said is not None:
            if label is not None and said != label and _STRONG & set(plain(part).split("_")):
                raise LayoutError(f"{path} lies in folders of both labels ({part}); move it or rename the folder")
            label = said if label is None else label
        split = when or split
        if said is not None or when:
            below = at
    return label, split, below


# ---------------------------------------------------------------------------------------------------- walking
@dataclass
class Tree:
    """The files below a root: pictures, videos, and the lists among them (.json, .csv, .tsv, .txt)."""

    root: Path
    pictures: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    passed: PassedOver = field(default_factory=PassedOver)

    def folders(self) -> set[str]:
        """Every name of a folder on the way to a picture or video."""
        return {part for name in (*self.pictures, *self.videos) for part in name.split("/")[:-1]}

    def units(self) -> Iterator[tuple[str, str, list[str]]]:
        """(path without suffix, kind, files): each video, and each folder of pictures as the frames of one."""
        frames: dict[str, list[str]] = defaultdict(list)
        for name in self.pictures:
            frames[name.rpartition("/")[0]].append(name)
        units = [(stem(name), "video", [name]) for name in self.videos]
        yield from sorted(units + [(folder, "frames", files) for folder, files in frames.items()])


def stem(name: str) -> str:
    """A path without its suffix."""
    return name.rpartition(".")[0]


def walk(root: Path, leave_out: Path | None = None) -> Tree:
    """The files below `root`, links followed, in name order; `leave_out` (an output inside it) is not entered.

    Passed over and counted: dot files and folders, `__MACOSX`, archives, files that are no picture, video or list.
    """
    tree, outside = Tree(root), None if leave_out is None else os.path.realpath(leave_out)
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(folder)
        if real in seen or real == outside:
            folders.clear()
            continue
        seen.add(real)
        if JOURNAL in names:
            if Path(folder) == root:
                raise LayoutError(f"{root} is what prepare made of a data set: train on its manifest.csv")
            tree.passed.add("output of an earlier prepare", folder)
            folders.clear()
            continue
        start = Path(folder).relative_to(root).as_posix()
        start = "" if start == "." else start + "/"
        hidden = {name for name in folders if name.startswith(".") or name == "__MACOSX"}
        for name in sorted(hidden):
            tree.passed.add("hidden folder", f"{start}{name}/")
        folders[:] = sorted(set(folders) - hidden)
        for name in sorted(names):
            _file(tree, start, name)
    return tree


def _file(tree: Tree, start: str, name: str) -> None:
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith("."):
        tree.passed.add("hidden file", start + name)
    elif suffix in IMAGE_SUFFIXES:
        tree.pictures.append(start + name)
    elif suffix in VIDEO_SUFFIXES:
        tree.videos.append(start + name)
    elif suffix in (".json", ".csv", ".tsv", ".txt"):
        tree.lists.append(start + name)
    elif suffix in (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"):
        tree.passed.add("archive: unpack it first", start + name)
    else:
        tree.passed.add(f"no picture or video ({suffix or 'no suffix'})", start + name)


def _refuse_folder(error: OSError) -> None:
    raise LayoutError(f"{printable(str(error.filename))}: {error.strerror}; make it readable or take it out") from None


def read_table(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of a table (`lists.read_table`), by lower-case column name."""
    return [(number, {plain(k): v.strip() for k, v in row.items()}) for number, row in lists.read_table(path)]
