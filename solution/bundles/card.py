"""What people are told of a bundle: its table for a terminal, and the model card of its repository.

Takes a `Bundle` and, for the card, the content of an evaluation.json; returns text. Without one the card has the figures
that were cross-validated when the bundle was assembled.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from solution.bundles.bundle import GOLDEN, Bundle
from solution.config import MemberConfig
from solution.errors import WeightsError


# ------------------------------------------------------------------------------------------------ for a terminal
def _seen(config: MemberConfig) -> str:
    """What a member sees: `image`, `face`, or `small face` where only those are cut out."""
    small = config.view.source == "face" and config.face.max_area < 1
    return "small face" if small else config.view.source


def _looks(config: MemberConfig) -> str:
    """The side of a member's view, or of all its looks: `224 px`, `384+656 px x4` (four forwards)."""
    sides = "+".join(str(side) for side in config.inference.sides or (config.view.side,))
    looks = config.inference.looks
    return f"{sides} px" + (f" x{looks}" if looks > 1 else "")


def licences(bundle: Bundle) -> dict[str, str]:
    """Tower -> the licence of its weights, which binds whoever uses the bundle; a tower of ours: the bundle's own, and
    that of what it was trained from where the configuration says it."""
    ours = bundle.about.licence or "not stated"
    return {
        name: "none: random weights"
        if tower.seed is not None
        else tower.licence or (ours if tower.travels else "not stated")
        for name, tower in bundle.towers.items()
    }


def member_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """Per member what `show` and the card tell: tower, adapter, trained parameters, bytes, calibration, votes, SHA-256."""
    rows = []
    for name, config in bundle.configs.items():
        paths = [f"{name}/model.safetensors"]
        if config.stores_tower:
            paths.append(f"towers/{config.tower.stored_name}.safetensors")
        towers = [tower for tower in (config.tower, config.clip) if tower]
        rows.append(
            {
                "member": name,
                "view": f"{_seen(config)} {_looks(config)}",
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
    terms = licences(bundle)
    lines = [f"{bundle.name}  {bundle.folder}  sha256 {bundle.hash}", head]
    for row in member_rows(bundle):
        lines.append(
            f"{row['member']:9} {row['view']:17} {row['tower']:44} {row['adapter']:8} {row['trained']:12,} "
            f"{row['bytes'] / 1e6:7.1f} {row['calibration']:12} {row['votes']:5}  {row['sha256'][:12]}"
        )
    for tower in bundle.towers.values():
        path = f"towers/{tower.stored_name}.safetensors"
        place = path if tower.travels else f"{tower.source}@{tower.revision}"
        digest = bundle.files[path] if tower.travels else tower.sha256
        lines.append(
            f"tower {tower.name}: {place.rstrip('@')} ({tower.statistics} statistics) sha256 {digest[:12] or '-'}; "
            f"licence {terms[tower.name]}"
        )
    vote = bundle.vote
    lines.append(
        f"vote: {vote.mean}, step {vote.step}, threshold {vote.threshold}, unsure within {vote.unsure} of it; "
        f"licence {bundle.about.licence or '-'}; self-test {'yes' if GOLDEN in bundle.files else 'no'}"
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ for the Hub
def model_card(bundle: Bundle, repository: str, evaluation: dict[str, Any] | None = None) -> str:
    """The README.md of a bundle's repository: its metadata with a model-index, and what a reader needs to know.

    evaluation: the content of `evaluation.json` of `python -m solution.evaluate`; None takes the bundle's own report.
    """
    from huggingface_hub import EvalResult, ModelCardData

    rows = _reported_rows(bundle.report) if evaluation is None else _ensemble_rows(evaluation)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="image-folder",
            dataset_config=f"{row['pictures']}, {row['condition']}",  # without one of its own, the Hub takes all for one
            dataset_name=f"{row['pictures']}, {row['condition']}",
            metric_type="roc_auc",
            metric_name="ROC AUC",
            metric_value=round(row["auc"], 4),
        )
        for row in rows
    ]
    public = [tower.source for tower in bundle.towers.values() if tower.public]
    data = ModelCardData(
        license=bundle.about.licence or "other",
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["deepfake-detection", "ensemble", "ntire-2026"],
        base_model=list(dict.fromkeys([*bundle.about.base_model, *public])) or None,
        datasets=list(bundle.about.datasets) or None,
        metrics=["roc_auc"],
        model_name=bundle.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_card_text(bundle, repository, rows)}"


def _ensemble_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The vote's rows of an evaluation.json: `pictures`, `condition`, `auc`, `interval` (low, high) or None, `protocol`."""
    try:
        return [
            {
                "pictures": f"{row['scope']}, per {row['unit']}",
                "condition": row["condition"],
                "auc": row["auc"],
                "interval": None,
                "protocol": row["protocol"],
            }
            for row in evaluation["rows"]
            if row["who"] == "ensemble"
        ]
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"the evaluation has no {error}; expected evaluation.json of python -m solution.evaluate"
        ) from None


