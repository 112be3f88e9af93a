"""One picture or clip examined for a person: a verdict per face, what the members say, and whether it holds degraded.

Takes a file; returns an `Answer`, and as HTML a part of a page without scripts (`answer_template.html`). Pictures are
uint8 RGB (H, W, 3).
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from solution.bundles.bundle import Bundle
from solution.data.degradation import use_one_opencv_thread
from solution.data.guard import Watch
from solution.data.images import Input, UnreadableInput, decode_image, is_media, kind_of, resize_image
from solution.data.processes import Apart, Killed
from solution.data.videos import duration, sample_frames
from solution.data.views import View, choose_faces, close_views, cut_views, quiet_worker
from solution.evaluation.pages import Mark, marked
from solution.evaluation.report import render
from solution.evaluation.verdicts import Judged, face_of, read_judged, shown, timeline
from solution.io import UNSEEN
from solution.records import FaceBox
from solution.scoring.ensemble import Ensemble
from solution.scoring.files import SidecarRow, write_sidecar
from solution.scoring.journal import Scored
from solution.scoring.judge import judge
from solution.scoring.stream import Prepared, Reader, computed
from solution.scoring.verdict import band, meaning, rates_in_words, threshold_record, verdict_of

TEMPLATE = "answer_template.html"
FRAMES = 32  # of a clip
LONGEST = 600.0  # seconds of a clip
READING = 120  # seconds for one file
EXAMINED = 6  # faces of one file that are examined further, the most fake-looking ones
_ORIENTATION = 0x0112  # EXIF
FORMULA = "=+-@\t\r"  # how a cell begins that a spreadsheet computes
WORDS = {
    "fake": "Looks fake",
    "real": "No sign of a fake found",
    "unsure": "Unsure",
    "no_face": "No face found: nothing to judge",
    "failed": "Could not be read",
}
LIMITS = (
    (
        "It knows few kinds of fakes: what an unknown generator made, another maker's face swap or an edit beside the face may "
        "well pass as real."
    ),
    "A score is evidence and no proof. Do not accuse, publish, moderate or pay by it without a person who looks.",
    "It judges photographed faces: not drawings, scenes without a face, sound or text, and not who made a picture.",
    "Every further face or person is another chance of a false alarm. Identities, skin tones and cameras were not balanced.",
)


# ------------------------------------------------------------------------------------------------ degraded copies
def _jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    done, data = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"a picture of {picture.shape} cannot be encoded as JPEG")
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1])


def _saved_again(picture: np.ndarray) -> np.ndarray:
    return _jpeg(picture, 40)


def _blurred(picture: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(picture, (0, 0), max(1.0, min(picture.shape[:2]) / 256))


def _sent(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    small = resize_image(picture, max(1, width // 2), max(1, height // 2))
    return resize_image(_jpeg(small, 60), width, height)


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "saved again as JPEG, quality 40": _saved_again,
    "blurred": _blurred,
    "sent: half its size, JPEG 60": _sent,
}


# ------------------------------------------------------------------------------------------------ answers
@dataclass
class FaceAnswer:
    """What is said of one face, of one person's track, or of a picture without a face.

    picture: where it is seen best, the picture or the most telling frame; face: its box there, or None. several: it is
    one of several. row: the sidecar's line of what is seen there, a track's of that frame. held: by degraded copy of it
    (score, verdict); empty when it was not examined further. maps: what the members looked at, as `pages.card` has them;
    None until asked for.
    """

    judged: Judged
    picture: np.ndarray
    face: FaceBox | None
    several: bool
    row: Mapping[str, str]
    held: dict[str, tuple[float, str]] = field(default_factory=dict)
    maps: dict[str, Any] | None = None


@dataclass
class Answer:
    """What is said of one file. rows: of the sidecar. error: why it could not be read. notes: what was done with an odd
    file. where: a small picture with every face marked, as a data URI. pace: of a clip, the seconds of a frame.
    """

    name: str
    verdict: str
    score: float
    rows: Sequence[SidecarRow] = ()
    faces: list[FaceAnswer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    where: str = ""
    pace: float = 0.0
    timeline: dict[str, Any] | None = None

    @property
    def examined(self) -> list[FaceAnswer]:
        """The faces that are examined further; where none was found, nothing is."""
        return [] if self.verdict == "no_face" else self.faces[:EXAMINED]

    def time(self, frame: Any) -> str:
        """When a frame of a clip is shown, as m:ss.t; its number where the clip has no times."""
        if not self.pace:
            return f"frame {frame}"
        minutes, tenths = divmod(round(10 * self.pace * int(frame)), 600)
        return f"{minutes}:{tenths / 10:04.1f}"


def announced(answer: Answer) -> str:
    """An answer in a line: `NAME: looks fake, score 0.97`."""
    words = WORDS[answer.verdict]
    score = "" if answer.verdict in ("no_face", "failed") else f", score {answer.score:.2f}"
    return f"{answer.name}: {words[0].lower()}{words[1:]}{score}"


class _Files:
    """What a process of its own does with a file: reads it, cuts it for the members, and shows single frames of it."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, what: str, item: Input, *more: Any) -> Any:
        with self.reader.watch.file(0, item.path):
            return getattr(self, what)(item, *more)

    def read(self, item: Input) -> tuple[Prepared, list[str]]:
        """The file as `scoring.stream.Reader` has it, and what was done with it if it is odd."""
        if item.kind == "video" and (seconds := duration(item.path)) > LONGEST:
            raise UnreadableInput(
                item.path, f"{seconds:.0f} s long; at most {LONGEST:.0f} s are read here: cut it first"
            )
        prepared = self.reader[[(0, item)]]
        return prepared, [] if prepared.rows[0].error else _notes(item)

    def show(self, item: Input, numbers: set[int | None]) -> tuple[dict[int | None, np.ndarray], float]:
        """Frames of a video by number, or under None the picture: (H, W, 3) uint8; and the seconds of a frame."""
        if item.kind != "video":
            return {None: decode_image(item.path)}, 0.0
        frames = sample_frames(item.path, self.reader.frames)
        # The middles of equal parts, or all there are: the last one is as far from the end as the first from the beginning.
        steps = frames[0][0] + frames[-1][0]
        pace = duration(item.path) / steps if steps else 0.0
        return {number: frame for number, frame in frames if number in numbers}, pace


