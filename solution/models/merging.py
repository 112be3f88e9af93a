"""Members made fast for scoring: adapters merged into their towers, the towers' blocks in half precision and computed
from packed weights, compiled on demand.

Takes loaded members in float32 and changes them in place; they take and return what they did before. What is measured
here was measured on an AMD EPYC (Zen 5) core, compact towers at 168 px.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from solution.errors import WeightsError
from solution.models.blocks import Block, EffortLinear, Rotation, Step, attend, merge_heads, rotate
from solution.models.member import Member
from solution.models.towers import Tower, TowerOutput

# Merging saves 13 to 15 % of a forward at the compact size and 2 to 5 % at the giant size (batches of 1 to 16). A tower
# that several adapters share keeps a merged copy of its four projections for each: 14 MB for compact, 755 MB for giant.
# So giant adapters stay unmerged on CPU, where memory is short, and are merged on a GPU.
MERGED_BYTES = {"cpu": 1 << 28, "cuda": 8 << 30}


def towers_of(members: Iterable[Member]) -> list[Tower]:
    """Every tower of these members, once."""
    found: dict[int, Tower] = {}
    for member in members:
        for part in member.children():
            if isinstance(part, Tower):
                found[id(part)] = part
    return list(found.values())


# ------------------------------------------------------------------------------------------------ merging
class MergedLinear(nn.Module):
    """A projection of a shared tower with every adapter already added to it: one weight each, chosen by `Tower.use`.

    It answers to `Tower.use` as a LoRA layer does (`lora_A` names its adapters).
    """

    def __init__(self, base: nn.Linear, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.ParameterDict({n: nn.Parameter(w, requires_grad=False) for n, w in weights.items()})
        self.active: str | None = None

    def enable_adapters(self, enabled: bool) -> None:
        """Without: the plain projection."""
        if not enabled:
            self.active = None

    def set_adapter(self, name: str) -> None:
        """Use the weight of this adapter."""
        self.active = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        weight = self.base.weight if self.active is None else self.lora_A[self.active]
        return F.linear(x, weight, self.base.bias)


def merge_adapters(members: Mapping[str, Member], dtype: torch.dtype) -> bool:
    """Merge the members' adapters into their towers' projections; False where that takes too much memory.

    An adapter that is alone on its tower is added to the weights themselves. Effort is always merged: computed apart,
    its trained part and its start cancel, and half precision has not the digits for that.
    dtype: what the merged copies will be held in.
    """
    complete = True
    for tower in towers_of(members.values()):
        users = [m for m in members.values() if m.tower is tower]
        plain = any(m.adapter is None for m in users) or len(users) < _uses(tower, members)
        names = [m.adapter for m in users if m.adapter is not None]
        if not names:
            continue
        projections = [(path, tower.get_submodule(path)) for path in tower.projection_names().values()]
        projections = [(p, m) for p, m in projections if _adapters(m)]
        copies = 0 if len(names) == 1 and not plain else len(names)
        if _base(projections[0][1]).weight.dtype != torch.float32:
            complete = False  # read in half precision: no digits to add to
            continue
        extra = copies * sum(_base(m).weight.numel() for _, m in projections)
        effort = any(isinstance(m, EffortLinear) for _, m in projections)
        limit = MERGED_BYTES[tower.mean.device.type]
        if extra * dtype.itemsize > limit and not effort:
            complete = False
            continue
        for path, module in projections:
            parent, _, child = path.rpartition(".")
            merged = _merged(module, names, keep_plain=bool(copies))
            setattr(tower.get_submodule(parent), child, merged)
        tower._active = "?"  # the next `use` goes through the new modules
    return complete


def _uses(tower: Tower, members: Mapping[str, Member]) -> int:
    """How many members hold the tower in any part (fusion holds a second one)."""
    return sum(any(p is tower for p in m.children()) for m in members.values())


def _adapters(module: nn.Module) -> list[str]:
    if isinstance(module, EffortLinear):
        return list(module.factors)
    return list(getattr(module, "lora_A", ()))


def _base(module: nn.Module) -> nn.Linear:
    return module.base if isinstance(module, EffortLinear) else module.base_layer


@torch.no_grad()
def _merged(module: nn.Module, names: list[str], *, keep_plain: bool) -> nn.Module:
    base = _base(module)
    weights = {name: base.weight + _delta(module, name) for name in names if name in _adapters(module)}
    if keep_plain:
        return MergedLinear(base, weights)
    (base.weight.data,) = weights.values()
    return base


def _delta(module: nn.Module, name: str) -> torch.Tensor:
    """What adapter `name` adds to the projection's weight, (out, in)."""
    if not isinstance(module, EffortLinear):
        return module.get_delta_weight(name)
    f = module.factors[name]
    return (f["u"] * f["s"]) @ f["v"] - (f["u0"] * f["s0"]) @ f["v0"]


