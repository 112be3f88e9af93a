"""What was computed of pictures under a condition, kept in files: an interrupted run goes on, a finished one only reads.

Takes items and a scorer; gives raw logits (N,) float64 by member. A file's name hashes all that its arrays depend on: the
bundle, the pictures' files, the condition, and the code that made them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solution.evaluation.measure import Condition, EvaluationError, Pictures
from solution.io import atomic_file, source_hash, stamp
from solution.scoring.journal import SCORING

CHUNK = 512  # pictures between two steps of the progress bar

Logits = dict[str, np.ndarray]
Scorer = Callable[..., Logits]  # (items, *, degradation, seed, progress) -> logits


def condition_logits(
    items: Sequence[Any],
    condition: Condition,
    *,
    scorer: Scorer,
    key: Any,
    folder: Path,
    done: Callable[[int], Any] = lambda count: None,
) -> Logits:
    """The logits of `items` under `condition`, from `folder` where it has them, and put there as soon as they are known.

    key: what the scores depend on beside the pictures, the condition and the code, such as the bundle's hash; JSON values.
    done: is told how many pictures have been scored.
    """
    found = kept_logits(items, condition, key=key, folder=folder)
    if found is None:
        found = score(items, condition, scorer, done)
        keep_logits(found, items, condition, key=key, folder=folder)
    else:
        done(len(items))
    return found


def kept_logits(items: Sequence[Any], condition: Condition, *, key: Any, folder: Path) -> Logits | None:
    """What `folder` has of these items under this condition; None: nothing."""
    pictures = Pictures.of(items)
    path = kept_path(folder, condition, pictures, key)
    return _read_logits(path, pictures.names) if path.exists() else None


def keep_logits(logits: Logits, items: Sequence[Any], condition: Condition, *, key: Any, folder: Path) -> None:
    """Put them where `kept_logits` looks."""
    pictures = Pictures.of(items)
    folder.mkdir(parents=True, exist_ok=True)
    # By member, whose name might be `names`.
    arrays = {f"of {name}": values for name, values in logits.items()}
    write_arrays(kept_path(folder, condition, pictures, key), {"names": np.array(pictures.names), **arrays})


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


# ------------------------------------------------------------------------------------------------ files
def kept_path(folder: Path, condition: Condition, pictures: Pictures, key: Any, *code: str) -> Path:
    """Where arrays of these pictures under this condition are kept.

    key: as in `condition_logits`. code: modules that made them beside those of `SCORING`, as `source_hash` takes them.
    """
    degradation = condition.degradation
    depends = {
        "key": key,
        "pictures": pictures.fingerprint(),
        "files": [stamp(path) for path in pictures.paths],
        "degradation": degradation and dataclasses.asdict(degradation),
        "seed": condition.seed if degradation else None,
        "code": code_hash(*code),
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    slug = "".join(c if c.isalnum() or c == "." else "-" for c in condition.name)
    return folder / f"{slug}-{digest[:16]}.npz"


@functools.cache  # of the code as this run began with it: what is edited meanwhile makes none of its scores
def code_hash(*code: str) -> str:
    """Of the code that makes a logit, and of further modules, as `source_hash` takes them."""
    return source_hash(*SCORING, *code)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Whole or not at all: an interrupted write leaves no file."""
    with atomic_file(path, binary=True) as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote.

    Raises:
        EvaluationError: another kind of file, or a damaged one.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: not a file of scores ({error}); delete it and run again") from None


def _read_logits(path: Path, names: Sequence[str]) -> Logits:
    arrays = read_arrays(path)
    if tuple(arrays.pop("names", ())) != tuple(names):
        raise EvaluationError(f"{path}: holds other pictures than its name says; delete it and run again")
    return {name.removeprefix("of "): x for name, x in arrays.items()}
