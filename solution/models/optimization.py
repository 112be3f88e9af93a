"""How a member's parameters move: phases, learning rates over the steps, Adam's groups, a moving average.

Takes a `Member` and its config; returns optimizers and numbers. Nothing here reads data or writes files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from solution.config import ConfigError, MemberConfig, OptimConfig
from solution.models.adapters import adapter_state
from solution.models.keys import is_norm
from solution.models.member import Member
from solution.models.towers import Tower, tower_parameters


# ------------------------------------------------------------------------------------------------ schedule
@dataclass(frozen=True)
class Phase:
    """A stretch of training with one optimizer: which parameters, for how many epochs, at which rate."""

    name: str  # `head`: the member's own parts alone; `all`: whatever the member trains
    epochs: int
    optim: OptimConfig


def phases(config: MemberConfig) -> list[Phase]:
    """The phases of a member's training: fusion trains its head first, the others have one phase."""
    train, optim = config.train, config.optim
    if not train.head_epochs:
        return [Phase("all", train.epochs, optim)]
    if train.head_epochs >= train.epochs:
        raise ConfigError(f"train.head_epochs {train.head_epochs} must be below train.epochs {train.epochs}")
    head = replace(
        optim,
        lr=train.head_lr,
        head_lr=train.head_lr,
        warmup_steps=train.head_warmup_steps,
    )
    return [
        Phase("head", train.head_epochs, head),
        Phase("all", train.epochs - train.head_epochs, optim),
    ]


def rate_factor(step: int, total: int, optim: OptimConfig, rate: float) -> float:
    """The learning rate at optimizer step `step` (from 0) of `total`, as a multiple of `rate`.

    Linear from `warmup_start` over `warmup_steps`, then cosine to `final_lr` (or constant).
    """
    if step < optim.warmup_steps:
        return optim.warmup_start + (1 - optim.warmup_start) * step / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    floor = min(1.0, optim.final_lr / rate)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(member: Member, phase: Phase) -> list[dict[str, Any]]:
    """Adam's groups with their base rates; sets `requires_grad` for the phase.

    The head has `head_lr` where that is set; a tower trained whole has rates falling by `layer_decay` towards its input.
    """
    optim = phase.optim
    adapted = adapted_parameters(member)
    for parameter in adapted:
        parameter.requires_grad_(phase.name == "all")
    rates = [(p, optim.head_lr or optim.lr) for p in member.head_parameters()]
    if phase.name == "all":
        depths = depth_of(member.tower)
        rates += [(p, optim.lr * optim.layer_decay ** depths.get(id(p), 0)) for p in adapted]
    # Few groups: an optimizer takes the parameters of one together.
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, rate in rates:
        # Decoupled decay leaves one-dimensional parameters alone (norms, biases); Adam's L2 term covers all, as published.
        spared = optim.decoupled and parameter.ndim < 2
        decay = 0.0 if spared else optim.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "rate": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def adapted_parameters(member: Member) -> list[nn.Parameter]:
    """What the member trains of its tower: its adapter, or the tower's own weights that its file stores."""
    start = (".effort_u0", ".effort_s0", ".effort_v0")  # stored, but not trained
    state = {} if member.adapter is None else adapter_state(member.tower, member.adapter)
    adapter = [p for key, p in state.items() if not key.endswith(start)]
    keys = member.trained_tower_keys()
    if member.config.adapter.kind == "norm":
        keys = [key for key in keys if is_norm(key)]
    tower = tower_parameters(member.tower) if keys else {}
    return adapter + [tower[key] for key in keys]


def depth_of(tower: Tower) -> dict[int, int]:
    """Parameter id -> number of blocks between it and the output (0: the last block and the final norm)."""
    count = len(tower.layers)
    depths = {id(p): count for p in tower.model.parameters()}  # embeddings: deepest
    for index, layer in enumerate(tower.layers):
        depths |= {id(p): count - 1 - index for p in layer.parameters()}
    last = [tower.last_norm, getattr(tower.model, "attn_pool", None)]
    return depths | {id(p): 0 for module in last if module is not None for p in module.parameters()}


def make_optimizer(member: Member, phase: Phase) -> torch.optim.Optimizer:
    """Adam or AdamW over the phase's groups; each group keeps its base rate as `rate`."""
    kind = torch.optim.AdamW if phase.optim.decoupled else torch.optim.Adam
    groups = parameter_groups(member, phase)
    on_gpu = any(p.is_cuda for group in groups for p in group["params"])
    return kind(groups, fused=True if on_gpu else None)


class Average:
    """A moving average of the trained parameters over the steps, which is validated and saved in their place.

    The decay rises to `decay` with the steps, (1 + n) / (10 + n), so that the start is forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the parameters after `steps` steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average, and what they held before again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(self.values, self.parameters):
            kept = value.clone()
            value.copy_(parameter)
            parameter.copy_(kept)
