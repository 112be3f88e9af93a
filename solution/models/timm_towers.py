"""Vision transformers of timm by name, their blocks laid out by role, as every other tower's.

Takes a `TimmArch`; returns timm's own model whose blocks are `RoleBlock`s on the library's weights: q, k, v and o apart, so
that adapters find them. Patches, positions, rotary embedding and pooling stay the library's. Parity is a test.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from solution.config import KINDS, STATISTICS, MemberConfig, TimmArch, TowerConfig, UsageError
from solution.errors import WeightsError
from solution.models.blocks import Rotation

# Where a part lives inside a block of timm; a name that the library gives up gets its successor here.
_PARTS = {
    "norm1": ("norm1",),
    "packed": ("attn.qkv",),
    "q": ("attn.q_proj",),
    "k": ("attn.k_proj",),
    "v": ("attn.v_proj",),
    "o": ("attn.proj",),
    "q_bias": ("attn.q_bias",),
    "v_bias": ("attn.v_bias",),
    "q_norm": ("attn.q_norm",),
    "k_norm": ("attn.k_norm",),
    "o_norm": ("attn.norm",),
    "scale1": ("ls1.gamma", "gamma_1"),
    "norm2": ("norm2",),
    "gate": ("mlp.fc1_g",),
    "up": ("mlp.fc1_x", "mlp.fc1"),
    "act": ("mlp.act",),
    "mlp_norm": ("mlp.norm",),
    "down": ("mlp.fc2",),
    "scale2": ("ls2.gamma", "gamma_2"),
}


# ------------------------------------------------------------------------------------------------ by role
class Scale(nn.Module):
    """LayerScale: a factor for each channel."""

    def __init__(self, gamma: nn.Parameter):
        super().__init__()
        self.gamma = gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return x * self.gamma


class RoleAttention(nn.Module):
    """The projections of one block. q_norm, k_norm: of each head's queries and keys. norm: of what `o` takes."""

    def __init__(self, q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Linear, norms: dict[str, nn.Module]):
        super().__init__()
        self.q, self.k, self.v, self.o = q, k, v, o
        for name, norm in norms.items():
            setattr(self, name, norm)


class RoleMlp(nn.Module):
    """down(norm(act(up(x)))), or down(norm(act(gate(x)) * up(x)))."""

    def __init__(self, gate: nn.Linear | None, up: nn.Linear, act: nn.Module, norm: nn.Module | None, down: nn.Linear):
        super().__init__()
        if gate is not None:
            self.gate = gate
        self.up, self.act = up, act
        self.norm = nn.Identity() if norm is None else norm
        self.down = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        gate = getattr(self, "gate", None)
        h = self.act(self.up(x)) if gate is None else self.act(gate(x)) * self.up(x)
        return self.down(self.norm(h))


class RoleBlock(nn.Module):
    """One pre-norm block by role; `towers.run_block` computes it."""

    def __init__(self, norm1: nn.Module, attn: RoleAttention, norm2: nn.Module, mlp: RoleMlp, scales: list[nn.Module]):
        super().__init__()
        self.norm1, self.attn, self.scale1 = norm1, attn, scales[0]
        self.norm2, self.mlp, self.scale2 = norm2, mlp, scales[1]


def _part(block: nn.Module, name: str) -> nn.Module | nn.Parameter | None:
    """The part `name` of a block of timm; None where it has none."""
    for path in _PARTS[name]:
        found: object = block
        for step in path.split("."):
            found = getattr(found, step, None)
            if found is None:
                break
        else:
            return None if isinstance(found, nn.Identity) else found
    return None


def _needed(block: nn.Module, name: str) -> nn.Module:
    part = _part(block, name)
    if part is None:
        raise WeightsError(
            f"a {type(block).__name__} of timm has none of {_PARTS[name]} for the role {name!r}; "
            "the library renamed its modules: add the new name to timm_towers._PARTS"
        )
    return part


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer of these values, without drawing random ones first."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _projections(block: nn.Module) -> list[nn.Linear]:
    """q, k and v of a block, whether the library packs them or not."""
    packed = _part(block, "packed")
    if packed is None:
        return [_needed(block, role) for role in "qkv"]
    if packed.bias is not None:
        biases = packed.bias.chunk(3)
    else:  # EVA: q and v alone have one
        biases = (_part(block, "q_bias"), None, _part(block, "v_bias"))
    return [_linear(weight, bias) for weight, bias in zip(packed.weight.chunk(3), biases, strict=True)]


def _mlp(block: nn.Module) -> RoleMlp:
    gate, up, down = _part(block, "gate"), _needed(block, "up"), _needed(block, "down")
    if gate is None and up.out_features == 2 * down.in_features:  # packed, the gate first
        biases = (None, None) if up.bias is None else up.bias.chunk(2)
        gate, up = (_linear(w, b) for w, b in zip(up.weight.chunk(2), biases, strict=True))
    return RoleMlp(gate, up, _needed(block, "act"), _part(block, "mlp_norm"), down)


def by_role(block: nn.Module) -> RoleBlock:
    """A block of timm laid out by role.

    Raises:
        WeightsError: a block of another shape than pre-norm attention and MLP, one after the other.
    """
    from timm.layers import Attention, AttentionRope
    from timm.models.eva import EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block

    attention = getattr(block, "attn", None)
    plain = isinstance(block, Block | EvaBlock) and isinstance(attention, Attention | AttentionRope | EvaAttention)
    if not plain or getattr(attention, "gate", None) is not None or getattr(attention, "num_kv_groups", 1) != 1:
        raise WeightsError(
            f"a block {type(block).__name__} with {type(attention).__name__}: expected timm's pre-norm Block or EvaBlock "
            "with plain attention; name another model"
        )
    norms = {"q_norm": _part(block, "q_norm"), "k_norm": _part(block, "k_norm"), "norm": _part(block, "o_norm")}
    attn = RoleAttention(*_projections(block), _needed(block, "o"), {n: m for n, m in norms.items() if m is not None})
    gammas = [_part(block, name) for name in ("scale1", "scale2")]
    scales = [nn.Identity() if gamma is None else Scale(gamma) for gamma in gammas]
    return RoleBlock(_needed(block, "norm1"), attn, _needed(block, "norm2"), _mlp(block), scales)


