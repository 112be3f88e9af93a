"""QTFP's losses in a planted world: random patch tokens of which a share is forged, and what each variant makes of them.

Takes `Planted` (B images of P patch tokens, D wide) and variants of the member's own pool and losses; gives numbers by name.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from solution.evaluation import metrics
from solution.models.qtfp import (
    Prototypes,
    QueryPool,
    attention_alignment_loss,
    class_sums,
    diversity_loss,
    fake_likelihood_loss,
    fake_likelihood_weights,
    fake_likeness,
    late,
    overlap,
    read_gathered,
    signal_to_noise,
    unit_tokens,
)
from solution.models.streams import two_class_logit


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


def report_study(seeds: int) -> None:
    """Print the study's table, over so many seeds."""
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
