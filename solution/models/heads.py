"""Members with other heads on a tower: `layers` reads the last blocks with a head each, `topk` the most suspicious patches.

Takes the member's view (B, 3, H, W); returns `MemberOutput` with a logit (B,), positive = fake.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from solution.config import MemberConfig
from solution.models.member import Member, Parts
from solution.models.streams import as_two_class, focal_loss, two_class_logit
from solution.models.towers import Tower
from solution.records import Batch, MemberOutput


@dataclass(frozen=True, kw_only=True)
class LayersOutput(MemberOutput):
    """logits: (B, blocks, 2), real and fake by each block's head, the last block's last."""

    logits: torch.Tensor


class Layers(Member):
    """`layers`: of each of the last blocks class token, registers and mean patch token, through the tower's last norm
    and a head of its own; the last block's head scores (first place of NTIRE 2026, github.com/qcf-568/DINOMAC).
    """

    def __init__(self, config: MemberConfig, tower: Tower):
        super().__init__(config, tower)
        options = config.layers
        count = tower.config.arch.layers
        self.numbers = tuple(range(count - options.last + 1, count + 1))
        width = (tower.prefix + 1) * tower.width
        self.heads = nn.ModuleList(self._head(width) for _ in self.numbers)

    def _head(self, width: int) -> nn.Sequential:
        """(B, width) -> (B, 2); no activation between its layers, as published."""
        options = self.config.layers
        if not options.hidden:
            return nn.Sequential(nn.Linear(width, 2))
        return nn.Sequential(
            nn.Linear(width, options.hidden), nn.Dropout(options.dropout), nn.Linear(options.hidden, 2)
        )

    def forward(self, images: torch.Tensor) -> LayersOutput:
        """Score pictures (B, 3, H, W)."""
        hidden = self.tower(images, adapter=self.adapter, keep=self.numbers).hidden
        features = [self._gather(hidden[number]) for number in self.numbers]
        logits = torch.stack([head(x) for head, x in zip(self.heads, features, strict=True)], dim=1)
        return LayersOutput(two_class_logit(logits[:, -1]), features[-1], logits=logits)

    def _gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of a block (B, P + N, D) -> (B, (1 + P) D): the patches' mean, then what stands before them."""
        tokens = self.tower.last_norm(tokens)
        prefix, patches = tokens[:, : self.tower.prefix], tokens[:, self.tower.prefix :]
        return torch.cat([patches.mean(dim=1, keepdim=True), prefix], dim=1).flatten(1)

    def loss(self, output: LayersOutput, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """Cross-entropy of the last block's head, plus `layers.deep` times the sum of the others'."""
        *others, last = (F.cross_entropy(z.float(), batch.labels) for z in output.logits.unbind(dim=1))
        deep = sum(others, torch.zeros_like(last))
        return last + self.config.layers.deep * deep, {"ce": last.detach(), "deep": deep.detach()}


class Topk(Member):
    """`topk`: a linear logit for every patch after the tower's last norm; the picture's is the mean of its highest
    ones, so that a forgery of a few patches is not averaged away (multiple-instance learning).
    """

    def __init__(self, config: MemberConfig, tower: Tower):
        super().__init__(config, tower)
        self.head = nn.Linear(tower.width, 1)

    def forward(self, images: torch.Tensor) -> MemberOutput:
        """Score pictures (B, 3, H, W); evidence: `patch_logits` (B, 1, h, w)."""
        tokens = self.tower(images, adapter=self.adapter)
        logits = self.head(tokens.patch_tokens)[..., 0].float()  # (B, N)
        count = max(1, round(self.config.topk.share * logits.shape[1]))
        highest, places = logits.topk(count, dim=1)
        chosen = tokens.patch_tokens.gather(1, places[..., None].expand(-1, -1, tokens.patch_tokens.shape[-1]))
        evidence = {"patch_logits": logits.unflatten(1, tokens.grid)[:, None]}
        return MemberOutput(highest.mean(dim=1), chosen.mean(dim=1), evidence)

    def loss(self, output: MemberOutput, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """The streams' focal loss of the picture's logit."""
        options = self.config.stream
        logits = as_two_class(output.logit)
        loss = focal_loss(logits, batch.labels, gamma=options.focal_gamma, alpha=options.focal_alpha)
        return loss, {"focal": loss.detach()}
