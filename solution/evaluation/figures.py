"""Figures of reports: panels drawn once as SVG in the page's own colours, and once as a PNG.

`Figures(folder).group(name, panels, size)` draws `(title, draw(axes, colours))`s; the `draw_...` functions make them of plain
values of `measure`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solution.config import MEMBERS
from solution.evaluation.measure import ENSEMBLE

# Colours are drawn as these values; in the page they become the style sheet's variables, in PNGs the light ones.
LIGHT = {
    "fg": "#1b1d20",
    "muted": "#61666e",
    "grid": "#e9eaec",
    "surface": "#ffffff",
    "accent": "#2f6fcf",
    "real": "#2f7f86",
    "fake": "#b84a20",
    "s0": "#2f6fcf",
    "s1": "#d1701b",
    "s2": "#1f8f6b",
    "s3": "#7a55c7",
    "s4": "#c03f80",
}
PLACEHOLDERS = {name: f"#0a0b{index:02x}" for index, name in enumerate(LIGHT)}
LARGE, SMALL = (300, 240), (150, 128)  # points, one panel; the page scales them little

Panel = tuple[str, Callable[[Any, Mapping[str, str]], None]]  # (title, draw(axes, colours))


class Figures:
    """Draws groups of panels: an inline SVG each, and all of a group in one PNG under `folder`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def group(self, name: str, panels: Sequence[Panel], size: tuple[int, int]) -> list[dict[str, Any]]:
        """`panels` as `{"svg": markup}` each, in their order; `NAME.png` beside the page."""
        from markupsafe import Markup
        from matplotlib.figure import Figure

        width, height = size
        found = []
        for index, (title, draw) in enumerate(panels):
            with _style(PLACEHOLDERS, f"{name}-{index}", large=size == LARGE):
                figure = Figure(figsize=(width / 72, height / 72), dpi=72)
                _draw_panel(figure.subplots(), title, draw, PLACEHOLDERS)
                _fit(figure, size)
                found.append({"svg": Markup(_inline_svg(figure, title))})
        columns = min(len(panels), 2 if size == LARGE else 6)
        rows = -(-len(panels) // columns)
        with _style(LIGHT, name, large=size == LARGE):
            whole = (columns * width / 72, rows * height / 72)
            figure = Figure(figsize=whole, facecolor=LIGHT["surface"])
            grid = figure.subplots(rows, columns, squeeze=False).ravel()
            for axes, (title, draw) in zip(grid, panels):
                _draw_panel(axes, title, draw, LIGHT)
            for axes in grid[len(panels) :]:
                axes.set_axis_off()
            _fit(figure, (columns * width, rows * height), columns, rows)
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / f"{name}.png", dpi=200)
        return found


def axes_style(colours: Mapping[str, Any]) -> dict[str, Any]:
    """Matplotlib settings that all figures share: a light grid, no frame, text in the page's colours."""
    return {
        "axes.labelcolor": colours["muted"],
        "axes.edgecolor": colours["muted"],
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colours["grid"],
        "grid.linewidth": 0.7,
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.color": colours["fg"],
        "lines.solid_capstyle": "round",
        "axes.titlecolor": colours["fg"],
        "axes.titlelocation": "left",
        "font.family": "sans-serif",
    }


def _style(colours: Mapping[str, str], salt: str, *, large: bool) -> Any:
    import matplotlib

    small = 8.0 if large else 7.0
    return matplotlib.rc_context(
        {
            **axes_style(colours),
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.size": small,
            "axes.titlesize": small + 0.5,
            "axes.titlepad": 5.0,
            "axes.labelsize": small,
            "axes.labelpad": 2.0,
            "axes.facecolor": "none",
            "xtick.labelsize": small - 0.5,
            "ytick.labelsize": small - 0.5,
            "figure.facecolor": "none",
            "savefig.facecolor": "auto",
        }
    )


def _fit(figure: Any, size: tuple[int, int], columns: int = 1, rows: int = 1) -> None:
    """The same margins, in points, for every panel; faster than a layout engine and equal over a group."""
    left, right, bottom, top = 32, 8, 27, 18
    width, height = size[0] / columns, size[1] / rows
    inner = width - left - right, height - bottom - top
    figure.subplots_adjust(
        left=left / size[0],
        right=1 - right / size[0],
        bottom=bottom / size[1],
        top=1 - top / size[1],
        wspace=(left + right) / inner[0],
        hspace=(bottom + top) / inner[1],
    )


def _draw_panel(
    axes: Any,
    title: str,
    draw: Callable[[Any, Mapping[str, str]], None],
    colours: Mapping[str, str],
) -> None:
    axes.set_title(title, fontweight="bold")
    draw(axes, colours)


def _inline_svg(figure: Any, label: str) -> str:
    """The figure as an `<svg>` element that takes colours and font from the page around it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: (bold |700 )?([\d.]+)px [^;\"]*", _font, svg)
    for name, value in PLACEHOLDERS.items():
        svg = svg.replace(value, f"var(--{name})")
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    words = label.replace("&", "and").replace('"', "").replace("<", "")
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} role="img" aria-label="{words}">'
    return re.sub(r"\s*\n\s*", "\n", opening + rest)


def _font(match: re.Match[str]) -> str:
    weight = "font-weight: 600; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"


def _colour(who: str, colours: Mapping[str, str]) -> str:
    """The leading scorer in the text's colour, members each in their own, the same on every page."""
    if who in (ENSEMBLE, "scores"):
        return colours["fg"]
    return colours[f"s{MEMBERS.index(who) if who in MEMBERS else 0}"]


