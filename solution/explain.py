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
from typing import Any

import numpy as np
import torch

from solution import drift, drift_figures, maps, predict
from solution.backbones import WeightsError
from solution.config import ConfigError, FaceConfig, MemberConfig
from solution.data import ManifestError, read_manifest
from solution.drift import locators_of, see
from solution.evaluate import limit_items
from solution.explain_page import Explained, Map, MemberView, Pages
from solution.faces import FaceLocator, crop_box, crop_square
from solution.images import (
    Input,
    InputError,
    UnreadableInput,
    decode_image,
    find_inputs,
)
from solution.journal import Scored
from solution.measure import EvaluationError, Pictures
from solution.predict import Ensemble
from solution.records import FaceBox
from solution.submission import write_atomically
from solution.vote import decide

MARGIN = (
    1.5  # of a stated time over the measured speed: drawing, decoding, a busy machine
)
STRENGTHS = tuple(round(0.1 * k, 1) for k in range(11))  # the paper's
TITLES = {
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
    items: Sequence[Input],
    out: Path,
    *,
    channels: int | None = maps.CHANNELS,
    title: str = "What the members looked at",
    report: Callable[[str], None] = _tell,
    progress: bool = True,
) -> Path:
    """Maps of every picture of `items` in `out`, as one page (a further one every 100 pictures); its path.

    What it costs is reported before it starts: forward passes, and the time they take here at most. A picture that
    cannot be read is listed with its reason.

    channels: of Score-CAM, the strongest so many; None: all.
    """
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    faces = FaceLocator.available()
    if not faces:
        report("no face detector is installed: no face crops, nothing on backgrounds")
    probes = probe_members(ensemble)
    per = {n: 1 + min(channels or p.width, p.width) for n, p in probes.items()}
    report(_cost(probes, {n: len(items) * count for n, count in per.items()}))
    pages = Pages(out, title, len(items), _facts(ensemble, channels, len(items)))
    explainer = Explainer(ensemble, channels, faces=faces)
    begun = time.monotonic()
    for item in tqdm(items, unit="picture", desc="maps", disable=not progress):
        try:
            pages.add(explainer.explain(item))
        except UnreadableInput as error:
            pages.fail(item.name, error.reason)
    first = pages.close()
    report(f"maps of {len(items)} pictures took {_spoken(time.monotonic() - begun)}")
    return first


def probe_members(ensemble: Ensemble) -> dict[str, maps.Probe]:
    """What every member's maps cost here, two batches each."""
    with torch.inference_mode():
        return {
            name: maps.probe(member, ensemble.batch_size)
            for name, member in ensemble.members.items()
        }


def _cost(probes: Mapping[str, maps.Probe], passes: Mapping[str, int]) -> str:
    """Forward passes, exactly, and the time they take at most."""
    seconds = MARGIN * sum(probes[n].seconds * count for n, count in passes.items())
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


class Explainer:
    """Explains one picture at a time: what every member saw, said, and looked at."""

    def __init__(
        self, ensemble: Ensemble, channels: int | None, *, faces: bool
    ) -> None:
        self.ensemble, self.channels = ensemble, channels
        self.locators = locators_of(ensemble.views) if faces else {}

    @torch.inference_mode()
    def explain(self, item: Input) -> Explained:
        """Raises `UnreadableInput`."""
        picture = decode_image(item.path)
        ensemble, size = self.ensemble, picture.shape[:2]
        seen = see(picture, ensemble.views, self.locators)
        face = None if np.isnan(seen.face).any() else tuple(seen.face.tolist())
        tensors = [
            torch.from_numpy(v).permute(2, 0, 1)[None].to(ensemble.device)
            for v in seen.views
        ]
        row = self._verdict(item.name, tensors)
        members, joint, weight, outside = [], np.zeros(size, np.float32), 0, 0.0
        for name in ensemble.members:
            place, votes = ensemble.view_of[name], ensemble.vote.weights.get(name, 0)
            rect = tuple(seen.rects[place])
            found = self._maps(name, tensors[place][0])
            cam = found["score_cam"]
            covered = None
            if face is not None:
                covered = maps.coverage(rect, face, cam.shape)
            if votes and cam.sum() > 0:
                laid = maps.place(cam, rect, size)
                joint += votes * laid / max(float(laid.sum()), 1e-12)
                weight += votes
                if covered is not None:
                    outside += votes * maps.share_outside(cam, covered)
            members.append(
                MemberView(
                    name,
                    votes,
                    row.levels[name],
                    row.p_fake[name],
                    seen.views[place],
                    [_shown(kind, m, covered) for kind, m in found.items()],
                )
            )
        note = ""
        if face is not None and weight:
            note = f"{outside / weight:.0%} outside the face"
        verdict = str(decide(np.array([row.score]), ensemble.vote)[0])
        crop = self._crop(picture, face)
        return Explained(
            item.name, row.score, verdict, picture, face, crop, joint, note, members
        )

    def _verdict(self, name: str, views: list[torch.Tensor]):
        """The row of the sidecar, as scoring makes it, second looks included."""
        ensemble = self.ensemble
        logits = ensemble.finish(ensemble.launch(views), views)[:, 0]
        by_member = {n: [float(z)] for n, z in zip(ensemble.members, logits)}
        scored = Scored(0, name, -1, -1, faces=[None], logits=by_member)
        return predict.judge([scored], ensemble.vote, ensemble.calibrators)[0]

    def _maps(self, name: str, view: torch.Tensor) -> dict[str, np.ndarray]:
        """Score-CAM, attention and the member's own maps, (h, w) each."""
        member = self.ensemble.members[name]
        sight = maps.look(member, view[None])
        channels = maps.channel_maps(member, sight)[0]
        size = self.ensemble.batch_size
        found = {
            "score_cam": maps.score_cam(
                member, view, channels, count=self.channels, batch=size
            ),
            "attention": maps.attention_map(member, sight)[0],
        }
        found |= {kind: m[0] for kind, m in sight.evidence.items()}
        return {kind: m.cpu().numpy() for kind, m in found.items()}

    def _crop(self, picture: np.ndarray, face) -> np.ndarray | None:
        if face is None:
            return None
        config = next(iter(self.locators), FaceConfig())
        return crop_square(picture, crop_box(FaceBox(*face, 0.0), config))


