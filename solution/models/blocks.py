"""Transformer blocks by role, whatever library they are of: how their parts are found and computed, and what stands in them.

Takes a library's layer module; gives `Block`. Tokens are (B, N, D), heads (B, heads, N, D / heads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from solution.errors import WeightsError

ROLES = ("q", "k", "v", "o")
MOST_KEYS = 1024  # of plain attention, which holds a score for every query and key
# Where a role lives inside a library's layer. transformers 5 renamed the DINOv2 tree, so each role lists every name it
# has had; a new library name is one more entry here and nothing else.
LAYER_ATTRIBUTES = {
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
    for path in LAYER_ATTRIBUTES[role]:
        module = layer
        for name in path.split("."):
            module = getattr(module, name, None)
            if module is None:
                break
        else:
            return path, module
    raise WeightsError(
        f"a {type(layer).__name__} has none of {LAYER_ATTRIBUTES[role]} for the role {role!r}; "
        "the library renamed its modules: add the new name to blocks.LAYER_ATTRIBUTES"
    )


def block_of(layer: nn.Module) -> Block:
    """A library's layer by role, as it is now (adapters in place).

    Raises:
        WeightsError: a layer of another layout.
    """
    attention = getattr(layer, "attn", None)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm")]
    return Block(*(_find(layer, role)[1] for role in LAYER_ATTRIBUTES), *norms)


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


# Tokens (B, N, D) and their rotary positions -> the same tokens after a block, or only `first` of them (see `run_block`).
Step = Callable[..., torch.Tensor]


def run_block(
    block: Block, x: torch.Tensor, rotation: Rotation | None = None, *, heads: int, first: int | None = None
) -> torch.Tensor:
    """One pre-norm block on tokens x (B, N, D) with fused attention; the same shape. rotation: of rotary positions.

    first: compute these first tokens alone, which have no place to be turned by; (B, first, D).
    """
    h = block.norm1(x)
    q = split_heads(block.q(h[:, :first]), heads)  # (B, heads, N, d)
    k, v = (split_heads(project(h), heads) for project in (block.k, block.v))
    q, k = placed(q, block.q_norm, rotation if first is None else None), placed(k, block.k_norm, rotation)
    return finish_block(block, x[:, :first], attend(q, k, v))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v: (B, heads, N, d) with keys and values (B, heads, M, d) -> (B, heads, N, d).

    torch's fused attention, but for scoring in bfloat16 on a CPU: there two plain products and a softmax are faster.
    """
    scoring = q.dtype == torch.bfloat16 and q.device.type == "cpu" and not torch.is_grad_enabled()
    if not scoring or k.shape[-2] > MOST_KEYS:
        return F.scaled_dot_product_attention(q, k, v)
    # Scores are held in 8 bits. What all keys have in common raises every score of a query alike, which softmax does not
    # see: without it scores are small, and so is their rounding (with it, logits departed from float32 twice as far).
    k = k - k.mean(dim=-2, keepdim=True)
    queries, keys, values = (x.flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
    weights = torch.bmm(queries, keys.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(weights, values).unflatten(0, q.shape[:2])


def placed(x: torch.Tensor, norm: nn.Module | None, rotation: Rotation | None) -> torch.Tensor:
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


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a linear with peft's LoRA, or answers as one."""
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
