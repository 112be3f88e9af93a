"""Manifests (CSV, folders, DeepfakeBench JSON) to `Item`s: read, split, capped, drawn; what is left out has its reason.

Takes a path; returns `Item`s in the manifest's order and a `DropReport`. Nothing here opens a picture. Labels and splits
are read by tables (`labels`), never guessed; training shares no file, video or group with what it is judged on.
"""

from __future__ import annotations

import filecmp
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from solution.config import ConfigError, SamplingConfig
from solution.data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, as_file, is_hidden, is_output, printable, stable_seed
from solution.data.labels import (
    EXPECTED,
    LABEL_COLUMNS,
    OTHER_COLUMNS,
    PATH_COLUMNS,
    column_of,
    is_split,
    label_of,
    split_of,
)
from solution.data.lists import ManifestError, clips, mask_beside, read_json, read_table
from solution.data.ties import tied
from solution.data.videos import middle_places

# The splits that training draws from and is judged on; `unseen` has generators that training has not.
TRAIN, HELD_OUT = "train", ("val", "unseen", "test")
_SMALLEST = 32  # bytes; what is smaller is no picture, and said to be unreadable, not a copy
_END = 256  # bytes at the end of a file that two different pictures hardly share
HIDDEN = "hidden or not the data set's (a dot file or folder, __MACOSX)"
VIDEO = "a video; python -m solution.prepare SOURCE --out DIR makes pictures and a manifest of it"
OUTPUT = "drawn by an earlier run of this kit"


@dataclass(frozen=True)
class Item:
    """One picture of a manifest. `name` is its path as the manifest writes it; scores join by it.

    video: the clip that a frame is of, in its source. group: a person, or whatever else must not be on both sides of a
    split, in all sources. mask: a file, `whole` (all of the face is forged), or empty (not known).
    """

    name: str
    path: Path
    label: int
    source: str = ""
    split: str = ""
    generator: str = ""
    video: str = ""
    mask: str = ""
    group: str = ""


@dataclass
class DropReport:
    """Every row that a manifest lost, and why; notes: what else a reader should hear of it, a line each."""

    dropped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.dropped.append((name, reason))

    def take(self, other: DropReport, *told: DropReport) -> None:
        """Add what `other` has and neither this nor `told`: what a folder hides is found at every reading."""
        known = {row for report in (self, *told) for row in report.dropped}
        self.dropped += [row for row in other.dropped if row not in known]
        notes = {note for report in (self, *told) for note in report.notes}
        self.notes += [note for note in other.notes if note not in notes]

    def summary(self) -> str:
        """The notes, and one line a reason, with its count and an example."""
        examples: dict[str, str] = {}
        for name, reason in self.dropped:
            examples.setdefault(reason, name)
        counts = Counter(reason for _, reason in self.dropped)
        lines = [f"dropped {n}: {reason} (e.g. {examples[reason]})" for reason, n in counts.most_common()]
        return "\n".join([*self.notes, *lines])


