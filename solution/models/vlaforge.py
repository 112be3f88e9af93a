"""The vision-language member with its losses (VLAForge, CVPR 2026, arXiv 2603.24454).

Takes the member's view (B, 3, S, S), S = `vlaforge.input_side`; returns `VlaforgeOutput`. CLIP is frozen: a small
ForgePerceiver looks at the pixels and at CLIP's tokens, and says where CLIP should look (biases in its attention) and
what was forged (maps). Two scores are mixed: class tokens of a CLIP so directed, and patches against two sentences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from solution.config import MemberConfig, VlaforgeConfig
from solution.models.blocks import Block, attend, finish_block, split_heads
from solution.models.keys import is_text
from solution.models.member import Member, Parts
from solution.models.towers import Tower, tower_state
from solution.records import Batch, MemberOutput

PROMPTS = ("This is a real photo of id person.", "This is a fake photo of id person.")
PLACEHOLDER = "id"  # its token's embedding gives way to the picture's own
FOCAL_GAMMA = 2.0


@dataclass(frozen=True, kw_only=True)
class VlaforgeOutput(MemberOutput):
    """What the losses need beside the score. `(h, w)` is the patch grid, N = h * w, real before fake.

    global_logits, local_logits: (B, 2), the two scores that `logit` mixes.
    localization: (B, 1, h, w) in [0, 1], M_loc.
    vla_logits: (B, 2, h, w), A_VLA; its softmax over real and fake is M_VLA.
    bias: (B, heads, Q, h, w), the forgery-aware masks M that were added to CLIP's attention.
    perceiver_tokens: up to three (B, N, D), the ForgePerceiver's patches after its middle blocks.
    patch_embeddings: (B, N, E), CLIP's patches in the joint space.
    adapted: (B, N, C), the patch adapter's inner features; None without one.
    """

    global_logits: torch.Tensor
    local_logits: torch.Tensor
    localization: torch.Tensor
    vla_logits: torch.Tensor
    bias: torch.Tensor
    perceiver_tokens: tuple[torch.Tensor, ...]
    patch_embeddings: torch.Tensor
    adapted: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------ CLIP, one pass
class ClipPass(NamedTuple):
    """What one pass of the frozen image tower leaves behind.

    cls_token (B, D) and patch_tokens (B, N, D) after the final LayerNorm; start (B, 1, D), the class token that entered
    the first block; hidden: block number (1-based) -> patches (B, N, D) after it; keys, values: per block, the patches'
    (B, heads, N, d); branch (B, 1 + N, D): all tokens after the block that was asked for; adapted (B, N, C): the patch
    adapter's inner features. `cls_token` and `hidden` are always the plain tower's; with an adapter, `patch_tokens` and
    the later keys and values are those of the changed patches.
    """

    cls_token: torch.Tensor
    patch_tokens: torch.Tensor
    start: torch.Tensor
    hidden: dict[int, torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    branch: torch.Tensor | None = None
    adapted: torch.Tensor | None = None


@torch.no_grad()
def clip_pass(tower: Tower, images: torch.Tensor, keep: tuple[int, ...], branch: int = 0, depth: int = 0) -> ClipPass:
    """The plain tower on pictures (B, 3, side, side), with every block's keys and values and the patches in `keep`.

    branch: the block (1-based) after which all tokens are kept; 0: none. depth: how many blocks; 0: all.
    """
    tower.use(None)
    x, _ = tower.embed(images)
    start, hidden, keys, values, kept = x[:, :1], {}, [], [], None
    for number, block in enumerate(tower.blocks(depth), start=1):
        x, k, v = _block_with_keys(block, x, tower.heads)
        keys.append(k)
        values.append(v)
        if number in keep:
            hidden[number] = x[:, 1:]
        if number == branch:
            kept = x
    x = tower.last_norm(x)
    return ClipPass(x[:, 0], x[:, 1:], start, hidden, keys, values, kept)


def _block_with_keys(block: Block, x: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One block on x (B, 1 + N, D): its output, and the patches' keys and values (B, heads, N, d)."""
    h = block.norm1(x)
    q, k, v = (split_heads(project(h), heads) for project in (block.q, block.k, block.v))  # (B, heads, 1 + N, d)
    x = finish_block(block, x, attend(q, k, v))
    return x, k[:, :, 1:], v[:, :, 1:]


