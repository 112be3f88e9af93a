"""Raw logits of pictures under a condition, kept in files: an interrupted run goes on, a finished one scores nothing.

Takes items and a scorer; gives logits (N,) float64 by member. A file's name says bundle, pictures and condition by hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solution.evaluation.measure import Condition, EvaluationError, Pictures
from solution.io import atomic_file, source_hash

CHUNK = 512  # pictures between two steps of the progress bar

Logits = dict[str, np.ndarray]
Scorer = Callable[..., Logits]  # (items, *, degradation, seed, progress) -> logits


def condition_logits(
    items: Sequence[Any],
    condition: Condition,
    *,
    scorer: Scorer,
    key: str,
    folder: Path,
    done: Callable[[int], Any] = lambda count: None,
) -> Logits:
    """The logits of `items` under `condition`, from `folder` where it has them, and put there as soon as they are known.

    key: what the scores depend on beside the pictures and the condition, such as the bundle's hash. done: is told how many
    pictures have been scored.
    """
    found = kept_logits(items, condition, key=key, folder=folder)
    if found is None:
        found = score(items, condition, scorer, done)
        keep_logits(found, items, condition, key=key, folder=folder)
    else:
        done(len(items))
    return found


def kept_logits(items: Sequence[Any], condition: Condition, *, key: str, folder: Path) -> Logits | None:
    """What `folder` has of these items under this condition; None: nothing."""
    pictures = Pictures.of(items)
    path = folder / _score_file(condition, key, pictures.fingerprint())
    return _read_logits(path, pictures.names) if path.exists() else None


def keep_logits(logits: Logits, items: Sequence[Any], condition: Condition, *, key: str, folder: Path) -> None:
    """Put them where `kept_logits` looks."""
    pictures = Pictures.of(items)
    folder.mkdir(parents=True, exist_ok=True)
    _write_logits(folder / _score_file(condition, key, pictures.fingerprint()), pictures.names, logits)


def score(
    items: Sequence[Any],
    condition: Condition,
    scorer: Scorer,
    done: Callable[[int], Any],
) -> Logits:
    """The scorer's logits, chunk by chunk, checked."""
    parts: list[Logits] = []
    for start in range(0, len(items), CHUNK):
        chunk = items[start : start + CHUNK]
        logits = scorer(
            chunk,
            degradation=condition.degradation,
            seed=condition.seed,
            progress=False,
        )
        for name, values in logits.items():
            if np.shape(values) != (len(chunk),) or not np.isfinite(values).all():
                raise EvaluationError(
                    f"{name}, {condition.name}: expected {len(chunk)} finite logits, found "
                    f"{int(np.isfinite(values).sum())} finite in shape {np.shape(values)}"
                )
        parts.append(logits)
        done(len(chunk))
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _score_file(condition: Condition, bundle: str, fingerprint: str) -> str:
    degradation = condition.degradation
    key = {
        "bundle": bundle,
        "pictures": fingerprint,
        "degradation": degradation and dataclasses.asdict(degradation),
        "seed": condition.seed if degradation else None,
        "engine": _engine_hash() if degradation else None,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    slug = "".join(c if c.isalnum() or c == "." else "-" for c in condition.name)
    return f"{slug}-{digest[:16]}.npz"


def _engine_hash() -> str:
    """Of the engine's source: degraded scores that an older engine made are not taken for this one's."""
    return source_hash("data.degradation", "data.degradation_ops")


def _write_logits(path: Path, names: Sequence[str], logits: Logits) -> None:
    """Whole or not at all: an interrupted write leaves no score file."""
    arrays = {f"of {name}": values for name, values in logits.items()}
    with atomic_file(path, binary=True) as file:
        np.savez_compressed(file, names=np.array(names), **arrays)


def _read_logits(path: Path, names: Sequence[str]) -> Logits:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: not a file of scores ({error}); delete it and run again") from None
    if tuple(arrays.pop("names", ())) != tuple(names):
        raise EvaluationError(f"{path}: holds other pictures than its name says; delete it and run again")
    return {name.removeprefix("of "): x for name, x in arrays.items()}
