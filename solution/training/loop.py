"""One member's training: optimizer steps, validations, checkpoints. It goes on where it stopped, bit for bit on CPU.

Takes a `Member`, a `TrainingSet` and a `Machine`; leaves in a folder the best weights (`config.json`, `model.safetensors`),
what they make of the validation pictures (`validation.csv`), `checkpoint.pt` and `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from solution.bundles.members import save_member
from solution.config import KINDS, ConfigError, DegradationConfig, to_dict
from solution.data.epochs import Sample, plan_epoch
from solution.data.images import stable_seed
from solution.data.manifest import Item
from solution.data.training import TrainingViews, training_loader
from solution.errors import KitError, tell
from solution.io import atomic_file, write_atomically
from solution.models.member import Member, Parts
from solution.models.optimization import Average, Phase, make_optimizer, phases, rate_factor
from solution.models.towers import load_state, tower_parameters
from solution.records import Batch, FaceBox, MemberOutput
from solution.training.checkpoint import Checkpoint, TrainingState, read_checkpoint, write_checkpoint
from solution.training.processes import Machine
from solution.training.validation import score_items, split_aucs


class TrainingError(KitError, RuntimeError):
    """Training that cannot go on; the message says what was found and what to do."""


@dataclass(frozen=True)
class TrainingSet:
    """Pictures to train on and to validate on (none: no validation); faces: those of the first, by name, where needed."""

    train: list[Item]
    validation: list[Item] = field(default_factory=list)
    faces: dict[str, FaceBox | None] = field(default_factory=dict)


class TrainingStep(nn.Module):
    """Forward and loss as one module, so that DistributedDataParallel sees every use of a parameter.

    output: the last batch's, for `after_step`; not returned, or DistributedDataParallel would expect a gradient of all that
    leads to it, also to what no loss reads.
    """

    def __init__(self, member: Member):
        super().__init__()
        self.member = member
        self.output: MemberOutput | None = None

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        self.output = self.member(batch.images)
        return self.member.training_loss(self.output, batch)


class Budget:
    """Seconds for the steps of a phase, from its first one on (of a resumed phase: from where it goes on).

    Their number is set once the warm-up is through: until then the rate does not depend on it. The first fifth of the
    warm-up, when loaders and kernels start, is not measured but spent.
    """

    def __init__(self, seconds: float, warmup_steps: int):
        self.seconds = seconds
        self.first = max(1, warmup_steps // 5)
        self.decides = max(self.first + 1, warmup_steps)
        self.began: float | None = None
        self.measured: tuple[int, float] | None = None

    def steps(self, step: int, now: float) -> tuple[int, float]:
        """The phase's number of steps and the seconds of one, told after `step` at `now` (s); (0, 0.0): not yet known."""
        self.began = now if self.began is None else self.began
        if self.measured is None:
            self.measured = (step, now) if step >= self.first else None
            return 0, 0.0
        since, then = self.measured
        if step < self.decides:
            return 0, 0.0
        pace = (now - then) / (step - since)
        return step + max(1, int((self.seconds - (now - self.began)) / pace)), pace


@dataclass
class Stage:
    """A phase under way. first_epoch: counted over all phases; per_epoch, total: optimizer steps; module: `inner`, or it in
    DistributedDataParallel; budget: None without."""

    phase: Phase
    first_epoch: int
    per_epoch: int
    total: int
    optimizer: torch.optim.Optimizer
    inner: TrainingStep
    module: nn.Module
    budget: Budget | None
    bar: tqdm


