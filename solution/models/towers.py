"""DINOv2, CLIP and timm towers: built, run block by block, filled with weights.

Takes pictures (B, 3, H, W), uint8 or float in [0, 1]; returns `TowerOutput` with tokens (B, N, D). The modules are the
libraries' own (transformers' Dinov2Model, open_clip's VisionTransformer and CLIP, timm's vision transformers in
`timm_towers`); the loop over their blocks is ours, because members need what library forwards do not give: one adapter of
several on a shared tower, a block's keys and values, the attention of one block only. Parity with the libraries' forwards
is a test.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from solution.config import STATISTICS, ClipArch, TowerConfig
from solution.errors import UsageError, WeightsError
from solution.models.blocks import (
    ROLES,
    Block,
    EffortLinear,
    Rotation,
    Step,
    block_of,
    is_lora,
    placed,
    run_block,
    split_heads,
)
from solution.models.keys import stable_name, to_stable
from solution.models.libraries import LIBRARIES


@dataclass(frozen=True)
class TowerOutput:
    """Tokens of one tower.

    cls_token: (B, D) and patch_tokens: (B, N, D), both after the final LayerNorm. A timm tower may have something else
        stand for the whole picture than its class token (`TimmArch.pool`).
    last_input: (B, P + N, D), what the last block received; `Tower.cls_attention` reads attention off it. P is 1, or
        the class token and registers of a timm tower.
    grid: (h, w) with h * w = N.
    hidden: block number (1-based) -> (B, P + N, D) after that block, for the blocks that were asked for.
    """

    cls_token: torch.Tensor
    patch_tokens: torch.Tensor
    last_input: torch.Tensor
    grid: tuple[int, int]
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)


class Tower(nn.Module):
    """A vision transformer by role, from a library's modules. Built by `build_tower`, with random weights."""

    def __init__(self, config: TowerConfig, model: nn.Module):
        super().__init__()
        self.config = config
        self.library = LIBRARIES[config.kind]
        self.model = model
        self.checkpointing = False
        self._active: str | None = None
        mean, std = STATISTICS[config.statistics]
        # Built outside any meta-device context: buffers are no weights and no file fills them.
        with torch.device("cpu"):
            self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    # -- geometry
    @property
    def width(self) -> int:
        return self.config.arch.width

    @property
    def heads(self) -> int:
        return self.config.arch.heads

    @property
    def layers(self) -> nn.ModuleList:
        """The library's own block modules, in order."""
        return self.library.layers(self.model)

    @property
    def last_norm(self) -> nn.Module:
        """The LayerNorm after the last block."""
        return self.library.last_norm(self.model)

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token, and registers."""
        return self.config.arch.prefix

    def blocks(self, count: int = 0) -> Iterator[Block]:
        """The first `count` blocks (0: all) by role, as they are now (adapters in place)."""
        return map(block_of, islice(self.layers, count or None))

    def matrices(self) -> Iterator[nn.Module]:
        """What computes the matrix products of the image blocks (adapted projections too), and the patch projection."""
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear) or hasattr(module, "lora_A"):
                    yield module
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                yield module

    def projection_names(self) -> dict[tuple[int, str], str]:
        """(block index, role) -> module path inside this tower, for the four attention projections."""
        names = {id(module): name for name, module in self.named_modules()}
        return {
            (index, role): names[id(getattr(block, role))]
            for index, block in enumerate(self.blocks())
            for role in ROLES
        }

    # -- forward
    def unit(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8, or float in [0, 1], to float in [0, 1]."""
        return images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images

    def at_side(self, images: torch.Tensor, side: int) -> torch.Tensor:
        """Square pictures as `unit` makes them, resized to (B, 3, side, side) with anti-aliasing where they are not."""
        images = self.unit(images)
        if images.shape[-1] == side:
            return images
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8, or float in [0, 1], to the tower's normalised float input."""
        return (self.unit(images) - self.mean) / self.std

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Pictures (B, 3, H, W) to position-embedded tokens (B, P + N, D) and the patch grid (h, w)."""
        x, grid, _ = self.place(images)
        return x, grid

    def place(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], list[Rotation | None]]:
        """`embed`, and what turns each block's queries and keys where positions are rotary."""
        patch = self.config.arch.patch
        height, width = images.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"tower {self.config.name}: {height}x{width} px is no multiple of its patch {patch}")
        pixels = self.normalize(images).to(next(self.model.parameters()).dtype)
        grid = (height // patch, width // patch)
        x, rotations = self.library.place(self.config, self.model, pixels)
        return x, grid, rotations

    def read(
        self, x: torch.Tensor, last: torch.Tensor, grid: tuple[int, int], hidden: dict[int, torch.Tensor]
    ) -> TowerOutput:
        """What a forward returns, from the tokens x (B, P + N, D) after the last block."""
        x = self.last_norm(x)
        patches = x[:, self.prefix :]
        pool = getattr(self.config.arch, "pool", "token")
        if pool == "token":
            whole = x[:, 0]
        else:
            whole = self.model.pool(x) if pool == "attention" else patches.mean(dim=1)
        return TowerOutput(whole, patches, last, grid, hidden)

    def forward(
        self,
        images: torch.Tensor,
        *,
        adapter: str | None = None,
        keep: tuple[int, ...] = (),
        patches: bool = True,
    ) -> TowerOutput:
        """Tokens of `images` (B, 3, H, W) with the named adapter (None: the plain tower).

        keep: 1-based numbers of the blocks whose output is returned in `hidden`. patches: False where nobody reads the
        patches' tokens. The last block then computes the class token and registers alone, a tower of twelve blocks saves
        a fourteenth, and `patch_tokens` is empty wherever the picture is read off the class token.
        """
        x, grid, rotations = self.place(images)
        hidden: dict[int, torch.Tensor] = {}
        last, count = x, len(rotations)
        alone = not patches and count not in keep and getattr(self.config.arch, "pool", "token") == "token"
        for number, (step, rotation) in enumerate(zip(self.steps(x, adapter), rotations, strict=True), start=1):
            last = x
            x = step(x, rotation, first=self.prefix) if alone and number == count else step(x, rotation)
            if number in keep:
                hidden[number] = x
        return self.read(x, last, grid, hidden)

    def steps(self, x: torch.Tensor, adapter: str | None) -> Iterator[Step]:
        """What each block does to tokens like x (B, P + N, D) under an adapter, in order."""
        self.use(adapter)
        again = self.checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks():
            step = functools.partial(run_block, block, heads=self.heads)
            yield functools.partial(checkpoint, step, use_reentrant=False) if again else step

    def cls_attention(self, last_input: torch.Tensor, *, adapter: str | None = None, depth: int = 0) -> torch.Tensor:
        """The last block's CLS -> token attention per head: (B, P + N, D) -> (B, heads, P + N), rows summing to one.

        depth: how many blocks there are for the one that asks; 0: all.

        Computed from that block's query and key projections alone; the tower's own forward stays fused. Where positions
        are rotary, the patches are those of a square picture.

        Raises:
            UsageError: a tower without a class token.
        """
        if not self.prefix:
            raise UsageError(f"tower {self.config.name} has no class token, so nothing attends from it to the patches")
        self.use(adapter)
        *_, block = self.blocks(depth)
        h = block.norm1(last_input)
        q = split_heads(block.q(h[:, :1]), self.heads)  # (B, heads, 1, d)
        k = split_heads(block.k(h), self.heads)  # (B, heads, P + N, d)
        q = placed(q, block.q_norm, None)  # the class token has no place
        k = placed(
            k, block.k_norm, self.library.last_rotation(self.config, self.model, last_input.shape[1] - self.prefix)
        )
        with torch.autocast(q.device.type, enabled=False):  # which would take the product back to bf16
            scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1).squeeze(-2)

    # -- adapters
    def use(self, adapter: str | None) -> None:
        """Make `adapter` the one that forwards use (None: none of them)."""
        if adapter == self._active:
            return
        for module in self.modules():
            if isinstance(module, EffortLinear):
                module.active = adapter if adapter in module.factors else None
            elif is_lora(module):
                present = adapter is not None and adapter in module.lora_A
                module.enable_adapters(present)
                if present:
                    module.set_adapter(adapter)
        self._active = adapter


