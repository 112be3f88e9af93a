"""The query-token member with its losses: queries gather the patches that look forged, [CLS] is not classified.

Takes the member's view (B, 3, H, W); returns `QtfpOutput`. The losses and the prototypes take tokens (B, P, D) and
nothing else, so the synthetic study (`python -m solution.models.qtfp --study`) runs the very code that trains the member.
Source: Wang et al., "Beyond [CLS] Token", CVPR 2026; no code is public, and what the paper leaves open is marked `ours`.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.autograd.function import once_differentiable

from solution.config import MemberConfig, preset, require
from solution.evaluation import metrics
from solution.models.member import Member
from solution.models.streams import as_two_class, two_class_logit
from solution.models.towers import (
    Tower,
    add_adapter,
    build_tower,
    count_parameters,
    merge_heads,
    patch_attention,
    split_heads,
)
from solution.records import Batch, MemberOutput

# Below this the positives' share of a row, at worst e^(-2 / tau), nears float32's smallest numbers.
MIN_TEMPERATURE = 0.03
# Correlation between two queries' attentions from which on they count as one in `diversity_loss`.
SHARED_LOOK = 0.5


# ------------------------------------------------------------------------------------------------ queries
class QueryPool(nn.Module):
    """K learnable queries that know nothing of the pre-training gather patch tokens (paper, section 3).

    Paper (`key_width` 0): A = softmax(Q Z^T / sqrt(D)), Z~ = A Z. With `heads` > 1 (ours) each head does so on its own
    D / heads channels. Queries of N(0, std^2) with a small std start uniform and equal, and stay so.
    Ours (`key_width` d): a light multi-head attention with its own keys. Head h of query k looks for the direction
        u_kh = e^(scale_kh) sqrt(d) W_h^T q_kh / |q_kh|,   W_h (d, D) learned, orthonormal rows at the start,
    in the patches' deviations from their picture's mean, divided by the picture's root mean square of these:
        A_kh = softmax((Z - mean_P Z) / rms(Z - mean_P Z) u_kh / sqrt(d)).
    So the scores start with a standard deviation near 1 whatever the tower's scale, the queries of a head start
    orthogonal, and decay of the queries' length cannot make them uniform. W is linear: the function is that of a free
    direction and temperature a query and head; what it changes is where they start and that queries learn keys together.
    In both forms the values are the tokens themselves, unprojected: what is gathered is where the attention lies.
    """

    def __init__(self, width: int, queries: int, *, heads: int, std: float, key_width: int = 0):
        super().__init__()
        self.heads, self.key_width = heads, key_width
        if not key_width:
            self.queries = nn.Parameter(torch.randn(queries, width) * std)
            return
        start = torch.empty(heads, queries, key_width)
        for of_head in start:
            nn.init.orthogonal_(of_head, gain=std * key_width**0.5)
        self.queries = nn.Parameter(start)
        self.keys = nn.Parameter(torch.empty(heads * key_width, width))
        nn.init.orthogonal_(self.keys)
        self.log_scale = nn.Parameter(torch.zeros(heads, queries))

    def forward(
        self, tokens: torch.Tensor, *, attention: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch tokens (B, P, D) -> gathered (B, K, D) and attention (B, K, P) float32, the heads' mean, rows sum to one.

        attention: (B, K, P) or what expands to it, used by every head in place of the pool's own (interventions).
        """
        if attention is None:
            by_head = self._scores(tokens).softmax(dim=-1)  # (B, heads, K, P)
        else:
            shape = (len(tokens), self.queries.shape[-2], tokens.shape[1])
            by_head = attention.float().expand(shape)[:, None]
        z = split_heads(tokens, self.heads)  # (B, heads, P, D / heads)
        gathered = merge_heads(by_head.to(z.dtype) @ z)  # (B, K, D)
        return gathered, by_head.mean(dim=1)

    def _scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the softmax is taken of: (B, P, D) -> (B, heads, K, P) float32, or wider with the tokens."""
        if not self.key_width:
            q = split_heads(self.queries[None], self.heads)  # (1, heads, K, d)
            z = split_heads(tokens, self.heads)  # (B, heads, P, d)
            return ((q @ z.transpose(-1, -2)) * q.shape[-1] ** -0.5).float()
        # Never in bf16: the patches of a picture have most of their token in common.
        with torch.autocast(tokens.device.type, enabled=False):
            wide = _wide(tokens)
            wide = wide - wide.mean(dim=1, keepdim=True)
            size = wide.square().mean(dim=(1, 2), keepdim=True)
            wide = wide * (size + torch.finfo(wide.dtype).tiny).rsqrt()
            q = F.normalize(self.queries.to(wide.dtype), dim=-1)
            q = q * self.log_scale.to(wide.dtype).exp()[..., None]  # (heads, K, d)
            keys = self.keys.to(wide.dtype).unflatten(0, (self.heads, self.key_width))
            directions = q @ keys  # (heads, K, D); u / sqrt(d)
            return torch.einsum("bpd,hkd->bhkp", wide, directions)


def read_gathered(gathered: torch.Tensor, readout: str, keep: torch.Tensor | None = None) -> torch.Tensor:
    """What a linear head reads of gathered tokens (B, K, D): their mean (B, D), or for `each` all of them / K (B, K D).

    keep: (K,) or (B, K), False for a query that is left out; the others make up for it. None: all are kept.
    """
    if keep is not None:
        share = keep.to(gathered.dtype)
        share = share * (share.shape[-1] / share.sum(dim=-1, keepdim=True))
        gathered = gathered * share[..., None]
    if readout == "each":
        return gathered.flatten(1) / gathered.shape[1]
    return gathered.mean(dim=1)


def overlap(attention: torch.Tensor) -> torch.Tensor:
    """How alike the queries look: mean correlation over patches between two of them, (B, K, P) -> (B,) in [-1, 1].

    Uniform rows correlate with nothing (0). K of at least 2.
    """
    return pair_correlations(attention).mean(dim=-1)


def pair_correlations(attention: torch.Tensor) -> torch.Tensor:
    """The correlation over patches of each pair of queries' attentions: (B, K, P) -> (B, K (K - 1) / 2)."""
    centred = F.normalize(attention - attention.mean(dim=-1, keepdim=True), dim=-1)
    one, two = torch.triu_indices(*[attention.shape[1]] * 2, offset=1)
    return (centred[:, one] * centred[:, two]).sum(dim=-1)


