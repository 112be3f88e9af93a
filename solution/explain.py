"""Entry: Score-CAM, attention entropy, feature stability.

    python -m solution.explain pictures --input DIR --weights BUNDLE --out DIR
    python -m solution.explain drift --data MANIFEST --weights BUNDLE --out DIR

`pictures` (also `submit.py --explain`) draws where each member looked: `explain.html`, self-contained, and `contact.png`.
`drift` measures how that moves as pictures degrade: `drift.json`, `drift.md` and figures for light and dark pages, from
`measured/`, where every finished condition is kept: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from solution.config import FaceConfig
from solution.data.faces import (
    FaceLocator,
    choose_face,
    crop_box,
    crop_square,
    view_box,
)
from solution.data.images import (
    Input,
    InputError,
    UnreadableInput,
    decode_image,
    find_inputs,
    resize_image,
)
from solution.data.manifest import Item, read_manifest
from solution.data.videos import sample_frames
from solution.data.views import close_views
from solution.errors import door
from solution.evaluation import maps
from solution.evaluation.conditions import limit_items
from solution.evaluation.measure import EvaluationError, Pictures
from solution.evaluation.pages import Explained, Map, MemberView, Pages
from solution.io import write_atomically
from solution.records import FaceBox
from solution.scoring import ensemble as predict
from solution.scoring.ensemble import Ensemble
from solution.scoring.journal import Scored
from solution.scoring.verdict import NOBODY_LOOKED, verdict_of
from solution.studies import drift, drift_figures
from solution.studies.drift import ATTENTION, CAM, Seen, locators_of, see, see_found

# Of a stated time over the measured speed: a busy machine.
MARGIN = 1.5
DRAWING = 0.1  # seconds a picture
DRAWN = 440  # px, longer side of a picture on a page
STRENGTHS = tuple(round(0.1 * k, 1) for k in range(11))  # the paper's
TITLES = {
    CAM: "Score-CAM",
    ATTENTION: "attention",
    "query_attention": "query attention",
    "localization": "localisation",
    "vla": "sentence likeness",
}
ABSOLUTE = {"localization", "vla"}  # in [0, 1] and drawn on that scale


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ pictures
def explain_pictures(
    ensemble: Ensemble,
    targets: Sequence[Target],
    out: Path,
    *,
    channels: int | None = maps.CHANNELS,
    title: str = "What the members looked at",
    report: Callable[[str], None] = _tell,
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
    report(_cost(probes, passes, len(targets) * _other_seconds(explainer, targets)))
    pages = Pages(out, title, len(targets), _facts(ensemble, channels, len(targets)))
    begun = time.monotonic()
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


def _cost(probes: Mapping[str, maps.Probe], passes: Mapping[str, int], other: float = 0.0) -> str:
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


class Explainer:
    """Explains one picture at a time: what every member saw, said, and looked at.

    channels: of Score-CAM, the strongest so many; None: all; 0: no Score-CAM, which is nearly all of the work.
    """

    def __init__(self, ensemble: Ensemble, channels: int | None, *, faces: bool) -> None:
        self.ensemble, self.channels = ensemble, channels
        self.locators = locators_of(ensemble.views) if faces else {}

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
        """The picture, and what the members see of it."""
        if target.frame is None:
            picture = decode_image(target.item.path)
        else:
            picture = dict(sample_frames(target.item.path, target.frames))[target.frame]
        views = self.ensemble.views
        if target.face is None:
            return picture, see(picture, views, self.locators)
        if target.who is not None:
            views = close_views(views)
        configs = [config for _, config in views if config is not None] or [FaceConfig()]
        return picture, see_found(picture, views, {config: [target.face] for config in configs})

    def _verdict(self, name: str, views: list[torch.Tensor]):
        """The row of the sidecar, as scoring makes it, second looks included."""
        ensemble = self.ensemble
        logits = ensemble.finish(ensemble.launch(views), views)[:, 0]
        by_member = {n: [float(z)] for n, z in zip(ensemble.members, logits)}
        scored = Scored(0, name, -1, -1, faces=[None], logits=by_member)
        return predict.judge([scored], ensemble.vote, ensemble.calibrators)[0]

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


# ------------------------------------------------------------------------------------------------ drift
def run_drift(args: argparse.Namespace) -> Path:
    """The whole measurement; the path of its tables."""
    items, dropped = read_manifest(args.data, split=args.split)
    for line in dropped.summary().splitlines():
        _tell(line)
    items = limit_items(items, args.limit, args.seed)
    ensemble = _load(args, second_look=False)
    faces = FaceLocator.available()
    if not faces:
        _tell("no face detector is installed: whole pictures, nothing on backgrounds")
    cam = min(args.cam, len(items))
    settings = drift.Settings(cam, args.channels, min(args.full_check, cam), args.seed, faces)
    cams = limit_items(items, cam, args.seed) if cam else []
    chosen = drift.choose(items, cams, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    measured = _measure(args, ensemble, items, chosen, settings)
    labels = np.array([item.label for item in items])
    numbers = drift.summarise(
        measured,
        drift.conditions(args.strengths, args.seed),
        ensemble,
        labels,
        args.seed,
    )
    results = {
        "protocol": _protocol(args, ensemble, items, settings, measured),
        "settings": dataclasses.asdict(settings) | {"strengths": args.strengths},
        "bundle": ensemble.fingerprint(),
        **numbers,
    }
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    write_atomically(args.out / "drift.json", text)
    drift_figures.draw_figures(results, args.out)
    write_atomically(args.out / "drift.md", drift_figures.markdown(results))
    return args.out / "drift.md"


def _measure(
    args: argparse.Namespace,
    ensemble: Ensemble,
    items: Sequence[Item],
    chosen: drift.Chosen,
    settings: drift.Settings,
) -> dict[str, drift.Arrays]:
    """All conditions, with the cost before and a bar while it runs."""
    from tqdm import tqdm

    folder, found = args.out / "measured", drift.conditions(args.strengths, args.seed)
    places = (ensemble, items)
    left = [c for c in found if not drift.stored_path(folder, *places, c, chosen, settings).exists()]
    probes = probe_members(ensemble)
    passes = {name: drift.passes(p, len(items), chosen, settings, left) for name, p in probes.items()}
    kept = len(found) - len(left)
    _tell(f"{len(items)} pictures under {len(found)} conditions, {kept} of them kept")
    _tell(f"{_cost(probes, passes)}, degrading pictures and locating faces apart")
    total = sum(passes.values())
    with tqdm(total=total, unit=" passes", disable=args.quiet) as bar:
        settled = {"workers": args.workers, "done": bar.update}
        return drift.measure_all(*places, found, chosen, settings, folder, **settled)


def _protocol(
    args: argparse.Namespace,
    ensemble: Ensemble,
    items: Sequence[Item],
    settings: drift.Settings,
    measured: Mapping[str, drift.Arrays],
) -> dict[str, str]:
    """How the numbers came to be, line by line."""
    fakes = sum(item.label for item in items)
    faces = int((~np.isnan(measured["clean"]["faces"]).any(axis=1)).sum())
    channels = "all" if settings.channels is None else f"the {settings.channels} strongest"
    votes = ", ".join(f"{n} x{w}" for n, w in ensemble.vote.weights.items() if w)
    return {
        "weights": f"{Path(args.weights).name} {ensemble.hash[:12]}: {ensemble.describe()}",
        "vote": f"{ensemble.vote.mean} of {votes}",
        "pictures": f"{len(items)} of {args.data.name} ({len(items) - fakes} real, {fakes} fake), "
        f"split {args.split or 'all rows'}, fingerprint {Pictures.of(items).fingerprint()[:12]}",
        "degradation": "every op of the engine but the distractor, always, at one strength; drawn from "
        f"(seed {args.seed}, picture name), so every member sees the same picture",
        "faces": f"{faces} pictures; the box of the clean picture at every strength",
        "Score-CAM": f"{settings.cam} pictures, {channels} channels of the last block's first LayerNorm, class fake",
        "maps judged": f"on the fakes among them, clean; {maps.STEPS} steps, {drift.RANDOM} random maps each",
        "intervals": f"95 %; means: {drift.DRAWS} bootstrap draws over pictures; CKA: jackknife of {drift.GROUPS} groups",
    }


# ------------------------------------------------------------------------------------------------ entry
def _load(args: argparse.Namespace, *, second_look: bool) -> Ensemble:
    ensemble = predict.load_ensemble(
        args.weights,
        args.device,
        exact=args.exact,
        second_look=second_look,
        members=args.members and args.members.split(","),
        batch_size=args.batch_size,
        report=_tell,
    )
    _tell(ensemble.describe())
    return ensemble


def run_pictures(args: argparse.Namespace) -> Path:
    """Maps of every picture of --input; the page's path."""
    inputs = [item for item in find_inputs(args.input) if item.kind == "image"]
    if not inputs:
        raise InputError(f"{args.input}: no picture in it; videos have no maps")
    ensemble = _load(args, second_look=True)
    title = f"What the members looked at: {args.input.name}"
    settings = {"channels": args.channels, "title": title, "progress": not args.quiet}
    return explain_pictures(ensemble, [Target(item) for item in inputs], args.out, **settings).written[0]


