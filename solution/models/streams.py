"""The global, face and CLIP-fusion members with their loss (NTIRE 2026 fourth place, arXiv 2604.25889).

Takes the member's view (B, 3, H, W); returns `MemberOutput`. Global and face are one architecture on two views.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from solution.config import ClipArch, MemberConfig
from solution.models.member import Member, Parts
from solution.models.towers import Tower
from solution.records import Batch, MemberOutput


def focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 2.0,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Mean over the batch of -alpha (1 - p_t)^gamma log p_t (Lin et al. 2017, eq. 5); gamma 0 is cross-entropy.

    logits: (B, 2) for real, fake. labels: (B,) int64.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_pt = log_p.gather(1, labels[:, None]).squeeze(1)  # (B,)
    return (-alpha * (1 - log_pt.exp()) ** gamma * log_pt).mean()


def two_class_logit(logits: torch.Tensor) -> torch.Tensor:
    """(B, 2) -> (B,): sigmoid of the result is softmax(logits)[:, 1]."""
    return (logits[:, 1] - logits[:, 0]).float()


def as_two_class(logit: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 2) logits with the same probabilities; the inverse of `two_class_logit` up to a constant."""
    return torch.stack([torch.zeros_like(logit), logit], dim=1)


class Stream(Member):
    """`global` and `face`: DINOv2 with LoRA, pooled CLS after the final LayerNorm, Linear D -> 2.

    With `stream.spread` the head reads each feature's standard deviation over the patches too, 2 D in all; with
    `stream.normalize` it reads what it reads at length one.
    """

    def __init__(self, config: MemberConfig, tower: Tower):
        super().__init__(config, tower)
        self.head = nn.Linear(self.pooled_width, 2)

    @property
    def pooled_width(self) -> int:
        """Of what `pool` reads off the member's own tower."""
        return self.tower.width * (2 if self.config.stream.spread else 1)

    def pool(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) to what the head reads of the member's own tower, (B, D) or (B, 2 D)."""
        spread = self.config.stream.spread
        tokens = self.tower(images, adapter=self.adapter, patches=spread)
        if not spread:
            return tokens.cls_token
        deviation = tokens.patch_tokens.float().std(dim=1, correction=0)
        return torch.cat([tokens.cls_token, deviation.to(tokens.cls_token.dtype)], dim=1)

    def forward(self, images: torch.Tensor) -> MemberOutput:
        pooled = self.pool(images)
        if self.config.stream.normalize:
            pooled = F.normalize(pooled, dim=1)
        return MemberOutput(two_class_logit(self.head(pooled)), pooled)

    def loss(self, output: MemberOutput, batch: Batch) -> tuple[torch.Tensor, Parts]:
        loss = focal_loss(
            as_two_class(output.logit),
            batch.labels,
            gamma=self.config.stream.focal_gamma,
            alpha=self.config.stream.focal_alpha,
        )
        return loss, {"focal": loss.detach()}


class Fusion(Stream):
    """`fusion`: what the stream pools joined to a frozen CLIP's pooled CLS, then a two-layer head.

    A CLIP sees the member's view at the one side that it takes.
    """

    def __init__(self, config: MemberConfig, tower: Tower, clip: Tower):
        super().__init__(config, tower)
        self.clip = clip.requires_grad_(False)
        self.head = nn.Sequential(
            nn.Linear(self.pooled_width + clip.width, config.stream.fusion_hidden),
            nn.GELU(),
            nn.Dropout(config.stream.fusion_dropout),
            nn.Linear(config.stream.fusion_hidden, 2),
        )

    def train(self, mode: bool = True) -> Fusion:
        super().train(mode)
        self.clip.eval()  # frozen
        return self

    def for_clip(self, images: torch.Tensor) -> torch.Tensor:
        """The view (B, 3, S, S) at the side of a CLIP; as it is for a tower that takes any side."""
        arch = self.clip.config.arch
        return self.clip.at_side(images, arch.image_side) if isinstance(arch, ClipArch) else images

    def forward(self, images: torch.Tensor) -> MemberOutput:
        texture = self.pool(images)  # (B, D)
        with torch.no_grad():
            # (B, D_clip), post-LayerNorm, before the projection
            semantics = self.clip(self.for_clip(images), patches=False).cls_token
        pooled = torch.cat([texture, semantics.to(texture.dtype)], dim=1)  # (B, D + D_clip)
        return MemberOutput(two_class_logit(self.head(pooled)), pooled)