class PatchAdapter(nn.Module):
    """The released code's change of CLIP's patches: 1x1 down, ReLU, 1x1 up, added back at `share` (not in the paper).

    The contrast between forged and unforged patches acts on the inner features.
    """

    def __init__(self, width: int, inner: int, share: float):
        super().__init__()
        self.share = share
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """patches (B, N, D) -> the changed patches (B, N, D) and the inner features (B, N, C)."""
        inner = self.down(patches.to(self.down.weight.dtype)).relu()
        return patches + (self.share * self.up(inner)).to(patches.dtype), inner


def adapted_pass(tower: Tower, seen: ClipPass, adapter: PatchAdapter, after: int) -> ClipPass:
    """The blocks after number `after` once more, on the patches that the adapter changed there.

    seen: the plain pass, with its `branch` after that block. Gradients reach the adapter through the frozen blocks.
    """
    patches, inner = adapter(seen.branch[:, 1:])
    x = torch.cat([seen.branch[:, :1], patches], dim=1)
    keys, values = seen.keys[:after], seen.values[:after]
    slim = tower.checkpointing and torch.is_grad_enabled()
    for block in list(tower.blocks(len(seen.keys)))[after:]:
        given = (block, x, tower.heads)
        x, k, v = checkpoint(_block_with_keys, *given, use_reentrant=False) if slim else _block_with_keys(*given)
        keys, values = [*keys, k], [*values, v]
    patches = tower.last_norm(x)[:, 1:]
    return seen._replace(patch_tokens=patches, keys=keys, values=values, adapted=inner)


def run_copies(tower: Tower, seen: ClipPass, bias: torch.Tensor) -> torch.Tensor:
    """Copies of the class token through the blocks of the plain pass, each looking where its bias sends it.

    A copy attends to the patches, `bias` added to the scores of every block, and to itself with bias 0; not to other
    copies nor the class token. Nobody attends to the copies, so the patches' keys and values of the plain pass serve.

    Args:
        seen: the plain pass.
        bias: (B, heads, Q, N).

    Returns:
        (B, Q, D) after the final LayerNorm. Gradients reach `bias`, not the tower.
    """
    x = seen.start.expand(-1, bias.shape[2], -1)  # (B, Q, D)
    slim = tower.checkpointing and torch.is_grad_enabled()
    for block, keys, values in zip(tower.blocks(), seen.keys, seen.values):
        given = (block, x, keys, values, bias, tower.heads)
        x = checkpoint(_copy_block, *given, use_reentrant=False) if slim else _copy_block(*given)
    return tower.last_norm(x)