# ------------------------------------------------------------------------------------------------ reading
def read_manifest(
    source: Path | str, *, split: str | None = None, videos: bool = False
) -> tuple[list[Item], DropReport]:
    """The pictures of a manifest, in its order, and a report of the rows left out.

    source: a CSV (`path,label[,source,split,generator,group,mask,video]`, paths relative to it; other usual names of the
        first two are in `labels`; with `;` or tabs too, or without a header a path and its label a line), a folder with one
    folder for real and one for fake pictures under their usual names (`real/` and `fake/`, `0_real/` and `1_fake/`,
    `nature/` and `ai/`), train/val/test above or below them, or a DeepfakeBench JSON (in the folder its frames are
    relative to; the forgery masks lie beside the frames, `masks` for `frames` in the path, where a release has them).
    split: keep only rows of that split, in any usual spelling; where no row names one, about a tenth of the groups,
    videos, sub-folders or pictures of each class, by name, is `val` and the rest `train`. Rows of `train` whose file
    (or a copy of it), video or group is in `val`, `unseen` or `test` too are left out of `train`.
    videos: keep rows whose path is a video file too; a row is otherwise a picture.

    Raises:
        ManifestError: nothing usable in it, an unknown layout, a label that is not known, a file with two labels, or a
            missing column.
    """
    source, report = Path(source), DropReport()
    wanted = None if split is None else split_of(split)
    rows = list(_rows(source, report))
    splits = _splits(rows, report if wanted == TRAIN else DropReport())
    files = [_identity(item.path) for item in rows]
    _refuse_two_labels(source, rows, files)
    shared = _shared_with_held_out(rows, splits, files) if wanted == TRAIN else {}
    items, seen, no_mask = [], set(), []
    for number, (item, file) in enumerate(zip(rows, files)):
        if wanted is not None and splits[number] != wanted:
            if wanted == TRAIN and item.split and item.split not in HELD_OUT:
                report.add(item.name, f"split {item.split!r} is none of {TRAIN}, {', '.join(HELD_OUT)}")
            continue
        suffix = item.path.suffix.lower()
        if suffix in VIDEO_SUFFIXES and not videos:
            report.add(item.name, VIDEO)
        elif suffix not in IMAGE_SUFFIXES and not videos:
            report.add(item.name, f"not a picture ({suffix or 'no suffix'})")
        elif file is None:
            report.add(item.name, "file is missing")
        elif file in seen:
            report.add(item.name, "listed twice")
        elif number in shared:
            report.add(item.name, shared[number])
        else:
            seen.add(file)
            if item.mask not in ("", "whole") and not os.path.isfile(item.mask):
                no_mask.append(item.name)
                item = replace(item, mask="")
            items.append(item)
    if no_mask:
        report.notes.append(f"masks: {len(no_mask)} are missing, and count as not known (e.g. of {no_mask[0]})")
    if not items:
        said = f" of split {split!r}" if split else ""
        there = sorted(set(splits) - {""})
        if split and wanted not in there:
            said += f"; it has {', '.join(there) or 'none'}"
        raise ManifestError(f"{source}: no usable picture{said}\n{report.summary()}".rstrip())
    return items, report


def manifest_splits(source: Path | str) -> set[str]:
    """The splits that a manifest's rows belong to."""
    return set(_splits(list(_rows(Path(source), DropReport())), DropReport())) - {""}


def draw_items(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """At most `limit` items, a fixed draw of `seed`, in their old order; 0: all."""
    if not 0 < limit < len(items):
        return list(items)
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in sorted(order[:limit])]


def _rows(source: Path, report: DropReport) -> Iterator[Item]:
    """Every row of a manifest, as it stands there; what is passed over goes into `report`."""
    if not source.exists():
        raise ManifestError(f"{source}: no such manifest; expected a CSV, a DeepfakeBench JSON, or a folder")
    if source.is_dir():
        return _folder_rows(source, report)
    if source.suffix.lower() in (".csv", ".tsv", ".txt"):
        return _csv_rows(source, report)
    if source.suffix.lower() == ".json":
        return _deepfakebench_rows(source)
    raise ManifestError(
        f"{source}: expected a .csv, .tsv or .txt with a path and a label a line, a .json, or a folder with real/ and fake/"
    )


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What makes two paths the same file, however they are written, and its size; None: there is no file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size


def _refuse_two_labels(source: Path, rows: Sequence[Item], files: Sequence[Any]) -> None:
    first: dict[Any, Item] = {}
    torn = []
    for item, file in zip(rows, files):
        before = first.setdefault(file, item) if file is not None else item
        if before.label != item.label:
            torn.append((before, item))
    if torn:
        a, b = torn[0]
        raise ManifestError(
            f"{source}: {len(torn)} rows give a file the other label than a row before, e.g. {a.name} is {a.label} and "
            f"{b.name} is {b.label}; a file has one label: correct or remove these rows"
        )


