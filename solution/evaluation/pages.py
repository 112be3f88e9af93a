"""Explained pictures as one self-contained HTML page a run, and a contact sheet.

Takes `Explained` records; a `Pages` writer keeps of each only small JPEGs, and writes `explain.html` (every SHOWN pictures
a further page) and `contact.png`. Pictures are uint8 RGB (H, W, 3), maps float (h, w), not negative.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from solution.data.images import printable, resize_image
from solution.evaluation.report import render
from solution.io import write_atomically

TEMPLATE = "explain_template.html"
COLOURS = "inferno"  # of equal perceived steps
SHOWN = 100  # pictures on a page
PLACES = 2000  # whose place is remembered for another page: the first ones
SOURCE, TILE, THUMBNAIL = 220, 140, 160  # px
MARKED = 480  # px, a picture with marks
OPACITY = 0.6  # of a map over the grey picture
MARKS = {"fake": (184, 74, 32), "real": (35, 116, 123)}  # RGB of a verdict, others grey


@dataclass(frozen=True)
class Map:
    """One map of a member. `note` stands below it; `top`: the value drawn brightest (None: the map's highest)."""

    title: str
    values: np.ndarray
    note: str = ""
    top: float | None = None


@dataclass(frozen=True)
class MemberView:
    """What one member saw and said. view: (S, S, 3)."""

    name: str
    votes: int
    level: float
    p_fake: float
    view: np.ndarray
    maps: Sequence[Map]


@dataclass(frozen=True)
class Explained:
    """One picture. face: its box (x0, y0, x1, y1) in px; crop: the face crop; joint: the members' maps in one (H, W),
    or None where no Score-CAM was asked for.

    note: on the face; joint_note: on the joint map.
    """

    name: str
    score: float
    verdict: str
    picture: np.ndarray
    face: tuple[float, float, float, float] | None
    crop: np.ndarray | None
    note: str
    joint: np.ndarray | None
    joint_note: str
    members: Sequence[MemberView]


# ------------------------------------------------------------------------------------------------ drawing
def overlay(picture: np.ndarray, values: np.ndarray, top: float | None = None) -> np.ndarray:
    """A map in colour over the grey picture: (H, W, 3) uint8, of the picture's size. An empty map is all dark.

    top: the value drawn brightest; None: the map's highest.
    """
    height, width = picture.shape[:2]
    large = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    highest = float(values.max()) if top is None else top
    scaled = large / highest if highest > 0 else np.zeros_like(large)
    heat = _colour_table()[(scaled.clip(0, 1) * 255).round().astype(np.uint8)]
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[:, :, None]
    return (OPACITY * heat + (1 - OPACITY) * grey).round().astype(np.uint8)


@cache
def _colour_table() -> np.ndarray:
    """(256, 3) float RGB of 255."""
    from matplotlib import colormaps

    return np.asarray(colormaps[COLOURS](np.arange(256))[:, :3]) * 255


def _fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """The whole picture, its longer side `side` px."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    return resize_image(picture, max(1, round(width * scale)), max(1, round(height * scale)))


def _with_face(picture: np.ndarray, face, side: int) -> np.ndarray:
    """The fitted picture, the face's box drawn light on dark."""
    small = _fitted(picture, side).copy()
    if face is not None:
        scale = small.shape[1] / picture.shape[1]
        x0, y0, x1, y1 = (round(v * scale) for v in face)
        for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.rectangle(small, (x0, y0), (x1, y1), colour, width)
    return small


class Mark(NamedTuple):
    """A face in a picture: its box (x0, y0, x1, y1) in px, what is written at it, and its verdict."""

    box: Sequence[float]
    text: str
    verdict: str


def marked(picture: np.ndarray, marks: Sequence[Mark]) -> str:
    """A data URI of the whole picture, at most `MARKED` px, every box in the colour of its verdict."""
    small = _fitted(picture, min(MARKED, max(picture.shape[:2]))).copy()
    scale = small.shape[1] / picture.shape[1]
    for mark in marks:
        x0, y0, x1, y1 = (round(v * scale) for v in mark.box)
        own = MARKS.get(mark.verdict, (92, 97, 104))
        for colour, width in (((255, 255, 255), 5), (own, 3)):
            cv2.rectangle(small, (x0, y0), (x1, y1), colour, width)
        if mark.text:
            font = cv2.FONT_HERSHEY_SIMPLEX, 0.6
            (width, height), _ = cv2.getTextSize(mark.text, *font, 2)
            x, y = min(max(x0, 0), small.shape[1] - width - 8), min(max(y0, 0), small.shape[0] - height - 8)
            cv2.rectangle(small, (x, y), (x + width + 8, y + height + 8), own, -1)
            cv2.putText(small, mark.text, (x + 4, y + height + 4), *font, (255, 255, 255), 2, cv2.LINE_AA)
    return _uri(small)


def _uri(picture: np.ndarray) -> str:
    done, data = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 86])
    if not done:
        raise ValueError(f"a picture of {picture.shape} cannot be encoded as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def contact_sheet(thumbnails: Sequence[tuple[np.ndarray, str, str]], *, columns: int = 8) -> np.ndarray:
    """Thumbnails with two lines below each, (H, W, 3) uint8 on white."""
    from PIL import Image, ImageDraw, ImageFont

    gap, text = 10, 34
    columns = min(columns, len(thumbnails))
    rows = -(-len(thumbnails) // columns)
    cell, line = THUMBNAIL + gap, THUMBNAIL + text + gap
    sheet = Image.new("RGB", (columns * cell + gap, rows * line + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (thumbnail, first, second) in enumerate(thumbnails):
        x, y = gap + index % columns * cell, gap + index // columns * line
        height, width = thumbnail.shape[:2]
        place = (x + (THUMBNAIL - width) // 2, y + (THUMBNAIL - height) // 2)
        sheet.paste(Image.fromarray(thumbnail), place)
        for row, words in enumerate((first, second)):
            words = _shortened(words, font)
            at = (x, y + THUMBNAIL + 3 + 15 * row)
            draw.text(at, words, fill="black" if row == 0 else "#555555", font=font)
    return np.asarray(sheet)


def _shortened(words: str, font: Any) -> str:
    """The end of a name that fits below its thumbnail."""
    if font.getlength(words) <= THUMBNAIL:
        return words
    while words and font.getlength("..." + words) > THUMBNAIL:
        words = words[1:]
    return "..." + words


# ------------------------------------------------------------------------------------------------ pages
@dataclass
class Pages:
    """Collects cards and writes them, SHOWN a page. facts: of the run, by name, on every page.

    total: of pictures, known beforehand, so that every page can name the others. places: by name, where a picture stands
    (page and anchor) and a small picture of its maps.
    """

    folder: Path
    title: str
    total: int
    facts: Mapping[str, str]
    cards: list[dict[str, Any]] = field(default_factory=list)
    thumbnails: list[tuple[np.ndarray, str, str]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    places: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, shown: Explained) -> None:
        """One more picture; a full page is written and let go of."""
        drawn = shown.picture if shown.joint is None else overlay(shown.picture, shown.joint)
        thumbnail = _fitted(drawn, THUMBNAIL)
        name = printable(shown.name)
        self.thumbnails.append((thumbnail, f"{shown.score:.3f} {shown.verdict}", name))
        self.cards.append(card(shown) | {"thumbnail": _uri(thumbnail)})
        page = _page_name(len(self.written) + 1)
        if len(self.places) < PLACES:
            self.places[shown.name] = f"{page}#p{len(self.cards)}", self.cards[-1]["thumbnail"]
        if len(self.cards) + len(self.failures) == SHOWN:
            self._flush()

    def fail(self, name: str, reason: str) -> None:
        """A picture that could not be read."""
        self.failures.append((printable(name), reason))
        if len(self.cards) + len(self.failures) == SHOWN:
            self._flush()

    def close(self) -> Path:
        """Write what is left; the first page."""
        if self.cards or self.failures or not self.written:
            self._flush()
        return self.written[0]

    def _flush(self) -> None:
        number, count = len(self.written) + 1, max(1, -(-self.total // SHOWN))
        page = {
            "title": self.title,
            "facts": self.facts,
            "cards": self.cards,
            "failures": self.failures,
            "scale": ", ".join(_scale_colours()),
            "pages": [(_page_name(n), n == number) for n in range(1, count + 1) if count > 1],
        }
        path = self.folder / _page_name(number)
        write_atomically(path, render(TEMPLATE, page))
        if self.thumbnails:
            sheet = contact_sheet(self.thumbnails)
            _, data = cv2.imencode(".png", sheet[:, :, ::-1])
            contact = self.folder / _page_name(number).replace("explain", "contact")
            write_atomically(contact.with_suffix(".png"), data.tobytes())
        self.written.append(path)
        self.cards, self.thumbnails, self.failures = [], [], []


def _page_name(number: int) -> str:
    return "explain.html" if number == 1 else f"explain-{number}.html"


def _scale_colours() -> list[str]:
    table = _colour_table()[::32].round().astype(int).tolist() + [_colour_table()[-1].round().astype(int).tolist()]
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in table]


def card(shown: Explained) -> dict[str, Any]:
    """What a template draws of one picture: name, score, sources and members with their maps, pictures as data URIs."""
    sources = [("picture", _with_face(shown.picture, shown.face, SOURCE), "")]
    if shown.crop is not None:
        sources.append(("the face, 1.3 times its box", _fitted(shown.crop, SOURCE), ""))
    if shown.joint is not None:
        joint = overlay(shown.picture, shown.joint)
        sources.append(("all Score-CAMs", _fitted(joint, SOURCE), shown.joint_note))
    return {
        "name": printable(shown.name),
        "score": f"{shown.score:.3f}",
        "verdict": shown.verdict.replace("_", " "),
        "note": shown.note,
        "sources": [{"title": t, "uri": _uri(p), "note": n} for t, p, n in sources],
        "members": [_member(m) for m in shown.members],
    }


def _member(seen: MemberView) -> dict[str, Any]:
    maps = []
    for m in seen.maps:
        drawn = overlay(_fitted(seen.view, TILE), m.values, m.top)
        # Without what is said in nats, which is for those who know the word.
        plain = "; ".join(part for part in m.note.split("; ") if not part.endswith(" nats"))
        maps.append({"title": m.title, "uri": _uri(drawn), "note": m.note, "plain": plain})
    votes = {0: "no vote", 1: "1 vote"}.get(seen.votes, f"{seen.votes} votes")
    return {
        "name": seen.name,
        "votes": votes,
        "level": f"{seen.level:.6g}",
        "share": f"{100 * seen.level:.1f}",
        "p_fake": f"{seen.p_fake:.3f}",
        "maps": maps,
    }
