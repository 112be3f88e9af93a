"""Losses on pooled features at length one, options of any member (`FeatureLossConfig`).

Takes features (B, F) and labels (B,); returns scalars. Sources: Wang and Isola, ICML 2020 (alignment, uniformity); Khosla et
al., NeurIPS 2020 (supervised contrastive).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from solution.config import FeatureLossConfig

# Wang and Isola's t; and the least mean potential, so that far-off features give no infinite loss (GenD).
POTENTIAL, LEAST = 2.0, 1e-6


def uniformity(unit: torch.Tensor) -> torch.Tensor:
    """log of the mean of exp(-2 |x - y|^2) over pairs of unit features (B, F); 0 for a single picture."""
    if len(unit) < 2:
        return unit.sum() * 0
    return torch.pdist(unit).square().mul(-POTENTIAL).exp().mean().clamp_min(LEAST).log()


def alignment(unit: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of |x - y|^2 over pairs of one class; 0 without a pair. unit: (B, F). labels: (B,)."""
    one, two = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    same = labels[one] == labels[two]
    if not bool(same.any()):
        return unit.sum() * 0
    return (unit[one[same]] - unit[two[same]]).square().sum(dim=1).mean()


def supervised_contrast(unit: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Khosla et al., eq. 2: mean over the pictures that have another of their class of the mean over these of
    -log(exp(z_i z_p / t) / sum over all others of exp(z_i z_a / t)). unit: (B, F). labels: (B,). 0 without a pair.
    """
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    likeness = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    log_share = likeness.log_softmax(dim=1).masked_fill(itself, 0.0)
    positive = (labels[:, None] == labels[None]) & ~itself
    count = positive.sum(dim=1)
    if not bool((count > 0).any()):
        return unit.sum() * 0
    each = -(log_share * positive).sum(dim=1) / count.clamp_min(1)
    return each[count > 0].mean()


def feature_losses(
    config: FeatureLossConfig, features: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Their weighted sum and each unweighted, of those with a weight; None and nothing where none has one."""
    chosen = {name: getattr(config, name) for name in ("uniformity", "alignment", "contrast") if getattr(config, name)}
    if not chosen:
        return None, {}
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=1)
        computed = {
            "uniformity": lambda: uniformity(unit),
            "alignment": lambda: alignment(unit, labels),
            "contrast": lambda: supervised_contrast(unit, labels, config.temperature),
        }
        values = {name: computed[name]() for name in chosen}
    return sum(weight * values[name] for name, weight in chosen.items()), {n: v.detach() for n, v in values.items()}
