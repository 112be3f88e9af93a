"""Rows with logits to scores and verdicts: calibrated, discretized, voted; of frames, faces and people through a video.

Takes `Scored` rows, gives `SidecarRow`s. No towers, no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from solution.config import VoteConfig
from solution.models.calibration import Calibrator
from solution.scoring.files import SidecarRow, Track
from solution.scoring.journal import Scored
from solution.scoring.verdict import deciding, verdict_of
from solution.scoring.vote import combine, levels

NEUTRAL = 0.5  # the score of what cannot be read


def judge(
    rows: Sequence[Scored],
    vote: VoteConfig,
    calibrators: Mapping[str, Calibrator],
    *,
    video_mean: str = "score",
) -> list[SidecarRow]:
    """Calibrate, discretize and vote: a row per input, in order, and after a video's row those of its frames.

    Where all faces were scored (`Scored.people`), the input's row is that of its deciding face or track (`deciding`), and
    a row per face follows, or a row per track with those of its frames.
    video_mean: `score`: a video's P(fake) and score are the means of its frames'. `logit`: its members' logits are
    averaged first, and then voted on like a picture's. What could not be read gets the neutral score.
    """
    frames = [row for row in rows for _ in row.faces]  # one entry per scored frame or face
    result: list[SidecarRow] = []
    if frames:
        p, grid, scores = _vote(_joined(rows, calibrators), vote, calibrators)
    start = 0
    for row in rows:
        if row.error:
            result.append(SidecarRow(row.name, "failed", row.error, None, {}, {}, NEUTRAL, "failed"))
            continue
        stop = start + len(row.faces)
        of_frames = [
            SidecarRow(
                row.name,
                "ok",
                "",
                face,
                {name: float(p[name][k]) for name in p},
                {name: float(grid[name][k]) for name in grid},
                float(scores[k]),
                verdict_of(float(scores[k]), vote, row.found),
                number,
                who,
            )
            for k, face, number, who in zip(
                range(start, stop),
                row.faces,
                row.frames or [None] * len(row.faces),
                row.people or [None] * len(row.faces),
            )
        ]
        start = stop
        if row.people:
            result += _of_people(row, of_frames, vote, calibrators, video_mean)
        elif row.frames:
            result += [_of_video(row, of_frames, vote, calibrators, video_mean), *of_frames]
        else:
            result += of_frames
    return result


def _of_people(
    row: Scored,
    entries: Sequence[SidecarRow],
    vote: VoteConfig,
    calibrators: Mapping[str, Calibrator],
    video_mean: str,
) -> list[SidecarRow]:
    """The input's row, and after it a row per face, or per track one and those of its frames."""
    if not row.frames:
        return [deciding(entries)._replace(who=None), *entries]
    tracks, result = [], []
    for who in sorted(set(row.people)):
        places = [k for k, other in enumerate(row.people) if other == who]
        frames = [entries[k] for k in places]
        own = row._replace(logits={name: [z[k] for k in places] for name, z in row.logits.items()})
        scores = np.array([frame.score for frame in frames])
        track = Track(
            len(frames),
            frames[0].frame,
            frames[-1].frame,
            float(scores.std()),
            float(np.mean(scores >= vote.threshold)),
        )
        middle = sorted(frames, key=lambda f: (f.face[2] - f.face[0]) * (f.face[3] - f.face[1]))[len(frames) // 2]
        whole = _of_video(own, frames, vote, calibrators, video_mean)
        tracks.append(whole._replace(face=middle.face, who=who, track=track))
        result += [tracks[-1], *frames]
    return [deciding(tracks)._replace(face=None, who=None, track=None), *result]


def _joined(rows: Sequence[Scored], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Logits (frames,) of every scored frame, by member."""
    return {name: np.concatenate([row.logits[name] for row in rows if not row.error]) for name in names}


def _vote(
    logits: Mapping[str, np.ndarray],
    vote: VoteConfig,
    calibrators: Mapping[str, Calibrator],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """P(fake) and level by member, and the vote, each (n,)."""
    p = {name: calibrators[name].apply(values) for name, values in logits.items()}
    known = {name: values for name, values in p.items() if name in vote.weights}
    grid = {name: levels(values, vote.step) for name, values in p.items()}
    return p, grid, combine(known, vote)


def _of_video(
    row: Scored,
    frames: Sequence[SidecarRow],
    vote: VoteConfig,
    calibrators: Mapping[str, Calibrator],
    video_mean: str,
) -> SidecarRow:
    if video_mean == "logit":
        means = {name: np.array([np.mean(z)]) for name, z in row.logits.items()}
        p, grid, scores = _vote(means, vote, calibrators)
        score = float(scores[0])
    else:
        p = {name: np.array([np.mean([f.p_fake[name] for f in frames])]) for name in row.logits}
        grid = {name: levels(values, vote.step) for name, values in p.items()}
        score = float(np.mean([f.score for f in frames]))
    return SidecarRow(
        row.name,
        "ok",
        "",
        None,
        {name: float(values[0]) for name, values in p.items()},
        {name: float(values[0]) for name, values in grid.items()},
        score,
        verdict_of(score, vote, row.found),
    )
