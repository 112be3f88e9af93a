"""How much a member computes for one picture, by arithmetic from its configuration.

Takes a `MemberConfig`; returns FLOP, two for each multiplication and addition of a matrix product, attention's two
products and the convolutions included. Norms, activations, softmax and resizing are left out: they are under one part
in a hundred. No library's counter is asked: what those count changes from release to release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from solution.config import ClipArch, Dinov2Arch, InferenceConfig, MemberConfig, TimmArch, TowerConfig


def scoring_flops(config: MemberConfig, *, adapters: bool = False) -> int:
    """FLOP of one picture that is scored: a forward for each of `config.inference`'s looks. adapters: see `member_flops`."""
    mirrored = 2 if config.inference.mirrored else 1
    sides = config.inference.sides or (config.view.side,)
    return mirrored * sum(member_flops(at_side(config, side), adapters=adapters) for side in sides)


def at_side(config: MemberConfig, side: int) -> MemberConfig:
    """The member whose view is of `side` px, looked at once."""
    view = replace(config.view, side=side, resize=max(side, config.view.resize))
    return replace(config, view=view, inference=InferenceConfig())


def member_flops(config: MemberConfig, *, adapters: bool = True) -> int:
    """FLOP of one picture through the member `config`, one forward at the view's side.

    adapters: whether LoRA or Effort is computed beside its projection, as in training; False where it is merged.
    """
    return 2 * _PRODUCTS[config.kind](config, _beside(config) if adapters else 0)


def _stream(config: MemberConfig, beside: int) -> int:
    """Products of a tower and a linear head of two classes on what the stream pools."""
    return _own_tower(config, beside, patches=config.stream.spread) + 2 * _pooled(config)


def _pooled(config: MemberConfig) -> int:
    """Features that a stream reads off its own tower."""
    return config.tower.arch.width * (2 if config.stream.spread else 1)


def _fusion(config: MemberConfig, beside: int) -> int:
    """Products of two towers and the layers on their joined features."""
    arch = config.clip.arch
    tokens = _tokens(config.clip, arch.image_side if isinstance(arch, ClipArch) else config.view.side)
    second = _tower(config.clip, tokens) - _unread(config.clip, tokens)
    joined = _pooled(config) + config.clip.arch.width
    own = _own_tower(config, beside, patches=config.stream.spread)
    return own + second + _layers(joined, config.stream.fusion_hidden, 2)


def _qtfp(config: MemberConfig, beside: int) -> int:
    """Products of a tower and of the queries over its patches, or of a linear head on its class token."""
    if config.qtfp.pool != "queries":
        return _own_tower(config, beside) + 2 * config.tower.arch.width
    return _own_tower(config, beside) + _queries(config, _patches(config))


def _layerwise(config: MemberConfig, beside: int) -> int:
    """Products of a tower and of a head on each of its last layers."""
    return _own_tower(config, beside) + config.layers.last * _head_of_layer(config)


def _topk(config: MemberConfig, beside: int) -> int:
    """Products of a tower and of one score a patch."""
    return _own_tower(config, beside) + _patches(config) * config.tower.arch.width


def _patches(config: MemberConfig) -> int:
    return _tokens(config.tower, config.view.side) - config.tower.arch.prefix


def _own_tower(config: MemberConfig, beside: int, *, patches: bool = True) -> int:
    """patches: whether the member reads their tokens."""
    tokens = _tokens(config.tower, config.view.side)
    whole = _tower(config.tower, tokens, beside)
    if patches:
        return whole
    projections = config.adapter.projections
    share = sum(name in "qo" for name in projections) / len(projections) if beside else 0
    return whole - _unread(config.tower, tokens, round(beside * share))


def _head_of_layer(config: MemberConfig) -> int:
    """Products of one head of `layers`."""
    read, hidden = (config.tower.arch.prefix + 1) * config.tower.arch.width, config.layers.hidden
    return _layers(read, hidden, 2) if hidden else _layers(read, 2)


def _queries(config: MemberConfig, patches: int) -> int:
    """Products of QTFP's gathering and of the head that reads it."""
    own, width = config.qtfp, config.tower.arch.width
    gather = own.queries * patches * width
    scores = gather
    if own.key_width:
        # The queries go through the key projection; each head then looks at whole tokens.
        directions = own.heads * own.queries * own.key_width * width
        scores = directions + own.heads * gather
    read = own.queries * width if own.readout == "each" else width
    return scores + gather + 2 * read


