"""What a member looks at: Score-CAM, attention and its own maps, and how well such a map holds up.

Takes a member's views, uint8 (B, 3, S, S); gives maps (B, h, w) on the patch grid, float32 and not negative. The
geometry at the end carries maps and face boxes between a view's grid and the picture's pixels.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from solution.config import SCORE_CAM_CHANNELS, ViewConfig
from solution.models.calibration import Calibrator
from solution.models.member import Member
from solution.models.towers import patch_attention

STEPS = 10  # of deletion and insertion: a tenth of the patches each


# ------------------------------------------------------------------------------------------------ one look
class Sight(NamedTuple):
    """One forward pass with what explains it.

    logit: (B,) and features: (B, F), as `MemberOutput`'s, float32. evidence: the member's own maps by name, (B, h, w).
    last_input: (B, P + N, D), what the last block of the member's tower received. grid: (h, w).
    """

    logit: torch.Tensor
    features: torch.Tensor
    evidence: dict[str, torch.Tensor]
    last_input: torch.Tensor
    grid: tuple[int, int]


def look(member: Member, images: torch.Tensor) -> Sight:
    """Score views (B, 3, S, S), uint8 or float in [0, 1], and keep what the last block that it reads received.

    Maps of several queries are averaged over them.
    """
    caught: list[torch.Tensor] = []
    handle = member.last_block.norm1.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
    try:
        output = _forward(member, images)
    finally:
        handle.remove()
    # vlaforge's copies of the class token pass the block a second time; the plain pass came first.
    last_input = caught[0]
    side = round((last_input.shape[1] - member.tower.prefix) ** 0.5)  # views are square
    evidence = {name: m.float().mean(dim=1) for name, m in output.evidence.items()}
    return Sight(
        output.logit.float(),
        output.features.float(),
        evidence,
        last_input,
        (side, side),
    )


def _forward(member: Member, images: torch.Tensor):
    # Not member(images): a compiled member would neither run the hook nor take these batches.
    return member.forward(images)


def attention_map(member: Member, sight: Sight) -> torch.Tensor:
    """The last block's CLS -> patch attention, mean over the heads, renormalised over the patches: (B, h, w), sum 1.

    vlaforge's tower is a frozen CLIP: its attention is CLIP's, whatever the member learned.
    """
    heads = member.tower.cls_attention(sight.last_input, adapter=member.adapter, depth=member.depth)
    return patch_attention(heads, member.tower.prefix).unflatten(-1, sight.grid)


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats of distributions (..., N): 0 for one-hot, ln N for uniform."""
    return torch.special.entr(p).sum(dim=-1)


def channel_maps(member: Member, sight: Sight) -> torch.Tensor:
    """Score-CAM's activation maps: the patch tokens of the last block's first LayerNorm, (B, D, h, w) float32."""
    tokens = member.last_block.norm1(sight.last_input)[:, member.tower.prefix :].float()  # (B, N, D)
    return tokens.transpose(1, 2).unflatten(-1, sight.grid)


class Probe(NamedTuple):
    """What a member's maps cost: channels of a Score-CAM, maps of its own, and seconds a forward pass in a batch."""

    width: int
    evidence: int
    seconds: float


def probe(member: Member, batch: int) -> Probe:
    """Measured on `batch` grey views, after one batch to warm up."""
    device, side = member.tower.mean.device, member.config.seen.side
    views = torch.full((batch, 3, side, side), 128, dtype=torch.uint8, device=device)
    sight = look(member, views)
    sight.logit.cpu()  # waits for a GPU
    begun = time.perf_counter()
    _forward(member, views).logit.cpu()
    seconds = (time.perf_counter() - begun) / batch
    return Probe(sight.last_input.shape[-1], len(sight.evidence), seconds)


# ------------------------------------------------------------------------------------------------ Score-CAM
def strongest(channels: torch.Tensor, count: int | None) -> torch.Tensor:
    """Indices of the `count` channels of (D, h, w) with the most energy about their mean; None: all, in order.

    A constant part makes no difference to a mask that is stretched to [0, 1], so it is no energy.
    """
    if count is None or count >= len(channels):
        return torch.arange(len(channels), device=channels.device)
    energy = channels.flatten(1).var(dim=1, correction=0)
    return energy.topk(count).indices


