"""Entry: calibrate trained members, choose their votes, and leave a bundle.

`python -m solution.assemble --members DIR --names global,face,fusion --data MANIFEST --out BUNDLE`. Takes the members'
folders that `solution.train` left in DIR; writes BUNDLE with calibrators, votes, threshold, hashes, a golden file, and
`validation.json`: how the ways of voting compare on seen and unseen generators (cross-validated over generators).
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from solution.errors import door

if TYPE_CHECKING:
    from solution.bundles.bundle import About, Bundle

# What needs torch is imported inside functions: --help answers at once.


@dataclass(frozen=True)
class Settings:
    """How a bundle is fitted. seeds: each draws the degraded validation pictures anew. limit: at most so many pictures
    of each split, drawn in proportion from each source and label (smoke runs); 0: all. int8: pack the towers' matrices
    (`bundle.collect`). claims: a `claims.json` that the bundle takes with it (`solution.studies.mechanisms`). device: as
    `devices.pick_device` takes it. workers: processes that read pictures. false_alarms, worst_false_alarms: the share of
    real pictures that the threshold calls fake at most, as a mean over real sources and of the worst one."""

    seeds: tuple[int, ...] = (7,)
    limit: int = 0
    int8: bool = False
    device: str = "auto"
    workers: int = 1
    progress: bool = True
    false_alarms: float = 0.05
    worst_false_alarms: float = 0.10
    claims: Path | None = None


def assemble(
    members: Path,
    names: list[str],
    data: Path,
    out: Path,
    *,
    settings: Settings = Settings(),
    about: About | None = None,
) -> dict:
    """Fit and write the bundle `out`; returns the comparison that it also writes as `out/validation.json`.

    members: the folder of the members' folders; names: those of the bundle. about: what the bundle says of itself;
    where it does not state its data, that is what it was fitted on.

    Calibrators and votes are fitted on the splits `val` and, where there is one, `unseen` of `data`, clean and degraded
    (global_p = 1) together. Raw logits are kept in `members/scores`: a run that was interrupted goes on.

    Raises:
        ManifestError: no real or no fake ones in `val`. WeightsError: a member that is not there or cannot be read.
    """
    from solution.bundles.bundle import CLAIMS, About, collect, write_bundle
    from solution.bundles.selftest import add_golden
    from solution.config import VoteConfig
    from solution.evaluation.conditions import degraded_conditions
    from solution.evaluation.fit import FitOptions, Known, fit_ensemble
    from solution.evaluation.measure import CLEAN
    from solution.io import write_atomically
    from solution.models.calibration import Calibrator

    items = validation_items(members, names, data, settings)
    final, out = out, out.with_name(f"{out.name}.part")
    shutil.rmtree(out, ignore_errors=True)
    collect(members, out, names, int8=settings.int8)
    if settings.claims:
        shutil.copyfile(settings.claims, out / CLAIMS)
    # A first, uncalibrated bundle: scoring goes the way that every submission goes.
    plain = VoteConfig(dict.fromkeys(names, 1), mean="probability")
    bundle = write_bundle(out, names, plain, {n: Calibrator() for n in names}, name=final.name)
    conditions = (CLEAN, *degraded_conditions(settings.seeds))
    logits = member_logits(bundle, items, conditions, members / "scores", settings)
    splits = Counter(item.split for item in items)
    counts = ", ".join(f"{count} of {split}" for split, count in splits.items())
    what = f"{counts} of {data.name}, clean and degraded (global_p=1, seeds {list(settings.seeds)})"
    options = FitOptions(false_alarm=settings.false_alarms, worst_false_alarm=settings.worst_false_alarms)
    calibrators, vote, comparison = fit_ensemble(logits[0], logits[1:], Known.of(items), options, fitted_on=what)
    comparison["fitted_on"] = what
    about = about or About()
    about = replace(about, data=about.data or f"fitted on {what}")
    bundle = write_bundle(out, names, vote, calibrators, name=final.name, report=comparison, about=about)
    add_golden(bundle)
    write_atomically(out / "validation.json", json.dumps(comparison, indent=1) + "\n")
    if final.exists():
        shutil.rmtree(final)
    out.rename(final)
    return comparison


def member_logits(
    bundle: Bundle, items: list, conditions: Sequence[Any], folder: Path, settings: Settings
) -> list[dict]:
    """Raw logits (N,) of every member under each condition, kept in `folder` by the member's own weights and the device: a
    member that is trained anew is scored alone, and the others' are taken from there."""
    from solution.bundles.bundle import member_hash
    from solution.evaluation.kept import keep_logits, kept_logits, score
    from solution.models.devices import pick_device
    from solution.scoring.ensemble import load_ensemble
    from solution.scoring.stream import score_pictures

    place = pick_device(settings.device).type
    depends = {name: {"member": member_hash(bundle, name), "device": place} for name in bundle.configs}
    keys = {name: {"key": key, "folder": folder} for name, key in depends.items()}

    @functools.cache  # the same members are missing under most conditions
    def loaded(*members: str) -> Any:
        return load_ensemble(bundle, settings.device, exact=True, members=members)

    found = []
    for condition in conditions:
        kept = {name: kept_logits(items, condition, **key) for name, key in keys.items()}
        missing = [name for name, logits in kept.items() if logits is None]
        if missing:
            scorer = functools.partial(score_pictures, loaded(*missing), workers=settings.workers)
            with tqdm(total=len(items), desc=condition.name, unit="picture", disable=not settings.progress) as bar:
                scored = score(items, condition, scorer, bar.update)
            for name in missing:
                kept[name] = {name: scored[name]}
                keep_logits(kept[name], items, condition, **keys[name])
        found.append({name: kept[name][name] for name in keys})
    return found


