"""The whole drift study: which pictures, every condition measured, tables and figures written.

Takes a `DriftJob` and an ensemble; leaves `drift.json`, `drift.md`, figures for light and dark pages, and `measured/`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from solution.data.faces import FaceLocator
from solution.data.manifest import Item, read_manifest
from solution.errors import tell
from solution.evaluation import maps
from solution.evaluation.conditions import limit_items
from solution.evaluation.explainer import cost, probe_members
from solution.evaluation.measure import Pictures
from solution.io import write_atomically
from solution.scoring.ensemble import Ensemble
from solution.studies import drift, drift_figures


@dataclass(frozen=True)
class DriftJob:
    """What is measured, on what, and where it goes; `settings` as asked for, before the number of pictures bounds it.

    data: a manifest, of which `split` (None: all rows), at most `limit` pictures (0: all). strengths: in [0, 1].
    workers: loader processes.
    """

    data: Path
    out: Path
    weights: str
    settings: drift.Settings
    strengths: Sequence[float]
    split: str | None = None
    limit: int = 0
    workers: int = 0
    progress: bool = True


def drift_items(job: DriftJob) -> list[Item]:
    """The pictures to measure on; what the manifest left out is told."""
    items, dropped = read_manifest(job.data, split=job.split)
    for line in dropped.summary().splitlines():
        tell(line)
    return limit_items(items, job.limit, job.settings.seed)


def measure_drift(job: DriftJob, items: Sequence[Item], ensemble: Ensemble) -> Path:
    """The whole measurement; the path of its tables."""
    seed = job.settings.seed
    faces = FaceLocator.available()
    if not faces:
        tell("no face detector is installed: whole pictures, nothing on backgrounds")
    cam = min(job.settings.cam, len(items))
    settings = dataclasses.replace(job.settings, cam=cam, full=min(job.settings.full, cam), faces=faces)
    cams = limit_items(items, cam, seed) if cam else []
    chosen = drift.choose(items, cams, settings)
    job.out.mkdir(parents=True, exist_ok=True)
    measured = _measure(job, ensemble, items, chosen, settings)
    labels = np.array([item.label for item in items])
    numbers = drift.summarise(
        measured,
        drift.conditions(job.strengths, seed),
        ensemble,
        labels,
        seed,
    )
    results = {
        "protocol": _protocol(job, ensemble, items, settings, measured),
        "settings": dataclasses.asdict(settings) | {"strengths": job.strengths},
        "bundle": ensemble.fingerprint(),
        **numbers,
    }
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    write_atomically(job.out / "drift.json", text)
    drift_figures.draw_figures(results, job.out)
    write_atomically(job.out / "drift.md", drift_figures.markdown(results))
    return job.out / "drift.md"


def _measure(
    job: DriftJob,
    ensemble: Ensemble,
    items: Sequence[Item],
    chosen: drift.Chosen,
    settings: drift.Settings,
) -> dict[str, drift.Arrays]:
    """All conditions, with the cost before and a bar while it runs."""
    folder, found = job.out / "measured", drift.conditions(job.strengths, settings.seed)
    places = (ensemble, items)
    left = [c for c in found if not drift.stored_path(folder, *places, c, chosen, settings).exists()]
    probes = probe_members(ensemble)
    passes = {name: drift.passes(p, len(items), chosen, settings, left) for name, p in probes.items()}
    kept = len(found) - len(left)
    tell(f"{len(items)} pictures under {len(found)} conditions, {kept} of them kept")
    tell(f"{cost(probes, passes)}, degrading pictures and locating faces apart")
    total = sum(passes.values())
    with tqdm(total=total, unit=" passes", disable=not job.progress) as bar:
        settled = {"workers": job.workers, "done": bar.update}
        return drift.measure_all(*places, found, chosen, settings, folder, **settled)


def _protocol(
    job: DriftJob,
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
        "weights": f"{Path(job.weights).name} {ensemble.hash[:12]}: {ensemble.describe()}",
        "vote": f"{ensemble.vote.mean} of {votes}",
        "pictures": f"{len(items)} of {job.data.name} ({len(items) - fakes} real, {fakes} fake), "
        f"split {job.split or 'all rows'}, fingerprint {Pictures.of(items).fingerprint()[:12]}",
        "degradation": "every op of the engine but the distractor, always, at one strength; drawn from "
        f"(seed {settings.seed}, picture name), so every member sees the same picture",
        "faces": f"{faces} pictures; the box of the clean picture at every strength",
        "Score-CAM": f"{settings.cam} pictures, {channels} channels of the last block's first LayerNorm, class fake",
        "maps judged": f"on the fakes among them, clean; {maps.STEPS} steps, {drift.RANDOM} random maps each",
        "intervals": f"95 %; means: {drift.DRAWS} bootstrap draws over pictures; CKA: jackknife of {drift.GROUPS} groups",
    }
