"""A page that shows where each member looked: its maps on every picture, what it said, and all members' maps in one.

Takes an ensemble and `Input`s; leaves `explain.html`, self-contained, and `contact.png`. `submit.py --explain` and
`solution.explain pictures` draw them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from solution.config import SCORE_CAM_CHANNELS, FaceConfig
from solution.data.degradation import use_one_opencv_thread
from solution.data.faces import (
    FaceLocator,
    choose_face,
    crop_box,
    crop_square,
    locate_once,
    share_locators,
    view_box,
)
from solution.data.images import Input, UnreadableInput, decode_image, resize_image
from solution.data.processes import LIMIT, Apart, Killed
from solution.data.videos import sample_frames
from solution.data.views import View, choose_faces, close_views, cut_views, quiet_worker
from solution.errors import tell
from solution.evaluation import maps
from solution.evaluation.pages import Explained, Map, MemberView, Pages
from solution.io import UNSEEN
from solution.records import FaceBox
from solution.scoring.ensemble import Ensemble
from solution.scoring.journal import Scored
from solution.scoring.judge import judge
from solution.scoring.verdict import NOBODY_LOOKED, verdict_of

CAM, ATTENTION = "score_cam", "attention"
# Of a stated time over the measured speed: a busy machine.
MARGIN = 1.5
DRAWING = 0.1  # seconds a picture
DRAWN = 440  # px, longer side of a picture on a page
TITLES = {
    CAM: "Score-CAM",
    ATTENTION: "attention",
    "query_attention": "query attention",
    "localization": "localisation",
    "vla": "sentence likeness",
}
ABSOLUTE = {"localization", "vla"}  # in [0, 1] and drawn on that scale


# ------------------------------------------------------------------------------------------------ what is seen
class Seen(NamedTuple):
    """One picture as the members see it.

    views: per view of the ensemble, uint8 RGB (S, S, 3). rects: (views, 4), what part of the picture each shows.
    face: (4,) the most likely face of any size, in the picture's px, nan where there is none.
    """

    views: list[np.ndarray]
    rects: np.ndarray
    face: np.ndarray


def see(picture: np.ndarray, views: Sequence[View], locators: Mapping[FaceConfig, Any]) -> Seen:
    """Cut every view of a picture (H, W, 3), faces located in it as submission does; no locators: no faces."""
    return see_found(picture, views, locate_once(locators, picture))


def see_found(picture: np.ndarray, views: Sequence[View], found: Mapping[FaceConfig, Sequence[FaceBox]]) -> Seen:
    """`see` with the faces that were found before."""
    size = picture.shape[:2]
    chosen = choose_faces(found, size)
    boxes = [view_box(view, chosen.get(config), size, config or FaceConfig()) for view, config in views]
    rects = [maps.seen_rect(view, size, box) for (view, _), box in zip(views, boxes)]
    return Seen(cut_views(picture, views, chosen), np.array(rects), _any_face(found, size))


def _any_face(found: Mapping[FaceConfig, Sequence[FaceBox]], size: tuple[int, int]):
    for config, faces in found.items():
        face = choose_face(faces, *size, replace(config, min_area=0.0))
        if face is not None:
            return np.array(face[:4])
    return np.full(4, np.nan)


def locators_of(views: Sequence[View]) -> dict[FaceConfig, FaceLocator]:
    """A locator for every way the views locate faces; one in the default way where no view needs a face."""
    configs = [v.face for v in views if v.face is not None] or [FaceConfig()]
    return share_locators(configs)


# ------------------------------------------------------------------------------------------------ pictures
def explain_pictures(
    ensemble: Ensemble,
    targets: Sequence[Target],
    out: Path,
    *,
    channels: int | None = SCORE_CAM_CHANNELS,
    title: str = "What the members looked at",
    report: Callable[[str], None] = tell,
    progress: bool = True,
) -> Pages:
    """Maps of all `targets` in `out`, as one page (a further one every 100): the pages, written.

    What it costs is reported before it starts: forward passes, and the time they take here at most. A picture that
    cannot be read is listed with its reason.

    channels: of Score-CAM, the strongest so many; None: all.
    """
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    faces = FaceLocator.available()
    if not faces:
        report("no face detector is installed: no face crops, nothing on backgrounds")
    explainer = Explainer(ensemble, channels, faces=faces)
    probes = probe_members(ensemble)
    # One pass for the score, one for attention, and those of Score-CAM.
    per = {n: 2 + min(channels or p.width, p.width) for n, p in probes.items()}
    passes = {n: len(targets) * count for n, count in per.items()}
    report(cost(probes, passes, len(targets) * _other_seconds(explainer, targets)))
    pages = Pages(out, title, len(targets), _facts(ensemble, channels, len(targets)))
    begun = time.monotonic()
    with explainer.reader:
        for target in tqdm(targets, unit="picture", desc="maps", disable=not progress):
            try:
                pages.add(explainer.explain(target))
            except UnreadableInput as error:
                pages.fail(target.name, error.reason)
    pages.close()
    report(f"maps of {len(targets)} pictures took {_spoken(time.monotonic() - begun)}")
    return pages


def probe_members(ensemble: Ensemble) -> dict[str, maps.Probe]:
    """What every member's maps cost here, two batches each."""
    with torch.inference_mode():
        return {name: maps.probe(member, ensemble.batch_size) for name, member in ensemble.members.items()}


