"""Entry: fakes whose faces small decoders drew again, of the real training pictures of a manifest.

`python -m solution.studies.reconstruct --data MANIFEST --out DIR`. Trains four autoencoders on the faces of those pictures,
minutes on one core, and writes a fake of each: its face drawn again and blended in, or the whole picture drawn again. Real
and fake then show the same and differ in what a decoder leaves. Leaves in DIR the decoders, pictures (JPEG), masks (PNG)
and `manifest.csv`: the rows of MANIFEST and those of the fakes, to train on. The same call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from solution.data.cropping import inner_square, save_picture
from solution.data.degradation import use_one_opencv_thread
from solution.data.images import VIDEO_SUFFIXES, decode_image, resize_image, stable_seed
from solution.data.manifest import TRAIN, Item, ManifestError, manifest_splits, read_manifest
from solution.data.preparing import COLUMNS, write_manifest
from solution.data.raw import WHOLE
from solution.data.self_blend import self_blend
from solution.errors import door, whole
from solution.presets import preset
from solution.records import FaceBox

# What needs torch is imported inside functions: --help answers at once.
if TYPE_CHECKING:
    from solution.studies.decoders import Autoencoders

MARGIN = 1.3  # side of what a decoder draws / longer side of the face box
SIDES = (96, 128, 160)  # px at which a face is drawn again
WHOLE_P = 0.2  # how often the whole picture is drawn again
LARGEST = 1024  # px, the longer side at which it is
QUALITIES = (84, 90, 95)  # of JPEG


# ------------------------------------------------------------------------------------------------ the fakes
def fake_of(
    image: np.ndarray, face: FaceBox | None, networks: Autoencoders, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """A fake (H, W, 3) uint8, its forgery mask (H, W) in [0, 1] (None: all of it), and the kind of its decoder."""
    from solution.studies.decoders import KINDS, draw_again

    kind = str(rng.choice(list(KINDS), p=[share for _, share in KINDS.values()]))
    side = int(rng.choice(SIDES))
    if face is None or rng.random() < WHOLE_P:
        scale = min(1.0, (side if rng.random() < 0.5 else LARGEST) / max(image.shape[:2]))
        size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
        drawn = draw_again(networks, resize_image(image, *size), kind)
        return resize_image(drawn, *image.shape[1::-1]), None, kind
    x0, y0, x1, y1 = inner_square(face, MARGIN, *image.shape[:2])
    square = draw_again(networks, resize_image(image[y0:y1, x0:x1], side, side), kind)
    drawn = image.copy()
    drawn[y0:y1, x0:x1] = resize_image(square, x1 - x0, y1 - y0)
    return *self_blend(image, face, rng, drawn), kind


def _write_fake(item: Item, face: FaceBox | None, networks: Autoencoders, out: Path, seed: int) -> dict[str, Any]:
    """Write an item's fake, the same at every call, and give its row of the manifest."""
    rng = np.random.default_rng([seed, stable_seed(item.name)])
    # A manifest's name may be a path to anywhere, and no name of a file here.
    own = f"{stable_seed(item.name):08x}-{stable_seed(item.name[::-1]):08x}"
    picture, mask = f"pictures/{own}.jpg", WHOLE
    fake, forged, kind = fake_of(decode_image(item.path), face, networks, rng)
    if forged is not None:
        mask = f"masks/{own}.png"
        save_picture(out / mask, np.rint(forged * 255).astype(np.uint8), [])
    save_picture(out / picture, fake[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.choice(QUALITIES))])
    values = (picture, 1, "reconstructed", TRAIN, f"reconstructed_{kind}", _group(item), mask, "")
    return dict(zip(COLUMNS, values, strict=True))


def _group(item: Item) -> str:
    """A real picture and its fake are of one group: of the manifest's, or of that picture alone."""
    return item.group or f"picture {item.name}"


def _old_row(item: Item, split: str, out: Path) -> dict[str, Any]:
    """The row of a picture of the manifest, its paths relative to `out`."""
    mask = item.mask if item.mask in ("", WHOLE) else os.path.relpath(item.mask, out)
    row = {name: getattr(item, name) for name in ("label", "source", "generator", "video")}
    group = _group(item) if item.label == 0 and split == TRAIN else item.group
    return row | {"path": os.path.relpath(item.path, out), "split": split, "mask": mask, "group": group}


# ------------------------------------------------------------------------------------------------ the door
def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m solution.studies.reconstruct",
        description="Train small decoders on the real training faces of a manifest, and write fakes whose faces they drew.",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a manifest; its real pictures of split train serve")
    add("--out", type=Path, required=True, help="a folder for decoders, fakes and the manifest with both")
    add(
        "--steps",
        type=whole(1),
        default=1700,
        help="of 16 patches, to train the decoders (default 1700: 12 minutes on a core)",
    )
    add("--workers", type=whole(), default=0, help="processes that search faces (default 0)")
    add("--seed", type=whole(), default=0)
    add("--restart", action="store_true", help="train the decoders anew")
    return parser.parse_args(argv)


@door("reconstruct")
def main(argv: list[str] | None = None) -> int:
    """Train and write; exit codes: 0 done, 2 usage, 3 no face detector, no place or an unreadable picture, 130 interrupted."""
    args = parse(argv)
    from tqdm import tqdm

    from solution.data.training import locate_faces
    from solution.studies.decoders import train

    use_one_opencv_thread()
    parts = {
        split: read_manifest(args.data, split=split, videos=True)[0] for split in sorted(manifest_splits(args.data))
    }
    reals = [
        item for item in parts.get(TRAIN, ()) if item.label == 0 and item.path.suffix.lower() not in VIDEO_SUFFIXES
    ]
    if not reals:
        raise ManifestError(f"{args.data}: no real picture of split {TRAIN!r}; the decoders learn from those")
    decoders = args.out / "decoders.pt"
    if args.restart:
        decoders.unlink(missing_ok=True)
    faces = locate_faces(reals, preset("compact", "global"), args.out / "faces.jsonl", workers=args.workers)
    crops = _crops(reals, faces)
    networks = train(crops, args.steps, decoders, seed=args.seed)
    rows = [_write_fake(item, faces[item.name], networks, args.out, args.seed) for item in tqdm(reals, "fakes")]
    old = [_old_row(item, split, args.out) for split, items in parts.items() for item in items]
    write_manifest(args.out / "manifest.csv", [*old, *rows])
    print(f"{args.out / 'manifest.csv'}: {len(old)} rows of {args.data} and {len(rows)} reconstructed fakes")
    return 0


def _crops(items: Sequence[Item], faces: dict[str, FaceBox | None]) -> np.ndarray:
    """(N, SIDE, SIDE, 3) uint8: the faces of the items that have one."""
    from solution.studies.decoders import SIDE

    squares = []
    for item in items:
        if (face := faces[item.name]) is not None:
            image = decode_image(item.path)
            x0, y0, x1, y1 = inner_square(face, MARGIN, *image.shape[:2])
            squares.append(resize_image(image[y0:y1, x0:x1], SIDE, SIDE))
    if not squares:
        raise ManifestError(f"no face in any of {len(items)} real training pictures; the decoders learn from faces")
    return np.stack(squares)


if __name__ == "__main__":
    sys.exit(main())
