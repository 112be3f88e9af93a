"""Everything before a training's first step: pictures, faces, towers with their starting weights, the member.

Takes a `Job` and a `Machine`; gives a `Run` that is ready, and leaves `dropped.csv`: every row left out, with its reason.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from solution.bundles.bundle import tower_weights
from solution.bundles.members import build_member, fill_tower, read_config, tower_configs
from solution.config import ConfigError, MemberConfig, TowerConfig, to_dict
from solution.data.images import stable_seed
from solution.data.manifest import DropReport, Item, read_manifest, select
from solution.data.training import locate_faces, tell_masks
from solution.errors import WeightsError, tell
from solution.io import atomic_file
from solution.models.member import Member
from solution.models.towers import Tower, build_tower, count_parameters, load_state
from solution.records import FaceBox
from solution.training.loop import Run, TrainingSet
from solution.training.processes import Machine, commit, processor
from solution.training.validation import validation_pictures


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and where it goes.

    data: manifest (CSV, DeepfakeBench JSON, folder). out: folder of the trained members. towers: starting weights by tower
    name; random_towers: none, for rehearsals. start_from: a trained member whose weights are the start. limit: at most so
    many validation pictures of a split (0: all). budget: seconds of training steps (0: as the config says). restart: an
    earlier training in `out` is thrown away. command: for the record.
    """

    config: MemberConfig
    data: Path
    out: Path
    towers: Mapping[str, str] = field(default_factory=dict)
    random_towers: bool = False
    start_from: Path | None = None
    limit: int = 0
    budget: float = 0.0
    restart: bool = False
    command: str = ""

    @property
    def folder(self) -> Path:
        """The member's."""
        return self.out / self.config.name


def prepare(job: Job, machine: Machine) -> Run:
    """A run that is ready for its first step, or for the one after its checkpoint.

    Raises:
        ConfigError, ManifestError, UnreadableInput, WeightsError: what it was given does not do; the message says what.
    """
    config, world = job.config, machine.world
    if job.random_towers:
        config = with_random_towers(config)
    if job.budget and world.size > 1:
        raise ConfigError("--budget is for one process; set train.max_steps instead")
    _check_tower_names(config, job.towers)
    if job.restart and world.leads:
        for name in ("checkpoint.pt", "metrics.jsonl", "model.safetensors", "validation.csv"):
            (job.folder / name).unlink(missing_ok=True)
    items, report = read_manifest(job.data, split="train")
    items, capped = select(items, config.sampling, config.train.seed)
    validation, lost = validation_pictures(job.data, config, report, limit=job.limit, machine=machine)
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    member = build_member(config, make_towers(config, job.towers, random=job.random_towers))
    if job.start_from is not None:
        start_from(member, job.start_from)
    items, faces = _with_faces(items, job, machine, report)
    data = TrainingSet(items, validation, faces)
    reports = (report, capped, lost)
    if world.leads:
        write_dropped(job.folder / "dropped.csv", reports)
    if machine.tells:
        _tell_start(member, data, machine, reports)
    provenance = {
        "command": job.command,
        "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "device": str(machine.device),
        "processes": world.size,
        "pictures": len(items),
        "dropped": sum(len(r.dropped) for r in reports),
    }
    return Run(member, data, job.folder, machine=machine, provenance=provenance, budget=job.budget)


def _check_tower_names(config: MemberConfig, towers: Mapping[str, str]) -> None:
    own = tower_configs([config]).values()
    known = ({t.name for t in own} | {t.stored_name for t in own}) - {""}
    if unknown := set(towers) - known:
        raise ConfigError(
            f"--tower {', '.join(sorted(unknown))}: {config.name} has no such tower; it has {', '.join(sorted(known))}"
        )


def _tell_start(member: Member, data: TrainingSet, machine: Machine, reports: Sequence[DropReport]) -> None:
    """What was left out, the resolved config, and the sizes of what trains."""
    config = member.config
    trainable, total = count_parameters(member)
    for text in (report.summary() for report in reports):
        if text:
            tell(text)
    tell(json.dumps(to_dict(config)))
    tell(
        f"{config.name}: {len(data.train)} training and {len(data.validation)} validation pictures, "
        f"device {machine.device}, {trainable:,} of {total:,} parameters train"
    )
    if config.needs_masks:
        tell(tell_masks(data.train, config.sampling, workers=machine.workers))


