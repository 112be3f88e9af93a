"""Bundles of tiny members with random weights, and pictures for them, for tests of scoring."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch

from solution.bundles.bundle import Bundle, write_bundle
from solution.bundles.members import build_member, random_towers, save_member
from solution.config import MEMBERS, VoteConfig
from solution.models.calibration import Calibrator
from solution.presets import preset


def make_bundle(
    folder: Path,
    members: tuple[str, ...] = MEMBERS,
    *,
    vote: VoteConfig | None = None,
    seed: int = 0,
) -> Bundle:
    """Members whose adapters do something and whose logits differ from picture to picture."""
    torch.manual_seed(seed)
    # The towers that others share, or are laid out anew from, are stored with the members that train them.
    for name in dict.fromkeys(("global", "semantic", *members)):
        config = preset("tiny", name)
        member = build_member(config, random_towers([config]))
        with torch.no_grad():
            for key, value in member.stored_state().items():
                if key.endswith(("lora_B", "lora_A")):
                    value.normal_(std=0.2)
                elif key.startswith("own.") and value.is_floating_point():
                    value.mul_(3)
                elif key.startswith("tower.") and key.endswith("weight"):
                    value.mul_(2)
        save_member(member, folder / name)
    calibrators = {name: Calibrator("temperature", (0.5,)) for name in members}
    vote = vote or VoteConfig({name: 1 + i % 2 for i, name in enumerate(members)})
    return write_bundle(folder, members, vote, calibrators)


def make_pictures(folder: Path, count: int, *, side: int = 64, seed: int = 0) -> Path:
    """`count` different PNGs, 00000.png and on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{index:05d}.png"), image)
    return folder
