"""Entry: where vlaforge sees the forgery, on self-blended fakes of held-out real faces, in figures and pictures.

`python -m solution.studies.localize --weights BUNDLE --data MANIFEST --out DIR`. Takes the manifest's real pictures (of
`--split`), makes a fake of each with its mask, and compares the member's localisation map with the mask. Leaves in DIR
`localization.json` and pictures of fake, mask, localisation map and vision-language map side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from solution.config import MemberConfig
from solution.data.faces import share_locators
from solution.data.manifest import Item, ManifestError, draw_items, read_manifest
from solution.data.self_blend import side_by_side
from solution.errors import UsageError, door
from solution.evaluation import metrics
from solution.evaluation.conditions import degraded_conditions
from solution.evaluation.measure import CLEAN, Condition

# What needs torch is imported inside functions: --help answers at once.
if TYPE_CHECKING:
    from solution.bundles.bundle import Bundle
    from solution.models.member import Member

# Of a member's evidence: what is compared with the mask, and what is drawn beside it where there is one.
MAPS = ("localization", "vla")
THRESHOLD = 0.5  # of map and mask, for the intersection over union


@dataclass(frozen=True)
class Blend:
    """One held-out face twice, as the member sees it: views (side, side, 3) uint8, and the fake's mask (side, side)."""

    name: str
    real: np.ndarray
    fake: np.ndarray
    mask: np.ndarray


def blends(items: Sequence[Item], config: MemberConfig, how: Condition, seed: int) -> Iterator[Blend]:
    """Every item and a fake of it, drawn from (seed, name) alone, under a condition (see `blended_twins`)."""
    from solution.data.views import View
    from solution.studies.blends import blended_twins

    locators = share_locators([config.face])  # for the blend, where the member needs none
    views = [View(config.view, config.face if config.view.source == "face" else None)]
    for item in items:
        (real,), (fake,), (mask,) = blended_twins(item, views, locators, how, seed)
        yield Blend(item.name, real, fake, mask)