def legend(scorers: Sequence[str]) -> list[dict[str, str]]:
    """Names and colours (of the page's style sheet) of scorers, the ensemble first."""
    variables = {name: f"var(--{name})" for name in LIGHT}
    ordered = sorted(scorers, key=lambda w: w != ENSEMBLE)
    return [{"name": who, "colour": _colour(who, variables)} for who in ordered]


def _unit_square(axes: Any, colours: Mapping[str, str]) -> None:
    axes.plot([0, 1], [0, 1], color=colours["muted"], linewidth=0.7, linestyle=(0, (2, 2)))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])


def draw_roc(curves: Mapping[str, Mapping[str, list[float]]]) -> Callable[..., None]:
    """ROC curves by scorer, each with `fpr` and `tpr`."""

    def draw(axes: Any, colours: Mapping[str, str]) -> None:
        _unit_square(axes, colours)
        for who, curve in curves.items():
            lead = who in (ENSEMBLE, "scores")
            axes.plot(
                curve["fpr"],
                curve["tpr"],
                color=_colour(who, colours),
                linewidth=2.0 if lead else 1.2,
                zorder=3 if lead else 2,
            )
        axes.set(xlabel="reals called fake", ylabel="fakes found")

    return draw


def draw_histogram(shares: Mapping[str, list[float]], label: str = "P(fake)") -> Callable[..., None]:
    """`real` and `fake` shares, or one `share` of everything."""

    def draw(axes: Any, colours: Mapping[str, str]) -> None:
        for name in ("real", "fake", "share"):
            if name in shares:
                colour = colours["accent" if name == "share" else name]
                axes.stairs(shares[name], shares["edges"], fill=True, color=colour, alpha=0.3)
                axes.stairs(shares[name], shares["edges"], color=colour, linewidth=1.1)
        axes.set(xlim=(-0.03, 1.03), xlabel=label)
        axes.set_ylim(bottom=0)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.locator_params(axis="y", nbins=4)

    return draw


def draw_reliability(curves: Mapping[str, Any]) -> Callable[..., None]:
    """Reliability curves by `before` and `after`: share of fakes over mean P(fake), bins without pictures left out."""

    def draw(axes: Any, colours: Mapping[str, str]) -> None:
        _unit_square(axes, colours)
        for when, bins in curves.items():
            rows = np.array(bins["counts"]) > 0
            solid = when == "after"
            axes.plot(
                np.array(bins["mean_p"])[rows],
                np.array(bins["share_fake"])[rows],
                color=colours["accent" if solid else "muted"],
                linewidth=1.5 if solid else 1.0,
                linestyle="-" if solid else (0, (3, 2)),
                marker="o",
                markersize=2.8 if solid else 2.0,
            )
        axes.set(xlabel="P(fake)", ylabel="share of fakes")

    return draw


def draw_severity(rows: Sequence[Mapping[str, Any]], floor: float, value: str = "auc") -> Callable[..., None]:
    """One quantity of a family's rows over its level, a line a scorer, the ensemble's AUC with its interval."""

    def draw(axes: Any, colours: Mapping[str, str]) -> None:
        family = rows[0]["family"]
        for who in dict.fromkeys(row["who"] for row in rows):
            of_scorer = [row for row in rows if row["who"] == who]
            x = [row["level"] for row in of_scorer]
            lead, colour = who == ENSEMBLE, _colour(who, colours)
            if lead and value == "auc":
                low = [row["auc_low"] for row in of_scorer]
                high = [row["auc_high"] for row in of_scorer]
                axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
            y = [row[value] for row in of_scorer]
            width = 1.8 if lead else 1.0
            axes.plot(x, y, color=colour, linewidth=width, zorder=3 if lead else 2)
        if value == "auc":
            axes.axhline(0.5, color=colours["muted"], linewidth=0.7, linestyle=(0, (1, 2)))
        top = 1.0 if value == "auc" else max(0.5, *(row[value] for row in rows))
        axes.set_ylim(floor, top)
        if family == "jpeg_quality":
            axes.invert_xaxis()
        labels = {"jpeg_quality": "quality", "noise_sigma": "sigma of 255"}
        axes.set_xlabel(labels.get(family, "strength"))
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=4)

    return draw


def draw_matrix(members: Sequence[str], rank_correlation: Sequence[Sequence[float | None]]) -> Callable[..., None]:
    """Rank correlations (M, M) of the members as a shaded table."""

    def draw(axes: Any, colours: Mapping[str, str]) -> None:
        from matplotlib.patches import Rectangle

        size = len(members)
        for row in range(size):
            for column in range(size):
                value = rank_correlation[row][column]
                shade = 0.0 if value is None else 0.6 * max(0.0, value)
                corner = column - 0.48, row - 0.48
                axes.add_patch(
                    Rectangle(
                        corner,
                        0.96,
                        0.96,
                        color=colours["accent"],
                        alpha=shade,
                        linewidth=0,
                    )
                )
                text = "–" if value is None else f"{value:.2f}"
                axes.text(column, row, text, ha="center", va="center", color=colours["fg"])
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        axes.set_xticks(range(size), members)
        axes.set_yticks(range(size), members, rotation=90, va="center")
        axes.grid(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    return draw
