"""DINOv2, CLIP and timm towers, LoRA and Effort adapters, and the one table of key names.

Takes pictures (B, 3, H, W), uint8 or float in [0, 1]; returns `TowerOutput` with tokens (B, N, D). The modules are the
libraries' own (transformers' Dinov2Model, open_clip's VisionTransformer and CLIP, timm's vision transformers in
`timm_towers`); the loop over their blocks is ours, because members need what library forwards do not give: one adapter of several on a shared tower, a block's keys and
values, the attention of one block only. Parity with the libraries' forwards is a test.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from solution.config import STATISTICS, AdapterConfig, ClipArch, Dinov2Arch, TowerConfig
from solution.errors import KitError, UsageError

ROLES = ("q", "k", "v", "o")


class WeightsError(KitError, RuntimeError):
    """Weights that do not fit: the message names the file or key, what was found and expected, and what to do."""


# ------------------------------------------------------------------------------------------------ names
# Where a role lives inside a library's layer. transformers 5 renamed the DINOv2 tree, so each role lists every name it
# has had; a new library name is one more entry here and nothing else.
_LAYER_ATTRIBUTES = {
    "norm1": ("norm1", "ln_1"),
    "q": ("attention.q_proj", "attention.attention.query", "attn.q"),
    "k": ("attention.k_proj", "attention.attention.key", "attn.k"),
    "v": ("attention.v_proj", "attention.attention.value", "attn.v"),
    "o": ("attention.o_proj", "attention.output.dense", "attn.o"),
    "scale1": ("layer_scale1", "ls_1", "scale1"),
    "norm2": ("norm2", "ln_2"),
    "mlp": ("mlp",),
    "scale2": ("layer_scale2", "ls_2", "scale2"),
}

# Library key -> our stable key, for every layout whose files are met. `None` drops a key that inference never uses.
# Later entries never override earlier ones; a key that nothing matches is an error that names it.
_B = r"blocks.\1."
KEY_TABLE: dict[str, tuple[tuple[str, str | None], ...]] = {
    "dinov2": (
        (r"embeddings\.cls_token", "cls"),
        (r"embeddings\.mask_token", None),
        (r"embeddings\.position_embeddings", "position"),
        (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch.\1"),
        (r"encoder\.layer\.(\d+)\.norm([12])\.(weight|bias)", _B + r"norm\2.\3"),
        (
            r"encoder\.layer\.(\d+)\.attention\.(?:attention\.query|q_proj)\.(weight|bias)",
            _B + r"attn.q.\2",
        ),
        (
            r"encoder\.layer\.(\d+)\.attention\.(?:attention\.key|k_proj)\.(weight|bias)",
            _B + r"attn.k.\2",
        ),
        (
            r"encoder\.layer\.(\d+)\.attention\.(?:attention\.value|v_proj)\.(weight|bias)",
            _B + r"attn.v.\2",
        ),
        (
            r"encoder\.layer\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(weight|bias)",
            _B + r"attn.o.\2",
        ),
        (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", _B + r"scale\2"),
        (
            r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(weight|bias)",
            _B + r"mlp.gate_up.\2",
        ),  # split on load
        (
            r"encoder\.layer\.(\d+)\.mlp\.(?:weights_out|fc2|down_proj)\.(weight|bias)",
            _B + r"mlp.down.\2",
        ),
        (r"encoder\.layer\.(\d+)\.mlp\.gate_proj\.(weight|bias)", _B + r"mlp.gate.\2"),
        (
            r"encoder\.layer\.(\d+)\.mlp\.(?:fc1|up_proj)\.(weight|bias)",
            _B + r"mlp.up.\2",
        ),
        (r"layernorm\.(weight|bias)", r"norm.\1"),
    ),
    "open_clip": (
        (r"visual\.conv1\.(weight|bias)", r"patch.\1"),
        (r"visual\.class_embedding", "cls"),
        (r"visual\.positional_embedding", "position"),
        (r"visual\.ln_pre\.(weight|bias)", r"norm_pre.\1"),
        (r"visual\.ln_post\.(weight|bias)", r"norm.\1"),
        (r"visual\.proj", "proj"),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)",
            _B + r"norm\2.\3",
        ),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)",
            _B + r"attn.qkv.\2",
        ),  # split on load
        (
            r"visual\.transformer\.resblocks\.(\d+)\.attn\.(?:out_proj|o)\.(weight|bias)",
            _B + r"attn.o.\2",
        ),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.attn\.([qkv])\.(weight|bias)",
            _B + r"attn.\2.\3",
        ),
        (r"visual\.transformer\.resblocks\.(\d+)\.ls_([12])\.gamma", _B + r"scale\2"),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)",
            _B + r"mlp.up.\2",
        ),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)",
            _B + r"mlp.down.\2",
        ),
        (r"token_embedding\.weight", "text.token"),
        (r"positional_embedding", "text.position"),
        (
            r"transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)",
            r"text.blocks.\1.norm\2.\3",
        ),
        (
            r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)",
            r"text.blocks.\1.attn.qkv.\2",
        ),
        (
            r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)",
            r"text.blocks.\1.attn.o.\2",
        ),
        (
            r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)",
            r"text.blocks.\1.mlp.up.\2",
        ),
        (
            r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)",
            r"text.blocks.\1.mlp.down.\2",
        ),
        (r"ln_final\.(weight|bias)", r"text.norm.\1"),
        (r"text_projection", "text.proj"),
        (r"logit_scale", None),  # VLAForge's cosine has its own fixed scale of 100
    ),
    "hf_clip": (
        (r"(?:vision_model\.)?embeddings\.patch_embedding\.weight", "patch.weight"),
        (r"(?:vision_model\.)?embeddings\.class_embedding", "cls"),
        (r"(?:vision_model\.)?embeddings\.position_embedding\.weight", "position"),
        (r"(?:vision_model\.)?embeddings\.position_ids", None),
        (r"(?:vision_model\.)?pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),
        (r"(?:vision_model\.)?post_layernorm\.(weight|bias)", r"norm.\1"),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)",
            _B + r"norm\2.\3",
        ),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)",
            _B + r"attn.\2.\3",
        ),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)",
            _B + r"attn.o.\2",
        ),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)",
            _B + r"mlp.up.\2",
        ),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.fc2\.(weight|bias)",
            _B + r"mlp.down.\2",
        ),
        (r"visual_projection\.weight", "proj.T"),  # transposed on load
        (
            r"(?:text_model|text_projection)\..*",
            None,
        ),  # only the image tower is read from this layout
        (r"logit_scale", None),
    ),
    # timm's names, and those of `timm_towers`' blocks.
    "timm": (
        (r"cls_token", "cls"),
        (r"reg_token", "registers"),
        (r"pos_embed", "position"),
        (r"patch_embed\.proj\.(weight|bias)", r"patch.\1"),
        (r"norm_pre\.(weight|bias)", r"norm_pre.\1"),
        # Weights for a mean over the patches have their last norm after it.
        (r"(?:fc_)?norm\.(weight|bias)", r"norm.\1"),
        (r"attn_pool\.(.+)", r"pool.\1"),
        (r"rope\.freqs", "rotary"),
        (r"blocks\.(\d+)\.norm([12])\.(weight|bias)", _B + r"norm\2.\3"),
        (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", _B + r"attn.qkv.\2"),  # split on load
        (r"blocks\.(\d+)\.attn\.([qv])_bias", _B + r"attn.\2.bias"),
        (r"blocks\.(\d+)\.attn\.([qkv])(?:_proj)?\.(weight|bias)", _B + r"attn.\2.\3"),
        (r"blocks\.(\d+)\.attn\.(?:proj|o)\.(weight|bias)", _B + r"attn.o.\2"),
        (r"blocks\.(\d+)\.attn\.(q_norm|k_norm|norm)\.(weight|bias)", _B + r"attn.\2.\3"),
        (r"blocks\.(\d+)\.(?:ls|scale)([12])\.gamma", _B + r"scale\2"),
        (r"blocks\.(\d+)\.gamma_([12])", _B + r"scale\2"),
        (r"blocks\.(\d+)\.mlp\.(?:fc1_g|gate)\.(weight|bias)", _B + r"mlp.gate.\2"),
        (r"blocks\.(\d+)\.mlp\.(?:fc1|fc1_x|up)\.(weight|bias)", _B + r"mlp.up.\2"),
        (r"blocks\.(\d+)\.mlp\.norm\.(weight|bias)", _B + r"mlp.norm.\2"),
        (r"blocks\.(\d+)\.mlp\.(?:fc2|down)\.(weight|bias)", _B + r"mlp.down.\2"),
        (r"head\..+|mask_token|blocks\.\d+\.attn\.k_bias|rope\.(?!freqs).+", None),
    ),
}
# A file of timm whose MLPs pack gate and input: split on load.
KEY_TABLE["timm_gated"] = (
    (r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", _B + r"mlp.gate_up.\2"),
    *KEY_TABLE["timm"],
)


def stable_name(key: str, layout: str) -> str | None:
    """Our stable name of the library key `key`, None for a key that is dropped on purpose.

    Raises:
        WeightsError: `key` is in no row of `KEY_TABLE[layout]`.
    """
    for pattern, name in KEY_TABLE[layout]:
        match = re.fullmatch(pattern, key)
        if match:
            return None if name is None else match.expand(name)
    raise WeightsError(
        f"unknown key {key!r} in a {layout} tower; if the library renamed its modules, add the new name to KEY_TABLE"
    )


def to_stable(state: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """A library state dict under our stable names; stacked projections (q/k/v, gate/up) are split into views."""
    result: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        name = stable_name(key, layout)
        if name is None:
            continue
        stem, _, kind = name.rpartition(".")
        if name.startswith("blocks.") and stem.endswith("attn.qkv"):
            parts = dict(zip("qkv", tensor.chunk(3)))
            result |= {f"{stem[:-3]}{role}.{kind}": part for role, part in parts.items()}
        elif stem.endswith("mlp.gate_up"):
            gate, up = tensor.chunk(2)
            result |= {f"{stem[:-7]}gate.{kind}": gate, f"{stem[:-7]}up.{kind}": up}
        elif name == "proj.T":
            result["proj"] = tensor.T
        elif name in ("cls", "position", "registers"):
            result[name] = tensor.reshape(-1) if name == "cls" else tensor.reshape(-1, tensor.shape[-1])
        else:
            result[name] = tensor
    return result


# ------------------------------------------------------------------------------------------------ blocks
class Block(NamedTuple):
    """One transformer block by role; `q`, `k`, `v`, `o` may be adapted linears.

    q_norm, k_norm, o_norm: norms of each head's queries and keys and of what `o` takes, where a timm tower has them.
    """

    norm1: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    scale1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    o_norm: nn.Module | None = None


def _find(layer: nn.Module, role: str) -> tuple[str, nn.Module]:
    for path in _LAYER_ATTRIBUTES[role]:
        module = layer
        for name in path.split("."):
            module = getattr(module, name, None)
            if module is None:
                break
        else:
            return path, module
    raise WeightsError(
        f"a {type(layer).__name__} has none of {_LAYER_ATTRIBUTES[role]} for the role {role!r}; "
        "the library renamed its modules: add the new name to backbones._LAYER_ATTRIBUTES"
    )


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(-3, -2).flatten(-2)


class Rotation(NamedTuple):
    """Rotary positions of the patches: sin and cos (N, d) or (heads, N, d); half: the halves of a head turn together,
    else neighbouring channels do."""

    sin: torch.Tensor
    cos: torch.Tensor
    half: bool


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Turn the last N of x (B, heads, P + N, d), the patches, by their positions; the type of x stays."""
    prefix = x.shape[-2] - by.sin.shape[-2]
    patches = x[..., prefix:, :]
    if by.half:
        first, second = patches.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
    else:
        across = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    turned = patches * by.cos + across * by.sin
    return torch.cat([x[..., :prefix, :], turned.to(x.dtype)], dim=-2)


