"""Layouts of raw data sets: which files are a video, what label they have, who is on them, where their masks lie.

Takes a folder as its authors or its mirrors ship it (or a DeepfakeBench JSON); gives `Entry`s in name order and a count of
what was passed over. Labels come from the data set's own folders and lists through a table of known names; a name that is
not in it is refused with what would be known. No picture is opened here.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solution.data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, printable
from solution.data.labels import EXPECTED, FAKE, REAL, is_split, label_of, split_of
from solution.errors import UsageError

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
# DF40's folders by kind: what the pictures show is generated whole in the third (DF40, table 1).
_DF40_SWAP = "fsgan faceswap simswap inswap blendface uniface mobileswap e4s facedancer deepfacelab"
_DF40_REENACT = (
    "fomm facevid2vid face_vid2vid fs_vid2vid wav2lip mraa one_shot_free oneshot pirender tpsm tpsmm lia dagan sadtalker "
    "mcnet hyperreenact heygen"
)
_DF40_WHOLE = (
    "vqgan stylegan2 stylegan3 styleganxl sd2_1 ddim ddpm rddm pixart dit sit midjourney mj whichisreal whichfaceisreal"
)
_DF40_EDIT = "collabdiff e4e stargan starganv2 styleclip"
DF40_METHODS = frozenset(f"{_DF40_SWAP} {_DF40_REENACT} {_DF40_WHOLE} {_DF40_EDIT}".split())
# Labels of DeepfakeBench's lists that are no words.
_BENCH_FAKES = frozenset(("ff_fh", "dfdcp_fakea", "dfdcp_fakeb"))
KNOWN = (
    f"real: {', '.join(sorted(REAL))}; fake: {', '.join(sorted(FAKE))}; with real_, _images, 0_, 1_, train_ and the like before "
    "or behind"
)


def plain(name: object) -> str:
    """A name in lower case, its words joined by `_`."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).strip().lower()).strip("_")


def known_label(name: object) -> int | None:
    """0 real or 1 fake for a label as data sets write it (see `label_of`), None for any other."""
    return 1 if plain(name) in _BENCH_FAKES else label_of(name)


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


