"""Tell apart the people of a video: the boxes of one face through sampled frames are a track; a cut ends all tracks.

Takes uint8 RGB frames (H, W, 3) and the faces found in each, frames up to a few seconds apart; returns a track number
for every face. A person who comes back after a cut, or who was hidden for long, is a new track: who somebody is, is not
asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from solution.data.faces import overlap
from solution.records import FaceBox

HIDDEN = 2  # sampled frames that a face may be missing from within a track
LEAST_LIKENESS = 0.2  # of two boxes of one face
SMALL = (32, 18)  # px, of the copies that are compared for cuts
# A cut is where neighbouring frames' small copies correlate less and share less of their colours than this: a pan moves
# places (to correlations of 0) but keeps three quarters of the colours, a light that goes on does the opposite.
CUT = (0.85, 0.4)


def scene_starts(pictures: Sequence[np.ndarray]) -> list[bool]:
    """(N,): whether a frame (H, W, 3) uint8 begins a scene. The first does; a pan or a change of light does not."""
    small = [cv2.resize(p, SMALL, interpolation=cv2.INTER_AREA) for p in pictures]
    return [True, *(_cut_between(a, b) for a, b in itertools.pairwise(small))][: len(pictures)]


def _cut_between(before: np.ndarray, after: np.ndarray) -> bool:
    a, b = (
        cv2.GaussianBlur(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY), (5, 5), 0).astype(np.float64) for p in (before, after)
    )
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    if size < 1e-6:
        # One of them is plain: a new scene, unless both are.
        return bool(a.any() or b.any())
    histograms = [
        cv2.calcHist([p], [0, 1, 2], None, [6, 6, 6], [0, 256] * 3) / (SMALL[0] * SMALL[1]) for p in (before, after)
    ]
    shared = float(np.minimum(*histograms).sum())
    correlation = float((a * b).sum()) / size
    return correlation < CUT[0] and shared < CUT[1]


def likeness(a: FaceBox, b: FaceBox) -> float:
    """How alike in place and size two boxes are, 1 for equal ones: the ratio of their areas, less with the distance of
    their centres, 0 from one mean side on. Like an overlap, but not yet 0 for a face that moved by half its width.
    """
    areas = sorted((face.x1 - face.x0) * (face.y1 - face.y0) for face in (a, b))
    sides = [max(face.x1 - face.x0, face.y1 - face.y0) for face in (a, b)]
    apart = float(np.hypot(a.x0 + a.x1 - b.x0 - b.x1, a.y0 + a.y1 - b.y0 - b.y1)) / sum(sides)
    return max(0.0, 1.0 - apart) * areas[0] / max(areas[1], 1e-9)


def track_faces(frames: Sequence[Sequence[FaceBox]], starts: Sequence[bool]) -> list[list[int]]:
    """For each frame's faces the numbers of their tracks, from 1, in the order in which tracks begin, larger ones first.

    starts: `scene_starts` of the frames. Each frame's faces are matched with the tracks of its scene so that likeness
    and overlap sum up to the most (Hungarian assignment); a pair below `LEAST_LIKENESS` is none.
    """
    numbers: list[list[int]] = []
    open_tracks: dict[int, tuple[int, FaceBox]] = {}  # number -> (frame, box) last seen
    count = 0
    for at, (faces, start) in enumerate(zip(frames, starts, strict=True)):
        open_tracks = {n: seen for n, seen in open_tracks.items() if not start and at - seen[0] <= HIDDEN + 1}
        found = _matched(faces, open_tracks)
        by_size = sorted(range(len(faces)), key=lambda i: -_area(faces[i]))
        for i in by_size:
            if i not in found:
                count += 1
                found[i] = count
            open_tracks[found[i]] = (at, faces[i])
        numbers.append([found[i] for i in range(len(faces))])
    return numbers


def _area(face: FaceBox) -> float:
    return (face.x1 - face.x0) * (face.y1 - face.y0)


def _matched(faces: Sequence[FaceBox], tracks: dict[int, tuple[int, FaceBox]]) -> dict[int, int]:
    """Place of a face -> number of the track that it goes on."""
    if not faces or not tracks:
        return {}
    names = list(tracks)
    gains = np.array([[likeness(f, tracks[n][1]) + overlap(f, tracks[n][1]) for n in names] for f in faces])
    allowed = np.array([[likeness(f, tracks[n][1]) >= LEAST_LIKENESS for n in names] for f in faces])
    rows, columns = linear_sum_assignment(np.where(allowed, gains, 0.0), maximize=True)
    return {int(r): names[c] for r, c in zip(rows, columns) if allowed[r, c]}