# Tokens (B, N, D) and their rotary positions -> the same tokens after a block.
Step = Callable[[torch.Tensor, Rotation | None], torch.Tensor]


def run_block(block: Block, x: torch.Tensor, rotation: Rotation | None = None, *, heads: int) -> torch.Tensor:
    """One pre-norm block on tokens x (B, N, D) with fused attention; the same shape. rotation: of rotary positions."""
    h = block.norm1(x)
    q, k, v = (split_heads(project(h), heads) for project in (block.q, block.k, block.v))  # (B, heads, N, d)
    q, k = _placed(q, block.q_norm, rotation), _placed(k, block.k_norm, rotation)
    return finish_block(block, x, F.scaled_dot_product_attention(q, k, v))


def _placed(x: torch.Tensor, norm: nn.Module | None, rotation: Rotation | None) -> torch.Tensor:
    """Queries or keys (B, heads, N, d), normed and turned where the tower does so."""
    if norm is not None:
        x = norm(x)
    if rotation is not None:
        x = rotate(x, rotation)
    return x


def finish_block(block: Block, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The rest of a block after its attention: x (B, N, D), attended (B, heads, N, d) -> (B, N, D)."""
    joined = merge_heads(attended)
    if block.o_norm is not None:
        joined = block.o_norm(joined)
    x = x + block.scale1(block.o(joined))
    return x + block.scale2(block.mlp(block.norm2(x)))


class SplitAttention(nn.Module):
    """Holds q, k, v, o as four linears in place of torch's packed MultiheadAttention, so that adapters find them."""

    def __init__(self, packed: nn.MultiheadAttention):
        super().__init__()
        width = packed.embed_dim
        device, dtype = packed.in_proj_weight.device, packed.in_proj_weight.dtype
        for role in ROLES:
            setattr(self, role, nn.Linear(width, width, device=device, dtype=dtype))
        with torch.no_grad():
            for role, weight, bias in zip("qkv", packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3)):
                getattr(self, role).weight.copy_(weight)
                getattr(self, role).bias.copy_(bias)
            self.o.weight.copy_(packed.out_proj.weight)
            self.o.bias.copy_(packed.out_proj.bias)