# ---------------------------------------------------------------------------------------------------- walking
@dataclass
class Tree:
    """The files below a root: pictures, videos, and the lists among them (.json, .csv, .txt)."""

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
    elif suffix in (".json", ".csv", ".txt"):
        tree.lists.append(start + name)
    elif suffix in (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"):
        tree.passed.add("archive: unpack it first", start + name)
    else:
        tree.passed.add(f"no picture or video ({suffix or 'no suffix'})", start + name)


def _refuse_folder(error: OSError) -> None:
    raise LayoutError(f"{printable(str(error.filename))}: {error.strerror}; make it readable or take it out") from None


def read_text(path: Path) -> str:
    """A list's text: UTF-8 with or without its mark, or UTF-16 with one.

    Raises:
        LayoutError: another encoding, or a file that cannot be read.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise LayoutError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise LayoutError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
        LayoutError: it is none.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, LayoutError):
            raise
        raise LayoutError(f"{path}: no JSON ({error})") from None


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV with `,`, `;` or tabs, by lower-case column name."""
    text = read_text(path)
    first = text.split("\n", 1)[0]
    separator = max(",;\t", key=first.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    return [{plain(k): (v or "").strip() for k, v in row.items() if isinstance(k, str)} for row in rows]


# ---------------------------------------------------------------------------------------------------- FaceForensics++
_FF_STEM = re.compile(r"(\d{3,4})(?:_(\d{3,4}))?")
_DFD_STEM = re.compile(r"(\d\d)(?:_(\d\d))?__(.+?)(?:__[A-Z0-9]{8})?")
_COMPRESSIONS = ("raw", "c0", "c23", "c40")
_FF_ROOTS = {"original_sequences": 0, "manipulated_sequences": 1}
_DFD_ROOTS = {"dfd_original_sequences": 0, "dfd_manipulated_sequences": 1}


@dataclass(frozen=True)
class _Clip:
    """Where a video of FaceForensics++ or DFD lies: kind of folder, method, compression, its own name."""

    label: int
    method: str
    compression: str
    stem: str
    is_mask: bool


def _ff_clip(path: str) -> _Clip | None:
    parts = path.split("/")
    for at, part in enumerate(parts[:-1]):
        label = _FF_ROOTS.get(part)
        if label is not None and at + 2 < len(parts):
            below = parts[at + 2 : -1]
            compression = next((p for p in below if p in _COMPRESSIONS), "")
            return _Clip(label, parts[at + 1], compression, parts[-1], "masks" in below)
        label = _DFD_ROOTS.get(plain(part))
        if label is not None:
            return _Clip(label, ("actors", "DeepFakeDetection")[label], "", parts[-1], "masks" in parts)
    return None


def ff_people(name: str) -> tuple[str, ...]:
    """The identities in a video's name, `000_003` or `01_02__kitchen_pan__ABCDEFGH`; empty for another name."""
    if found := _FF_STEM.fullmatch(name):
        return tuple(f"ff++:{number}" for number in found.groups() if number)
    if found := _DFD_STEM.fullmatch(name):
        return tuple(f"actor:{number}" for number in found.groups()[:2] if number)
    return ()


def _ff_place(clip: _Clip) -> tuple[str, str, str] | None:
    """(method, compression, stem) of the real video that a fake was made from."""
    if found := _FF_STEM.fullmatch(clip.stem):
        return "youtube", clip.compression, found[1]
    if found := _DFD_STEM.fullmatch(clip.stem):
        return "actors", clip.compression, f"{found[1]}__{found[3]}"
    return None


def ff_splits(tree: Tree) -> dict[str, str]:
    """Person -> split, from train.json, val.json and test.json (lists of pairs of numbers)."""
    found: dict[str, str] = {}
    for name in tree.lists:
        split = {"train.json": "train", "val.json": "val", "test.json": "test"}.get(name.rpartition("/")[2])
        if split is None:
            continue
        pairs = read_json(tree.root / name)
        if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
            tree.passed.add("no FaceForensics++ split list", name)
            continue
        for number in (str(n) for pair in pairs for n in pair):
            if found.setdefault(f"ff++:{number}", split) != split:
                raise LayoutError(f"{name}: video {number} is in {found[f'ff++:{number}']} already")
    return found


def _common_split(people: Iterable[str], splits: dict[str, str]) -> str | None:
    """The one split of `people`; empty when none is known, None when they are in several."""
    known = {splits[p] for p in people if p in splits}
    return None if len(known) > 1 else next(iter(known), "")


def _faceforensics(tree: Tree) -> Iterator[Entry]:
    splits = ff_splits(tree)
    clips: dict[tuple[str, str, str], tuple[str, str, list[str], _Clip]] = {}
    masks: dict[tuple[str, str, str], list[str]] = {}
    for path, kind, files in tree.units():
        clip = _ff_clip(path)
        if clip is None:
            tree.passed.add("outside original_sequences and manipulated_sequences", files[0], len(files))
        elif clip.is_mask:
            masks.setdefault((clip.method, clip.compression, clip.stem), files)
            masks.setdefault((clip.method, "", clip.stem), files)
        elif clips.setdefault((clip.method, clip.compression, clip.stem), (path, kind, files, clip))[1] != kind:
            if kind == "video":
                clips[clip.method, clip.compression, clip.stem] = (path, kind, files, clip)
            tree.passed.add("frames of a video that is there itself", path)
    for key, (path, kind, files, clip) in clips.items():
        people = ff_people(clip.stem) or (f"{clip.method}:{clip.stem}",)
        split = _common_split(people, splits)
        if split is None:
            tree.passed.add("its two people are in different official splits", path)
            continue
        data_set = "dfd" if clip.method in ("actors", "DeepFakeDetection") else "ff++"
        place = clips.get(_ff_place(clip) or key) if clip.label else None
        yield Entry(
            path,
            tuple(files),
            kind,
            clip.label,
            f"{data_set}-{clip.compression}" if clip.compression else data_set,
            split,
            clip.method if clip.label else "",
            people,
            tuple(masks.get(key) or masks.get((clip.method, "", clip.stem)) or ()) if clip.label else (),
            place[0] if place else "",
        )


# ---------------------------------------------------------------------------------------------------- Celeb-DF
_CELEB_STEM = re.compile(r"id(\d+)(?:_id(\d+))?_(\d+)")
_CELEB_FOLDERS = {"celeb_real": 0, "youtube_real": 0, "celeb_synthesis": 1}


def celeb_people(name: str) -> tuple[str, ...]:
    """The identities in a video's name, `id0_0001` or `id0_id16_0001`; empty for another name."""
    found = _CELEB_STEM.fullmatch(name)
    return tuple(f"celeb:{number}" for number in found.groups()[:2] if number) if found else ()


def _celeb_tests(tree: Tree) -> dict[str, int]:
    """Folder/video -> label, of List_of_testing_videos.txt, whose lines read `1 YouTube-real/00170.mp4`; 1 is real."""
    tests = {}
    for name in tree.lists:
        if name.rpartition("/")[2].lower() != "list_of_testing_videos.txt":
            continue
        for number, line in enumerate(read_text(tree.root / name).splitlines(), start=1):
            if not line.strip():
                continue
            found = re.fullmatch(r"([01])\s+(\S+?)(?:\.\w+)?", line.strip())
            folder, _, video = (found[2] if found else "").replace("\\", "/").rpartition("/")
            label = _CELEB_FOLDERS.get(plain(folder))
            if not found or label is None:
                raise LayoutError(f"{name}, line {number}: {line!r}; expected `1 YouTube-real/00170.mp4`")
            if label != 1 - int(found[1]):
                raise LayoutError(f"{name}, line {number}: {line!r}: in this list 1 means real and 0 fake")
            tests[f"{plain(folder)}/{video}"] = label
    return tests


def _celeb(tree: Tree) -> Iterator[Entry]:
    tests = _celeb_tests(tree)
    units, listed = {}, set()
    for path, kind, files in tree.units():
        parts = path.split("/")
        folder = next((plain(p) for p in parts[:-1] if plain(p) in _CELEB_FOLDERS), None)
        if folder is None:
            tree.passed.add("outside Celeb-real, YouTube-real and Celeb-synthesis", files[0], len(files))
        elif units.setdefault((folder, parts[-1]), (path, kind, files))[1] != kind:
            tree.passed.add("frames of a video that is there itself", path)
    for (folder, name), (path, kind, files) in units.items():
        label, key = _CELEB_FOLDERS[folder], f"{folder}/{name}"
        listed.add(key)
        found = _CELEB_STEM.fullmatch(name)
        place = units.get(("celeb_real", f"id{found[1]}_{found[3]}")) if label and found else None
        yield Entry(
            path,
            tuple(files),
            kind,
            label,
            "celeb-df",
            "" if not tests else "test" if key in tests else "train",
            "Celeb-synthesis" if label else "",
            celeb_people(name) or (f"{folder}:{name}",),
            place=place[0] if place else "",
        )
    for key in sorted(set(tests) - listed):
        tree.passed.add("in the test list, but not there", key)


# ---------------------------------------------------------------------------------------------------- DFDC
def _is_dfdc(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(v, dict) and "label" in v for v in content.values())


def _dfdc(tree: Tree) -> Iterator[Entry]:
    """metadata.json lies beside its videos; test and validation videos have a labels.csv (filename,label)."""
    units = {path: (kind, files) for path, kind, files in tree.units()}
    rows: dict[str, tuple[int, str, str, str]] = {}
    for name in tree.lists:
        folder = name.rpartition("/")[0]
        base = name.rpartition("/")[2].lower()
        if base == "metadata.json":
            rows |= _dfdc_metadata(tree, name, folder, units)
        elif base == "labels.csv":
            rows |= _dfdc_labels(tree, name, folder, units)
    parts = {path.rpartition("/")[0] for path in rows}
    splits = {split for _, _, split, _ in rows.values()}
    for path in sorted(set(units) - set(rows)):
        tree.passed.add("not in metadata.json or labels.csv", units[path][1][0], len(units[path][1]))
    for path, (label, original, split, _) in sorted(rows.items()):
        folder, _, own = path.rpartition("/")
        real = f"{folder}/{original}" if folder else original
        # A part holds its actors whole, an original none of its actor's other videos: parts where there are enough.
        people = (f"dfdc:{folder}",) if len(parts) >= 10 else (f"dfdc:{original or own}",)
        yield Entry(
            path,
            tuple(units[path][1]),
            units[path][0],
            label,
            "dfdc",
            split if len(splits) > 1 else "",
            "dfdc" if label else "",
            people,
            place=real if label and real in rows and not rows[real][0] else "",
        )


def _dfdc_metadata(tree: Tree, name: str, folder: str, units: dict) -> dict[str, tuple[int, str, str, str]]:
    content, rows = read_json(tree.root / name), {}
    if not _is_dfdc(content):
        raise LayoutError(f'{name}: expected {{"video.mp4": {{"label": "REAL" or "FAKE", ...}}}}')
    for video, row in content.items():
        label = known_label(row.get("label", ""))
        if label is None:
            raise LayoutError(f"{name}: {video} has the label {row.get('label')!r}; expected REAL or FAKE")
        path = _beside(folder, video, units)
        if path is None:
            tree.passed.add("in metadata.json, but not there", f"{folder}/{video}" if folder else video)
        else:
            split = known_split(row.get("split", ""))
            original = row.get("original")
            rows[path] = (label, stem(original) if original else "", split, folder)
    return rows


def _dfdc_labels(tree: Tree, name: str, folder: str, units: dict) -> dict[str, tuple[int, str, str, str]]:
    rows = {}
    split = next((known_split(p) for p in reversed(folder.split("/")) if is_split(p)), "test")
    for number, row in enumerate(read_table(tree.root / name), start=2):
        label = known_label(row.get("label", ""))
        if label is None or not row.get("filename"):
            raise LayoutError(f"{name}, line {number}: expected the columns filename and label (0 real, 1 fake)")
        path = _beside(folder, row["filename"], units)
        if path is None:
            tree.passed.add("in labels.csv, but not there", row["filename"])
        else:
            rows[path] = (label, stem(row["original"]) if row.get("original") else "", split, folder)
    return rows


def _beside(folder: str, video: str, units: dict) -> str | None:
    """The unit of a listed video: beside its list, or in `videos` or `frames` there."""
    own = stem(video) or video
    for between in ("", "videos/", "frames/"):
        path = f"{folder}/{between}{own}" if folder else between + own
        if path in units:
            return path
    return None


def _dfdcp(tree: Tree) -> Iterator[Entry]:
    """dataset.json: "method_A/ID/VIDEO.mp4" -> label, set, target_id, swapped_id."""
    units = {path: (kind, files) for path, kind, files in tree.units()}
    name = next(n for n in tree.lists if n.rpartition("/")[2].lower() == "dataset.json")
    folder, content, listed = name.rpartition("/")[0], read_json(tree.root / name), set()
    if not _is_dfdc(content):
        raise LayoutError(f'{name}: expected {{"method_A/ID/VIDEO.mp4": {{"label": ..., "set": ...}}}}')
    for video, row in sorted(content.items()):
        label = known_label(row.get("label", ""))
        if label is None:
            raise LayoutError(f"{name}: {video} has the label {row.get('label')!r}; expected real or fake")
        path = _beside(folder, video, units) or _in_frames(folder, video, units)
        if path is None:
            tree.passed.add("in dataset.json, but not there", video)
            continue
        listed.add(path)
        people = {str(row[key]) for key in ("target_id", "swapped_id") if row.get(key) not in (None, "")}
        split = known_split(row.get("set", ""))
        kind, files = units[path]
        generator = video.split("/")[0] if label else ""
        who = tuple(f"dfdcp:{p}" for p in sorted(people)) or (f"dfdcp:{path}",)
        yield Entry(path, tuple(files), kind, label, "dfdcp", split, generator, who)
    for path in sorted(set(units) - listed):
        tree.passed.add("not in dataset.json", path)


def _in_frames(folder: str, video: str, units: dict) -> str | None:
    """DeepfakeBench's copy of DFDCP: method_A/frames/VIDEO."""
    parts = stem(video).split("/")
    path = "/".join(filter(None, (folder, parts[0], "frames", parts[-1])))
    return path if path in units else None


# ---------------------------------------------------------------------------------------------------- DeepfakeBench
def _bench_json(content: Any) -> bool:
    """Whether a JSON is dataset -> label -> split -> [compression] -> video -> {label, frames}."""
    for _ in range(6):
        if not isinstance(content, dict) or not content:
            return False
        if "frames" in content:
            return True
        content = next((v for v in content.values() if v), None)
    return False


def _bench_videos(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict) and "frames" in value:
            yield (*path, key), value
        else:
            yield from _bench_videos(value, (*path, key))


def _deepfakebench(tree: Tree) -> Iterator[Entry]:
    """Every DeepfakeBench JSON of the tree; a video that several lists or splits name is taken once."""
    videos: dict[str, tuple[Entry, set[str]]] = {}
    for name in tree.lists:
        if not name.endswith(".json") or not _bench_json(content := read_json(tree.root / name)):
            continue
        for path, row in _bench_videos(content):
            entry, split = _bench_entry(tree, name, path, row)
            if entry is None:
                continue
            known = videos.setdefault(entry.name, (entry, set()))
            if known[0].label != entry.label:
                raise LayoutError(f"{name}: {entry.name} is real in one list and fake in another")
            known[1].add(split)
    everywhere = {e.source for e, s in videos.values()} - {e.source for e, s in videos.values() if len(s) < 3}
    for entry, splits in videos.values():
        if entry.source in everywhere:
            # DFD's list names every video in all three: that is no split.
            split = ""
        else:
            split = next((s for s in ("test", "val", "train") if s in splits), "")
            if len(splits) > 1:
                tree.passed.add(f"also listed in another split than {split}", entry.name)
        yield Entry(**(entry.__dict__ | {"split": split}))


def _bench_entry(tree: Tree, name: str, path: tuple[str, ...], row: dict) -> tuple[Entry | None, str]:
    data_set, label_name, video = path[0], path[1] if len(path) > 2 else "", path[-1]
    split = next((known_split(p) for p in path[2:-1] if is_split(p)), "")
    said = row.get("label", label_name)
    label = known_label(said)
    if label is None:
        raise LayoutError(f"{name}: {'/'.join(path)} has the label {said!r}; {EXPECTED}")
    frames = [f for f in (_bench_file(tree, name, str(f)) for f in row["frames"] or ()) if f]
    if not frames:
        tree.passed.add(f"no frame of the video is there ({name})", "/".join(path))
        return None, split
    masks = [m for m in (_bench_file(tree, name, str(m)) for m in row.get("masks") or ()) if m]
    if label and not masks:
        beside = [_swap_part(frame, "frames", "masks") for frame in frames]
        masks = [m for m in beside if m and (tree.root / m).is_file()]
    folder = frames[0].rpartition("/")[0]
    entry_name = folder if len(frames) > 1 else stem(frames[0])
    people = ff_people(video) or celeb_people(video) or (f"{data_set}:{video}",)
    generator = label_name if label else ""
    kind = "frames" if len(frames) > 1 else "picture"
    return Entry(entry_name, tuple(frames), kind, label, data_set, "", generator, people, tuple(masks)), split


def _bench_file(tree: Tree, name: str, frame: str) -> str | None:
    """A listed file, relative to the root: beside its list, below the root, or below it without the list's own folders."""
    frame = frame.replace("\\", "/")
    beside = os.path.normpath(os.path.join(os.path.dirname(name), frame)).replace(os.sep, "/")
    parts = frame.strip("/").split("/")
    for candidate in (beside, *("/".join(parts[at:]) for at in range(len(parts)))):
        if not candidate.startswith("..") and (tree.root / candidate).is_file():
            return os.path.relpath(tree.root / candidate, tree.root).replace(os.sep, "/")
    return None


def _swap_part(path: str, old: str, new: str) -> str | None:
    parts = path.split("/")
    if old not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index(old)] = new
    return stem("/".join(parts)) + ".png"


# ---------------------------------------------------------------------------------------------------- frames in folders
_STRONG = frozenset(("real", "reals", "fake", "fakes"))


def _meaning(path: str) -> tuple[int | None, str, int]:
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


def _wilddeepfake(tree: Tree) -> Iterator[Entry]:
    """real_train, fake_train, real_test, fake_test; in each a folder a video, in it one a face sequence."""
    for path, kind, files in tree.units():
        label, split, _ = _meaning(files[0])
        if label is None:
            tree.passed.add("outside real_train, fake_train, real_test and fake_test", files[0], len(files))
            continue
        parts = path.split("/")
        at = next(i for i, part in enumerate(parts) if folder_meaning(part)[0] is not None)
        inner = [part for part in parts[at + 1 :] if plain(part) != "extracted"]
        video = f"wilddeepfake:{parts[at]}:{inner[0] if inner else path}"
        yield Entry(path, tuple(files), kind, label, "wilddeepfake", split, "wild" if label else "", (video,))


def _df40(tree: Tree) -> Iterator[Entry]:
    """A folder a method, in it ff and cdf or real and fake, in it one a video; FaceForensics++'s reals may lie beside."""
    splits = ff_splits(tree)
    units = list(tree.units())
    masks = {path: files for path, _, files in units if "masks" in path.split("/")}
    for path, kind, files in units:
        parts = path.split("/")
        at = next((i for i, part in enumerate(parts) if plain(part) in DF40_METHODS), None)
        if path in masks:
            continue
        clip = _ff_clip(path) if at is None else None
        if at is None and (clip is None or clip.label):
            label = next((v for p in parts if (v := _CELEB_FOLDERS.get(plain(p))) is not None), None)
            if label != 0:
                tree.passed.add("in no folder of a DF40 method", files[0], len(files))
                continue
        below = parts[at + 1 :] if at is not None else []
        label = 1 if at is not None and _meaning("/".join((*below, "x")))[0] != 0 else 0
        people = ff_people(parts[-1]) or celeb_people(parts[-1]) or (f"df40:{path}",)
        when = next((known_split(p) for p in parts if is_split(p)), "") or _common_split(people, splits)
        if when is None:
            tree.passed.add("its two people are in different official splits", path)
            continue
        method = parts[at] if at is not None and label else ""
        mask = (WHOLE,) if plain(method) in _DF40_WHOLE.split() else tuple(masks.get(_mask_folder(path)) or ())
        yield from _sequence(path, kind, files, label, "df40", when, method, people, mask)


def _mask_folder(path: str) -> str:
    return re.sub(r"(^|/)frames(/|$)", r"\1masks\2", path)


def _sequence(
    path: str,
    kind: str,
    files: Sequence[str],
    label: int,
    source: str,
    split: str,
    generator: str,
    people: tuple[str, ...],
    masks: tuple[str, ...],
) -> Iterator[Entry]:
    """One entry for the frames of a video; one a picture where the folder is not named as a video is."""
    if kind == "video" or _names_a_video(path.rpartition("/")[2]):
        yield Entry(path, tuple(files), kind, label, source, split, generator, people, masks)
        return
    for name in files:
        who = (f"{source}:{stem(name)}",)
        yield Entry(stem(name), (name,), "picture", label, source, split, generator, who, masks)


def _names_a_video(folder: str) -> bool:
    return bool(_FF_STEM.fullmatch(folder) or _CELEB_STEM.fullmatch(folder) or _DFD_STEM.fullmatch(folder))


_MANY = 4  # sub-folders of a label from which each is taken for one thing that no split may cut


def _folders(tree: Tree) -> Iterator[Entry]:
    """Folders of the usual names, with or without train, val and test; sub-folders are videos, people or generators."""
    names = [name for name in (*tree.pictures, *tree.videos) if not _is_mask(name)]
    meanings = {name: _meaning(name) for name in names}
    if bad := [name for name, (label, _, _) in meanings.items() if label is None]:
        folders = sorted({name.rpartition("/")[0] or "." for name in bad})
        raise LayoutError(
            f"{len(bad)} files lie in no folder of a known label, in {', '.join(map(printable, folders[:8]))}"
            f"{' ...' if len(folders) > 8 else ''}. Known are {KNOWN}"
        )
    masks, source = _masks_by_path(tree), tree.root.resolve().name
    inner: dict[int, set[str]] = {0: set(), 1: set()}
    for path, kind, files in tree.units():
        if not _is_mask(files[0]) and kind == "frames" and len(path.split("/")) > meanings[files[0]][2]:
            inner[meanings[files[0]][0] or 0].add(path)
    for path, kind, files in tree.units():
        if _is_mask(files[0]):
            continue
        label, split, below = meanings[files[0]]
        folders = files[0].split("/")[below:-1]
        own = path.rpartition("/")[2]
        mask = tuple(m for name in files for m in masks.get(_mask_key(name), ())) if label else ()
        generator = folders[0] if label and folders else ""
        if kind == "video" or (folders and _names_a_video(own)):
            generator = "" if kind == "frames" and len(folders) < 2 else generator
            yield Entry(path, tuple(files), kind, label, source, split, generator, _people(own, path), mask)
            continue
        shared = (f"folder:{path}",) if folders and len(inner[label]) >= _MANY else ()
        for name in files:
            mask = masks.get(_mask_key(name), ()) if label else ()
            who = shared or _people(stem(name).rpartition("/")[2], stem(name))
            yield Entry(stem(name), (name,), "picture", label, source, split, generator, who, mask)


def _people(own: str, path: str) -> tuple[str, ...]:
    """The identities in a name of FaceForensics++, DFD or Celeb-DF; else the file is its own."""
    found = _FF_STEM.fullmatch(own)
    return (ff_people(own) if not found or len(found[1]) == 3 else ()) or celeb_people(own) or (f"file:{path}",)


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


_NTIRE_NAME = re.compile(r"(\d+)_(real|fake)", re.IGNORECASE)


def _ntire(tree: Tree) -> Iterator[Entry]:
    """The challenge's training pictures, 0000_real.png and 0000_fake.png, in one folder."""
    for name in (*tree.pictures, *tree.videos):
        found = _NTIRE_NAME.fullmatch(stem(name).rpartition("/")[2])
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


def _table_columns(rows: list[dict[str, str]]) -> tuple[str, str] | None:
    """The columns of the path and of the label; None when the table has none."""
    if not rows:
        return None
    path = next((c for c in _PATHS if c in rows[0]), None)
    label = next((c for c in (*_WORDS, *_NUMBERS) if c in rows[0]), None)
    return (path, label) if path and label else None


def _kaggle(tree: Tree) -> Iterator[Entry]:
    """CSVs with a path and a label a row, beside or above their files; a file name such as train.csv says the split."""
    files = {stem(name): name for name in (*tree.pictures, *tree.videos)}
    files |= {name: name for name in (*tree.pictures, *tree.videos)}
    taken: dict[str, Entry] = {}
    for name in tree.lists:
        if not name.lower().endswith(".csv"):
            continue
        rows = read_table(tree.root / name)
        columns = _table_columns(rows)
        if columns is None:
            tree.passed.add("a table without path and label", name)
            continue
        for number, row in enumerate(rows, start=2):
            entry = _kaggle_entry(tree, name, number, row, columns, files)
            if entry is None:
                continue
            if entry.label != taken.setdefault(entry.name, entry).label:
                raise LayoutError(f"{name}, line {number}: {entry.name} has both labels")
            if entry.split != taken[entry.name].split:
                tree.passed.add(f"listed again, in {entry.split or 'no split'}", entry.name)
    yield from taken.values()
    for path in sorted({files[k] for k in files} - {e.files[0] for e in taken.values()}):
        if not _is_mask(path):
            tree.passed.add("in no table", path)


def _kaggle_entry(
    tree: Tree, name: str, number: int, row: dict[str, str], columns: tuple[str, str], files: dict[str, str]
) -> Entry | None:
    path_column, label_column = columns
    said, label = row[label_column], known_label(row[label_column])
    if label is None:
        raise LayoutError(f"{name}, line {number}: {label_column} is {said!r}; {EXPECTED}")
    folder = name.rpartition("/")[0]
    path = row[path_column].replace("\\", "/").removeprefix("./")
    file = next((files[p] for p in (f"{folder}/{path}" if folder else path, path) if p in files), None)
    file = file or _by_tail(path, files)
    if file is None:
        tree.passed.add(f"in {name}, but not there", path)
        return None
    folders = {folder_meaning(p)[0] for p in file.split("/")[:-1]} - {None}
    if folders and folders != {label}:
        raise LayoutError(
            f"{name}, line {number}: {label_column} is {said!r}, but {file} lies in a folder of the other label. Here 0 is "
            "real and 1 fake: turn the column round, or use --layout folders to go by the folders"
        )
    split = known_split(row.get("split", "")) or known_split(Path(name).stem)
    kind = "video" if file in tree.videos else "picture"
    mask = row.get("mask", "")
    mask = next(
        (files[p] for p in (f"{folder}/{mask}" if folder else mask, mask) if p in files), mask if mask == WHOLE else ""
    )
    who = row.get("group") or row.get("video_id") or ""
    people = (f"group:{who}",) if who else _people(stem(file).rpartition("/")[2], stem(file))
    generator = (row.get("generator") or row.get("method") or "") if label else ""
    source = row.get("source") or tree.root.resolve().name
    return Entry(stem(file), (file,), kind, label, source, split, generator, people, (mask,) if mask and label else ())


def _by_tail(path: str, files: dict[str, str]) -> str | None:
    """A file that the end of `path` names below the root: tables are written where their author had the files."""
    parts = path.split("/")
    return next((files[p] for at in range(1, len(parts)) if (p := "/".join(parts[at:])) in files), None)


# ---------------------------------------------------------------------------------------------------- choosing
_LAYOUTS: dict[str, tuple[Callable[[Tree], Iterator[Entry]], bool]] = {
    "ff++": (_faceforensics, False),
    "celeb-df": (_celeb, False),
    "dfdc": (_dfdc, False),
    "dfdcp": (_dfdcp, False),
    "deepfakebench": (_deepfakebench, True),
    "wilddeepfake": (_wilddeepfake, True),
    "df40": (_df40, True),
    "kaggle": (_kaggle, False),
    "ntire": (_ntire, False),
    "folders": (_folders, False),
}
LAYOUTS = tuple(_LAYOUTS)


def detect(tree: Tree) -> str:
    """The name of a tree's layout.

    Raises:
        LayoutError: none fits, or several data sets lie side by side.
    """
    folders = tree.folders()
    words = {plain(name) for name in folders}
    bases = {name.rpartition("/")[2].lower() for name in tree.lists}
    pictures = [stem(name).rpartition("/")[2] for name in tree.pictures]
    if any(n.endswith(".json") and _bench_json(read_json(tree.root / n)) for n in tree.lists):
        return "deepfakebench"
    found = {
        "ff++": bool(folders & set(_FF_ROOTS) or words & set(_DFD_ROOTS)),
        "celeb-df": "celeb_synthesis" in words,
        "dfdcp": "dataset.json" in bases,
        "dfdc": "metadata.json" in bases,
        "wilddeepfake": len(words & {"real_train", "fake_train", "real_test", "fake_test"}) >= 2,
        "ntire": bool(pictures) and all(_NTIRE_NAME.fullmatch(own) for own in pictures),
    }
    several = [name for name, there in found.items() if there]
    if set(several) <= {"ff++"} and "manipulated_sequences" not in folders and _df40_folders(tree):
        return "df40"
    if len(several) > 1:
        raise LayoutError(
            f"{tree.root}: several data sets ({', '.join(several)}); prepare each folder by itself, or say --layout"
        )
    if several:
        return several[0]
    if any(n.lower().endswith(".csv") and _table_columns(read_table(tree.root / n)) for n in tree.lists):
        return "kaggle"
    if any(folder_meaning(name)[0] is not None for name in folders):
        return "folders"
    names = ", ".join(printable(n) for n in sorted(folders)[:12]) or "no folders"
    raise LayoutError(f"{tree.root}: no known layout; found {names}. Known are {', '.join(LAYOUTS)}; {KNOWN}")


def _df40_folders(tree: Tree) -> bool:
    """Whether a folder of a DF40 method stands above every folder that says a label."""
    for name in (*tree.pictures, *tree.videos):
        for part in name.split("/")[:-1]:
            if plain(part) in DF40_METHODS:
                return True
            if folder_meaning(part)[0] is not None:
                break
    return False


def find_entries(source: Path, layout: str = "auto", leave_out: Path | None = None) -> Found:
    """Everything that a raw data set holds, by its layout.

    source: the data set's folder, or a DeepfakeBench JSON (its folder is then the root). leave_out: a folder inside it
    that is not entered.

    Raises:
        LayoutError: nothing there, an unknown layout, a label that the table does not know, a file with both labels.
    """
    source = Path(source)
    if not source.exists():
        raise LayoutError(f"{printable(str(source))}: there is no such folder")
    root = source if source.is_dir() else source.parent
    tree = walk(root, leave_out)
    if not source.is_dir():
        if source.suffix.lower() != ".json":
            raise LayoutError(f"{source}: expected a folder or a DeepfakeBench JSON")
        tree.lists = [source.name]
        layout = "deepfakebench" if layout == "auto" else layout
    if not tree.pictures and not tree.videos:
        raise LayoutError(f"{root}: no pictures or videos in it")
    layout = detect(tree) if layout == "auto" else layout
    read, cropped = _LAYOUTS[layout]
    try:
        entries = sorted(read(tree), key=lambda entry: entry.name)
    except StopIteration:
        raise LayoutError(f"{root}: not of the layout {layout}: its list is not there") from None
    if not entries:
        reasons = "; ".join(f"{row['count']} {row['reason']} (e.g. {row['example']})" for row in tree.passed.rows())
        raise LayoutError(f"{root}: nothing in it is of the layout {layout}. {reasons}".rstrip())
    return Found(layout, _unique(entries), tree.passed, cropped)


def _unique(entries: list[Entry]) -> list[Entry]:
    """Names made unique: a.png and a.jpg in one folder keep their suffix in it."""
    counts = Counter(entry.name for entry in entries)
    return [
        entry if counts[entry.name] == 1 else Entry(**(entry.__dict__ | {"name": entry.files[0].replace(".", "_")}))
        for entry in entries
    ]
