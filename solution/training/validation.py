"""Validation within training: which pictures, what a member makes of them, and the numbers that choose its best weights.

Takes `Item`s and a `Member`; gives logits (N,) float64 in their order, and AUCs by condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from solution.config import DegradationConfig, MemberConfig
from solution.data.manifest import DropReport, Item, ManifestError, draw_items, manifest_splits, read_manifest
from solution.data.training import ValidationViews, readable, validation_loader
from solution.evaluation.metrics import auc, auc_by_source
from solution.models.member import Member
from solution.training.processes import Machine


def validation_pictures(
    data: Path, config: MemberConfig, told: DropReport, *, limit: int, machine: Machine
) -> tuple[list[Item], DropReport]:
    """The readable pictures to validate on, at most `limit` of each split (a fixed draw; 0: all), and what was left out.

    Those of the splits `val` (generators that occur in training, other pictures) and `unseen` (other generators).
    told: what reading the training pictures has left out already.

    Raises:
        ManifestError: not both classes in one of them.
        UnreadableInput: a picture cannot be read, under `sampling.on_unreadable=fail`.
    """
    items, lost = [], DropReport()
    present = manifest_splits(data)
    for split in [split for split in ("val", "unseen") if split in present]:
        part, left_out = read_manifest(data, split=split)
        items += draw_items(part, limit, config.train.validation_seed)
        lost.take(left_out, told)
    how = {"workers": machine.workers, "progress": machine.tells}
    items = readable(items, config.sampling.on_unreadable, lost, **how)
    for split in sorted({"val", *(item.split for item in items if item.split == "unseen")}):
        labels = [item.label for item in items if (item.split == "unseen") == (split == "unseen")]
        if len(set(labels)) < 2:
            drawn = f" of the {limit} that --validation-limit draws; raise it" if limit else ""
            raise ManifestError(
                f"{data}: the {split} split needs real and fake pictures, found {labels.count(0)} real and "
                f"{labels.count(1)} fake{drawn}; name the splits train and val in a column or by folders, or give either "
                "class pictures of more than one video or sub-folder"
            )
    return items, lost


def score_items(
    member: Member, items: Sequence[Item], degradation: DegradationConfig | None, *, machine: Machine, bf16: bool
) -> np.ndarray:
    """Logits (N,) of pictures, clean (None) or degraded; leaves the member in evaluation mode."""
    train, device = member.config.train, machine.device
    views = ValidationViews(items, member.config, degradation, train.validation_seed)
    loader = validation_loader(views, batch=2 * train.batch, workers=machine.workers)
    member.eval()
    logits = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for images in tqdm(loader, desc="validation", leave=False, disable=not machine.progress):
            logits.append(member.judge(images.to(device)).float().cpu())
    return torch.cat(logits).double().numpy()


def split_aucs(items: Sequence[Item], logits: dict[str, np.ndarray]) -> dict[str, float]:
    """AUC by condition on seen and (where the items have that split) unseen generators, and the mean of all.

    Seen: over all pictures. Unseen: the mean over sources that have both classes; the rest is one source more.
    """
    labels = np.array([item.label for item in items])
    unseen = np.array([item.split == "unseen" for item in items])
    sources = np.array([item.source for item in items])
    found = {}
    for name, values in logits.items():
        found[name] = auc(labels[~unseen], values[~unseen])
        if unseen.any():
            found[f"unseen_{name}"] = auc_by_source(labels[unseen], values[unseen], sources[unseen])
    return found | {"mean": sum(found.values()) / len(found)}
