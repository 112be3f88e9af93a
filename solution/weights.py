"""Entry: where bundles come from and go to, and the self-test that shows they compute what they should.

`--weights` everywhere takes a local folder (no network is touched), `hf:owner/name[@revision][:subfolder]`, or a preset:
`compact` (shipped in weights/compact) and `ntire26` (the published fourth-place entry, imported on first use).

    python -m solution.weights import-ntire26 --out BUNDLE     the published checkpoints as a bundle
    python -m solution.weights pull hf:owner/name              everything a bundle needs, its public towers included
    python -m solution.weights push BUNDLE owner/name          with a model card made from the bundle
    python -m solution.weights verify|show|golden BUNDLE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from solution.bundles import hub
from solution.bundles import ntire26 as published
from solution.bundles.bundle import (
    GOLDEN,
    MANIFEST,
    Bundle,
    load_members,
    read_bundle,
    read_manifest,
    resolve_tower,
    stored_name,
    tower_weights,
    write_bundle,
)
from solution.bundles.hub import HubRef
from solution.bundles.members import FORMAT
from solution.config import PRESETS, ConfigError, MemberConfig
from solution.io import write_atomically
from solution.models.member import Member
from solution.models.towers import WeightsError

__all__ = [  # other rooms take all of these from here
    "Bundle",
    "WeightsError",
    "load_members",
    "open_bundle",
    "read_bundle",
    "tower_weights",
    "write_bundle",
]
COMPACT = Path(__file__).resolve().parents[1] / "weights" / "compact"
Report = Callable[[str], None]


def _silent(line: str) -> None:
    """The default `report`: libraries say nothing."""


# ------------------------------------------------------------------------------------------------ from somewhere
def open_bundle(weights: str, *, verify: bool = True, report: Report = _silent) -> Bundle:
    """The bundle that `--weights` names: a preset, `hf:owner/name[@revision][:subfolder]`, or a local folder.

    A preset's name means the preset; a folder of that name is `./compact`. A local folder uses no network, for its public
    towers neither: `pull FOLDER` brings those into the Hub's cache once. `ntire26` is imported on first use (about 15 GB
    of downloads) and kept beside the Hub's cache.

    Raises:
        WeightsError: nothing there, damaged, or out of reach, with what to do.
    """
    if weights == "compact":
        return read_bundle(COMPACT, verify=verify)
    if weights == "ntire26":
        return _published(verify=verify, report=report)
    if weights.startswith("hf:"):
        return download(hub.parse_ref(weights), verify=verify)
    folder = Path(weights)
    if folder.is_dir():
        return read_bundle(folder, verify=verify)
    hint = (
        f"no weights are published for the preset {weights}: train it (train.sh)"
        if weights in PRESETS
        else "expected a bundle's folder, hf:owner/name[@revision][:subfolder], compact or ntire26"
    )
    raise WeightsError(f"--weights {weights}: no such folder; {hint}")


def download(ref: HubRef, *, force: bool = False, verify: bool = True) -> Bundle:
    """The bundle at a place on the Hub, all of its files from one commit and checked against ensemble.json.

    Raises:
        WeightsError: see `hub.fetch` and `bundle.read_bundle`.
    """
    path = hub.fetch(ref, MANIFEST, force=force)
    pinned = hub.pin(ref, path)
    for name in read_manifest(path)["files"]:
        hub.fetch(pinned, name, force=force)
    return read_bundle(path.parent, verify=verify, offline=False)


def fetch_towers(bundle: Bundle, *, report: Report = _silent) -> list[Path]:
    """Bring the bundle's public towers into the Hub's cache; their files, each with its pinned SHA-256."""
    paths = []
    for tower in bundle.towers.values():
        if tower.public:
            path = resolve_tower(tower)
            if tower.sha256:
                hub.check_sha256(path, tower.sha256)
            report(f"tower {tower.name}: {path}")
            paths.append(path)
    return paths


def published_home() -> Path:
    """Where the imported `ntire26` bundle is kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "bundles" / f"ntire26-{FORMAT}"


def _published(*, verify: bool, report: Report) -> Bundle:
    home = published_home()
    if not (home / MANIFEST).is_file():
        report(f"importing the published entry into {home}, once")
        partial = home.with_name(f"{home.name}.partial-{os.getpid()}")
        try:
            add_golden(published.import_ntire26(partial, report=report))
            partial.replace(home)
        except OSError:
            if not (home / MANIFEST).is_file():  # else another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return read_bundle(home, verify=verify, offline=False)