def fingerprint(member: Member) -> str:
    """SHA-256 over a few weights of every parameter of the member's tower: which one a training started from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(tower_parameters(member.tower).items()):
        few = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)]
        digest.update(name.encode() + few.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class Run:
    """One member's training: where it stands, and how it goes on. `run()` does the work, `stop()` interrupts it."""

    def __init__(
        self,
        member: Member,
        data: TrainingSet,
        folder: Path,
        *,
        machine: Machine,
        provenance: dict[str, Any] | None = None,
        budget: float = 0.0,
    ):
        """budget: seconds that the steps of all phases shall take; their number is set by the first ones' speed."""
        self.member, self.config, self.folder = member.to(machine.device), member.config, folder
        self.data, self.machine, self.budget = data, machine, budget
        self.device, self.world = machine.device, machine.world
        self.provenance = provenance or {}
        self.labels = np.array([item.label for item in data.train])
        self.sources = [item.source for item in data.train]
        self.groups = [item.group for item in data.train]
        precision = self.config.train.precision
        self.bf16 = precision == "bf16" or (precision == "auto" and self.device.type == "cuda")
        member.tower.checkpointing = self.config.train.grad_checkpointing
        self.start = fingerprint(member)
        self.asked_to_stop = False  # this process was
        self.stopping = False  # all have agreed to
        self.lost = 0  # unreadable samples since the processes last spoke
        self.state = TrainingState()
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
            groups=self.groups,
        )
        if not plan:
            raise TrainingError(
                f"{len(self.data.train)} pictures do not fill one batch of {size * self.world.size}; lower train.batch"
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
    def stop(self) -> None:
        """Stop at the next step boundary, with a checkpoint; the same training goes on from there."""
        self.asked_to_stop = True

    def run(self) -> TrainingState:
        """Train to the end, or to the step boundary at which the processes agreed on `stopping`."""
        checkpoint = self._read_checkpoint()
        first = self.state.phase
        offset = 0
        for number, phase in enumerate(phases(self.config)):
            if number >= first:
                self._run_phase(phase, offset, checkpoint if number == first else None)
                if self.stopping:
                    break
            offset += phase.epochs
        return self.state

    def _run_phase(self, phase: Phase, first_epoch: int, checkpoint: Checkpoint | None) -> None:
        stage = self._stage(phase, first_epoch, checkpoint)
        with stage.bar:
            while self.state.step < self._planned(stage) and not self.stopping:
                self._run_epoch(stage)
        if self.stopping:
            self._write_checkpoint(stage.optimizer)
        else:
            # Whoever goes on from here begins the next phase.
            self.state.begin_phase(self.state.phase + 1)
            self._write_checkpoint(None)

    def _stage(self, phase: Phase, first_epoch: int, checkpoint: Checkpoint | None) -> Stage:
        """Everything that a phase needs, as the checkpoint has it where that was written within the phase."""
        optimizer = make_optimizer(self.member, phase)
        if self.config.train.average:
            trained = [p for g in optimizer.param_groups for p in g["params"]]
            self.average = Average(trained, self.config.train.average)
        if checkpoint is not None and checkpoint.optimizer is not None:
            optimizer.load_state_dict(checkpoint.optimizer)
            if self.average is not None:
                for value, kept in zip(self.average.values, checkpoint.average, strict=True):
                    value.copy_(kept)
        inner = TrainingStep(self.member)
        module: nn.Module = inner
        if self.world.size > 1:
            spares = KINDS[self.config.kind].spares_parameters
            module = nn.parallel.DistributedDataParallel(module, find_unused_parameters=spares)
        train, per_epoch = self.config.train, self.steps_per_epoch()
        total = phase.epochs * per_epoch
        if train.max_steps:
            total = min(total, train.max_steps)
        budget = None
        if self.budget:
            budget = Budget(self.budget * phase.epochs / train.epochs, phase.optim.warmup_steps)
        bar = tqdm(
            total=total,
            initial=self.state.step,
            desc=f"{self.config.name} {phase.name}",
            unit="step",
            disable=not self.machine.tells,
        )
        return Stage(phase, first_epoch, per_epoch, total, optimizer, inner, module, budget, bar)

    def _planned(self, stage: Stage) -> int:
        """Steps of the phase: its `total`, or fewer where the budget decided so after its warm-up."""
        return min(stage.total, self.state.planned or stage.total)

    def _keep_to_budget(self, stage: Stage) -> None:
        """Set the phase's number of steps as soon as its budget knows it."""
        if stage.budget is None or self.state.planned:
            return
        self.state.planned, pace = stage.budget.steps(self.state.step, time.perf_counter())
        if self.state.planned:
            steps = stage.bar.total = self._planned(stage)
            tell(f"{self.config.name} {stage.phase.name}: {pace:.3f} s a step; {steps} steps in the budget")

    def _run_epoch(self, stage: Stage) -> None:
        epoch = stage.first_epoch + self.state.step // stage.per_epoch
        gather, train = self.gather, self.config.train
        plan = self.epoch_plan(epoch)[self.state.step % stage.per_epoch * gather :]
        views = TrainingViews(self.data.train, self.config, self.data.faces, train.seed)
        batches = training_loader(views, plan, workers=self.machine.workers)
        self.member.train()
        for start in range(0, len(plan), gather):
            began = time.perf_counter()
            for group in stage.optimizer.param_groups:
                rate = group["rate"]
                group["lr"] = rate * rate_factor(self.state.step, self._planned(stage), stage.phase.optim, rate)
            # Dropout is a function of seed, step and rank: a resumed run draws what the whole one does, on any device.
            torch.manual_seed(stable_seed(f"{train.seed} {self.state.total} {self.world.rank}"))
            line, pictures = self._optimizer_step(stage, batches, min(gather, len(plan) - start))
            self.state.step += 1
            self.state.total += 1
            self.state.pictures += pictures
            self.state.seconds += time.perf_counter() - began
            line |= {
                "step": self.state.total,
                "phase": stage.phase.name,
                "epoch": epoch,
                "lr": stage.optimizer.param_groups[-1]["lr"],
            }
            self.history.append(line)
            rate = self.state.pictures / self.state.seconds
            stage.bar.set_postfix_str(f"loss {line['loss']:.3f}, {rate:.1f} images/s")
            stage.bar.update()
            self._keep_to_budget(stage)
            self._agree_on_stopping()
            self._between_steps(stage)
            if self.stopping or self.state.step >= self._planned(stage):
                return

    def _optimizer_step(self, stage: Stage, batches: Iterator[Batch | None], micro: int) -> tuple[dict[str, Any], int]:
        """One optimizer step over `micro` micro-batches, the gradient of their mean loss; its line, and how many pictures."""
        optimizer, module = stage.optimizer, stage.module
        optimizer.zero_grad(set_to_none=True)
        # Numbers stay on the device until the step is through: each one read sooner would wait for it.
        total: torch.Tensor | float = 0.0
        each: list[Parts] = []  # by micro-batch
        pictures = 0
        for index in range(micro):
            batch = next(batches)
            if batch is None:
                raise TrainingError("every picture of a batch was unreadable; look at the manifest")
            batch = batch.to(self.device)
            synchronise = index == micro - 1 or self.world.size == 1
            with contextlib.nullcontext() if synchronise else module.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss, parts = module(batch)
                (loss / micro).backward()
            pictures += len(batch.labels) * self.world.size
            self.lost += self.config.train.batch - len(batch.labels)
            total = total + loss.detach() / micro
            each.append(parts)
        whole: Parts = {"loss": total}
        if stage.phase.optim.clip_norm:
            trained = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            whole["grad_norm"] = nn.utils.clip_grad_norm_(trained, stage.phase.optim.clip_norm)
        whole, *each = _read([whole, *each])  # the one wait of a step
        if not math.isfinite(whole["loss"]):
            raise TrainingError(f"loss is {whole['loss']} at step {self.state.total}; last batch: {batch.names[:8]}")
        optimizer.step()
        if self.average is not None:
            self.average.update(self.state.step)
        line = {"loss": whole.pop("loss")} | _means(each) | whole
        output, stage.inner.output = stage.inner.output, None  # not held through the next step
        with torch.no_grad():
            line |= self.member.after_step(output, batch)
        return line | {name: word for part in each for name, word in part.items() if isinstance(word, str)}, pictures

    def _agree_on_stopping(self) -> None:
        """One process that was told to stop stops all, at the same step; unreadable samples are counted over all."""
        said = torch.tensor([float(self.asked_to_stop), float(self.lost)])
        if self.world.size > 1:
            said = said.to(self.device)
            torch.distributed.all_reduce(said)
        self.stopping = bool(said[0] > 0)
        self.state.unreadable += int(said[1])
        self.lost = 0

    def _between_steps(self, stage: Stage) -> None:
        """Validate and save where it is due."""
        step, train, total = self.state.step, self.config.train, self._planned(stage)
        every = train.validate_every or stage.per_epoch
        if step % every == 0 or step == total:
            self.validate()
        if step % train.save_every == 0 and step < total:
            self._write_checkpoint(stage.optimizer)

    # -- validation
    def validate(self) -> None:
        """AUC on seen and unseen generators, clean and degraded; the best mean of the four keeps its weights.

        Without an `unseen` split it is the mean of the two on seen generators.
        """
        items = self.data.validation
        if not items or not self.world.leads:
            return
        averaged = self.average.in_place() if self.average else contextlib.nullcontext()
        with averaged:
            conditions = {"clean": None, "degraded": DegradationConfig(global_p=1.0)}
            logits = {
                name: score_items(self.member, items, how, machine=self.machine, bf16=self.bf16)
                for name, how in conditions.items()
            }
            line: dict[str, Any] = {"step": self.state.total, "validation": len(items)} | split_aucs(items, logits)
            self.history.append(line)
            if line["mean"] > self.state.best:
                self.state.best = line["mean"]
                self.save_best(line, logits)
        self.member.train()

    def save_best(self, line: dict[str, Any], logits: dict[str, np.ndarray]) -> None:
        """Write the member's folder: these are the weights that a bundle takes."""
        seen = {"pictures_seen": self.state.pictures, "seconds": round(self.state.seconds, 1)}
        save_member(self.member, self.folder, training=self.provenance | {"best": line} | seen)
        with atomic_file(self.folder / "validation.csv") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["image", "label", "source", "split", *logits])
            for item, *values in zip(self.data.validation, *logits.values()):
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
            "training set": digest(self.data.train),
            "validation set": digest(self.data.validation),
            "tower": self.start,
            "number of processes": str(self.world.size),
        }

    def _write_checkpoint(self, optimizer: torch.optim.Optimizer | None) -> None:
        """optimizer: None between two phases."""
        if not self.world.leads:
            return
        checkpoint = Checkpoint(
            self.setting(),
            self.state,
            weights={k: t.detach() for k, t in self.member.stored_state().items()},
            optimizer=None if optimizer is None else optimizer.state_dict(),
            average=None if self.average is None else self.average.values,
        )
        write_checkpoint(self.checkpoint_path, checkpoint)
        self.write_history()

    def _read_checkpoint(self) -> Checkpoint | None:
        checkpoint = read_checkpoint(self.checkpoint_path, self.setting())
        if checkpoint is None:
            return None
        load_state(self.member.stored_state(), checkpoint.weights, str(self.checkpoint_path))
        self.state = checkpoint.state
        path = self.folder / "metrics.jsonl"
        lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
        self.history = [line for line in lines if line["step"] <= self.state.total]
        return checkpoint

    def write_history(self) -> None:
        """Write `metrics.jsonl`: a line a step and a validation."""
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))


def _read(lines: list[Parts]) -> list[dict[str, float | str]]:
    """The same with floats for tensors, all read off the device at once."""
    places = [(k, name) for k, line in enumerate(lines) for name, v in line.items() if isinstance(v, torch.Tensor)]
    values = torch.stack([lines[k][name].detach().float().reshape(()) for k, name in places]).tolist()
    found = [dict(line) for line in lines]
    for (k, name), value in zip(places, values, strict=True):
        found[k][name] = value
    return found


def _means(lines: list[dict[str, float | str]]) -> dict[str, float]:
    """Numbers by name, each micro-batch's with its share."""
    sums: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            if not isinstance(value, str):
                sums[name] = sums.get(name, 0.0) + value / len(lines)
    return sums