# ------------------------------------------------------------------------------------------------ half precision
def narrow(members: Iterable[Member], dtype: torch.dtype) -> None:
    """Hold the matrices of the towers' image blocks in `dtype` and compute their products in it, all else in float32.

    The residual stream, LayerNorms, heads and everything a member adds stay float32: with the residual stream in bf16
    too, 1.9 % instead of 1.0 % of the levels of a linear probe changed, at the same speed. Casting weights once instead
    of autocast's at every call makes the forward 1.17 times as fast. LayerNorms hand over `dtype`, so that an input is
    cast once for its three projections.
    """

    def hand_over(module: nn.Module, given: tuple, output: torch.Tensor):
        return output.to(dtype)

    def take_in(module: nn.Module, given: tuple):
        return tuple(x.to(dtype) for x in given)

    def widen_in(module: nn.Module, given: tuple):
        return tuple(x.float() for x in given)

    def widen(module: nn.Module, given: tuple, output: torch.Tensor):
        return output.float()

    for tower in towers_of(members):
        for block in tower.blocks():
            block.norm1.register_forward_hook(hand_over)
            block.norm2.register_forward_hook(hand_over)
            for norm in (block.q_norm, block.k_norm, block.o_norm, getattr(block.mlp, "norm", None)):
                if norm is not None:  # within the block: narrow in, narrow out
                    norm.register_forward_pre_hook(widen_in)
                    norm.register_forward_hook(hand_over)
        for module in tower.matrices():
            module.to(dtype)
            if isinstance(module, nn.Conv2d):  # the patch projection
                module.register_forward_pre_hook(take_in)
                module.register_forward_hook(widen)


# ------------------------------------------------------------------------------------------------ packed blocks
# Compiled: two views of a run's batches, and what out-of-memory halves them to.
MOST_SHAPES = 4


class Packed(NamedTuple):
    """A block's tensors as `packed_block` takes them: one matrix for q, k and v, one for an MLP's gate and up.

    qkv: (3 D, D). up: (hidden, D), or (2 hidden, D) with the gate first. scale1, scale2: (D,), None without LayerScale.
    Biases are None where a tower has none; o_norm and mlp_norm are those of what `o` and `down` take, None likewise.
    """

    norm1: torch.Tensor
    norm1_bias: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    scale1: torch.Tensor | None
    norm2: torch.Tensor
    norm2_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    scale2: torch.Tensor | None
    o_norm: torch.Tensor | None = None
    o_norm_bias: torch.Tensor | None = None
    mlp_norm: torch.Tensor | None = None
    mlp_norm_bias: torch.Tensor | None = None


def packed_block(
    x: torch.Tensor,
    rotation: Rotation | None = None,
    *,
    w: Packed,
    heads: int,
    eps: float,
    activation: str,
    first: int | None = None,
) -> torch.Tensor:
    """One pre-norm block on tokens x (B, N, D) in float32; products in the type of the matrices, the sum in float32.

    activation: `gelu`, `gelu_tanh`, `quick_gelu`, or `silu` for a gated MLP. first: compute these
    first tokens alone, as `run_block` does. A function of tensors alone, so that compiling it once serves every block of a
    shape.
    """
    dtype, width = w.qkv.dtype, x.shape[-1:]
    h = F.layer_norm(x, width, w.norm1, w.norm1_bias, eps).to(dtype)
    if first is None:
        q, k, v = F.linear(h, w.qkv, w.qkv_bias).unflatten(-1, (3, heads, -1)).unbind(dim=2)  # (B, N, heads, d)
    else:
        of_q, of_kv = w.qkv.tensor_split(width)
        bias_q, bias_kv = (None, None) if w.qkv_bias is None else w.qkv_bias.tensor_split(width)
        q = F.linear(h[:, :first], of_q, bias_q).unflatten(-1, (heads, -1))
        k, v = F.linear(h, of_kv, bias_kv).unflatten(-1, (2, heads, -1)).unbind(dim=2)
        x = x[:, :first]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if rotation is not None:
        q, k = rotate(q, rotation) if first is None else q, rotate(k, rotation)
    attended = merge_heads(attend(q, k, v))
    if w.o_norm is not None:
        attended = F.layer_norm(attended.float(), w.o_norm.shape, w.o_norm, w.o_norm_bias, eps).to(dtype)
    x = _add(x, w.scale1, F.linear(attended, w.o, w.o_bias))
    h = F.layer_norm(x, width, w.norm2, w.norm2_bias, eps).to(dtype)
    h = F.linear(h, w.up, w.up_bias)
    if activation == "silu":
        gate, up = h.chunk(2, dim=-1)
        h = F.silu(gate) * up
    elif activation in ("gelu", "gelu_tanh"):
        h = F.gelu(h, approximate="none" if activation == "gelu" else "tanh")
    else:
        h = h * torch.sigmoid(1.702 * h)
    if w.mlp_norm is not None:
        h = F.layer_norm(h.float(), w.mlp_norm.shape, w.mlp_norm, w.mlp_norm_bias, eps).to(dtype)
    return _add(x, w.scale2, F.linear(h, w.down, w.down_bias))