# ------------------------------------------------------------------------------------------------ splits
def _shared_with_held_out(rows: Sequence[Item], splits: Sequence[str], files: Sequence[Any]) -> dict[int, str]:
    """Which rows of `train` have their file, video or group in a held-out split as well: by place, the reason."""
    judged: dict[tuple, str] = {}
    for item, split, file in zip(rows, splits, files):
        if split in HELD_OUT:
            judged |= dict.fromkeys(_keys(item, file), split)
    found = {}
    for number, (item, split, file) in enumerate(zip(rows, splits, files)):
        if split == TRAIN:
            for key in _keys(item, file):
                if key in judged:
                    found[number] = f"its {key[0]} is in split {judged[key]!r} too, which keeps it"
                    break
    for number, other in _copies(rows, splits, files).items():
        found.setdefault(number, f"a copy of it is in split {splits[other]!r}, which keeps it")
    return found


def _copies(rows: Sequence[Item], splits: Sequence[str], files: Sequence[Any]) -> dict[int, int]:
    """By place, the rows of `train` whose bytes are those of a held-out file, and that one's place.

    Only files of equal size are opened, and read whole only where their ends are equal too.
    """
    by_size: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for number, (split, file) in enumerate(zip(splits, files)):
        if file is not None and file[2] >= _SMALLEST and split in (TRAIN, *HELD_OUT):
            by_size[file[2]][split != TRAIN].append(number)
    found: dict[int, int] = {}
    for train, held_out in by_size.values():
        ends: dict[bytes | None, list[int]] = defaultdict(list)
        for number in held_out if train else ():
            ends[_end(rows[number].path)].append(number)
        for number in train if held_out else ():
            end = _end(rows[number].path)
            for other in ends.get(end, ()) if end is not None else ():
                if filecmp.cmp(rows[number].path, rows[other].path, shallow=False):
                    found[number] = other
                    break
    return found


