"""The libraries that towers are of: how each builds its model, and where it has its layers, its last norm and its tokens.

Takes a `TowerConfig`; gives the library's own modules: transformers' Dinov2Model, open_clip's CLIP or its image part alone,
timm's vision transformers (`timm_towers`). `LIBRARIES` has one for each kind of tower.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from solution.config import ClipArch, Dinov2Arch, TowerConfig
from solution.models import timm_towers
from solution.models.blocks import Rotation, SplitAttention

# Tokens (B, P + N, D) of normalised pixels with their positions, and what turns each block's queries and keys.
Placed = tuple[torch.Tensor, list[Rotation | None]]


class Library(ABC):
    """What a `Tower` asks its library for.

    layout: the library's rows in `keys.KEY_TABLE`. described: whether its public weights come with a config.json.
    """

    layout: str
    described = True

    @abstractmethod
    def build(self, config: TowerConfig) -> nn.Module:
        """Its model with random weights, on the default device."""

    @abstractmethod
    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The blocks, in order."""

    @abstractmethod
    def last_norm(self, model: nn.Module) -> nn.Module:
        """The LayerNorm after the last block."""

    @abstractmethod
    def place(self, config: TowerConfig, model: nn.Module, pixels: torch.Tensor) -> Placed:
        """Normalised pixels (B, 3, H, W), a multiple of the patch, to what the first block takes."""

    def last_rotation(self, config: TowerConfig, model: nn.Module, patches: int) -> Rotation | None:
        """What turns the last block's keys of a square picture of so many patches."""
        return None

    def settle(self, config: TowerConfig, model: nn.Module, device: str | torch.device) -> None:
        """Set the buffers that no file fills, in a model that was made without values."""

    @abstractmethod
    def geometry(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """Fields of its `...Arch` from the config.json beside public weights; None for one of something else."""


class Dinov2(Library):
    """DINOv2 through transformers."""

    layout = "dinov2"

    def build(self, config: TowerConfig) -> nn.Module:
        """transformers' Dinov2Model."""
        return _dinov2(config.arch)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Of its encoder."""
        return model.encoder.layer

    def last_norm(self, model: nn.Module) -> nn.Module:
        """`layernorm`."""
        return model.layernorm

    def place(self, config: TowerConfig, model: nn.Module, pixels: torch.Tensor) -> Placed:
        """Positions are interpolated to the picture's size."""
        return model.embeddings(pixels), [None] * config.arch.layers

    def geometry(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """From transformers' Dinov2Config."""
        if found.get("model_type") != "dinov2":
            return None
        from transformers import Dinov2Config

        full = Dinov2Config.from_dict(found)
        return _vision(full) | {"mlp_ratio": full.mlp_ratio, "swiglu": full.use_swiglu_ffn}


class OpenClip(Library):
    """CLIP through open_clip, with its text tower or without."""

    layout = "open_clip"
    described = False

    def build(self, config: TowerConfig) -> nn.Module:
        """open_clip's CLIP, or what holds its image part alone."""
        return _clip(config.arch)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Of the image part."""
        return model.visual.transformer.resblocks

    def last_norm(self, model: nn.Module) -> nn.Module:
        """`ln_post`."""
        return model.visual.ln_post

    def place(self, config: TowerConfig, model: nn.Module, pixels: torch.Tensor) -> Placed:
        """Pictures of one side.

        Raises:
            ValueError: another side.
        """
        visual, arch = model.visual, config.arch
        height, width = pixels.shape[-2:]
        if (height // arch.patch, width // arch.patch) != visual.grid_size:
            side = arch.image_side
            raise ValueError(f"tower {config.name} takes {side}x{side} px, found {height}x{width}")
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)  # (B, 1 + N, D)
        return visual.ln_pre(x + visual.positional_embedding.to(x.dtype)), [None] * arch.layers

    def settle(self, config: TowerConfig, model: nn.Module, device: str | torch.device) -> None:
        """The text tower's causal mask."""
        if config.arch.text_layers:
            length = config.arch.context
            model.attn_mask = torch.full((length, length), float("-inf"), device=device).triu_(1)

    def geometry(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """From transformers' CLIPVisionConfig, alone or in a whole CLIP's."""
        found = found.get("vision_config") or found
        if found.get("model_type") != "clip_vision_model":
            return None
        from transformers import CLIPVisionConfig

        full = CLIPVisionConfig.from_dict(found)
        return _vision(full) | {
            "mlp_ratio": full.intermediate_size / full.hidden_size,
            "quick_gelu": full.hidden_act == "quick_gelu",
            "norm_eps": full.layer_norm_eps,
        }


class Timm(Library):
    """Any vision transformer of timm with pre-norm blocks."""

    layout = "timm"

    def build(self, config: TowerConfig) -> nn.Module:
        """timm's model, its blocks by role."""
        return timm_towers.build_model(config.arch)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """`blocks`."""
        return model.blocks

    def last_norm(self, model: nn.Module) -> nn.Module:
        """`norm`."""
        return model.norm

    def place(self, config: TowerConfig, model: nn.Module, pixels: torch.Tensor) -> Placed:
        """No rotations where positions are learned alone."""
        placed = model._pos_embed(model.patch_embed(pixels))
        x, rotary = placed if isinstance(placed, tuple) else (placed, None)
        return model.norm_pre(x), timm_towers.rotations(model, rotary, config.arch.layers)

    def last_rotation(self, config: TowerConfig, model: nn.Module, patches: int) -> Rotation | None:
        """Of rotary positions, where it has them."""
        rope = getattr(model, "rope", None)
        if rope is None:
            return None
        side = math.isqrt(patches)
        return timm_towers.rotations(model, rope.get_embed(shape=[side, side]), config.arch.layers)[-1]

    def settle(self, config: TowerConfig, model: nn.Module, device: str | torch.device) -> None:
        """Rotary embeddings."""
        for module in model.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()

    def geometry(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """The model's name: the rest follows from it."""
        return {"model": found["architecture"]} if "architecture" in found else None


LIBRARIES: dict[str, Library] = {"dinov2": Dinov2(), "clip": OpenClip(), "timm": Timm()}


def _vision(full: Any) -> dict[str, Any]:
    """What transformers' configurations of vision transformers call alike."""
    return {
        "width": full.hidden_size,
        "layers": full.num_hidden_layers,
        "heads": full.num_attention_heads,
        "patch": full.patch_size,
        "image_side": full.image_size,
    }


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
