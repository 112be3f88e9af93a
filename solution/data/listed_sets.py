"""Layouts that are not one data set's: DeepfakeBench's JSON, folders of real and fake, tables, names that say the label.

Each reader takes a `Tree` and gives `Entry`s. Folders and tables say label and split by words of the house's table.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from solution.data.data_sets import CELEB_STEM, FF_STEM, celeb_people, ff_people, names_a_video
from solution.data.images import VIDEO_SUFFIXES, printable
from solution.data.labels import EXPECTED, NEUTRAL, is_split, label_of
from solution.data.lists import Clip, ManifestError, clips, is_deepfakebench, mask_beside, read_json
from solution.data.raw import (
    KNOWN,
    WHOLE,
    Entry,
    LayoutError,
    Tree,
    folder_label,
    folder_meaning,
    known_split,
    plain,
    read_table,
    stem,
)

# ---------------------------------------------------------------------------------------------------- DeepfakeBench
_OTHER_LISTS = frozenset(("metadata.json", "dataset.json", "train.json", "val.json", "test.json"))


def bench_content(tree: Tree, name: str) -> Any:
    """What a DeepfakeBench JSON holds; None for another file. One that is named outright must be JSON."""
    if not name.lower().endswith(".json") or name.rpartition("/")[2].lower() in _OTHER_LISTS:
        return None
    try:
        content = read_json(tree.root / name)
    except (ManifestError, OSError):
        if len(tree.lists) == 1:
            raise
        tree.passed.add("a list that is no JSON", name)
        return None
    return content if is_deepfakebench(content) else None


def deepfakebench(tree: Tree) -> Iterator[Entry]:
    """Every DeepfakeBench JSON of the tree; a video that several lists or splits name is taken once."""
    videos: dict[tuple[str, ...], tuple[Entry, set[str]]] = {}
    labels: dict[str, int] = {}
    for name in tree.lists:
        content = bench_content(tree, name)
        if content is None:
            continue
        for clip in clips(content, name, partial(tree.passed.add, f"not as DeepfakeBench writes it ({name})")):
            entry = _bench_entry(tree, name, clip)
            if entry is None:
                continue
            for file in entry.files:
                if labels.setdefault(file, entry.label) != entry.label:
                    raise LayoutError(f"{name}: {file} has both labels")
            videos.setdefault(entry.files, (entry, set()))[1].add(clip.split if is_split(clip.split) else "")
    names = Counter(entry.name for entry, _ in videos.values())
    single = {(e.source, e.label) for e, splits in videos.values() if len(splits) == 1}
    for entry, splits in videos.values():
        split = next((s for s in ("test", "val", "train") if s in splits), "")
        if (entry.source, entry.label) not in single and "train" in splits:
            # DFD's list names every video in all three, the NTIRE entry's in two: that is no split.
            tree.passed.add("listed in several splits, as all of its label: dealt anew", entry.name)
            split = ""
        elif len(splits) > 1:
            tree.passed.add(f"listed in another split than {split} too", entry.name)
        # Several videos' frames can lie in one folder.
        own = entry.name if names[entry.name] == 1 else f"{entry.name}/{stem(entry.files[0]).rpartition('/')[2]}"
        yield replace(entry, name=own, split=split)


def _bench_entry(tree: Tree, name: str, clip: Clip) -> Entry | None:
    data_set, video = clip.path[0], clip.path[-1]
    frames = [f for f in (_bench_file(tree, name, frame) for frame in clip.frames) if f]
    if not frames:
        tree.passed.add(f"no frame of the video is there ({name})", "/".join(clip.path))
        return None
    masks = [m for m in (_bench_file(tree, name, mask) for mask in clip.masks) if m]
    if clip.label and not masks:
        beside = [mask_beside(PurePosixPath(frame)) for frame in frames]
        masks = [str(m) for m in beside if m and (tree.root / m).is_file()]
    several = len(frames) > 1
    own = frames[0].rpartition("/")[0] if several else stem(frames[0])
    people = ff_people(video) or celeb_people(video) or (f"{data_set}:{video}",)
    generator = clip.label_name if clip.label else ""
    kind = "frames" if several else "picture"
    return Entry(own, tuple(frames), kind, clip.label, data_set, "", generator, people, tuple(masks))


def _bench_file(tree: Tree, name: str, frame: str) -> str | None:
    """A listed file, relative to the root: beside its list, below the root, or below it without the list's own folders."""
    beside = os.path.normpath(os.path.join(os.path.dirname(name), frame)).replace(os.sep, "/")
    parts = frame.strip("/").split("/")
    for candidate in (beside, *("/".join(parts[at:]) for at in range(len(parts)))):
        if not candidate.startswith("..") and (tree.root / candidate).is_file():
            return os.path.relpath(tree.root / candidate, tree.root).replace(os.sep, "/")
    return None