# ------------------------------------------------------------------------------------------------ towers
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
        for layer in self.layers:
            parts = [_find(layer, role)[1] for role in _LAYER_ATTRIBUTES]
            if self.config.kind == "timm":
                parts += [getattr(layer.attn, name, None) for name in ("q_norm", "k_norm", "norm")]
            yield Block(*parts)

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

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The tower's last LayerNorm."""
        return self.last_norm(x)

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
        q = _placed(q, block.q_norm, None)  # the class token has no place
        k = _placed(k, block.k_norm, self._last_rotation(last_input.shape[1] - self.prefix))
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
            elif _is_lora(module):
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

    matrices: what its image blocks' matrices are held in, if not `dtype` (see `fastpath.narrow`).
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


# ------------------------------------------------------------------------------------------------ adapters
def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "set_adapter")


class EffortLinear(nn.Module):
    """A frozen linear whose residual singular part is trained (Effort; QTFP's adaptation).

    W = U S V^T. The leading rank-(n - r) part stays frozen, the trailing rank-r part (U_r, S_r, V_r) is trained. Kept as
    W x - (residual at the start) x + (U_r S_r V_r^T) x, so that one frozen W serves several adapters and no SVD is
    needed to load one: the starting residual is stored beside the trained factors.
    """

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.factors = nn.ModuleDict()
        self.active: str | None = None

    def add(self, name: str, rank: int, *, decompose: bool = True) -> None:
        """Add adapter `name`: trained u (out, r), s (r), v (r, in) and their frozen starting values."""
        weight = self.base.weight
        out, inside = weight.shape
        if decompose and weight.device.type != "meta":
            u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
            u, s, vh = u[:, -rank:], s[-rank:], vh[-rank:]
        else:
            u, s, vh = (weight.new_zeros(shape) for shape in ((out, rank), (rank,), (rank, inside)))
        factors = nn.ParameterDict(
            {
                "u": nn.Parameter(u.clone()),
                "s": nn.Parameter(s.clone()),
                "v": nn.Parameter(vh.clone()),
            }
        )
        for key, value in {"u0": u, "s0": s, "v0": vh}.items():
            factors[key] = nn.Parameter(value.clone(), requires_grad=False)
        self.factors[name] = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.active is None:
            return y
        f = self.factors[self.active]
        trained = F.linear(F.linear(x, f["v"]) * f["s"], f["u"])
        return y + (trained - F.linear(F.linear(x, f["v0"]) * f["s0"], f["u0"]))