def validation_items(members: Path, names: list[str], data: Path, settings: Settings) -> list:
    """The readable pictures of `val` and `unseen`, for the members' own rule on what cannot be read.

    Raises:
        ManifestError: no real or no fake ones in `val`.
    """
    from solution.bundles.members import read_config
    from solution.data.manifest import manifest_splits, read_manifest
    from solution.data.training import readable
    from solution.evaluation.conditions import limit_items

    configs = [read_config(members / name) for name in names]
    strict = any(c.sampling.on_unreadable == "fail" for c in configs)
    items = []
    for split in [s for s in ("val", "unseen") if s in manifest_splits(data) or s == "val"]:
        part, report = read_manifest(data, split=split)
        how = {"workers": settings.workers, "progress": settings.progress}
        part = readable(part, "fail" if strict else "drop", report, **how)
        if report.dropped:
            print(report.summary(), file=sys.stderr)
        items += limit_items(part, settings.limit, 0)
    return items


def share_of_pictures(text: str) -> float:
    """A number above 0 and below 1."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a share of pictures between 0 and 1, such as 0.05")
    return share


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m solution.assemble", description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=Path, required=True, help="folder of trained members")
    parser.add_argument("--names", required=True, help="members of the bundle, comma-separated")
    parser.add_argument("--data", type=Path, required=True, help="manifest with a val split and, better, an unseen one")
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder")
    parser.add_argument(
        "--seeds",
        default="7",
        help="of the degraded validation pictures, comma-separated",
    )
    parser.add_argument("--int8", action="store_true", help="towers as int8 with a scale a row: half the bytes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--licence", default="other", help="identifier from the Hub's list of licences")
    parser.add_argument("--limit", type=int, default=0, help="at most so many pictures of each split")
    parser.add_argument(
        "--false-alarms",
        type=share_of_pictures,
        default=Settings.false_alarms,
        help="share of real pictures called fake at the threshold, at most, as a mean over sources (default %(default)s)",
    )
    parser.add_argument(
        "--worst-false-alarms",
        type=share_of_pictures,
        default=Settings.worst_false_alarms,
        help="the same of the worst source; one that nothing was fitted on may exceed it (default %(default)s)",
    )
    parser.add_argument("--claims", type=Path, help="claims.json for the bundle: mechanisms that its card claims")
    parser.add_argument("--base-model", action="append", default=[], help="for the model card")
    parser.add_argument("--data-terms", help="for the model card: what it was trained on, and what that allows")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


@door("assemble", refused=(ValueError,))
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 usage, 3 environment or weights."""
    args = parse(argv)
    from solution.bundles.bundle import About

    names = [name for name in args.names.split(",") if name]
    settings = Settings(
        seeds=tuple(int(s) for s in args.seeds.split(",")),
        limit=args.limit,
        int8=args.int8,
        device=args.device,
        workers=args.workers,
        progress=not args.quiet,
        false_alarms=args.false_alarms,
        worst_false_alarms=args.worst_false_alarms,
        claims=args.claims,
    )
    about = About(licence=args.licence, data=args.data_terms or "", base_model=tuple(args.base_model))
    comparison = assemble(args.members, names, args.data, args.out, settings=settings, about=about)
    print(json.dumps(comparison, indent=1))
    print(f"assemble: wrote {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
