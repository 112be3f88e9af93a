"""A sidecar for people: every verdict in a table that sorts and filters, and each video's scores over time, per person.

Takes PREDS.members.csv (see `scoring.files.sidecar_columns`) and the inputs it is of; returns the plain values that
`verdict_table.html` draws. Pictures on the page are small JPEGs in data URIs.
"""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from solution.config import FaceConfig
from solution.data.faces import crop_box, crop_square
from solution.data.images import Input, UnreadableInput, decode_image, resize_image
from solution.data.videos import sample_frames
from solution.evaluation.pages import Mark, marked
from solution.records import FaceBox
from solution.scoring.files import VERDICTS
from solution.scoring.verdict import meaning, rates_in_words, rule

LISTED = 2000  # rows of the table; the sidecar has them all
PICTURED = 200  # of them with a thumbnail
THUMBNAIL = 96  # px
VIDEOS = 24  # with a timeline
GROUPS = 24  # pictures of several faces, with their numbers
TELLING = 3  # frames of each person
WIDTH, HEIGHT = 640, 150  # of a timeline, in its own units
URGENCY = {word: place for place, word in enumerate(("fake", "unsure", "real", "no_face", "failed"))}


@dataclass
class Judged:
    """What one verdict is about: an input, or where all faces were scored a face or a track of it.

    row: its line of the sidecar. who: the number of the face or track, None for a whole input. frames: a video's lines.
    """

    item: Input
    row: Mapping[str, str]
    who: int | None = None
    frames: list[Mapping[str, str]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int | None]:
        """What tells it from the others."""
        return self.item.name, self.who

    @property
    def score(self) -> float:
        """P(fake) as the vote gave it."""
        return float(self.row["score"])

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        return self.row["verdict"]

    def telling(self, count: int, threshold: float) -> list[Mapping[str, str]]:
        """The frames that spoke most for the verdict: the highest scores, or for `real` the lowest; earlier ones first."""
        sign = -1 if self.score >= threshold else 1
        return sorted(self.frames, key=lambda row: (sign * float(row["score"]), int(row["frame"])))[:count]


def face_of(row: Mapping[str, str]) -> FaceBox | None:
    """The box on a line of the sidecar."""
    if not row["face_x0"]:
        return None
    return FaceBox(*(float(row[f"face_{name}"]) for name in ("x0", "y0", "x1", "y1", "score")))


def read_judged(sidecar: Path, inputs: Iterable[Input]) -> list[Judged]:
    """Everything that has a verdict of its own, in the sidecar's order: faces and tracks where there are any, else inputs."""
    items = {item.name: item for item in inputs}
    found: list[Judged] = []
    with sidecar.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            item = items[row["image"]]
            who = int(row["face"]) if row.get("face") else None
            if row.get("frame"):
                found[-1].frames.append(row)
                continue
            if who is not None and found[-1].who is None:
                # The line of the whole, which one of its faces repeats.
                found.pop()
            found.append(Judged(item, row, who))
    return found


# ------------------------------------------------------------------------------------------------ the section
def verdict_section(
    judged: Sequence[Judged],
    *,
    record: Mapping[str, Any],
    frames: int,
    why: Mapping[tuple[str, int | None], Mapping[str, str]],
) -> dict[str, Any]:
    """What `verdict_table.html` draws.

    record: `verdict.threshold_record`. frames: how many a video was sampled at. why: by `Judged.key` the address of its
    maps and a small picture of them, as `href` and `uri`.
    """
    threshold, unsure = record["threshold"], record["unsure"]
    members = [name.removesuffix("_p") for name in judged[0].row if name.endswith("_p")] if judged else []
    ranked = sorted(judged, key=lambda j: (URGENCY[j.verdict], -j.score, j.item.name, j.who or 0))
    listed = ranked[:LISTED]
    videos = _videos(ranked, threshold, unsure, frames)
    seen = {(video["name"], p["who"]): p["telling"][0]["uri"] for video in videos for p in video["people"]}
    counts = {word: sum(j.verdict == word for j in judged) for word in VERDICTS}
    return {
        "members": members,
        "words": [word for word in VERDICTS if counts[word]],
        "counts": counts,
        "rule": rule(record),
        "rates": rates_in_words(record),
        "meaning": meaning(record),
        "total": len(judged),
        "rows": [
            _row(j, members, why.get(j.key), threshold)
            | {"uri": seen.get(j.key) or (_picture_of(j) if k < PICTURED else "")}
            for k, j in enumerate(listed)
        ],
        "faces": any(j.who is not None for j in judged),
        "why": bool(why),
        "groups": _groups(ranked),
        "videos": videos,
    }