def _shown(kind: str, values: np.ndarray, covered: np.ndarray | None) -> Map:
    """A map with the share of it outside the face, and for attention its entropy."""
    notes = []
    if values.sum() == 0:
        notes.append("nothing stands out")
    elif covered is not None:
        notes.append(f"{maps.share_outside(values, covered):.0%} outside the face")
    if kind == "attention":
        spread = maps.entropy(torch.from_numpy(values).flatten()).item()
        notes.append(f"{spread:.2f} of {math.log(values.size):.2f} nats")
    title = {"score_cam": "Score-CAM"}.get(kind) or TITLES.get(kind, kind)
    return Map(title, values, "; ".join(notes), 1.0 if kind in ABSOLUTE else None)


# ------------------------------------------------------------------------------------------------ drift
def run_drift(args: argparse.Namespace) -> Path:
    """The whole measurement; the path of its tables."""
    from tqdm import tqdm

    items, dropped = read_manifest(args.data, split=args.split)
    for line in dropped.summary().splitlines():
        _tell(line)
    items = limit_items(items, args.limit, args.seed)
    ensemble = _load(args)
    faces = FaceLocator.available()
    if not faces:
        _tell(
            "no face detector is installed: members see whole pictures, nothing on backgrounds"
        )
    settings = drift.Settings(
        cam=min(args.cam, len(items)),
        channels=args.channels or None,
        full=min(args.full, args.cam),
        seed=args.seed,
        faces=faces,
    )
    cams = limit_items(items, settings.cam, args.seed) if settings.cam else []
    chosen = drift.choose(items, cams, settings)
    conditions = drift.conditions(args.strengths, args.seed)
    probes = probe_members(ensemble)
    passes = {
        name: drift.passes(p, len(items), chosen, settings, len(conditions))
        for name, p in probes.items()
    }
    _tell(f"{len(items)} pictures under {len(conditions)} conditions")
    _tell(_cost(probes, passes) + ", degrading and faces not counted")
    args.out.mkdir(parents=True, exist_ok=True)
    total, disable = sum(passes.values()), args.quiet
    with tqdm(total=total, unit=" passes", unit_scale=True, disable=disable) as bar:
        measured = drift.measure_all(
            ensemble,
            items,
            conditions,
            chosen,
            settings,
            args.out / "measured",
            workers=args.workers,
            done=bar.update,
        )
    labels = np.array([item.label for item in items])
    results = {
        "protocol": _protocol(args, ensemble, items, settings, chosen, measured),
        "settings": dataclasses.asdict(settings) | {"strengths": args.strengths},
        "names": [item.name for item in items],
        **drift.summarise(measured, conditions, ensemble, labels, args.seed),
    }
    write_atomically(
        args.out / "drift.json", json.dumps(results, indent=1, allow_nan=False) + "\n"
    )
    drift_figures.draw_figures(results, args.out)
    write_atomically(args.out / "drift.md", drift_figures.markdown(results))
    return args.out / "drift.md"