def _end(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            file.seek(-min(_END, path.stat().st_size), os.SEEK_END)
            return file.read()
    # What cannot be read equals nothing; decoding names it.
    except OSError:
        return None


def _keys(item: Item, file: tuple | None = None) -> list[tuple]:
    keys: list[tuple] = [("file", *file)] if file is not None else []
    if item.video:
        keys.append(("video", item.source, item.video))
    if item.group:
        keys.append(("group", item.group))
    return keys


def _splits(rows: Sequence[Item], report: DropReport) -> list[str]:
    """The split of each row: held out here where no row names one; "", and counted, where only others do."""
    without = [item for item in rows if not item.split]
    if len(without) == len(rows):
        return ["val" if out else TRAIN for out in _hold_out(rows)]
    for item in without:
        report.add(item.name, "names no split, where other rows do")
    return [item.split for item in rows]


def _hold_out(rows: Sequence[Item]) -> list[bool]:
    """Which rows are held out: about a tenth of the units of each class, one at least of a class that has several.

    A unit is what must stay together: all that shares a group or a video; else a sub-folder; else a picture.
    """
    files = [_identity(item.path) for item in rows]
    labels = {item.label for item in rows}

    def cut(places: Sequence[str]) -> tuple[Sequence[str], list[int], list[set[int]]]:
        units = _together(rows, files, places)
        return places, units, [{u for u, item in zip(units, rows) if item.label == label} for label in sorted(labels)]

    places, units, by_label = first = cut(_clips(rows))
    if any(len(of_label) < 2 for of_label in by_label):
        places, units, by_label = cut([item.name for item in rows])
        if any(len(of_label) < 2 for of_label in by_label):
            places, units, by_label = first
    # 32 bits of a name: the same for every reader, and no two pictures of a unit apart.
    number = {unit: min(stable_seed(text) for text in texts) for unit, texts in _names_of(rows, units, places).items()}
    out = {unit for unit, value in number.items() if value % 10 == 0}
    for of_label in by_label:
        order = sorted(of_label, key=lambda unit: (number[unit], unit))
        if len(order) > 1 and not out & of_label:
            out.add(order[0])
        elif of_label <= out:
            out.discard(order[-1])
    return [unit in out for unit in units]


def _names_of(rows: Sequence[Item], units: Sequence[int], places: Sequence[str]) -> dict[int, set[str]]:
    named: dict[int, set[str]] = defaultdict(set)
    for item, unit, place in zip(rows, units, places):
        named[unit].add(item.group or item.video or place)
    return named


def _together(rows: Sequence[Item], files: Sequence[Any], places: Sequence[str]) -> list[int]:
    """A unit number a row: the same for rows that share a file, a group or a video, or, without these, a place."""
    keys = []
    for item, file, place in zip(rows, files, places):
        keys.append([*_keys(item, file), *([] if _keys(item) else [("place", place)])])
    unit = tied(keys)
    numbers: dict[tuple, int] = {}
    return [numbers.setdefault(unit[of_row[0]], len(numbers)) for of_row in keys]


def _folders(rows: Sequence[Item]) -> list[str]:
    """By row its folder, where it is one of several of its label; else its own name."""
    folders = [PurePosixPath(item.name.replace("\\", "/")).parent for item in rows]
    common = {}
    for label in {item.label for item in rows}:
        of_label = [str(f) for f, item in zip(folders, rows) if item.label == label]
        common[label] = os.path.commonpath(of_label) if len({f[:1] == "/" for f in of_label}) == 1 else ""
    return [item.name if str(f) == (common[item.label] or ".") else str(f) for f, item in zip(folders, rows)]


def _clips(rows: Sequence[Item]) -> list[str]:
    """As `_folders`, by the folder's own name: real/a and fake/a are one clip's frames.

    So are real/004 and fake/004_011 of FaceForensics++. Other names that two folders of a label share say nothing.
    """
    folders = _folders(rows)
    full = {(item.label, folder) for item, folder in zip(rows, folders) if folder != item.name}
    alone = len({(label, PurePosixPath(folder).name) for label, folder in full}) == len(full)
    names = []
    for folder, item in zip(folders, rows):
        clip = PurePosixPath(folder).name
        numbers = re.fullmatch(r"(\d{3})(_\d{3})?", clip)
        named = numbers[1] if numbers else clip if alone else folder
        names.append(folder if folder == item.name else named)
    return names


# ------------------------------------------------------------------------------------------------ layouts
def _csv_rows(source: Path, report: DropReport) -> Iterator[Item]:
    rows = read_table(source)
    if not rows:
        raise ManifestError(f"{source}: no row in it; expected a path and a label a row, below a header or without one")
    header = list(rows[0][1])
    columns = {"path": column_of(header, PATH_COLUMNS), "label": column_of(header, LABEL_COLUMNS)}
    if missing := [name for name, column in columns.items() if column is None]:
        raise ManifestError(
            f"{source}: column {', '.join(missing)} is missing; found {header}, expected path (or {', '.join(PATH_COLUMNS[1:4])}"
            f", ...) and label (or {', '.join(LABEL_COLUMNS[1:])}); or, without a header, a path and its label a line"
        )
    others = {name: column_of(header, names) for name, names in OTHER_COLUMNS.items()}
    if unread := [name for name in header if name.strip() and name not in {*columns.values(), *others.values()}]:
        report.notes.append(
            f"columns that are not read: {', '.join(map(repr, unread[:8]))}{' ...' * (len(unread) > 8)}"
        )
    for number, row in rows:
        extra = {name: row[column].strip() if column else "" for name, column in others.items()}
        row = {name: row[column] for name, column in columns.items()}
        if not row["path"].strip() or not row["label"].strip():
            raise ManifestError(
                f"{source}, line {number}: no {'label' if row['path'].strip() else 'path'} in it, found {list(row.values())}; "
                "expected a path and after it its label"
            )
        file = as_file(source.parent, row["path"])
        if file == row["path"].strip():
            row["path"] = file
        label = _label(row["label"], f"{source}, line {number}")
        parts = PurePosixPath(row["path"].replace("\\", "/")).parts
        if "__MACOSX" in parts or parts and parts[-1].startswith("._"):
            report.add(row["path"], HIDDEN)
            continue
        if extra["mask"] not in ("", "whole"):
            extra["mask"] = str(source.parent / as_file(source.parent, extra["mask"]))
        extra["split"] = split_of(extra["split"])
        yield Item(row["path"], source.parent / file, label, **extra)


def _label(word: object, where: str) -> int:
    label = label_of(word)
    if label is None:
        raise ManifestError(f"{where}: label is {word!r}; {EXPECTED}")
    return label


def _folder_rows(source: Path, report: DropReport) -> Iterator[Item]:
    """Pictures below folders that say their label, a split's folder above or below; names are relative to `source`."""
    found = list(_label_folders(source, "", source.name, report, source))
    if {label for _, label, _, _ in found} != {0, 1}:
        there = ", ".join(sorted(name for name, _ in _subfolders(source))[:8]) or "no folder"
        raise ManifestError(
            f"{source}: expected the folders real/ and fake/ in it (or 0_real/ and 1_fake/, nature/ and ai/, with train/, "
            f"val/, test/ above or below them), found {there}; python -m solution.prepare knows raw data sets"
        )
    counts: Counter[tuple[str, int]] = Counter()
    for folder, label, split, dataset in sorted(found, key=lambda entry: (entry[1], entry[0])):
        prefix = folder.relative_to(source).as_posix()
        for inside in _files(str(folder), "", prefix, report):
            first, _, more = inside.partition("/")
            own = split or (split_of(first) if more and is_split(first) else "")
            counts[prefix, label] += 1
            name = f"{prefix}/{inside}"
            yield Item(printable(name), source / name, label, source=dataset, split=own)
    for (folder, label), count in counts.items():
        report.notes.append(f"{folder}/ is {('real', 'fake')[label]}: {count} files")


def _label_folders(
    folder: Path, split: str, dataset: str, report: DropReport, root: Path
) -> Iterator[tuple[Path, int, str, str]]:
    """(folder, label, split, data set) of the folders that say a label; what says none goes into `report`.

    Labels are said by the sub-folders of `folder` when both are there, or one by a word for it (a generator's name alone
    is a data set of GenImage's kind); else by those of its sub-folders, below a split or a data set.
    """
    inside = _subfolders(folder)
    labels = {name: label_of(name) for name, _ in inside}
    said = {0, 1} <= set(labels.values()) or any(label_of(name, generators=False) is not None for name in labels)
    for name, path in inside:
        found: Iterable[tuple[Path, int, str, str]] = ()
        if said and labels[name] is not None:
            found = [(path, labels[name], split, dataset)]
        elif is_split(name) and not split and not said:
            found = list(_label_folders(path, split_of(name), dataset, report, root))
        elif folder == root and not said:
            found = list(_label_folders(path, split, name, report, root))
        if not found:
            report.add(f"{path.relative_to(root).as_posix()}/", "a folder whose name and sub-folders say no label")
        yield from found
    for path in folder.iterdir():
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path.name) and path.is_file():
            report.add(printable(path.relative_to(root).as_posix()), "in no folder that says a label")