def _row(judged: Judged, members: Sequence[str], why: Mapping[str, str] | None, threshold: float) -> dict[str, Any]:
    row = judged.row
    failed = judged.verdict == "failed"
    note = row["error"]
    if row.get("frames"):
        share = f"{float(row['share_fake']):.0%} of them score {threshold:.3g} or above"
        note = f"{row['frames']} frames, {row['first_frame']} to {row['last_frame']}; {share}"
    return {
        "name": judged.item.name,
        "who": "" if judged.who is None else judged.who,
        "verdict": judged.verdict,
        "score": "" if failed else f"{judged.score:.3f}",
        "members": [f"{float(row[f'{m}_p']):.2f}" if row[f"{m}_p"] else "" for m in members],
        "note": note,
        "why": why,
    }


def _picture_of(judged: Judged) -> str:
    """A thumbnail of the face, or of the whole picture; empty for a video, which has frames below, and what is gone."""
    if judged.item.kind == "video" or judged.verdict == "failed":
        return ""
    try:
        picture = decode_image(judged.item.path)
    except UnreadableInput:
        # It could be read when it was scored: the verdict stands without a picture.
        return ""
    return shown(picture, face_of(judged.row))


def shown(picture: np.ndarray, face: FaceBox | None, side: int = THUMBNAIL) -> str:
    """A data URI of the face's surroundings, or of all of a picture (H, W, 3) uint8."""
    if face is not None:
        picture = crop_square(picture, crop_box(face, FaceConfig()))
    height, width = picture.shape[:2]
    scale = min(1.0, side / max(height, width))
    small = resize_image(picture, max(1, round(width * scale)), max(1, round(height * scale)))
    done, data = cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
    if not done:
        raise ValueError(f"a picture of {small.shape} cannot be encoded as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _groups(ranked: Sequence[Judged]) -> list[dict[str, str]]:
    """The pictures of several faces, in which each face is marked with its number and verdict."""
    by_picture: dict[str, list[Judged]] = {}
    for judged in ranked:
        if judged.who is not None and not judged.frames:
            by_picture.setdefault(judged.item.name, []).append(judged)
    result = []
    for name, faces in by_picture.items():
        if len(faces) > 1 and len(result) < GROUPS:
            try:
                picture = decode_image(faces[0].item.path)
            except UnreadableInput:
                continue  # as above
            marks = [Mark(box[:4], str(j.who), j.verdict) for j in faces if (box := face_of(j.row))]
            result.append({"name": name, "uri": marked(picture, marks)})
    return result


# ------------------------------------------------------------------------------------------------ videos
def _videos(ranked: Sequence[Judged], threshold: float, unsure: float | None, frames: int) -> list[dict[str, Any]]:
    by_video: dict[str, list[Judged]] = {}
    for judged in ranked:
        if judged.frames:
            by_video.setdefault(judged.item.name, []).append(judged)
    result = []
    for name, people in list(by_video.items())[:VIDEOS]:
        people = sorted(people, key=lambda j: j.who or 0)
        try:
            pictures = dict(sample_frames(people[0].item.path, frames))
        except UnreadableInput:
            # As above: it was there when it was scored.
            pictures = {}
        result.append(
            {
                "name": name,
                "timeline": timeline(people, threshold, unsure),
                "people": [_person(j, pictures, threshold) for j in people],
            }
        )
    return result


def _person(judged: Judged, pictures: Mapping[int, np.ndarray], threshold: float) -> dict[str, Any]:
    telling = [
        {
            "uri": shown(pictures[int(row["frame"])], face_of(row), 160) if int(row["frame"]) in pictures else "",
            "text": f"frame {row['frame']}: {float(row['score']):.3f}",
        }
        for row in judged.telling(TELLING, threshold)
    ]
    return {
        "who": judged.who,
        "verdict": judged.verdict,
        "score": f"{judged.score:.3f}",
        "colour": f"var(--s{((judged.who or 1) - 1) % 5})",
        "telling": telling,
    }


def timeline(
    people: Sequence[Judged],
    threshold: float,
    unsure: float | None = None,
    time: Callable[[int], str] = "frame {}".format,
) -> dict[str, Any]:
    """Lines of score against frame number, a person each, in a box of `WIDTH` x `HEIGHT` with the threshold across.

    unsure: how near to the threshold nothing is decided, drawn as a band; None: not known. time: what a frame is called.
    """
    numbers = [int(row["frame"]) for judged in people for row in judged.frames]
    low, high = min(numbers), max(numbers)
    lines = []
    for judged in people:
        points = [
            ((int(row["frame"]) - low) / max(1, high - low) * WIDTH, (1 - float(row["score"])) * HEIGHT)
            for row in judged.frames
        ]
        lines.append(
            {
                "colour": f"var(--s{((judged.who or 1) - 1) % 5})",
                "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
                "dots": [(f"{x:.1f}", f"{y:.1f}") for x, y in points],
            }
        )
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "threshold": f"{(1 - threshold) * HEIGHT:.1f}",
        "band": f"{2 * (unsure or 0) * HEIGHT:.1f}",
        "top": f"{(1 - threshold - (unsure or 0)) * HEIGHT:.1f}",
        "level": f"threshold {threshold:.3g}" if unsure is None else f"fake from {threshold + unsure:.3g}",
        "first": time(low),
        "last": time(high),
        "lines": lines,
    }
