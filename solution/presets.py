"""The presets, as data: what each member of `giant`, `compact`, `tiny` and `ntire26` is made of, and where the others are.

`preset("compact", "global")` is a `MemberConfig`; `python -m solution.train --preset compact --member global` trains it.
"""

from __future__ import annotations

from dataclasses import replace

from solution.config import (
    DINOV2_IN_CLIP,
    MEMBERS,
    AdapterConfig,
    AugmentConfig,
    ClipArch,
    DegradationConfig,
    Dinov2Arch,
    FaceConfig,
    LayersConfig,
    MemberConfig,
    OptimConfig,
    QtfpConfig,
    SamplingConfig,
    StreamConfig,
    TopkConfig,
    TowerConfig,
    TrainConfig,
    ViewConfig,
    VlaforgeConfig,
    VoteConfig,
    require,
)
from solution.preset_dinov3 import dinov3
from solution.preset_gend import gend

# A gathering that starts distinct and far from uniform, and time to find something before RAAL pulls it to the CLS map.
QTFP_LIVE = QtfpConfig(
    heads=2,
    key_width=64,
    query_std=0.2,
    weight_scope="picture",
    diversity=0.1,
    raal_warmup=1000,
)


def _dinov2_giant() -> TowerConfig:
    # The commit of facebook/dinov2-giant that has safetensors: 1.14 B parameters, 4,546,005,432 bytes.
    return TowerConfig(
        "dinov2-giant",
        "dinov2",
        Dinov2Arch(),
        source="facebook/dinov2-giant",
        revision="611a9d42f2335e0f921f1e313ad3c1b7178d206d",
        sha256="917d3c470db999d32a312f8542149be91c7cbac61ee8fb4b67ae3d82b79ce21f",
        licence="apache-2.0",
    )


def _clip_large(statistics: str = "clip", text: bool = True) -> TowerConfig:
    arch = ClipArch() if text else ClipArch(text_layers=0)
    name = "clip-vit-l14" if text else "clip-vit-l14-image"
    return TowerConfig(
        name,
        "clip",
        arch,
        source="timm/vit_large_patch14_clip_224.openai",
        revision="18d0535469bb561bf468d76c1d73aa35156c922b",
        statistics=statistics,
        sha256="9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e",
        licence="mit",
    )


def _giant(member: str) -> MemberConfig:
    if member in ("global", "face"):
        view = ViewConfig("image", 256, 252)
        if member == "face":
            view = ViewConfig("face", 256, 252, growth="area")
        return MemberConfig(member, view, _dinov2_giant())
    if member == "fusion":
        optim = OptimConfig(lr=1e-6, warmup_steps=50)
        train = TrainConfig(epochs=13, accumulate=8, head_epochs=3)
        view = ViewConfig("image", 224, 224)
        clip = _clip_large(text=False)
        return MemberConfig("fusion", view, _dinov2_giant(), clip=clip, optim=optim, train=train)
    if member == "qtfp":
        optim = OptimConfig(lr=2e-4, schedule="constant", warmup_steps=0)
        train = TrainConfig(batch=16, accumulate=1)
        adapter = AdapterConfig("effort", rank=1, dropout=0.0)
        tower = _clip_large(text=False)
        return MemberConfig(
            "qtfp",
            ViewConfig("face", 224, 224),
            tower,
            adapter,
            qtfp=QTFP_LIVE,
            optim=optim,
            train=train,
        )
    require(member == "vlaforge", f"the preset giant has no member {member!r}")
    optim = OptimConfig(lr=2e-5, schedule="constant", warmup_steps=0)
    train = TrainConfig(epochs=60, steps_per_epoch=300, batch=32, accumulate=1)
    view = ViewConfig("face", 256, 256)  # the ForgePerceiver sees 256 px; the member resizes that to CLIP's 224 itself
    sampling = SamplingConfig(frames=32)
    augment = AugmentConfig(self_blend_p=0.25)
    return MemberConfig(
        "vlaforge",
        view,
        _clip_large(),
        AdapterConfig("none"),
        optim=optim,
        train=train,
        sampling=sampling,
        augment=augment,
    )


