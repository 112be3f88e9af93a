"""The query-token member with its losses: queries gather the patches that look forged, [CLS] is not classified.

Takes the member's view (B, 3, H, W); returns `QtfpOutput`. The losses and the prototypes take tokens (B, P, D) and
nothing else, so the synthetic study (studies/planted_world.py) runs the very code that trains the member.
Source: Wang et al., "Beyond [CLS] Token", CVPR 2026; no code is public, and what the paper leaves open is marked `ours`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.autograd.function import once_differentiable

from solution.config import MemberConfig, require
from solution.models.blocks import merge_heads, split_heads
from solution.models.member import Member, Parts
from solution.models.streams import as_two_class, two_class_logit
from solution.models.towers import Tower, patch_attention
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

    patch_tokens: (B, P, D) after the tower's final LayerNorm. last_input: (B, 1 + P, D) or with registers, what the last block received.
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

    def loss(self, output: QtfpOutput, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """L = L_CE + flcl L_FLCL + raal L_RAAL (paper, section 3) + diversity L_diversity (ours).

        A batch without the pictures that a loss needs leaves it out: its part is 0 and `skipped` says why.
        """
        options = self.config.qtfp
        loss = F.cross_entropy(as_two_class(output.logit), batch.labels)
        parts: Parts = {"ce": loss.detach()}
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
            parts[name] = part.detach()
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
        return patch_attention(heads, self.tower.prefix)