def _other_seconds(explainer: Explainer, targets: Sequence[Target]) -> float:
    """What a picture takes beside its forward passes, by the first that can be read."""
    for target in targets:
        begun = time.perf_counter()
        try:
            explainer.prepare(target)
        except UnreadableInput:
            continue
        return time.perf_counter() - begun + DRAWING
    return 0.0


def cost(probes: Mapping[str, maps.Probe], passes: Mapping[str, int], other: float = 0.0) -> str:
    """Forward passes at most, and the time that they and `other` seconds of work take at most."""
    busy = sum(probes[n].seconds * count for n, count in passes.items())
    seconds = MARGIN * (busy + other)
    each = ", ".join(f"{n} {count:,}" for n, count in passes.items())
    return f"cost: {sum(passes.values()):,} forward passes ({each}), at most {_spoken(seconds)} here"


def _spoken(seconds: float) -> str:
    whole = math.ceil(seconds)
    if whole < 90:
        return f"{whole} s"
    return f"{-(-whole // 60)} min" if whole < 5400 else f"{whole / 3600:.1f} h"


def _facts(ensemble: Ensemble, channels: int | None, count: int) -> dict[str, str]:
    used = "all channels" if channels is None else f"{channels} strongest channels"
    return {
        "pictures": f"{count:,}",
        "weights": ensemble.hash[:12],
        "members": ensemble.describe(),
        "Score-CAM": f"last block's first LayerNorm, class fake, {used}",
        "attention": "last block, class token to patches, mean of the heads (vlaforge: of its frozen CLIP)",
    }


class Target(NamedTuple):
    """What is explained: a picture, one face of it, or a face in one frame of a video.

    who: the number of the face or track where all faces were scored, else None. frame: its number, of `frames` that the
    video is sampled at. face: whose; None: the one that stands for the picture.
    """

    item: Input
    who: int | None = None
    face: FaceBox | None = None
    frame: int | None = None
    frames: int = 0

    @property
    def name(self) -> str:
        """The file's name, and which face and frame of it."""
        face = "" if self.who is None else f", face {self.who}"
        return f"{self.item.name}{face}" + ("" if self.frame is None else f", frame {self.frame}")


class Look(NamedTuple):
    """A member's maps (h, w) by kind, what part of the picture they show, and the face's share of every patch."""

    maps: dict[str, np.ndarray]
    rect: maps.Rect
    covered: np.ndarray | None


class _Reading:
    """What reads a target: the picture (H, W, 3) uint8, and what the members see of it."""

    def __init__(self, views: Sequence[View], locators: Mapping[FaceConfig, FaceLocator]) -> None:
        self.views, self.locators = views, locators

    def __call__(self, target: Target) -> tuple[np.ndarray, Seen]:
        if target.frame is None:
            picture = decode_image(target.item.path)
        else:
            picture = dict(sample_frames(target.item.path, target.frames))[target.frame]
        if target.face is None:
            return picture, see(picture, self.views, self.locators)
        views = self.views if target.who is None else close_views(self.views)
        configs = [config for _, config in views if config is not None] or [FaceConfig()]
        return picture, see_found(picture, views, {config: [target.face] for config in configs})