COMPACT_SIDE = 168  # px: 12 x 12 patches
# px: 11 x 11 patches for `global`, whose tower was trained at COMPACT_SIDE: it knows the generators of its training less by
# how their pictures were resized, and others more (weights/RESULTS.md, "How large a member sees").
GLOBAL_SIDE = 154
TIGHT_SIDE = 196  # px: 14 x 14 patches of a tight crop, on which the tower of `face` is trained
FACE_SIDE = 126  # px: 9 x 9 patches of the same crop; at TIGHT_SIDE `face` finds no more, for twice and a half the time
# px: 8 x 8 patches. The tower of `face` at this side says other things than at COMPACT_SIDE (rank correlation .75).
SMALL_SIDE = 112
# Blocks left of twelve, by tower. Of a tower trained whole, the last ones know the generators that it was trained on, and
# what stands before them tells more of others (weights/RESULTS.md, "Where a tower is cut"); `fusion`'s second tower tells as
# much after eight as after twelve.
CUT_BLOCKS = {"global": 11, "face": 10, "semantic": 8}
VLAFORGE_BLOCKS = 9  # of those ten, what `vlaforge` reads
SMALLEST_FACE = 0.002  # of the picture, in `compact`: 43 px in a frame of 1280 x 720
# A head on a frozen tower: the shorter it is trained, the better it finds generators that it was not trained on.
HEAD_ALONE = {
    "optim": OptimConfig(lr=1e-3, head_lr=1e-3, weight_decay=0.05, decoupled=True, warmup_steps=20, final_lr=0.0),
    "train": TrainConfig(epochs=1, batch=32, max_steps=150, accumulate=1, average=0.98),
    "stream": StreamConfig(focal_gamma=0.0, spread=True),
}
# What makes whole faces in the data that `compact` was trained on: their forgery mask is the face.
COMPACT_GENERATED = (
    "stylegan1",
    "mobilestylegan",
    "stylegan2_tpdne",
    "stylegan_generatedphotos_like",
    "sd21",
    "sdxl",
    "flux1_schnell",
)


def _compact_tower(name: str) -> TowerConfig:
    """A DINOv2 ViT-S/14, or what `CUT_BLOCKS` leaves of one, that the bundle brings."""
    arch = Dinov2Arch(width=384, layers=CUT_BLOCKS.get(name, 12), heads=6, mlp_ratio=4, swiglu=False)
    return TowerConfig(f"s14-{name}", "dinov2", arch, source="bundle")


def _compact_clip(of: str, side: int, *, text: bool) -> TowerConfig:
    """The tower `s14-OF` in open_clip's layout at `side` px; the text tower, where there is one, is small and learned."""
    arch = ClipArch(
        width=384,
        layers=CUT_BLOCKS.get(of, 12),
        heads=6,
        patch=14,
        image_side=side,
        embed_dim=256,
        **DINOV2_IN_CLIP,
        text_width=128,
        text_layers=4 if text else 0,
        text_heads=4,
        context=11,  # the prompts' tokens: the member maps its few words to a table of their own
        vocab=12,
    )
    name = "s14-clip" if text else "s14-clip-image"
    return TowerConfig(name, "clip", arch, source=f"bundle:s14-{of}")


