"""Where a training stands, kept in one file (`checkpoint.pt`) that a later process goes on from.

Takes and gives a `Checkpoint`: plain values and tensors, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from solution.config import ConfigError
from solution.errors import WeightsError


@dataclass
class TrainingState:
    """How far a training is.

    phase: the one under way. step: optimizer steps done of it. planned: steps of it that a budget allows; 0 while that is
    not decided, or without a budget. total, pictures, seconds, unreadable: steps, pictures, time of the steps, and samples
    left out, over all phases and processes. best: the highest mean validation AUC so far.
    """

    phase: int = 0
    step: int = 0
    planned: int = 0
    total: int = 0
    pictures: int = 0
    seconds: float = 0.0
    unreadable: int = 0
    best: float = -1.0

    def begin_phase(self, number: int) -> None:
        """Stand before the first step of a phase."""
        self.phase, self.step, self.planned = number, 0, 0


@dataclass
class Checkpoint:
    """What a training goes on from.

    setting: what has to be the same for that, by name. weights: the member's stored state. optimizer: its state, None
    between two phases. average: the moving averages of the trained parameters, None without.
    """

    setting: dict[str, str]
    state: TrainingState
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any] | None
    average: list[torch.Tensor] | None


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `path` whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)} | {"state": asdict(checkpoint.state)}
    part = path.with_suffix(".part")
    torch.save(content, part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def read_checkpoint(path: Path, setting: dict[str, str]) -> Checkpoint | None:
    """The checkpoint at `path`, on CPU; None where there is none.

    Raises:
        WeightsError: it cannot be read.
        ConfigError: it was written under another `setting`.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = Checkpoint(**content)
        checkpoint.state = TrainingState(**content["state"])
    except Exception as error:
        raise WeightsError(f"{path}: unreadable ({error}); delete it or pass --restart") from error
    if other := [name for name in setting if checkpoint.setting.get(name) != setting[name]]:
        raise ConfigError(
            f"{path} was written under another {', '.join(other)}; go on with what it was written under, or pass "
            "--restart or another --out"
        )
    return checkpoint
