"""Entry: can the files give the label away without a look at the faces?

`python -m solution.studies.shortcuts --data MANIFEST [--split val] [--side 112] [--scores evaluation's scores.csv]`. Per source and
pooled, the AUC of traces that say nothing about a face: of the file as it lies there (bytes, pixels, JPEG quality) and of
the whole picture as members get it, decoded and resized (pixels, bytes as PNG and as JPEG), with bootstrap intervals.
`--scores` adds the ensemble's AUC over all pairs and over pairs whose views compress alike, where that trace is blunt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from solution.config import FaceConfig, ViewConfig
from solution.data.faces import make_view
from solution.data.images import decode_image
from solution.data.manifest import Item, ManifestError, read_manifest
from solution.errors import door
from solution.evaluation import metrics
from solution.studies.tables import read_scores

FILE = ("file bytes", "file pixels", "file JPEG quality")
VIEW = ("view pixels", "view PNG bytes", "view JPEG bytes")
LOSSLESS = 101  # stands above every JPEG quality
STRATA = 10
VIEW_QUALITY = 90  # of the JPEG that every view is written as
# Luminance table of the JPEG standard (ITU T.81, table K.1), row by row; libjpeg scales it by quality.
STANDARD = np.array(
    [
        *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
        *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
        *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
        *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
    ]
)


def jpeg_quality(path: Path) -> int:
    """The libjpeg quality, 1 to 100, whose luminance table is nearest to the file's; `LOSSLESS` where it has none."""
    with Image.open(path) as image:
        tables = getattr(image, "quantization", None)
    if not tables:
        return LOSSLESS
    found = np.sort(np.array(tables[0]))  # some writers store it in zigzag order
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    scaled = np.clip((np.sort(STANDARD) * scale[:, None] + 50) // 100, 1, 255)
    return int(quality[np.abs(scaled - found).sum(axis=1).argmin()])


def traces(item: Item, side: int) -> dict[str, float]:
    """What can be told of the file and of the member's view of it without looking at a face."""
    picture = decode_image(item.path)
    view = make_view(picture, ViewConfig("image", side, side), None, FaceConfig())
    pixels = picture.shape[0] * picture.shape[1]
    png, jpeg = BytesIO(), BytesIO()
    Image.fromarray(view).save(png, "png")
    Image.fromarray(view).save(jpeg, "jpeg", quality=VIEW_QUALITY)
    values = (
        *(item.path.stat().st_size, pixels, jpeg_quality(item.path)),
        *(view.shape[0] * view.shape[1], png.tell(), jpeg.tell()),
    )
    return dict(zip(FILE + VIEW, map(float, values)))


def auc_within(labels: np.ndarray, scores: np.ndarray, strata: np.ndarray) -> float | None:
    """AUC over the pairs (real, fake) of one stratum, all strata together; None without such a pair."""
    right = pairs = 0.0
    for stratum in np.unique(strata):
        rows = strata == stratum
        count = labels[rows].sum() * (1 - labels[rows]).sum()
        if count:
            right += count * metrics.auc(labels[rows], scores[rows])
            pairs += count
    return right / pairs if pairs else None


def read_ensemble(path: Path) -> dict[str, float]:
    """Clean ensemble scores by picture name, from an evaluation's `scores.csv`."""
    table = read_scores(path, words=["image", "condition"], numbers=["ensemble"], what="an evaluation's scores.csv")
    clean = table[table["condition"] == "clean"]
    return dict(zip(clean["image"], clean["ensemble"].tolist()))


def report(
    labels: np.ndarray,
    sources: Sequence[str],
    found: Mapping[str, np.ndarray],
    scores: np.ndarray | None = None,
) -> list[list[str]]:
    """Rows of cells: the pool, its pictures, then per trace `AUC (low to high)`; sources of one class are pooled."""
    of = np.array(sources)
    mixed = [s for s in sorted(set(sources)) if 0 < labels[of == s].mean() < 1]
    rest = sorted(set(sources) - set(mixed))
    pools = {s: of == s for s in mixed}
    if rest:  # reals of one and fakes of another: with all but the largest source, or with that too
        largest = max(mixed, key=lambda s: np.sum(of == s), default="")
        others = sorted(set(sources) - {largest})
        if not 0 < labels[np.isin(of, others)].mean() < 1:
            others = sorted(set(sources))
        if len(others) < len(set(sources)):
            pools["+".join(others)] = np.isin(of, others)
    pools["all"] = np.ones(len(labels), dtype=bool)
    rows = []
    for name, where in pools.items():
        y = labels[where]
        cells = [name, f"{np.sum(y == 0)} + {np.sum(y == 1)}"]
        for values in found.values():
            told = metrics.auc_interval(y, values[where], seed=0)
            cells.append(f"{told.value:.3f} ({told.low:.3f} to {told.high:.3f})")
        if scores is not None:
            size = found["view JPEG bytes"][where]
            edges = np.quantile(size, np.linspace(0, 1, STRATA + 1)[1:-1])
            alike = auc_within(y, scores[where], np.searchsorted(edges, size))
            told = "-" if alike is None else f"{alike:.3f}"
            cells += [f"{metrics.auc(y, scores[where]):.3f}", told]
        rows.append(cells)
    return rows


@door("shortcuts", refused=(ValueError,))
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 usage, 3 an unreadable picture."""
    parser = argparse.ArgumentParser(prog="python -m solution.studies.shortcuts", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="manifest")
    parser.add_argument("--split", default="val")
    parser.add_argument("--side", type=int, default=112, help="px of the member's view")
    parser.add_argument("--scores", type=Path, help="scores.csv of an evaluation")
    args = parser.parse_args(argv)
    items, lost = read_manifest(args.data, split=args.split)
    if lost.dropped:
        print(lost.summary(), file=sys.stderr)
    scores = None
    if args.scores is not None:
        known = read_ensemble(args.scores)
        if missing := [i.name for i in items if i.name not in known]:
            raise ManifestError(
                f"{args.scores}: no clean score of {len(missing)} pictures of {args.data}, e.g. {missing[0]}; "
                "evaluate the same split"
            )
        scores = np.array([known[item.name] for item in items])
    each = [traces(item, args.side) for item in tqdm(items, unit="picture")]
    labels = np.array([item.label for item in items])
    found = {name: np.array([t[name] for t in each]) for name in FILE + VIEW}
    rows = report(labels, [item.source for item in items], found, scores)
    head = ["source", "real + fake", *found]
    if scores is not None:
        head += ["ensemble", "ensemble, views alike"]
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