def patch_attention(attention: torch.Tensor, prefix: int = 1) -> torch.Tensor:
    """(B, heads, prefix + N) CLS attention -> head mean over patches, renormalised to sum to one: (B, N)."""
    over_patches = attention.mean(dim=1)[:, prefix:]
    return over_patches / over_patches.sum(dim=-1, keepdim=True)


def build_tower(config: TowerConfig, *, device: str | torch.device = "cpu") -> Tower:
    """The tower with random weights; on `device="meta"` nothing is materialised and nothing downloaded."""
    with torch.device(device):
        model = LIBRARIES[config.kind].build(config)
    return Tower(config, model)


def empty_tower(
    config: TowerConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    matrices: torch.dtype | None = None,
) -> Tower:
    """The tower with unset weights, to be filled by `load_state`: no time or second copy spent on random ones.

    matrices: what its image blocks' matrices are held in, if not `dtype` (see `merging.narrow`).
    """
    tower = build_tower(config, device="meta")
    tower.model.to(dtype)
    if matrices is not None:
        for module in tower.matrices():
            module.to(matrices)
    tower.model.to_empty(device=device)
    tower.library.settle(config, tower.model, device)
    tower.to(device)  # the normalisation buffers
    return tower


# ------------------------------------------------------------------------------------------------ weights of a tower
def _library_names(tower: Tower) -> dict[str, torch.Tensor]:
    """The tower's own parameters under the library's names, whatever adapters wrap them."""
    raw: dict[str, torch.Tensor] = {}
    for key, tensor in tower.model.state_dict(keep_vars=True).items():
        if ".factors." in key or ".lora_" in key:
            continue
        key = key.replace(".base_layer.", ".")
        raw[re.sub(r"\.base\.(weight|bias)$", r".\1", key)] = tensor
    return raw


