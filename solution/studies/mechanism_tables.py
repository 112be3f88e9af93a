"""What taking mechanisms away did, in numbers, words, tables and figures; and which claims of a bundle hold.

Takes what `probes` measured (logits (N,) float64 by member and mechanism); gives rows of plain JSON values, and Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from solution.bundles.bundle import CLAIMS, Bundle
from solution.errors import WeightsError
from solution.evaluation import metrics
from solution.evaluation.figures import axes_style
from solution.evaluation.measure import ENSEMBLE, rank_correlation
from solution.models.calibration import sigmoid
from solution.models.member import Member
from solution.models.streams import Fusion
from solution.scoring.vote import combine
from solution.studies.drift import Bootstrap, cosine
from solution.studies.drift_figures import COLOURS
from solution.studies.probes import BUILT, MIXTURES, Measured

LEAST_CHANGE = 0.01  # mean |change of P(fake)| from which on a mechanism acts
ALIKE = 0.9  # correlation from which on two queries look at the same patches
SAME = 0.9  # cosine, or predictability, from which on two halves are the same features
FOLDS = 5
# What fails a claim.
FAILED = ("dead", "alike", "blind", "same features", "not measured")

Numbers = dict[str, Any]
Rows = list[dict[str, Any]]


# ------------------------------------------------------------------------------------------------ numbers and words
@dataclass(frozen=True)
class Draws:
    """How intervals are drawn: 95 %, percentiles over resampled pictures."""

    seed: int
    count: int

    def mean(self, values: np.ndarray) -> Numbers | None:
        """Mean of what is not nan in (N,) with its interval; None of nothing."""
        return Bootstrap(len(values), self.seed, self.count).mean(values)


class Scores(NamedTuple):
    """What ranks N pictures, their P(fake), and the same before calibration."""

    rank: np.ndarray
    p: np.ndarray
    raw: np.ndarray


def compare(labels: np.ndarray, before: Scores, after: Scores, draws: Draws) -> Numbers:
    """A score with and without a mechanism on the same pictures (N,).

    change: mean |change of P(fake)|, its interval; shift: its mean with the sign. auc: before, after, and after less
    before (`mean`, `low`, `high`; paired bootstrap within each class); None of one class. sd: of P(fake) before
    calibration, without the mechanism.
    """
    found: Numbers = {
        "n_real": int(np.sum(labels == 0)),
        "n_fake": int(np.sum(labels == 1)),
        "change": draws.mean(np.abs(after.p - before.p)),
        "shift": float(np.mean(after.p - before.p)),
        "sd": float(np.std(after.raw)),
        "auc": None,
    }
    if found["n_real"] and found["n_fake"]:
        options = {"method": "bootstrap", "seed": draws.seed, "draws": draws.count}
        test = metrics.paired_auc_test(labels, after.rank, before.rank, **options)
        found["auc"] = {
            "before": test.auc_b,
            "after": test.auc_a,
            "mean": test.difference,
            "low": test.low,
            "high": test.high,
        }
    return found


def word_of(conditions: Mapping[str, Numbers]) -> str:
    """`acts and helps`: without it the AUC is lower under some condition, its interval below 0; `acts`: P(fake)
    changes by `LEAST_CHANGE` or more on average under some; else `dead`.
    """
    told = list(conditions.values())
    if any(t["auc"] is not None and t["auc"]["high"] < 0 for t in told):
        return "acts and helps"
    acts = any(t["change"]["mean"] >= LEAST_CHANGE for t in told)
    return "acts" if acts else "dead"


def interventions(measured: Mapping[str, Measured], bundle: Bundle, draws: Draws) -> Rows:
    """A row for every member and mechanism, and for the vote less each voter; measured: by condition."""
    rows: dict[tuple[str, str], dict[str, Numbers]] = {}
    for condition, found in measured.items():
        for name, logits in found.logits.items():
            # Ranked by logit: where P(fake) saturates, ties are none of the member's.
            scores = {
                mechanism: Scores(z, bundle.calibrators[name].apply(z), sigmoid(z)) for mechanism, z in logits.items()
            }
            before = scores.pop(BUILT)
            for mechanism in set(MIXTURES.values()) & set(scores):
                z = logits[mechanism]
                scores[mechanism] = scores[mechanism]._replace(p=in_order(before.p, z))
            for mechanism, after in scores.items():
                numbers = compare(found.labels, before, after, draws)
                rows.setdefault((name, mechanism), {})[condition] = numbers
        for mechanism, numbers in _without_each(found, bundle, draws):
            rows.setdefault((ENSEMBLE, mechanism), {})[condition] = numbers
    return [
        {"member": who, "mechanism": what, "word": word_of(told), "conditions": told}
        for (who, what), told in rows.items()
    ]


def in_order(p: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The values of p (N,) in the order of `logits` (N,), equal logits getting the same: P(fake) calibrated anew.

    Another mixture of the same two scores is on another scale than its calibrator was fitted on.
    """
    return np.interp(rankdata(logits) - 1, np.arange(len(p)), np.sort(p))