def _add(x: torch.Tensor, scale: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    # One kernel instead of three, and y is widened on the way.
    return x + y if scale is None else torch.addcmul(x, scale, y)


def _first_of(step: Step) -> Step:
    """`step`, which computes all tokens, where the first ones are asked for."""

    def cut(x: torch.Tensor, rotation: Rotation | None = None, *, first: int | None = None) -> torch.Tensor:
        return step(x, rotation)[:, :first]

    return cut


class PackedTower(Tower):
    """A tower for scoring alone, on the modules of another one: whole forwards go through `packed_block`.

    Its modules' weights become views of the packed matrices, so that whatever goes through the blocks one by one finds
    what it did before, and no memory is held twice.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__(tower.config, tower.model)
        self.to(tower.mean.device)
        self._compiled: Callable[..., torch.Tensor] | None = None
        self._shapes: set[torch.Size] = set()
        self._active = tower._active
        self._positions: dict[tuple[int, int], torch.Tensor] = {}
        blocks = list(self.blocks())
        self._last_norm = [blocks[-1].norm1]  # in a list: it has its place in `model`
        self.eps, self.activation = blocks[0].norm1.eps, _activation(blocks[0].mlp)
        names = {n for b in blocks for role in "qkvo" for n in _merged_names(b, role)}
        shared = [_pack_mlp(block) for block in blocks]
        self.packed = {name: [_pack(b, name, mlp) for b, mlp in zip(blocks, shared)] for name in [None, *sorted(names)]}

    def compile(self, **options) -> None:
        """Compile the one block that all blocks are, for the first shapes that come; options: those of torch.compile."""
        self._compiled, self._shapes = torch.compile(packed_block, **options), set()

    def _runner(self, x: torch.Tensor) -> Callable[..., torch.Tensor]:
        """What computes blocks of tokens like x: compiled for as many shapes as MOST_SHAPES, else as it is written."""
        if self._compiled is None:
            return packed_block
        if x.shape not in self._shapes and len(self._shapes) == MOST_SHAPES:
            return packed_block
        self._shapes.add(x.shape)
        return self._compiled

    def place(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], list[Rotation | None]]:
        """As `Tower.place`, float32; the patches through one matrix product, positions interpolated once a size."""
        patch = self.config.arch.patch
        height, width = images.shape[-2:]
        grid = (height // patch, width // patch)
        if self.config.kind != "dinov2" or height % patch or width % patch:
            x, grid, rotations = super().place(images)
            return x.float(), grid, rotations
        if grid not in self._positions:
            self._positions[grid] = self._position(height, width)
        kernel = self.model.embeddings.patch_embeddings.projection
        pixels = self.normalize(images).to(kernel.weight.dtype)
        pieces = pixels.unflatten(-1, (grid[1], patch)).unflatten(-3, (grid[0], patch))
        pieces = pieces.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = F.linear(pieces, kernel.weight.flatten(1), kernel.bias)  # (B, N, D)
        cls_token = self.model.embeddings.cls_token.expand(len(x), -1, -1)
        placed = torch.cat([cls_token, x.float()], dim=1) + self._positions[grid]
        return placed, grid, [None] * self.config.arch.layers

    def _position(self, height: int, width: int) -> torch.Tensor:
        """(1, 1 + N, D) float32: the stored grid of positions at this size."""
        embeddings, patch = self.model.embeddings, self.config.arch.patch
        count = 1 + (height // patch) * (width // patch)
        # Read for its shape alone.
        tokens = embeddings.cls_token.expand(1, count, -1)
        return embeddings.interpolate_pos_encoding(tokens, height, width).float()

    def steps(self, x: torch.Tensor, adapter: str | None) -> Iterator[Step]:
        """As `Tower.steps`: `packed_block` with each block's tensors."""
        run = self._runner(x)
        whole = run is not packed_block  # compiled: one graph a shape, so its last block computes every token
        for weights in self.packed.get(adapter, self.packed[None]):
            step = functools.partial(run, w=weights, heads=self.heads, eps=self.eps, activation=self.activation)
            yield _first_of(step) if whole else step

    def read(
        self, x: torch.Tensor, last: torch.Tensor, grid: tuple[int, int], hidden: dict[int, torch.Tensor]
    ) -> TowerOutput:
        """As `Tower.read`; who listens to the last block's modules (maps.look) hears what it was given."""
        (norm,) = self._last_norm
        for listener in norm._forward_pre_hooks.values():
            listener(norm, (last,))
        return super().read(x, last, grid, hidden)


def pack(members: Iterable[Member]) -> list[PackedTower]:
    """Give members packed towers where all of a tower's adapters are merged; the towers that were packed.

    Last of all, after merging and narrowing: the weights are views from then on.
    """
    members = list(members)
    done: dict[int, PackedTower] = {}
    for tower in towers_of(members):
        adapted = any(_adapters(m) and _unmerged(m) for m in tower.modules())
        # Norms of single queries and keys have no packed form: such a tower stays as it is.
        if not adapted and all(block.q_norm is None for block in tower.blocks()):
            done[id(tower)] = PackedTower(tower)
    for member in members:
        for name, part in list(member.named_children()):
            if id(part) in done:
                setattr(member, name, done[id(part)])
    return list(done.values())


def _unmerged(module: nn.Module) -> bool:
    return not isinstance(module, MergedLinear)


def _merged_names(block: Block, role: str) -> list[str]:
    return _adapters(getattr(block, role))


def _matrix(module: nn.Module, name: str | None) -> nn.Parameter:
    """The weight of a projection under adapter `name`."""
    if not isinstance(module, MergedLinear):
        return module.weight
    own = name is not None and name in module.lora_A
    if own:
        return module.lora_A[name]
    return module.base.weight


def _bias(module: nn.Module) -> nn.Parameter | None:
    return module.base.bias if isinstance(module, MergedLinear) else module.bias


def _joined(parameters: list[nn.Parameter]) -> torch.Tensor:
    """These along their first dimension, as one tensor of which each becomes a view."""
    if len(parameters) == 1:
        return parameters[0].data
    joined = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined


def _joined_bias(layers: list[nn.Module]) -> torch.Tensor | None:
    """The layers' biases as one; None where none has one, zeros for one that has none beside others."""
    biases = [_bias(layer) for layer in layers]
    present = [b for b in biases if b is not None]
    if not present or len(present) == len(biases):
        return _joined(present) if present else None
    return torch.cat([present[0].data.new_zeros(len(present[0])) if b is None else b.data for b in biases])


def _pack(block: Block, name: str | None, mlp: tuple[torch.Tensor, ...]) -> Packed:
    projections = [block.q, block.k, block.v]
    qkv = _joined([_matrix(p, name) for p in projections])
    bias = _joined_bias(projections)
    o_bias = _bias(block.o)
    return Packed(
        block.norm1.weight.data,
        block.norm1.bias.data,
        qkv,
        bias,
        _matrix(block.o, name).data,
        None if o_bias is None else o_bias.data,
        _scale(block.scale1),
        block.norm2.weight.data,
        block.norm2.bias.data,
        *mlp,
        _scale(block.scale2),
        *_norm(block.o_norm),
        *_norm(getattr(block.mlp, "norm", None)),
    )


def _norm(module: nn.Module | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias of a LayerNorm, None for one that is not there."""
    if module is None or isinstance(module, nn.Identity):
        return None, None
    return module.weight.data, module.bias.data


def _scale(module: nn.Module) -> torch.Tensor | None:
    """(D,) of a LayerScale, None of what stands where there is none."""
    values = list(module.parameters())
    return values[0].data if values else None


def _pack_mlp(block: Block) -> tuple[torch.Tensor, ...]:
    """up, its bias, down, its bias."""
    linears = [m for m in block.mlp.modules() if isinstance(m, nn.Linear)]
    *ups, down = linears
    up, bias = _joined([m.weight for m in ups]), _joined_bias(ups)
    return up, bias, down.weight.data, None if down.bias is None else down.bias.data


def _activation(mlp: nn.Module) -> str:
    """What `packed_block` computes between an MLP's matrices.

    Raises:
        WeightsError: an MLP of a kind that no tower here has had.
    """
    linears = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    if linears[-1].in_features * 2 == sum(m.out_features for m in linears[:-1]):
        return "silu"
    kinds = {type(m).__name__ for m in mlp.modules()}
    if "QuickGELU" in kinds:
        return "quick_gelu"
    if "GELUTanh" in kinds or any(getattr(m, "approximate", "none") == "tanh" for m in mlp.modules()):
        return "gelu_tanh"
    exact = {"GELU", "GELUActivation"} & kinds
    if not exact or any(getattr(m, "approximate", "none") != "none" for m in mlp.modules()):
        raise WeightsError(f"an MLP of {sorted(kinds)}: merging knows no packed form")
    return "gelu"
