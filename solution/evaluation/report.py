"""Reports: evaluation results (plain JSON values) to one self-contained HTML page and PNG figures.

`write_report` draws what `measure` found; `write_submission_report` draws what can be said of scores without labels.
Figures are those of `figures`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solution.data.images import VIDEO_SUFFIXES
from solution.evaluation.figures import (
    LARGE,
    SMALL,
    Figures,
    Panel,
    draw_histogram,
    draw_matrix,
    draw_reliability,
    draw_roc,
    draw_severity,
    legend,
)
from solution.evaluation.measure import ENSEMBLE, histogram, rank_correlation
from solution.io import write_atomically

TEMPLATE = "report_template.html"  # beside this file
THUMBNAIL = 160  # px
SHOWN = 16  # pictures in each gallery of a submission
SHOWN_FAILURES = 100  # rows; the JSON has them all

FLIPS = "Share of pictures whose verdict differs from that on the clean picture."
CHANGE = "Mean absolute difference between the score and that of the clean picture."


# ------------------------------------------------------------------------------------------------ evaluation
def write_report(results: Mapping[str, Any], out: Path, *, thumbnails: bool = True) -> Path:
    """`report.html` and `figures/*.png` under `out` from the results of `measure.measure`; returns the page's path.

    thumbnails: show the worst errors as pictures; without, the page can be passed on where the pictures cannot.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = Figures(out / "figures")
    sections = [
        _numbers_section(results),
        _curves_section(results, figures),
        _calibration_section(results, figures),
        _robustness_section(results, figures),
        _sources_section(results),
        _agreement_section(results, figures),
        _errors_section(results, thumbnails),
        _protocol_section(results),
    ]
    page = {
        "title": results["protocol"].get("title", "Evaluation"),
        "lead": " ".join(_verdicts(results)),
        "tiles": _tiles(results),
        "sections": [s for s in sections if s is not None],
    }
    return _write_page(page, out / "report.html")


def _lead_scorer(results: Mapping[str, Any]) -> str:
    scorers = [row["who"] for row in results["rows"] + results["single_class"]]
    return ENSEMBLE if ENSEMBLE in scorers else scorers[0]


def _tiles(results: Mapping[str, Any]) -> list[dict[str, str]]:
    who = _lead_scorer(results)
    tiles = []
    for row in results["rows"]:
        if (row["who"], row["scope"]) == (who, "all"):
            unit = "" if row["unit"] == "picture" else " per video"
            note = f"95 % {row['auc_low']:.3f} to {row['auc_high']:.3f}. {row['protocol']}"
            label = f"AUC {row['condition']}{unit}, {who}"
            tiles.append({"label": label, "value": f"{row['auc']:.3f}", "note": note})
    return tiles


def _verdicts(results: Mapping[str, Any]) -> list[str]:
    """One sentence a condition: does the ensemble beat its best member?"""
    sentences = []
    tests = [c for c in results["comparisons"] if c["method"] == "bootstrap"]
    for condition in dict.fromkeys(c["condition"] for c in tests):
        best = max((c for c in tests if c["condition"] == condition), key=lambda c: c["auc_b"])
        interval = f"{best['difference']:+.3f} AUC, {best['low']:+.3f} to {best['high']:+.3f}, paired bootstrap"
        if best["low"] > 0:
            found = "is better than"
        elif best["high"] < 0:
            found = "is worse than"
        else:
            found = "cannot be told apart from"
        sentences.append(f"{condition.capitalize()}: the ensemble {found} its best member, {best['b']} ({interval}).")
    return sentences