class Explainer:
    """Explains one picture at a time: what every member saw, said, and looked at.

    channels: of Score-CAM, the strongest so many; None: all; 0: no Score-CAM, which is nearly all of the work.
    """

    def __init__(self, ensemble: Ensemble, channels: int | None, *, faces: bool) -> None:
        self.ensemble, self.channels = ensemble, channels
        self.locators = locators_of(ensemble.views) if faces else {}
        use_one_opencv_thread()
        self.reader = Apart(_Reading(ensemble.views, self.locators), start=partial(quiet_worker, 0), seconds=LIMIT)

    def explain(self, target: Target) -> Explained:
        """Everything about one picture, or one face of it.

        Raises:
            UnreadableInput: it cannot be read.
        """
        return self.explain_seen(target.name, *self.prepare(target))

    @torch.inference_mode()
    def explain_seen(self, name: str, picture: np.ndarray, seen: Seen) -> Explained:
        """Everything about what the members see of a picture (H, W, 3) uint8."""
        ensemble = self.ensemble
        face = None if np.isnan(seen.face).any() else tuple(seen.face.tolist())
        views = [torch.from_numpy(v).permute(2, 0, 1)[None].to(ensemble.device) for v in seen.views]
        row = self._verdict(name, views)
        looks = {
            who: self._look(who, views[place][0], seen.rects[place], face) for who, place in ensemble.view_of.items()
        }
        crop, note = self._crop(picture, face)
        scale = min(1.0, DRAWN / max(picture.shape[:2]))
        size = [max(1, round(scale * n)) for n in picture.shape[:2]]
        joint, joint_note = self._joint(looks, scale, size) if self.channels != 0 else (None, "")
        looked = bool(self.locators) and any(view.face is not None for view in ensemble.views)
        verdict = verdict_of(row.score, ensemble.vote, int(face is not None) if looked else NOBODY_LOOKED)
        members = [
            MemberView(
                who,
                ensemble.vote.weights.get(who, 0),
                row.level[who],
                row.p_fake[who],
                seen.views[ensemble.view_of[who]],
                [_shown(kind, m, look.covered) for kind, m in look.maps.items()],
            )
            for who, look in looks.items()
        ]
        return Explained(
            name,
            row.score,
            verdict,
            resize_image(picture, size[1], size[0]),
            face and tuple(scale * v for v in face),
            crop,
            note,
            joint,
            joint_note,
            members,
        )

    def prepare(self, target: Target) -> tuple[np.ndarray, Seen]:
        """The picture, and what the members see of it; a process of its own reads it (`data.processes`).

        Raises:
            UnreadableInput: it cannot be read.
        """
        try:
            return self.reader(target)
        except Killed as error:
            raise UnreadableInput(target.item.path, str(error)) from None

    def _verdict(self, name: str, views: list[torch.Tensor]):
        """The row of the sidecar, as scoring makes it, second looks included."""
        ensemble = self.ensemble
        logits = ensemble.finish(ensemble.launch(views), views)[:, 0]
        by_member = {n: [float(z)] for n, z in zip(ensemble.members, logits)}
        scored = Scored(0, name, *UNSEEN, faces=[None], logits=by_member)
        return judge([scored], ensemble.vote, ensemble.calibrators)[0]

    def _look(self, name: str, view: torch.Tensor, rect: np.ndarray, face) -> Look:
        """Score-CAM, attention and the member's own maps."""
        member = self.ensemble.members[name]
        sight = maps.look(member, view[None])
        found = {}
        if self.channels != 0:
            channels = maps.channel_maps(member, sight)[0]
            size = self.ensemble.batch_size
            found[CAM] = maps.score_cam(member, view, channels, count=self.channels, batch=size)
        found[ATTENTION] = maps.attention_map(member, sight)[0]
        found |= {kind: m[0] for kind, m in sight.evidence.items()}
        covered = None
        if face is not None:
            covered = maps.coverage(tuple(rect), face, sight.grid)
        by_kind = {kind: m.cpu().numpy() for kind, m in found.items()}
        return Look(by_kind, tuple(rect), covered)

    def _joint(self, looks: Mapping[str, Look], scale: float, size: Sequence[int]) -> tuple[np.ndarray, str]:
        """The Score-CAMs of all members on the picture, each of mass one, by their votes; and a note.

        size: (H, W) of the result, `scale` times the picture.
        """
        joint, total, outside = np.zeros(size, np.float32), 0, 0.0
        for name, look in looks.items():
            votes, cam = self.ensemble.vote.weights.get(name, 0), look.maps[CAM]
            if not votes or cam.sum() == 0:
                continue
            laid = maps.place(cam, tuple(scale * v for v in look.rect), tuple(size))
            joint += votes * laid / max(float(laid.sum()), 1e-12)
            total += votes
            if look.covered is not None:
                outside += votes * maps.share_outside(cam, look.covered)
        if not total:
            return joint, "nothing stands out"
        known = any(look.covered is not None for look in looks.values())
        return joint, f"{outside / total:.0%} outside the face" if known else ""

    def _crop(self, picture: np.ndarray, face) -> tuple[np.ndarray | None, str]:
        """The face crop, and what is to be said of the face."""
        if not self.locators:
            return None, "No face detector is installed."
        if face is None:
            return None, "No face was found."
        box, size = FaceBox(*face, 0.0), picture.shape[:2]
        whole = []
        for name, place in self.ensemble.view_of.items():
            view, config = self.ensemble.views[place]
            chosen = config and choose_face([box], *size, config)
            if config is None or view_box(view, chosen, size, config) is None:
                whole.append(name)
        note = ""
        if whole:
            everybody = len(whole) == len(self.ensemble.members)
            who = "Every member sees" if everybody else f"{', '.join(whole)} see"
            note = f"{who} the whole picture."
        return crop_square(picture, crop_box(box, FaceConfig())), note


def _shown(kind: str, values: np.ndarray, covered: np.ndarray | None) -> Map:
    """A map with the share of it outside the face, and for attention its entropy."""
    notes = []
    if values.sum() == 0:
        notes.append("nothing stands out")
    elif covered is not None:
        notes.append(f"{maps.share_outside(values, covered):.0%} outside the face")
    if kind == ATTENTION:
        spread = maps.entropy(torch.from_numpy(values).flatten()).item()
        notes.append(f"{spread:.2f} of {math.log(values.size):.2f} nats")
    return Map(TITLES[kind], values, "; ".join(notes), 1.0 if kind in ABSOLUTE else None)