def _compact(member: str) -> MemberConfig:
    """Five members: `global` and `qtfp` on towers of their own; `face`, `fusion` and `vlaforge` on one, seen close, from
    further away and small. `tight` trains that one, `wide` that of `global` and `norms` the second tower of `fusion`; all
    three are cut to their first blocks (`weights cut`) before the members are trained on them.
    """
    side = COMPACT_SIDE
    optim = OptimConfig(
        lr=2e-4,
        head_lr=2e-4,
        weight_decay=0.05,
        decoupled=True,
        warmup_steps=50,
        final_lr=0.0,
    )
    train = TrainConfig(epochs=20, batch=128, accumulate=1, average=0.99)
    augment = AugmentConfig(crop_p=0.5, self_blend_p=0.3, colour_p=0.5, sharpness_p=0.3, side=208)
    shared = {
        "optim": optim,
        "train": train,
        "augment": augment,
        "sampling": SamplingConfig(balance="temperature", fully_generated=COMPACT_GENERATED),
        "stream": StreamConfig(focal_gamma=0.0),
        # The training pictures are faces with their surroundings: a frame with a small face is cut down to that framing.
        "face": FaceConfig(margin=1.4, min_area=SMALLEST_FACE, max_area=0.25),
    }
    whole, full, frozen = ViewConfig("face", side, side), AdapterConfig("full"), AdapterConfig("none")
    decayed = replace(optim, layer_decay=0.75)
    if member == "global":
        view = ViewConfig("face", GLOBAL_SIDE, GLOBAL_SIDE)
        return MemberConfig("global", view, _compact_tower("global"), frozen, **shared | HEAD_ALONE)
    if member == "wide":
        return MemberConfig("wide", whole, _compact_tower("wide"), full, kind="global", **shared | {"optim": decayed})
    if member in ("tight", "face"):
        shared |= {
            "face": FaceConfig(margin=1.15, min_area=SMALLEST_FACE),
            "augment": replace(augment, self_blend_p=0.6, crop_p=0.0),
        }
        if member == "face":
            view = ViewConfig("face", FACE_SIDE, FACE_SIDE)
            return MemberConfig("face", view, _compact_tower("face"), frozen, **shared | HEAD_ALONE)
        view = ViewConfig("face", TIGHT_SIDE, TIGHT_SIDE)
        return MemberConfig("tight", view, _compact_tower("tight"), full, kind="face", **shared | {"optim": decayed})
    if member == "norms":
        norm = AdapterConfig("norm")
        shared["optim"] = replace(optim, lr=1e-3)
        return MemberConfig("norms", whole, _compact_tower("norms"), norm, kind="global", **shared)
    if member == "fusion":
        # On the tower of `face`, not of `global`: on that, the trained member said what `global` says (rank correlation
        # .95). Its second phase, LoRA, lost on unseen generators.
        shared["augment"] = replace(augment, self_blend_p=0.5)
        second = _compact_clip("semantic", SMALL_SIDE, text=False)
        return MemberConfig("fusion", whole, _compact_tower("face"), frozen, clip=second, **shared | HEAD_ALONE)
    if member == "qtfp":
        shared["optim"] = replace(decayed, head_lr=5e-4)
        shared["qtfp"] = replace(QTFP_LIVE, readout="each", raal_warmup=500)
        return MemberConfig("qtfp", whole, _compact_tower("qtfp"), full, **shared)
    require(member == "vlaforge", f"the preset compact has no member {member!r}")
    vlaforge = VlaforgeConfig(
        width=96,
        blocks=4,
        queries=32,
        input_side=SMALL_SIDE,
        patch=14,
        decoder_hidden=128,
        decoder_out=64,
        fusion_layers=(1, 4, 8),
        depth=VLAFORGE_BLOCKS,
        train_text=True,
        vla_scale=10.0,
        bias_scale=8.0,
        copy_gain=8.0,
        adapter_after=6,
        adapter_width=96,
        losses="paper, focal",
        w_focal=1.0,
    )
    shared |= {
        "optim": replace(optim, lr=4e-4, head_lr=4e-4),
        "train": replace(train, epochs=3, batch=32, max_steps=200, average=0.98),
        "augment": replace(augment, self_blend_p=0.4),
        "degradation": DegradationConfig(global_p=0.9),
    }
    # On the tower of `face`: over the semantic one it found half as much (AUC .63 instead of .75 on unseen generators).
    # Few steps, as for the others' heads; train.sh trains its maps before, for which they do not suffice.
    tower = _compact_clip("face", SMALL_SIDE, text=True)
    small = ViewConfig("face", SMALL_SIDE, SMALL_SIDE)
    return MemberConfig("vlaforge", small, tower, frozen, vlaforge=vlaforge, **shared)


