"""Entry: train variants of a member over several seeds and compare them on the same validation pictures.

`python -m solution.studies.ablate --study qtfp --out DIR [--seeds 0,1,2] [--variants a,b] -- ARGUMENTS OF solution.train`. A
variant is the member's preset with some `--set`; every run is a `solution.train` of its own in DIR/STUDY/VARIANT-SEED, so
the same command goes on where it stopped. Prints a table and writes DIR/STUDY.json: per variant the AUC of each
seed, their mean, and the paired difference to the first variant over the seeds that both have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solution.data.manifest import ManifestError
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
    "recipe": Study(  # one change each to the recipe of `global`
        "global",
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
            "last weights": ("train.average=0",),
            "head-1e-3": ("optim.head_lr=1e-3",),
            "head-1e-3-clipped": ("optim.head_lr=1e-3", "optim.clip_norm=1"),
        },
    ),
}


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


def run_to_its_end(command: list[str]) -> int:
    """The exit code; Ctrl-C reaches the training too, which is given the time to write its checkpoint."""
    with subprocess.Popen(command) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue


# ------------------------------------------------------------------------------------------------ comparison
def compare(folder: Path, study: Study, draws: int = 2000) -> list[dict[str, Any]]:
    """One row per variant that has a finished run in `folder`, as plain JSON values.

    Per condition: `auc` by seed, their `mean`, its bootstrap interval over pictures, and `difference` to the first
    variant (`value, low, high`, paired bootstrap over pictures, mean of the `paired_seeds`).
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
    rows = []
    reference = next(iter(study.variants))
    for variant in study.variants:
        if variant not in runs:
            continue
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
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`compare`'s rows as a Markdown table."""
    lines = [
        "| variant | seeds | AUC clean | minus first | AUC degraded | minus first |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["variant"], ", ".join(map(str, row["seeds"]))]
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
    parser.add_argument("--study", required=True, choices=list(STUDIES))
    parser.add_argument("--out", required=True, type=Path, help="folder of all runs")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--table", action="store_true", help="train nothing; compare what is there")
    args = parser.parse_args(argv[:split])
    study, given = STUDIES[args.study], argv[split + 1 :]
    variants = args.variants.split(",") if args.variants else list(study.variants)
    if unknown := set(variants) - set(study.variants):
        parser.error(f"--variants {', '.join(sorted(unknown))}: {args.study} has {', '.join(study.variants)}")
    folder = args.out / args.study
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
    rows = compare(folder, study)
    if not rows:
        raise UsageError(f"{folder}: no finished run")
    content = {"study": args.study, "shared": study.shared, "rows": rows}
    write_atomically(args.out / f"{args.study}.json", json.dumps(content, indent=1))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
