"""Say a score in a word (`fake`, `real`, `unsure`, `no_face`, `failed`) and what the threshold behind it is worth.

Takes scores in [0, 1], the vote's threshold and band, and what a bundle's report measured at it; returns words and plain
JSON values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from solution.bundles.bundle import Bundle
from solution.config import VoteConfig
from solution.scoring.files import SidecarRow
from solution.scoring.vote import decide

LEAST_SIDE = 32  # px, of a face that can decide
LEAST_PART = 0.1  # of the largest face's area, of the longest track's frames
# What run.json says of how the score of several people comes about.
RULES = {
    "one": "the face that stands for the picture; of a video, the person with the largest summed area",
    "all": f"the most fake-looking face, or track of a video, of those large enough: {LEAST_SIDE} px wide and high, a "
    f"{LEAST_PART:g} of the largest one's area and of the longest track's frames; each further face is another chance of "
    "a false alarm",
}
NOBODY_LOOKED = -1  # for faces: no member needs any, or there is no detector


def verdict_of(score: float, vote: VoteConfig, found: int) -> str:
    """The word for the score of something that could be read; found: how many faces are in it, or `NOBODY_LOOKED`.

    Where no face was found the score says nothing, and the word is `no_face`.
    """
    return "no_face" if found == 0 else str(decide(np.array([score]), vote)[0])


def deciding(rows: Sequence[SidecarRow]) -> SidecarRow:
    """The row of the face or track that decides for all: the most fake-looking of those large enough.

    Large enough: the box's shorter side has `LEAST_SIDE` px, its area a tenth of the largest one's, and of tracks their
    number of frames a tenth of the longest one's; where none is, all are. Ties go to the first row.
    """
    sizes = [(row.face[2] - row.face[0], row.face[3] - row.face[1]) for row in rows]
    lengths = [row.track.frames if row.track else 1 for row in rows]
    largest, longest = max(w * h for w, h in sizes), max(lengths)
    enough = [
        row
        for row, (w, h), length in zip(rows, sizes, lengths)
        if min(w, h) >= LEAST_SIDE and w * h >= LEAST_PART * largest and length >= LEAST_PART * longest
    ]
    return max(enough or rows, key=lambda row: row.score)


def threshold_record(bundle: Bundle, vote: VoteConfig) -> dict[str, Any]:
    """What run.json says of the threshold: where it lies, the false alarms it was set for, and those measured at it.

    `asked`: the share of real pictures that the threshold may call fake; `measured`: false alarms and fakes found by
    condition, and `by_source` false alarms by source of real pictures, from the bundle's report, `on` these pictures,
    by `protocol`. None where the bundle does not say, and where `vote` is not the bundle's own: its figures are none of
    another vote.
    """
    own = vote == bundle.vote
    report = bundle.report if own else {}
    at = report.get("at_threshold", {})
    measured = {name: rates for name, rates in at.items() if isinstance(rates, Mapping) and "false_alarms" in rates}
    return {
        "threshold": vote.threshold,
        "unsure": vote.unsure,
        "asked": vote.false_alarm if own else None,
        "measured": measured or None,
        "by_source": at.get("false_alarms_by_source"),
        "on": report.get("fitted_on"),
        "protocol": report.get("protocol"),
    }


def band(record: Mapping[str, Any]) -> tuple[float, float]:
    """Of a `threshold_record`: the score below which the word is `real`, and that from which it is `fake`."""
    return record["threshold"] - record["unsure"], record["threshold"] + record["unsure"]


def rule(record: Mapping[str, Any]) -> str:
    """Which score gets which word."""
    low, high = band(record)
    if low == high:
        return f"Fake at {high:.3g} or above, else real."
    return f"Fake from {high:.3g}, real below {low:.3g}, between them unsure."


def meaning(record: Mapping[str, Any]) -> str:
    """A `threshold_record` in a few sentences."""
    threshold, text = record["threshold"], rule(record)
    if record["asked"] is not None:
        text += f" Set so that of the real pictures it was fitted on at most {100 * record['asked']:.3g} in 100 are above {threshold:.3g}."
    if not record["measured"]:
        return f"{text} How often real pictures are called fake was not measured for this vote."
    each = "; ".join(f"{name.replace('_', ' ')}: {_rates(rates)}" for name, rates in record["measured"].items())
    text += f" Measured: {each}."
    if record["by_source"]:
        source, rate = max(record["by_source"].items(), key=lambda pair: pair[1])
        text += f" Of the worst source of real pictures, {source}, {rate:.1%} are above {threshold:.3g}."
    return f"{text} On: {record['on'] or 'not stated'}."


def rates_in_words(record: Mapping[str, Any]) -> str:
    """False alarms and misses of a `threshold_record` in one plain sentence."""
    measured = list((record["measured"] or {}).values())
    if not measured:
        return "How often it errs was not measured."
    if all("called" in rates for rates in measured):
        alarms = [rates["called"]["real"]["fake"] for rates in measured]
        misses = [rates["called"]["fake"]["real"] for rates in measured]
        said = "were taken for fakes", "passed unnoticed"
    else:
        alarms = [rates["false_alarms"] for rates in measured]
        misses = [1 - rates["fakes_found"] for rates in measured if rates.get("fakes_found") is not None]
        said = f"scored {record['threshold']:.3g} or above", "scored less"
    text = f"Of 100 real pictures {_spread(alarms)} {said[0]}"
    if misses:
        text += f", of 100 fakes {_spread(misses)} {said[1]}"
    return f"{text}, by generator and by how degraded the pictures were."


def _spread(rates: Sequence[float]) -> str:
    """From the lowest to the highest, of 100."""
    low, high = (f"{100 * rate:.0f}" for rate in (min(rates), max(rates)))
    return low if low == high else f"{low} to {high}"


def _rates(rates: Mapping[str, Any]) -> str:
    """What is called what, where the report says; else (an older bundle's) what lies above the threshold."""
    if "called" in rates:
        return ", ".join(
            f"of {kind} pictures {words['fake']:.1%} called fake, {words['unsure']:.1%} unsure"
            for kind, words in rates["called"].items()
        )
    words = {"false_alarms": "of the real above the threshold", "fakes_found": "of the fakes"}
    return ", ".join(f"{rates[name]:.1%} {said}" for name, said in words.items() if rates.get(name) is not None)
