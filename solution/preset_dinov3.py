"""The preset `dinov3`: the first place of the NTIRE 2026 challenge (DINO-MAC) on timm's DINOv3 ViT-L/16.

    DATA=manifest.csv PRESET=dinov3 OUT=runs/dinov3 bash train.sh
    python -m solution.train --preset dinov3 --member dinov3 --data manifest.csv --out runs/dinov3

28,323,848 of 331,403,272 parameters train. The tower's weights are under Meta's DINOv3 licence, which binds whoever uses a
member on it; they are fetched from the Hub on first use. Numbers without a note are those of the authors' train.py and
inference.py (github.com/qcf-568/DINOMAC). Not theirs: the degradation engine and sampling are this kit's, since their
pictures and augmentation are not public; their stochastic depth of 0.1 in the frozen tower is left out; their batch of
16 on each of 8 GPUs is gathered by accumulation here.
"""

from __future__ import annotations

from solution.config import (
    AdapterConfig,
    AugmentConfig,
    InferenceConfig,
    LayersConfig,
    MemberConfig,
    OptimConfig,
    TimmArch,
    TowerConfig,
    TrainConfig,
    ViewConfig,
)

# vit_large_patch16_dinov3.lvd1689m; licence, statistics and geometry as timm 1.0.31 has them.
TOWER = TowerConfig(
    "dinov3-l16",
    "timm",
    TimmArch("vit_large_patch16_dinov3", width=1024, layers=24, heads=16, patch=16, image_side=256, prefix=5),
    source="timm/vit_large_patch16_dinov3.lvd1689m",
    licence="dinov3-license",
)


def dinov3(member: str) -> MemberConfig:
    """The member `dinov3`, the only one."""
    side = 384
    return MemberConfig(
        member,
        # The whole picture, squeezed into a square.
        ViewConfig("image", side, side),
        TOWER,
        # On timm's packed qkv, so one down projection for the three.
        AdapterConfig("lora", rank=32, alpha=64.0, dropout=0.05, projections=("q", "k", "v"), shared=True),
        kind="layers",
        # A head of two linear layers with dropout between: inference.py, whose checkpoints have it.
        layers=LayersConfig(last=4, deep=0.25, hidden=1024, dropout=0.2),
        augment=AugmentConfig(side=side),
        optim=OptimConfig(
            lr=1e-4, weight_decay=1e-2, decoupled=True, warmup_steps=512, warmup_start=0.01, final_lr=1e-6
        ),
        train=TrainConfig(epochs=8, batch=16, accumulate=8),
        inference=InferenceConfig(sides=(656,)),
    )
