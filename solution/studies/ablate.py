"""Entry: train variants of a member over several seeds and compare them on the same validation pictures.

`python -m solution.studies.ablate --study qtfp --out DIR [--seeds 0,1,2] [--variants a,b] -- ARGUMENTS OF solution.train`. A
variant is the member's preset with some `--set`; every run is a `solution.train` of its own in DIR/STUDY/VARIANT-SEED, so
the same command goes on where it stopped. Prints a table and writes DIR/STUDY.json: per variant the AUC of each
seed, their mean, and the paired difference to the first variant over the seeds that both have; on the generators trained
on and on unseen ones apart, clean and degraded, and their mean.

`--leave-out sdxl,sd21 [--member global]` instead of `--study` trains once on all generators and once without each of these,
and compares on the generator's own validation pictures: what its absence from the training costs, as the absence of the
next one will.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solution.data.manifest import ManifestError, read_manifest
from solution.errors import UsageError, door
from solution.evaluation import metrics
from solution.io import write_atomically
from solution.studies.tables import read_scores

if TYPE_CHECKING:
    import pandas as pd

CONDITIONS = ("clean", "degraded")
Runs = dict[str, dict[int, np.ndarray]]  # variant -> seed -> logits (2, N), clean and degraded
# condition -> (variant, seed) -> AUC and (draws,) bootstrap draws of it; `mean`: over the conditions
Judged = dict[str, dict[tuple[str, int], tuple[float, np.ndarray]]]


@dataclass(frozen=True)
class Study:
    """Variants of one `member`: `--set` arguments by name, the reference first; `shared`, how long they run, go to all."""

    member: str
    shared: tuple[str, ...]
    variants: Mapping[str, tuple[str, ...]]


def _short(steps: int) -> tuple[str, ...]:
    """A run of so many steps, warmed up over a fifth of them, validated once at its end."""
    at_end = f"train.max_steps={steps}", f"train.validate_every={steps}"
    return (*at_end, f"optim.warmup_steps={steps // 5}")


STUDIES = {
    "qtfp": Study(  # the paper's ablation: each part on top of the one before
        "qtfp",
        _short(100),
        {
            "cls": ("qtfp.pool=cls", "qtfp.flcl=0", "qtfp.raal=0"),
            "queries": ("qtfp.flcl=0", "qtfp.raal=0"),
            "queries-flcl": ("qtfp.raal=0",),
            "queries-flcl-raal": (),
        },
    ),
    "recipe": Study(  # one change each to the recipe of `global`'s tower
        "wide",
        _short(150),
        {
            "preset": (),
            "engine-never": ("degradation.global_p=0",),
            "engine-always": ("degradation.global_p=1",),
            "never self-blended": ("augment.self_blend_p=0",),
            "self-blended 60 %": ("augment.self_blend_p=0.6",),
            "looks as they are": ("augment.colour_p=0", "augment.sharpness_p=0"),
            "balanced": ("sampling.balance=balanced",),
            "unbalanced": ("sampling.balance=none",),
            "112px": ("view.resize=112", "view.side=112"),
            "140px": ("view.resize=140", "view.side=140"),
            "lora": ("adapter.kind=lora", "adapter.rank=16", "adapter.alpha=32"),
            "norm": ("adapter.kind=norm", "optim.lr=1e-3"),
            "frozen": ("adapter.kind=none",),
            "focal": ("stream.focal_gamma=2",),
            "contrast": ("features.contrast=0.5",),
            "alignment and uniformity": ("features.alignment=0.1", "features.uniformity=0.5"),
            "last weights": ("train.average=0",),
            "head-1e-3": ("optim.head_lr=1e-3",),
            "head-1e-3-clipped": ("optim.head_lr=1e-3", "optim.clip_norm=1"),
        },
    ),
}


ALL = "all generators"


def leave_out_study(member: str, generators: Sequence[str], steps: int = 150) -> Study:
    """Training on all, and without each of `generators`."""
    without = {f"without {g}": (f"sampling.leave_out={g}",) for g in generators}
    return Study(member, _short(steps), {ALL: (), **without})


# ------------------------------------------------------------------------------------------------ runs
def train_command(study: Study, variant: str, seed: int, out: Path, given: Sequence[str]) -> list[str]:
    """The `solution.train` call of one run."""
    settings = [*study.shared, *study.variants[variant], f"train.seed={seed}"]
    sets = [word for setting in settings for word in ("--set", setting)]
    start = [sys.executable, "-m", "solution.train", "--member", study.member]
    return [*start, *given, "--out", str(out), *sets]  # the study has the last word


def validation_scores(path: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """A training's `validation.csv`: its N pictures (columns image, label, source, split) and logits (2, N), clean and
    degraded.

    Raises:
        ManifestError: no such file, or no such columns.
    """
    what = "a training's scores; that run has not reached a validation"
    known = ["image", "label", "source", "split"]
    table = read_scores(path, words=["image", "source", "split"], numbers=["label", *CONDITIONS], what=what)
    return table[known], table[[*CONDITIONS]].to_numpy().T


def of_generator(data: Path, generator: str) -> set[str]:
    """Names of the seen validation pictures that tell about a generator: its fakes, and every real one."""
    items, _ = read_manifest(data, split="val")
    return {item.name for item in items if item.label == 0 or item.generator == generator}


def run_to_its_end(command: list[str]) -> int:
    """The exit code; Ctrl-C reaches the training too, which is given the time to write its checkpoint."""
    with subprocess.Popen(command) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue


# ------------------------------------------------------------------------------------------------ comparison
def read_runs(folder: Path, study: Study) -> tuple[pd.DataFrame | None, Runs]:
    """The pictures and, by variant and seed, logits (2, N) of every finished run in `folder`.

    Raises:
        ManifestError: runs that were validated on other pictures than the first.
    """
    pictures, runs = None, {}
    for path in sorted(folder.glob(f"*/{study.member}/validation.csv")):
        variant, _, seed = path.parent.parent.name.rpartition("-")
        if variant not in study.variants or not seed.isdigit():
            continue
        found, logits = validation_scores(path)
        if pictures is not None and not found["image"].equals(pictures["image"]):
            raise ManifestError(
                f"{path}: other validation pictures than the runs before it; train them all with the same --data"
            )
        pictures = found
        runs.setdefault(variant, {})[int(seed)] = logits
    return pictures, runs


def compare(folder: Path, study: Study, draws: int = 2000) -> list[dict[str, Any]]:
    """One row per variant that has a finished run in `folder`, as plain JSON values.

    By condition (clean, degraded; on unseen generators apart, as the mean over their sources; `mean`: of them all):
    `auc` by seed, their `mean`, its bootstrap interval over pictures, and `difference` to the first variant (`value,
    low, high`, paired bootstrap over pictures, mean of the `paired_seeds`).
    """
    pictures, runs = read_runs(folder, study)
    if pictures is None:
        return []
    judged, reference = _judged(pictures, runs, draws), next(iter(study.variants))
    return [_row(variant, judged, reference, len(pictures)) for variant in study.variants if variant in runs]


def compare_left_out(folder: Path, study: Study, data: Path, draws: int = 2000) -> list[dict[str, Any]]:
    """As `compare`, of each generator on its own validation pictures (`of_generator`): a row with it, one without it."""
    pictures, runs = read_runs(folder, study)
    rows = []
    for variant in study.variants:
        if variant == ALL or variant not in runs or ALL not in runs:
            continue
        generator = variant.removeprefix("without ")
        wanted = of_generator(data, generator)
        keep = pictures["image"].isin(wanted).to_numpy()
        part = {v: {s: x[:, keep] for s, x in runs[v].items()} for v in (ALL, variant)}
        judged = _judged(pictures[keep], part, draws)
        rows += [_row(v, judged, ALL, int(keep.sum())) | {"generator": generator} for v in part]
    return rows


def _judged(pictures: pd.DataFrame, runs: Runs, draws: int) -> Judged:
    """Every run on every condition, as training's validation judges: unseen pictures by the mean over their sources."""
    labels, unseen = pictures["label"].to_numpy(int), (pictures["split"] == "unseen").to_numpy()
    parts = {"": [np.flatnonzero(~unseen)]}
    if unseen.any():
        by_source = metrics.parts_by_source(labels[unseen], pictures["source"].to_numpy(str)[unseen])
        parts["unseen_"] = [np.flatnonzero(unseen)[part] for part in by_source]
    judged: Judged = {}
    for prefix, of in parts.items():
        for index, condition in enumerate(CONDITIONS):
            scores = {(v, s): logits[[index]] for v, seeds in runs.items() for s, logits in seeds.items()}
            judged[f"{prefix}{condition}"] = metrics.mean_aucs(labels, scores, of, seed=0, draws=draws)
    every = [*judged.values()]
    judged["mean"] = {
        run: (np.mean([of[run][0] for of in every]), np.mean([of[run][1] for of in every], axis=0)) for run in every[0]
    }
    return judged


