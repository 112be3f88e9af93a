"""What happens to pictures before they are scored (clean, degraded, sweeps), and which of them are.

Takes manifest items; returns `Condition`s and shorter lists of the same items, drawn by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from solution.config import OPS, DegradationConfig
from solution.evaluation.measure import Condition

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
JPEG_QUALITIES = (100, 90, 80, 70, 60, 50, 40, 30, 20, 10, 5)  # the paper's sweep
NOISE_SIGMAS = (0, 10, 20, 30, 40, 50, 60)  # of 255, the paper's sweep


def degraded_conditions(seeds: Sequence[int]) -> list[Condition]:
    """Every picture through the whole engine, its ops and strengths drawn from (seed, picture name)."""
    config = DegradationConfig(global_p=1.0)
    text = f"degraded (engine, global_p 1, op_p {config.op_p}, strength ~ Beta({config.beta}, {config.beta}))"
    return [Condition(f"degraded, seed {s}", "degraded", text, float(s), s, config) for s in seeds]


def sweep_conditions(seed: int) -> list[Condition]:
    """Every op alone and the random mix at rising strength, JPEG quality and Gaussian noise (the paper's sweeps)."""
    found = []
    for op in ("mix", *OPS):
        for strength in STRENGTHS:
            config = DegradationConfig(global_p=1.0, strength=strength)
            text = f"random mix of all ops (op_p {config.op_p}) at strength {strength}"
            if op != "mix":
                config = _single(op, strength=strength, distractor_p=1.0)
                text = f"{op.replace('_', ' ').replace('jpeg', 'JPEG')} alone at strength {strength}"
            found.append(Condition(f"{op} {strength}", op, text, strength, seed, config))
    for quality in JPEG_QUALITIES:
        config = _single("jpeg", jpeg_quality=(quality, quality))
        name, text = f"jpeg_quality {quality}", f"JPEG at quality {quality}"
        found.append(Condition(name, "jpeg_quality", text, quality, seed, config))
    for sigma in NOISE_SIGMAS:
        config = _single("gaussian_noise", noise_sigma=float(sigma))
        name, text = f"noise_sigma {sigma}", f"Gaussian noise of sigma {sigma}/255"
        found.append(Condition(name, "noise_sigma", text, sigma, seed, config))
    return found


def _single(op: str, **settings: Any) -> DegradationConfig:
    """One op, always, and nothing else."""
    return DegradationConfig(global_p=1.0, op_p=1.0, cycle_p=0.0, ops=(op,), **settings)


# ------------------------------------------------------------------------------------------------ pictures
def limit_items(items: Sequence[Any], limit: int, seed: int) -> list[Any]:
    """At most `limit` items, drawn in proportion from each (source, label), in their old order; 0: all."""
    if not 0 < limit < len(items):
        return list(items)
    rng = np.random.default_rng(seed)
    strata: dict[tuple[str, int], list[int]] = {}
    for index, item in enumerate(items):
        strata.setdefault((item.source, item.label), []).append(index)
    exact = {k: limit * len(rows) / len(items) for k, rows in strata.items()}
    counts = {k: int(value) for k, value in exact.items()}
    by_remainder = sorted(exact, key=lambda k: (counts[k] - exact[k], k))
    for key in by_remainder[: limit - sum(counts.values())]:
        counts[key] += 1
    chosen = [int(i) for k in strata for i in rng.permutation(strata[k])[: counts[k]]]
    return [items[i] for i in sorted(chosen)]


def limit_frames(items: Sequence[Any], frames: int) -> list[Any]:
    """At most `frames` items of each (source, label, video), evenly spaced in their order; 0: all."""
    if frames <= 0:
        return list(items)
    rows: dict[tuple[str, int, str], list[int]] = {}
    kept = []
    for index, item in enumerate(items):
        if item.video:
            rows.setdefault((item.source, item.label, item.video), []).append(index)
        else:
            kept.append(index)
    for of_video in rows.values():
        count = min(frames, len(of_video))
        # The middle frame of each of `count` equal stretches.
        kept += [of_video[int((k + 0.5) * len(of_video) / count)] for k in range(count)]
    return [items[i] for i in sorted(kept)]