def _reported_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The vote's rows of a bundle's report (`evaluation.fit.fit_ensemble`), as `_ensemble_rows` has them: of seen and
    unseen generators, then of each. None where the report has no vote."""
    protocol = f"{report.get('protocol', '')}; {report.get('fitted_on', '')}"
    rows = [
        {
            "pictures": "unseen generators" if cell.startswith("unseen_") else "seen generators",
            "condition": cell.removeprefix("unseen_"),
            "auc": told["value"],
            "interval": (told["low"], told["high"]),
            "protocol": protocol,
        }
        for cell, told in report.get("ways", {}).get(report.get("chosen"), {}).items()
    ]
    return rows + [
        {
            "pictures": f"{row['generator']}{' (unseen)' if row['unseen'] else ''} against {row['reals']} reals",
            "condition": row["condition"],
            "auc": row["auc"]["vote"],
            "interval": None,
            "protocol": protocol,
        }
        for row in report.get("generators", [])
    ]


def _called_rows(report: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the report says that held-out real and fake pictures were called, per cell; none where it does not say."""
    return [
        (f"{kind}, {cell.replace('_', ' ')}", words)
        for cell, told in report.get("at_threshold", {}).items()
        if isinstance(told, dict)
        for kind, words in told.get("called", {}).items()
    ]


def _card_text(bundle: Bundle, repository: str, rows: list[dict[str, Any]]) -> str:
    """The card below its metadata, Markdown."""
    members = "\n".join(
        f"| {r['member']} | {r['view']} | {r['tower']} | {r['adapter']} | {r['trained']:,} | {r['bytes'] / 1e6:.1f} | "
        f"{r['calibration']} | {r['votes']} |"
        for r in member_rows(bundle)
    )
    base = ", ".join(bundle.about.base_model)
    terms = "\n".join(
        f"- `{name}`: {licence}" + (f"; trained from {base}, whose licence binds too" if base and ours else "")
        for (name, licence), ours in zip(
            licences(bundle).items(), (t.travels for t in bundle.towers.values()), strict=True
        )
    )
    engine = next(iter(bundle.configs.values())).degradation
    often = sorted({config.degradation.global_p for config in bundle.configs.values()})
    low, high = bundle.vote.threshold - bundle.vote.unsure, bundle.vote.threshold + bundle.vote.unsure
    figures = "Not measured."
    if rows:
        figures = "AUC of the vote, with its 95 % interval where it was drawn.\n\n| pictures | condition | AUC |\n|---|---|---|\n"
        figures += "\n".join(
            f"| {r['pictures']} | {r['condition']} | {r['auc']:.3f}"
            + (f" ({r['interval'][0]:.3f}-{r['interval'][1]:.3f}) |" if r["interval"] else " |")
            for r in rows
        )
        figures += "\n\nProtocol: " + "; ".join(dict.fromkeys(r["protocol"] for r in rows)) + "."
    if called := _called_rows(bundle.report):
        figures += "\n\n| pictures | called fake | called unsure |\n|---|---|---|\n"
        figures += "\n".join(f"| {what} | {words['fake']:.1%} | {words['unsure']:.1%} |" for what, words in called)
    return f"""# {bundle.name}

Tells real pictures of faces from deepfakes, also after heavy and compound degradation: {len(bundle.configs)} members whose
calibrated probabilities vote (`{bundle.vote.mean}`, grid {bundle.vote.step}): fake from {high:.3g}, real below {low:.3g},
between them unsure.

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
Training pictures enter the compound engine with probability {" or ".join(f"{p:g}" for p in often)}; each of its {len(engine.ops)} operations
then fires with probability {engine.op_p:g} at a strength drawn from Beta({engine.beta:g}, {engine.beta:g}), after up to
{engine.cycles[1]} cycles of JPEG and resizing (probability {engine.cycle_p:g}). Figures marked `degraded` use the same engine
with fixed seeds.

## Figures
{figures}

## Data and licence
{bundle.about.data or "Not stated."}

Licences of the towers' weights, which bind whoever uses these members:
{terms}
"""