class Examiner:
    """Examines files with one ensemble; not for two threads at once. A process of its own reads them (`data.processes`)."""

    def __init__(self, ensemble: Ensemble, bundle: Bundle, *, faces: bool = True, frames: int = FRAMES) -> None:
        """faces: whether there is a face detector. frames: a clip is sampled at."""
        self.ensemble, self.faces = ensemble, faces
        self.threshold = threshold_record(bundle, ensemble.vote)
        self.reader = Reader(ensemble.views, frames=frames, faces=faces, people="all")
        self.reader.watch = Watch(seconds=READING)
        use_one_opencv_thread()
        self.files = Apart(_Files(self.reader), start=partial(quiet_worker, 0), seconds=READING)
        self.files.begin()

    def examine(self, path: Path, name: str) -> Answer:
        """Score the file: its answer without degraded copies and maps. `name` is shown for it."""
        item = Input(name, path, kind_of(path.name))
        notes: list[str] = []
        try:
            if not is_media(path.name):
                raise UnreadableInput(path, f"suffix {path.suffix!r} is of no picture or clip that is read here")
            prepared, notes = self._files("read", item)
            (rows,) = computed(self.ensemble, [prepared])
        except UnreadableInput as error:
            rows = [Scored(0, name, *UNSEEN, error=error.reason)]
        judged = judge(rows, self.ensemble.vote, self.ensemble.calibrators)
        whole = judged[0]
        answer = Answer(name, whole.verdict, whole.score, judged, error=whole.error)
        if not whole.error:
            answer.notes = notes
            self._add_faces(answer, item, judged)
        return answer

    def _files(self, what: str, item: Input, *more: Any) -> Any:
        try:
            return self.files(what, item, *more)
        except Killed as error:
            raise UnreadableInput(item.path, str(error)) from None

    def _add_faces(self, answer: Answer, item: Input, rows: Sequence[Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            sidecar = Path(folder) / "one.members.csv"
            write_sidecar(rows, sidecar, list(self.ensemble.members), frames=True, people=True)
            people = read_judged(sidecar, [item])
        threshold = self.threshold["threshold"]
        lines = [judged.telling(1, threshold)[0] if judged.frames else judged.row for judged in people]
        numbers = [int(line["frame"]) if judged.frames else None for judged, line in zip(people, lines)]
        pictures, answer.pace = self._files("show", item, set(numbers))
        for judged, line, number in zip(people, lines, numbers):
            several = judged.who is not None and (item.kind == "video" or len(people) > 1)
            answer.faces.append(FaceAnswer(judged, pictures[number], face_of(line), several, line))
        answer.faces.sort(key=lambda a: -a.judged.score)
        if item.kind == "video" and answer.verdict != "no_face":
            answer.timeline = timeline(people, threshold, self.threshold["unsure"], answer.time)
        answer.where = marked(answer.faces[0].picture, _marks(answer.faces))

    def views_of(self, picture: np.ndarray, face: FaceBox | None, several: bool) -> tuple[list[View], dict]:
        """The views that the members have of a face, and the face by the views' configurations."""
        views = close_views(self.ensemble.views) if several else list(self.ensemble.views)
        found = {config: [face] if face else [] for _, config in views if config is not None}
        return views, choose_faces(found, picture.shape[:2])

    def degrade(self, answer: FaceAnswer) -> None:
        """Score the degraded copies of the picture on the same face, which was found (`Answer.examined`)."""
        views, chosen = self.views_of(answer.picture, answer.face, answer.several)
        cut = [cut_views(make(answer.picture), views, chosen) for make in COPIES.values()]
        batch = [torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2).to(self.ensemble.device) for seen in zip(*cut)]
        logits = self.ensemble.finish(self.ensemble.launch(batch), batch)
        for k, what in enumerate(COPIES):
            by_member = {name: [float(z[k])] for name, z in zip(self.ensemble.members, logits)}
            row = Scored(0, what, *UNSEEN, faces=[None], logits=by_member)
            score = judge([row], self.ensemble.vote, self.ensemble.calibrators)[0].score
            answer.held[what] = score, verdict_of(score, self.ensemble.vote, 1)

    def csv(self, answers: Sequence[Answer]) -> str:
        """The sidecar of the answers' files, for a spreadsheet: no name is a formula in it."""
        rows = [
            row._replace(image=f"'{row.image}") if row.image.startswith(tuple(FORMULA)) else row
            for answer in answers
            for row in answer.rows
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scores.members.csv"
            write_sidecar(rows, path, list(self.ensemble.members), frames=True, people=True)
            return path.read_text(encoding="utf-8")

    def html(self, answers: Sequence[Answer], *, pending: bool = False) -> str:
        """The answers as a part of a page; pending: more is being done, the scores are not yet to be downloaded."""
        low, high = band(self.threshold)
        page = {
            "answers": [self._shown(answer) for answer in answers],
            "rule": _rule(low, high),
            "rates": rates_in_words(self.threshold),
            "meaning": meaning(self.threshold),
            "low": f"{100 * max(0.0, low):.1f}",
            "high": f"{100 * min(1.0, high):.1f}",
            "unsure": high > low,
            "words": WORDS,
            "limits": LIMITS,
            "faces": self.faces,
            "csv": "" if pending or not answers else base64.b64encode(self.csv(answers).encode()).decode(),
        }
        return render(TEMPLATE, page)

    def _shown(self, answer: Answer) -> dict[str, Any]:
        nothing = answer.verdict in ("no_face", "failed")
        return {
            "name": answer.name,
            "verdict": answer.verdict,
            "words": WORDS[answer.verdict],
            "score": "" if nothing else f"{answer.score:.2f}",
            "error": answer.error,
            "notes": answer.notes,
            "timeline": answer.timeline,
            "where": answer.where,
            "seen": f"Shown is {_seen(answer.faces[0], answer)}." if answer.timeline else "",
            "faces": [] if nothing else [self._shown_face(face, answer) for face in answer.faces],
        }

    def _shown_face(self, face: FaceAnswer, answer: Answer) -> dict[str, Any]:
        judged, row, clip = face.judged, face.judged.row, bool(face.judged.frames)
        votes = self.ensemble.vote.weights
        track = ""
        if row["frames"]:
            first, last = (answer.time(row[f"{end}_frame"]) for end in ("first", "last"))
            track = (
                f"In {row['frames']} of the sampled frames, {first} to {last}; {float(row['share_fake']):.0%} of them score "
                f"{self.threshold['threshold']:.2g} or above."
            )
        held = [
            {"what": what, "score": f"{score:.2f}", "verdict": verdict, "words": WORDS[verdict]}
            for what, (score, verdict) in face.held.items()
        ]
        return {
            "title": "" if len(answer.faces) == 1 else f"{'Person' if clip else 'Face'} {judged.who}",
            "verdict": judged.verdict,
            "words": WORDS[judged.verdict],
            "score": f"{judged.score:.2f}",
            "share": f"{100 * judged.score:.1f}",
            "track": track,
            "uri": shown(face.picture, face.face, 220),
            "seen": f"Shown is {_seen(face, answer)}: score {float(face.row['score']):.2f}." if clip else "",
            "colour": f"var(--s{((judged.who or 1) - 1) % 5})",
            "members": [
                {
                    "name": m,
                    "p": f"{float(row[f'{m}_p']):.2f}",
                    "share": f"{100 * float(row[f'{m}_p']):.1f}",
                    "votes": votes.get(m, 0),
                }
                for m in self.ensemble.members
            ],
            "held": held,
            "copied": f"Of {_seen(face, answer)}: {WORDS[face.row['verdict']]}." if clip else "",
            "holds": all(h["verdict"] == face.row["verdict"] for h in held),
            "maps": face.maps,
        }


def _seen(face: FaceAnswer, answer: Answer) -> str:
    """Which frame of a clip is shown."""
    return f"the frame at {answer.time(face.row['frame'])}" if answer.pace else answer.time(face.row["frame"])


def _marks(faces: Sequence[FaceAnswer]) -> list[Mark]:
    """The faces in the picture or frame that the first one is shown in, numbered where there are several."""
    frame = faces[0].row.get("frame")
    marks = []
    for face in faces:
        for row in face.judged.frames or [face.judged.row]:
            if row.get("frame") == frame and (box := face_of(row)):
                number = "" if len(faces) == 1 else str(face.judged.who)
                marks.append(Mark(box[:4], number, face.judged.verdict))
    return marks


def _rule(low: float, high: float) -> str:
    """Which score gets which words."""
    if low == high:
        return f"“{WORDS['fake']}” is said of a score of {high:.3g} or above, “{WORDS['real']}” of one below."
    return (
        f"“{WORDS['fake']}” is said of a score of {high:.3g} or above, “{WORDS['real']}” of one below {low:.3g}, "
        f"“{WORDS['unsure']}” of one between them."
    )


def _notes(item: Input) -> list[str]:
    """What was done with an odd file, in words."""
    if item.kind == "video":
        return ["Sound is not judged.", "Frames are turned as the clip says."]
    notes = []
    with Image.open(item.path) as image:
        if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
            notes.append("Turned upright, as the picture's metadata asks.")
        if getattr(image, "n_frames", 1) > 1:
            notes.append("It holds several pictures; the first is judged.")
    return notes
