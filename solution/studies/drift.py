"""Attention drift measured: what members look at and say of clean pictures and of the same ones ever more degraded.

Takes an ensemble and `Item`s; keeps one file of arrays a condition in DIR/measured (an interrupted run goes on, a
finished one only draws again), and gives plain JSON values, Markdown and figures. Arrays are (N,) float64 in the order
of the pictures under `MEMBER|QUANTITY`, nan where there is nothing to measure; features are (N, F) float32.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from solution.config import OPS, SCORE_CAM_CHANNELS, DegradationConfig
from solution.data.degradation import use_one_opencv_thread
from solution.data.images import stable_seed
from solution.data.manifest import Item
from solution.data.views import open_picture, quiet_worker
from solution.evaluation import maps
from solution.evaluation.explainer import ATTENTION, CAM, Seen, locators_of, see
from solution.evaluation.kept import kept_path, read_arrays, write_arrays
from solution.evaluation.maps import Probe
from solution.evaluation.measure import CLEAN, ENSEMBLE, Condition, Pictures
from solution.models.streams import Stream
from solution.scoring.ensemble import Ensemble
from solution.scoring.vote import combine

RANDOM = 3  # random maps a picture, the control of deletion and insertion
DRAWS = 1000  # of the bootstrap
GROUPS = 20  # of the jackknife
CKA_PICTURES = 2000  # its matrices are pictures x pictures
UNIFORM = "uniform"

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What a run measures beside one look at every picture.

    cam: pictures that get a Score-CAM under every condition. channels: of it (None: all). full: on so many of these,
    clean, all channels too, for their agreement. seed: of the degradation and every draw. faces: whether there is a
    detector; without one, nothing is said of the background and members see whole pictures.
    """

    cam: int = 0
    channels: int | None = SCORE_CAM_CHANNELS
    full: int = 0
    seed: int = 7
    faces: bool = True


def conditions(strengths: Sequence[float], seed: int) -> list[Condition]:
    """Clean, and the engine with every op but the distractor fired at each strength (arXiv 2604.25889, its analysis).

    The paper forces its one op_p to 1, which also governs the leading cycles of JPEG and resize: `cycle_p` here.
    JPEG's quality does not depend on strength, so strength 0 is not clean.
    """
    found = [CLEAN]
    ops = tuple(op for op in OPS if op != "distractor")
    for s in strengths:
        config = DegradationConfig(global_p=1.0, op_p=1.0, cycle_p=1.0, strength=s, ops=ops)
        text = f"every op but the distractor, strength {s:g}"
        found.append(Condition(f"strength {s:g}", "drift", text, s, seed, config))
    return found


