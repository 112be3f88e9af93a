"""`stream` on a Ray cluster: actors that each load an ensemble, fed batches of inputs in any order.

Takes batches of (index, Input), gives `Scored` rows; both cross as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solution.data.images import Input
from solution.scoring.ensemble import ScoringError, load_ensemble
from solution.scoring.journal import Scored
from solution.scoring.stream import Reader, stream


class RayScorer:
    """An actor of `ray_stream`: an ensemble of its own, and a batch of inputs, as JSON, to its rows, as JSON."""

    def __init__(self, load: Mapping[str, Any], read: Mapping[str, Any]) -> None:
        self.ensemble = load_ensemble(**load)
        self.reader = Reader(self.ensemble.views, **read)

    def __call__(self, given: dict[str, np.ndarray]) -> dict[str, list[str]]:
        (text,) = given["batch"]
        batch = [(index, Input(name, Path(path), kind)) for index, name, path, kind in json.loads(str(text))]
        (rows,) = stream(self.ensemble, [batch], self.reader, workers=0)
        return {"rows": [json.dumps(rows)]}


def ray_stream(
    batches: Iterable[Sequence[tuple[int, Input]]],
    load: Mapping[str, Any],
    read: Mapping[str, Any],
    *,
    gpu: bool,
) -> Iterator[list[Scored]]:
    """`stream` on Ray Data: actors that come and go, each with its own ensemble; batches end in any order.

    load, read: what `load_ensemble` and `Reader` are called with in each actor (weights and inputs at the same paths
    everywhere). gpu: one GPU an actor, else one core.

    Raises:
        ScoringError: Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ScoringError("--engine ray needs Ray: pip install 'ray[data]' (or leave --engine out)") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    total = ray.cluster_resources().get("GPU" if gpu else "CPU", 1)
    listed = [{"batch": json.dumps([(i, x.name, str(x.path), x.kind) for i, x in batch])} for batch in batches]
    if not listed:
        return
    scored = ray.data.from_items(listed).map_batches(
        RayScorer,
        fn_constructor_args=(dict(load), dict(read)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(total))),
        num_gpus=1 if gpu else 0,
        num_cpus=1,
    )
    for row in scored.iter_rows():
        yield [Scored(*fields) for fields in json.loads(row["rows"])]
