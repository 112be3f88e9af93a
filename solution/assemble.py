"""Entry: calibrate trained members, choose their votes, and leave a bundle.

`python -m solution.assemble --members DIR --names global,face,fusion --data MANIFEST --out BUNDLE`. Takes the members'
folders that `solution.train` left in DIR; writes BUNDLE with calibrators, votes, threshold, hashes, a golden file, and
`validation.json`: how the ways of voting compare on the validation pictures (cross-validated).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solution.errors import door

# What needs torch is imported inside functions: --help answers at once.


def assemble(
    members: Path,
    names: list[str],
    data: Path,
    out: Path,
    *,
    seeds: tuple[int, ...] = (7,),
    device: str = "auto",
    workers: int = 1,
    about: Mapping[str, Any] | None = None,
    limit: int = 0,
    progress: bool = True,
) -> dict:
    """Fit and write the bundle `out`; returns the comparison that it also writes as `out/validation.json`.

    Calibrators and votes are fitted on the validation split of `data`, clean and degraded (global_p = 1) together. The
    degraded pictures are drawn anew for each of `seeds`.
    about: what the model card says of it, as fields of `bundle.About`: licence, base_model.
    limit: at most so many validation pictures, seeded (smoke runs).
    """
    import numpy as np

    from solution.bundles.bundle import About, write_bundle
    from solution.bundles.members import read_config
    from solution.bundles.selftest import add_golden
    from solution.config import DegradationConfig, VoteConfig
    from solution.data.manifest import draw_items, read_manifest
    from solution.data.training import readable
    from solution.evaluation.fit import fit_ensemble
    from solution.io import write_atomically
    from solution.models.calibration import Calibrator
    from solution.scoring import ensemble as predict

    items, report = read_manifest(data, split="val")
    configs = [read_config(members / name) for name in names]
    strict = any(c.sampling.on_unreadable == "fail" for c in configs)
    items = readable(items, "fail" if strict else "drop", report, progress=progress)
    if report.dropped:
        print(report.summary(), file=sys.stderr)
    items = draw_items(items, limit, 0)
    final, out = out, out.with_name(f"{out.name}.part")
    shutil.rmtree(out, ignore_errors=True)
    # A first, uncalibrated bundle: scoring goes the way that every submission goes.
    plain = VoteConfig(dict.fromkeys(names, 1))
    bundle = write_bundle(
        out,
        names,
        plain,
        {n: Calibrator() for n in names},
        source=members,
        name=final.name,
    )
    ensemble = predict.load_ensemble(str(out), device=device)
    clean = predict.score_pictures(ensemble, items, workers=workers, progress=progress)
    degraded = [
        predict.score_pictures(
            ensemble,
            items,
            degradation=DegradationConfig(global_p=1.0),
            seed=seed,
            workers=workers,
            progress=progress,
        )
        for seed in seeds
    ]
    labels = np.array([item.label for item in items])
    what = f"{len(items)} validation pictures of {data.name}, clean and degraded (global_p=1, seeds {list(seeds)})"
    calibrators, vote, comparison = fit_ensemble(clean, degraded, labels, fitted_on=what)
    comparison["fitted_on"] = what
    bundle = write_bundle(
        out,
        names,
        vote,
        calibrators,
        name=final.name,
        about=About(**about or {}, data=f"fitted on {what}", report=comparison),
    )
    add_golden(bundle)
    write_atomically(out / "validation.json", json.dumps(comparison, indent=1) + "\n")
    if final.exists():
        shutil.rmtree(final)
    out.rename(final)
    return comparison


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m solution.assemble", description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=Path, required=True, help="folder of trained members")
    parser.add_argument("--names", required=True, help="members of the bundle, comma-separated")
    parser.add_argument("--data", type=Path, required=True, help="manifest with a val split")
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder")
    parser.add_argument(
        "--seeds",
        default="7",
        help="of the degraded validation pictures, comma-separated",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--licence", default="other", help="identifier from the Hub's list of licences")
    parser.add_argument("--limit", type=int, default=0, help="at most so many validation pictures")
    parser.add_argument("--base-model", action="append", default=[], help="for the model card")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


@door("assemble", refused=(ValueError,))
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 usage, 3 environment or weights."""
    args = parse(argv)
    comparison = assemble(
        args.members,
        [name for name in args.names.split(",") if name],
        args.data,
        args.out,
        seeds=tuple(int(s) for s in args.seeds.split(",")),
        device=args.device,
        workers=args.workers,
        about={"licence": args.licence, "base_model": tuple(args.base_model)},
        limit=args.limit,
        progress=not args.quiet,
    )
    print(json.dumps(comparison, indent=1))
    print(f"assemble: wrote {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