TINY_SIDE = 56  # px: 4 x 4 patches
# train.sh cuts the first and the last to two, the second to three.
TINY_BLOCKS = {"s14-wide": 3, "s14-tight": 4, "s14-face": 3, "s14-norms": 3}


def _small(tower: TowerConfig) -> TowerConfig:
    """A tower of `compact` with a few thousand weights, under a name of its own."""
    layers = TINY_BLOCKS.get(tower.stored_name, 2)
    size = {"width": 32, "layers": layers, "heads": 2, "image_side": TINY_SIDE}
    if tower.kind == "clip":
        size |= {"embed_dim": 16, "text_width": 16, "text_layers": min(1, tower.arch.text_layers), "text_heads": 2}
    name, source = (text.replace("s14-", "tiny-") for text in (tower.name, tower.source))
    return replace(tower, name=name, source=source, arch=replace(tower.arch, **size))


def _tiny(member: str) -> MemberConfig:
    """`compact` with towers of a few thousand random weights: smoke runs and tests of the whole path; it detects nothing."""
    if member in ("layers", "topk"):
        base, few = _tiny("wide"), LayersConfig(last=2, hidden=8)
        tower = replace(base.tower, name=f"tiny-{member}")
        return replace(base, name=member, kind=member, tower=tower, layers=few, topk=TopkConfig(share=0.25))
    config = _compact(member)
    vlaforge = replace(
        config.vlaforge,
        width=24,
        blocks=3,
        queries=8,
        input_side=64,
        patch=16,
        decoder_hidden=16,
        decoder_out=8,
        fusion_after=(1,),
        fusion_layers=(1,),
        depth=2,
        adapter_after=1,
        adapter_width=24,
    )
    side = vlaforge.input_side if config.tower.kind == "clip" else TINY_SIDE
    train = replace(
        config.train,
        epochs=2,
        batch=4,
        precision="float32",
        head_epochs=min(1, config.train.head_epochs),
        head_warmup_steps=2,
        average=0.5,
    )
    return replace(
        config,
        qtfp=replace(config.qtfp, key_width=8),
        view=replace(config.view, resize=side, side=side),
        tower=_small(config.tower),
        clip=config.clip and _small(config.clip),
        vlaforge=vlaforge,
        optim=replace(config.optim, warmup_steps=2),
        train=train,
    )


def _ntire26(member: str) -> MemberConfig:
    """The published entry: `giant`'s three streams, with ImageNet statistics into CLIP as its weights were trained."""
    config = _giant(member)
    if config.clip is not None:
        config = replace(
            config,
            clip=replace(_clip_large("imagenet", text=False), name="clip-vit-l14-image-ntire26"),
        )
    return config


PRESETS = {
    "giant": _giant,
    "compact": _compact,
    "tiny": _tiny,
    "ntire26": _ntire26,
    "dinov3": dinov3,
    "gend": gend,
}
PRESET_MEMBERS = {
    "giant": MEMBERS,
    "compact": (*MEMBERS, "wide", "tight", "norms"),
    "tiny": (*MEMBERS, "wide", "tight", "norms", "layers", "topk"),
    "ntire26": ("global", "face", "fusion"),
    "dinov3": ("dinov3",),
    "gend": ("gend",),
}
# Where its authors published its weights.
NTIRE26_REPOSITORY = "hf:lpmkhoa/hcmusaqua-ntire26-weights"
NTIRE26_VOTE = VoteConfig({"global": 2, "face": 1, "fusion": 2}, mean="levels_rounded")


def preset(name: str, member: str) -> MemberConfig:
    """The configuration of `member` in the preset `name`, of those in `PRESETS` and `PRESET_MEMBERS`."""
    require(name in PRESETS, f"preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    known = PRESET_MEMBERS[name]
    require(member in known, f"member {member!r} is unknown; the preset {name} has {', '.join(known)}")
    return PRESETS[name](member)