def tower_state(tower: Tower) -> dict[str, torch.Tensor]:
    """The tower's own parameters (no adapters, no normalisation buffers) under stable keys, sharing storage.

    Some are views in another shape; what an optimizer takes is in `tower_parameters`.
    """
    return to_stable(_library_names(tower), tower.library.layout)


def tower_parameters(tower: Tower) -> dict[str, nn.Parameter]:
    """The tower's own parameters as the library holds them, by stable key."""
    names = {k: stable_name(k, tower.library.layout) for k in _library_names(tower)}
    return {names[k]: p for k, p in _library_names(tower).items() if names[k] is not None}


def load_state(target: dict[str, torch.Tensor], state: dict[str, torch.Tensor], what: str) -> None:
    """Copy `state` into the parameters `target`, both under stable keys, strictly.

    Raises:
        WeightsError: a missing, extra or misshaped key, by name.
    """
    missing, extra = sorted(set(target) - set(state)), sorted(set(state) - set(target))
    if missing or extra:
        raise WeightsError(
            f"{what}: {len(missing)} missing keys {missing[:4]}, {len(extra)} unexpected keys {extra[:4]}; "
            "the file belongs to another architecture or is damaged: fetch it again or use its own config.json"
        )
    for key, parameter in target.items():
        if parameter.shape != state[key].shape:
            raise WeightsError(
                f"{what}: {key} has shape {tuple(state[key].shape)}, expected {tuple(parameter.shape)}; "
                "the file belongs to another architecture"
            )
    with torch.no_grad():
        for key, parameter in target.items():
            parameter.copy_(state[key])


def dinov2_as_clip(state: dict[str, torch.Tensor], arch: ClipArch) -> dict[str, torch.Tensor]:
    """A DINOv2 tower's stable state as the image part of a CLIP with `arch`: the same function of the pixels.

    open_clip's patch projection has no bias, so it moves into the positions of the patches; the position grid is
    interpolated once to the CLIP's fixed side (bicubic, as DINOv2 does at run time).
    """
    state = dict(state)
    bias, position = state.pop("patch.bias"), state.pop("position")
    old, new = round((len(position) - 1) ** 0.5), arch.image_side // arch.patch
    grid = position[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if old != new:
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(new * new, -1) + bias.float()
    state["position"] = torch.cat([position[:1].float(), patches])
    return state


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters, each tensor once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