def score_cam(
    member: Member,
    view: torch.Tensor,
    channels: torch.Tensor,
    *,
    count: int | None = SCORE_CAM_CHANNELS,
    batch: int = 16,
) -> torch.Tensor:
    """Score-CAM (Wang et al. 2020) of one view, class fake: (h, w), not negative; all zero when nothing stands out.

    Every channel, enlarged and stretched to [0, 1], masks the view; the softmax over the masked views' logits weighs
    the channels (the paper's algorithm 1; the logit of an empty view, its baseline, cancels in the softmax). What a mask
    hides becomes the statistics' mean colour, which is zero to the tower.

    Two departures, because a LayerNorm's channels, unlike the paper's ReLU maps, have offsets and no natural zero (in
    DINOv2-S the mean channel's offset is four times its deviation over the patches, and decides the plain sum): what is
    summed are the stretched maps, and weights count by how much they exceed the mean weight. A patch is positive
    where masks that show it score above the others.

    view: (3, S, S) uint8. channels: (D, h, w) of `channel_maps`. count: the strongest so many (None: all).
    batch: masked views at once.
    """
    chosen = channels[strongest(channels, count)]  # (K, h, w)
    pixels, blank = _pixels(member, view)
    masked = (_between(pixels, blank, _stretched(part, view.shape[-1])) for part in chosen.split(batch))
    weights = _logits(member, masked).softmax(dim=0)  # (K,)
    shown = _stretched(chosen, chosen.shape[-1])[:, 0]  # (K, h, w) in [0, 1]
    above = weights - weights.mean()
    return (above[:, None, None] * shown).sum(dim=0).relu()


