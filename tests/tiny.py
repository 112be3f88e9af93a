"""Tiny towers, members and bundles with random weights, and pictures and manifests for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage import data as photos

from solution.bundles.bundle import Bundle, write_bundle
from solution.bundles.members import build_member, random_towers, save_member
from solution.config import (
    MEMBERS,
    AdapterConfig,
    ClipArch,
    MemberConfig,
    TimmArch,
    TowerConfig,
    VlaforgeConfig,
    VoteConfig,
)
from solution.models.calibration import Calibrator
from solution.presets import preset

CLIP = ClipArch(
    width=32,
    layers=3,
    heads=4,
    patch=14,
    image_side=56,
    embed_dim=24,
    text_width=16,
    text_layers=2,
    text_heads=2,
)
# Tiny twins of families of timm, by the name of one of each.
TIMM = {
    "dinov3": TimmArch("vit_large_patch16_dinov3", width=48, layers=3, heads=2, patch=8, image_side=32),
    "pe": TimmArch(
        "vit_pe_core_large_patch14_336",
        width=64,
        layers=2,
        heads=2,
        patch=8,
        image_side=32,
        prefix=1,
        pool="attention",
    ),
    "siglip2": TimmArch(
        "vit_large_patch16_siglip_256",
        width=48,
        layers=2,
        heads=2,
        patch=8,
        image_side=32,
        prefix=0,
        pool="attention",
    ),
    "eva02": TimmArch(
        "eva02_large_patch14_clip_224",
        width=48,
        layers=2,
        heads=2,
        mlp_ratio=8 / 3,
        gated=True,
        patch=8,
        image_side=32,
        prefix=1,
    ),
}
VLAFORGE = VlaforgeConfig(
    width=24,
    blocks=4,
    input_side=64,
    queries=8,
    decoder_hidden=16,
    decoder_out=12,
    fusion_layers=(1, 2, 3),
    vla_scale=10.0,
    adapter_after=2,
    adapter_width=20,
)


def timm_tower(family: str) -> TowerConfig:
    """The configuration of a tiny tower of a family in TIMM."""
    return TowerConfig(f"tiny-{family}", "timm", TIMM[family], statistics="half")


def make_member(name: str, seed: int = 0, *, adapted: bool = False, **changes):
    """A member of the tiny preset with changes; `adapted`: its LoRA is moved off zero, so that it does something."""
    config = replace(preset("tiny", name), **changes)
    torch.manual_seed(seed)
    member = build_member(config, random_towers([config]))
    with torch.no_grad():
        for key, value in member.stored_state().items():
            if adapted and key.endswith("lora_B"):
                value.normal_(std=0.2)
    return member


def pack_member(folder: Path, config: MemberConfig) -> Bundle:
    """A bundle of one member with random weights."""
    member = build_member(config, random_towers([config]))
    save_member(member, folder / config.name)
    return write_bundle(folder, [config.name], VoteConfig({config.name: 1}), {})


def bundle_config(name: str) -> MemberConfig:
    """The tiny preset's member; `face`, `qtfp` and `fusion` put LoRA on the tower of `global`, so that a tower is shared.

    `global` brings its tower whole, as `wide` trains it; so does `semantic`, which is no member, as `norms` does. `face`
    having none of its own, `vlaforge` looks through the semantic one.
    """
    if name == "semantic":
        whole = preset("tiny", "norms")
        arch = replace(whole.tower.arch, layers=preset("tiny", "fusion").clip.arch.layers)
        return replace(whole, name=name, tower=replace(whole.tower, name="tiny-semantic", arch=arch))
    config = preset("tiny", name)
    if name == "global":
        whole = preset("tiny", "wide")
        return replace(whole, name=name, tower=replace(whole.tower, name="tiny-global"))
    if name == "vlaforge":
        blocks = bundle_config("semantic").tower.arch.layers
        tower = replace(config.tower, source="bundle:tiny-semantic", arch=replace(config.tower.arch, layers=blocks))
        config = replace(config, tower=tower)
    if name in ("face", "qtfp", "fusion"):
        lora = AdapterConfig("lora", rank=16, alpha=32.0, dropout=0.05)
        config = replace(config, tower=bundle_config("global").tower, adapter=lora)
    return config


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
        config = bundle_config(name)
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


def make_faces(folder: Path, count: int) -> list[str]:
    """`count` cuts of a photograph whose face the detector finds, 0.png and on; their names."""
    names = [f"{index}.png" for index in range(count)]
    for index, name in enumerate(names):
        picture = photos.astronaut()[: 400 - 20 * index, 40 : 440 + 10 * index]
        cv2.imwrite(str(folder / name), picture[:, :, ::-1])
    return names
