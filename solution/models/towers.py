"""DINOv2, CLIP and timm towers: built, run block by block, filled with weights.

Takes pictures (B, 3, H, W), uint8 or float in [0, 1]; returns `TowerOutput` with tokens (B, N, D). The modules are the
libraries' own (transformers' Dinov2Model, open_clip's VisionTransformer and CLIP, timm's vision transformers in
`timm_towers`); the loop over their blocks is ours, because members need what library forwards do not give: one adapter of
several on a shared tower, a block's keys and values, the attention of one block only. Parity with the libraries' forwards
is a test.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from solution.config import STATISTICS, ClipArch, Dinov2Arch, TowerConfig
from solution.errors import UsageError, WeightsError
from solution.models.blocks import (
    ROLES,
    Block,
    EffortLinear,
    Rotation,
    SplitAttention,
    Step,
    block_of,
    is_lora,
    placed,
    run_block,
    split_heads,
)
from solution.models.keys import stable_name, to_stable


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
        if self.config.kind == "dinov2":
            return self.model.encoder.layer
        if self.config.kind == "timm":
            return self.model.blocks
        return self.model.visual.transformer.resblocks

    @property
    def last_norm(self) -> nn.Module:
        """The LayerNorm after the last block."""
        if self.config.kind == "dinov2":
            return self.model.layernorm
        return self.model.norm if self.config.kind == "timm" else self.model.visual.ln_post

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token, and registers."""
        return self.config.arch.prefix

    def blocks(self) -> Iterator[Block]:
        """The blocks by role, as they are now (adapters in place)."""
        return map(block_of, self.layers)

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
    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8, or float in [0, 1], to the tower's normalised float input."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return (images - self.mean) / self.std

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
        unturned = [None] * self.config.arch.layers
        if self.config.kind == "dinov2":
            return self.model.embeddings(pixels), grid, unturned
        if self.config.kind == "timm":
            x, rotations = self._place_timm(pixels)
            return x, grid, rotations
        if grid != self.model.visual.grid_size:
            side = self.config.arch.image_side
            raise ValueError(f"tower {self.config.name} takes {side}x{side} px, found {height}x{width}")
        visual = self.model.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)  # (B, 1 + N, D)
        return visual.ln_pre(x + visual.positional_embedding.to(x.dtype)), grid, unturned

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
    ) -> TowerOutput:
        """Tokens of `images` (B, 3, H, W) with the named adapter (None: the plain tower).

        keep: 1-based numbers of the blocks whose output is returned in `hidden`.
        """
        x, grid, rotations = self.place(images)
        hidden: dict[int, torch.Tensor] = {}
        last = x
        for number, (step, rotation) in enumerate(zip(self.steps(x, adapter), rotations, strict=True), start=1):
            last = x
            x = step(x, rotation)
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

    def cls_attention(self, last_input: torch.Tensor, *, adapter: str | None = None) -> torch.Tensor:
        """The last block's CLS -> token attention per head: (B, P + N, D) -> (B, heads, P + N), rows summing to one.

        Computed from that block's query and key projections alone; the tower's own forward stays fused. Where positions
        are rotary, the patches are those of a square picture.

        Raises:
            UsageError: a tower without a class token.
        """
        if not self.prefix:
            raise UsageError(f"tower {self.config.name} has no class token, so nothing attends from it to the patches")
        self.use(adapter)
        *_, block = self.blocks()
        h = block.norm1(last_input)
        q = split_heads(block.q(h[:, :1]), self.heads)  # (B, heads, 1, d)
        k = split_heads(block.k(h), self.heads)  # (B, heads, P + N, d)
        q = placed(q, block.q_norm, None)  # the class token has no place
        k = placed(k, block.k_norm, self._last_rotation(last_input.shape[1] - self.prefix))
        scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1).squeeze(-2)

    # -- timm
    def _place_timm(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[Rotation | None]]:
        """Normalised pixels to tokens (B, P + N, D) and rotations; no rotations where positions are learned alone."""
        from solution.models.timm_towers import rotations

        placed = self.model._pos_embed(self.model.patch_embed(pixels))
        x, rotary = placed if isinstance(placed, tuple) else (placed, None)
        return self.model.norm_pre(x), rotations(self.model, rotary, self.config.arch.layers)

    def _last_rotation(self, patches: int) -> Rotation | None:
        """What turns the last block's keys of a square picture of so many patches."""
        rope = getattr(self.model, "rope", None) if self.config.kind == "timm" else None
        if rope is None:
            return None
        from solution.models.timm_towers import rotations

        side = math.isqrt(patches)
        return rotations(self.model, rope.get_embed(shape=[side, side]), self.config.arch.layers)[-1]

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
        if config.kind == "timm":
            from solution.models.timm_towers import build_model

            return Tower(config, build_model(config.arch))
        model = _dinov2(config.arch) if config.kind == "dinov2" else _clip(config.arch)
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
    for module in tower.model.modules():  # timm's rotary embeddings: buffers that no file fills
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    tower.to(device)  # the normalisation buffers
    if config.kind == "clip" and config.arch.text_layers:  # a buffer that no file fills
        length = config.arch.context
        mask = torch.full((length, length), float("-inf"), device=device).triu_(1)
        tower.model.attn_mask = mask
    return tower


def _dinov2(arch: Dinov2Arch) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=arch.width,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        mlp_ratio=arch.mlp_ratio,
        use_swiglu_ffn=arch.swiglu,
        patch_size=arch.patch,
        image_size=arch.image_side,
    )
    return Dinov2Model(config)


class _ImageOnly(nn.Module):
    """Holds open_clip's VisionTransformer under the name it has inside a CLIP."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual


def _clip(arch: ClipArch) -> nn.Module:
    from open_clip import CLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=arch.layers,
        width=arch.width,
        head_width=arch.width // arch.heads,
        mlp_ratio=arch.mlp_ratio,
        patch_size=arch.patch,
        image_size=arch.image_side,
        ls_init_value=1e-5 if arch.layer_scale else None,
        no_ln_pre=not arch.pre_norm,
        norm_kwargs={"eps": arch.norm_eps},
    )
    # An image-only tower still asks open_clip for the smallest text tower it builds, and drops it.
    text = CLIPTextCfg(width=8, heads=1, layers=1, vocab_size=1)
    if arch.text_layers:
        text = CLIPTextCfg(
            context_length=arch.context,
            vocab_size=arch.vocab,
            width=arch.text_width,
            heads=arch.text_heads,
            layers=arch.text_layers,
        )
    model = CLIP(arch.embed_dim, vision, text, quick_gelu=arch.quick_gelu)
    for layer in model.visual.transformer.resblocks:
        layer.attn = SplitAttention(layer.attn)
    if arch.text_layers == 0:
        model.visual.proj = None  # pooled tokens are used before the projection
        return _ImageOnly(model.visual)
    return model


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


def _layout(tower: Tower) -> str:
    return {"clip": "open_clip"}.get(tower.config.kind, tower.config.kind)


def tower_state(tower: Tower) -> dict[str, torch.Tensor]:
    """The tower's own parameters (no adapters, no normalisation buffers) under stable keys, sharing storage.

    Some are views in another shape; what an optimizer takes is in `tower_parameters`.
    """
    return to_stable(_library_names(tower), _layout(tower))


def tower_parameters(tower: Tower) -> dict[str, nn.Parameter]:
    """The tower's own parameters as the library holds them, by stable key."""
    names = {k: stable_name(k, _layout(tower)) for k in _library_names(tower)}
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
