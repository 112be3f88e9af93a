"""Entry: metrics, robustness sweep, report.

    python -m solution.evaluate --data MANIFEST --weights BUNDLE --out DIR [--degraded] [--robustness]
    python -m solution.evaluate --preds preds.csv --labels labels.csv --out DIR [--split val]

Pictures go in; `evaluation.json` (every number with its protocol), `scores.csv`, `report.html` and `figures/*.png` come
out. Raw logits of each condition (clean, degraded with a seed, one op at one strength, ...) are kept in `DIR/scores`,
under the hashes of bundle, pictures and condition: an interrupted sweep goes on, a finished one only reports again.

Arrays: logits, P(fake) and votes are (N,) float64 in the order of the pictures, by member name; `ensemble` is the vote.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from solution.config import VoteConfig
from solution.data.labels import EXPECTED, LABEL_COLUMNS, OTHER_COLUMNS, PATH_COLUMNS, column_of, label_of, split_of
from solution.errors import UsageError, door, tell
from solution.evaluation import report
from solution.evaluation.conditions import degraded_conditions, limit_frames, limit_items, sweep_conditions
from solution.evaluation.kept import Logits, Scorer, condition_logits
from solution.evaluation.measure import (
    CLEAN,
    ENSEMBLE,
    Condition,
    EvaluationError,
    Pictures,
    Run,
    measure,
)
from solution.io import atomic_file, write_atomically
from solution.models import calibration
from solution.models.calibration import Calibrator
from solution.scoring.vote import combine

# The last as in DFDC's `filename,label`, whose label is P(fake).
SCORE_COLUMNS = ("score", "p_fake", "p", "probability", "prob", "prediction", "pred", "label")
# Options that mean nothing to the other of the two ways, by the option that chooses theirs.
ONLY_WITH = {
    "data": ("weights", "degraded", "robustness", "frames", "limit", "device", "fast", "batch_size", "workers"),
    "preds": ("labels", "logits", "by_name", "threshold"),
}


class Ensemble(Protocol):
    """What evaluation needs to know of a bundle; `scoring.ensemble.load_ensemble` gives it."""

    vote: VoteConfig
    calibrators: Mapping[str, Calibrator]
    hash: str

    def fingerprint(self) -> Mapping[str, Any]:
        """What a logit depends on, beside the picture."""


# ------------------------------------------------------------------------------------------------ scoring
def score_conditions(
    items: Sequence[Any],
    conditions: Sequence[Condition],
    *,
    scorer: Scorer,
    ensemble: Ensemble,
    folder: Path,
    way: str = "",
    progress: bool = True,
) -> list[Run]:
    """A run per condition; logits come from `folder` where it has them and are put there as soon as they are known."""
    from tqdm import tqdm

    runs = []
    total = len(items) * len(conditions)
    with tqdm(total=total, unit="picture", disable=not progress) as bar:
        for condition in conditions:
            bar.set_description(condition.name)
            key = [dict(ensemble.fingerprint()), way]
            logits = condition_logits(items, condition, scorer=scorer, key=key, folder=folder, done=bar.update)
            runs.append(calibrated(condition, logits, ensemble))
    return runs


def calibrated(condition: Condition, logits: Logits, ensemble: Ensemble) -> Run:
    """Logits to P(fake) of each member and the ensemble's vote."""
    strangers = sorted(set(logits) - set(ensemble.calibrators))
    if strangers:
        raise EvaluationError(
            f"scores of {', '.join(strangers)}, whose calibrator the bundle lacks (it has {', '.join(ensemble.calibrators)})"
        )
    p = {name: ensemble.calibrators[name].apply(x) for name, x in logits.items()}
    raw = {name: calibration.sigmoid(x) for name, x in logits.items()}
    return Run(condition, {**p, ENSEMBLE: combine(p, ensemble.vote)}, raw)


