"""Entry: train variants of a member over several seeds and compare them on the same validation pictures.

`python -m solution.studies.ablate --study qtfp --out DIR [--seeds 0,1,2] [--variants a,b] -- ARGUMENTS OF solution.train`. A
variant is the member's preset with some `--set`; every run is a `solution.train` of its own in DIR/STUDY/VARIANT-SEED, so
the same command goes on where it stopped. Prints a table and writes DIR/STUDY.json: per variant the AUC of each
seed, their mean, and the paired difference to the first variant over the seeds that both have.

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
from typing import Any

import numpy as np

from solution.data.manifest import ManifestError, read_manifest
from solution.errors import UsageError, door
from solution.evaluation import metrics
from solution.io import write_atomically
from solution.studies.tables import read_scores

CONDITIONS = ("clean", "degraded")


@dataclass(frozen=True)
class Study:
    """Variants of one `member`: `--set` arguments by name, the reference first; `shared` ones go to all."""

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


def leave_out_study(member: str, generators: Sequence[str], steps: int) -> Study:
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


def validation_scores(path: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """A training's `validation.csv`: names (N,), labels (N,) and logits (2, N), clean and degraded.

    Raises:
        ManifestError: no such file, or no such columns.
    """
    what = "a training's scores; that run has not reached a validation"
    table = read_scores(path, words=["image"], numbers=["label", *CONDITIONS], what=what)
    return tuple(table["image"]), table["label"].to_numpy(int), table[[*CONDITIONS]].to_numpy().T


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
def read_runs(folder: Path, study: Study) -> tuple[tuple[str, ...], np.ndarray, dict[str, dict[int, np.ndarray]]]:
    """Names (N,), labels (N,) and, by variant and seed, logits (2, N) of every finished run in `folder`.

    Raises:
        ManifestError: runs that were validated on other pictures than the first.
    """
    names, labels, runs = None, None, {}
    for path in sorted(folder.glob(f"*/{study.member}/validation.csv")):
        variant, _, seed = path.parent.parent.name.rpartition("-")
        if variant not in study.variants or not seed.isdigit():
            continue
        found, labels, logits = validation_scores(path)
        if names is not None and found != names:
            raise ManifestError(
                f"{path}: other validation pictures than the runs before it; train them all with the same --data"
            )
        names = found
        runs.setdefault(variant, {})[int(seed)] = logits
    return names or (), labels, runs


def compare(folder: Path, study: Study, draws: int = 2000) -> list[dict[str, Any]]:
    """One row per variant that has a finished run in `folder`, as plain JSON values.

    Per condition: `auc` by seed, their `mean`, its bootstrap interval over pictures, and `difference` to the first
    variant (`value, low, high`, paired bootstrap over pictures, mean of the `paired_seeds`).
    """
    _, labels, runs = read_runs(folder, study)
    reference = next(iter(study.variants))
    return [_row(variant, labels, runs, reference, draws) for variant in study.variants if variant in runs]


def compare_left_out(folder: Path, study: Study, data: Path, draws: int = 2000) -> list[dict[str, Any]]:
    """As `compare`, of each generator on its own validation pictures (`of_generator`): a row with it, one without it."""
    names, labels, runs = read_runs(folder, study)
    rows = []
    for variant in study.variants:
        if variant == ALL or variant not in runs or ALL not in runs:
            continue
        wanted = of_generator(data, variant.removeprefix("without "))
        keep = np.array([name in wanted for name in names])
        part = {v: {s: x[:, keep] for s, x in runs[v].items()} for v in (ALL, variant)}
        rows += [
            _row(v, labels[keep], part, ALL, draws) | {"generator": variant.removeprefix("without ")} for v in part
        ]
    return rows


def _row(
    variant: str, labels: np.ndarray, runs: Mapping[str, Mapping[int, np.ndarray]], reference: str, draws: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": variant, "seeds": sorted(runs[variant])}
    shared = sorted(set(runs[variant]) & set(runs.get(reference, {})))
    for index, condition in enumerate(CONDITIONS):
        mine = np.stack([runs[variant][s][index] for s in row["seeds"]])
        interval = metrics.auc_interval(labels, mine, seed=0, draws=draws)
        told = {
            "auc": [metrics.auc(labels, run) for run in mine],
            "mean": interval.value,
            "low": interval.low,
            "high": interval.high,
        }
        if shared and variant != reference:
            pair = [np.stack([runs[v][s][index] for s in shared]) for v in (variant, reference)]
            test = metrics.paired_auc_test(labels, *pair, method="bootstrap", draws=draws)
            told["difference"] = {
                "value": test.difference,
                "low": test.low,
                "high": test.high,
                "by_seed": [metrics.auc(labels, a) - metrics.auc(labels, b) for a, b in zip(*pair)],
                "paired_seeds": shared,
            }
        row[condition] = told
    row["pictures"] = len(labels)
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`compare`'s rows as a Markdown table."""
    lines = [
        "| variant | seeds | AUC clean | minus first | AUC degraded | minus first |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        variant = f"{row['generator']}: {row['variant']}" if "generator" in row else row["variant"]
        cells = [variant, ", ".join(map(str, row["seeds"]))]
        for condition in CONDITIONS:
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
        steps = args.steps or 150
        name, study = f"leave-out-{args.member}", leave_out_study(args.member, args.leave_out.split(","), steps)
        if "--data" not in given[:-1]:
            parser.error("--leave-out: give --data MANIFEST after --, also with --table")
    elif args.steps:
        study = replace(study, shared=(*study.shared, *_short(args.steps)))
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