def add_adapter(tower: Tower, name: str, config: AdapterConfig, *, decompose: bool = True) -> None:
    """Give `tower` the adapter `name`; what trains afterwards is that alone (`full`: the tower, `norm`: its LayerNorms).

    decompose: False skips Effort's decomposition when its factors are about to be loaded from a file.
    """
    if not any(_is_lora(m) or isinstance(m, EffortLinear) for m in tower.modules()):
        tower.requires_grad_(False)
        # All that its file holds (DINOv2's mask token is unused), or the image part's LayerNorms.
        for key, parameter in tower_parameters(tower).items():
            if config.kind == "full" or (config.kind == "norm" and is_norm(key)):
                parameter.requires_grad_(True)
    if config.kind in ("none", "norm", "full"):
        return
    chosen = {key: path for key, path in tower.projection_names().items() if key[1] in config.projections}
    if config.kind == "lora":
        _add_lora(tower, name, config, sorted(chosen.values()))
    else:
        for path in chosen.values():
            module = tower.get_submodule(path)
            if not isinstance(module, EffortLinear):
                parent, _, child = path.rpartition(".")
                module = EffortLinear(module)
                setattr(tower.get_submodule(parent), child, module)
            module.add(name, config.rank, decompose=decompose)
    tower._active = "?"  # peft switched something on; make the next `use` go through
    tower.use(name)