# ------------------------------------------------------------------------------------------------ self-test
# How far a logit may lie from the golden one, as a share of max(1, |logit|). float32 on a GPU: its convolutions may run
# in TF32, 10 bits of mantissa.
TOLERANCE = {
    ("cpu", torch.float32): 1e-3,
    ("cuda", torch.float32): 2e-2,
    ("cuda", torch.float16): 5e-2,
    ("cuda", torch.bfloat16): 0.3,
    ("cpu", torch.bfloat16): 0.3,
}
GOLDEN_PICTURES = 3


def golden_pictures(side: int, count: int = GOLDEN_PICTURES) -> torch.Tensor:
    """Seeded pictures (count, 3, side, side) uint8: coarse patches under fine noise.

    Made with SHAKE-256 and integers alone, so that every machine and library makes the same bytes.
    """
    cells, kinds = 8, count * 3
    raw = hashlib.shake_256(b"golden %d" % side).digest(kinds * (cells * cells + side * side))
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).int()
    coarse, fine = values.split([kinds * cells * cells, kinds * side * side])
    index = torch.arange(side) * cells // side  # (side,) -> cell
    coarse = coarse.view(kinds, cells, cells)[:, index][:, :, index]
    pictures = (coarse * 3 + fine.view(kinds, side, side)) // 4
    return pictures.to(torch.uint8).view(count, 3, side, side)


@torch.inference_mode()
def golden_logits(members: Mapping[str, Member]) -> dict[str, list[float]]:
    """Every member's logits on the golden pictures of its view."""
    logits = {}
    for name, member in members.items():
        device = next(member.parameters()).device
        pictures = golden_pictures(member.config.view.side).to(device).split(1)
        # one by one: the activations of all would come on top of a giant member's towers
        logits[name] = [member(picture).logit.double().item() for picture in pictures]
    return logits


def make_golden(members: Mapping[str, Member]) -> dict[str, Any]:
    """The content of golden.json: the pictures' SHA-256 by side, and every member's logits on them."""
    sides = sorted({member.config.view.side for member in members.values()})
    return {
        "format": FORMAT,
        "pictures": {str(side): _picture_hash(side) for side in sides},
        "logits": golden_logits(members),
        "made_with": f"torch {torch.__version__}, CPU, float32",
    }


def _picture_hash(side: int) -> str:
    return hashlib.sha256(golden_pictures(side).numpy().tobytes()).hexdigest()


def add_golden(bundle: Bundle) -> Bundle:
    """Compute golden.json of a bundle on CPU in float32, put it into the bundle, and open that again.

    Raises:
        WeightsError: the bundle lies in the Hub's cache, which is not ours to change.
    """
    if (bundle.folder / MANIFEST).is_symlink():
        raise WeightsError(
            f"{bundle.folder}: the Hub's cache is not changed; python -m solution.weights pull --out DIR makes a copy"
        )
    golden = make_golden(load_members(bundle))
    path = bundle.folder / GOLDEN
    write_atomically(path, json.dumps(golden, indent=1) + "\n")
    record = read_manifest(bundle.folder / MANIFEST)
    record["files"][GOLDEN] = hub.sha256(path)
    write_atomically(bundle.folder / MANIFEST, json.dumps(record, indent=1) + "\n")
    return read_bundle(bundle.folder, verify=False, offline=bundle.offline)


@dataclass(frozen=True)
class SelfTest:
    """Per member: the largest departure of a logit from the golden one (a share of max(1, |logit|)); what is allowed."""

    worst: dict[str, float]
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        return all(value <= self.tolerance for value in self.worst.values())

    def __str__(self) -> str:
        lines = [
            f"{name:10} {value:9.2e} {'ok' if value <= self.tolerance else 'DIFFERS'}"
            for name, value in self.worst.items()
        ]
        return "\n".join([f"self-test on {self.where}, tolerance {self.tolerance:g}", *lines])