# ------------------------------------------------------------------------------------------------ anyone's scores
def read_predictions(
    preds: Path, labels: Path, *, logits: bool = False, by_name: bool = False, split: str | None = None
) -> tuple[Pictures, Run, str]:
    """Scores joined to labels by picture name, and a note on predictions without a label (which are left out).

    preds: CSV with a column of names and one of scores (`image,score` as submit.py writes it). labels: CSV with names
    and `label` (0 or real, 1 or fake), and perhaps `source`, `split`, `video`. logits: the scores are logits, not
    probabilities. by_name: compare file names without their folders. split: rows of these only, as in `read_items`.
    """
    key = (lambda n: n.replace("\\", "/").rpartition("/")[2]) if by_name else str
    scores = _read_scores(preds, key, logits)
    rows, columns = [], None
    for number, row in _csv(labels):
        columns = columns or (_column(labels, row, PATH_COLUMNS), _column(labels, row, LABEL_COLUMNS))
        rows.append((key(_name(row, columns[0], f"{labels}, line {number}")), row))
    extra = len(set(scores) - {name for name, _ in rows})
    rows = _of_splits(labels, rows, split) if split else rows
    names = [name for name, _ in rows]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise EvaluationError(f"{labels}: {twice} occurs twice")
    missing = [name for name in names if name not in scores]
    if missing:
        raise EvaluationError(
            f"{preds}: no score for {len(missing)} of {len(names)} pictures of {labels} (the first: {missing[0]}); "
            "score them too, leave them out of the labels, or compare file names alone with --by-name"
        )
    pictures = Pictures(
        names=tuple(names),
        paths=tuple(str(labels.parent / row[columns[0]]) for _, row in rows),
        labels=np.array([_label(row[columns[1]], name, labels) for name, row in rows], dtype=np.int64),
        sources=tuple(row.get("source") or "" for _, row in rows),
        videos=tuple(row.get("video") or "" for _, row in rows),
    )
    note = f"{extra} predictions without a label left out" if extra else ""
    p = np.array([scores[name] for name in names])
    given = Condition("given", "given", "scores as given")
    return pictures, Run(given, {"scores": p}), note


def _of_splits(
    labels: Path, rows: Sequence[tuple[str, dict[str, str]]], wanted: str
) -> list[tuple[str, dict[str, str]]]:
    """The rows of the splits `wanted`, with commas between, in any usual spelling; each must have some."""
    column = column_of(rows[0][1], OTHER_COLUMNS["split"])
    splits = [split_of(row[column]) if column else "" for _, row in rows]
    there = sorted(set(splits) - {""})
    if not there:
        raise EvaluationError(
            f"{labels}: no row names a split, and --split {wanted} was asked for; give it a column `split`, or leave "
            "--split out"
        )
    asked = [split_of(part) for part in wanted.split(",")]
    for part in asked:
        if part not in there:
            raise EvaluationError(f"{labels}: no row of split {part!r}; it has {', '.join(there)}")
    return [row for row, own in zip(rows, splits) if own in asked]


def _read_scores(preds: Path, key: Callable[[str], str], logits: bool) -> dict[str, float]:
    """P(fake) by picture name."""
    scores: dict[str, float] = {}
    columns: tuple[str, str] | None = None
    for number, row in _csv(preds):
        where = f"{preds}, line {number}"
        if columns is None:
            columns = (
                _column(preds, row, PATH_COLUMNS),
                _column(preds, row, SCORE_COLUMNS),
            )
        name = key(_name(row, columns[0], where))
        if name in scores:
            raise EvaluationError(f"{where}: {name} occurs twice")
        scores[name] = _score_value(row[columns[1]], where, logits)
    return scores