def is_text(key: str) -> bool:
    """Whether a tower's stable key belongs to the text tower or the projections into the joint space."""
    return key.startswith("text.") or key == "proj"


_NORM = r"(blocks\.\d+\.(norm[12]|attn\.(q_norm|k_norm|norm)|mlp\.norm)|norm|norm_pre|pool\.norm)\.(weight|bias)"


def is_norm(key: str) -> bool:
    """Whether a stable key names a LayerNorm's weight or bias in the image part of a tower."""
    return re.fullmatch(_NORM, key) is not None


def _add_lora(tower: Tower, name: str, config: AdapterConfig, paths: list[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    frozen = {p for p in tower.parameters() if not p.requires_grad}
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias="none",
        target_modules=paths,
    )
    with warnings.catch_warnings():  # several adapters on one tower is what is wanted here
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(lora, tower, adapter_name=name)
    if config.shared:
        for block in tower.blocks():
            for role in ("k", "v"):
                getattr(block, role).lora_A[name] = block.q.lora_A[name]
    for parameter in frozen:  # peft touches requires_grad of other adapters; they stay as they were
        parameter.requires_grad_(False)


def _shares(block: Block, module: nn.Module, name: str) -> bool:
    """Whether a projection's LoRA has q's down projection."""
    return _is_lora(block.q) and name in block.q.lora_A and module.lora_A[name] is block.q.lora_A[name]


def adapter_state(tower: Tower, name: str) -> dict[str, torch.Tensor]:
    """The parameters of adapter `name` under stable keys: `blocks.3.attn.q.lora_A`, `blocks.3.attn.q.effort_u0`."""
    state: dict[str, torch.Tensor] = {}
    for index, block in enumerate(tower.blocks()):
        for role in ROLES:
            module, stem = getattr(block, role), f"blocks.{index}.attn.{role}"
            if isinstance(module, EffortLinear) and name in module.factors:
                state |= {f"{stem}.effort_{key}": value for key, value in module.factors[name].items()}
            elif _is_lora(module) and name in module.lora_A:
                if not (role in "kv" and _shares(block, module, name)):
                    state[f"{stem}.lora_A"] = module.lora_A[name].weight
                state[f"{stem}.lora_B"] = module.lora_B[name].weight
    return state


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