# ---------------------------------------------------------------------------------------------------- folders
_MANY = 4  # sub-folders of a label from which each is taken for one thing that no split may cut


def folders(tree: Tree) -> Iterator[Entry]:
    """Folders of the usual names, with or without train, val and test; sub-folders are videos, people or generators."""
    yield from _paired(_in_folders(tree))


def _in_folders(tree: Tree) -> Iterator[Entry]:
    units = [unit for unit in tree.units() if not _is_mask(unit[2][0])]
    meanings = {files[0]: folder_label(files[0]) for _, _, files in units}
    if bad := [name for _, _, files in units for name in files if meanings[files[0]][0] is None]:
        there = sorted({name.rpartition("/")[0] or "." for name in bad})
        raise LayoutError(
            f"{len(bad)} files lie in no folder of a known label, in {', '.join(map(printable, there[:8]))}"
            f"{' ...' if len(there) > 8 else ''}. Known are {KNOWN}"
        )
    masks, source = _masks_by_path(tree), tree.root.resolve().name
    inner = Counter(meanings[f[0]][0] for path, kind, f in units if kind == "frames" and _inside(path, meanings[f[0]]))
    for path, kind, files in units:
        label, split, below = meanings[files[0]]
        inside = files[0].split("/")[below:-1]
        own = path.rpartition("/")[2]
        frames = kind == "frames" and bool(inside) and (names_a_video(own) or "frames" in map(plain, inside[:-1]))
        above = [part for part in (inside[:-1] if frames else inside) if plain(part) not in NEUTRAL]
        generator = above[0] if label and above else ""
        if kind == "video" or frames:
            mask = tuple(m for name in files for m in masks.get(_mask_key(name), ())) if label else ()
            yield Entry(path, tuple(files), kind, label, source, split, generator, _people(own, path), mask)
            continue
        shared = (f"folder:{path}",) if inside and inner[label] >= _MANY else ()
        for name in files:
            mask = masks.get(_mask_key(name), ()) if label else ()
            who = shared or _people(stem(name).rpartition("/")[2], stem(name))
            yield Entry(stem(name), (name,), "picture", label, source, split, generator, who, mask)


def _inside(folder: str, meaning: tuple[int | None, str, int]) -> bool:
    """Whether a folder lies below the one that says its label or split."""
    return len(folder.split("/")) > meaning[2]


_FF_METHOD = re.compile(r"(deepfakes|face2face|faceswap|neuraltextures|faceshifter)[_-](\d{3}_\d{3})", re.IGNORECASE)


def _people(own: str, path: str) -> tuple[str, ...]:
    """The identities in a name of FaceForensics++, DFD or Celeb-DF, a method before it or not; else the file is its own."""
    if found := _FF_METHOD.fullmatch(own):
        return ff_people(found[2])
    numbers = FF_STEM.fullmatch(own)
    return (ff_people(own) if not numbers or len(numbers[1]) == 3 else ()) or celeb_people(own) or (f"file:{path}",)


