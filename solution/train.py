"""Entry: train one member.

`python -m solution.train --member NAME --preset giant|compact --data MANIFEST --out DIR`. Leaves in DIR/NAME: the best
weights (`config.json`, `model.safetensors`; a tower trained whole in DIR/towers) and what they make of the validation
pictures (`validation.csv`: logits), `checkpoint.pt` to go on from, `metrics.jsonl`, and the rows that were left out of
training or validation with their reasons (`dropped.csv`). The same command goes on where it stopped, bit for bit on CPU.
`torchrun` spreads it over processes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from solution.bundles.bundle import tower_weights
from solution.bundles.members import (
    build_member,
    fill_tower,
    read_config,
    save_member,
    tower_configs,
)
from solution.config import KINDS, MEMBERS, ConfigError, DegradationConfig, MemberConfig, override, to_dict
from solution.data.epochs import Sample, plan_epoch
from solution.data.guard import look_at
from solution.data.images import UnreadableInput, decode_image, stable_seed
from solution.data.manifest import DropReport, Item, ManifestError, draw_items, manifest_splits, read_manifest, select
from solution.data.training import (
    TrainingViews,
    ValidationViews,
    locate_faces,
    tell_masks,
    training_loader,
    validation_loader,
)
from solution.data.views import quiet_worker
from solution.errors import KitError, door
from solution.evaluation.metrics import auc, auc_by_source
from solution.io import atomic_file, write_atomically
from solution.models.member import Member
from solution.models.merging import pick_device
from solution.models.optimization import (
    Average,
    Phase,
    make_optimizer,
    phases,
    rate_factor,
)
from solution.models.towers import (
    Tower,
    WeightsError,
    build_tower,
    count_parameters,
    load_state,
    tower_parameters,
)
from solution.presets import PRESETS, preset
from solution.records import Batch, MemberOutput


class TrainingError(KitError, RuntimeError):
    """Training that cannot go on; the message says what was found and what to do."""


# ------------------------------------------------------------------------------------------------ processes
@dataclass(frozen=True)
class World:
    """This process among its siblings."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[World]:
    """Join torchrun's process group when there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(hours=12),  # the others wait while rank 0 validates
    )
    try:
        yield World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()


class TrainingStep(nn.Module):
    """Forward and loss as one module, so that DistributedDataParallel sees every use of a parameter."""

    def __init__(self, member: Member):
        super().__init__()
        self.member = member

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float], MemberOutput]:
        output = self.member(batch.images)
        loss, parts = self.member.loss(output, batch)
        return loss, parts, output


def fingerprint(member: Member) -> str:
    """SHA-256 over a few weights of every parameter of the member's tower: which one a training started from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(tower_parameters(member.tower).items()):
        few = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)]
        digest.update(name.encode() + few.float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ the run
class Run:
    """One member's training: where it stands, and how it goes on. `run()` does the work."""

    def __init__(
        self,
        member: Member,
        items: list[Item],
        validation: list[Item],
        folder: Path,
        *,
        faces: dict,
        device: torch.device,
        world: World = World(),
        workers: int = 0,
        provenance: dict[str, Any] | None = None,
        progress: bool = True,
        budget: float = 0.0,
    ):
        """budget: seconds that the steps of all phases shall take; their number is set by the first ones' speed."""
        self.member, self.config, self.folder = member.to(device), member.config, folder
        self.budget = budget
        self.items, self.validation, self.faces = items, validation, faces
        self.device, self.world, self.workers, self.progress = (
            device,
            world,
            workers,
            progress,
        )
        self.provenance = provenance or {}
        self.labels = np.array([item.label for item in items])
        self.sources = [item.source for item in items]
        self.bf16 = self.config.train.precision == "bf16" or (
            self.config.train.precision == "auto" and device.type == "cuda"
        )
        member.tower.checkpointing = self.config.train.grad_checkpointing
        self.start = fingerprint(member)
        self.stopping = False
        self.lost = 0  # unreadable samples since the processes last spoke
        self.state = {
            "phase": 0,
            "step": 0,
            "total": 0,
            "best": -1.0,
            "pictures": 0,
            "unreadable": 0,
            "seconds": 0.0,
            "planned": 0,  # steps of this phase, where a budget decides
        }
        self.history: list[dict[str, Any]] = []
        self.average: Average | None = None

    # -- plan
    def epoch_plan(self, epoch: int) -> list[list[Sample]]:
        """This rank's micro-batches of the epoch (counted over all phases)."""
        train = self.config.train
        size = train.batch
        plan = plan_epoch(
            self.labels,
            self.sources,
            sampling=self.config.sampling,
            blend_p=self.config.augment.self_blend_p,
            batch=size * self.world.size,
            seed=train.seed,
            epoch=epoch,
            batches=train.steps_per_epoch * self.gather,
        )
        if not plan:
            raise TrainingError(
                f"{len(self.items)} pictures do not fill one batch of {size * self.world.size}; lower train.batch"
            )
        mine = slice(self.world.rank * size, (self.world.rank + 1) * size)
        return [batch[mine] for batch in plan]

    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch: as configured, or what the data fills (the last may gather fewer batches)."""
        return math.ceil(len(self.epoch_plan(0)) / self.gather)

    @property
    def gather(self) -> int:
        """Micro-batches of this process an optimizer step: the processes share the configured accumulation."""
        accumulate = self.config.train.accumulate
        if accumulate > 1 and accumulate % self.world.size:
            raise ConfigError(
                f"train.accumulate {accumulate} is no multiple of the {self.world.size} processes that share it"
            )
        return max(1, accumulate // self.world.size)

    # -- run
    def run(self) -> dict[str, Any]:
        """Train to the end, or to the next step boundary after an interruption (`stopping`)."""
        checkpoint = self._read_checkpoint()
        first = self.state["phase"]
        offset = 0
        for number, phase in enumerate(phases(self.config)):
            if number >= first:
                self._run_phase(number, phase, offset, checkpoint if number == first else None)
                if self.stopping:
                    break
                self.state |= {"phase": number + 1, "step": 0, "planned": 0}
            offset += phase.epochs
        return dict(self.state)

    def _run_phase(self, number: int, phase: Phase, first_epoch: int, checkpoint: dict | None) -> None:
        optimizer = make_optimizer(self.member, phase)
        if self.config.train.average:
            trained = [p for g in optimizer.param_groups for p in g["params"]]
            self.average = Average(trained, self.config.train.average)
        per_epoch = self.steps_per_epoch()
        total = phase.epochs * per_epoch
        if self.config.train.max_steps:
            total = min(total, self.config.train.max_steps)
        if checkpoint is not None and checkpoint["state"]["phase"] == number and checkpoint["optimizer"] is not None:
            optimizer.load_state_dict(checkpoint["optimizer"])
            if self.average is not None:
                for value, kept in zip(self.average.values, checkpoint["average"]):
                    value.copy_(kept)
        step_module: nn.Module = TrainingStep(self.member)
        if self.world.size > 1:
            step_module = nn.parallel.DistributedDataParallel(
                step_module, find_unused_parameters=KINDS[self.config.kind].spares_parameters
            )
        bar = tqdm(
            total=total,
            initial=self.state["step"],
            desc=f"{self.config.name} {phase.name}",
            unit="step",
            disable=not (self.progress and self.world.leads),
        )
        self.share = self.budget * phase.epochs / self.config.train.epochs
        with bar:
            while self.state["step"] < self._planned(total) and not self.stopping:
                self._run_epoch(step_module, optimizer, phase, first_epoch, per_epoch, total, bar)
        if self.stopping:
            self._write_checkpoint(optimizer)
        else:
            # Whoever goes on from here begins the next phase.
            self._write_checkpoint(None, self.state | {"phase": number + 1, "step": 0, "planned": 0})

    def _planned(self, total: int) -> int:
        """Steps of the phase: `total`, or fewer where the budget decided so after its warm-up."""
        return min(total, self.state["planned"] or total)

    def _plan_by_budget(self, phase: Phase, total: int) -> None:
        """Once the warm-up is through, set the number of steps that the budget's remaining seconds allow.

        Until then the rate does not depend on that number. The first fifth of the warm-up, when loaders and kernels
        start, is not measured but spent.
        """
        step, first = self.state["step"], max(1, phase.optim.warmup_steps // 5)
        now = time.perf_counter()
        if step == 1:
            self._began = now
        if step == first:
            self._measured = now
        if step == max(first + 1, phase.optim.warmup_steps):
            pace = (now - self._measured) / (step - first)
            left = self.share - (now - self._began)
            self.state["planned"] = step + max(1, int(left / pace))
            print(
                f"{self.config.name} {phase.name}: {pace:.3f} s a step; {self._planned(total)} steps in the budget",
                file=sys.stderr,
            )

    def _run_epoch(self, module, optimizer, phase, first_epoch, per_epoch, total, bar) -> None:
        epoch = first_epoch + self.state["step"] // per_epoch
        done = self.state["step"] % per_epoch
        gather = self.gather
        plan = self.epoch_plan(epoch)[done * gather :]
        train = self.config.train
        views = TrainingViews(self.items, self.config, self.faces, train.seed)
        batches = training_loader(views, plan, workers=self.workers)
        self.member.train()
        for start in range(0, len(plan), gather):
            began = time.perf_counter()
            micro = min(gather, len(plan) - start)
            factor = [
                rate_factor(self.state["step"], self._planned(total), phase.optim, g["rate"])
                for g in optimizer.param_groups
            ]
            for group, f in zip(optimizer.param_groups, factor):
                group["lr"] = group["rate"] * f
            # Dropout is a function of seed, step and rank: a resumed run draws what the whole one does, on any device.
            torch.manual_seed(stable_seed(f"{train.seed} {self.state['total']} {self.world.rank}"))
            line = self._optimizer_step(module, optimizer, batches, micro, phase)
            self.state["step"] += 1
            self.state["total"] += 1
            self.state["pictures"] += line.pop("pictures")
            self.state["seconds"] += time.perf_counter() - began
            line |= {
                "step": self.state["total"],
                "phase": phase.name,
                "epoch": epoch,
                "lr": optimizer.param_groups[-1]["lr"],
            }
            self.history.append(line)
            rate = self.state["pictures"] / self.state["seconds"]
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {rate:.1f} images/s")
            bar.update()
            if self.budget and not self.state["planned"]:
                self._plan_by_budget(phase, total)
                bar.total = self._planned(total)
            self._agree_on_stopping()
            self._between_steps(optimizer, per_epoch, self._planned(total))
            if self.stopping or self.state["step"] >= self._planned(total):
                return

    def _optimizer_step(self, module, optimizer, batches, micro: int, phase: Phase) -> dict[str, Any]:
        """One optimizer step over `micro` micro-batches: the gradient of their mean loss."""
        optimizer.zero_grad(set_to_none=True)
        # Numbers stay on the device until the step is through: each one read sooner would wait for it.
        sums: dict[str, torch.Tensor | float] = {}
        words: dict[str, str] = {}
        pictures = 0
        for index in range(micro):
            batch = next(batches)
            if batch is None:
                raise TrainingError("every picture of a batch was unreadable; look at the manifest")
            batch = batch.to(self.device)
            synchronise = index == micro - 1 or self.world.size == 1
            with contextlib.nullcontext() if synchronise else module.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss, parts, output = module(batch)
                (loss / micro).backward()
            pictures += len(batch.labels) * self.world.size
            self.lost += self.config.train.batch - len(batch.labels)
            for name, value in ({"loss": loss.detach()} | parts).items():
                if isinstance(value, str):
                    words[name] = value
                else:
                    sums[name] = sums.get(name, 0.0) + value / micro
        if not math.isfinite(float(sums["loss"])):
            raise TrainingError(
                f"loss is {float(sums['loss'])} at step {self.state['total']}; last batch: {batch.names[:8]}"
            )
        if phase.optim.clip_norm:
            trained = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            sums["grad_norm"] = nn.utils.clip_grad_norm_(trained, phase.optim.clip_norm)
        optimizer.step()
        if self.average is not None:
            self.average.update(self.state["step"])
        with torch.no_grad():
            numbers = sums | self.member.after_step(output, batch)
        return _as_floats(numbers) | words | {"pictures": pictures}

    def _agree_on_stopping(self) -> None:
        """One process that was told to stop stops all, at the same step; unreadable samples are counted over all."""
        said = torch.tensor([float(self.stopping), float(self.lost)])
        if self.world.size > 1:
            said = said.to(self.device)
            torch.distributed.all_reduce(said)
        self.stopping = bool(said[0] > 0)
        self.state["unreadable"] += int(said[1])
        self.lost = 0

    def _between_steps(self, optimizer, per_epoch: int, total: int) -> None:
        """Validate and save where it is due."""
        step, train = self.state["step"], self.config.train
        every = train.validate_every or per_epoch
        if step % every == 0 or step == total:
            self.validate()
        if step % train.save_every == 0 and step < total:
            self._write_checkpoint(optimizer)

    # -- validation
    def validate(self) -> None:
        """AUC on seen and unseen generators, clean and degraded; the best mean of the four keeps its weights.

        Without an `unseen` split it is the mean of the two on seen generators.
        """
        if not self.validation or not self.world.leads:
            return
        averaged = self.average.in_place() if self.average else contextlib.nullcontext()
        with averaged:
            logits = {
                "clean": self.score(None),
                "degraded": self.score(DegradationConfig(global_p=1.0)),
            }
            line: dict[str, Any] = {
                "step": self.state["total"],
                "validation": len(self.validation),
            } | split_aucs(self.validation, logits)
            self.history.append(line)
            if line["mean"] > self.state["best"]:
                self.state["best"] = line["mean"]
                self.save_best(line, logits)
        self.member.train()

    def score(self, degradation: DegradationConfig | None) -> np.ndarray:
        """Logits (N,) of the validation pictures."""
        views = ValidationViews(self.validation, self.config, degradation, self.config.train.validation_seed)
        loader = validation_loader(views, batch=2 * self.config.train.batch, workers=self.workers)
        self.member.eval()
        logits = []
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            for images in tqdm(loader, desc="validation", leave=False, disable=not self.progress):
                logits.append(self.member(images.to(self.device)).logit.float().cpu())
        return torch.cat(logits).double().numpy()

    def save_best(self, line: dict[str, Any], logits: dict[str, np.ndarray]) -> None:
        """Write the member's folder: these are the weights that a bundle takes."""
        training = self.provenance | {
            "best": line,
            "pictures_seen": self.state["pictures"],
        }
        training["seconds"] = round(self.state["seconds"], 1)
        save_member(self.member, self.folder, training=training)
        with atomic_file(self.folder / "validation.csv") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["image", "label", "source", "split", *logits])
            for item, *values in zip(self.validation, *logits.values()):
                rows.writerow([item.name, item.label, item.source, item.split, *values])

    # -- checkpoints
    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.pt"

    def setting(self) -> dict[str, str]:
        """What has to be the same for a run to go on: configuration, pictures, tower, and how many share the work."""

        def digest(items: list[Item]) -> str:
            named = json.dumps([[item.name, item.label] for item in items])
            return hashlib.sha256(named.encode()).hexdigest()

        return {
            "configuration": json.dumps(to_dict(self.config)),
            "training set": digest(self.items),
            "validation set": digest(self.validation),
            "tower": self.start,
            "number of processes": str(self.world.size),
        }

    def _write_checkpoint(self, optimizer: torch.optim.Optimizer | None, state: dict[str, Any] | None = None) -> None:
        if not self.world.leads:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "setting": self.setting(),
            "state": dict(state or self.state),
            "weights": {k: t.detach() for k, t in self.member.stored_state().items()},
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "average": None if self.average is None else self.average.values,
        }
        part = self.checkpoint_path.with_suffix(".part")
        torch.save(content, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(self.checkpoint_path)
        self._write_history()

    def _read_checkpoint(self) -> dict | None:
        if not self.checkpoint_path.exists():
            return None
        try:
            content = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise WeightsError(f"{self.checkpoint_path}: unreadable ({error}); delete it or pass --restart") from error
        found, mine = content.get("setting", {}), self.setting()
        if other := [name for name in mine if found.get(name) != mine[name]]:
            raise ConfigError(
                f"{self.checkpoint_path} was written under another {', '.join(other)}; go on with what it was written "
                "under, or pass --restart or another --out"
            )
        load_state(self.member.stored_state(), content["weights"], str(self.checkpoint_path))
        self.state = content["state"]
        path = self.folder / "metrics.jsonl"
        lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
        self.history = [line for line in lines if line["step"] <= self.state["total"]]
        return content

    def _write_history(self) -> None:
        write_atomically(
            self.folder / "metrics.jsonl",
            "".join(json.dumps(line) + "\n" for line in self.history),
        )


def _as_floats(numbers: dict[str, torch.Tensor | float]) -> dict[str, float]:
    """Numbers of a step as floats, read off the device at once."""
    tensors = {n: v for n, v in numbers.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        return dict(numbers)
    stacked = torch.stack([v.detach().float().reshape(()) for v in tensors.values()])
    return dict(numbers) | dict(zip(tensors, stacked.tolist()))


def split_aucs(items: Sequence[Item], logits: dict[str, np.ndarray]) -> dict[str, float]:
    """AUC by condition on seen and (where the items have that split) unseen generators, and the mean of all.

    Seen: over all pictures. Unseen: the mean over sources that have both classes; the rest is one source more.
    """
    labels = np.array([item.label for item in items])
    unseen = np.array([item.split == "unseen" for item in items])
    sources = np.array([item.source for item in items])
    found = {}
    for name, values in logits.items():
        found[name] = auc(labels[~unseen], values[~unseen])
        if unseen.any():
            found[f"unseen_{name}"] = auc_by_source(labels[unseen], values[unseen], sources[unseen])
    return found | {"mean": sum(found.values()) / len(found)}


# ------------------------------------------------------------------------------------------------ entry
def make_towers(config: MemberConfig, sources: dict[str, str], *, random: bool = False) -> dict[str, Tower]:
    """The member's towers with their starting weights: `sources` by tower name, else where the config says."""
    towers = {}
    for name, tower in tower_configs([config]).items():
        other = tower.stored_name
        if random:
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
    from safetensors.torch import load_file

    if not (folder / "model.safetensors").is_file():
        raise WeightsError(f"{folder}: no model.safetensors; train that member first")
    given = load_file(folder / "model.safetensors")
    target = member.stored_state()
    if member.config.adapter.in_place:  # --tower brings that
        target = {k: t for k, t in target.items() if not k.startswith("tower.")}
    if read_config(folder).kind != member.config.kind:
        given = {k: t for k, t in given.items() if k.startswith("adapter.")}
        target = {k: t for k, t in target.items() if k.startswith("adapter.")}
    if given:
        load_state(target, given, f"{folder}: start of {member.config.name}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m solution.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--member",
        required=True,
        help=f"a member of the preset: {', '.join(MEMBERS)}; compact has `semantic` too, the tower of two of them",
    )
    parser.add_argument("--preset", default="compact", choices=list(PRESETS))
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        help="manifest: CSV, DeepfakeBench JSON, or folder",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the trained members")
    parser.add_argument(
        "--tower",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="starting weights of a tower",
    )
    parser.add_argument(
        "--random-towers",
        action="store_true",
        help="towers start at random (smoke runs)",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="DIR",
        help="trained member whose weights are the start (of another kind: its adapter)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="e.g. optim.lr=1e-5",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="loader processes",
    )
    parser.add_argument(
        "--validation-limit",
        type=int,
        default=0,
        help="at most so many validation pictures",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="of training steps (one process); the schedule is fitted to it after the warm-up",
    )
    parser.add_argument("--restart", action="store_true", help="ignore an earlier checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def commit() -> str:
    """The commit of this checkout, with `+` when its files differ from it; empty outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def readable(
    items: list[Item], config: MemberConfig, report: DropReport, *, workers: int, progress: bool
) -> list[Item]:
    """The validation pictures that can be read: known before the first step, not after an epoch.

    workers: processes that read; a file at which one dies cannot be read.

    Raises:
        UnreadableInput: one cannot, under `sampling.on_unreadable=fail`; under `drop` it goes into `report`.
    """
    kept = []
    looks = look_at([item.path for item in items], _reads, workers=min(workers, len(items)), start=quiet_worker)
    bar = tqdm(looks, "validation set", len(items), leave=False, disable=not progress)
    for item, (_, reason) in zip(items, bar):
        if reason and config.sampling.on_unreadable == "fail":
            raise UnreadableInput(item.path, reason)
        if reason:
            report.add(item.name, f"validation: {reason}")
        else:
            kept.append(item)
    return kept


def _reads(path: Path) -> None:
    decode_image(path)


def validation_pictures(
    args: argparse.Namespace, config: MemberConfig, told: DropReport, *, progress: bool
) -> tuple[list[Item], DropReport]:
    """The readable pictures to validate on, at most `--validation-limit` of each split (a fixed draw), and what was left out.

    Those of the splits `val` (generators that occur in training, other pictures) and `unseen` (other generators).
    told: what reading the training pictures has left out already.
    """
    items, lost = [], DropReport()
    present = manifest_splits(args.data)
    for split in [split for split in ("val", "unseen") if split in present]:
        part, left_out = read_manifest(args.data, split=split)
        items += draw_items(part, args.validation_limit, config.train.validation_seed)
        lost.take(left_out, told)
    items = readable(items, config, lost, workers=args.workers, progress=progress)
    if len({item.label for item in items}) < 2:
        raise ManifestError(
            f"{args.data}: the val split needs real and fake pictures, found {len(items)} of one class; name the splits "
            "train and val in a column or by folders, or give either class pictures of more than one video or sub-folder"
        )
    return items, lost


def with_faces(
    items: list[Item],
    args: argparse.Namespace,
    config: MemberConfig,
    world: World,
    report: DropReport,
) -> tuple[list[Item], dict]:
    """The training pictures, and their faces where the member needs them; the unreadable ones go into `report`."""
    if not config.needs_faces:
        return items, {}  # the loader counts what it cannot read
    located = replace(config.face, margin=1.0, max_area=1.0)  # what does not matter
    settings = json.dumps([to_dict(located), str(args.data.resolve())])
    cache = args.out / f"faces-{stable_seed(settings):08x}.jsonl"
    if world.leads:
        faces = locate_faces(items, config, cache, workers=args.workers, progress=not args.quiet)
    if world.size > 1:
        torch.distributed.barrier()
    if not world.leads:
        faces = locate_faces(items, config, cache, progress=False)
    for item in items:
        if item.name not in faces:
            report.add(item.name, "unreadable")
    return [item for item in items if item.name in faces], faces


def write_dropped(path: Path, reports: Sequence[DropReport]) -> None:
    """Every row left out, and why, as a CSV; no file when nothing was."""
    rows = [row for report in reports for row in report.dropped]
    path.unlink(missing_ok=True)
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerows([("image", "reason"), *rows])


def prepare(args: argparse.Namespace, world: World, device: torch.device) -> Run:
    """Everything before the first step: config, data, faces, towers, member."""
    config = override(preset(args.preset, args.member), args.set)
    if args.budget and world.size > 1:
        raise ConfigError("--budget is for one process; set train.max_steps instead")
    folder = args.out / config.name
    if args.restart and world.leads:
        for name in (
            "checkpoint.pt",
            "metrics.jsonl",
            "model.safetensors",
            "validation.csv",
        ):
            (folder / name).unlink(missing_ok=True)
    items, report = read_manifest(args.data, split="train")
    items, capped = select(items, config.sampling, config.train.seed)
    progress = world.leads and not args.quiet
    validation, lost = validation_pictures(args, config, report, progress=progress)
    sources = dict(text.partition("=")[::2] for text in args.tower)
    towers = tower_configs([config]).values()
    known = {t.name for t in towers} | {t.stored_name for t in towers}
    if unknown := set(sources) - known:
        raise ConfigError(
            f"--tower {', '.join(sorted(unknown))}: {config.name} has no such tower; it has {', '.join(sorted(known - {''}))}"
        )
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    member = build_member(config, make_towers(config, sources, random=args.random_towers))
    if args.start_from is not None:
        start_from(member, args.start_from)
    items, faces = with_faces(items, args, config, world, report)
    provenance = {
        "command": shlex.join(["python", "-m", "solution.train", *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "device": str(device),
        "processes": world.size,
        "pictures": len(items),
        "dropped": sum(len(r.dropped) for r in (report, capped, lost)),
    }
    if world.leads:
        write_dropped(folder / "dropped.csv", [report, capped, lost])
    if world.leads and not args.quiet:
        trainable, total = count_parameters(member)
        for text in (report.summary(), capped.summary(), lost.summary()):
            if text:
                print(text, file=sys.stderr)
        print(json.dumps(to_dict(config)), file=sys.stderr)
        print(
            f"{config.name}: {len(items)} training and {len(validation)} validation pictures, device {device}, "
            f"{trainable:,} of {total:,} parameters train",
            file=sys.stderr,
        )
        if config.needs_masks:
            print(tell_masks(items, config.sampling), file=sys.stderr)
    return Run(
        member,
        items,
        validation,
        folder,
        faces=faces,
        device=device,
        world=world,
        workers=args.workers,
        provenance=provenance,
        progress=not args.quiet,
        budget=args.budget,
    )


@door("train", interrupted="interrupted; the same command goes on from here")
def main(argv: list[str] | None = None) -> int:
    """Train one member; exit codes: 0 done, 2 usage, 3 environment or weights, 130 interrupted and resumable."""
    args = parse(argv)
    device = pick_device(args.device)
    with processes(device) as world:
        run = prepare(args, world, device)

        def stop(*_: Any) -> None:
            run.stopping = True

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            state = run.run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if run.stopping:
        print("train: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if world.leads:
        run._write_history()
        best = state["best"]
        print(f"{run.config.name}: {state['total']} steps, best mean validation AUC {best:.4f}, in {run.folder}")
        if state["unreadable"]:
            print(
                f"{run.config.name}: {state['unreadable']} samples were unreadable and left out "
                "(sampling.on_unreadable=drop)",
                file=sys.stderr,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
