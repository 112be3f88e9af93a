"""Layouts of the data sets of videos that have one: FaceForensics++ with DFD, Celeb-DF, DFDC and its preview, and others.

Each reader takes a `Tree` and gives `Entry`s with the labels, splits, people, masks and pairs that its authors state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from solution.data.labels import label_of
from solution.data.lists import read_json, read_text
from solution.data.raw import (
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

# ---------------------------------------------------------------------------------------------------- FaceForensics++
FF_STEM = re.compile(r"(\d{3,4})(?:_(\d{3,4}))?")
_DFD_STEM = re.compile(r"(\d\d)(?:_(\d\d))?__(.+?)(?:__[A-Z0-9]{8})?")
_COMPRESSIONS = ("raw", "c0", "c23", "c40")
FF_ROOTS = {"original_sequences": 0, "manipulated_sequences": 1}
DFD_ROOTS = {"dfd_original_sequences": 0, "dfd_manipulated_sequences": 1}


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
        label = FF_ROOTS.get(part)
        if label is not None and at + 2 < len(parts):
            below = parts[at + 2 : -1]
            compression = next((p for p in below if p in _COMPRESSIONS), "")
            return _Clip(label, parts[at + 1], compression, parts[-1], "masks" in below)
        label = DFD_ROOTS.get(plain(part))
        if label is not None:
            return _Clip(label, ("actors", "DeepFakeDetection")[label], "", parts[-1], "masks" in parts)
    return None


def ff_people(name: str) -> tuple[str, ...]:
    """The identities in a video's name, `000_003` or `01_02__kitchen_pan__ABCDEFGH`; empty for another name."""
    if found := FF_STEM.fullmatch(name):
        return tuple(f"ff++:{number}" for number in found.groups() if number)
    if found := _DFD_STEM.fullmatch(name):
        return tuple(f"actor:{number}" for number in found.groups()[:2] if number)
    return ()


def _ff_place(clip: _Clip) -> tuple[str, str, str] | None:
    """(method, compression, stem) of the real video that a fake was made from."""
    if found := FF_STEM.fullmatch(clip.stem):
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


def faceforensics(tree: Tree) -> Iterator[Entry]:
    """original_sequences/SOURCE and manipulated_sequences/METHOD, in each compressions with videos or frames, and masks."""
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
CELEB_STEM = re.compile(r"id(\d+)(?:_id(\d+))?_(\d+)")
_CELEB_FOLDERS = {"celeb_real": 0, "youtube_real": 0, "celeb_synthesis": 1}


def celeb_people(name: str) -> tuple[str, ...]:
    """The identities in a video's name, `id0_0001` or `id0_id16_0001`; empty for another name."""
    found = CELEB_STEM.fullmatch(name)
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


def celeb_df(tree: Tree) -> Iterator[Entry]:
    """Celeb-real, YouTube-real and Celeb-synthesis, of both versions; what the test list names is test."""
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
        found = CELEB_STEM.fullmatch(name)
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


def dfdc(tree: Tree) -> Iterator[Entry]:
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
        label = label_of(row.get("label", ""))
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
    split = next((known_split(p) for p in reversed(folder.split("/")) if known_split(p)), "test")
    for number, row in read_table(tree.root / name):
        label = label_of(row.get("label", ""))
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


def dfdc_preview(tree: Tree) -> Iterator[Entry]:
    """dataset.json: "method_A/ID/VIDEO.mp4" -> label, set, target_id, swapped_id."""
    units = {path: (kind, files) for path, kind, files in tree.units()}
    name = next((n for n in tree.lists if n.rpartition("/")[2].lower() == "dataset.json"), None)
    if name is None:
        raise LayoutError(f"{tree.root}: no dataset.json, which holds the labels of DFDC's preview")
    folder, content, listed = name.rpartition("/")[0], read_json(tree.root / name), set()
    if not _is_dfdc(content):
        raise LayoutError(f'{name}: expected {{"method_A/ID/VIDEO.mp4": {{"label": ..., "set": ...}}}}')
    for video, row in sorted(content.items()):
        label = label_of(row.get("label", ""))
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


# ---------------------------------------------------------------------------------------------------- WildDeepfake and DF40
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


def wilddeepfake(tree: Tree) -> Iterator[Entry]:
    """real_train, fake_train, real_test, fake_test; in each a folder a video, in it one a face sequence."""
    for path, kind, files in tree.units():
        label, split, _ = folder_label(files[0])
        if label is None or not split:
            tree.passed.add("outside real_train, fake_train, real_test and fake_test", files[0], len(files))
            continue
        parts = path.split("/")
        at = next(i for i, part in enumerate(parts) if folder_meaning(part)[0] is not None)
        inner = [part for part in parts[at + 1 :] if plain(part) != "extracted"]
        video = f"wilddeepfake:{parts[at]}:{inner[0] if inner else path}"
        yield Entry(path, tuple(files), kind, label, "wilddeepfake", split, "wild" if label else "", (video,))


def df40(tree: Tree) -> Iterator[Entry]:
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
        label = 1 if at is not None and folder_label("/".join((*below, "x")))[0] != 0 else 0
        people = ff_people(parts[-1]) or celeb_people(parts[-1]) or (f"df40:{path}",)
        when = next((known_split(p) for p in parts if known_split(p)), "") or _common_split(people, splits)
        if when is None:
            tree.passed.add("its two people are in different official splits", path)
            continue
        method = parts[at] if at is not None and label else ""
        mask = (WHOLE,) if plain(method) in _DF40_WHOLE.split() else tuple(masks.get(_mask_folder(path)) or ())
        yield from _sequence(Entry(path, tuple(files), kind, label, "df40", when, method, people, mask))


def _mask_folder(path: str) -> str:
    return re.sub(r"(^|/)frames(/|$)", r"\1masks\2", path)


def _sequence(whole: Entry) -> Iterator[Entry]:
    """One entry for the frames of a video; one a picture where the folder is not named as a video is."""
    if whole.kind == "video" or names_a_video(whole.name.rpartition("/")[2]):
        yield whole
        return
    for name in whole.files:
        who = (f"{whole.source}:{stem(name)}",)
        yield replace(whole, name=stem(name), files=(name,), kind="picture", people=who)


def names_a_video(folder: str) -> bool:
    """Whether a folder is named as FaceForensics++, DFD or Celeb-DF name a video."""
    return bool(FF_STEM.fullmatch(folder) or CELEB_STEM.fullmatch(folder) or _DFD_STEM.fullmatch(folder))
