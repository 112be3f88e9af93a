"""Entry: does a trained bundle use what its papers claim? Each mechanism taken away, and what that does to the scores.

    python -m solution.studies.mechanisms --weights BUNDLE --data MANIFEST [--split val,unseen] [--limit 200] --out DIR

The pictures of every split, and beside them self-blended fakes of its real ones, go clean and degraded through every
member as it is and under each intervention. Leaves in DIR `mechanisms.json`, the same as tables (`mechanisms.md`, also
printed) and a figure a set. `BUNDLE/claims.json`, a JSON list of `MEMBER/MECHANISM` in the table's words (`ensemble`
counts as a member), says what the bundle's card claims: exit code 4 when something claimed is dead or not measured.

Logits are (N,) float64, positive = fake, by member and mechanism; the member as it is goes by `BUILT`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solution.data.manifest import read_manifest
from solution.errors import FAILURES, door, tell, whole
from solution.evaluation.conditions import degraded_conditions, limit_items
from solution.evaluation.measure import CLEAN
from solution.io import write_atomically

# What needs torch is imported inside functions: --help answers at once.
if TYPE_CHECKING:
    from solution.bundles.bundle import Bundle
    from solution.models.member import Member
    from solution.studies.probes import Pool


# ------------------------------------------------------------------------------------------------ the study
def pools_of(data: Path, splits: Sequence[str], limit: int, seed: int) -> list[Pool]:
    """By split at most `limit` pictures in a drawn order, and its real ones beside self-blended fakes of them."""
    from solution.studies.probes import Pool

    pools = []
    for split in splits:
        items, lost = read_manifest(data, split=split)
        if lost.dropped:
            tell(lost.summary())
        items = limit_items(items, limit, seed)
        order = np.random.default_rng(seed).permutation(len(items))
        drawn = tuple(items[i] for i in order)
        pools.append(Pool(split, drawn))
        real = tuple(item for item in drawn if item.label == 0)
        if len(real) > 1:
            pools.append(Pool(f"{split}, self-blended", real, blended=True))
    return pools


def study(bundle: Bundle, members: Mapping[str, Member], pools: Sequence[Pool], args: Any) -> dict[str, Any]:
    """Everything that `mechanisms.json` holds but the protocol and the claims: by pool."""
    from tqdm import tqdm

    from solution.studies.mechanism_tables import Draws, correlations, interventions, measurements
    from solution.studies.probes import Eyes, measure_pool

    eyes = Eyes(bundle.configs)
    draws = Draws(args.seed, args.draws)
    conditions = {
        "clean": CLEAN,
        "degraded": degraded_conditions([args.seed])[0],
    }
    total = sum(len(p.items) * (1 + p.blended) for p in pools) * len(conditions)
    found = {}
    with tqdm(total=total, unit="picture", disable=args.quiet) as bar:
        for pool in pools:
            bar.set_description(pool.name)
            options = {"seed": args.seed, "batch": args.batch_size, "done": bar.update}
            measured = {name: measure_pool(members, eyes, pool, how, **options) for name, how in conditions.items()}
            labels = measured["clean"].labels
            found[pool.name] = {
                "pictures": f"{np.sum(labels == 0)} real, {np.sum(labels == 1)} fake",
                "interventions": interventions(measured, bundle, draws),
                "measurements": measurements(measured, members, draws),
                "rank_correlations": correlations(measured),
            }
    return found


def _protocol(args: argparse.Namespace, bundle: Bundle, device: Any) -> dict[str, str]:
    from solution.studies.mechanism_tables import LEAST_CHANGE

    engine = degraded_conditions([args.seed])[0]
    return {
        "weights": f"{bundle.name} {bundle.hash[:12]}, float32, {device}",
        "data": f"{args.data.name}, split {args.split}, at most {args.limit or 'all'} pictures each, seed {args.seed}",
        "degraded": f"{engine.text}, drawn from ({args.seed}, picture name)",
        "self-blended": "the split's real pictures and a fake of each (SBI), faces located in the clean real one",
        "another picture": f"drawn from the same batch of {args.batch_size}, in a drawn order",
        "P": "calibrated P(fake), for other mixtures (alpha) with the built one's values in their order; AUC ranks by "
        "logit; sd of P: without the mechanism, before calibration",
        "inside a fake": "AUC of forged against untouched patches; the real twin's map is asked at the same place",
        "intervals": f"95 %, {args.draws} paired bootstrap draws over pictures",
        "words": f"acts and helps: without it the AUC falls, interval below 0, clean or degraded; acts: P changes by "
        f"{LEAST_CHANGE:g} or more on average; dead: neither",
    }


def write(results: Mapping[str, Any], out: Path) -> str:
    """`mechanisms.json`, `mechanisms.md` and a figure a pool (the first is `mechanisms.png`); the Markdown's text."""
    from solution.studies.mechanism_tables import draw, markdown

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "mechanisms.json", json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    write_atomically(out / "mechanisms.md", text)
    for number, (name, pool) in enumerate(results["pools"].items()):
        if pool["interventions"]:
            ending = "-" + name.replace(", ", "-").replace("/", "-") if number else ""
            title = f"{name}: {pool['pictures']}"
            draw(pool["interventions"], title, out / f"mechanisms{ending}.png")
    return text


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; 4 when something claimed is dead, else 0."""
    from solution.bundles.bundle import load_members
    from solution.bundles.store import open_bundle
    from solution.data.degradation import use_one_opencv_thread
    from solution.models.devices import pick_device, set_threads
    from solution.studies.mechanism_tables import FAILED, judge_claims, read_claims

    use_one_opencv_thread()
    set_threads()
    bundle = open_bundle(args.weights)
    claims = read_claims(bundle)
    splits = [split.strip() for split in args.split.split(",")]
    pools = pools_of(args.data, splits, args.limit, args.seed)
    device = pick_device(args.device)
    members = load_members(bundle, device=device)
    found = study(bundle, members, pools, args)
    rows = [row for pool in found.values() for row in (*pool["interventions"], *pool["measurements"])]
    words = judge_claims(claims, rows)
    results = {
        "protocol": _protocol(args, bundle, device),
        "bundle": bundle.hash,
        "claimed": claims,
        "claims": words,
        "pools": found,
    }
    print(write(results, args.out))
    failed = [f"{claim} ({word})" for claim, word in words.items() if word in FAILED]
    for claim in failed:
        tell(f"mechanisms: claimed, but not alive: {claim}")
    return FAILURES if failed else 0


# ------------------------------------------------------------------------------------------------ entry
def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m solution.studies.mechanisms",
        description="Take every mechanism of a trained bundle away, and say what that changes.",
    )
    add = parser.add_argument
    add("--weights", required=True, help="a bundle")
    add("--data", type=Path, required=True, help="manifest: CSV, JSON, or a folder")
    add("--out", type=Path, required=True, help="folder for table, JSON and figures")
    add("--split", default="val", help="comma-separated, results apart (default val)")
    add("--limit", type=whole(), default=200, help="pictures of each split; 0: all")
    add("--seed", type=int, default=7, help="of the degradation and every draw")
    add("--device", default="auto")
    add("--batch-size", type=whole(2), default=16)
    add("--draws", type=whole(10), default=1000, help="of the bootstrap")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


@door("mechanisms", interrupted="interrupted; nothing was written")
def main(argv: list[str] | None = None) -> int:
    """0 done, 2 usage, 3 environment, weights or an unreadable picture, 4 a claim is dead, 130 interrupted."""
    return run(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