def _pixels(member: Member, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The view (3, S, S) in [0, 1], and the mean colour (3, 1, 1)."""
    return view.to(member.tower.mean.dtype) / 255, member.tower.mean[0]


def _stretched(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Maps (K, h, w) enlarged and stretched to [0, 1] each: (K, 1, side, side). A constant one is 0."""
    size = (side, side)
    large = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
    low = large.amin(dim=(2, 3), keepdim=True)
    span = large.amax(dim=(2, 3), keepdim=True) - low
    return (large - low) / span.clamp_min(torch.finfo(large.dtype).tiny)


def _between(kept: torch.Tensor, instead: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """`kept` where masks (K, 1, S, S) are 1, `instead` where they are 0: (K, 3, S, S)."""
    return masks * kept + (1 - masks) * instead


def _logits(member: Member, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([_forward(member, images).logit.float() for images in batches])


def agreement(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Two maps (h, w): their correlation over the patches, and the share of mass they have in common, in [0, 1].

    nan for a map without mass, and for the correlation of a constant one.
    """
    if not (a.sum() > 0 and b.sum() > 0):
        return float("nan"), float("nan")
    shared = float(np.minimum(a / a.sum(), b / b.sum()).sum())
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan"), shared
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]), shared


# ------------------------------------------------------------------------------------------------ judging a map
class Judged(NamedTuple):
    """Areas under P(fake) against the share of patches, one a map (M,) float64.

    deletion: patches hidden, the map's highest first; low is good. insertion: shown in that order; high is good.
    """

    deletion: np.ndarray
    insertion: np.ndarray


def judge(
    member: Member,
    view: torch.Tensor,
    maps: Sequence[np.ndarray],
    calibrator: Calibrator,
    *,
    steps: int = STEPS,
    batch: int = 16,
) -> Judged:
    """Deletion and insertion (Petsiuk et al. 2018, RISE) of maps (h, w) of one view (3, S, S) uint8.

    Deletion ends at the mean colour. Insertion starts from the blurred view, RISE's sigma of 5 px at 224. Equal patches
    go in reading order; a random map is the control to compare with.
    """
    side = view.shape[-1]
    pixels, blank = _pixels(member, view)
    blurred = _blur(pixels, 5 * side / 224)
    counts = [round(maps[0].size * k / steps) for k in range(steps + 1)]
    chosen = []  # which patches are among the highest so many: 1
    for m in maps:
        rank = np.empty(m.size, int)
        rank[np.argsort(-m.ravel(), kind="stable")] = np.arange(m.size)
        chosen += [(rank < count).reshape(m.shape) for count in counts]
    masks = torch.from_numpy(np.stack(chosen)).to(pixels)[:, None]  # (M * 11, 1, h, w)
    found = []
    for among_the_highest, elsewhere in ((blank, pixels), (pixels, blurred)):
        made = (
            _between(among_the_highest, elsewhere, F.interpolate(part, (side, side))) for part in masks.split(batch)
        )
        p = calibrator.apply(_logits(member, made).double().cpu().numpy())
        found.append(np.trapezoid(p.reshape(len(maps), -1), dx=1 / steps, axis=1))
    return Judged(*found)


def _blur(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    """(3, S, S) under a Gaussian of `sigma` px, the border repeated."""
    reach = int(3 * sigma) + 1
    offsets = torch.arange(-reach, reach + 1, device=pixels.device, dtype=pixels.dtype)
    kernel = (-0.5 * (offsets / sigma).square()).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(pixels[:, None], (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(across, kernel.view(1, 1, -1, 1))[:, 0]


# ------------------------------------------------------------------------------------------------ geometry
Rect = tuple[float, float, float, float]  # x0, y0, x1, y1 in px of the picture


def seen_rect(view: ViewConfig, size: tuple[int, int], cut: tuple[int, int, int, int] | None) -> Rect:
    """What part of a picture of `size` (H, W) px a view shows; it may reach beyond the picture.

    cut: the square face crop that the view was made of (`faces.crop_box`); None: the whole picture.
    """
    x0, y0, x1, y1 = cut or (0, 0, size[1], size[0])
    start = (view.resize - view.side) // 2
    first, last = start / view.resize, (start + view.side) / view.resize
    width, height = x1 - x0, y1 - y0
    return (
        x0 + first * width,
        y0 + first * height,
        x0 + last * width,
        y0 + last * height,
    )


def coverage(rect: Rect, face: Rect, grid: tuple[int, int]) -> np.ndarray:
    """The share of every patch's area that lies in the box `face`, (h, w) in [0, 1]; both boxes in the picture's px."""
    down = _covered(rect[1], rect[3], face[1], face[3], grid[0])
    across = _covered(rect[0], rect[2], face[0], face[2], grid[1])
    return np.outer(down, across)


def _covered(low: float, high: float, start: float, stop: float, n: int) -> np.ndarray:
    edges = np.linspace(low, high, n + 1)
    shared = np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)
    return np.clip(shared, 0, None) / (edges[1] - edges[0])


def share_outside(map_: np.ndarray, covered: np.ndarray) -> float:
    """The share of a map's mass that lies outside the face; nan for a map without mass. Both (h, w)."""
    mass = map_.sum()
    return float((map_ * (1 - covered)).sum() / mass) if mass > 0 else float("nan")


def place(map_: np.ndarray, rect: Rect, size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) laid over the picture where its view saw it: (H, W) float32, 0 where the view did not reach."""
    height, width = size
    x = _positions(rect[0], rect[2], width)
    y = _positions(rect[1], rect[3], height)
    xs, ys = np.meshgrid(x, y)
    grid = torch.from_numpy(np.stack([xs, ys], axis=-1)).float()[None]  # (1, H, W, 2)
    source = torch.from_numpy(np.ascontiguousarray(map_)).float()[None, None]
    laid = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
    inside = (np.abs(xs) <= 1) & (np.abs(ys) <= 1)
    return np.where(inside, laid[0, 0].numpy(), 0).astype(np.float32)


def _positions(low: float, high: float, size: int) -> np.ndarray:
    """Pixel centres 0.5 .. size - 0.5 as positions in [low, high], -1 at its start and 1 at its end."""
    return 2 * (np.arange(size) + 0.5 - low) / (high - low) - 1
