"""Scores of pictures under some conditions to every number, figure point and worst error of an evaluation.

P(fake) and votes are (N,) float64 in the order of the pictures, by member name; `ensemble` is the vote. The result is
plain JSON values in which every number stands beside its protocol.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from solution.config import DegradationConfig
from solution.errors import UsageError
from solution.evaluation import metrics

ENSEMBLE = "ensemble"
WORST = 16  # pictures shown per kind of error
CURVE_POINTS = 200  # of a ROC


class EvaluationError(UsageError):
    """Something that cannot be evaluated: names the file, what was found and what to do."""


@dataclass(frozen=True)
class Condition:
    """What happens to the pictures before they are scored. `family` groups runs; `level` orders them in it."""

    name: str
    family: str
    text: str
    level: float = 0.0
    seed: int = 0
    degradation: DegradationConfig | None = None


CLEAN = Condition("clean", "clean", "as they are")


@dataclass(frozen=True)
class Pictures:
    """What is known of the N pictures. `labels` (N,) int; every other field has one entry per picture.

    splits: of the manifest, where `unseen` are pictures by generators that nothing was trained on; may be empty.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    sources: tuple[str, ...]
    videos: tuple[str, ...]
    splits: tuple[str, ...] = ()

    @classmethod
    def of(cls, items: Sequence[Any]) -> Pictures:
        """From `data.Item`s."""
        return cls(
            tuple(item.name for item in items),
            tuple(str(item.path) for item in items),
            np.array([item.label for item in items], dtype=np.int64),
            tuple(item.source for item in items),
            tuple(item.video for item in items),
            tuple(item.split for item in items),
        )

    @property
    def unseen(self) -> np.ndarray:
        """(N,) bool: by generators that nothing was trained on."""
        return np.array([split == "unseen" for split in self.splits or [""] * len(self.names)], dtype=bool)

    def fingerprint(self) -> str:
        """SHA-256 of names, labels, sources, videos and file sizes."""
        digest = hashlib.sha256()
        for name, path, label, source, video in zip(self.names, self.paths, self.labels, self.sources, self.videos):
            size = os.path.getsize(path) if os.path.isfile(path) else -1
            row = [name, int(label), source, video, size]
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class Run:
    """One condition's scores: `p` P(fake) of each member and the vote; `raw` the same before calibration, if known."""

    condition: Condition
    p: dict[str, np.ndarray]
    raw: dict[str, np.ndarray] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ measuring
def measure(
    pictures: Pictures,
    runs: Sequence[Run],
    *,
    thresholds: Mapping[str, float],
    protocol: Mapping[str, Any],
    pools: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    draws: int = 1000,
) -> dict[str, Any]:
    """Everything that `evaluation.json` holds and `report.html` shows, as plain JSON values.

    thresholds: per scorer, fake at or above. protocol: what all numbers share (bundle, manifest, ...). pools: named
    groups of sources that are measured together, beside all pictures and every source.
    """
    families: dict[str, list[Run]] = {}
    for run in runs:
        families.setdefault(run.condition.family, []).append(run)
    headline = {f: families[f] for f in ("clean", "degraded", "given") if f in families}
    scopes = _scopes(pictures, pools or {})
    told: list[dict[str, Any]] = []
    for name, of_family in headline.items():
        for who in of_family[0].p:
            scores = np.stack([run.p[who] for run in of_family])
            for scope, where in scopes.items():
                arguments = pictures, scores, where, thresholds[who]
                for unit, found in _units(*arguments, seed=seed, draws=draws).items():
                    text = _protocol_text(found, of_family, protocol)
                    key = {"who": who, "condition": name, "scope": scope, "unit": unit}
                    told.append({**key, **found, "protocol": text})
    clean = families["clean"][0] if "clean" in families else None
    options = {"thresholds": thresholds, "protocol": protocol}
    return {
        "protocol": dict(protocol),
        "rows": [row for row in told if "auc" in row],
        "single_class": [row for row in told if "auc" not in row],
        "unseen": _unseen(pictures, headline, seed, draws),
        "false_alarms": _false_alarms(pictures, headline, thresholds),
        "comparisons": _comparisons(pictures, headline, seed, draws),
        "calibration": _calibration(pictures, headline),
        "robustness": _robustness(pictures, runs, clean, **options, seed=seed, draws=draws),
        "figures": _figures(pictures, headline),
        "worst": {n: _worst(pictures, f[0], thresholds) for n, f in headline.items()},
    }