def _without_each(found: Measured, bundle: Bundle, draws: Draws) -> Iterator[tuple[str, Numbers]]:
    """The vote less each of its voters, the others' votes as they are."""
    vote = bundle.vote
    p = {n: bundle.calibrators[n].apply(found.logits[n][BUILT]) for n in vote.weights}
    voters = [name for name, weight in vote.weights.items() if weight]
    whole = combine(p, vote)
    for name in voters if len(voters) > 1 else ():
        rest = combine(p, replace(vote, weights=vote.weights | {name: 0}))
        scores = (Scores(votes, votes, votes) for votes in (whole, rest))
        yield f"without {name}", compare(found.labels, *scores, draws)


def measurements(measured: Mapping[str, Measured], members: Mapping[str, Member], draws: Draws) -> Rows:
    """What members do as they are: queries that differ, maps that find the forgery, halves that are two."""
    rows: dict[tuple[str, str], tuple[Judge, dict[str, Numbers]]] = {}
    for condition, found in measured.items():
        for name, told in found.told.items():
            member = members[name]
            for quantity in quantities(found.labels, told, member.pooled_width if isinstance(member, Fusion) else 0):
                values = quantity.values
                numbers = draws.mean(values) if values.ndim else _plain(values)
                if numbers is not None:
                    rows.setdefault((name, quantity.name), (quantity.judge, {}))[1][condition] = numbers
    return [
        {"member": who, "mechanism": what, "word": judge(list(told.values()))} | {"conditions": told}
        for (who, what), (judge, told) in rows.items()
    ]


def _plain(value: np.ndarray) -> Numbers:
    return {"mean": float(value), "low": None, "high": None, "n": None}


# The same quantity under each condition -> its word.
Judge = Callable[[Sequence[Numbers]], str]


def differ(told: Sequence[Numbers]) -> str:
    """Of a correlation between queries: `differ`, or `alike` under any condition."""
    return "alike" if any(t["mean"] >= ALIKE for t in told) else "differ"


def finds(told: Sequence[Numbers], chance: float = 0.5) -> str:
    """Of an AUC of patches: `finds` where it lies above chance under any condition, else `blind`."""
    return "finds" if any(t["low"] > chance for t in told) else "blind"


def different(told: Sequence[Numbers]) -> str:
    """Of a likeness of halves: `different`, or `same features` under any condition."""
    return "same features" if any(t["mean"] >= SAME for t in told) else "different"


class Quantity(NamedTuple):
    """Something measured: its name in the tables, (N,) values or a lone number, and what gives its word."""

    name: str
    values: np.ndarray
    judge: Judge = lambda told: ""


def quantities(labels: np.ndarray, told: Mapping[str, np.ndarray], cut: int) -> Iterator[Quantity]:
    """Everything that probes told of a member; cut: where a fusion's second half starts, else 0."""
    for name, values in told.items():
        kind, _, what = name.partition(": ")
        if kind == "correlation":
            for label, word in enumerate(("reals", "fakes")):
                part = np.where(labels == label, values, np.nan)
                yield Quantity(f"correlation between queries, {word}", part, differ)
        elif kind == "entropy":
            yield Quantity("entropy of attention / ln P", values)
        elif kind == "inside":
            yield Quantity(f"{what} inside a fake", np.where(labels == 1, values, np.nan), finds)
            # Forgeries lie in the middle of faces, and so may a map that sees nothing.
            twins = values[labels == 1] - values[labels == 0]
            yield Quantity(f"{what} inside a fake, less its real twin", twins, partial(finds, chance=0.0))
        elif kind == "pooled" and cut:
            first, second = values[:, :cut], values[:, cut:]
            if first.shape == second.shape:
                yield Quantity("cosine of the halves", cosine(first, second), different)
            yield Quantity("second half from the first", predictability(first, second), different)
            yield Quantity("first half from the second", predictability(second, first), different)


