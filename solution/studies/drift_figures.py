"""Drift drawn: the numbers of `drift.summarise` to figures for light and dark pages, and to Markdown tables.

Takes its plain JSON values; writes `NAME-light.png` and `NAME-dark.png` without a background of their own, for
`<picture>` in a README, and gives text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solution.config import MEMBERS
from solution.evaluation.explainer import ATTENTION, CAM
from solution.evaluation.figures import axes_style
from solution.evaluation.measure import ENSEMBLE
from solution.studies.drift import UNIFORM

# The reports' colours, for light and for dark pages.
COLOURS = {
    "light": {
        "fg": "#1b1d20",
        "muted": "#61666e",
        "grid": "#e1e3e6",
        "members": ("#2f6fcf", "#d1701b", "#1f8f6b", "#7a55c7", "#c03f80"),
    },
    "dark": {
        "fg": "#ebecee",
        "muted": "#9ba1aa",
        "grid": "#34383e",
        "members": ("#6ea6f5", "#f0a050", "#4fc79f", "#ab8cf2", "#ee7fb4"),
    },
}
# quantity -> (title, unit of the vertical axis)
PANELS = {
    "attention_entropy": ("Entropy of attention", "nats"),
    "feature_cosine": ("Class token, against clean", "cosine"),
    "score_change": ("Scores: mean change of P(fake)", ""),
    f"outside_{ATTENTION}": ("Attention outside the face", "share of mass"),
    f"outside_{CAM}": ("Score-CAM outside the face", "share of mass"),
    "likeness": ("Likeness to the other members", "linear CKA"),
}
TABLES = {
    **{quantity: title for quantity, (title, _) in PANELS.items()},
    "cosine_between": "Cosine between streams' class tokens, and between others whose features have one width",
    "outside_query_attention": "Query attention outside the face",
    "outside_localization": "Localisation outside the face",
    "outside_vla": "Likeness to the fake sentence outside the face",
    f"outside_{UNIFORM}": "Area outside the face: what an even map would have",
    "p_fake_real": "Mean P(fake) of real pictures",
    "p_fake_fake": "Mean P(fake) of fake pictures",
}
MAP_NAMES = {
    CAM: "Score-CAM",
    ATTENTION: "attention",
    "query_attention": "query attention",
    "localization": "localisation",
    "vla": "sentence likeness",
    "random": "random",
}

Rows = Sequence[Mapping[str, Any]]


# ------------------------------------------------------------------------------------------------ figures
def draw_figures(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Curves over strength and, where maps were judged, their margins over random maps; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"drift": _curves}
    if any(row["map"] != "random" for row in results["judged"]):
        figures["maps"] = _margins
    written = []
    for name, draw in figures.items():
        for mode, colours in COLOURS.items():
            path = folder / f"{name}-{mode}.png"
            with _style(colours):
                draw(results, colours).savefig(path, dpi=170, transparent=True)
            written.append(path)
    return written


def _style(colours: Mapping[str, Any]) -> Any:
    import matplotlib

    return matplotlib.rc_context(
        {
            **axes_style(colours),
            "font.size": 9.0,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlepad": 7.0,
        }
    )


def _curves(results: Mapping[str, Any], colours: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = results["rows"]
    present = [q for q in PANELS if _of(rows, q)]
    columns = min(3, len(present))
    lines = -(-len(present) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.55 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, quantity in zip(grid, present):
        _panel(axes, rows, quantity, colours)
    for axes in grid[len(present) :]:
        axes.set_axis_off()
    people = sorted({who for q in present for who in _of(rows, q)}, key=_place)
    handles = [Line2D([], [], color=_colour(who, colours), linewidth=2, label=who) for who in people]
    if any(q.startswith("outside") for q in present):
        dashes = Line2D([], [], color=colours["muted"], linewidth=1, linestyle=(0, (2, 2)))
        dashes.set_label("an even map")
        handles.append(dashes)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _of(rows: Rows, quantity: str) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of a quantity by who, pairs of members left out; empty where nothing was measured under the engine."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["quantity"] == quantity and "&" not in row["who"]:
            found.setdefault(row["who"], []).append(row)
    return found


def _place(who: str) -> int:
    return MEMBERS.index(who) if who in MEMBERS else len(MEMBERS)


def _colour(who: str, colours: Mapping[str, Any]) -> str:
    return colours["members"][_place(who)] if who in MEMBERS else colours["fg"]


def _panel(axes: Any, rows: Rows, quantity: str, colours: Mapping[str, Any]) -> None:
    title, unit = PANELS[quantity]
    axes.set_title(title)
    strengths = sorted({r["strength"] for r in rows if r["strength"] is not None})
    first = strengths[0] if strengths else 0.0
    at_clean, shown = first - 0.16, _of(rows, quantity)
    with_clean = any(r["strength"] is None for points in shown.values() for r in points)
    even = _of(rows, f"outside_{UNIFORM}") if quantity.startswith("outside") else {}
    for who, points in shown.items():
        colour = _colour(who, colours)
        aside = 0.015 * (_place(who) - len(MEMBERS) / 2)
        curve = [r for r in points if r["strength"] is not None]
        x = [r["strength"] for r in curve]
        low, high = ([r[side] for r in curve] for side in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        width = 2.0 if who == ENSEMBLE else 1.4
        axes.plot(x, [r["mean"] for r in curve], color=colour, linewidth=width)
        for r in points:
            if r["strength"] is None:
                reach = [[r["mean"] - r["low"]], [r["high"] - r["mean"]]]
                style = {"color": colour, "markersize": 3.5, "linewidth": 1.1}
                axes.errorbar([at_clean + aside], [r["mean"]], reach, fmt="o", **style)
    for who, points in even.items():
        x = [at_clean if r["strength"] is None else r["strength"] for r in points]
        y = [r["mean"] for r in points]
        style = {"linewidth": 0.9, "linestyle": (0, (2, 2)), "alpha": 0.7}
        axes.plot(x, y, color=_colour(who, colours), zorder=1, **style)
    every = 1 if len(strengths) < 8 else 2
    ticks = {s: f"{s:g}" for s in strengths[::every]}
    if with_clean:
        ticks = {at_clean: "clean"} | ticks
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("strength of the degradation")
    axes.set_ylabel(unit)
    axes.locator_params(axis="y", nbins=5)


def _margins(results: Mapping[str, Any], colours: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    kinds = [r for r in results["judged"] if r["map"] != "random"]
    labels = list(dict.fromkeys((r["who"], r["map"]) for r in kinds))
    figure = Figure(figsize=(9.9, 0.24 * len(labels) + 1.1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {
        "deletion": "Deletion (left is better)",
        "insertion": "Insertion (right is better)",
    }
    for axes, (area, title) in zip(panels, titles.items()):
        axes.set_title(title)
        axes.set_xlabel("area under P(fake), less that of random maps")
        axes.axvline(0, color=colours["muted"], linewidth=0.8)
        for row in kinds:
            if row["area"] == area:
                over = row["against_random"]
                y = labels.index((row["who"], row["map"]))
                reach = [[over["mean"] - over["low"]], [over["high"] - over["mean"]]]
                style = {"color": _colour(row["who"], colours), "markersize": 5}
                axes.errorbar([over["mean"]], [y], xerr=reach, fmt="o", **style)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(labels) - 0.5, -0.5)
    names = [f"{who}: {MAP_NAMES.get(kind, kind)}" for who, kind in labels]
    panels[0].set_yticks(range(len(labels)), names)
    return figure


# ------------------------------------------------------------------------------------------------ tables
def markdown(results: Mapping[str, Any]) -> str:
    """Every number as tables, with the protocol above them."""
    lines = ["# Attention drift", ""]
    lines += [f"- {name}: {text}" for name, text in results["protocol"].items()]
    rows = results["rows"]
    for quantity, title in TABLES.items():
        of_quantity = [r for r in rows if r["quantity"] == quantity]
        if of_quantity:
            lines += ["", f"## {title}", "", *_over_strength(of_quantity)]
    if results["judged"]:
        lines += ["", "## Maps judged", "", *_judged(results["judged"])]
    if results["agreement"]:
        lines += ["", "## Score-CAM of the strongest channels against all", ""]
        lines += _table(
            ["member", "correlation", "mass in common", "pictures"],
            [
                [
                    r["who"],
                    _interval(r["agreement"]),
                    _interval(r["shared_mass"]),
                    _count(r),
                ]
                for r in results["agreement"]
            ],
        )
    return "\n".join(lines) + "\n"


def _count(row: Mapping[str, Any]) -> str:
    return str((row["agreement"] or row["shared_mass"] or {"n": 0})["n"])


def _over_strength(rows: Rows) -> list[str]:
    strengths = list(dict.fromkeys(r["strength"] for r in rows))
    cells: dict[str, dict[Any, str]] = {}
    for row in rows:
        cells.setdefault(row["who"], {})[row["strength"]] = _interval(row)
    head = ["clean" if s is None else f"{s:g}" for s in strengths]
    body = [[who, *(c.get(s, "") for s in strengths)] for who, c in cells.items()]
    counts = sorted({row["n"] for row in rows})
    spread = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [*_table(["", *head], body), "", f"Over {spread} pictures."]


def _judged(rows: Rows) -> list[str]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["who"], row["map"]), {})[row["area"]] = row
    body = []
    for (who, kind), areas in found.items():
        cells = [who, MAP_NAMES.get(kind, kind)]
        for area in ("deletion", "insertion"):
            cells.append(_interval(areas[area]))
            over = areas[area]["against_random"]
            cells.append("" if kind == "random" else _interval(over, sign="+"))
        body.append([*cells, str(areas["deletion"]["n"])])
    head = "member,map,deletion (low is good),less random,insertion (high is good),less random,pictures"
    return _table(head.split(","), body)


def _interval(row: Mapping[str, Any] | None, sign: str = "") -> str:
    """`mean (low to high)`."""
    if row is None:
        return "-"
    numbers = (f"{row[k]:{sign}.3f}" for k in ("mean", "low", "high"))
    return "{} ({} to {})".format(*numbers)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]
