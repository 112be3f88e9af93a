"""CLIP models of open_clip by name, for members that need text, and for any other.

Takes a name such as `ViT-B-16/laion2b_s34b_b88k`; returns a `TowerConfig`. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import replace

from solution.config import (
    KINDS,
    STATISTICS,
    AdapterConfig,
    ClipArch,
    MemberConfig,
    TowerConfig,
    UsageError,
)

# What a vision and a text tower of open_clip may ask for; anything else is another architecture.
_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}


def named_clip(name: str) -> TowerConfig:
    """The tower of a pre-trained model of open_clip, `MODEL/TAG`, with its text encoder.

    Raises:
        UsageError: no such model or tag, weights that are not on the Hub, or another architecture than CLIP's own
            (SigLIP and EVA-CLIP have another image tower, tokenizer or projection).
    """
    import open_clip

    model, _, tag = name.partition("/")
    found = open_clip.get_model_config(model)
    if found is None:
        raise UsageError(f"{name}: open_clip has no model {model!r}; see open_clip.list_models()")
    given = open_clip.get_pretrained_cfg(model, tag)
    if not given:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise UsageError(f"{name}: {model} has no weights {tag!r}; expected MODEL/TAG with one of {tags}")
    source = given.get("hf_hub", "").strip("/")
    if source.count("/") != 1:
        raise UsageError(f"{name}: its weights are in no repository of the Hub; name another tag")
    vision, text = found["vision_cfg"], found["text_cfg"]
    other = sorted((set(vision) - _VISION) | (set(text) - _TEXT) | (set(found) & {"custom_text"}))
    if other or not isinstance(vision["layers"], int):
        raise UsageError(
            f"{name}: not CLIP's own architecture ({', '.join(other) or 'ResNet'}); name a ViT of open_clip"
        )
    mean_std = (tuple(given["mean"]), tuple(given["std"]))
    statistics = [key for key, known in STATISTICS.items() if known == mean_std]
    if not statistics:
        raise UsageError(f"{name}: mean and deviation {mean_std}; known: {', '.join(STATISTICS)}")
    arch = ClipArch(
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["width"] // vision.get("head_width", 64),
        mlp_ratio=float(vision.get("mlp_ratio", 4.0)),
        patch=vision["patch_size"],
        image_side=vision["image_size"],
        embed_dim=found["embed_dim"],
        quick_gelu=bool(found.get("quick_gelu") or given.get("quick_gelu")),
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        context=text["context_length"],
        vocab=text["vocab_size"],
    )
    return TowerConfig(name.replace("/", "-"), "clip", arch, source=source, statistics=statistics[0])


def on_clip(config: MemberConfig, tower: TowerConfig) -> MemberConfig:
    """The member on a CLIP tower, which takes pictures of one side alone; without its text encoder where it needs none.

    `vlaforge`'s perceiver then sees as many patches as CLIP, and fuses at the same depths, in proportion.
    """
    side = tower.arch.image_side
    if not KINDS[config.kind].text:
        image = replace(tower, name=f"{tower.name}-image", arch=replace(tower.arch, text_layers=0))
        return replace(config, tower=image, view=replace(config.view, resize=side, side=side))
    own, before = config.vlaforge, config.tower.arch.layers
    side = side // tower.arch.patch * own.patch
    layers = tuple(max(1, round(n * tower.arch.layers / before)) for n in own.fusion_layers)
    vlaforge = replace(own, input_side=side, fusion_layers=layers)
    view = replace(config.view, resize=side, side=side)
    return replace(config, tower=tower, view=view, vlaforge=vlaforge, adapter=AdapterConfig("none"))
