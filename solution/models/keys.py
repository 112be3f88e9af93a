"""The one table of names: a library's keys of a tower's weights to our stable keys.

Takes a state dict as a library or a release of weights writes it; returns the same tensors, or views of them, under keys
that stay: `blocks.3.attn.q.weight`. Nothing else in the house knows a library's key.
"""

from __future__ import annotations

import re

import torch

from solution.errors import WeightsError

# Library key -> our stable key, for every layout whose files are met. `None` drops a key that inference never uses.
# Later entries never override earlier ones; a key that nothing matches is an error that names it.
_B = r"blocks.\1."
KEY_TABLE: dict[str, tuple[tuple[str, str | None], ...]] = {
    "dinov2": (
        (r"embeddings\.cls_token", "cls"),
        (r"embeddings\.mask_token", None),
        (r"embeddings\.position_embeddings", "position"),
        (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch.\1"),
        (r"encoder\.layer\.(\d+)\.norm([12])\.(weight|bias)", _B + r"norm\2.\3"),
        (
            r"encoder\.layer\.(\d+)\.attention\.(?:attention\.query|q_proj)\.(weight|bias)",
            _B + r"attn.q.\2",
        ),
        (
            r"encoder\.layer\.(\d+)\.attention\.(?:attention\.key|k_proj)\.(weight|bias)",
            _B + r"attn.k.\2",
        ),
        (
            r"encoder\.layer\.(\d+)\.attention\.(?:attention\.value|v_proj)\.(weight|bias)",
            _B + r"attn.v.\2",
        ),
        (
            r"encoder\.layer\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(weight|bias)",
            _B + r"attn.o.\2",
        ),
        (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", _B + r"scale\2"),
        (
            r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(weight|bias)",
            _B + r"mlp.gate_up.\2",
        ),  # split on load
        (
            r"encoder\.layer\.(\d+)\.mlp\.(?:weights_out|fc2|down_proj)\.(weight|bias)",
            _B + r"mlp.down.\2",
        ),
        (r"encoder\.layer\.(\d+)\.mlp\.gate_proj\.(weight|bias)", _B + r"mlp.gate.\2"),
        (
            r"encoder\.layer\.(\d+)\.mlp\.(?:fc1|up_proj)\.(weight|bias)",
            _B + r"mlp.up.\2",
        ),
        (r"layernorm\.(weight|bias)", r"norm.\1"),
    ),
    "open_clip": (
        (r"visual\.conv1\.(weight|bias)", r"patch.\1"),
        (r"visual\.class_embedding", "cls"),
        (r"visual\.positional_embedding", "position"),
        (r"visual\.ln_pre\.(weight|bias)", r"norm_pre.\1"),
        (r"visual\.ln_post\.(weight|bias)", r"norm.\1"),
        (r"visual\.proj", "proj"),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)",
            _B + r"norm\2.\3",
        ),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)",
            _B + r"attn.qkv.\2",
        ),  # split on load
        (
            r"visual\.transformer\.resblocks\.(\d+)\.attn\.(?:out_proj|o)\.(weight|bias)",
            _B + r"attn.o.\2",
        ),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.attn\.([qkv])\.(weight|bias)",
            _B + r"attn.\2.\3",
        ),
        (r"visual\.transformer\.resblocks\.(\d+)\.ls_([12])\.gamma", _B + r"scale\2"),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)",
            _B + r"mlp.up.\2",
        ),
        (
            r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)",
            _B + r"mlp.down.\2",
        ),
        (r"token_embedding\.weight", "text.token"),
        (r"positional_embedding", "text.position"),
        (
            r"transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)",
            r"text.blocks.\1.norm\2.\3",
        ),
        (
            r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)",
            r"text.blocks.\1.attn.qkv.\2",
        ),
        (
            r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)",
            r"text.blocks.\1.attn.o.\2",
        ),
        (
            r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)",
            r"text.blocks.\1.mlp.up.\2",
        ),
        (
            r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)",
            r"text.blocks.\1.mlp.down.\2",
        ),
        (r"ln_final\.(weight|bias)", r"text.norm.\1"),
        (r"text_projection", "text.proj"),
        (r"logit_scale", None),  # VLAForge's cosine has a scale of its own, `vlaforge.vla_scale`
    ),
    "hf_clip": (
        (r"(?:vision_model\.)?embeddings\.patch_embedding\.weight", "patch.weight"),
        (r"(?:vision_model\.)?embeddings\.class_embedding", "cls"),
        (r"(?:vision_model\.)?embeddings\.position_embedding\.weight", "position"),
        (r"(?:vision_model\.)?embeddings\.position_ids", None),
        (r"(?:vision_model\.)?pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),
        (r"(?:vision_model\.)?post_layernorm\.(weight|bias)", r"norm.\1"),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)",
            _B + r"norm\2.\3",
        ),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)",
            _B + r"attn.\2.\3",
        ),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)",
            _B + r"attn.o.\2",
        ),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)",
            _B + r"mlp.up.\2",
        ),
        (
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.fc2\.(weight|bias)",
            _B + r"mlp.down.\2",
        ),
        (r"visual_projection\.weight", "proj.T"),  # transposed on load
        (
            r"(?:text_model|text_projection)\..*",
            None,
        ),  # only the image tower is read from this layout
        (r"logit_scale", None),
    ),
    # timm's names, and those of `timm_towers`' blocks.
    "timm": (
        (r"cls_token", "cls"),
        (r"reg_token", "registers"),
        (r"pos_embed", "position"),
        (r"patch_embed\.proj\.(weight|bias)", r"patch.\1"),
        (r"norm_pre\.(weight|bias)", r"norm_pre.\1"),
        # Weights for a mean over the patches have their last norm after it.
        (r"(?:fc_)?norm\.(weight|bias)", r"norm.\1"),
        (r"attn_pool\.(.+)", r"pool.\1"),
        (r"rope\.freqs", "rotary"),
        (r"blocks\.(\d+)\.norm([12])\.(weight|bias)", _B + r"norm\2.\3"),
        (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", _B + r"attn.qkv.\2"),  # split on load
        (r"blocks\.(\d+)\.attn\.([qv])_bias", _B + r"attn.\2.bias"),
        (r"blocks\.(\d+)\.attn\.([qkv])(?:_proj)?\.(weight|bias)", _B + r"attn.\2.\3"),
        (r"blocks\.(\d+)\.attn\.(?:proj|o)\.(weight|bias)", _B + r"attn.o.\2"),
        (r"blocks\.(\d+)\.attn\.(q_norm|k_norm|norm)\.(weight|bias)", _B + r"attn.\2.\3"),
        (r"blocks\.(\d+)\.(?:ls|scale)([12])\.gamma", _B + r"scale\2"),
        (r"blocks\.(\d+)\.gamma_([12])", _B + r"scale\2"),
        (r"blocks\.(\d+)\.mlp\.(?:fc1_g|gate)\.(weight|bias)", _B + r"mlp.gate.\2"),
        (r"blocks\.(\d+)\.mlp\.(?:fc1|fc1_x|up)\.(weight|bias)", _B + r"mlp.up.\2"),
        (r"blocks\.(\d+)\.mlp\.norm\.(weight|bias)", _B + r"mlp.norm.\2"),
        (r"blocks\.(\d+)\.mlp\.(?:fc2|down)\.(weight|bias)", _B + r"mlp.down.\2"),
        (r"head\..+|mask_token|blocks\.\d+\.attn\.k_bias|rope\.(?!freqs).+", None),
    ),
}
# A file of timm whose MLPs pack gate and input: split on load.
KEY_TABLE["timm_gated"] = (
    (r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", _B + r"mlp.gate_up.\2"),
    *KEY_TABLE["timm"],
)


def stable_name(key: str, layout: str) -> str | None:
    """Our stable name of the library key `key`, None for a key that is dropped on purpose.

    Raises:
        WeightsError: `key` is in no row of `KEY_TABLE[layout]`.
    """
    for pattern, name in KEY_TABLE[layout]:
        match = re.fullmatch(pattern, key)
        if match:
            return None if name is None else match.expand(name)
    raise WeightsError(
        f"unknown key {key!r} in a {layout} tower; if the library renamed its modules, add the new name to KEY_TABLE"
    )


def to_stable(state: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """A library state dict under our stable names; stacked projections (q/k/v, gate/up) are split into views."""
    result: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        name = stable_name(key, layout)
        if name is None:
            continue
        stem, _, kind = name.rpartition(".")
        if name.startswith("blocks.") and stem.endswith("attn.qkv"):
            parts = dict(zip("qkv", tensor.chunk(3)))
            result |= {f"{stem[:-3]}{role}.{kind}": part for role, part in parts.items()}
        elif stem.endswith("mlp.gate_up"):
            gate, up = tensor.chunk(2)
            result |= {f"{stem[:-7]}gate.{kind}": gate, f"{stem[:-7]}up.{kind}": up}
        elif name == "proj.T":
            result["proj"] = tensor.T
        elif name in ("cls", "position", "registers"):
            result[name] = tensor.reshape(-1) if name == "cls" else tensor.reshape(-1, tensor.shape[-1])
        else:
            result[name] = tensor
    return result


def is_text(key: str) -> bool:
    """Whether a tower's stable key belongs to the text tower or the projections into the joint space."""
    return key.startswith("text.") or key == "proj"


_NORM = r"(blocks\.\d+\.(norm[12]|attn\.(q_norm|k_norm|norm)|mlp\.norm)|norm|norm_pre|pool\.norm)\.(weight|bias)"


def is_norm(key: str) -> bool:
    """Whether a stable key names a LayerNorm's weight or bias in the image part of a tower."""
    return re.fullmatch(_NORM, key) is not None
