"""Manifests (CSV, folders, DeepfakeBench JSON) to `Item`s: read, split, capped, drawn; what is left out has its reason.

Takes a path; returns `Item`s in the manifest's order and a `DropReport`. Nothing here opens a picture.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from solution.config import ConfigError, SamplingConfig
from solution.data.images import IMAGE_SUFFIXES, stable_seed
from solution.data.videos import middle_places


class ManifestError(ValueError):
    """A manifest that cannot be used: names the file, the row, what was found and what was expected."""


@dataclass(frozen=True)
class Item:
    """One picture of a manifest. `name` is its path as the manifest writes it; scores join by it."""

    name: str
    path: Path
    label: int
    source: str = ""
    split: str = ""
    generator: str = ""
    video: str = ""
    mask: str = ""


@dataclass
class DropReport:
    """Every row that a manifest lost, and why."""

    dropped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.dropped.append((name, reason))

    def summary(self) -> str:
        """One line a reason, with its count and an example."""
        examples: dict[str, str] = {}
        for name, reason in self.dropped:
            examples.setdefault(reason, name)
        counts = Counter(reason for _, reason in self.dropped)
        return "\n".join(f"dropped {n}: {reason} (e.g. {examples[reason]})" for reason, n in counts.most_common())


# ------------------------------------------------------------------------------------------------ reading
def read_manifest(
    source: Path | str, *, split: str | None = None, videos: bool = False
) -> tuple[list[Item], DropReport]:
    """The pictures of a manifest, in its order, and a report of the rows left out.

    source: a CSV (`path,label[,source,split,generator,mask,video]`, paths relative to it), a folder with `real/` and
    `fake/`, or a DeepfakeBench JSON (in the folder its frames are relative to; the forgery masks lie beside the frames,
    `masks` for `frames` in the path, where a release has them). split: keep only rows of that split; of rows that name
    none, a tenth of the videos or pictures, by name, is `val` and the rest `train`.
    videos: keep rows whose path is a video file too; a row is otherwise a picture.

    Raises:
        ManifestError: nothing usable in it, an unknown layout, a bad label, or a missing column.
    """
    source = Path(source)
    items, report, seen = [], DropReport(), set()
    for item in _rows(source):
        if split is not None and split != (item.split or _held_out(item)):
            continue
        suffix = item.path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES and not videos:
            report.add(item.name, f"not a picture ({suffix or 'no suffix'})")
        elif not item.path.exists():
            report.add(item.name, "file is missing")
        elif item.name in seen:
            report.add(item.name, "listed twice")
        else:
            seen.add(item.name)
            items.append(item)
    if not items:
        wanted = f" of split {split!r}" if split else ""
        raise ManifestError(f"{source}: no usable picture{wanted}\n{report.summary()}".rstrip())
    return items, report


def _rows(source: Path) -> Iterator[Item]:
    """Every row of a manifest, as it stands there."""
    if not source.exists():
        raise ManifestError(f"{source}: no such manifest; expected a CSV, a DeepfakeBench JSON, or a folder")
    if source.is_dir():
        return _folder_rows(source)
    if source.suffix.lower() == ".csv":
        return _csv_rows(source)
    if source.suffix.lower() == ".json":
        return _deepfakebench_rows(source)
    raise ManifestError(f"{source}: expected a .csv, a .json, or a folder with real/ and fake/")


def manifest_splits(source: Path | str) -> set[str]:
    """The splits that a manifest's rows belong to."""
    return {item.split or _held_out(item) for item in _rows(Path(source))}


def draw_items(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """At most `limit` items, a fixed draw of `seed`, in their old order; 0: all."""
    if not 0 < limit < len(items):
        return list(items)
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in sorted(order[:limit])]


def _held_out(item: Item) -> str:
    """The split of a row that names none: a tenth of the videos (or pictures), by name, is held out as `val`."""
    return "val" if stable_seed(item.video or item.name) % 10 == 0 else "train"