# ------------------------------------------------------------------------------------------------ towers
def _tokens(tower: TowerConfig, side: int) -> int:
    """Patches of a square picture of `side` px, and what stands before them."""
    return (side // tower.arch.patch) ** 2 + tower.arch.prefix


def _beside(config: MemberConfig) -> int:
    """Products that a member's adapter adds to one token in one block."""
    adapter, width = config.adapter, config.tower.arch.width
    # LoRA goes down to its rank and up again; Effort does so twice, for the trained part and for its start.
    passes = {"lora": 1, "effort": 2}.get(adapter.kind, 0)
    # A shared down projection is computed for each of q, k and v all the same.
    return len(adapter.projections) * passes * 2 * adapter.rank * width


def _tower(tower: TowerConfig, tokens: int, beside: int = 0) -> int:
    """Products of the plain tower on one picture: patch projection and blocks."""
    arch = tower.arch
    patches = (tokens - arch.prefix) * 3 * arch.patch**2 * arch.width
    block = _block(tokens, arch.width, _mlp_products(arch)) + tokens * beside
    return patches + arch.layers * block + _attention_pool(arch, tokens)


def _unread(tower: TowerConfig, tokens: int, beside: int = 0) -> int:
    """What the last block leaves out where nobody reads the patches' tokens (`Tower.forward`): all but keys and values."""
    arch = tower.arch
    if getattr(arch, "pool", "token") != "token":
        return 0
    each = 2 * arch.width**2 + _mlp_products(arch) + 2 * tokens * arch.width
    return (tokens - arch.prefix) * (each + beside)


def _attention_pool(arch: Dinov2Arch | ClipArch | TimmArch, tokens: int) -> int:
    """Products of timm's pooling by attention: one query, keys and values of the tokens, an MLP of four times the width."""
    if getattr(arch, "pool", "") != "attention":
        return 0
    return arch.width**2 * (2 * tokens + 2 + 8) + 2 * tokens * arch.width


def _mlp_products(arch: Dinov2Arch | ClipArch | TimmArch) -> int:
    """Products of one token in a block's MLP."""
    hidden = int(arch.width * arch.mlp_ratio)
    if isinstance(arch, Dinov2Arch) and arch.swiglu:
        # transformers' Dinov2SwiGLUFFN: two thirds of the hidden width, up to a multiple of 8; gate, up and down.
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return (3 if arch.gated else 2) * arch.width * hidden


def _block(tokens: int, width: int, mlp: int, seen: int | None = None) -> int:
    """Products of one block: q, k, v, o and the MLP on `tokens`, each of which attends to `seen` (default: to all)."""
    attention = 2 * tokens * (tokens if seen is None else seen) * width
    return tokens * (4 * width**2 + mlp) + attention


def _layers(*widths: int) -> int:
    """Products of one row through linear layers of these widths."""
    return sum(a * b for a, b in pairwise(widths))


# ------------------------------------------------------------------------------------------------ vlaforge
def _vlaforge(config: MemberConfig, beside: int) -> int:
    """Products of `vlaforge`, whose tower has no adapter: CLIP's plain pass, the copies of its class token, perceiver, decoder, sentences, heads."""
    from solution.models.vlaforge import prompt_tokens

    own, arch = config.vlaforge, config.tower.arch
    arch = replace(arch, layers=own.depth or arch.layers)
    read = replace(config.tower, arch=arch)
    queries, joint = own.queries, arch.embed_dim
    tokens = _tokens(read, arch.image_side)
    patches = tokens - 1
    copies = arch.layers * _block(queries, arch.width, _mlp_products(arch), patches)
    again = 0
    if own.adapter:
        # The blocks after the patch adapter run a second time.
        block = _block(tokens, arch.width, _mlp_products(arch))
        again = (arch.layers - own.adapter_after) * block
        again += 2 * patches * arch.width * own.adapter_width
    # The copies, and the class token: once for the sentences, once more to set the copies off against.
    project = (queries + 1 + (own.copy_gain != 1)) * arch.width * joint
    out, hidden = own.decoder_out, own.decoder_hidden
    decoder = queries * _layers(own.width, hidden, hidden, out)
    decoder += patches * _layers(own.width, hidden, hidden, out)
    decoder += patches * _layers(own.width, hidden, hidden, out * arch.heads)
    decoder += queries * patches * out * (1 + arch.heads)
    sentences, *_ = prompt_tokens()
    likeness = patches * joint * (arch.width + len(sentences))
    half, quarter = queries // 2, queries // 4
    global_head = joint * _convolutions((queries, half, quarter, 1), (3, 3, 3))
    global_head += _layers(joint, joint // 2, joint // 4, 2)
    localize = patches * _convolutions((queries, half, quarter, 1), (9, 9, 1))
    local = patches * queries**2 + 2 * queries
    return sum(
        (
            _tower(read, tokens),
            again,
            copies,
            project,
            _perceiver(config, patches),
            decoder,
            _sentences(arch, sentences),
            likeness,
            global_head,
            localize,
            local,
        )
    )


def _perceiver(config: MemberConfig, patches: int) -> int:
    """Products of the ForgePerceiver and of the projections that bring CLIP's patches into it."""
    own, width = config.vlaforge, config.vlaforge.width
    blocks = own.blocks * _block(own.queries + patches, width, 8 * width**2)
    fused = len(own.fusion_after) * patches * config.tower.arch.width * width
    return patches * 3 * own.patch**2 * width + blocks + fused


def _sentences(arch: ClipArch, sentences: Sequence[Sequence[int]]) -> int:
    """Products of the text tower on these sentences, whose placeholder is the picture's own embedding."""
    width, length = arch.text_width, len(sentences[0])
    # open_clip's text tower always has an MLP of four times its width; its causal mask saves no product.
    block = _block(length, width, 8 * width**2)
    each = arch.text_layers * block + width * arch.embed_dim
    word = 0 if width == arch.embed_dim else arch.embed_dim * width
    return len(sentences) * each + word


def _convolutions(channels: Sequence[int], kernels: Sequence[int]) -> int:
    """Products of one position through convolutions of these channels, `kernels` taps each."""
    return sum(a * b * k for (a, b), k in zip(pairwise(channels), kernels))


# By kind in `config.KINDS`: (config, products that the adapter adds to a token in a block) -> products of a picture.
_PRODUCTS = {
    "global": _stream,
    "face": _stream,
    "fusion": _fusion,
    "qtfp": _qtfp,
    "vlaforge": _vlaforge,
    "layers": _layerwise,
    "topk": _topk,
}