def _subfolders(folder: Path) -> list[tuple[str, Path]]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return [(name, folder / name) for name in names if not is_hidden(name)]


def _files(
    folder: str, inside: str, prefix: str, report: DropReport, above: frozenset[tuple] = frozenset()
) -> Iterator[str]:
    """The files below `folder`, each with `inside` before it, sorted; links are followed but never in a circle.

    What is hidden goes into `report`, with `prefix` before it.
    """
    found = os.stat(folder)
    here = found.st_dev, found.st_ino
    if here in above:
        return
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    for entry in entries:
        if is_hidden(entry.name):
            report.add(printable(f"{prefix}/{inside}{entry.name}"), HIDDEN)
        elif is_output(entry.name, names):
            report.add(printable(f"{prefix}/{inside}{entry.name}"), OUTPUT)
        elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _files(entry.path, f"{inside}{entry.name}/", prefix, report, above | {here})
        else:
            yield inside + entry.name


def _deepfakebench_rows(source: Path) -> Iterator[Item]:
    """The frames of a DeepfakeBench JSON, relative to its folder."""

    def refuse(line: str) -> None:
        raise ManifestError(
            f"{source}: {line}; a CSV with the columns path and label will do, and python -m solution.prepare knows other "
            "data sets' own lists"
        )

    for clip in clips(read_json(source), str(source), refuse):
        if len(clip.path) < 4:
            refuse(f"{'/'.join(clip.path)} should lie below a data set, a label and a split")
        video = f"{clip.label_name}/{clip.path[-1]}"
        generator = clip.label_name if clip.label else ""
        for name in clip.frames:
            # An absolute name stands for itself.
            path = source.parent / name
            mask = mask_beside(path) if clip.label else None
            mask = str(mask) if mask is not None and mask.is_file() else ""
            yield Item(name, path, clip.label, clip.path[0], clip.split, generator, video, mask)


