"""Small autoencoders that draw a face again, each with another decoder: what `reconstruct` makes its fakes with.

Takes pictures uint8 RGB (H, W, 3); gives them as a decoder draws them, in the colours of the original.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from solution.models.devices import pick_precision
from solution.training.checkpoint import Checkpoint, TrainingState, read_checkpoint, write_checkpoint

# How a decoder makes its picture larger is what it leaves in it (Odena et al., 2016: checkerboards of transposed
# convolutions). By kind, how often it halves the picture, and the share of fakes that it draws.
KINDS = {"nearest": (3, 0.3), "transposed": (3, 0.3), "shuffle": (3, 0.3), "coarse": (4, 0.1)}
CHANNELS = (16, 32, 64, 96, 96)  # at full size, half of it, and so on
LATENT = {3: 16, 4: 32}  # channels, by how often the picture was halved
SIDE, PATCH = 128, 64  # px: faces, and what of them a training step sees
LOW = 4.0  # px, the blur above which a decoder's picture keeps the original's colours
SAVE_EVERY = 100  # steps


# ------------------------------------------------------------------------------------------------ the networks
def _step(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]


def _encoder(halvings: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, CHANNELS[0], 3, padding=1)]
    for inputs, outputs in itertools.pairwise(CHANNELS[: halvings + 1]):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.GroupNorm(8, outputs), nn.SiLU(), *_step(outputs, outputs)]
    return nn.Sequential(*layers, nn.Conv2d(CHANNELS[halvings], LATENT[halvings], 1))


def _decoder(kind: str, halvings: int) -> nn.Sequential:
    layers = [
        nn.Conv2d(LATENT[halvings], CHANNELS[halvings], 3, padding=1),
        *_step(CHANNELS[halvings], CHANNELS[halvings]),
    ]
    for level in range(halvings, 0, -1):
        inputs, outputs = CHANNELS[level], CHANNELS[level - 1]
        if kind == "transposed":
            layers.append(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1))
        elif kind == "shuffle":
            layers += [nn.Conv2d(inputs, 4 * outputs, 3, padding=1), nn.PixelShuffle(2)]
        else:
            smooth = {"mode": "bilinear", "align_corners": False} if kind == "coarse" else {"mode": "nearest"}
            layers += [nn.Upsample(scale_factor=2, **smooth), nn.Conv2d(inputs, outputs, 3, padding=1)]
        layers += [nn.GroupNorm(8, outputs), nn.SiLU()]
        if level > 1:  # at full size a step costs as much as all the others
            layers += _step(outputs, outputs)
    return nn.Sequential(*layers, nn.Conv2d(CHANNELS[0], 3, 3, padding=1))


class Autoencoders(nn.Module):
    """Decoders of the four `KINDS` on two encoders: pictures (B, 3, H, W) in [-1, 1] to the same, H and W multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({str(halvings): _encoder(halvings) for halvings in LATENT})
        self.decoders = nn.ModuleDict({kind: _decoder(kind, halvings) for kind, (halvings, _) in KINDS.items()})

    def forward(self, images: Tensor, kind: str) -> Tensor:
        """The pictures as the decoder `kind` draws them."""
        return self.decoders[kind](self.encoders[str(KINDS[kind][0])](images))

    def loss(self, images: Tensor) -> Tensor:
        """Mean absolute error of pixels and, half, of their differences across and down, summed over the kinds."""
        latents = {halvings: self.encoders[str(halvings)](images) for halvings in LATENT}
        total = images.new_zeros(())
        for kind, (halvings, _) in KINDS.items():
            error = self.decoders[kind](latents[halvings]).float() - images
            across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
            total = total + error.abs().mean() + 0.5 * (across + down)
        return total


def draw_again(networks: Autoencoders, image: np.ndarray, kind: str) -> np.ndarray:
    """`image` (H, W, 3) uint8 as the decoder `kind` draws it, in the colours of the original.

    What is coarser than `LOW` px is the original's: decoders trained for minutes miss colours, and would give themselves
    away by them.
    """
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, 0, -height % 16, 0, -width % 16, cv2.BORDER_REFLECT_101)
    with torch.inference_mode():
        drawn = networks(_as_input(padded[None]), kind)[0]
    drawn = ((drawn.permute(1, 2, 0) + 1) * 127.5).numpy()[:height, :width]
    drawn += cv2.GaussianBlur(image.astype(np.float32) - drawn, (0, 0), LOW)
    return drawn.round().clip(0, 255).astype(np.uint8)


def _as_input(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------ training
def train(faces: np.ndarray, steps: int, path: Path, *, seed: int, batch: int = 16) -> Autoencoders:
    """Autoencoders of faces (N, SIDE, SIDE, 3) uint8, after `steps` steps of `batch` patches; kept at `path` as it goes."""
    from tqdm import tqdm

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        networks = Autoencoders()
    half = pick_precision(torch.device("cpu")) == "bfloat16"
    optimizer = torch.optim.AdamW(networks.parameters(), 1e-3)
    setting = {
        "seed": str(seed),
        "number of steps": str(steps),
        "faces": f"{zlib.crc32(faces.tobytes()):08x}",
        "batch": str(batch),
    }
    done = TrainingState()
    if (found := read_checkpoint(path, setting)) is not None:
        networks.load_state_dict(found.weights)
        done = found.state
        optimizer.load_state_dict(found.optimizer)
    with tqdm(total=steps, initial=done.step, desc="decoders", unit="step") as bar:
        for number in range(done.step, steps):
            rng = np.random.default_rng([seed, number])
            x, y = rng.integers(0, SIDE - PATCH + 1, 2)
            patches = faces[rng.integers(len(faces), size=batch), y : y + PATCH, x : x + PATCH]
            images = _as_input(patches)
            if rng.random() < 0.5:
                images = images.flip(3)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (number + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * number / steps))
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = networks.loss(images)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
            if (number + 1) % SAVE_EVERY == 0 or number + 1 == steps:
                state = replace(done, step=number + 1)
                write_checkpoint(path, Checkpoint(setting, state, networks.state_dict(), optimizer.state_dict(), None))
    return networks.eval()