def predictability(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of y (N, G) a linear map of x (N, F) tells about pictures it was not fitted on, as a lone number.

    R^2 of ridge regression over held-out fifths, divided by that of y from itself: few pictures fix few directions.
    """
    own = _held_out(y, y)
    return np.array(max(0.0, _held_out(x, y)) / own if own > 0 else 0.0)


def _held_out(x: np.ndarray, y: np.ndarray) -> float:
    """R^2 over all of y's columns together, each fifth of the rows predicted from the others."""
    fold = np.arange(len(x)) % min(FOLDS, len(x))
    wrong = total = 0.0
    for k in range(fold.max() + 1):
        fit, test = fold != k, fold == k
        centre, mean = x[fit].mean(axis=0), y[fit].mean(axis=0)
        gram = (x[fit] - centre) @ (x[fit] - centre).T
        ridge = 1e-3 * np.trace(gram) / len(gram) + np.finfo(np.float64).tiny
        weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), y[fit] - mean)
        told = (x[test] - centre) @ (x[fit] - centre).T @ weights
        wrong += np.sum((y[test] - mean - told) ** 2)
        total += np.sum((y[test] - mean) ** 2)
    return 1 - wrong / total if total > 0 else 0.0


def correlations(measured: Mapping[str, Measured]) -> Rows:
    """Spearman's correlation between every two members, by condition."""
    return [
        {
            "condition": condition,
            "members": list(found.logits),
            "rank_correlation": rank_correlation([z[BUILT] for z in found.logits.values()]),
        }
        for condition, found in measured.items()
    ]


# ------------------------------------------------------------------------------------------------ claims
def read_claims(bundle: Bundle) -> list[str]:
    """What the bundle says that its mechanisms do: `MEMBER/MECHANISM`; nothing where it has no such file.

    Raises:
        WeightsError: no list of such names, or of a member that the bundle has not.
    """
    path = bundle.folder / CLAIMS
    if not path.is_file():
        return []
    try:
        claims = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: no JSON ({error})") from None
    if not (isinstance(claims, list) and all(isinstance(c, str) for c in claims)):
        raise WeightsError(f"{path}: expected a list of MEMBER/MECHANISM")
    known = {*bundle.configs, ENSEMBLE}
    for claim in claims:
        if claim.partition("/")[0] not in known:
            raise WeightsError(f"{path}: {claim!r} names no member; there are {', '.join(sorted(known))}")
    return claims


def judge_claims(claims: Sequence[str], rows: Rows) -> dict[str, str]:
    """Claim -> its word in the pool where it does best, or `not measured`; rows: of all pools."""
    found: dict[str, str] = {}
    for claim in claims:
        words = [r["word"] for r in rows if f"{r['member']}/{r['mechanism']}" == claim]
        alive = [w for w in words if w and w not in FAILED]
        best = "acts and helps" if "acts and helps" in alive else None
        found[claim] = best or (*alive, *filter(None, words), "not measured")[0]
    return found


# ------------------------------------------------------------------------------------------------ tables
def markdown(results: Mapping[str, Any]) -> str:
    """Every number as tables, with the protocol above them."""
    lines = ["# What acts in the trained members", ""]
    lines += [f"- {name}: {text}" for name, text in results["protocol"].items()]
    for claim, word in results["claims"].items():
        lines.append(f"- claimed: {claim}: {word}")
    for name, pool in results["pools"].items():
        lines += ["", f"## {name}", "", pool["pictures"]]
        if pool["interventions"]:
            lines += ["", *_intervention_table(pool["interventions"])]
        if pool["measurements"]:
            lines += ["", *_measurement_table(pool["measurements"])]
        for found in pool["rank_correlations"]:
            lines += ["", f"Rank correlation, {found['condition']}:", ""]
            body = [
                [who, *("-" if v is None else f"{v:.3f}" for v in values)]
                for who, values in zip(found["members"], found["rank_correlation"])
            ]
            lines += _table(["", *found["members"]], body)
    return "\n".join(lines) + "\n"


