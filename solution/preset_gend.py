"""The preset `gend`: GenD (WACV 2026, arXiv 2508.06248), LayerNorm tuning of timm's Perception Encoder L/14.

    DATA=manifest.csv PRESET=gend OUT=runs/gend bash train.sh
    python -m solution.train --preset gend --member gend --data manifest.csv --out runs/gend

106,498 of 316,104,706 parameters train, 0.03 %. The manifest's column `group` should name the source video of a fake, so that
it meets a real picture of it. PE's weights are under Apache-2.0; they are fetched from the Hub on first use. Numbers
without a note are those of the authors' code (github.com/yermandy/GenD: config.py, exp/wacv_rebuttal.py). Not theirs: this
kit's degradation engine stands for their blur, jitter and JPEG; one cosine of ten epochs for their three of ten with early
stopping.
"""

from __future__ import annotations

from solution.config import (
    AdapterConfig,
    AugmentConfig,
    FaceConfig,
    FeatureLossConfig,
    MemberConfig,
    OptimConfig,
    SamplingConfig,
    StreamConfig,
    TimmArch,
    TowerConfig,
    TrainConfig,
    ViewConfig,
)

# vit_pe_core_large_patch14_336.fb; licence, statistics and geometry as timm 1.0.31 has them. Its positions are learned at
# 336 px and interpolated.
TOWER = TowerConfig(
    "pe-l14-gend",
    "timm",
    TimmArch(
        "vit_pe_core_large_patch14_336",
        width=1024,
        layers=24,
        heads=16,
        patch=14,
        image_side=336,
        prefix=1,
        pool="attention",
    ),
    source="timm/vit_pe_core_large_patch14_336.fb",
    statistics="half",
    licence="apache-2.0",
)


def gend(member: str) -> MemberConfig:
    """The member `gend`, the only one."""
    return MemberConfig(
        member,
        ViewConfig("face", 224, 224),
        TOWER,
        AdapterConfig("norm"),
        kind="global",
        face=FaceConfig(margin=1.3),  # their crops: FF-x1.3
        # A linear head on features at length one, cross-entropy.
        stream=StreamConfig(focal_gamma=0.0, normalize=True),
        features=FeatureLossConfig(uniformity=0.5, alignment=0.1),
        augment=AugmentConfig(flip_p=0.5, rotate_degrees=10.0),
        sampling=SamplingConfig(paired=True, frames=32),
        optim=OptimConfig(lr=3e-4, weight_decay=0.0, decoupled=True, warmup_steps=0, final_lr=1e-6),
        # The losses on features are of whole batches of 512; recomputing the blocks lets one fit a large GPU.
        train=TrainConfig(epochs=10, batch=512, accumulate=1, grad_checkpointing=True),
    )