def _numbers_section(results: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = [row for row in results["rows"] if row["scope"] == "all"]
    blocks = []
    for key in dict.fromkeys((row["condition"], row["unit"]) for row in rows):
        of_block = [row for row in rows if (row["condition"], row["unit"]) == key]
        of_block.sort(key=lambda row: row["who"] != ENSEMBLE)
        head = "scorer,AUC,AP,EER,accuracy,TPR at FPR 1 %,TPR at FPR 5 %,ECE,log-loss,Brier"
        table = {
            "style": "stack",
            "head": head.split(","),
            "rows": [_numbers_row(row) for row in of_block],
            "caption": of_block[0]["protocol"],
        }
        blocks.append({"title": f"{key[0].capitalize()}, per {key[1]}", "table": table})
    comparisons = _comparison_table(results)
    if comparisons:
        blocks.append({"title": "Ensemble against each member", "table": comparisons})
    if not blocks:
        return None
    text = (
        "AUC with its 95 % interval. Accuracy at the scorer's threshold, under it the share of real and of fake "
        "pictures judged rightly at it. ECE over 15 bins of P(fake); log-loss in nats."
    )
    return {"title": "Numbers", "text": text, "blocks": blocks}


def _numbers_row(row: Mapping[str, Any]) -> dict[str, Any]:
    interval = f"{row['auc_low']:.3f} to {row['auc_high']:.3f}"
    sides = f"real {row['accuracy_real']:.3f}, fake {row['accuracy_fake']:.3f} at {row['threshold']:.3g}"
    plain = "tpr_at_fpr_1", "tpr_at_fpr_5", "ece", "log_loss", "brier"
    cells = [
        {"text": row["who"]},
        {"text": f"{row['auc']:.3f}", "sub": interval},
        {"text": f"{row['average_precision']:.3f}"},
        {"text": f"{row['eer']:.3f}"},
        {"text": f"{row['accuracy']:.3f}", "sub": sides},
        *({"text": f"{row[name]:.3f}"} for name in plain),
    ]
    return {"cells": cells, "strong": row["who"] == ENSEMBLE}


def _comparison_table(results: Mapping[str, Any]) -> dict[str, Any] | None:
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for test in results["comparisons"]:
        pairs.setdefault((test["condition"], test["b"]), {})[test["method"]] = test
    if not pairs:
        return None
    rows = []
    for (condition, member), tests in pairs.items():
        cells = [{"text": member}, {"text": condition}]
        for method in ("bootstrap", "delong"):
            test = tests[method]
            interval = f"{test['low']:+.3f} to {test['high']:+.3f}"
            cells.append({"text": f"{test['difference']:+.3f}", "sub": interval})
            cells.append({"text": _p_value(test["p"])})
        cells.append({"text": f"{tests['delong']['n']}"})
        rows.append({"cells": cells})
    head = "member,condition,AUC difference (bootstrap),p,AUC difference (DeLong),p,pictures"
    caption = "AUC of the ensemble minus AUC of the member on the same pictures, with its 95 % interval."
    return {"style": "stack", "head": head.split(","), "rows": rows, "caption": caption}


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _curves_section(results: Mapping[str, Any], figures: Figures) -> dict[str, Any] | None:
    rocs, histograms = [], []
    scorers: list[str] = []
    for condition, data in results["figures"].items():
        scorers = list(data["histograms"])
        if data["roc"]:
            rocs.append((f"ROC, {data['run']}", draw_roc(data["roc"])))
        for who in sorted(scorers, key=lambda w: w != ENSEMBLE):
            draw = draw_histogram(data["histograms"][who])
            histograms.append((f"{who}, {condition}", draw))
    blocks: list[dict[str, Any]] = []
    if rocs:
        blocks.append({"figures": figures.group("roc", rocs, LARGE)})
    note = "P(fake) of real (teal) and of fake (orange) pictures, as shares of each class."
    blocks.append(
        {
            "title": "Scores of real and fake pictures",
            "size": "small",
            "figures": figures.group("histograms", histograms, SMALL),
            "note": note,
        }
    )
    text = "Share of fakes found against share of reals called fake, over all thresholds."
    return {
        "title": "Separation",
        "text": text if rocs else "",
        "legend": legend(scorers),
        "blocks": blocks,
    }


def _calibration_section(results: Mapping[str, Any], figures: Figures) -> dict[str, Any] | None:
    panels = [
        (f"{who}, {condition}", draw_reliability(curves))
        for condition, data in results["figures"].items()
        for who, curves in sorted(data["reliability"].items(), key=lambda pair: pair[0] != ENSEMBLE)
    ]
    blocks: list[dict[str, Any]] = [{"size": "small", "figures": figures.group("reliability", panels, SMALL)}]
    rows = []
    for row in results["calibration"]:
        change = [
            {"text": f"{row[f'{name}_{when}']:.3f}"} for name in ("ece", "log_loss") for when in ("before", "after")
        ]
        floor = f"{row['ece_floor']:.3f} (to {row['ece_floor_high']:.3f})"
        change.insert(2, {"text": floor})
        cells = [{"text": row["who"]}, {"text": row["condition"]}, *change]
        rows.append({"cells": [*cells, {"text": str(row["n"])}]})
    if rows:
        head = "member,condition,ECE before,ECE after,ECE if perfect,log-loss before,log-loss after,pictures"
        blocks.append({"table": {"style": "stack", "head": head.split(","), "rows": rows}})
    text = (
        "Share of fakes among the pictures of each tenth of P(fake); on the diagonal a score means what it says. "
        "Dashed: before calibration, solid: after. ECE if perfect: what so few pictures show of a perfectly calibrated "
        "member with the same scores, on average (95 % of draws below). The vote is an average of levels, not fitted to be a probability."
    )
    return {"title": "Calibration", "text": text, "blocks": blocks}


def _robustness_section(results: Mapping[str, Any], figures: Figures) -> dict[str, Any] | None:
    rows = results["robustness"]
    families = [f for f in dict.fromkeys(row["family"] for row in rows) if f not in ("clean", "degraded", "given")]
    if not families:
        return None
    scorers = list(dict.fromkeys(row["who"] for row in rows))
    lowest = min(row["auc"] for row in rows)
    floor = max(0.0, np.floor(min(lowest, 0.5) * 20 - 0.01) / 20)
    aucs, flips, changes = [], [], []
    for family in families:
        of_family = [row for row in rows if row["family"] == family]
        aucs.append((_spoken(family), draw_severity(of_family, floor)))
        flips.append((_spoken(family), draw_severity(of_family, 0.0, "flips")))
        drawn = draw_severity(of_family, 0.0, "score_change")
        changes.append((_spoken(family), drawn))
    blocks = [
        _severity_block("AUC", "severity", aucs, "", figures),
        _severity_block("Flipped verdicts", "flips", flips, FLIPS, figures),
        _severity_block("Change of score", "score_change", changes, CHANGE, figures),
        {"title": "At the strongest setting", "table": _strongest(rows, families)},
    ]
    text = (
        "Every op alone, always applied, at strengths 0 to 1; the random mix of all ops; JPEG quality and noise sigma. "
        "The band is the ensemble's 95 % interval; the dotted line is chance."
    )
    return {"title": "Robustness", "text": text, "legend": legend(scorers), "blocks": blocks}


def _severity_block(title: str, name: str, panels: Sequence[Panel], note: str, figures: Figures) -> dict[str, Any]:
    drawn = figures.group(name, panels, SMALL)
    title = f"{title} against severity"
    return {"title": title, "size": "small", "figures": drawn, "note": note}


def _strongest(rows: Sequence[Mapping[str, Any]], families: Sequence[str]) -> dict[str, Any]:
    """AUC of everyone, and change and flips of the leading scorer, at each family's last level."""
    scorers = sorted(dict.fromkeys(r["who"] for r in rows), key=lambda w: w != ENSEMBLE)
    lead = scorers[0]
    table = []
    for family in families:
        of_family = [row for row in rows if row["family"] == family]
        level = of_family[-1]["level"]
        at = {row["who"]: row for row in of_family if row["level"] == level}
        told = {"jpeg_quality": "quality", "noise_sigma": "sigma"}.get(family, "strength")
        cells: list[dict[str, Any]] = [{"text": _spoken(family), "sub": f"{told} {level:g}"}]
        for who in scorers:
            interval = f"{at[who]['auc_low']:.2f} to {at[who]['auc_high']:.2f}"
            cells.append({"text": f"{at[who]['auc']:.3f}", "sub": interval})
        flips = at[lead]["flips"]
        cells.append({"text": f"{at[lead]['score_change']:.3f}"})
        cells.append({"text": f"{flips:.1%}", "tint": round(float(flips), 3)})
        table.append({"cells": cells, "under": at[lead]["protocol"]})
    head = ["op", *(f"AUC {w}" for w in scorers), f"score change, {lead}"]
    head.append(f"flips, {lead}")
    return {"style": "stack", "head": head, "rows": table}


def _sources_section(results: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = [r for r in results["rows"] + results["single_class"] if r["scope"] != "all"]
    conditions = list(results["figures"])
    rows.sort(key=lambda r: (conditions.index(r["condition"]), r["unit"]))
    if not rows:
        return None
    scorers = sorted(dict.fromkeys(r["who"] for r in rows), key=lambda w: w != ENSEMBLE)
    cells: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        key = row["scope"], row["condition"], row["unit"]
        cells.setdefault(key, {})[row["who"]] = row
    table = []
    for (scope, condition, unit), by_scorer in cells.items():
        line: list[dict[str, Any]] = [
            {"text": scope},
            {"text": f"{condition}, per {unit}"},
        ]
        for who in scorers:
            row = by_scorer[who]
            if "auc" in row:
                interval = f"{row['auc_low']:.3f} to {row['auc_high']:.3f}"
                line.append({"text": f"{row['auc']:.3f}", "sub": interval})
            else:
                told = f"{row['label']} only, at {row['threshold']:.3g}"
                line.append({"text": f"{row['accuracy']:.1%} right", "sub": told})
        table.append({"cells": line, "under": by_scorer[scorers[0]]["protocol"]})
    head = ["source", "condition", *(f"AUC {w}" for w in scorers)]
    text = "Each source and named pool on its own. A source of one class has no AUC: the share judged rightly stands there."
    block = {"table": {"style": "stack", "head": head, "rows": table}}
    return {"title": "By source", "text": text, "blocks": [block]}


def _agreement_section(results: Mapping[str, Any], figures: Figures) -> dict[str, Any] | None:
    panels = [
        (f"{condition}", draw_matrix(**data["agreement"]))
        for condition, data in results["figures"].items()
        if len(data["agreement"]["members"]) > 1
    ]
    if not panels:
        return None
    text = "Spearman's rank correlation of the members' scores: 1 is the same order of pictures, 0 no relation."
    blocks = [{"figures": figures.group("agreement", panels, LARGE)}]
    return {"title": "Agreement between members", "text": text, "blocks": blocks}


def _errors_section(results: Mapping[str, Any], thumbnails: bool) -> dict[str, Any] | None:
    blocks = []
    for condition, worst in results["worst"].items():
        for kind, name in (
            ("false_alarms", "reals called fake"),
            ("misses", "fakes missed"),
        ):
            if not worst[kind]:
                continue
            count = worst["counts"][kind]
            title = f"{condition.capitalize()}: the worst {len(worst[kind])} of {count} {name}"
            shown = [_picture(entry, thumbnails) for entry in worst[kind]]
            blocks.append({"title": title, "pictures": shown})
    if not blocks:
        return None
    text = "Farthest on the wrong side of the threshold. Pictures are shown as they are in the manifest, not degraded."
    return {"title": "Worst errors", "text": text, "blocks": blocks}


def _picture(entry: Mapping[str, Any], thumbnails: bool) -> dict[str, Any]:
    members = [f"{name} {p:.2f}" for name, p in entry["members"].items()]
    uri, absent = thumbnail(entry["path"]) if thumbnails else ("", entry["name"])
    return {
        "name": entry["name"],
        "uri": uri,
        "absent": absent,
        "head": f"{entry['score']:.3f}",
        "lines": [*([entry["source"]] if entry["source"] else []), ", ".join(members)],
    }


def _protocol_section(results: Mapping[str, Any]) -> dict[str, Any]:
    facts = []
    for name, value in results["protocol"].items():
        if isinstance(value, Mapping):
            value = "; ".join(f"{k}: {v}" for k, v in value.items())
        facts.append((name.replace("_", " "), str(value)))
    text = "What every number on this page was measured with; evaluation.json holds all of it for machines."
    return {"title": "Protocol", "text": text, "blocks": [{"facts": facts}]}


# ------------------------------------------------------------------------------------------------ submission
def write_submission_report(
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    title: str = "Submission",
    threshold: float = 0.5,
    verdicts: Mapping[str, Any] | None = None,
) -> Path:
    """`report.html`, `report.json` and `figures/*.png` about scores whose labels nobody knows; returns the page's path.

    rows: one per file, as the members' sidecar has them: `image`, `score`, `NAME_p` per member, `error` (empty where
    there is none), `verdict`, and `path` of the file where a thumbnail is wanted. Failures, and files without a face,
    whose scores mean nothing, keep out of every figure. verdicts: of `verdicts.verdict_section`, for the table of verdicts
    and the videos.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    failures = [row for row in rows if row.get("error")]
    scored = [row for row in rows if not row.get("error") and row.get("verdict") != "no_face"]
    nobody = len(rows) - len(failures) - len(scored)
    members = [k.removesuffix("_p") for k in (scored or [{}])[0] if k.endswith("_p")]
    scores = np.array([float(row["score"]) for row in scored])
    p = {m: np.array([float(row[f"{m}_p"]) for row in scored]) for m in members}
    figures = Figures(out / "figures")
    clips = any(Path(row["image"]).suffix.lower() in VIDEO_SUFFIXES for row in rows)
    unit = "files" if clips else "pictures"
    sections = [
        _spread_section(scores, p, figures, unit),
        _gallery(
            f"Most uncertain {unit}",
            f"Nearest to the threshold {threshold:.3g}.",
            [scored[i] for i in np.argsort(np.abs(scores - threshold), kind="stable")],
            members,
        ),
        _disagreement_section(scored, p, figures, unit),
        _failures_section(failures),
    ]
    above = float(np.mean(scores >= threshold)) if len(scores) else None
    share = "none scored" if above is None else f"{above:.1%}"
    words = verdicts["counts"] if verdicts else {}
    by_face = "each face counted" if verdicts and verdicts["faces"] else ""
    page = {
        "title": title,
        "lead": "No labels are known here: this says how the scores lie, not whether they are right.",
        "tiles": [
            {"label": unit.capitalize(), "value": f"{len(rows):,}"},
            {"label": "Failures", "value": f"{len(failures):,}"},
            *([{"label": "No face found", "value": f"{nobody:,}", "note": "not in what follows"}] if nobody else []),
            *(
                [
                    {"label": f"Called {word}", "value": f"{words[word]:,}", "note": by_face}
                    for word in ("fake", "unsure")
                ]
                if words
                else [{"label": f"Scores of {threshold:.3g} or above", "value": share}]
            ),
        ],
        "verdicts": verdicts,
        "sections": [s for s in sections if s is not None],
    }
    summary = {
        "title": title,
        "pictures": len(rows),
        "threshold": threshold,
        "no_face": nobody,
        "above_threshold": above,
        "histogram": {n: histogram(x) for n, x in {"score": scores, **p}.items()},
        "members": members,
        "rank_correlation": rank_correlation([*p.values()]) if len(scores) > 1 else [],
        "failures": [{k: str(row[k]) for k in ("image", "error")} for row in failures],
    }
    text = json.dumps(summary, indent=1, allow_nan=False)
    write_atomically(out / "report.json", text + "\n")
    return _write_page(page, out / "report.html")


def _spread_section(
    scores: np.ndarray, p: Mapping[str, np.ndarray], figures: Figures, unit: str
) -> dict[str, Any] | None:
    if not len(scores):
        return None
    panels = [("score", draw_histogram(histogram(scores)))]
    panels += [(name, draw_histogram(histogram(x))) for name, x in p.items()]
    drawn = figures.group("histograms", panels, SMALL)
    text = f"Shares of {len(scores):,} scored {unit}."
    return {
        "title": "Scores",
        "text": text,
        "blocks": [{"figures": drawn, "size": "small"}],
    }


def _disagreement_section(
    scored: Sequence[Mapping[str, Any]], p: Mapping[str, np.ndarray], figures: Figures, unit: str
) -> dict[str, Any] | None:
    if len(p) < 2 or len(scored) < 2:
        return None
    stacked = np.stack(list(p.values()))
    spread = stacked.max(axis=0) - stacked.min(axis=0)
    agreement = {
        "members": list(p),
        "rank_correlation": rank_correlation(list(p.values())),
    }
    panels = [
        ("rank correlation", draw_matrix(**agreement)),
        ("highest minus lowest P(fake)", draw_histogram(histogram(spread), "spread")),
    ]
    widest = [scored[i] for i in np.argsort(-spread, kind="stable")]
    gallery = _gallery("", "", widest, list(p))
    return {
        "title": "Member disagreement",
        "text": f"How far the members' P(fake) lie apart; mean {spread.mean():.2f}. Below, the {unit} they disagree on most.",
        "blocks": [
            {"figures": figures.group("disagreement", panels, LARGE)},
            *(gallery["blocks"] if gallery else []),
        ],
    }


def _gallery(title: str, text: str, rows: Sequence[Mapping[str, Any]], members: Sequence[str]) -> dict[str, Any] | None:
    if not rows:
        return None
    pictures = []
    for row in rows[:SHOWN]:
        uri, absent = thumbnail(row["path"]) if row.get("path") else ("", row["image"])
        each = ", ".join(f"{m} {float(row[f'{m}_p']):.2f}" for m in members)
        pictures.append(
            {
                "name": row["image"],
                "uri": uri,
                "absent": absent,
                "head": f"{float(row['score']):.3f}",
                "lines": [row["image"], each],
            }
        )
    return {"title": title, "text": text, "blocks": [{"pictures": pictures}]}


def _failures_section(failures: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not failures:
        return None
    rows = [{"cells": [{"text": row["image"]}, {"text": str(row["error"])}]} for row in failures[:SHOWN_FAILURES]]
    table = {"style": "", "head": ["image", "reason"], "rows": rows, "text": ["reason"]}
    shown = f", the first {SHOWN_FAILURES} of them below" if len(failures) > len(rows) else ""
    text = f"{len(failures):,} files got the neutral score{shown}."
    return {"title": "Failures", "text": text, "blocks": [{"table": table}]}


def _spoken(family: str) -> str:
    names = {
        "mix": "random mix",
        "jpeg_quality": "JPEG quality",
        "noise_sigma": "noise sigma",
    }
    return names.get(family, family.replace("_", " ").replace("jpeg", "JPEG"))


# ------------------------------------------------------------------------------------------------ files
def thumbnail(path: str | Path) -> tuple[str, str]:
    """(data URI of a small square JPEG, "") of a picture, or ("", why there is none)."""
    from solution.data.images import UnreadableInput
    from solution.data.processes import LIMIT, Killed, alone

    if not Path(path).is_file():
        return "", "file not found"
    try:
        return alone(_small, path, seconds=LIMIT), ""
    except (UnreadableInput, Killed) as error:
        return "", str(error)


def _small(path: str | Path) -> str:
    from PIL import Image, ImageOps

    from solution.data.images import decode_image

    picture = Image.fromarray(decode_image(path))
    small = ImageOps.fit(picture, (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write_page(page: Mapping[str, Any], path: Path) -> Path:
    write_atomically(path, render(TEMPLATE, page))
    return path


def render(template: str, page: Mapping[str, Any]) -> str:
    """The HTML of `page` by a template that lies beside this file."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(page=page)