def _intervention_table(rows: Rows) -> list[str]:
    head = ["member", "without or instead", "word"]
    conditions = list(rows[0]["conditions"])
    for condition in conditions:
        head += [f"change of P, {condition}", "AUC", "change of AUC", "sd of P"]
    body = []
    for row in rows:
        cells = [row["member"], row["mechanism"], row["word"]]
        for condition in conditions:
            told = row["conditions"][condition]
            auc = told["auc"]
            cells.append(f"{told['change']['mean']:.4f}")
            cells.append(f"{auc['before']:.3f} to {auc['after']:.3f}" if auc else "-")
            cells += [_interval(auc, "+.4f"), f"{told['sd']:.3f}"]
        body.append(cells)
    return _table(head, body)


def _measurement_table(rows: Rows) -> list[str]:
    conditions = list(dict.fromkeys(c for row in rows for c in row["conditions"]))
    body = [
        [row["member"], row["mechanism"], row["word"] or "-"]
        + [_interval(row["conditions"].get(c), ".3f") for c in conditions]
        for row in rows
    ]
    return _table(["member", "as it is", "word", *conditions], body)


def _interval(told: Mapping[str, Any] | None, form: str) -> str:
    """`mean (low to high)`, or what of it is known."""
    if told is None:
        return "-"
    if told["low"] is None:
        return format(told["mean"], form)
    return "{} ({} to {})".format(*(format(told[k], form) for k in ("mean", "low", "high")))


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


# ------------------------------------------------------------------------------------------------ figure
def draw(rows: Rows, title: str, path: Path) -> None:
    """Two panels over one row a mechanism: mean |change of P|, and the change of AUC with its interval."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = COLOURS["light"]
    style = axes_style(colours) | {"font.size": 8.5, "axes.titlesize": 9.5}
    conditions = list(rows[0]["conditions"])
    with matplotlib.rc_context(style):
        size = (10.5, 1.5 + 0.27 * len(rows))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        left, right = figure.subplots(1, 2, sharey=True)
        for place, condition in enumerate(conditions):
            colour = colours["members"][place]
            y = np.arange(len(rows)) + 0.34 * (place - (len(conditions) - 1) / 2)
            told = [row["conditions"][condition] for row in rows]
            _bars(left, y, [t["change"] for t in told], colour, condition)
            _points(right, y, [t["auc"] for t in told], colour)
        left.axvline(LEAST_CHANGE, color=colours["muted"], linewidth=0.8, linestyle=":")
        left.set_title(f"Mean |change of P(fake)|; dotted: {LEAST_CHANGE:g}, acts")
        right.axvline(0, color=colours["muted"], linewidth=0.8)
        right.set_title("Change of AUC without it, 95 %; left of 0: it helps")
        _label(left, right, rows, colours)
        figure.legend(loc="outside lower right", ncols=2, frameon=False)
        figure.savefig(path, dpi=150)


def _bars(axes: Any, y: np.ndarray, told: Sequence[Numbers], colour: str, name: str):
    axes.barh(y, [t["mean"] for t in told], height=0.32, color=colour, label=name)
    ends = [t["low"] for t in told], [t["high"] for t in told]
    axes.hlines(y, *ends, color="#1b1d20", linewidth=0.7)


def _points(axes: Any, y: np.ndarray, told: Sequence[Numbers | None], colour: str):
    known = [k for k, t in enumerate(told) if t is not None]
    ends = [told[k]["low"] for k in known], [told[k]["high"] for k in known]
    axes.hlines(y[known], *ends, color=colour, linewidth=1.6)
    axes.plot([told[k]["mean"] for k in known], y[known], "o", color=colour, ms=3.2)


def _label(left: Any, right: Any, rows: Rows, colours: Mapping[str, Any]) -> None:
    """Names at the left, words at the right, a line between members."""
    left.set_yticks(range(len(rows)), [f"{row['member']}: {row['mechanism']}" for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(visible=False, axis="y")
        for k in range(1, len(rows)):
            if rows[k]["member"] != rows[k - 1]["member"]:
                axes.axhline(k - 0.5, color=colours["grid"], linewidth=1)
    for k, row in enumerate(rows):
        right.text(
            1.01,
            k,
            row["word"],
            transform=right.get_yaxis_transform(),
            va="center",
            color="#b3261e" if row["word"] == "dead" else colours["fg"],
        )