# ------------------------------------------------------------------------------------------------ pictures
class _Pictures(Dataset):
    def __init__(self, items, condition: Condition, views, *, faces: bool) -> None:
        self.items, self.condition, self.views = list(items), condition, views
        self.locators = locators_of(views) if faces else {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Seen:
        item, how = self.items[index], self.condition
        picture = open_picture(item.path, item.name, how.degradation, how.seed)
        return see(picture, self.views, self.locators)


def _batches(data: _Pictures, size: int, workers: int) -> Iterator[tuple[slice, list[Seen]]]:
    loader = DataLoader(
        data,
        batch_size=size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )
    start = 0
    for seen in loader:
        yield slice(start, start + len(seen)), seen
        start += len(seen)


# ------------------------------------------------------------------------------------------------ one condition
@dataclass
class Chosen:
    """Which pictures get more than one look, (N,) bool each; faces: (N, 4), the clean pictures', once they are known."""

    cam: np.ndarray
    judged: np.ndarray
    full: np.ndarray
    faces: np.ndarray | None = None


def choose(items: Sequence[Item], cams: Iterable[Item], settings: Settings) -> Chosen:
    """cams: the pictures with Score-CAM. Maps are judged on the fakes among them, for their class is fake."""
    wanted = {item.name for item in cams}
    cam = np.array([item.name in wanted for item in items])
    fake = np.array([item.label == 1 for item in items])
    full = np.zeros(len(items), bool)
    full[np.flatnonzero(cam)[: settings.full]] = True
    return Chosen(cam, cam & fake, full)


def passes(
    probe: Probe,
    pictures: int,
    chosen: Chosen,
    settings: Settings,
    left: Sequence[Condition],
) -> int:
    """Forward passes of one member under the conditions that are left to measure."""
    cams = int(chosen.cam.sum()) * min(settings.channels or probe.width, probe.width)
    count = len(left) * (pictures + cams)
    if CLEAN in left:
        kinds = 2 + probe.evidence + RANDOM
        count += int(chosen.judged.sum()) * judging_passes(kinds)
        count += int(chosen.full.sum()) * probe.width
    return count


def judging_passes(count: int) -> int:
    """Forward passes that judge so many maps of one picture."""
    return 2 * (maps.STEPS + 1) * count


class Measurement:
    """One condition measured: `arrays` by `MEMBER|QUANTITY`, and `faces` (N, 4).

    Masses are measured against the face of the clean picture: the engine moves no face, but hides it from the detector.
    done: hears of every forward pass.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        items: Sequence[Item],
        condition: Condition,
        chosen: Chosen,
        settings: Settings,
        done: Callable[[int], Any] = lambda count: None,
    ) -> None:
        self.ensemble, self.items, self.condition = ensemble, list(items), condition
        self.chosen, self.settings, self.done = chosen, settings, done
        self.clean = condition.degradation is None
        self.arrays: Arrays = {"faces": np.full((len(items), 4), np.nan)}

    @torch.inference_mode()
    def run(self, workers: int = 0) -> Arrays:
        """Look at every picture.

        Raises:
            UnreadableInput: the first picture that cannot be read.
        """
        views, faces = self.ensemble.views, self.settings.faces
        data = _Pictures(self.items, self.condition, views, faces=faces)
        for rows, seen in _batches(data, self.ensemble.batch_size, workers):
            known = self.chosen.faces
            faces = np.stack([s.face for s in seen]) if known is None else known[rows]
            self.arrays["faces"][rows] = faces
            for name in self.ensemble.members:
                self._member(name, rows, seen)
        return self.arrays

    def _member(self, name: str, rows: slice, seen: list[Seen]) -> None:
        """One member on one batch."""
        member, place = self.ensemble.members[name], self.ensemble.view_of[name]
        views = torch.from_numpy(np.stack([s.views[place] for s in seen]))
        views = views.permute(0, 3, 1, 2).to(self.ensemble.device)
        sight = maps.look(member, views)
        self.done(len(seen))
        attention = maps.attention_map(member, sight)
        self._store(name, "logit", rows, sight.logit.double())
        self._store(name, "features", rows, sight.features)
        spread = maps.entropy(attention.flatten(1).double())
        self._store(name, "attention_entropy", rows, spread)
        batch = {ATTENTION: attention, **sight.evidence}
        channels = None
        if self.chosen.cam[rows].any():
            channels = maps.channel_maps(member, sight)
        for i, row in enumerate(range(rows.start, rows.stop)):
            found = {}
            if self.chosen.cam[row]:
                count = self.settings.channels
                found[CAM] = self._cam(member, views[i], channels[i], count)
            found |= {kind: m[i].cpu().numpy() for kind, m in batch.items()}
            self._masses(name, row, found, seen[i].rects[place])
            if self.clean and self.chosen.judged[row]:
                self._judge(name, row, views[i], found)
            if self.clean and self.chosen.full[row]:
                every = self._cam(member, views[i], channels[i], None)
                both = maps.agreement(found[CAM], every)
                for quantity, value in zip(("agreement", "shared_mass"), both):
                    self._put(name, quantity, row, value)

    def _cam(self, member, view, channels, count: int | None) -> np.ndarray:
        size = self.ensemble.batch_size
        cam = maps.score_cam(member, view, channels, count=count, batch=size)
        self.done(min(count or len(channels), len(channels)))
        return cam.cpu().numpy()

    def _masses(self, name: str, row: int, found: Arrays, rect: np.ndarray) -> None:
        """The share of every map, and of the view's area, outside the face."""
        face = self.arrays["faces"][row]
        if np.isnan(face).any():
            return
        grid = found[ATTENTION].shape
        covered = maps.coverage(tuple(rect), tuple(face), grid)
        for kind, m in (found | {UNIFORM: np.ones(grid)}).items():
            self._put(name, f"outside_{kind}", row, maps.share_outside(m, covered))

    def _judge(self, name: str, row: int, view: torch.Tensor, found: Arrays) -> None:
        """Deletion and insertion of a picture's maps; `random` is the mean of several."""
        picture, size = self.items[row].name, self.ensemble.batch_size
        rng = np.random.default_rng([self.settings.seed, stable_seed(picture)])
        kinds = [kind for kind, m in found.items() if m.sum() > 0]
        controls = [rng.random(found[ATTENTION].shape) for _ in range(RANDOM)]
        given = [found[kind] for kind in kinds] + controls
        calibrator = self.ensemble.calibrators[name]
        member = self.ensemble.members[name]
        judged = maps.judge(member, view, given, calibrator, batch=size)
        self.done(judging_passes(len(given)))
        for what, areas in zip(judged._fields, judged):
            for kind, area in zip(kinds, areas):
                self._put(name, f"{what}_{kind}", row, area)
            self._put(name, f"{what}_random", row, areas[len(kinds) :].mean())

    def _store(self, name: str, quantity: str, rows: slice, values) -> None:
        values = values.cpu().numpy()
        shape = (len(self.items), *values.shape[1:])
        array = self.arrays.setdefault(f"{name}|{quantity}", np.full(shape, np.nan, values.dtype))
        array[rows] = values

    def _put(self, name: str, quantity: str, row: int, value: float) -> None:
        empty = np.full(len(self.items), np.nan)
        self.arrays.setdefault(f"{name}|{quantity}", empty)[row] = value


# ------------------------------------------------------------------------------------------------ all of them
def measure_all(
    ensemble: Ensemble,
    items: Sequence[Item],
    found: Sequence[Condition],
    chosen: Chosen,
    settings: Settings,
    folder: Path,
    *,
    workers: int = 0,
    done: Callable[[int], Any] = lambda count: None,
) -> dict[str, Arrays]:
    """Arrays by condition, clean first; from `folder` where it has them, and put there as soon as they are known."""
    use_one_opencv_thread()
    folder.mkdir(parents=True, exist_ok=True)
    measured = {}
    for condition in found:
        path = stored_path(folder, ensemble, items, condition, chosen, settings)
        if path.exists():
            arrays = read_arrays(path)
        else:
            task = Measurement(ensemble, items, condition, chosen, settings, done)
            arrays = task.run(workers)
            write_arrays(path, arrays)
        measured[condition.name] = arrays
        chosen = replace(chosen, faces=measured[CLEAN.name]["faces"])
    return measured


def stored_path(folder, ensemble, items, condition, chosen, settings) -> Path:
    """Where a condition's arrays are kept: the name hashes all that they depend on, this code included."""
    key = {
        "bundle": ensemble.fingerprint(),
        "settings": dataclasses.asdict(settings),
        "cam": np.flatnonzero(chosen.cam).tolist(),
    }
    code = ("studies.drift", "evaluation.explainer", "evaluation.maps")
    return kept_path(folder, condition, Pictures.of(items), key, *code)


# ------------------------------------------------------------------------------------------------ likeness
def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of features row by row: (N, F), (N, F) -> (N,)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)