def _row(variant: str, judged: Judged, reference: str, pictures: int) -> dict[str, Any]:
    seeds = sorted(s for v, s in judged["mean"] if v == variant)
    paired = [s for s in seeds if variant != reference and (reference, s) in judged["mean"]]
    row: dict[str, Any] = {"variant": variant, "seeds": seeds, "pictures": pictures}
    for condition, of in judged.items():
        aucs, drawn = zip(*(of[variant, s] for s in seeds))
        low, high = metrics.ends(np.mean(drawn, axis=0))
        row[condition] = {"auc": [float(a) for a in aucs], "mean": float(np.mean(aucs)), "low": low, "high": high}
        if paired:
            pairs = [(of[variant, s], of[reference, s]) for s in paired]
            by_seed = [float(a - b) for (a, _), (b, _) in pairs]
            low, high = metrics.ends(np.mean([a - b for (_, a), (_, b) in pairs], axis=0))
            row[condition]["difference"] = {
                "value": float(np.mean(by_seed)),
                "low": low,
                "high": high,
                "by_seed": by_seed,
                "paired_seeds": paired,
            }
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`compare`'s rows as a Markdown table."""
    conditions = [name for name, told in rows[0].items() if isinstance(told, dict)]
    head = [word for name in conditions for word in (name, "minus first")]
    lines = [f"| variant | seeds | {' | '.join(head)} |", f"|{'---|' * (2 + len(head))}"]
    for row in rows:
        variant = f"{row['generator']}: {row['variant']}" if "generator" in row else row["variant"]
        cells = [variant, ", ".join(map(str, row["seeds"]))]
        for condition in conditions:
            told = row[condition]
            each = " ".join(_plain(a) for a in told["auc"])
            spread = f" ({each})" if len(told["auc"]) > 1 else ""
            cells.append(f"{_plain(told['mean'])}{spread}")
            d = told.get("difference")
            cells.append(f"{d['value']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" if d else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plain(auc: float) -> str:
    return f"{auc:.3f}".removeprefix("0")


# ------------------------------------------------------------------------------------------------ entry
@door("ablate")
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 usage, 130 interrupted and resumable, or that of the training that failed."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="python -m solution.studies.ablate", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--study", choices=list(STUDIES))
    what.add_argument("--leave-out", metavar="GENERATORS", help="comma-separated, as the manifest writes them")
    parser.add_argument("--member", default="global", help="of --leave-out")
    parser.add_argument("--steps", type=int, help="of each run (default: the study's; 150 with --leave-out)")
    parser.add_argument("--out", required=True, type=Path, help="folder of all runs")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--table", action="store_true", help="train nothing; compare what is there")
    args, given = parser.parse_args(argv[:split]), argv[split + 1 :]
    name, study = args.study, STUDIES.get(args.study)
    if args.leave_out:
        name, study = f"leave-out-{args.member}", leave_out_study(args.member, args.leave_out.split(","))
        if "--data" not in given[:-1]:
            parser.error("--leave-out: give --data MANIFEST after --, also with --table")
    if args.steps:
        study = replace(study, shared=_short(args.steps))
    variants = args.variants.split(",") if args.variants else list(study.variants)
    if unknown := set(variants) - set(study.variants):
        parser.error(f"--variants {', '.join(sorted(unknown))}: {name} has {', '.join(study.variants)}")
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        parser.error(f"--seeds {args.seeds}: expected whole numbers, such as 0,1,2")
    folder = args.out / name
    for seed in [] if args.table else [int(s) for s in args.seeds.split(",")]:
        for variant in variants:
            out = folder / f"{variant}-{seed}"
            print(f"ablate: {variant}, seed {seed}", file=sys.stderr)
            command = train_command(study, variant, seed, out, given)
            code = run_to_its_end(command)
            if code:
                way = "the same command goes on" if code == 130 else "see above"
                print(
                    f"ablate: stopped with exit code {code} in {out}; {way}",
                    file=sys.stderr,
                )
                return code
    if args.leave_out:
        rows = compare_left_out(folder, study, Path(given[given.index("--data") + 1]))
    else:
        rows = compare(folder, study)
    if not rows:
        raise UsageError(f"{folder}: no finished run")
    content = {"study": name, "shared": study.shared, "rows": rows}
    write_atomically(args.out / f"{name}.json", json.dumps(content, indent=1))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