# ------------------------------------------------------------------------------------------------ prototypes
def unit_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (..., D) at length one, in float32 or wider: the losses compare directions (ours)."""
    return F.normalize(_wide(tokens), dim=-1)


def _wide(tokens: torch.Tensor) -> torch.Tensor:
    return tokens if tokens.dtype == torch.float64 else tokens.float()


def fake_likeness(unit: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """delta = sim(z, mu_f) - sim(z, mu_r): unit tokens (..., D), prototypes (2, D) real, fake -> (...).

    Never in bf16: deltas differ by little of what they have in common.
    """
    with torch.autocast(unit.device.type, enabled=False):
        return unit @ (prototypes[1] - prototypes[0]).to(unit.dtype)


class Prototypes(nn.Module):
    """Moving averages of the real and the fake mean patch token, and the signal-to-noise ratios against them.

    mean: (2, D) real, fake, of unit tokens. updates: (2,) int64, how often each class was seen; 0: no prototype yet.
    Both are buffers, stored and restored with the member. Decay 0.99 (ours), but never more than n / (n + 1) at the
    n-th update: the first batches are averaged evenly instead of the very first one ruling for hundreds of steps.
    """

    def __init__(self, width: int, *, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(2, width))
        self.register_buffer("updates", torch.zeros(2, dtype=torch.int64))

    @property
    def ready(self) -> bool:
        """Whether both classes have been seen."""
        return bool((self.updates > 0).all())

    @torch.no_grad()
    def observe(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Measure tokens (B, P, D) with labels (B,) against the prototypes as they were, then update these.

        On several ranks the sums of all of them are used, so every rank keeps the same prototypes and reports the same.
        Returns the numbers of `signal_to_noise`; none for a batch without both classes.
        """
        sums = class_sums(unit_tokens(tokens), labels, self.mean)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        numbers = signal_to_noise(sums, self.mean if self.ready else None)
        for kind in (0, 1):
            count = sums[kind, 0]
            if count > 0:
                seen = int(self.updates[kind])
                keep = min(self.decay, seen / (seen + 1))
                self.mean[kind].lerp_(sums[kind, 3:] / count, 1 - keep)
                self.updates[kind] += 1
        return numbers