def maps_of(member: Member, views: Sequence[np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (B,) and, of `MAPS`, what the member has at the views' size, each (B, side, side) in [0, 1].

    Raises:
        UsageError: a member without a localisation map.
    """
    import torch
    from torch.nn import functional as F

    images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        output = member(images.to(member.tower.mean.device))
        maps = {
            name: F.interpolate(m, images.shape[-2:], mode="bilinear", align_corners=False)
            for name, m in output.evidence.items()
            if name in MAPS
        }
    if MAPS[0] not in maps:
        has = ", ".join(output.evidence) or "none"
        raise UsageError(f"member {member.config.name} has no map {MAPS[0]!r} to compare with a mask; its maps: {has}")
    return output.logit.cpu().numpy(), {n: m[:, 0].cpu().numpy() for n, m in maps.items()}


def compare(map_: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Intersection over union above 0.5, and the AUC of its pixels, of a map and a mask (H, W).

    The AUC is nan for a mask that leaves no pixel on one side of 0.5.
    """
    found, true = map_ > THRESHOLD, mask > THRESHOLD
    union = (found | true).sum()
    overlap = float((found & true).sum() / union) if union else 1.0
    if true.all() or not true.any():
        return overlap, float("nan")
    return overlap, metrics.auc(true.ravel().astype(int), map_.ravel())


def measure(member: Member, faces: Iterator[Blend], out: Path, *, batch: int, pictures: int) -> dict[str, float]:
    """Compare every localisation map with its mask, draw the first `pictures`, and return the figures by name."""
    overlaps, aucs, false, fakes, reals = [], [], [], [], []
    pending: list[Blend] = []

    def flush() -> None:
        logits, maps = maps_of(member, [b.fake for b in pending])
        real_logits, real_maps = maps_of(member, [b.real for b in pending])
        fakes.extend(logits), reals.extend(real_logits)
        false.extend((real_maps[MAPS[0]] > THRESHOLD).mean(axis=(1, 2)))
        for i, blend in enumerate(pending):
            overlap, area = compare(maps[MAPS[0]][i], blend.mask)
            overlaps.append(overlap), aucs.append(area)
            if len(overlaps) <= pictures:
                panel = side_by_side(blend.fake, blend.mask, *(maps[name][i] for name in MAPS if name in maps))
                _write(out / f"{len(overlaps):03d}.png", panel)
        pending.clear()

    for blend in faces:
        pending.append(blend)
        if len(pending) == batch:
            flush()
    if pending:
        flush()
    labels = np.repeat([0, 1], len(fakes))
    return {
        "pictures": len(fakes),
        "iou_mean": float(np.mean(overlaps)),
        "iou_median": float(np.median(overlaps)),
        "pixel_auc_mean": float(np.nanmean(aucs)),
        "pixel_auc_median": float(np.nanmedian(aucs)),
        "forged_area_on_real_pictures": float(np.mean(false)),
        "auc_fake_against_real": metrics.auc(labels, np.array([*reals, *fakes])),
    }


def localizer(bundle: Bundle, wanted: str | None) -> str:
    """The name of the member whose map is compared: `wanted`, or the only one that trains with what was forged.

    Raises:
        UsageError: there is no such member, or several and none was named.
    """
    able = [name for name, config in bundle.configs.items() if config.needs_masks]
    if wanted is None and len(able) == 1:
        return able[0]
    if wanted in able:
        return wanted
    found = f"{bundle.name}: members that localize are {', '.join(able) or 'none'}"
    raise UsageError(f"{found}; --member names one" if wanted is None else f"--member {wanted}: {found}")


def _write(path: Path, picture: np.ndarray) -> None:
    if not cv2.imwrite(str(path), picture[:, :, ::-1]):
        raise OSError(f"{path}: cannot be written")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m solution.studies.localize",
        description="Compare vlaforge's localisation map with the masks of self-blended fakes of held-out real faces.",
    )
    add = parser.add_argument
    add("--weights", required=True, help="a bundle with a member that localizes: vlaforge")
    add("--member", help="its name, where the bundle has several")
    add("--data", type=Path, required=True, help="a manifest; its real pictures serve")
    add("--out", type=Path, required=True, help="a folder for figures and pictures")
    add("--split", default="val", help="rows of the manifest (default val)")
    add("--count", type=int, default=200, help="how many faces, drawn by --seed")
    add("--pictures", type=int, default=16, help="how many are drawn as pictures")
    add("--degraded", action="store_true", help="degrade the pictures first")
    add("--batch", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    return parser.parse_args(argv)


@door("localize")
def main(argv: list[str] | None = None) -> int:
    """Measure and draw; exit codes: 0 done, 2 usage, 3 environment, weights or an unreadable picture."""
    args = parse(argv)
    from solution.bundles.bundle import load_members
    from solution.bundles.store import open_bundle
    from solution.data.degradation import use_one_opencv_thread
    from solution.models.devices import pick_device

    device = pick_device(args.device)
    use_one_opencv_thread()
    items, _ = read_manifest(args.data, split=args.split)
    items = [item for item in items if item.label == 0]
    if not items:
        raise ManifestError(f"{args.data}: no real picture of split {args.split!r}")
    chosen = draw_items(items, args.count, args.seed)
    bundle = open_bundle(args.weights)
    name = localizer(bundle, args.member)
    member = load_members(bundle, [name], device=device)[name]
    args.out.mkdir(parents=True, exist_ok=True)
    how = degraded_conditions([args.seed])[0] if args.degraded else CLEAN
    faces = blends(chosen, member.config, how, args.seed)
    figures = measure(member, faces, args.out, batch=args.batch, pictures=args.pictures)
    record = {
        "bundle": bundle.hash,
        "data": args.data.name,
        "split": args.split,
        "seed": args.seed,
        "degraded": args.degraded,
        **figures,
    }
    (args.out / "localization.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