def _channels(text: str) -> int | None:
    if text == "all":
        return None
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: at least 2 channels, or `all`")
    return int(text)


def _strengths(text: str) -> list[float]:
    values = sorted({float(part) for part in text.split(",")})
    if not (0 <= values[0] and values[-1] <= 1):
        raise argparse.ArgumentTypeError(f"{text}: strengths lie in [0, 1]")
    return values


def _count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m solution.explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pictures = commands.add_parser("pictures", help="maps of pictures, as a page")
    pictures.add_argument("--input", type=Path, required=True, help="folder, picture, or .txt")
    measure = commands.add_parser("drift", help="what degradation does to maps and features")
    add = measure.add_argument
    add("--data", type=Path, required=True, help="manifest: CSV, JSON, or a folder")
    add("--split", help="rows of this split only (default: all)")
    add(
        "--limit",
        type=_count,
        default=0,
        help="pictures, drawn from each source and label (default: all)",
    )
    add(
        "--strengths",
        type=_strengths,
        default=list(STRENGTHS),
        help="such as 0,.5,1 (default: 0,.1,..1)",
    )
    add("--cam", type=_count, default=32, help="pictures with Score-CAM (default: 32)")
    add(
        "--full-check",
        type=_count,
        default=4,
        metavar="N",
        help="of these, compared with the pass over all channels (default: 4)",
    )
    add(
        "--seed",
        type=int,
        default=7,
        help="of the degradation and every draw (default: 7)",
    )
    add("--workers", type=_count, default=0, help="loader processes (default: 0)")
    for command in (pictures, measure):
        add = command.add_argument
        add("--weights", required=True, help="a bundle")
        add("--out", type=Path, required=True, help="folder for what comes out")
        add(
            "--channels",
            type=_channels,
            default=maps.CHANNELS,
            metavar="K",
            help=f"of Score-CAM: the strongest K, or all (default: {maps.CHANNELS})",
        )
        add("--members", help="comma-separated (default: all of the bundle)")
        add("--device", default="auto")
        add(
            "--batch-size",
            type=int,
            help="views computed at once (default: by the towers' size)",
        )
        add("--exact", action="store_true", help="float32 throughout")
        add("--quiet", action="store_true", help="no progress bar")
    return parser


@door("explain", interrupted="interrupted; drift goes on from here by the same command")
def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 2 usage or unreadable data, 3 environment or weights, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        print(run_drift(args) if args.command == "drift" else run_pictures(args))
    except UnreadableInput as error:
        raise EvaluationError(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