def gram(features: np.ndarray) -> np.ndarray:
    """(N, F) features -> (N, N) products of every two pictures, 0 on the diagonal."""
    x = features.astype(np.float64)
    products = x @ x.T
    np.fill_diagonal(products, 0)
    return products


def cka(k: np.ndarray, m: np.ndarray) -> float:
    """Linear centred kernel alignment of two members' features of the same pictures, from their `gram`s (N, N).

    1: equal up to rotation and scale. With the unbiased estimator of HSIC (Song et al. 2012, equation 5), so that
    unrelated features of few pictures come out at 0 and not near 1. nan below four pictures or without variation.
    """
    if len(k) < 4:
        return float("nan")
    spread = _hsic(k, k) * _hsic(m, m)
    return _hsic(k, m) / spread**0.5 if spread > 0 else float("nan")


def _hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimator on Gram matrices whose diagonals are 0."""
    n = len(k)
    rows_k, rows_m = k.sum(axis=0), m.sum(axis=0)
    constant = rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (rows_k @ rows_m)
    return float(((k * m).sum() + constant - cross) / (n * (n - 3)))


def likeness(features: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """CKA of every two members and of each with the others (mean), with 95 % jackknife intervals over GROUPS groups."""
    names = list(features)
    if len(names) < 2 or len(features[names[0]]) < 8:
        return []
    order = np.random.default_rng(seed).permutation(len(features[names[0]]))
    order = order[:CKA_PICTURES]
    grams = {name: gram(features[name][order]) for name in names}

    def table(keep: np.ndarray) -> dict[str, float]:
        kept = {name: products[np.ix_(keep, keep)] for name, products in grams.items()}
        pairs = {(a, b): cka(kept[a], kept[b]) for a, b in itertools.combinations(names, 2)}
        found = {f"{a} & {b}": value for (a, b), value in pairs.items()}
        for name in names:
            found[name] = float(np.mean([v for p, v in pairs.items() if name in p]))
        return found

    whole = table(np.arange(len(order)))
    part = np.arange(len(order)) % min(GROUPS, len(order))
    left = [table(np.flatnonzero(part != g)) for g in range(part.max() + 1)]
    rows = []
    for who, value in whole.items():
        without = np.array([t[who] for t in left])
        error = np.sqrt((len(left) - 1) * without.var())
        if not np.isfinite([value, error]).all():
            continue  # too few pictures, or features that do not vary
        row = {"who": who, "mean": value, "low": value - 1.96 * error}
        rows.append(row | {"high": value + 1.96 * error, "n": len(order)})
    return rows


# ------------------------------------------------------------------------------------------------ numbers
class Bootstrap:
    """Percentile intervals of means over pictures; one set of draws for all, so that they can be compared."""

    def __init__(self, pictures: int, seed: int, draws: int = DRAWS) -> None:
        rng = np.random.default_rng(seed)
        even = np.full(pictures, 1 / pictures)
        self.counts = rng.multinomial(pictures, even, draws).astype(np.float64)

    def mean(self, values: np.ndarray) -> dict[str, Any] | None:
        """Mean of what is not nan in (N,), its 95 % interval, and of how many; None of nothing."""
        known = ~np.isnan(values)
        if not known.any():
            return None
        of_draw = self.counts @ np.where(known, values, 0)
        weight = self.counts @ known
        drawn = of_draw[weight > 0] / weight[weight > 0]
        low, high = np.percentile(drawn, [2.5, 97.5])
        n = int(known.sum())
        return {
            "mean": float(values[known].mean()),
            "low": float(low),
            "high": float(high),
            "n": n,
        }


def summarise(
    measured: Mapping[str, Arrays],
    found: Sequence[Condition],
    ensemble: Ensemble,
    labels: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """`rows` of quantity, who, strength (None: clean), mean, low, high, n; `judged` and `agreement` of the maps."""
    names, draw = list(ensemble.members), Bootstrap(len(labels), seed)
    clean = measured[CLEAN.name]
    rows: list[dict[str, Any]] = []
    for condition in found:
        arrays = measured[condition.name]
        strength = None if condition.degradation is None else condition.level
        for quantity, who, values in _quantities(arrays, clean, ensemble, labels):
            numbers = draw.mean(values)
            if numbers is not None:
                head = {"quantity": quantity, "who": who, "strength": strength}
                rows.append(head | numbers)
        features = {name: arrays[f"{name}|features"] for name in names}
        head = {"quantity": "likeness", "strength": strength}
        rows += [head | row for row in likeness(features, seed)]
    return {"rows": rows} | _of_maps(clean, names, draw)


def _quantities(
    arrays: Arrays, clean: Arrays, ensemble: Ensemble, labels: np.ndarray
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(quantity, who, (N,)) of one condition; what compares with clean is left out of clean."""
    for name in ensemble.members:
        yield "attention_entropy", name, arrays[f"{name}|attention_entropy"]
        if arrays is not clean:
            yield "feature_cosine", name, cosine(*(_pooled(x, name, ensemble) for x in (clean, arrays)))
        for key in arrays:
            if key.startswith(f"{name}|outside_"):
                yield key.partition("|")[2], name, arrays[key]
    for kind in (CAM, ATTENTION, UNIFORM):
        quantity = f"outside_{kind}"
        yield quantity, ENSEMBLE, _of_vote(arrays, quantity, ensemble)
    for a, b in itertools.combinations(ensemble.members, 2):
        both = [_pooled(arrays, name, ensemble) for name in (a, b)]
        if both[0].shape == both[1].shape:  # the paper's measure between streams
            yield "cosine_between", f"{a} & {b}", cosine(*both)
    p_clean = _scores(clean, ensemble)
    for who, p in _scores(arrays, ensemble).items():
        for label, word in enumerate(("real", "fake")):
            yield f"p_fake_{word}", who, np.where(labels == label, p, np.nan)
        if arrays is not clean:
            yield "score_change", who, np.abs(p - p_clean[who])


