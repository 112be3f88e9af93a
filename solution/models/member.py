"""What every member is: a tower, an adapter, parts of its own, a forward and a loss.

Takes pictures (B, 3, H, W), uint8 or float in [0, 1]; returns `MemberOutput` with a logit (B,), positive = fake.
"""

from __future__ import annotations

import torch
from torch import nn

from solution.config import MemberConfig
from solution.models.adapters import adapter_state
from solution.models.blocks import Block
from solution.models.feature_losses import feature_losses
from solution.models.keys import is_norm
from solution.models.towers import Tower, tower_state
from solution.records import Batch, MemberOutput

# A loss's parts for the log: numbers, those on the device left there (reading one waits for it), or a word on what was
# skipped.
Parts = dict[str, torch.Tensor | float | str]


class Member(nn.Module):
    """The base of the five members. Towers are injected and may be shared; everything else is the member's own.

    A subclass implements `forward` and `loss`, and registers its own parts (heads, queries, buffers) as ordinary
    submodules: their names are the stable keys of its file.
    """

    def __init__(self, config: MemberConfig, tower: Tower):
        super().__init__()
        self.config = config
        self.tower = tower

    @property
    def adapter(self) -> str | None:
        """The name of this member's adapter on its tower; None when the tower is frozen or trained whole."""
        return self.config.name if self.config.adapter.kind in ("lora", "effort") else None

    @property
    def depth(self) -> int:
        """How many of the tower's blocks the member reads; 0: all."""
        return 0

    @property
    def last_block(self) -> Block:
        """The last block of the tower that the member reads."""
        *_, block = self.tower.blocks(self.depth)
        return block

    def forward(self, images: torch.Tensor) -> MemberOutput:
        """Score pictures (B, 3, H, W) of this member's view."""
        raise NotImplementedError

    def loss(self, output: MemberOutput, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """The scalar training loss, and its parts for the log."""
        raise NotImplementedError

    def training_loss(self, output: MemberOutput, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """`loss`, and the losses on features that the configuration asks for, with their parts for the log."""
        loss, parts = self.loss(output, batch)
        extra, more = feature_losses(self.config.features, output.features, batch.labels)
        return loss if extra is None else loss + extra, parts | more

    def judge(self, images: torch.Tensor) -> torch.Tensor:
        """The logit (B,) of pictures (B, 3, S, S), S the side of `config.seen`: of one look, or the mean of several.

        Several sides and mirrored views are those of `config.inference`; each costs a forward.
        """
        options = self.config.inference
        if options.looks == 1:
            return self(images).logit
        images, logits = self.tower.unit(images), []
        for side in options.sides or (images.shape[-1],):
            seen = self.tower.at_side(images, side)
            logits += [self(view).logit for view in ((seen, seen.flip(-1)) if options.mirrored else (seen,))]
        return torch.stack(logits).mean(dim=0)

    def after_step(self, output: MemberOutput, batch: Batch) -> dict[str, float]:
        """Called after every optimizer step's last forward, without gradients; numbers for the log (none here)."""
        return {}

    # -- what is trained, and what is stored
    def head_parameters(self) -> list[nn.Parameter]:
        """The member's own trainable parameters, towers and adapters aside."""
        return [p for p in self.own_parameters().values() if p.requires_grad]

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters outside the towers, by name."""
        return {n: p for n, p in self.named_parameters() if not n.startswith(self._in_towers())}

    def _in_towers(self) -> tuple[str, ...]:
        """What the names of everything in a tower begin with, under whatever name the member has it."""
        found = self.named_modules(remove_duplicate=False)
        return tuple(f"{name}." for name, module in found if isinstance(module, Tower))

    def trained_tower_keys(self) -> list[str]:
        """Stable keys of the tower that this member changes in place and therefore stores: all, its LayerNorms, or none."""
        keys = list(tower_state(self.tower))
        if self.config.adapter.kind == "norm" and not self.config.stores_tower:
            return [key for key in keys if is_norm(key)]
        return keys if self.config.stores_tower else []

    def stored_state(self) -> dict[str, torch.Tensor]:
        """Everything this member's file holds, under stable keys, sharing storage with the live parameters.

        `own.*`: heads, queries, buffers; `adapter.*`: LoRA or Effort; `tower.*`: what it trained of the tower itself.
        """
        own, towers = self.state_dict(keep_vars=True), self._in_towers()
        state = {f"own.{n}": t for n, t in own.items() if not n.startswith(towers)}
        if self.adapter is not None:
            state |= {f"adapter.{n}": t for n, t in adapter_state(self.tower, self.adapter).items()}
        keys = self.trained_tower_keys()
        if keys:
            tower = tower_state(self.tower)
            state |= {f"tower.{n}": tower[n] for n in keys}
        return state