def write_dropped(path: Path, reports: Sequence[DropReport]) -> None:
    """Every row left out, and why, as a CSV; no file when nothing was."""
    rows = [row for report in reports for row in report.dropped]
    path.unlink(missing_ok=True)
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerows([("image", "reason"), *rows])


def _with_faces(
    items: list[Item], job: Job, machine: Machine, report: DropReport
) -> tuple[list[Item], dict[str, FaceBox | None]]:
    """The training pictures, and their faces where the member needs them; the unreadable ones go into `report`."""
    config, world = job.config, machine.world
    if not config.needs_faces:
        return items, {}  # the loader counts what it cannot read
    located = replace(config.face, margin=1.0, min_area=0.0, max_area=1.0)  # what does not matter
    settings = json.dumps([to_dict(located), str(job.data.resolve())])
    cache = job.out / f"faces-{stable_seed(settings):08x}.jsonl"
    if world.leads:
        faces = locate_faces(items, config, cache, workers=machine.workers, progress=machine.progress)
    if world.size > 1:
        torch.distributed.barrier()
    if not world.leads:
        faces = locate_faces(items, config, cache, progress=False)
    for item in items:
        if item.name not in faces:
            report.add(item.name, "unreadable")
    return [item for item in items if item.name in faces], faces


# ------------------------------------------------------------------------------------------------ starting weights
def with_random_towers(config: MemberConfig) -> MemberConfig:
    """The member on towers of random weights that its bundle can make again: `random:SEED` where the Hub's would be."""

    def of(tower: TowerConfig | None) -> TowerConfig | None:
        known = tower is None or not tower.public
        return tower if known else replace(tower, source=f"random:{config.train.seed}", revision="", sha256="")

    return replace(config, tower=of(config.tower), clip=of(config.clip))


def make_towers(config: MemberConfig, sources: Mapping[str, str], *, random: bool = False) -> dict[str, Tower]:
    """The member's towers with their starting weights: `sources` by tower name, else where the config says."""
    towers = {}
    for name, tower in tower_configs([config]).items():
        other = tower.stored_name
        if random and tower.seed is None:
            towers[name] = build_tower(tower)
        elif tower.travels and not (other in sources or name in sources):
            raise WeightsError(
                f"tower {other!r} has no public source; pass --tower {other}=PATH (a folder as on the Hub, or the "
                ".safetensors of an earlier training)"
            )
        else:
            override_source = sources.get(name) or sources.get(other)
            towers[name] = fill_tower(tower, tower_weights(tower, override_source))
    return towers


def start_from(member: Member, folder: Path) -> None:
    """Start where a trained member stopped: everything of one of the same kind, the adapter alone of another.

    Fusion starts from the trained global stream's adapter; a second run from the first one's weights.

    Raises:
        WeightsError: no trained member there, or one that does not fit.
    """
    if not (folder / "model.safetensors").is_file():
        raise WeightsError(f"{folder}: no model.safetensors; train that member first")
    given = load_file(folder / "model.safetensors")
    target = member.stored_state()
    if member.config.stores_tower:  # --tower brings that
        target = {k: t for k, t in target.items() if not k.startswith("tower.")}
    if read_config(folder).kind != member.config.kind:
        given = {k: t for k, t in given.items() if k.startswith("adapter.")}
        target = {k: t for k, t in target.items() if k.startswith("adapter.")}
        if not given or not target:
            has = "an adapter" if given else "no adapter"
            raise WeightsError(
                f"{folder}: a {read_config(folder).kind} with {has}, to start a {member.config.kind} with "
                f"{'an' if target else 'none'}; the adapter is all that another kind can give (adapter.kind)"
            )
    load_state(target, given, f"{folder}: start of {member.config.name}")
