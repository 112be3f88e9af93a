"""An epoch as a plan of batches: pure functions of (labels, sources, settings, seed, epoch).

Takes (N,) labels 0/1 and N source names; returns lists of `Sample`. Nothing here reads a file or holds a state, so an
interrupted run replays exactly and ranks never disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from solution.config import ConfigError, SamplingConfig


class Sample(NamedTuple):
    """One planned sample: which item, at which position of which epoch, and whether it becomes a self-blended fake."""

    epoch: int
    position: int
    index: int
    blend: bool


def plan_epoch(
    labels: np.ndarray,
    sources: Sequence[str],
    *,
    sampling: SamplingConfig,
    blend_p: float,
    batch: int,
    seed: int,
    epoch: int,
    batches: int = 0,
    groups: Sequence[str] = (),
) -> list[list[Sample]]:
    """The batches of one epoch, over all ranks: a pure function of its arguments.

    labels: (N,) 0/1. `batch` samples each; an epoch draws N samples, the remainder is left out, or as many as `batches`
    take, in whole shuffled passes over the data. With `balanced` or `temperature`, every batch is half real, half fake.
    A fake slot becomes a self-blended real with `blend_p`. groups: N names (`sampling.paired`): a real slot then takes a
    picture of the group of the fake beside it, where the group has one, and that real itself beside a self-blended one.

    Raises:
        ConfigError: a class is missing that the balance needs, or nothing has a partner.
    """
    rng = np.random.default_rng([seed, epoch, 202])
    real, fake = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    total = batches * batch or len(labels)
    if sampling.balance == "none":
        order = _passes(np.arange(len(labels)), total, rng)
    else:
        if not len(real) or not len(fake):
            raise ConfigError(
                f"sampling.balance={sampling.balance} needs both classes; real {len(real)}, fake {len(fake)}"
            )
        half = -(-total // 2) if batches else total // 2
        draws = [_draw(group, half, sources, sampling, rng) for group in (real, fake)]
        # real, fake, real, fake: every even batch is half and half
        order = np.stack(draws, axis=1).reshape(-1)[:total]
    blend = (labels[order] == 1) & (rng.random(len(order)) < blend_p)
    if blend.any():
        if not len(real):
            raise ConfigError("augment.self_blend_p needs real pictures to blend")
        order = np.where(blend, rng.choice(real, len(order)), order)
    if sampling.paired:
        fakes = slice(1, len(order), 2)
        beside = slice(0, fakes.stop // 2 * 2, 2)  # an odd last real has no fake
        order[beside] = _partners(order[fakes], blend[fakes], order[beside], real, groups, rng)
    samples = [Sample(epoch, p, int(i), bool(b)) for p, (i, b) in enumerate(zip(order, blend))]
    return [samples[start : start + batch] for start in range(0, len(samples) - batch + 1, batch)]


def _draw(
    group: np.ndarray,
    count: int,
    sources: Sequence[str],
    sampling: SamplingConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """`count` indices of `group`: whole shuffled passes, or source-weighted draws with `temperature`."""
    if sampling.balance == "balanced":
        return _passes(group, count, rng)
    names = np.array([sources[i] for i in group])
    sizes = Counter(names.tolist())
    # A source of n pictures is drawn with weight n * n ** -temperature; each of its pictures with n ** -temperature.
    weights = np.array([sizes[n] ** -sampling.temperature for n in names])
    return rng.choice(group, count, p=weights / weights.sum())


def _partners(
    fakes: np.ndarray,
    blended: np.ndarray,
    reals: np.ndarray,
    real: np.ndarray,
    groups: Sequence[str],
    rng: np.random.Generator,
) -> np.ndarray:
    """For each drawn fake a real picture of its group, drawn anew; where it has none, the one drawn before (`reals`).

    blended: which fakes are self-blended: their partner is the picture that they are made of, as in SBI's batches.
    """
    by_group: dict[str, list[int]] = {}
    for index in real:
        if groups[index]:
            by_group.setdefault(groups[index], []).append(index)
    if not blended.any() and not any(groups[index] in by_group for index in fakes):
        raise ConfigError(
            "sampling.paired: no drawn fake has a real picture of its group; name each fake's source video in the manifest's "
            "column `group`, or set sampling.paired=false"
        )
    return np.array(
        [
            fake if own else rng.choice(by_group[groups[fake]]) if groups[fake] in by_group else drawn
            for fake, own, drawn in zip(fakes, blended, reals, strict=True)
        ]
    )


def _passes(group: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` members of `group`: whole shuffled passes over it, the last one cut."""
    passes = -(-count // len(group))
    return np.concatenate([rng.permutation(group) for _ in range(passes)])[:count]
