"""Adapters on towers: LoRA through peft, Effort, and norms alone; what they train, and their weights under stable keys.

Takes a `Tower` and an `AdapterConfig`, changes its projections in place; a tower can hold several adapters by name.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from solution.config import AdapterConfig
from solution.models.blocks import ROLES, Block, EffortLinear, is_lora
from solution.models.keys import is_norm
from solution.models.towers import Tower, tower_parameters


def add_adapter(tower: Tower, name: str, config: AdapterConfig, *, decompose: bool = True) -> None:
    """Give `tower` the adapter `name`; what trains afterwards is that alone (`full`: the tower, `norm`: its LayerNorms).

    decompose: False skips Effort's decomposition when its factors are about to be loaded from a file.
    """
    if not any(is_lora(m) or isinstance(m, EffortLinear) for m in tower.modules()):
        tower.requires_grad_(False)
        # All that its file holds (DINOv2's mask token is unused), or the image part's LayerNorms.
        for key, parameter in tower_parameters(tower).items():
            if config.kind == "full" or (config.kind == "norm" and is_norm(key)):
                parameter.requires_grad_(True)
    if config.kind in ("none", "norm", "full"):
        return
    chosen = {key: path for key, path in tower.projection_names().items() if key[1] in config.projections}
    if config.kind == "lora":
        _add_lora(tower, name, config, sorted(chosen.values()))
    else:
        for path in chosen.values():
            module = tower.get_submodule(path)
            if not isinstance(module, EffortLinear):
                parent, _, child = path.rpartition(".")
                module = EffortLinear(module)
                setattr(tower.get_submodule(parent), child, module)
            module.add(name, config.rank, decompose=decompose)
    tower._active = "?"  # peft switched something on; make the next `use` go through
    tower.use(name)


def _add_lora(tower: Tower, name: str, config: AdapterConfig, paths: list[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    frozen = {p for p in tower.parameters() if not p.requires_grad}
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias="none",
        target_modules=paths,
    )
    with warnings.catch_warnings():  # several adapters on one tower is what is wanted here
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(lora, tower, adapter_name=name)
    if config.shared:
        for block in tower.blocks():
            for role in ("k", "v"):
                getattr(block, role).lora_A[name] = block.q.lora_A[name]
    for parameter in frozen:  # peft touches requires_grad of other adapters; they stay as they were
        parameter.requires_grad_(False)


def _shares(block: Block, module: nn.Module, name: str) -> bool:
    """Whether a projection's LoRA has q's down projection."""
    return is_lora(block.q) and name in block.q.lora_A and module.lora_A[name] is block.q.lora_A[name]


def adapter_state(tower: Tower, name: str) -> dict[str, torch.Tensor]:
    """The parameters of adapter `name` under stable keys: `blocks.3.attn.q.lora_A`, `blocks.3.attn.q.effort_u0`."""
    state: dict[str, torch.Tensor] = {}
    for index, block in enumerate(tower.blocks()):
        for role in ROLES:
            module, stem = getattr(block, role), f"blocks.{index}.attn.{role}"
            if isinstance(module, EffortLinear) and name in module.factors:
                state |= {f"{stem}.effort_{key}": value for key, value in module.factors[name].items()}
            elif is_lora(module) and name in module.lora_A:
                if not (role in "kv" and _shares(block, module, name)):
                    state[f"{stem}.lora_A"] = module.lora_A[name].weight
                state[f"{stem}.lora_B"] = module.lora_B[name].weight
    return state