def _pooled(arrays: Arrays, name: str, ensemble: Ensemble) -> np.ndarray:
    """What the paper compares: a stream's pooled class token (N, D), without the spread or the second tower that its head
    reads besides; of any other member all that its head reads."""
    features, member = arrays[f"{name}|features"], ensemble.members[name]
    return features[:, : member.tower.width] if isinstance(member, Stream) else features


def _scores(arrays: Arrays, ensemble: Ensemble) -> Arrays:
    """P(fake) (N,) of every member, and the vote."""
    p = {name: ensemble.calibrators[name].apply(arrays[f"{name}|logit"]) for name in ensemble.members}
    known = {name: x for name, x in p.items() if name in ensemble.vote.weights}
    return {**p, ENSEMBLE: combine(known, ensemble.vote)}


def _of_vote(arrays: Arrays, quantity: str, ensemble: Ensemble) -> np.ndarray:
    """The members' shares weighted by their votes (N,): the share of the sum of their maps, each of mass one.

    A member without the map (or with an empty one) is left out; nan where all are.
    """
    weights = ensemble.vote.weights
    keys = [f"{name}|{quantity}" for name in ensemble.members if weights.get(name, 0)]
    size = len(arrays["faces"])
    shares = np.stack([arrays.get(key, np.full(size, np.nan)) for key in keys])
    votes = np.array([weights[key.partition("|")[0]] for key in keys], float)[:, None]
    known = ~np.isnan(shares)
    total = (votes * known).sum(axis=0)
    summed = (votes * np.where(known, shares, 0)).sum(axis=0)
    return np.where(total > 0, summed / np.maximum(total, 1), np.nan)


def _of_maps(clean: Arrays, names: Sequence[str], draw: Bootstrap) -> dict[str, Any]:
    """Deletion and insertion of every map against the random control on the same pictures; agreement of Score-CAMs."""
    judged, agreed = [], []
    for name in names:
        for what in ("deletion", "insertion"):
            prefix = f"{name}|{what}_"
            for key in (k for k in clean if k.startswith(prefix)):
                row = draw.mean(clean[key])
                if row is None:
                    continue
                over = draw.mean(clean[key] - clean[prefix + "random"])
                head = {"who": name, "map": key.removeprefix(prefix), "area": what}
                judged.append(head | row | {"against_random": over})
        if f"{name}|agreement" in clean:
            both = ("agreement", "shared_mass")
            numbers = {q: draw.mean(clean[f"{name}|{q}"]) for q in both}
            agreed.append({"who": name} | numbers)
    return {"judged": judged, "agreement": agreed}