def _csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of a table with at least one row; see `lists.read_table`."""
    from solution.data.lists import read_table

    try:
        rows = read_table(path)
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror or error}") from None
    if not rows:
        raise EvaluationError(f"{path}: no rows below its header")
    return rows


def _column(path: Path, row: Mapping[str, str], wanted: Sequence[str]) -> str:
    found = column_of(row, wanted)
    if found is None:
        raise EvaluationError(f"{path}: none of the columns {', '.join(wanted)}; found {', '.join(map(str, row))}")
    return found


def _name(row: Mapping[str, str], column: str, where: str) -> str:
    if not row[column]:
        raise EvaluationError(f"{where}: no name in column {column}")
    return row[column]


def _score_value(text: str, where: str, logits: bool) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise EvaluationError(f"{where}: the score is {text!r}; expected a number")
    if logits:
        return float(calibration.sigmoid(np.array(value)))
    if not 0 <= value <= 1:
        raise EvaluationError(
            f"{where}: the score is {value:g}; expected P(fake) in [0, 1] (--logits takes raw logits)"
        )
    return value


def _label(word: str | None, name: str, path: Path) -> int:
    label = label_of(word)
    if label is None:
        raise EvaluationError(f"{path}: the label of {name} is {word!r}; {EXPECTED}")
    return label


# ------------------------------------------------------------------------------------------------ output
def write_results(
    out: Path,
    pictures: Pictures,
    runs: Sequence[Run],
    results: Mapping[str, Any],
    *,
    thumbnails: bool = True,
) -> None:
    """`evaluation.json`, `scores.csv` (clean and degraded), and the report with its figures, under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, allow_nan=False)
    write_atomically(out / "evaluation.json", text + "\n")
    with atomic_file(out / "scores.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        who = list(runs[0].p)
        writer.writerow(["condition", "image", "label", "source", "video", *who])
        for run in runs:
            if run.condition.family in ("clean", "degraded", "given"):
                known = (
                    pictures.names,
                    pictures.labels,
                    pictures.sources,
                    pictures.videos,
                )
                for *row, p in zip(*known, np.stack([run.p[w] for w in who], axis=1)):
                    writer.writerow([run.condition.name, *row, *(f"{x:.6f}" for x in p)])
    report.write_report(results, out, thumbnails=thumbnails)


def text_table(results: Mapping[str, Any]) -> str:
    """The numbers of `evaluation.json` as lines for a terminal, each block under its protocol."""
    lines, last = [], None
    head = f"{'':14} {'AUC':>6} {'95 %':>13} {'AP':>6} {'EER':>6} {'acc.':>6} {'TPR@1':>6} {'TPR@5':>6} {'ECE':>6} {'loss':>6} {'Brier':>6}"
    ordered = sorted(results["rows"], key=lambda r: r["who"] != ENSEMBLE)
    blocks = dict.fromkeys((r["condition"], r["unit"], r["scope"]) for r in results["rows"])
    for block in blocks:
        for r in ordered:
            if (r["condition"], r["unit"], r["scope"]) != block:
                continue
            if block != last:
                title = f"{r['condition']}, per {r['unit']}, {r['scope']}: {r['protocol']}"
                lines += ["", title, head]
                last = block
            lines.append(
                f"{r['who']:14} {r['auc']:6.4f} {r['auc_low']:.4f}-{r['auc_high']:.4f} {r['average_precision']:6.4f} "
                f"{r['eer']:6.4f} {r['accuracy']:6.4f} {r['tpr_at_fpr_1']:6.4f} {r['tpr_at_fpr_5']:6.4f} {r['ece']:6.4f} "
                f"{r['log_loss']:6.4f} {r['brier']:6.4f}"
            )
    for r in results["single_class"]:
        lines.append(
            f"{r['condition']}, {r['scope']}, {r['who']}: {r['n']} {r['label']} only, accuracy {r['accuracy']:.4f}, "
            f"mean score {r['mean_score']:.4f}"
        )
    for r in results["unseen"]:
        gain = r.get("ensemble_minus")
        over = f", the vote {gain['value']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f}) over it" if gain else ""
        lines.append(
            f"{r['condition']}, unseen generators, mean over {r['sources']} sources, {r['who']}: AUC {r['auc']:.4f} "
            f"({r['auc_low']:.4f}-{r['auc_high']:.4f}){over}"
        )
    for r in results["false_alarms"]:
        lines.append(
            f"{r['condition']}, false alarms on {r['source'] or '(no source)'}: {r['rate']:.1%} of {r['n']} reals"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ entry
@door("evaluate", interrupted="interrupted; the same command goes on where it stopped", refused=(ValueError,))
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a bundle on a manifest, or anyone's scores; 0 done, 2 usage, 3 environment or weights."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.data is None) == (arguments.preds is None):
        raise UsageError("give either --data with --weights, or --preds with --labels")
    way, other = ("preds", "data") if arguments.data is None else ("data", "preds")
    for name in ONLY_WITH[other]:
        if getattr(arguments, name) != parser.get_default(name):
            option = name.replace("_", "-")
            raise UsageError(f"--{option} goes with --{other} and means nothing with --{way}; leave it out")
    if arguments.preds is not None:
        return _evaluate_predictions(arguments)
    return _evaluate_bundle(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m solution.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="manifest: CSV, DeepfakeBench JSON, or a folder")
    add("--weights", help="the bundle to evaluate")
    add("--preds", type=Path, help="CSV of anyone's scores, `image,score`")
    add("--labels", type=Path, help="CSV of their labels, `path,label[,source,split,video]`")
    add("--logits", action="store_true", help="the scores of --preds are logits")
    add("--by-name", action="store_true", help="join --preds by file name alone")
    add("--threshold", type=float, default=0.5, help="of --preds: fake at or above")
    add("--out", type=Path, required=True, help="folder for report, JSON and scores")
    add("--split", help="rows of these splits only, such as val or val,unseen")
    add("--degraded", action="store_true", help="also with every picture degraded")
    add("--robustness", action="store_true", help="also every op, JPEG and noise sweeps")
    add("--seeds", type=int, nargs="+", default=[7], help="of the degradation")
    add("--frames", type=int, default=0, help="frames of each video; 0: no video files")
    add(
        "--limit",
        type=int,
        default=0,
        help="pictures, drawn from each source and label",
    )
    add(
        "--pool",
        action="append",
        default=[],
        metavar="NAME=A+B",
        help="sources together",
    )
    add("--draws", type=int, default=1000, help="bootstrap draws of an interval")
    add("--device", default="auto")
    add("--fast", action="store_true", help="no second looks, as submit.py --fast")
    add("--batch-size", type=int, default=0, help="0: automatic")
    add("--workers", type=int, help="loader processes; default: as the machine has")
    add("--quiet", action="store_true", help="no progress bar")
    add(
        "--no-thumbnails",
        dest="thumbnails",
        action="store_false",
        help="a report without pictures, to pass on where they must not be",
    )
    return parser


def _pools(texts: Sequence[str]) -> dict[str, list[str]]:
    pools = {}
    for text in texts:
        name, separator, sources = text.partition("=")
        if not (name and separator and sources):
            raise EvaluationError(f"--pool {text}: expected NAME=SOURCE+SOURCE")
        pools[name] = sources.split("+")
    return pools


def _evaluate_predictions(arguments: argparse.Namespace) -> int:
    if arguments.labels is None:
        raise EvaluationError("--preds needs --labels")
    pictures, run, note = read_predictions(
        arguments.preds,
        arguments.labels,
        logits=arguments.logits,
        by_name=arguments.by_name,
        split=arguments.split,
    )
    protocol = {
        "title": arguments.preds.name,
        "origin": f"scores {arguments.preds.name} {_file_hash(arguments.preds)[:12]}, "
        f"labels {arguments.labels.name} {_file_hash(arguments.labels)[:12]}"
        f"{f', split {arguments.split}' if arguments.split else ''}",
        "pictures": len(pictures.names),
        "split": arguments.split or "all rows",
        "threshold": {"scores": arguments.threshold},
        "bootstrap": _bootstrap_text(arguments),
        **({"left out": note} if note else {}),
    }
    results = measure(
        pictures,
        [run],
        thresholds={"scores": arguments.threshold},
        protocol=protocol,
        pools=_pools(arguments.pool),
        seed=arguments.seeds[0],
        draws=arguments.draws,
    )
    write_results(arguments.out, pictures, [run], results, thumbnails=arguments.thumbnails)
    _say(results, pictures.labels, arguments.out)
    return 0


def _evaluate_bundle(arguments: argparse.Namespace) -> int:
    # Here and not above: scoring brings torch, which a report on given scores does without.
    from solution.data.images import UnreadableInput
    from solution.scoring.ensemble import load_ensemble
    from solution.scoring.stream import score_pictures

    if arguments.weights is None:
        raise EvaluationError("--data needs --weights")
    items, notes = read_items(
        arguments.data,
        split=arguments.split,
        frames=arguments.frames,
        out=arguments.out,
    )
    if notes:
        tell(notes)
    items = limit_items(items, arguments.limit, arguments.seeds[0])
    ensemble = load_ensemble(arguments.weights, arguments.device, second_look=not arguments.fast)

    def scorer(chunk: Sequence[Any], **settings: Any) -> Logits:
        sizes = {"batch_size": arguments.batch_size, "workers": arguments.workers}
        try:
            return score_pictures(ensemble, chunk, **sizes, **settings)
        except UnreadableInput as error:
            raise EvaluationError(f"{error}; mend it or take it out of the manifest") from None

    results = run(
        items,
        scorer=scorer,
        ensemble=ensemble,
        out=arguments.out,
        conditions=[
            CLEAN,
            *(degraded_conditions(arguments.seeds) if arguments.degraded else []),
            *(sweep_conditions(arguments.seeds[0]) if arguments.robustness else []),
        ],
        protocol=_asked(arguments, notes),
        options=Options(
            way="fast" if arguments.fast else "",
            pools=_pools(arguments.pool),
            seed=arguments.seeds[0],
            draws=arguments.draws,
            progress=not arguments.quiet,
            thumbnails=arguments.thumbnails,
        ),
    )
    _say(results, np.array([item.label for item in items]), arguments.out)
    return 0


def _say(results: Mapping[str, Any], labels: np.ndarray, out: Path) -> None:
    """The numbers, what was taken as fake, and a warning where the scores run against the labels."""
    fake = int(labels.sum())
    taken = (
        f"taken as fake (label 1): {fake} pictures, as real (label 0): {len(labels) - fake}; a high score means fake"
    )
    print(f"{text_table(results)}\n\n{taken}\n{out / 'report.html'}")
    for warning in swapped(results):
        tell(warning)


def swapped(results: Mapping[str, Any]) -> list[str]:
    """A warning for each AUC of the scores, or of the vote, whose interval lies below one half.

    Of one source it may be a generator that is taken for real; of all, it is likelier that the labels are swapped.
    """
    return [
        f"warning: {r['who']}, {r['condition']}, {r['scope']}: AUC {r['auc']:.3f} ({r['auc_low']:.3f} to {r['auc_high']:.3f}) "
        "lies below .5; are the labels swapped (0 is real, 1 is fake), or do the scores say P(real)?"
        for r in results["rows"]
        if r["auc_high"] < 0.5 and r["who"] in (ENSEMBLE, "scores")
    ]


def _asked(arguments: argparse.Namespace, notes: str) -> dict[str, str]:
    """The part of the protocol that the command line says."""
    name, frames = Path(arguments.weights).name, arguments.frames
    draw = f"in proportion to source and label, seed {arguments.seeds[0]}"
    return {
        "title": f"{name} on {arguments.data.name}",
        "manifest": arguments.data.name,
        "split": arguments.split or "all rows",
        "limit": f"{arguments.limit} pictures, {draw}" if arguments.limit else "none",
        "frames": f"at most {frames} a video" if frames else "all",
        "bootstrap": _bootstrap_text(arguments),
        "second looks": "no (--fast)" if arguments.fast else "where submit.py has them",
        "left out": notes or "nothing",
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """How an evaluation is measured and told.

    way: how the scorer departs from the default; its scores are kept apart and its name stands beside every number. pools:
    named groups of sources. seed, draws: of the bootstrap. thumbnails: the report shows pictures.
    """

    way: str = ""
    pools: Mapping[str, Sequence[str]] | None = None
    seed: int = 0
    draws: int = 1000
    progress: bool = True
    thumbnails: bool = True


def run(
    items: Sequence[Any],
    *,
    scorer: Scorer,
    ensemble: Ensemble,
    out: Path,
    conditions: Sequence[Condition],
    protocol: Mapping[str, Any],
    options: Options,
) -> dict[str, Any]:
    """Score `items` under every condition (or take up the scores there are), measure, and write everything to `out`."""
    runs = score_conditions(
        items,
        conditions,
        scorer=scorer,
        ensemble=ensemble,
        folder=out / "scores",
        way=options.way,
        progress=options.progress,
    )
    pictures = Pictures.of(items)
    limit = ensemble.vote.threshold
    thresholds = {who: limit if who == ENSEMBLE else 0.5 for who in runs[0].p}
    results = measure(
        pictures,
        runs,
        thresholds=thresholds,
        protocol={**protocol, **_bundle_protocol(ensemble, pictures, options.way)},
        pools=options.pools,
        seed=options.seed,
        draws=options.draws,
    )
    write_results(out, pictures, runs, results, thumbnails=options.thumbnails)
    return results


def _bundle_protocol(ensemble: Ensemble, pictures: Pictures, way: str) -> dict[str, Any]:
    """What a report says of the bundle and the pictures; `origin` stands beside every number."""
    vote, fingerprint = ensemble.vote, pictures.fingerprint()
    rule = ""
    if vote.false_alarm is not None:
        rule = f" (at most {vote.false_alarm:.0%} false alarms on the pictures it was fitted on)"
    return {
        "origin": f"bundle {ensemble.hash[:12]}, pictures {fingerprint[:12]}{way and f', {way}'}",
        "bundle": ensemble.hash,
        "pictures": f"{len(pictures.names)}, fingerprint {fingerprint}",
        "vote": dataclasses.asdict(vote),
        "calibrators": {
            name: f"{c.kind}, fitted on {c.fitted_on} ({c.n_real} real, {c.n_fake} fake)"
            for name, c in ensemble.calibrators.items()
        },
        "threshold": f"ensemble {vote.threshold:.4g}{rule}, members 0.5",
    }


def read_items(manifest: Path, *, split: str | None, frames: int, out: Path) -> tuple[list[Any], str]:
    """The manifest's pictures, and what it lost. With `frames`, video files become that many PNGs under `out/frames`."""
    from solution.data.images import VIDEO_SUFFIXES
    from solution.data.manifest import DropReport, read_manifest

    items, dropped = [], DropReport()
    for part in split.split(",") if split else [None]:
        found, lost = read_manifest(manifest, split=part, videos=frames > 0)
        items += found
        dropped.take(lost, DropReport())
    pictures = []
    for item in items:
        if item.path.suffix.lower() in VIDEO_SUFFIXES:
            pictures += _frames_of(item, frames, out / "frames")
        else:
            pictures.append(item)
    return limit_frames(pictures, frames), dropped.summary()


def _frames_of(item: Any, frames: int, folder: Path) -> list[Any]:
    """An item per sampled frame, written once as PNG and found again by a later run."""
    from solution.data.degradation import use_one_opencv_thread
    from solution.data.images import UnreadableInput
    from solution.data.processes import LIMIT, Killed, alone

    known = f"{item.name}, {os.path.getsize(item.path)} bytes, {frames} frames"
    folder = folder / hashlib.sha256(known.encode()).hexdigest()[:16]
    listing = folder / "frames.json"  # written last: with it, the folder is complete
    if not listing.exists():
        folder.mkdir(parents=True, exist_ok=True)
        use_one_opencv_thread()
        try:
            names = alone(_write_frames, item.path, frames, folder, seconds=LIMIT)
        except UnreadableInput as error:
            raise EvaluationError(f"{error}; mend it or take it out of the manifest") from None
        except Killed as error:
            raise EvaluationError(f"{item.path}: {error}; mend it or take it out of the manifest") from None
        write_atomically(listing, json.dumps(names))
    return [
        dataclasses.replace(
            item,
            name=f"{item.name}#{name}",
            path=folder / name,
            video=item.video or item.name,
        )
        for name in json.loads(listing.read_text())
    ]


def _write_frames(path: Path, frames: int, folder: Path) -> list[str]:
    """The names of the sampled frames of a video, written as PNGs into `folder`."""
    import cv2

    from solution.data.videos import sample_frames

    names = []
    for index, frame in sample_frames(path, frames):
        names.append(f"{index:06d}.png")
        if not cv2.imwrite(str(folder / names[-1]), frame[:, :, ::-1]):
            raise EvaluationError(f"{folder / names[-1]}: cannot be written")
    return names


def _bootstrap_text(arguments: argparse.Namespace) -> str:
    return f"95 % intervals, {arguments.draws} BCa bootstrap draws within each class, seed {arguments.seeds[0]}"


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