def _csv_rows(source: Path) -> Iterator[Item]:
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"path", "label"} - set(reader.fieldnames or ())
        if missing:
            raise ManifestError(f"{source}: column {', '.join(sorted(missing))} is missing; found {reader.fieldnames}")
        for number, row in enumerate(reader, start=2):
            extra = {k: row.get(k) or "" for k in ("source", "split", "generator", "video", "mask")}
            if not row["path"] or not row["label"]:
                raise ManifestError(f"{source}, line {number}: no path or no label")
            label = _label(row["label"], f"{source}, line {number}")
            if extra["mask"] not in ("", "whole"):
                extra["mask"] = str(source.parent / extra["mask"])
            yield Item(row["path"], source.parent / row["path"], label, **extra)


def _label(text: str, where: str) -> int:
    labels = {"0": 0, "1": 1, "real": 0, "fake": 1}
    if text.strip().lower() not in labels:
        raise ManifestError(f"{where}: label is {text!r}; expected 0 or real, 1 or fake")
    return labels[text.strip().lower()]


def _folder_rows(source: Path) -> Iterator[Item]:
    if not (source / "real").is_dir() or not (source / "fake").is_dir():
        raise ManifestError(f"{source}: expected the folders real/ and fake/ in it")
    for label, name in enumerate(("real", "fake")):
        for path in sorted((source / name).rglob("*")):
            if path.is_file():
                yield Item(path.relative_to(source).as_posix(), path, label, source=source.name)


def _deepfakebench_rows(source: Path) -> Iterator[Item]:
    """dataset -> label -> split -> [compression] -> video -> {label, frames}; frames relative to the JSON's folder."""
    try:
        tree = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ManifestError(f"{source}: no JSON ({error})") from None
    for dataset, labels in tree.items():
        for label_name, splits in labels.items():
            for split, videos in splits.items():
                yield from _deepfakebench_videos(source, dataset, label_name, split, videos)


def _deepfakebench_videos(source: Path, dataset: str, label_name: str, split: str, tree: dict) -> Iterator[Item]:
    for video, entry in tree.items():
        if "frames" not in entry:  # one more level: compression
            yield from _deepfakebench_videos(source, dataset, label_name, split, entry)
            continue
        # DeepfakeBench labels are names such as FF-real, DFDC_Real or a generator's; WhichisReal is one of those.
        words = re.split(r"[^a-z0-9]+", str(entry.get("label", label_name)).lower())
        label = 0 if words[-1] == "real" else 1
        for frame in entry["frames"]:
            name = frame.replace("\\", "/")
            path = Path(name) if Path(name).is_absolute() else source.parent / name
            yield Item(
                name,
                path,
                label,
                dataset,
                split,
                label_name if label else "",
                f"{label_name}/{video}",
                _mask_beside(path) if label else "",
            )


def _mask_beside(frame: Path) -> str:
    """The forgery mask of a DeepfakeBench frame, `masks` for `frames` in its path, a .png; empty where there is none."""
    parts = list(frame.parts)
    if "frames" not in parts:
        return ""
    parts[len(parts) - 1 - parts[::-1].index("frames")] = "masks"
    mask = Path(*parts).with_suffix(".png")
    return str(mask) if mask.is_file() else ""


def known_masks(items: Sequence[Item], sampling: SamplingConfig) -> tuple[int, int]:
    """How many fake pictures have a forgery mask, and how many fakes there are; a real one needs none."""
    fakes = [item for item in items if item.label]
    whole = set(sampling.fully_generated)
    return sum(bool(i.mask) or i.generator in whole for i in fakes), len(fakes)


def select(items: Sequence[Item], sampling: SamplingConfig, seed: int) -> tuple[list[Item], DropReport]:
    """`items` after the frame cap per video and the per-source caps and drop rates, a fixed draw of `seed`."""
    rng = np.random.default_rng([seed, 101])
    report, kept = DropReport(), []
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