# ------------------------------------------------------------------------------------------------ rotary positions
def rotations(model: nn.Module, embedding: torch.Tensor | None, layers: int) -> list[Rotation | None]:
    """What turns each block's queries and keys, from timm's embedding (N, 2 d), or (layers, heads, N, 2 d)."""
    if embedding is None:
        return [None] * layers
    half = bool(getattr(model.rope, "rotate_half", False))
    each = embedding if getattr(model, "rope_mixed", False) else [embedding] * layers
    return [Rotation(*e.chunk(2, dim=-1), half) for e in each]


# ------------------------------------------------------------------------------------------------ models
def build_model(arch: TimmArch) -> nn.Module:
    """timm's model with random weights, blocks by role, on the default device.

    Raises:
        WeightsError: no such model in this timm, no vision transformer, or another geometry than `arch` says.
    """
    pool = {"global_pool": "map"} if arch.pool == "attention" else {"global_pool": ""}
    model = _create(
        arch.model,
        img_size=arch.image_side,
        patch_size=arch.patch,
        embed_dim=arch.width,
        depth=arch.layers,
        num_heads=arch.heads,
        mlp_ratio=arch.mlp_ratio,
        **pool,
    )
    found = _by_role(arch.model, model, arch.image_side)
    for name, value in (("prefix", found.prefix), ("gated", found.gated), ("pool", found.pool)):
        expected = getattr(arch, name)
        if value != expected and not (name == "pool" and "attention" not in (value, expected)):
            raise WeightsError(f"timm's {arch.model} has {name} {value}, the configuration says {expected}")
    return model


def _create(name: str, **options) -> nn.Module:
    """timm's model `name`, without a classifier, at any side of the picture."""
    import timm

    if not timm.is_model(name):
        raise WeightsError(f"timm {timm.__version__} has no model {name!r}; timm.list_models('*vit*') lists them")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **options)
    except TypeError as error:
        raise WeightsError(
            f"timm's {name} is no vision transformer with blocks ({error}); name another model"
        ) from None
    if not (isinstance(getattr(model, "blocks", None), nn.Module) and hasattr(model, "num_prefix_tokens")):
        raise WeightsError(f"timm's {name} is a {type(model).__name__}; expected a vision transformer with blocks")
    return model


def _by_role(name: str, model: nn.Module, side: int) -> TimmArch:
    """Lay the blocks of a model out by role; its geometry."""
    first = model.blocks[0]
    model.blocks = nn.ModuleList(by_role(block) for block in model.blocks)
    mlp, width = model.blocks[0].mlp, model.embed_dim
    ratio = mlp.up.out_features / width
    if int(ratio * width) < mlp.up.out_features:  # timm rounds down
        ratio = math.nextafter(ratio, math.inf)
    return TimmArch(
        model=name,
        width=width,
        layers=len(model.blocks),
        heads=first.attn.num_heads,
        mlp_ratio=ratio,
        gated=hasattr(mlp, "gate"),
        patch=model.patch_embed.patch_size[0],
        image_side=side,
        prefix=model.num_prefix_tokens,
        pool="attention" if model.attn_pool is not None else "token" if model.cls_token is not None else "mean",
    )


def named_tower(name: str) -> TowerConfig:
    """The tower of a pre-trained model of timm, such as `vit_base_patch16_dinov3.lvd1689m`: its geometry, repository,
    statistics and licence as the library has them, learned positions of the side that it was pre-trained at; nothing is
    downloaded.

    Raises:
        UsageError: no such model, or one without weights on the Hub. WeightsError: no vision transformer that fits.
    """
    import timm

    given = timm.models.get_pretrained_cfg(name) if name in timm.list_pretrained() else None
    if given is None or not given.hf_hub_id:
        raise UsageError(
            f"{name}: timm {timm.__version__} has no such pre-trained model; expected a name with its tag, such as "
            "vit_base_patch16_dinov3.lvd1689m, of those that timm.list_pretrained() gives"
        )
    side = given.input_size[-1]
    with torch.device("meta"):
        geometry = _by_role(given.architecture, _create(given.architecture, img_size=side), side)
    statistics = [key for key, known in STATISTICS.items() if known == (tuple(given.mean), tuple(given.std))]
    if not statistics:
        raise UsageError(f"{name}: mean {given.mean}, deviation {given.std}; known: {', '.join(STATISTICS)}")
    return TowerConfig(
        name.replace(".", "-"),
        "timm",
        geometry,
        source=given.hf_hub_id,
        statistics=statistics[0],
        licence=given.license or "",
    )


def on_tower(config: MemberConfig, tower: TowerConfig) -> MemberConfig:
    """The member on another tower; its view shrinks or grows to the nearest multiple of that tower's patch.

    Raises:
        UsageError: a member that needs a text encoder.
    """
    if KINDS[config.kind].text:
        raise UsageError(f"{config.name} needs a tower with its text encoder; a vision transformer of timm has none")
    view, patch = config.view, tower.arch.patch
    if config.clip is not None:  # both towers see the same picture
        patch = math.lcm(patch, config.clip.arch.patch)
    side = max(1, round(view.side / patch)) * patch
    view = replace(view, side=side, resize=max(side, round(view.resize * side / view.side)))
    return replace(config, tower=tower, view=view)
