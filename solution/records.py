"""The typed records that rooms exchange: `FaceBox`, `Batch`, `MemberOutput`.

A record carries tensors and nothing else: no behaviour, no file, no device logic beyond `Batch.to`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

# Faces are located, and files written, by processes that need no torch.
if TYPE_CHECKING:
    import torch


class FaceBox(NamedTuple):
    """A located face: half-open pixel box `[x0, x1) x [y0, y1)` in the decoded picture, and its detector score.

    Coordinates may lie outside the picture (a face cut by the border). `landmarks` is None or five (x, y) pairs:
    right eye, left eye, nose tip, right and left mouth corner (the subject's own right and left).
    """

    x0: float
    y0: float
    x1: float
    y1: float
    score: float
    landmarks: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class Batch:
    """What one training step sees.

    images: (B, 3, H, W) uint8, the member's view after degradation.
    labels: (B,) int64, 0 real and 1 fake.
    masks: (B, H, W) float32 in [0, 1], 1 where forged; None when the member asks for none.
    mask_known: (B,) bool, False where the picture is fake and nobody knows what was forged; None without masks.
    names: B identifiers for messages and logs.
    """

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor | None = None
    mask_known: torch.Tensor | None = None
    names: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            images=moved(self.images),
            labels=moved(self.labels),
            masks=moved(self.masks),
            mask_known=moved(self.mask_known),
        )


@dataclass(frozen=True)
class MemberOutput:
    """What a member says of a batch.

    logit: (B,) float, positive = fake; p_fake before calibration is sigmoid(logit).
    features: (B, F) float, the pooled features the head classified (feature stability, complementarity).
    evidence: named maps for explanation, each (B, ..., h, w) on the patch grid, e.g. `query_attention` (B, Q, h, w)
        or `localization` (B, 1, h, w); empty where the member has none.

    A member that trains with more than its logit subclasses this record and adds typed fields for its loss.
    """

    logit: torch.Tensor
    features: torch.Tensor
    evidence: dict[str, torch.Tensor] = field(default_factory=dict)
