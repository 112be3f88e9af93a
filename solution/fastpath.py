"""Members made fast for scoring: adapters merged into their towers, the towers' blocks in half precision.

Takes loaded members in float32 and changes them in place; they take and return what they did before. What is measured
here was measured on an AMD EPYC (Zen 5) core, compact towers at 168 px.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from solution.backbones import EffortLinear, Tower
from solution.member import Member

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Merging saves 13 to 15 % of a forward at the compact size and 2 to 5 % at the giant size (batches of 1 to 16). A tower
# that several adapters share keeps a merged copy of its four projections for each: 14 MB for compact, 755 MB for giant.
# So giant adapters stay unmerged on CPU, where memory is short, and are merged on a GPU.
MERGED_BYTES = {"cpu": 1 << 28, "cuda": 8 << 30}


def pick_device(name: str) -> torch.device:
    """`auto`: a GPU when there is one, else the CPU; otherwise the device of that name.

    Ranks that torchrun starts on one machine take one GPU each.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count() > 1:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        name = f"cuda:{local % torch.cuda.device_count()}"
    return torch.device(name)


def pick_precision(device: torch.device) -> str:
    """The fastest precision of PRECISIONS that `device` computes matrix products in.

    GPU: float16, which costs what bfloat16 costs and keeps three more bits: logits of DINOv2-S depart from float32 by
    0.00075 (rms) instead of 0.0089. DINOv2 and CLIP were pre-trained in it; a logit that overflows is computed again in
    float32. CPU: bfloat16 where the processor has instructions for it (3.2 times as fast as float32), else float32.
    Not int8: dynamic quantisation of the blocks was 1.07 times (per channel) to 1.26 times (per tensor) as fast as
    bfloat16, but changed 27 to 31 % of the levels (bfloat16: 3 %) and lost 0.0009 to 0.0023 AUC.
    """
    if device.type == "cuda":
        return "float16"
    able = torch.cpu.get_capabilities()
    has = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if has else "float32"


def set_threads() -> None:
    """Share the cores between the ranks on this machine, unless OMP_NUM_THREADS was set by hand.

    torchrun sets OMP_NUM_THREADS=1 itself when it starts several ranks, which leaves cores idle.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, cores() // local))


def cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def towers_of(members: Iterable[Member]) -> list[Tower]:
    """Every tower of these members, once."""
    found: dict[int, Tower] = {}
    for member in members:
        for part in member.children():
            if isinstance(part, Tower):
                found[id(part)] = part
    return list(found.values())


# ------------------------------------------------------------------------------------------------ merging
class MergedLinear(nn.Module):
    """A projection of a shared tower with every adapter already added to it: one weight each, chosen by `Tower.use`.

    It answers to `Tower.use` as a LoRA layer does (`lora_A` names its adapters).
    """

    def __init__(self, base: nn.Linear, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.ParameterDict(
            {n: nn.Parameter(w, requires_grad=False) for n, w in weights.items()}
        )
        self.active: str | None = None

    def enable_adapters(self, enabled: bool) -> None:
        """Without: the plain projection."""
        if not enabled:
            self.active = None

    def set_adapter(self, name: str) -> None:
        """Use the weight of this adapter."""
        self.active = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        weight = self.base.weight if self.active is None else self.lora_A[self.active]
        return F.linear(x, weight, self.base.bias)


def merge_adapters(members: Mapping[str, Member], dtype: torch.dtype) -> bool:
    """Merge the members' adapters into their towers' projections; False where that takes too much memory.

    An adapter that is alone on its tower is added to the weights themselves. Effort is always merged: computed apart,
    its trained part and its start cancel, and half precision has not the digits for that.
    dtype: what the merged copies will be held in.
    """
    complete = True
    for tower in towers_of(members.values()):
        users = [m for m in members.values() if m.tower is tower]
        plain = any(m.adapter is None for m in users) or len(users) < _uses(
            tower, members
        )
        names = [m.adapter for m in users if m.adapter is not None]
        if not names:
            continue
        projections = [
            (path, tower.get_submodule(path))
            for path in tower.projection_names().values()
        ]
        projections = [(p, m) for p, m in projections if _adapters(m)]
        copies = 0 if len(names) == 1 and not plain else len(names)
        if _base(projections[0][1]).weight.dtype != torch.float32:
            complete = False  # read in half precision: no digits to add to
            continue
        extra = copies * sum(_base(m).weight.numel() for _, m in projections)
        effort = any(isinstance(m, EffortLinear) for _, m in projections)
        limit = MERGED_BYTES[tower.mean.device.type]
        if extra * dtype.itemsize > limit and not effort:
            complete = False
            continue
        for path, module in projections:
            parent, _, child = path.rpartition(".")
            merged = _merged(module, names, keep_plain=bool(copies))
            setattr(tower.get_submodule(parent), child, merged)
        tower._active = "?"  # the next `use` goes through the new modules
    return complete


def _uses(tower: Tower, members: Mapping[str, Member]) -> int:
    """How many members hold the tower in any part (fusion holds a second one)."""
    return sum(any(p is tower for p in m.children()) for m in members.values())


def _adapters(module: nn.Module) -> list[str]:
    if isinstance(module, EffortLinear):
        return list(module.factors)
    return list(getattr(module, "lora_A", ()))


def _base(module: nn.Module) -> nn.Linear:
    return module.base if isinstance(module, EffortLinear) else module.base_layer


@torch.no_grad()
def _merged(module: nn.Module, names: list[str], *, keep_plain: bool) -> nn.Module:
    base = _base(module)
    weights = {
        name: base.weight + _delta(module, name)
        for name in names
        if name in _adapters(module)
    }
    if keep_plain:
        return MergedLinear(base, weights)
    (base.weight.data,) = weights.values()
    return base


def _delta(module: nn.Module, name: str) -> torch.Tensor:
    """What adapter `name` adds to the projection's weight, (out, in)."""
    if not isinstance(module, EffortLinear):
        return module.get_delta_weight(name)
    f = module.factors[name]
    return (f["u"] * f["s"]) @ f["v"] - (f["u0"] * f["s0"]) @ f["v0"]


# ------------------------------------------------------------------------------------------------ half precision
def narrow(members: Iterable[Member], dtype: torch.dtype) -> None:
    """Hold the matrices of the towers' image blocks in `dtype` and compute their products in it, all else in float32.

    The residual stream, LayerNorms, heads and everything a member adds stay float32: with the residual stream in bf16
    too, 1.9 % instead of 1.0 % of the levels of a linear probe changed, at the same speed. Casting weights once instead
    of autocast's at every call makes the forward 1.17 times as fast. LayerNorms hand over `dtype`, so that an input is
    cast once for its three projections.
    """

    def hand_over(module: nn.Module, given: tuple, output: torch.Tensor):
        return output.to(dtype)

    def take_in(module: nn.Module, given: tuple):
        return tuple(x.to(dtype) for x in given)

    def widen(module: nn.Module, given: tuple, output: torch.Tensor):
        return output.float()

    for tower in towers_of(members):
        for block in tower.blocks():
            block.norm1.register_forward_hook(hand_over)
            block.norm2.register_forward_hook(hand_over)
        for module in tower.matrices():
            module.to(dtype)
            if isinstance(module, nn.Conv2d):  # the patch projection
                module.register_forward_pre_hook(take_in)
                module.register_forward_hook(widen)