def select(items: Sequence[Item], sampling: SamplingConfig, seed: int) -> tuple[list[Item], DropReport]:
    """`items` less the generators to leave out, after the frame cap per video and the per-source caps and drop rates,
    a fixed draw of `seed`.

    Raises:
        ConfigError: a cap or rate of a source, or a generator, that no picture has.
    """
    rng = np.random.default_rng([seed, 101])
    report, kept = DropReport(), []
    made_by = {item.generator for item in items if item.label}
    if unknown := set(sampling.leave_out) - made_by:
        raise ConfigError(f"sampling.leave_out names {sorted(unknown)}; the manifest has {sorted(made_by)}")
    for item in items:
        if item.label and item.generator in sampling.leave_out:
            report.add(item.name, f"generator {item.generator} is left out")
    items = [item for item in items if not (item.label and item.generator in sampling.leave_out)]
    videos: dict[tuple[str, int, str], list[Item]] = defaultdict(list)
    for item in items:
        if item.video:
            videos[item.source, item.label, item.video].append(item)
    spread = set()
    for frames in videos.values():  # the middle frame of each of equal stretches
        spread |= {frames[place].name for place in middle_places(len(frames), sampling.frames)}
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.video and item.name not in spread:
            report.add(item.name, f"more than {sampling.frames} frames of its video")
            continue
        groups[f"{item.source}/{'fake' if item.label else 'real'}"].append(item)
    cap = _rates("cap", sampling.cap, math.inf)
    drop = _rates("drop", sampling.drop, 1.0)
    unknown = (set(cap) | set(drop)) - set(groups)
    if unknown:
        raise ConfigError(f"sampling.cap/drop name {sorted(unknown)}; the manifest has {sorted(groups)}")
    for key, group in groups.items():
        order = rng.permutation(len(group))
        keep = round(len(group) * (1 - drop.get(key, 0.0)))
        keep = min(keep, int(cap.get(key, keep)))
        for index in order[keep:]:
            report.add(group[index].name, f"cap or drop rate of {key}")
        kept += [group[index] for index in sorted(order[:keep])]
    return kept, report


def _rates(field: str, settings: tuple[str, ...], most: float) -> dict[str, float]:
    rates = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            rates[key] = float(value)
        except ValueError:
            raise ConfigError(f"sampling.{field}: {setting!r} is not SOURCE/real=VALUE or SOURCE/fake=VALUE") from None
        if not 0 <= rates[key] <= most:
            raise ConfigError(f"sampling.{field}: {setting!r} must lie between 0 and {most:g}")
    return rates