def run_selftest(
    bundle: Bundle,
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    towers_from: Mapping[str, str] | None = None,
) -> SelfTest:
    """Recompute the bundle's golden logits on `device` and compare.

    Raises:
        WeightsError: no golden file, pictures that come out differently, members that it does not know, or a device and
            dtype without a tolerance.
    """
    path = bundle.folder / GOLDEN
    if GOLDEN not in bundle.files:
        raise WeightsError(
            f"{path}: the bundle has none; make it where the bundle is known to be right: "
            f"python -m solution.weights golden {bundle.folder}"
        )
    golden = json.loads(path.read_text())
    key = (torch.device(device).type, dtype)
    if key not in TOLERANCE:
        raise WeightsError(f"the self-test has no tolerance for {dtype} on {device}")
    for side, expected in golden["pictures"].items():
        if _picture_hash(int(side)) != expected:
            raise WeightsError(f"{path}: the golden pictures of side {side} come out differently here")
    if set(golden["logits"]) != set(bundle.configs):
        raise WeightsError(
            f"{path}: of {sorted(golden['logits'])}, expected {sorted(bundle.configs)}; make it again: "
            f"python -m solution.weights golden {bundle.folder}"
        )
    members = load_members(bundle, device=device, dtype=dtype, towers_from=towers_from)
    worst = {}
    for name, found in golden_logits(members).items():
        pairs = zip(found, golden["logits"][name], strict=True)
        shares = [abs(x - y) / max(1.0, abs(y)) for x, y in pairs]
        # NaN compares false with everything: here it must fail
        worst[name] = math.inf if any(map(math.isnan, shares)) else max(shares)
    return SelfTest(worst, TOLERANCE[key], f"{device}, {str(dtype).split('.')[-1]}")


# ------------------------------------------------------------------------------------------------ told to people
def _seen(config: MemberConfig) -> str:
    """What a member sees: `image`, `face`, or `small face` where only those are cut out."""
    small = config.view.source == "face" and config.face.max_area < 1
    return "small face" if small else config.view.source


def member_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """Per member what `show` and the card tell: tower, adapter, trained parameters, bytes, calibration, votes, SHA-256."""
    rows = []
    for name, config in bundle.configs.items():
        paths = [f"{name}/model.safetensors"]
        if config.adapter.in_place:
            paths.append(f"towers/{stored_name(config.tower)}.safetensors")
        towers = [tower for tower in (config.tower, config.clip) if tower]
        rows.append(
            {
                "member": name,
                "view": f"{_seen(config)} {config.view.side} px",
                "tower": " + ".join(tower.name for tower in towers),
                "adapter": config.adapter.kind,
                "trained": sum(_count(bundle.folder / path) for path in paths),
                "bytes": sum((bundle.folder / path).stat().st_size for path in paths),
                "calibration": bundle.calibrators[name].kind,
                "votes": bundle.vote.weights.get(name, 0),
                "sha256": bundle.files[paths[0]],
            }
        )
    return rows


def _count(path: Path) -> int:
    """Numbers stored in a .safetensors file, from its header."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def show(bundle: Bundle) -> str:
    """The bundle as a table for a terminal."""
    head = f"{'member':9} {'view':17} {'tower':44} {'adapter':8} {'stored':>12} {'MB':>7} {'calibration':12} {'votes':>5}  sha256"
    lines = [f"{bundle.name}  {bundle.folder}  sha256 {bundle.hash}", head]
    for row in member_rows(bundle):
        lines.append(
            f"{row['member']:9} {row['view']:17} {row['tower']:44} {row['adapter']:8} {row['trained']:12,} "
            f"{row['bytes'] / 1e6:7.1f} {row['calibration']:12} {row['votes']:5}  {row['sha256'][:12]}"
        )
    for tower in bundle.towers.values():
        path = f"towers/{stored_name(tower)}.safetensors"
        place = f"{tower.source}@{tower.revision}" if tower.public else path
        digest = tower.sha256 if tower.public else bundle.files[path]
        lines.append(
            f"tower {tower.name}: {place.rstrip('@')} ({tower.statistics} statistics) sha256 {digest[:12] or '-'}"
        )
    vote = bundle.vote
    lines.append(
        f"vote: {vote.mean}, step {vote.step}, fake at {vote.threshold} or above; "
        f"licence {bundle.licence or '-'}; self-test {'yes' if GOLDEN in bundle.files else 'no'}"
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ to the Hub
def model_card(bundle: Bundle, repository: str, evaluation: dict[str, Any] | None = None) -> str:
    """The README.md of a bundle's repository: its metadata with a model-index, and what a reader needs to know.

    evaluation: the content of `evaluation.json` of `python -m solution.evaluate`; None leaves the figures out.
    """
    from huggingface_hub import EvalResult, ModelCardData

    rows = _ensemble_rows(evaluation)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="image-folder",
            dataset_name=f"{row['scope']}, {row['condition']}, per {row['unit']}",
            metric_type="roc_auc",
            metric_name="ROC AUC",
            metric_value=round(row["auc"], 4),
        )
        for row in rows
    ]
    public = [tower.source for tower in bundle.towers.values() if tower.public]
    data = ModelCardData(
        license=bundle.licence or "other",
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["deepfake-detection", "ensemble", "ntire-2026"],
        base_model=list(dict.fromkeys([*bundle.base_model, *public])) or None,
        datasets=list(bundle.datasets) or None,
        metrics=["roc_auc"],
        model_name=bundle.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_card_text(bundle, repository, rows)}"


def _ensemble_rows(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The vote's rows of an evaluation.json."""
    if evaluation is None:
        return []
    try:
        rows = [row for row in evaluation["rows"] if row["who"] == "ensemble"]
        for row in rows:
            row["auc"], row["condition"], row["scope"], row["unit"], row["protocol"]
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"the evaluation has no {error}; expected evaluation.json of python -m solution.evaluate"
        ) from None
    return rows