def _scopes(pictures: Pictures, pools: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Rows (N,) bool of all pictures, of each source, and of each pool."""
    sources = np.array(pictures.sources)
    scopes = {"all": np.ones(len(sources), dtype=bool)}
    known = sorted(set(pictures.sources))
    if len(known) > 1:
        scopes |= {source or "(no source)": sources == source for source in known}
    if 0 < pictures.unseen.sum() < len(sources):
        scopes |= {"seen generators": ~pictures.unseen, "unseen generators": pictures.unseen}
    for name, members in pools.items():
        unknown = sorted(set(members) - set(known))
        if unknown:
            raise EvaluationError(
                f"pool {name}: no picture of source {', '.join(unknown)}; there are {', '.join(known)}"
            )
        if name in scopes:
            raise EvaluationError(f"pool {name}: the name is taken")
        scopes[name] = np.isin(sources, list(members))
    return scopes


def _units(
    pictures: Pictures,
    scores: np.ndarray,
    where: np.ndarray,
    threshold: float,
    *,
    seed: int,
    draws: int,
) -> dict[str, dict[str, Any]]:
    """Numbers of `scores` (S, N) on the rows `where`, by picture, and by video where videos are named."""
    labels, scores = pictures.labels[where], scores[:, where]
    found = {"picture": _numbers(labels, scores, threshold, seed=seed, draws=draws)}
    sources = np.array(pictures.sources)[where]
    videos = np.array(pictures.videos)[where]
    if not any(videos):
        return found
    by_video = [metrics.video_level(sources, labels, videos, run) for run in scores]
    means = np.stack([v.scores for v in by_video])
    of_videos = by_video[0]
    numbers = _numbers(of_videos.labels, means, threshold, seed=seed, draws=draws)
    low, high = int(of_videos.frames.min()), int(of_videos.frames.max())
    found["video"] = {**numbers, "frames": [low, high]}
    return found


def _numbers(labels: np.ndarray, scores: np.ndarray, threshold: float, *, seed: int, draws: int) -> dict[str, Any]:
    """A `Summary` as a dict; of one class only what one class can tell."""
    if 0 < labels.sum() < len(labels):
        summary = metrics.summarize(labels, scores, threshold=threshold, seed=seed, draws=draws)
        return dataclasses.asdict(summary)
    right = [metrics.accuracy(labels, run, threshold) for run in scores]
    return {
        "n": len(labels),
        "label": "fake" if labels[0] else "real",
        "threshold": float(threshold),
        "accuracy": float(np.mean(right)),
        "mean_score": float(scores.mean()),
    }


def _protocol_text(found: Mapping[str, Any], runs: Sequence[Run], protocol: Mapping[str, Any]) -> str:
    """What one number was measured on, in a line."""
    unit = "videos" if "frames" in found else "pictures"
    real, fake = found.get("n_real"), found.get("n_fake")
    split = f"{real} real, {fake} fake" if "n_real" in found else f"all {found['label']}"
    text = f"{found['n']} {unit} ({split})"
    if "frames" in found:
        low, high = found["frames"]
        text += f", {low}{f' to {high}' if high > low else ''} frames each, mean score"
    condition = runs[0].condition
    text += f"; {condition.text}"
    if condition.degradation is not None:
        seeds = [run.condition.seed for run in runs]
        text += f", {'mean of seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    return f"{text}; {protocol['origin']}"


def _unseen(pictures: Pictures, headline: Mapping[str, Sequence[Run]], seed: int, draws: int) -> list[dict[str, Any]]:
    """On unseen generators, the mean AUC over the sources that have both classes, of each scorer, and what the vote has
    over it; intervals by bootstrap over the pictures of each source."""
    rows = np.flatnonzero(pictures.unseen)
    labels, sources = pictures.labels[rows], np.array(pictures.sources)[rows]
    if not 0 < labels.sum() < len(labels):
        return []
    parts = metrics.parts_by_source(labels, sources)
    found = []
    for condition, runs in headline.items():
        scores = {name: np.stack([run.p[name][rows] for run in runs]) for name in runs[0].p}
        told = metrics.mean_aucs(labels, scores, parts, seed=seed, draws=draws)
        for name, (value, drawn) in told.items():
            low, high = metrics.ends(drawn)
            row = {"who": name, "condition": condition, "sources": len(parts), "n": len(rows)}
            row |= {"auc": value, "auc_low": low, "auc_high": high}
            if ENSEMBLE in told and name != ENSEMBLE:
                of_vote, drawn_of_vote = told[ENSEMBLE]
                low, high = metrics.ends(drawn_of_vote - drawn)
                row["ensemble_minus"] = {"value": of_vote - value, "low": low, "high": high}
            found.append(row)
    return found


def _false_alarms(
    pictures: Pictures, headline: Mapping[str, Sequence[Run]], thresholds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Which share of each source's real pictures the vote calls fake, the worst first."""
    sources, found = np.array(pictures.sources), []
    for condition, runs in headline.items():
        if ENSEMBLE not in runs[0].p:
            continue
        for source in np.unique(sources[pictures.labels == 0]):
            rows = (sources == source) & (pictures.labels == 0)
            rate = float(np.mean([run.p[ENSEMBLE][rows] >= thresholds[ENSEMBLE] for run in runs]))
            found.append({"condition": condition, "source": str(source), "n": int(rows.sum()), "rate": rate})
    return sorted(found, key=lambda row: (row["condition"], -row["rate"]))


def _comparisons(
    pictures: Pictures, headline: Mapping[str, Sequence[Run]], seed: int, draws: int
) -> list[dict[str, Any]]:
    """Is the ensemble better than each member? DeLong and paired bootstrap, over the mean of the family's runs."""
    found = []
    if 0 < pictures.labels.sum() < len(pictures.labels):
        for name, runs in headline.items():
            for who in runs[0].p:
                if who == ENSEMBLE or ENSEMBLE not in runs[0].p:
                    continue
                a, b = (np.stack([r.p[w] for r in runs]) for w in (ENSEMBLE, who))
                for method in ("delong", "bootstrap"):
                    test = metrics.paired_auc_test(pictures.labels, a, b, method=method, seed=seed, draws=draws)
                    about = {"condition": name, "a": ENSEMBLE, "b": who}
                    found.append({**about, **dataclasses.asdict(test)})
    return found


def _calibration(pictures: Pictures, headline: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """ECE and log-loss of each member before and after calibration, means of the family's runs; the ECE's floor."""
    found = []
    for name, runs in headline.items():
        for who in runs[0].raw:
            row: dict[str, Any] = {
                "condition": name,
                "who": who,
                "n": len(pictures.labels),
            }
            for measured in (metrics.ece, metrics.log_loss):
                for when in ("before", "after"):
                    of = [(r.raw if when == "before" else r.p)[who] for r in runs]
                    values = [measured(pictures.labels, p) for p in of]
                    row[f"{measured.__name__}_{when}"] = float(np.mean(values))
            row |= metrics.ece_floors([run.p[who] for run in runs])
            found.append(row)
    return found


def _robustness(
    pictures: Pictures,
    runs: Sequence[Run],
    clean: Run | None,
    *,
    thresholds: Mapping[str, float],
    protocol: Mapping[str, Any],
    seed: int,
    draws: int,
) -> list[dict[str, Any]]:
    """Per condition and scorer: AUC, and against the clean score its mean change and the share of flipped verdicts."""
    labels = pictures.labels
    if clean is None or not 0 < labels.sum() < len(labels):
        return []
    found = []
    for run in runs:
        condition = run.condition
        for who, p in run.p.items():
            interval = metrics.auc_interval(labels, p, seed=seed, draws=draws)
            before = clean.p[who]
            flipped = (p >= thresholds[who]) != (before >= thresholds[who])
            counts = {"n": len(labels), "n_real": int(np.sum(labels == 0))}
            counts["n_fake"] = counts["n"] - counts["n_real"]
            found.append(
                {
                    "family": condition.family,
                    "level": condition.level,
                    "who": who,
                    "auc": interval.value,
                    "auc_low": interval.low,
                    "auc_high": interval.high,
                    "score_change": float(np.mean(np.abs(p - before))),
                    "flips": float(np.mean(flipped)),
                    "threshold": float(thresholds[who]),
                    "n": counts["n"],
                    "protocol": _protocol_text(counts, [run], protocol),
                }
            )
    return found


def _figures(pictures: Pictures, headline: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Points of the ROC, reliability, histogram and agreement figures, from each family's first run."""
    labels = pictures.labels
    both = 0 < labels.sum() < len(labels)
    found: dict[str, Any] = {}
    for name, runs in headline.items():
        run = runs[0]
        members = [who for who in run.p if who != ENSEMBLE]
        found[name] = {
            "run": run.condition.name,
            "roc": {w: _thinned(metrics.roc(labels, p)) for w, p in run.p.items()} if both else {},
            "reliability": {
                who: {
                    when: _listed(metrics.reliability(labels, p[who], bins=10))
                    for when, p in (("before", run.raw), ("after", run.p))
                    if who in p
                }
                for who in run.p
            },
            "histograms": {w: _histogram(labels, p) for w, p in run.p.items()},
            "agreement": {
                "members": members,
                "rank_correlation": rank_correlation([run.p[m] for m in members]),
            },
        }
    return found


def _thinned(curve: metrics.Roc) -> dict[str, list[float]]:
    """The curve at `CURVE_POINTS` places, evenly spaced along its length, both ends kept."""
    along = curve.fpr + curve.tpr  # rises from 0 to 2
    places = np.unique(np.searchsorted(along, np.linspace(0, 2 - 1e-12, CURVE_POINTS)))
    return {"fpr": curve.fpr[places].tolist(), "tpr": curve.tpr[places].tolist()}


def _listed(bins: metrics.Reliability) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in bins._asdict().items()}


def _histogram(labels: np.ndarray, p: np.ndarray) -> dict[str, list[float]]:
    """Shares of each class's pictures in the bins of `histogram`."""
    real, fake = (histogram(p[labels == c]) for c in (0, 1))
    return {"edges": real["edges"], "real": real["share"], "fake": fake["share"]}


def histogram(p: np.ndarray) -> dict[str, list[float]]:
    """Shares of p in 21 bins centred on multiples of 1/20, so that levels fall inside bins, not on their edges."""
    edges = (np.arange(22) - 0.5) / 20
    shares = np.histogram(p, edges)[0] / max(1, len(p))
    return {"edges": edges.tolist(), "share": shares.tolist()}


def rank_correlation(scores: Sequence[np.ndarray]) -> list[list[float | None]]:
    """Spearman's correlation between every two of M scorers (N,); None where one scores all pictures alike."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(s) for s in scores])
    ranks -= ranks.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(ranks, axis=1)
    return [
        [float(a @ b / (i * j)) if i * j > 0 else None for b, j in zip(ranks, lengths)] for a, i in zip(ranks, lengths)
    ]


def _worst(pictures: Pictures, run: Run, thresholds: Mapping[str, float]) -> dict[str, list[dict[str, Any]]]:
    """The real pictures scored highest and the fake ones scored lowest, those on the wrong side of the threshold."""
    who = ENSEMBLE if ENSEMBLE in run.p else next(iter(run.p))
    scores, labels = run.p[who], pictures.labels
    wrong = (scores >= thresholds[who]) != (labels == 1)
    by_score = np.argsort(scores, kind="stable")
    alarms = [i for i in by_score[::-1] if wrong[i] and labels[i] == 0]
    misses = [i for i in by_score if wrong[i] and labels[i] == 1]

    def told(index: int) -> dict[str, Any]:
        return {
            "name": pictures.names[index],
            "path": pictures.paths[index],
            "source": pictures.sources[index],
            "score": float(scores[index]),
            "members": {w: float(p[index]) for w, p in run.p.items() if w != ENSEMBLE},
        }

    return {
        "false_alarms": [told(i) for i in alarms[:WORST]],
        "misses": [told(i) for i in misses[:WORST]],
        "counts": {"false_alarms": len(alarms), "misses": len(misses)},
    }