def _paired(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Videos of plain folders that are named as FaceForensics++ or Celeb-DF name them, each fake at its real's place."""
    entries = list(entries)
    reals = {e.name.rpartition("/")[2]: e for e in entries if not e.label and e.kind != "picture"}
    for entry in entries:
        own = entry.name.rpartition("/")[2]
        method, celeb = _FF_METHOD.fullmatch(own), CELEB_STEM.fullmatch(own)
        first = (method[2] if method else own).partition("_")[0]
        real = reals.get(f"id{celeb[1]}_{celeb[3]}" if celeb else first) if entry.label and entry.people else None
        if real is None or real.kind != entry.kind or not set(real.people) & set(entry.people):
            yield entry
        else:
            generator = entry.generator or (method[1] if method else "")
            yield replace(entry, place=real.name, generator=generator)


def _is_mask(name: str) -> bool:
    return any(plain(part) in ("mask", "masks") for part in name.split("/")[:-1])


def _mask_key(name: str) -> str:
    """A path without its suffix and without the folders that say mask or label: equal for a picture and its mask."""
    *folders, own = stem(name).split("/")
    kept = [p for p in folders if plain(p) not in ("mask", "masks") and folder_meaning(p)[0] is None]
    return "/".join((*kept, own))


def _masks_by_path(tree: Tree) -> dict[str, tuple[str, ...]]:
    masks: dict[str, tuple[str, ...]] = {}
    for name in (*tree.pictures, *tree.videos):
        if _is_mask(name):
            masks[_mask_key(name)] = (*masks.get(_mask_key(name), ()), name)
    for key in [key for key, names in masks.items() if len(names) > 1]:
        tree.passed.add("several masks of one name", masks.pop(key)[0])
    return masks


NTIRE_NAME = re.compile(r"(\d+)_(real|fake)", re.IGNORECASE)


def ntire(tree: Tree) -> Iterator[Entry]:
    """The challenge's training pictures, 0000_real.png and 0000_fake.png, in one folder."""
    for name in (*tree.pictures, *tree.videos):
        found = NTIRE_NAME.fullmatch(stem(name).rpartition("/")[2])
        if found is None:
            tree.passed.add("not named NUMBER_real or NUMBER_fake", name)
            continue
        label = int(found[2].lower() == "fake")
        yield Entry(
            stem(name), (name,), "picture", label, "ntire26", "", "ntire26" if label else "", (f"ntire:{found[1]}",)
        )


# ---------------------------------------------------------------------------------------------------- tables
_PATHS = (
    "path",
    "image_path",
    "file_path",
    "filepath",
    "image",
    "img",
    "filename",
    "file_name",
    "file",
    "video",
    "name",
    "id",
    "image_id",
)
_WORDS = ("label_str", "label_name", "class_name")  # a label in words, which no convention can turn round
_NUMBERS = ("label", "target", "class", "is_fake", "fake", "y", "labels")


def labelled_rows(tree: Tree, name: str) -> tuple[list[tuple[int, dict[str, str]]], tuple[str, str]] | None:
    """The rows of a list of the tree, (line number, row), and the columns of path and label; None where it has none."""
    try:
        rows = read_table(tree.root / name)
    except ManifestError:
        if name.lower().endswith(".txt"):  # anybody's text
            return None
        raise
    there = rows[0][1] if rows else {}
    path = next((c for c in _PATHS if c in there), None)
    label = next((c for c in (*_WORDS, *_NUMBERS) if c in there), None)
    if path is None or label is None or not any(row[label] for _, row in rows):
        return None
    return rows, (path, label)


class _Files:
    """The tree's files by what tables call them: their path, its end, each with or without its suffix."""

    def __init__(self, names: Iterable[str]) -> None:
        self.whole: dict[str, str | None] = {}
        self.ends: dict[str, str | None] = {}
        for name in names:
            parts = name.split("/")
            for at in range(len(parts)):
                for key in ("/".join(parts[at:]), stem("/".join(parts[at:]))):
                    self._keep(self.ends, key, name)
            self._keep(self.whole, name, name)
            self._keep(self.whole, stem(name), name)

    @staticmethod
    def _keep(table: dict[str, str | None], key: str, name: str) -> None:
        # A name that two files have is nobody's.
        table[key] = name if table.get(key, name) == name else None

    def find(self, folder: str, path: str) -> str | None:
        """The file that a row of a table in `folder` calls `path`; None when there is none, or more than one.

        Tables are written where their author had the files: folders before the path may be others, here or there, but
        of a path with folders one at least must agree.
        """
        path = path.replace("\\", "/").removeprefix("./")
        parts = path.strip("/").split("/")
        for key in (f"{folder}/{path}" if folder else path, path):
            if self.whole.get(key):
                return self.whole[key]
        ends = ("/".join(parts[at:]) for at in range(max(1, len(parts) - 1)))
        return next((self.ends[key] for key in ends if self.ends.get(key)), None)


def kaggle(tree: Tree) -> Iterator[Entry]:
    """Tables with a path and a label a row, beside or above their files; a name such as train.csv says the split.

    Lists such as train.txt, a path and a label a line, are read where there is no .csv or .tsv with both.
    """
    names = [*tree.pictures, *tree.videos]
    files, taken, tables = _Files(names), {}, 0
    for name in sorted(tree.lists, key=lambda name: name.lower().endswith(".txt")):
        text = name.lower().endswith(".txt")
        if not (text or name.lower().endswith((".csv", ".tsv"))) or (text and tables):
            continue
        found = labelled_rows(tree, name)
        if found is None:
            tree.passed.add("a table without path and label", name)
            continue
        rows, columns = found
        tables += not text
        for number, row in rows:
            entry = _kaggle_entry(tree, f"{name}, line {number}", row, columns, files)
            if entry is None:
                continue
            if entry.label != taken.setdefault(entry.files, entry).label:
                raise LayoutError(f"{name}, line {number}: {entry.files[0]} has both labels")
            if entry.split != taken[entry.files].split:
                tree.passed.add(f"listed again, in {entry.split or 'no split'}", entry.name)
    yield from taken.values()
    for name in sorted(set(names) - {file for files in taken for file in files}):
        if not _is_mask(name):
            tree.passed.add("in no table", name)


def _kaggle_entry(tree: Tree, where: str, row: dict[str, str], columns: tuple[str, str], files: _Files) -> Entry | None:
    path_column, label_column = columns
    table = where.rpartition(",")[0]
    folder = table.rpartition("/")[0]
    said, label = row[label_column], label_of(row[label_column])
    if label is None:
        raise LayoutError(f"{where}: {label_column} is {said!r}; {EXPECTED}")
    file = files.find(folder, row[path_column])
    if file is None:
        tree.passed.add(f"in {table}, but not there", row[path_column])
        return None
    says = {folder_meaning(part)[0] for part in file.split("/")[:-1]} - {None}
    if says and says != {label}:
        raise LayoutError(
            f"{where}: {label_column} is {said!r}, but {file} lies in a folder of the other label. Here 0 is real and 1 fake: "
            "turn the column round, or use --layout folders to go by the folders"
        )
    split = known_split(row.get("split", "")) or known_split(Path(table).stem)
    kind = "video" if os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES else "picture"
    mask = row.get("mask", "")
    mask = mask if mask in ("", WHOLE) else files.find(folder, mask) or ""
    who = row.get("group") or row.get("video_id") or ""
    people = (f"group:{who}",) if who else _people(stem(file).rpartition("/")[2], stem(file))
    generator = (row.get("generator") or row.get("method") or "") if label else ""
    source = row.get("source") or tree.root.resolve().name
    return Entry(stem(file), (file,), kind, label, source, split, generator, people, (mask,) if mask and label else ())