def _copy_block(
    block: Block,
    x: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """One block on copies x (B, Q, D) against the patches' keys and values (B, heads, N, d)."""
    h = block.norm1(x)
    q, k, v = (split_heads(project(h), heads) for project in (block.q, block.k, block.v))  # (B, heads, Q, d)
    q = q * q.shape[-1] ** -0.5
    to_patches = q @ keys.transpose(-1, -2) + bias.to(q.dtype)  # (B, heads, Q, N)
    to_itself = (q * k).sum(-1, keepdim=True)  # (B, heads, Q, 1)
    scores = torch.cat([to_patches, to_itself], dim=-1)
    weights = scores.float().softmax(dim=-1).to(v.dtype)
    return finish_block(block, x, weights[..., :-1] @ values + weights[..., -1:] * v)


# ------------------------------------------------------------------------------------------------ the sentences
@cache
def prompt_tokens() -> tuple[tuple[tuple[int, ...], ...], int, int]:
    """Token ids of the two `PROMPTS`, the placeholder's index in both, and the size of the tokenizer's vocabulary.

    Raises:
        ValueError: the placeholder is not one token that stands once, at the same place, in sentences of one length.
    """
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    (word,) = tokenizer.encode(PLACEHOLDER)
    sentences = tuple((tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id) for text in PROMPTS)
    places = {tuple(i for i, t in enumerate(s) if t == word) for s in sentences}
    if len(places) != 1 or len(next(iter(places))) != 1 or len(sentences[0]) != len(sentences[1]):
        raise ValueError(
            f"the placeholder {PLACEHOLDER!r} must be one token at one and the same place of {PROMPTS}, found {places}"
        )
    return sentences, next(iter(places))[0], tokenizer.vocab_size


def prompt_embeddings(tower: Tower, tokens: torch.Tensor, place: int, identity: torch.Tensor) -> torch.Tensor:
    """The text tower's input: identity (B, W) in place of token `place` of both sentences (2, L) -> (B, 2, L, W)."""
    words = tower.model.token_embedding(tokens)  # (2, L, W)
    at_place = torch.arange(tokens.shape[1], device=tokens.device) == place  # (L,)
    identity = identity.to(words.dtype)[:, None, None, :]
    return torch.where(at_place[:, None], identity, words[None])


def encode_prompts(tower: Tower, embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sentences (B, 2, L, W) through the text tower as one batch of 2B rows -> (B, 2, E), unit norm.

    The causal mask is on. What follows the end token cannot reach it under that mask, so the sentences are not padded
    to CLIP's 77 tokens; the result is the same.
    """
    model = tower.model
    length = tokens.shape[1]
    position = model.positional_embedding[:length].to(embeddings.dtype)
    x = (embeddings + position).flatten(0, 1)  # (2B, L, W)
    causal = torch.full((length, length), -math.inf, dtype=x.dtype, device=x.device)
    x = model.transformer(x, attn_mask=causal.triu(1))
    # The end token has the largest id of its sentence.
    end = tokens.argmax(dim=-1).repeat(len(embeddings))
    ends = model.ln_final(x[torch.arange(len(x), device=x.device), end])
    joint = (ends @ model.text_projection).float()
    return F.normalize(joint, dim=-1).unflatten(0, (-1, len(tokens)))


# ------------------------------------------------------------------------------------------------ the ForgePerceiver
class PerceiverOutput(NamedTuple):
    """queries (B, Q, D); patches (B, N, D); middle: the patches after up to three middle blocks."""

    queries: torch.Tensor
    patches: torch.Tensor
    middle: tuple[torch.Tensor, ...]


class ForgePerceiver(nn.Module):
    """An independent small vision transformer with learned queries, fed with CLIP's patches.

    As published: timm's ViT-tiny from scratch (patch embedding, pre-norm blocks and their start), its first eight
    blocks, 128 queries; positions are added again before every block. Presets of small geometry have fewer and narrower
    blocks. Ours: a LayerNorm after the last block, so that the mask decoder starts from inputs of known size.
    After the blocks `fusion_after`, CLIP's patches of the matching layer are added through a LayerNorm and a 1x1
    projection (as in the paper; the released code has such a fusion, with projections made anew in every forward, and
    never calls it).
    """

    def __init__(self, config: VlaforgeConfig, clip_width: int):
        super().__init__()
        from timm.layers import LayerNorm, PatchEmbed
        from timm.models.vision_transformer import Block as TimmBlock
        from timm.models.vision_transformer import init_weights_vit_timm

        self.fusion_after = config.fusion_after
        first = config.blocks // 2  # of the ViT-tiny's eight: blocks 4, 5 and 6
        self.middle = range(first, min(first + 3, config.blocks + 1))
        width = config.width
        self.patch_embed = PatchEmbed(config.input_side, config.patch, 3, width)
        self.position = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, width))
        self.queries = nn.Parameter(torch.empty(1, config.queries, width))
        self.query_position = nn.Parameter(torch.empty(1, config.queries, width))
        for parameter in (self.position, self.queries, self.query_position):
            nn.init.normal_(parameter, std=0.02)
        self.blocks = nn.ModuleList(TimmBlock(width, config.heads, qkv_bias=True) for _ in range(config.blocks))
        self.blocks.apply(init_weights_vit_timm)
        self.fusions = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(clip_width), nn.Linear(clip_width, width)) for _ in config.fusion_after
        )
        self.norm = LayerNorm(width)

    def forward(self, pixels: torch.Tensor, clip_patches: list[torch.Tensor]) -> PerceiverOutput:
        """pixels (B, 3, S, S), normalised; clip_patches: one (B, N, D_clip) per fusion."""
        x = self.patch_embed(pixels)  # (B, N, D)
        queries = self.queries.shape[1]
        x = torch.cat([self.queries.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        # (1, Q + N, D)
        position = torch.cat([self.query_position, self.position], dim=1)
        middle = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x + position)
            if number in self.fusion_after:
                place = self.fusion_after.index(number)
                fused = self.fusions[place](clip_patches[place])
                x = torch.cat([x[:, :queries], x[:, queries:] + fused], dim=1)
            if number in self.middle:
                middle.append(x[:, queries:])
        x = self.norm(x)
        return PerceiverOutput(x[:, :queries], x[:, queries:], tuple(middle))


def _mlp(inside: int, hidden: int, out: int, variance: float) -> nn.Sequential:
    """Three linear layers with ReLU between; inputs of variance 1 leave with about `variance` at the start."""
    layers = nn.Sequential(
        nn.Linear(inside, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, out),
    )
    for layer, gain in zip(layers[::2], (1.0, 2.0, 2.0 * variance)):
        nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features))
        nn.init.zeros_(layer.bias)
    return layers


class MaskDecoder(nn.Module):
    """Queries and patches to one localisation map per query, and one attention bias per CLIP head and query.

    The maps start with a spread over the patches of about a half, the biases with `bias_scale` times that, which is the
    size of CLIP's own attention scores. Under torch's default start they have a tenth: the copies of the class token
    are then equal but for the sixth digit, and training leaves them so (a member trained that way did not notice when
    its bias was set to 0).
    """

    def __init__(self, config: VlaforgeConfig, clip_heads: int):
        super().__init__()
        width, hidden, out = config.width, config.decoder_hidden, config.decoder_out
        self.heads = clip_heads
        each = out**-0.5  # so that a sum of `out` products has variance 1
        self.on_queries = _mlp(width, hidden, out, each)
        self.on_patches = _mlp(width, hidden, out, each)
        self.on_heads = _mlp(width, hidden, out * clip_heads, each)
        self.bias_scale = nn.Parameter(torch.tensor(config.bias_scale))
        self.bias_shift = nn.Parameter(torch.zeros(()))

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """queries (B, Q, D), patches (B, N, D) -> maps (B, Q, N) and biases (B, heads, Q, N)."""
        q = self.on_queries(queries)  # (B, Q, C)
        maps = q @ self.on_patches(patches).transpose(1, 2)
        per_head = split_heads(self.on_heads(patches), self.heads)  # (B, heads, N, C)
        bias = q[:, None] @ per_head.transpose(-1, -2)
        return maps, bias * self.bias_scale + self.bias_shift


# ------------------------------------------------------------------------------------------------ the heads
class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of channels (B, C, ...), whose statistics stay float32 when the weights are narrower."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass  # any number of trailing dimensions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(x)
        scale = self.weight.float() * (self.running_var + self.eps).rsqrt()
        shift = self.bias.float() - self.running_mean * scale
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)


class GlobalHead(nn.Module):
    """Copies (B, Q, E) of unit norm -> features (B, E) and two-class logits (B, 2)."""

    def __init__(self, queries: int, embed_dim: int):
        super().__init__()
        half, quarter = queries // 2, queries // 4
        self.pool = nn.Sequential(
            nn.Conv1d(queries, half, 3, padding=1),
            BatchNorm(half),
            nn.ReLU(),
            nn.Conv1d(half, quarter, 3, padding=1),
            BatchNorm(quarter),
            nn.ReLU(),
            nn.Conv1d(quarter, 1, 3, padding=1),
        )
        self.classify = nn.Sequential(
            nn.Linear(embed_dim, embed_dim // 2),
            nn.ReLU(),
            nn.Linear(embed_dim // 2, embed_dim // 4),
            nn.ReLU(),
            nn.Linear(embed_dim // 4, 2),
        )

    def forward(self, copies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.pool(copies).squeeze(1)  # (B, E)
        return pooled, self.classify(pooled)


def _localization_head(queries: int) -> nn.Sequential:
    """Maps (B, Q, h, w) -> logits of M_loc (B, 1, h, w)."""
    half, quarter = queries // 2, queries // 4
    return nn.Sequential(
        nn.Conv2d(queries, half, 3, padding=1),
        BatchNorm(half),
        nn.ReLU(),
        nn.Conv2d(half, quarter, 3, padding=1),
        BatchNorm(quarter),
        nn.ReLU(),
        nn.Conv2d(quarter, 1, 1),
    )


def mix_scores(global_logits: torch.Tensor, local_logits: torch.Tensor, alpha: float) -> torch.Tensor:
    """The logit (B,) of alpha p_global + (1 - alpha) p_local, the paper's score, from two-class logits (B, 2).

    The mixture is of probabilities; both its logarithm and its complement's are taken in the log domain, so that
    two certain scores stay ordered where the probability itself rounds to 1.
    """
    parts = [
        logits.float().log_softmax(dim=-1) + (math.log(share) if share else -math.inf)
        for logits, share in ((global_logits, alpha), (local_logits, 1 - alpha))
    ]
    real, fake = torch.logaddexp(*parts).unbind(dim=-1)  # (B,) each
    return fake - real


# ------------------------------------------------------------------------------------------------ the member
class Vlaforge(Member):
    """`vlaforge`: ForgePerceiver, modulated class tokens, localisation map, identity-aware sentences.

    With `vlaforge.train_text` the text tower and the joint projection are learned with the member, for a tower that
    has none; a vocabulary smaller than the tokenizer's then holds the words of the two sentences alone.

    Raises:
        ValueError: a tower or a geometry that does not fit, by name.
    """

    def __init__(self, config: MemberConfig, tower: Tower):
        super().__init__(config, tower)
        settings, arch = config.vlaforge, tower.config.arch
        _check(config, tower)
        self.tower.requires_grad_(False)
        for key, parameter in tower_state(tower).items():
            parameter.requires_grad_(settings.train_text and is_text(key))
        side = settings.input_side // settings.patch
        self.grid = (side, side)
        self.perceiver = ForgePerceiver(settings, tower.width)
        self.decoder = MaskDecoder(settings, tower.heads)
        self.localize = _localization_head(settings.queries)
        self.global_head = GlobalHead(settings.queries, arch.embed_dim)
        self.to_joint = nn.Linear(tower.width, arch.embed_dim)
        self.joint_norm = BatchNorm(arch.embed_dim) if settings.vla_norm else None
        self.to_words = (
            nn.Identity()
            if arch.text_width == arch.embed_dim
            else nn.Linear(arch.embed_dim, arch.text_width, bias=False)
        )
        self.adapter_of_patches = (
            PatchAdapter(tower.width, settings.adapter_width, settings.adapter_share) if settings.adapter else None
        )
        self.local_mix = nn.Conv2d(settings.queries, settings.queries, 1)
        self.local_head = nn.Linear(settings.queries, 2)
        sentences, self.place, known = prompt_tokens()
        if arch.vocab < known:
            words = sorted({token for sentence in sentences for token in sentence})
            sentences = [[words.index(token) for token in s] for s in sentences]
        with torch.device("cpu"):  # no file fills it, so it is never on "meta"
            self.register_buffer("tokens", torch.tensor(sentences), persistent=False)

    def train(self, mode: bool = True) -> Vlaforge:
        super().train(mode)
        self.tower.eval()  # frozen; a learned text tower has nothing that differs
        return self

    @property
    def depth(self) -> int:
        """`vlaforge.depth`."""
        return self.config.vlaforge.depth

    def trained_tower_keys(self) -> list[str]:
        """The text tower and the joint projection where they are learned, else none."""
        learned = self.config.vlaforge.train_text
        return [k for k in tower_state(self.tower) if is_text(k)] if learned else []

    # -- forward
    def forward(self, images: torch.Tensor) -> VlaforgeOutput:
        """Score pictures (B, 3, S, S), uint8 or float in [0, 1]; CLIP's image blocks get no gradients of their own."""
        settings = self.config.vlaforge
        if images.shape[-2:] != (settings.input_side, settings.input_side):
            raise ValueError(
                f"vlaforge takes {settings.input_side}x{settings.input_side} px, found {tuple(images.shape[-2:])}"
            )
        images = self.tower.unit(images)
        seen = self.look(images)
        perceived, maps, bias = self.perceive(images, seen)
        features, global_logits = self.global_score(seen, bias)
        embeddings, vla_logits = self.read(seen)
        vla = vla_logits.softmax(dim=1)[:, 1:]
        local_logits = self.local_score(maps, vla_logits)
        localization = self.localize(maps).float().sigmoid()
        return VlaforgeOutput(
            logit=mix_scores(global_logits, local_logits, settings.alpha),
            features=features.float(),
            evidence={"localization": localization, "vla": vla},
            global_logits=global_logits.float(),
            local_logits=local_logits.float(),
            localization=localization,
            vla_logits=vla_logits,
            bias=self._as_map(bias),
            perceiver_tokens=perceived.middle,
            patch_embeddings=embeddings,
            adapted=seen.adapted,
        )

    def perceive(self, images: torch.Tensor, seen: ClipPass) -> tuple[PerceiverOutput, torch.Tensor, torch.Tensor]:
        """The ForgePerceiver on pictures (B, 3, S, S) in [0, 1] and what CLIP saw of them.

        Returns its tokens, the localisation maps (B, Q, h, w) and the attention biases (B, heads, Q, N).
        """
        dtype = self.to_joint.weight.dtype  # of the member's own parts
        patches = [seen.hidden[n].to(dtype) for n in self.config.vlaforge.fusion_layers]
        pixels = self.tower.normalize(images).to(dtype)
        perceived = self.perceiver(pixels, patches)
        maps, bias = self.decoder(perceived.queries, perceived.patches)
        return perceived, self._as_map(maps), bias

    def global_score(self, seen: ClipPass, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """s_g of class tokens directed by bias (B, heads, Q, N): features (B, E) and two logits (B, 2)."""
        copies, gain = self.directed_classes(seen, bias), self.config.vlaforge.copy_gain
        if gain != 1:
            undirected = self.project(seen.cls_token)[:, None]
            copies = undirected + gain * (copies - undirected)
        return self.global_head(copies.to(self.to_joint.weight.dtype))

    def local_score(self, maps: torch.Tensor, vla_logits: torch.Tensor) -> torch.Tensor:
        """s_VLA, two logits (B, 2): the maps (B, Q, h, w) weighted by A_VLA's fake channel, mixed and averaged.

        The channel enters as it is. After a softmax it dies in training: both sides of the cosine are learned and most
        of most masks is empty, so the map losses push it to 0 on every patch, and the score is one constant.
        """
        channel = (vla_logits if self.config.vlaforge.vla_channel == "raw" else vla_logits.softmax(dim=1))[:, 1:]
        mixed = self.local_mix(maps * channel.to(maps.dtype)).mean(dim=(2, 3))  # (B, Q)
        return self.local_head(mixed)

    def _as_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, self.grid)  # (..., N) -> (..., h, w)

    def look(self, images: torch.Tensor) -> ClipPass:
        """The one plain pass of CLIP, on pictures (B, 3, S, S) in [0, 1] brought to its side.

        With a patch adapter, the blocks after it run a second time.
        """
        settings, side = self.config.vlaforge, self.tower.config.arch.image_side
        small = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
        if self.adapter_of_patches is None:
            return clip_pass(self.tower, small, settings.fusion_layers, depth=self.depth)
        after = settings.adapter_after
        seen = clip_pass(self.tower, small, settings.fusion_layers, after, self.depth)
        return adapted_pass(self.tower, seen, self.adapter_of_patches, after)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (..., D) after the final LayerNorm -> the joint space (..., E), unit norm."""
        return F.normalize((tokens @ self.tower.model.visual.proj).float(), dim=-1)

    def directed_classes(self, seen: ClipPass, bias: torch.Tensor) -> torch.Tensor:
        """The class token's copies under bias (B, heads, Q, N), in the joint space: (B, Q, E)."""
        return self.project(run_copies(self.tower, seen, bias))

    def read(self, seen: ClipPass) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches in the joint space (B, N, E), and A_VLA (B, 2, h, w), `vla_scale` times their cosine to the sentences.

        The released code multiplies 100 by the inner product with the patches as they come out of their projection,
        whose norm is unbounded; a cosine bounds the likeness, and with it how far the map losses can drive it. Patches
        of all pictures have much in common: `vla_norm` takes that out (and gives back what the losses ask for).
        """
        dtype = self.to_joint.weight.dtype
        embeddings = self.to_joint(seen.patch_tokens.to(dtype))
        if self.joint_norm is not None:
            embeddings = self.joint_norm(embeddings.transpose(1, 2)).transpose(1, 2)
        sentences = self.sentences(self.project(seen.cls_token).to(dtype))  # (B, 2, E)
        unit = F.normalize(embeddings.float(), dim=-1)
        # The scale magnifies rounding.
        with torch.autocast(unit.device.type, enabled=False):
            scale = self.config.vlaforge.vla_scale
            likeness = scale * sentences @ unit.transpose(1, 2)  # (B, 2, N)
        return embeddings, self._as_map(likeness)

    def sentences(self, classes: torch.Tensor) -> torch.Tensor:
        """F_real and F_fake (B, 2, E) of pictures whose class embeddings are (B, E)."""
        words = prompt_embeddings(self.tower, self.tokens, self.place, self.to_words(classes))
        return encode_prompts(self.tower, words, self.tokens)

    # -- losses
    def loss(self, output: VlaforgeOutput, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """The weighted sum of the losses whose weight is not 0 (`vlaforge.w_*`), and each unweighted.

        Raises:
            ValueError: a batch without masks while a loss on masks has a weight.
        """
        s = self.config.vlaforge
        weights = {
            "global": s.w_global,
            "local": s.w_local,
            "localization": s.w_localization,
            "dice": s.w_dice,
            "focal": s.w_focal,
            "orthogonality": s.w_orthogonality,
            "intra": s.w_intra,
            "clip": s.w_clip,
        }
        weights = {name: weight for name, weight in weights.items() if weight}
        parts = {
            "global": lambda: F.cross_entropy(output.global_logits, batch.labels),
            "local": lambda: F.cross_entropy(output.local_logits, batch.labels),
            "orthogonality": lambda: orthogonality_loss(output.bias),
        }
        on_masks = sorted(set(weights) - set(parts))
        if on_masks:
            if batch.masks is None or batch.mask_known is None:
                raise ValueError(
                    f"vlaforge trains {', '.join(on_masks)} on forgery masks, and the batch has none; "
                    "set their weights vlaforge.w_* to 0 to train without"
                )
            parts |= self._mask_losses(output, batch)
        values = {name: parts[name]() for name in weights}
        total = sum(weight * values[name] for name, weight in weights.items())
        return total, {name: value.detach() for name, value in values.items()}

    def _mask_losses(self, output: VlaforgeOutput, batch: Batch) -> dict:
        """The losses on forgery masks by name, not yet computed; pictures of unknown mask are left out of each."""
        s, masks, known = self.config.vlaforge, batch.masks.float(), batch.mask_known
        size, each = masks.shape[-2:], mask_weights(batch.labels, known)

        def enlarged(values: torch.Tensor) -> torch.Tensor:
            return F.interpolate(values, size, mode="bilinear", align_corners=False)

        share = F.adaptive_avg_pool2d(masks[:, None], self.grid).flatten(1)  # (B, N)
        forged = share > s.patch_forged_share
        fake, tau = known & (batch.labels == 1), s.contrast_temperature

        def intra() -> torch.Tensor:
            layers = output.perceiver_tokens
            return sum(patch_contrast(x[fake], forged[fake], tau) for x in layers)

        def clip() -> torch.Tensor:
            x, real = output.adapted, batch.labels == 0
            x = output.patch_embeddings if x is None else x
            within = patch_contrast(x[fake], forged[fake], tau)
            return within + picture_contrast(x[real], x[fake], forged[fake], tau)

        return {
            "localization": lambda: localization_loss(enlarged(output.localization)[:, 0], masks, each),
            "dice": lambda: dice_loss(
                enlarged(output.vla_logits).softmax(dim=1)[:, 1],
                masks,
                each,
                s.patch**2,
            ),
            "focal": lambda: focal_map_loss(enlarged(output.vla_logits), masks, each),
            "intra": intra,
            "clip": clip,
        }


def _check(config: MemberConfig, tower: Tower) -> None:
    """Raise ValueError with the field that does not fit this member and its tower."""
    s, arch = config.vlaforge, tower.config.arch
    sentences, _, known = prompt_tokens()
    length, words = len(sentences[0]), len(set(sum(sentences, ())))
    side, clip_side = s.input_side // s.patch, arch.image_side // arch.patch
    depth = s.depth or arch.layers
    vocab = words if s.train_text else known
    demands = [
        (config.adapter.kind == "none", "adapter.kind must be none: CLIP is frozen"),
        (arch.text_layers > 0, "tower.arch.text_layers is 0; it needs a text tower"),
        (depth <= arch.layers, f"vlaforge.depth is {s.depth}; the tower has {arch.layers} blocks"),
        (all(1 <= n <= depth for n in s.fusion_layers), f"vlaforge.fusion_layers {s.fusion_layers}: 1..{depth}"),
        (
            side == clip_side,
            f"vlaforge.input_side / vlaforge.patch is {side}, CLIP's patch grid {clip_side}; they must agree",
        ),
        (
            not s.adapter or s.adapter_after < depth,
            f"vlaforge.adapter_after is {s.adapter_after}; the member reads {depth} blocks, and some must follow",
        ),
        (
            arch.context >= length,
            f"tower.arch.context is {arch.context}; a sentence has {length} tokens",
        ),
        (
            vocab <= arch.vocab <= known,
            f"tower.arch.vocab is {arch.vocab}; expected {known}, the tokenizer's, or, with train_text, from {words} on",
        ),
    ]
    for met, demand in demands:
        if not met:
            raise ValueError(f"vlaforge: {demand}")


# ------------------------------------------------------------------------------------------------ losses
def mask_weights(labels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The weight (B,) of each picture in the losses on masks: the real ones share 1/2, the forged ones 1/2.

    The paper's batches are half real, half forged with a mask. Where few forged pictures have a known mask, a plain mean
    is one over empty masks, and says that nothing is ever forged. A picture of unknown mask weighs 0.

    labels: (B,), 1 for forged. known: (B,) bool.
    """
    real, forged = known & (labels == 0), known & (labels == 1)
    shares = [kind / (2 * kind.sum().clamp_min(1)) for kind in (real, forged)]
    return shares[0] + shares[1]


def localization_loss(maps: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """L_loc: mean squared error of maps (B, H, W) to masks (B, H, W), pictures weighted by `weights` (B,)."""
    return ((maps - masks).square().mean(dim=(1, 2)) * weights).sum()


def dice_loss(maps: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor, smooth: float) -> torch.Tensor:
    """L_VLA: 1 - (2 sum(p m) + smooth) / (sum(p) + sum(m) + smooth), pictures weighted by `weights` (B,).

    maps, masks: (B, H, W). smooth: in pixels; the member uses the area of one patch, the finest thing its map can
    say: with a single pixel the loss of a real picture, whose mask is empty, is flat everywhere but at zero.
    """
    both = (maps * masks).sum(dim=(1, 2))
    size = maps.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    return ((1 - (2 * both + smooth) / (size + smooth)) * weights).sum()


def focal_map_loss(logits: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Focal loss (gamma 2) per pixel, its mean over each picture weighted by `weights` (B,).

    logits: (B, 2, H, W), real before fake. masks: (B, H, W), taken as forged above 0.5.
    """
    log_p = logits.float().log_softmax(dim=1)
    log_pt = torch.where(masks > 0.5, log_p[:, 1], log_p[:, 0])  # (B, H, W)
    values = -((1 - log_pt.exp()) ** FOCAL_GAMMA) * log_pt
    return (values.mean(dim=(1, 2)) * weights).sum()


def orthogonality_loss(bias: torch.Tensor) -> torch.Tensor:
    """L_orth: mean over pictures, heads and pairs i != j of |<f_i, f_j>|, f the unit-norm bias maps.

    bias: (B, heads, Q, h, w).
    """
    f = F.normalize(bias.float().flatten(3), dim=-1)  # (B, heads, Q, N)
    overlap = (f @ f.transpose(-1, -2)).abs()  # (B, heads, Q, Q)
    others = overlap.sum(dim=(-2, -1)) - overlap.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (others / (f.shape[2] * (f.shape[2] - 1))).mean()


def patch_contrast(embeddings: torch.Tensor, forged: torch.Tensor, temperature: float) -> torch.Tensor:
    """Forged against unforged patches within each fake picture (the published code; not in the paper).

    -log(P / (P + M)) for the forged and for the unforged, P the sum of exp(cosine / temperature) over pairs of one
    kind and M over mixed pairs, over all pictures. Pairs that do not belong are left out of the sums; a kind without
    a patch contributes 0.

    embeddings: (F, N, E). forged: (F, N) bool.
    """
    e = F.normalize(embeddings.float(), dim=-1)
    pair = ((e @ e.transpose(1, 2)) / temperature).exp()  # (F, N, N)
    a, b = forged[:, :, None], forged[:, None, :]
    mixed, forged_pairs = (pair * (a & ~b)).sum(), (pair * (a & b)).sum()
    unforged_pairs = (pair * (~a & ~b)).sum()
    return _against(forged_pairs, mixed) + _against(unforged_pairs, mixed)


def picture_contrast(real: torch.Tensor, fake: torch.Tensor, forged: torch.Tensor, temperature: float) -> torch.Tensor:
    """Patches of a real picture against the forged patches of a fake one, pictures paired in order.

    real: (R, N, E). fake: (F, N, E). forged: (F, N) bool. The first min(R, F) of each are used; 0 without a pair.
    """
    count = min(len(real), len(fake))
    r, f = (F.normalize(x[:count].float(), dim=-1) for x in (real, fake))
    same = ((r @ r.transpose(1, 2)) / temperature).exp().sum()
    other = ((r @ f.transpose(1, 2)) / temperature).exp()  # (P, N, N)
    return _against(same, (other * forged[:count, None, :]).sum())


def _against(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """-log(positive / (positive + negative)); 0 where both sums are empty."""
    return torch.log1p(negative / positive.clamp_min(1e-12))