def _card_text(bundle: Bundle, repository: str, rows: list[dict[str, Any]]) -> str:
    """The card below its metadata, Markdown."""
    members = "\n".join(
        f"| {r['member']} | {r['view']} | {r['tower']} | {r['adapter']} | {r['trained']:,} | {r['bytes'] / 1e6:.1f} | "
        f"{r['calibration']} | {r['votes']} |"
        for r in member_rows(bundle)
    )
    engine = next(iter(bundle.configs.values())).degradation
    figures = "Not measured with this upload."
    if rows:
        figures = "| pictures | condition | AUC | protocol |\n|---|---|---|---|\n"
        figures += "\n".join(
            f"| {r['scope']}, per {r['unit']} | {r['condition']} | {r['auc']:.4f} | {r['protocol']} |" for r in rows
        )
    return f"""# {bundle.name}

Tells real pictures of faces from deepfakes, also after heavy and compound degradation: {len(bundle.configs)} members whose
calibrated probabilities vote (`{bundle.vote.mean}`, grid {bundle.vote.step}; fake at {bundle.vote.threshold} or above).

| member | view | tower | adapter | stored numbers | MB | calibration | votes |
|---|---|---|---|---|---|---|---|
{members}

## Use
```
python submit.py --weights hf:{repository} --selftest
python submit.py --weights hf:{repository} --input DIR --out preds.csv
```
Every file is checked against the SHA-256 in `ensemble.json` (its own: `{bundle.hash}`). Weights are safetensors.

## Intended use and limits
Research on deepfake detection, and scoring of pictures that show one main face. A score is evidence, not proof: do not
accuse a person on it. Generators, cameras and populations unlike the training pictures are scored less well than the
figures below say, and probabilities are calibrated for the pictures they were fitted on. Pictures without a face are
scored, but mean little.

## Degradation protocol
Training pictures enter the compound engine with probability {engine.global_p:g}; each of its {len(engine.ops)} operations
then fires with probability {engine.op_p:g} at a strength drawn from Beta({engine.beta:g}, {engine.beta:g}), after up to
{engine.cycles[1]} cycles of JPEG and resizing (probability {engine.cycle_p:g}). Figures marked `degraded` use the same engine
with fixed seeds.

## Figures
{figures}

## Data and licence
{bundle.data or "Not stated."}
"""