def class_sums(unit: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Sums over the patches of each class that add up over batches and ranks: (2, 3 + D) float32.

    Columns: patches n, sum |z|^2, sum delta^2, sum z. unit: (B, P, D). labels: (B,). prototypes: (2, D), for delta.
    """
    square = unit.square().sum(dim=-1)  # (B, P)
    delta_square = fake_likeness(unit, prototypes).square()  # (B, P)
    extra = torch.stack([torch.ones_like(square), square, delta_square], dim=-1)
    per_image = torch.cat([extra, unit], dim=-1).sum(dim=1)  # (B, 3 + D)
    return torch.stack([per_image[labels == kind].sum(dim=0) for kind in (0, 1)])


def signal_to_noise(sums: torch.Tensor, prototypes: torch.Tensor | None) -> dict[str, float]:
    """The signal-to-noise ratios of a batch, from its `class_sums` and from prototypes of earlier batches (2, D).

    snr_ema: ||mu_r - mu_f|| / sigma (paper) with the prototypes of other images; sigma is the batch's standard
        deviation per dimension within a class.
    snr_held_out: how far the batch's own classes lie apart *along* the direction of those prototypes, in standard
        deviations of real patches. Unlike a norm it is signed, so without a signal it averages to zero.
    snr_batch: ||mu_r - mu_f|| / sigma with the batch's own means, for contrast only. A norm of means of n images with
        P patches is never zero: with no signal at all it is sqrt(2 D (s / n + (1 - s) / (n P))), where s is the share of
        a token's variance that all patches of an image have in common. At 8 + 8 images, P = 256, D = 1024 that is 1.0
        for s = 0 and 5.2 for s = 0.1, the very size of the 2.5 to 3 that is published for a trained model. A ratio
        above 1 is evidence only if the prototypes come from other images.

    All three compare the means over *all* patches of fake images, so a forged share f dilutes them to f ||d|| / sigma.
    What does not depend on f is the direction mu_f - mu_r, and with it the separation of a forged patch from a real one
    along it, ||d|| / sigma: that is why FLCL needs no mask (the study measures it with the planted masks).
    """
    count = sums[:, 0]
    if not bool((count > 0).all()):
        return {}
    mean = sums[:, 3:] / count[:, None]  # (2, D)
    within = sums[:, 1] - count * mean.square().sum(dim=1)  # (2,) sums of squares
    sigma = (within.sum() / (count.sum() * mean.shape[1])).sqrt()
    numbers = {"snr_batch": ((mean[1] - mean[0]).norm() / sigma).item()}
    if prototypes is not None:
        numbers["snr_ema"] = ((prototypes[1] - prototypes[0]).norm() / sigma).item()
        delta = fake_likeness(mean, prototypes)  # (2,) class means of delta
        real_std = (sums[0, 2] / count[0] - delta[0].square()).clamp_min(0).sqrt()
        numbers["snr_held_out"] = ((delta[1] - delta[0]) / real_std).item()
    return numbers


# ------------------------------------------------------------------------------------------------ losses
@torch.no_grad()
def fake_likelihood_weights(
    tokens: torch.Tensor,
    prototypes: torch.Tensor,
    *,
    temperature: float = 1.0,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """w = sigmoid((delta - mean delta) / (temperature std delta)) (ours): (B, P) in (0, 1), without gradient.

    tokens: (B, P, D), of any length. prototypes: (2, D) real, fake.
    labels: None standardises each picture's deltas by themselves: w says where in a picture. (B,) with at least one real
    picture standardises all by the patches of the real ones: w says first of all which picture.
    """
    delta = fake_likeness(unit_tokens(tokens), prototypes)  # (B, P)
    if labels is None:
        mean = delta.mean(dim=1, keepdim=True)
        std = delta.std(dim=1, keepdim=True, correction=0)
    else:
        real = delta[labels == 0]
        mean, std = real.mean(), real.std(correction=0)
    std = std.clamp_min(torch.finfo(delta.dtype).tiny)
    return ((delta - mean) / (temperature * std)).sigmoid()


def fake_likelihood_loss(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    prototypes: torch.Tensor,
    *,
    temperature: float,
    weight_temperature: float,
    weight_scope: str = "picture",
    chunk: int = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The fake-likelihood contrastive loss (FLCL; paper, section 3; the reading of positives is ours).

    L = - mean over the patches i of fake images of w_i log(sum_pos e^(z_i z_j / tau) / sum_all e^(z_i z_j / tau)), on unit
    tokens. pos: the patches of all fake images but i; all: every patch of the batch but i. (With positives from the same
    image only, as the formula may be read, numerator and denominator would be one.) No gradient passes w.

    tokens: (B, P, D). labels: (B,), both classes present. prototypes: (2, D), of other images.
    weight_scope: what delta is standardised over for w: each `picture`, or the real patches of the `batch`.
    chunk: rows of the similarity matrix that exist at once; 0: all. dtype: of that matrix; None: of the tokens.

    Raises:
        ValueError: one class is missing, or the fake images have a single patch between them.
    """
    unit = unit_tokens(tokens)
    fake, real = unit[labels == 1].flatten(0, 1), unit[labels == 0].flatten(0, 1)
    if len(fake) < 2 or len(real) == 0:
        raise ValueError(
            f"FLCL contrasts fake with real patches: found {len(fake)} fake and {len(real)} real ones, "
            "expected at least 2 and 1; use balanced batches"
        )
    weights = fake_likelihood_weights(
        unit,
        prototypes,
        temperature=weight_temperature,
        labels=labels if weight_scope == "batch" else None,
    )
    weights = weights[labels == 1].flatten()  # (fake patches,)
    ordered = torch.cat([fake, real])  # (patches, D), fake ones first
    return _WeightedContrast.apply(ordered, weights, temperature, chunk or len(fake), dtype or ordered.dtype)


class _WeightedContrast(torch.autograd.Function):
    """FLCL on ordered unit tokens with its gradient by hand, so that one chunk of one matrix is all that ever exists.

    With e_ij = exp(z_i z_j / tau): dL / d(z_i z_j / tau) = (w_i / n) (e_ij / all_i - [j in pos] e_ij / pos_i). The
    chunk is recomputed in the backward pass and turned into this gradient in place. Row sums are float32 at least.
    """

    @staticmethod
    def forward(ctx, ordered, weights, temperature, chunk, dtype):
        unit = ordered.to(dtype)
        n = len(weights)
        positive, total = torch.empty_like(weights), torch.empty_like(weights)
        for rows in _chunks(n, chunk):
            e = _exponentials(unit, rows, temperature)  # (rows, patches)
            positive[rows] = e[:, :n].sum(dim=1, dtype=weights.dtype)
            total[rows] = e.sum(dim=1, dtype=weights.dtype)
            del e
        ctx.save_for_backward(unit, weights, positive, total)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, ordered.dtype
        return -(weights * (positive / total).log()).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, weights, positive, total = ctx.saved_tensors
        n = len(weights)
        scale = grad * weights / n
        against_all = scale / total
        against_fake = against_all - scale / positive
        gradient = torch.zeros(unit.shape, dtype=ctx.dtype, device=unit.device)
        for rows in _chunks(n, ctx.chunk):
            e = _exponentials(unit, rows, ctx.temperature)
            e[:, :n].mul_(against_fake[rows, None].to(e.dtype))
            e[:, n:].mul_(against_all[rows, None].to(e.dtype))
            gradient[rows] += e @ unit
            gradient += e.T @ unit[rows]
            del e
        return gradient / ctx.temperature, None, None, None, None


def _chunks(n: int, chunk: int) -> Iterator[slice]:
    for start in range(0, n, chunk):
        yield slice(start, min(start + chunk, n))


def _exponentials(unit: torch.Tensor, rows: slice, temperature: float) -> torch.Tensor:
    """exp(z_i z_j / tau - the row's maximum) for i in `rows`, 0 at j = i: (rows, patches), made in place."""
    e = (unit[rows] / temperature) @ unit.T
    e.diagonal(rows.start).fill_(-torch.inf)
    return e.sub_(e.amax(dim=1, keepdim=True)).exp_()


def attention_alignment_loss(attention: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Real-attention alignment (RAAL; paper, section 3): mean over images and queries of KL(a^Q_k || a^CLS).

    attention: (R, K, P), the queries' rows on real images. reference: (R, P), CLS -> patch attention; it is detached.
    """
    tiny = torch.finfo(attention.dtype).tiny
    log_reference = reference.detach().to(attention.dtype).clamp_min(tiny).log()
    divergence = attention.clamp_min(tiny).log() - log_reference[:, None]
    return (attention * divergence).sum(dim=-1).mean()


def late(progress: float) -> float:
    """RAAL's share of its full weight (ours): none until `progress` 1, rising to all at 2.

    Not a rise from the start: before the queries have found anything, cross-entropy hardly pulls at them, and the smallest
    weight is enough to make them CLS-like (the optimizer divides by the gradient's size).
    """
    return min(1.0, max(0.0, progress - 1.0))


def diversity_loss(attention: torch.Tensor) -> torch.Tensor:
    """Mean over pictures and pairs of queries of how far their correlation exceeds `SHARED_LOOK` (ours).

    attention: (F, K, P), the queries' rows on fake images. Queries may share what they look at, not all of it.
    """
    return (pair_correlations(attention) - SHARED_LOOK).clamp_min(0).mean()


# ------------------------------------------------------------------------------------------------ the member
@dataclass(frozen=True, kw_only=True)
class QtfpOutput(MemberOutput):
    """What QTFP says of a batch, and what its losses read.

    patch_tokens: (B, P, D) after the tower's final LayerNorm. last_input: (B, 1 + P, D), what the last block received.
    query_attention: (B, K, P) float32, what the tokens were gathered with (heads' mean, or the one that was put in); None when [CLS] is classified (`qtfp.pool=cls`).
    """

    patch_tokens: torch.Tensor
    last_input: torch.Tensor
    query_attention: torch.Tensor | None = None


class Qtfp(Member):
    """`qtfp`: an adapted tower, `QueryPool`, a linear head; inference needs no more than these.

    The head reads the mean over queries of what they gathered (`qtfp.readout=mean`, paper), or the logit is the mean over
    queries of a linear head each (`each`, ours; one linear layer on the K D concatenated channels).
    Ablations: `qtfp.pool=cls` classifies [CLS] instead, `qtfp.flcl=0` and `qtfp.raal=0` drop a loss.
    """

    def __init__(self, config: MemberConfig, tower: Tower):
        super().__init__(config, tower)
        options = config.qtfp
        require(
            tower.width % options.heads == 0,
            f"qtfp.heads is {options.heads}; it must divide the tower's width {tower.width}",
        )
        require(
            options.temperature >= MIN_TEMPERATURE,
            f"qtfp.temperature is {options.temperature}; it must be at least {MIN_TEMPERATURE}",
        )
        require(
            options.raal_reference == "adapted" or config.adapter.kind != "full",
            "qtfp.raal_reference=pretrained needs an untouched tower, but adapter.kind=full trains it; "
            "use qtfp.raal_reference=adapted, or adapter.kind=lora or effort",
        )
        require(
            options.heads * options.key_width <= tower.width,
            f"qtfp.heads x qtfp.key_width is {options.heads} x {options.key_width}; "
            f"it may not exceed the tower's width {tower.width}",
        )
        self.pool, read = None, tower.width
        if options.pool == "queries":
            self.pool = QueryPool(
                tower.width,
                options.queries,
                heads=options.heads,
                std=options.query_std,
                key_width=options.key_width,
            )
            if options.readout == "each":
                read = options.queries * tower.width
        self.head = nn.Linear(read, 2)
        self.prototypes = Prototypes(tower.width, decay=options.ema_decay)

    def forward(
        self,
        images: torch.Tensor,
        *,
        attention: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> QtfpOutput:
        """Score pictures (B, 3, H, W). The two options are for interventions on a trained member.

        attention: (B, K, P), or what expands to it, gathers in place of the queries' own; rows sum to one.
        keep: (K,) or (B, K) bool, False for a query that is left out; the rest are averaged. At least one is kept.

        Raises:
            ValueError: an intervention on a member that classifies [CLS].
        """
        tokens = self.tower(images, adapter=self.adapter)
        if self.pool is None:
            if attention is not None or keep is not None:
                raise ValueError("qtfp.pool=cls has no queries: neither `attention` nor `keep` applies")
            pooled, looked, evidence = tokens.cls_token, None, {}
        else:
            gathered, looked = self.pool(tokens.patch_tokens, attention=attention)
            pooled = read_gathered(gathered, self.config.qtfp.readout, keep)
            evidence = {"query_attention": looked.unflatten(-1, tokens.grid)}
        return QtfpOutput(
            logit=two_class_logit(self.head(pooled)),
            features=pooled,
            evidence=evidence,
            patch_tokens=tokens.patch_tokens,
            last_input=tokens.last_input,
            query_attention=looked,
        )

    def loss(self, output: QtfpOutput, batch: Batch) -> tuple[torch.Tensor, dict[str, float | str]]:
        """L = L_CE + flcl L_FLCL + raal L_RAAL (paper, section 3) + diversity L_diversity (ours).

        A batch without the pictures that a loss needs leaves it out: its part is 0 and `skipped` says why.
        """
        options = self.config.qtfp
        loss = F.cross_entropy(as_two_class(output.logit), batch.labels)
        parts: dict[str, float | str] = {"ce": loss.item()}
        skipped = []
        for name, weight, obstacle, compute in (
            ("flcl", options.flcl, self._flcl_obstacle, self._flcl),
            ("raal", self._raal_weight(), self._raal_obstacle, self._raal),
            (
                "diversity",
                self._diversity_weight(),
                self._diversity_obstacle,
                self._diversity,
            ),
        ):
            if weight == 0:
                continue
            reason = obstacle(batch)
            if reason:
                skipped.append(f"{name}: {reason}")
                parts[name] = 0.0
                continue
            part = compute(output, batch)
            parts[name] = part.item()
            loss = loss + weight * part
        if skipped:
            parts["skipped"] = "; ".join(skipped)
        return loss, parts

    @torch.no_grad()
    def after_step(self, output: QtfpOutput, batch: Batch) -> dict[str, float]:
        """Update the prototypes with the step's last batch; returns its `signal_to_noise` numbers."""
        return self.prototypes.observe(output.patch_tokens, batch.labels)

    def _flcl_obstacle(self, batch: Batch) -> str:
        if not bool((batch.labels == 1).any()):
            return "no fake picture"
        if not bool((batch.labels == 0).any()):
            return "no real picture"
        return "" if self.prototypes.ready else "no prototypes yet"

    def _flcl(self, output: QtfpOutput, batch: Batch) -> torch.Tensor:
        options = self.config.qtfp
        device = output.patch_tokens.device.type
        half = torch.is_autocast_enabled(device)
        return fake_likelihood_loss(
            output.patch_tokens,
            batch.labels,
            self.prototypes.mean,
            temperature=options.temperature,
            weight_temperature=options.weight_temperature,
            weight_scope=options.weight_scope,
            chunk=options.chunk,
            dtype=torch.get_autocast_dtype(device) if half else None,
        )

    def _raal_weight(self) -> float:
        """What RAAL weighs now: by the steps so far, as the prototypes (stored with the member) count them."""
        options = self.config.qtfp
        if options.raal_warmup == 0 or options.raal == 0:
            return options.raal
        steps = int(self.prototypes.updates.min())
        return options.raal * late(steps / options.raal_warmup)

    def _raal_obstacle(self, batch: Batch) -> str:
        if self.pool is None:
            return "no queries"
        return "" if bool((batch.labels == 0).any()) else "no real picture"

    def _raal(self, output: QtfpOutput, batch: Batch) -> torch.Tensor:
        real = batch.labels == 0
        reference = self._cls_attention(output.last_input[real], batch.images[real])
        return attention_alignment_loss(output.query_attention[real], reference)

    def _diversity_weight(self) -> float:
        options = self.config.qtfp
        alone = self.pool is None or options.queries == 1
        return 0.0 if alone else options.diversity

    def _diversity_obstacle(self, batch: Batch) -> str:
        return "" if bool((batch.labels == 1).any()) else "no fake picture"

    def _diversity(self, output: QtfpOutput, batch: Batch) -> torch.Tensor:
        return diversity_loss(output.query_attention[batch.labels == 1])

    @torch.no_grad()
    def cls_attention(self, output: QtfpOutput, images: torch.Tensor) -> torch.Tensor:
        """The CLS -> patch attention that RAAL aligns to, of the pictures that `output` scored: (B, P), rows sum to one."""
        return self._cls_attention(output.last_input, images)

    @torch.no_grad()
    def _cls_attention(self, last_input: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """CLS -> patch attention of the last block (R, P): of the tower as adapted, or of the plain one."""
        if self.config.qtfp.raal_reference == "adapted":
            heads = self.tower.cls_attention(last_input, adapter=self.adapter)
        else:
            plain = self.tower(images)
            heads = self.tower.cls_attention(plain.last_input)
            # Checkpointed blocks are run again in the backward pass, with whatever adapter is in use by then.
            self.tower.use(self.adapter)
        return patch_attention(heads)


# ------------------------------------------------------------------------------------------------ synthetic study
@dataclass(frozen=True)
class Planted:
    """Images of random patch tokens of which a share is forged: every number of the study.

    A token is a common mean + an offset of its image (`image_share` of the variance) + noise, variance 1 in all; a
    forged one has the planted d added, ||d|| = `snr`. Train: `images` real + `images` fake fresh ones a step.
    """

    patches: int = 40
    width: int = 64
    snr: float = 3.0  # the paper reports 2.5 to 3
    image_share: float = 0.1
    images: int = 8
    steps: int = 100
    rate: float = 1e-2
    test_images: int = 300


FRACTIONS = (0.05, 0.1, 0.25, 0.5)
# The share of forged patches whose mechanism is looked into.
LOOK_INTO = 0.1


@dataclass(frozen=True)
class Variant:
    """One row of the study: what is classified, and with which losses.

    pool: `mean` over the patches, `cls` (a near-uniform attention), or `queries` with these options of `QueryPool`.
    flcl, raal, diversity, scope, readout: as in `QtfpConfig`. warmup: RAAL's, as a share of the steps.
    """

    pool: str = "queries"
    key_width: int = 0
    readout: str = "mean"
    flcl: float = 0.0
    raal: float = 0.0
    diversity: float = 0.0
    scope: str = "picture"
    warmup: float = 0.0


_OURS = Variant(key_width=16, readout="each")
VARIANTS = {
    "mean pooling": Variant("mean"),
    "CLS-like pooling": Variant("cls"),
    "plain queries": Variant(),
    "plain + FLCL + RAAL": Variant(flcl=0.14, raal=1.0, scope="batch"),
    "queries, mean readout": replace(_OURS, readout="mean"),
    "queries": _OURS,
    "queries + FLCL": replace(_OURS, flcl=0.14),
    "queries + RAAL": replace(_OURS, raal=1.0),
    "queries + RAAL, late": replace(_OURS, raal=1.0, warmup=0.25),
    "queries + diversity": replace(_OURS, diversity=0.1),
    "queries, everything": replace(_OURS, flcl=0.14, raal=1.0, warmup=0.25, diversity=0.1),
}


class PlantedWorld:
    """One seeded world of the study: its common mean, its forgery direction, and what its CLS looks at."""

    def __init__(self, planted: Planted, fraction: float, seed: int):
        self.planted, self.fraction = planted, fraction
        self.generator = torch.Generator().manual_seed(seed)
        common, direction, self.gaze = self._normal(3, planted.width)
        self.common = common
        self.forgery = planted.snr * F.normalize(direction, dim=0)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def draw(self, images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`images` real and as many fake ones: tokens (2n, P, D), labels (2n,), forged mask (2n, P)."""
        p = self.planted
        offset = p.image_share**0.5 * self._normal(2 * images, 1, p.width)
        noise = (1 - p.image_share) ** 0.5 * self._normal(2 * images, p.patches, p.width)
        labels = torch.arange(2).repeat_interleave(images)
        order = torch.rand((2 * images, p.patches), generator=self.generator).argsort(1)
        forged = (order < round(self.fraction * p.patches)) & (labels[:, None] == 1)
        tokens = self.common + offset + noise + forged[..., None] * self.forgery
        return tokens, labels, forged

    def cls_attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """A near-uniform attention along global semantics unrelated to forgery: (B, P, D) -> (B, P)."""
        scores = 0.5 * (tokens - self.common) @ F.normalize(self.gaze, dim=0)
        return scores.softmax(dim=-1)


class _StudyModel(nn.Module):
    """A linear residual adapter of the tokens, a pooling, a linear head: the member without its tower."""

    def __init__(self, world: PlantedWorld, variant: Variant):
        super().__init__()
        width = world.planted.width
        self.world, self.variant = world, variant
        self.adapter = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.adapter.weight)
        wide = variant.key_width
        self.pool = QueryPool(
            width,
            4,
            heads=2 if wide else 1,
            std=0.2 if wide else 0.02,
            key_width=wide,
        )
        self.head = nn.Linear(width * (4 if variant.readout == "each" else 1), 2)

    def forward(
        self, raw: torch.Tensor, *, attention: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raw tokens (B, P, D) -> two-class logits (B, 2), adapted tokens (B, P, D), attention (B, K, P)."""
        tokens = raw + self.adapter(raw)
        gathered, looked = self.pool(tokens, attention=attention)
        read = read_gathered(gathered, self.variant.readout)
        if self.variant.pool == "mean":
            read = tokens.mean(dim=1)
        elif self.variant.pool == "cls":
            read = (self.world.cls_attention(raw)[..., None] * tokens).sum(dim=1)
        return self.head(read), tokens, looked


def _study_loss(
    model: _StudyModel,
    raw: torch.Tensor,
    labels: torch.Tensor,
    prototypes: Prototypes,
    progress: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The variant's loss and the adapted tokens; progress: share of the steps that are done, in (0, 1]."""
    variant = model.variant
    logits, tokens, attention = model(raw)
    loss = F.cross_entropy(logits, labels)
    if variant.flcl and prototypes.ready:
        loss = loss + variant.flcl * fake_likelihood_loss(
            tokens,
            labels,
            prototypes.mean,
            temperature=0.1,
            weight_temperature=1.0,
            weight_scope=variant.scope,
        )
    if variant.raal:
        weight = variant.raal
        if variant.warmup:
            weight *= late(progress / variant.warmup)
        real = labels == 0
        reference = model.world.cls_attention(raw[real])
        loss = loss + weight * attention_alignment_loss(attention[real], reference)
    if variant.diversity:
        loss = loss + variant.diversity * diversity_loss(attention[labels == 1])
    return loss, tokens


def study_run(planted: Planted, variant: Variant, fraction: float, seed: int) -> dict[str, float]:
    """Train one variant of the study on fresh images of its world; what it does on images it has not seen.

    auc: of the images. uniform: the same with uniform attention in place of the queries'. attention, w: inside a fake, AUC
    for forged against untouched patches of the queries' mean attention and of w. correlation: between queries, on fakes and
    on reals (`correlation_real`). entropy: of an attention, 1 for a uniform one.
    """
    world = PlantedWorld(planted, fraction, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _StudyModel(world, variant)
    prototypes = Prototypes(planted.width, decay=0.99)
    optimizer = torch.optim.Adam(model.parameters(), lr=planted.rate)
    for step in range(1, planted.steps + 1):
        raw, labels, _ = world.draw(planted.images)
        loss, tokens = _study_loss(model, raw, labels, prototypes, step / planted.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        prototypes.observe(tokens.detach(), labels)
    return _study_measure(model, prototypes)


@torch.no_grad()
def _study_measure(model: _StudyModel, prototypes: Prototypes) -> dict[str, float]:
    planted = model.world.planted
    raw, labels, forged = model.world.draw(planted.test_images)
    logits, tokens, attention = model(raw)
    uniform = torch.full((1, 1, planted.patches), 1 / planted.patches)
    flat, _, _ = model(raw, attention=uniform)
    fake = labels == 1
    weights = fake_likelihood_weights(tokens[fake], prototypes.mean)
    tiny = torch.finfo(attention.dtype).tiny
    entropy = -(attention * attention.clamp_min(tiny).log()).sum(dim=-1).mean()
    return {
        "auc": metrics.auc(labels.numpy(), two_class_logit(logits).numpy()),
        "uniform": metrics.auc(labels.numpy(), two_class_logit(flat).numpy()),
        "attention": auc_inside(attention[fake].mean(dim=1), forged[fake]),
        "w": auc_inside(weights, forged[fake]),
        "correlation": overlap(attention[fake]).mean().item(),
        "correlation_real": overlap(attention[~fake]).mean().item(),
        "entropy": entropy.item() / math.log(planted.patches),
    }


def auc_inside(scores: torch.Tensor, forged: torch.Tensor) -> float:
    """Mean over pictures of the AUC of `scores` (B, P) for forged against untouched patches, `forged` (B, P) bool.

    Pictures that are forged everywhere or nowhere say nothing and are left out.

    Raises:
        ValueError: no picture has both.
    """
    both = forged.any(dim=1) & ~forged.all(dim=1)
    if not bool(both.any()):
        raise ValueError("no picture has forged and untouched patches")
    pairs = zip(forged[both].cpu().numpy(), scores[both].float().cpu().numpy())
    return statistics.fmean(metrics.auc(f.astype("int64"), s) for f, s in pairs)


def study_snr(planted: Planted, fraction: float, seed: int) -> dict[str, float]:
    """The signal-to-noise ratios of planted tokens after 400 batches of prototypes, mean over 50 further batches.

    `patch`: forged against real patches along the held-out prototypes' direction, in standard deviations of real
    patches, by the planted masks; the others are those of `signal_to_noise`.
    """
    world = PlantedWorld(planted, fraction, seed)
    prototypes = Prototypes(planted.width, decay=0.99)
    for _ in range(400):
        prototypes.observe(*world.draw(planted.images)[:2])
    collected: dict[str, list[float]] = {}
    for _ in range(50):
        tokens, labels, forged = world.draw(planted.images)
        delta = fake_likeness(unit_tokens(tokens), prototypes.mean)
        real = delta[labels == 0]
        apart = (delta[forged].mean() - real.mean()) / real.std()
        numbers = prototypes.observe(tokens, labels) | {"patch": apart.item()}
        for name, value in numbers.items():
            collected.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in collected.items()}


def snr_trap(image_share: float, seed: int) -> float:
    """The in-batch ratio of 8 + 8 images with 256 patches of width 1024 and no signal at all."""
    planted = Planted(patches=256, width=1024, snr=0.0, image_share=image_share)
    tokens, labels, _ = PlantedWorld(planted, 0.0, seed).draw(8)
    sums = class_sums(tokens, labels, torch.zeros(2, planted.width))
    return signal_to_noise(sums, None)["snr_batch"]


def _report_study(seeds: int) -> None:
    planted = Planted()
    print(
        f"planted ||d|| / sigma = {planted.snr}; {planted.images} real + {planted.images} fake images of "
        f"{planted.patches} tokens of width {planted.width} a step, {planted.steps} steps; {seeds} seeds"
    )
    runs = {
        (variant, f): [study_run(planted, options, f, seed) for seed in range(seeds)]
        for variant, options in VARIANTS.items()
        for f in FRACTIONS
    }
    print("\nAUC on unseen images, mean +- standard deviation over the seeds")
    _print_row("forged share of patches", [f"{f:.0%}" for f in FRACTIONS])
    for variant in VARIANTS:
        cells = [[run["auc"] for run in runs[variant, f]] for f in FRACTIONS]
        _print_row(variant, [_spread(values) for values in cells])
    print(f"\nwhat the queries do at {LOOK_INTO:.0%} forged patches")
    titles = {
        "uniform": "AUC, uniform",
        "attention": "patches by A",
        "w": "patches by w",
        "correlation": "corr. on fakes",
        "correlation_real": "corr. on reals",
        "entropy": "entropy/ln P",
    }
    _print_row("", list(titles.values()))
    for variant, options in VARIANTS.items():
        if options.pool == "queries":
            found = runs[variant, LOOK_INTO]
            cells = [_spread([run[name] for run in found]) for name in titles]
            _print_row(variant, cells)
    print("\nsignal-to-noise ratios, mean +- standard deviation over the seeds")
    settings = {f"{f:.0%}": (planted, f) for f in FRACTIONS}
    settings["no signal"] = (Planted(snr=0.0), 0.25)
    _print_row("forged share of patches", list(settings))
    found = {column: [study_snr(p, f, seed) for seed in range(seeds)] for column, (p, f) in settings.items()}
    rows = {
        "patch": "forged patches, held out",
        "snr_held_out": "images, held out",
        "snr_ema": "||mu_r - mu_f||/sigma, EMA",
        "snr_batch": "||mu_r - mu_f||/sigma, in batch",
    }
    for name, title in rows.items():
        values = [[numbers[name] for numbers in runs] for runs in found.values()]
        _print_row(title, [_spread(v) for v in values])
    print(
        "\nthe trap: no signal at all, 8 + 8 images, 256 patches, width 1024, prototypes from the same batch: "
        f"{snr_trap(0.0, 0):.1f}; with a tenth of the variance per image: {snr_trap(0.1, 0):.1f}"
    )


def _spread(values: list[float]) -> str:
    """`mean +- standard deviation`; a single value alone."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} +- {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def _print_row(title: str, cells: list[str]) -> None:
    print(f"{title:<32}" + "".join(f"{cell:>17}" for cell in cells), flush=True)


# ------------------------------------------------------------------------------------------------ memory and time
@dataclass(frozen=True)
class StepCost:
    """Seconds of the fastest measured training step, and the peak memory of the process or GPU in bytes."""

    batch: int
    seconds: float
    peak: int


def _peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on every system, and for this measurement alone

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_steps(member: Qtfp, sizes: tuple[int, ...], *, device: str, repeats: int) -> Iterator[StepCost]:
    """Train `member` for 1 + `repeats` steps on noise at each batch size (rising; half real, half fake).

    The first step fills the prototypes, so that FLCL takes part in the others. On a GPU under bf16.
    """
    side = member.config.view.side
    trained = [p for p in member.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=member.config.optim.lr)
    for size in sizes:
        images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
        batch = Batch(images, torch.arange(size, device=device) % 2)
        fastest = float("inf")
        for _ in range(1 + repeats):
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                output = member(batch.images)
                loss, parts = member.loss(output, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            member.after_step(output, batch)
            del output, loss
            if device == "cuda":
                torch.cuda.synchronize()
            if "skipped" not in parts:
                fastest = min(fastest, time.perf_counter() - start)
        yield StepCost(size, fastest, _peak_memory(device))


def _report_memory() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = preset("giant", "qtfp")
    start = time.perf_counter()
    tower = build_tower(config.tower)
    # Random weights, and Effort's factors left at zero: the same tensors and operations, without 96 decompositions.
    add_adapter(tower, config.name, config.adapter, decompose=False)
    member = Qtfp(config, tower).to(device).train()
    trained, total = count_parameters(member)
    where = "GPU, bf16" if device == "cuda" else "CPU, float32"
    print(
        f"{config.tower.name} at {config.view.side} px, effort rank {config.adapter.rank}, on {where}, "
        f"{torch.get_num_threads()} CPU threads: {trained:,} of {total:,} parameters train; "
        f"built in {time.perf_counter() - start:.0f} s, weights {total * 4 / 1e9:.2f} GB, "
        f"peak so far {_peak_memory(device) / 1e9:.2f} GB"
    )
    sizes = (2, 4, 16) if device == "cuda" else (2, 4)
    costs = []
    for cost in measure_steps(member, sizes, device=device, repeats=2):
        costs.append(cost)
        print(
            f"batch {cost.batch}: {cost.seconds:.2f} s a step, peak {cost.peak / 1e9:.2f} GB",
            flush=True,
        )
    _print_batch_16(costs[0], costs[1])
    patches = (config.view.side // config.tower.arch.patch) ** 2
    rows, columns = 8 * patches, 16 * patches
    print(
        f"on top of that FLCL's matrix, which grows with the square: {rows} fake rows x {columns} patches = "
        f"{rows * columns * 4 / 1e6:.1f} MB in float32, {rows * columns * 2 / 1e6:.1f} MB in bf16, one at a time; "
        f"qtfp.chunk=256 makes it {256 * columns * 2 / 1e6:.1f} MB in bf16"
    )


def _print_batch_16(small: StepCost, large: StepCost) -> None:
    """The straight line through two measured batch sizes, drawn to 16."""
    pictures, further = large.batch - small.batch, 16 - large.batch
    for title, a, b, unit in (
        ("peak", small.peak / 1e9, large.peak / 1e9, "GB"),
        ("step", small.seconds, large.seconds, "s"),
    ):
        slope = (b - a) / pictures
        print(
            f"{title} at batch 16, extrapolated: ({b:.2f} - {a:.2f}) / {pictures} = {slope:.3f} {unit} a picture; "
            f"{b:.2f} + {further} x {slope:.3f} = {b + further * slope:.1f} {unit}"
        )


def main(argv: list[str] | None = None) -> int:
    """`--study`: the synthetic study. `--memory`: peak memory and step time at giant scale."""
    parser = argparse.ArgumentParser(prog="python -m solution.models.qtfp", description=main.__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--study", action="store_true")
    action.add_argument("--memory", action="store_true")
    parser.add_argument("--seeds", type=int, default=5, help="of the study")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}; it must be at least 1")
    if arguments.study:
        _report_study(arguments.seeds)
    else:
        _report_memory()
    return 0


if __name__ == "__main__":
    sys.exit(main())