def push(
    bundle: Bundle,
    repository: str,
    *,
    evaluation: dict[str, Any] | None = None,
    private: bool = False,
) -> str:
    """Upload a verified bundle with its card in one commit; the commit's address.

    Raises:
        WeightsError: a tower that nobody else could find, or the Hub's refusal.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    local = [t for t in bundle.towers.values() if t.public and Path(t.source).exists()]
    if local:
        raise WeightsError(
            f"tower {local[0].name} is read from {local[0].source}, which only this machine has: import again with "
            "--keep-tower or with the tower's Hub repository"
        )
    card = model_card(bundle, repository, evaluation)
    files = [CommitOperationAdd("README.md", card.encode())]
    files += [CommitOperationAdd(name, str(bundle.folder / name)) for name in (*bundle.files, MANIFEST)]
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=private)
        made = api.create_commit(repository, files, commit_message=f"{bundle.name} {bundle.hash[:12]}")
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{repository}: not uploaded ({reason}); log in with a token that may write (hf auth login) and try again"
        ) from error
    return made.commit_url


# ------------------------------------------------------------------------------------------------ entry
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m solution.weights", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("import-ntire26", help=published.__doc__.splitlines()[0])
    add.add_argument(
        "--from",
        dest="source",
        default=published.REPOSITORY,
        help="folder with the three published files, or hf:owner/name[@revision] (default: %(default)s)",
    )
    tower = "folder in the Hub's layout or Hub id of the public tower (default: the pinned one)"
    add.add_argument("--dino", help=f"DINOv2-giant: {tower}")
    add.add_argument("--clip", help=f"CLIP ViT-L/14: {tower}")
    add.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    add.add_argument(
        "--keep-tower",
        action="store_true",
        help="keep a tower that differs from the public one whole (4.5 GB) instead of refusing",
    )
    add.add_argument(
        "--no-golden",
        action="store_true",
        help="leave out the self-test's logits (their forward passes take a few minutes on CPU)",
    )
    add = commands.add_parser("pull", help="download a bundle and its public towers into the Hub's cache")
    add.add_argument("weights", help="hf:owner/name[@revision][:subfolder], or a folder")
    add.add_argument("--out", type=Path, help="also copy the bundle into this folder")
    add.add_argument("--force", action="store_true", help="even what the cache has")
    add = commands.add_parser("push", help="upload a bundle with a model card")
    add.add_argument("weights", help="the bundle")
    add.add_argument("repository", help="owner/name")
    add.add_argument("--evaluation", type=Path, help="evaluation.json, for the card")
    add.add_argument("--private", action="store_true")
    add.add_argument("--dry-run", action="store_true", help="print the card, upload nothing")
    helps = {
        "verify": "check every file and the cached public towers against their SHA-256",
        "show": "a table of members, towers and hashes",
        "golden": "compute the self-test's logits on CPU and put them into the bundle",
    }
    for name, text in helps.items():
        add = commands.add_parser(name, help=text)
        add.add_argument("weights", help="folder, hf:owner/name..., compact or ntire26")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; 0 done, 2 usage, 3 environment or weights, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    run = {
        "import-ntire26": _import,
        "pull": _pull,
        "push": _push,
        "verify": _verify,
        "show": lambda a: print(show(open_bundle(a.weights, verify=False))),
        "golden": lambda a: print(add_golden(open_bundle(a.weights)).folder / GOLDEN),
    }[arguments.command]
    try:
        run(arguments)
    except (WeightsError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; what arrived whole is kept", file=sys.stderr)
        return 130
    return 0


def _import(arguments: argparse.Namespace) -> None:
    bundle = published.import_ntire26(
        arguments.out,
        source=arguments.source,
        dino=arguments.dino,
        clip=arguments.clip,
        keep_tower=arguments.keep_tower,
        report=_tell,
    )
    if not arguments.no_golden:
        _tell("computing the self-test's logits")
        bundle = add_golden(bundle)
    print(show(bundle))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _pull(arguments: argparse.Namespace) -> None:
    if arguments.weights.startswith("hf:"):
        ref = hub.parse_ref(arguments.weights)
        bundle = download(ref, force=arguments.force)
    else:
        bundle = open_bundle(arguments.weights, report=_tell)
    fetch_towers(bundle, report=_tell)
    if arguments.out:
        for name in (*bundle.files, MANIFEST):
            target = arguments.out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / name, target)
        bundle = read_bundle(arguments.out)
    print(show(bundle))


def _push(arguments: argparse.Namespace) -> None:
    bundle = open_bundle(arguments.weights)
    evaluation = None
    if arguments.evaluation:
        try:
            evaluation = json.loads(arguments.evaluation.read_text())
        except (OSError, ValueError) as error:
            raise WeightsError(f"{arguments.evaluation}: unreadable ({error})") from None
    if arguments.dry_run:
        print(model_card(bundle, arguments.repository, evaluation))
        return
    options = {"evaluation": evaluation, "private": arguments.private}
    print(push(bundle, arguments.repository, **options))


def _verify(arguments: argparse.Namespace) -> None:
    bundle = open_bundle(arguments.weights)
    print(f"{bundle.folder}: {len(bundle.files)} files match {MANIFEST} {bundle.hash}")
    for tower in bundle.towers.values():
        if not tower.public:
            continue
        path = resolve_tower(tower, offline=bundle.offline)
        if tower.sha256:
            hub.check_sha256(path, tower.sha256)
        print(f"tower {tower.name}: {path} {'matches' if tower.sha256 else 'is there'}")


if __name__ == "__main__":
    sys.exit(main())
