"""Every number's place: frozen dataclasses that check themselves; to and from JSON and `--set`. The presets: presets.py.

A `MemberConfig` describes one member completely: what it sees, its tower and adapter, its losses, and how it is
trained. It is saved beside the weights as JSON and read back from there; a bundle never depends on today's presets.
Unknown fields fail. `override(config, ["optim.lr=1e-5"])` types each value by its field.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field, replace
from typing import Any

from solution.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """What a kind of member needs, whatever its name: rooms ask for these, never for a name.

    masks: it trains with what was forged. second_tower: a frozen CLIP beside its own tower. text: its own tower is a CLIP
    with a text encoder, and sees a view of any side. spares_parameters: a step may leave some of them without a gradient.
    """

    masks: bool = False
    second_tower: bool = False
    text: bool = False
    spares_parameters: bool = False


KINDS = {
    "global": Kind(),
    "face": Kind(),
    "fusion": Kind(second_tower=True),
    # Only `global`, `face` and `fusion` read what a timm tower pools by attention.
    "qtfp": Kind(spares_parameters=True),
    "vlaforge": Kind(masks=True, text=True, spares_parameters=True),
    "layers": Kind(spares_parameters=True),
    "topk": Kind(spares_parameters=True),
}
# The five of the shipped bundle; `layers` and `topk` are what other entries are made of.
MEMBERS = ("global", "face", "fusion", "qtfp", "vlaforge")
# Of Score-CAM, unless all are asked for.
SCORE_CAM_CHANNELS = 64
# Table (b) of arXiv 2604.25889, in its order; the index of an op is its number there.
OPS = (
    "blur",
    "motion_blur",
    "sensor_noise",
    "resize",
    "colour",
    "gaussian_noise",
    "jpeg",
    "chroma_subsampling",
    "banding",
    "exposure",
    "chromatic_aberration",
    "moire",
    "glitch",
    "vignette",
    "distractor",
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
# Mean and deviation of a tower's input, RGB in [0, 1].
STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class ConfigError(UsageError):
    """A configuration that cannot be: the message names the field, what was found and what is allowed."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition`."""
    if not condition:
        raise ConfigError(message)


# ---------------------------------------------------------------------------------------------------- what it sees
@dataclass(frozen=True)
class ViewConfig:
    """The square picture a member sees.

    `image`: the whole picture. `face`: the square face crop, or the whole picture when no face is found or it is smaller
    or larger than `FaceConfig` asks.
    Resized to `resize` x `resize` (area when shrinking, `growth` when growing, untouched when equal), then the centre
    `side` x `side` is cut out without resampling. growth: `cubic`, or `area`, as the published face crop has it.
    """

    source: str = "image"
    resize: int = 256
    side: int = 252
    growth: str = "cubic"

    def __post_init__(self) -> None:
        require(
            self.source in ("image", "face"),
            f"view.source is {self.source!r}; allowed: image, face",
        )
        require(self.growth in ("cubic", "area"), f"view.growth is {self.growth!r}; allowed: cubic, area")
        require(
            0 < self.side <= self.resize,
            f"view.side {self.side} must lie in 1..view.resize ({self.resize})",
        )


@dataclass(frozen=True)
class FaceConfig:
    """Face location and choice (arXiv 2604.25889); `margin`, `lead` and `min_area` are the published ones.

    The published detector was RetinaFace at 0.9; YuNet's scores are lower. Measured by `python -m solution.benchmark
    faces` on 300 validation faces and on 270 face-free pictures and tiles, both under the engine: at 0.9 85.7 % found
    and 0 false, at 0.8 92.3 % and 1, at 0.7 93.3 % and 4, at 0.6 93.7 % and 4 (but 9 against 2 on clean ones). Where
    there is a large face, what is found is that face at every threshold, so a miss costs more than a false find: 0.7.
    """

    score_threshold: float = 0.7
    margin: float = 1.3  # side of the square crop / longer side of the box
    lead: float = 0.02  # the top-scoring face wins outright by this lead
    min_area: float = 1.0 / 9.0  # of the picture; a smaller face keeps the whole picture
    max_area: float = 1.0  # of the picture; a larger face frames it well enough
    search_side: int = 320  # px, longer side of the searched copy; as good as 512, twice as fast
    retry_sigma: float = 2.0  # px of the searched copy; noise hides a face, blur does not

    def __post_init__(self) -> None:
        require(
            0 < self.score_threshold < 1,
            f"face.score_threshold is {self.score_threshold}; it must lie in (0, 1)",
        )
        require(
            0 <= self.min_area <= self.max_area <= 1,
            f"face.min_area {self.min_area} and face.max_area {self.max_area} must rise within [0, 1]",
        )
        for name in ("margin", "search_side", "retry_sigma"):
            value = getattr(self, name)
            require(value > 0, f"face.{name} is {value}; it must be positive")


# ---------------------------------------------------------------------------------------------------- towers
@dataclass(frozen=True)
class Dinov2Arch:
    """Geometry of a DINOv2 tower; the defaults are facebook/dinov2-giant."""

    width: int = 1536
    layers: int = 40
    heads: int = 24
    mlp_ratio: int = 4
    swiglu: bool = True
    patch: int = 14
    image_side: int = 518  # of the stored position grid; other sides interpolate it

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token."""
        return 1

    @property
    def gated(self) -> bool:
        """Whether its MLPs have a gate."""
        return self.swiglu


@dataclass(frozen=True)
class ClipArch:
    """Geometry of a CLIP model as open_clip builds it; the defaults are ViT-L/14 (OpenAI).

    `text_layers` = 0 builds no text tower.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    patch: int = 14
    image_side: int = 224
    embed_dim: int = 768
    quick_gelu: bool = True
    layer_scale: bool = False
    pre_norm: bool = True
    norm_eps: float = 1e-5
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    context: int = 77
    vocab: int = 49408

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token."""
        return 1

    @property
    def gated(self) -> bool:
        """Whether its MLPs have a gate."""
        return False


# What makes the image part of a `ClipArch` a DINOv2 tower (`towers.dinov2_as_clip`).
DINOV2_IN_CLIP: dict[str, Any] = {"quick_gelu": False, "layer_scale": True, "pre_norm": False, "norm_eps": 1e-6}


@dataclass(frozen=True)
class TimmArch:
    """A vision transformer of timm: its name there and its geometry; the defaults are DINOv3 ViT-L/16.

    What is not here (rotary or learned positions, inner norms, LayerScale) follows from the name. `timm_towers.named_tower`
    reads all of it off the library, and building a tower checks it.
    prefix: class token and registers. pool: what stands for the whole picture: the class `token`, the model's own
    `attention` pooling, or the `mean` of the patches.
    """

    model: str = "vit_large_patch16_dinov3"
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    gated: bool = False
    patch: int = 16
    image_side: int = 256  # of learned positions; other sides interpolate them
    prefix: int = 5
    pool: str = "token"

    def __post_init__(self) -> None:
        allowed = ("token", "attention", "mean")
        require(self.pool in allowed, f"tower.arch.pool is {self.pool!r}; allowed: {', '.join(allowed)}")
        require(
            self.pool != "token" or self.prefix > 0, "tower.arch.pool=token needs a class token; tower.arch.prefix is 0"
        )


# The geometry of each kind of tower.
ARCHS = {"dinov2": Dinov2Arch, "clip": ClipArch, "timm": TimmArch}


@dataclass(frozen=True)
class TowerConfig:
    """One tower. Members of a bundle that name the same tower share it.

    kind: `dinov2` (transformers), `clip` (open_clip) or `timm` (any vision transformer of timm with pre-norm blocks).
    source: where its untrained weights are public: a Hub repository (`facebook/dinov2-giant`) with its `revision`,
        `bundle` for a tower trained by us that travels in the bundle, or `bundle:OTHER` for a CLIP image tower that is
        the bundle's DINOv2 tower OTHER in open_clip's layout (the text tower is then the member's own), or
        `random:SEED` for random weights of that seed, in rehearsals where no Hub is to be had: such a tower knows nothing.
    statistics: the normalisation applied to its input: `imagenet`, `clip`, or `half` (mean and deviation 0.5).
    licence: of its public weights, which binds whoever uses a member on it; empty where it is not stated.
    """

    name: str
    kind: str
    arch: Dinov2Arch | ClipArch | TimmArch
    source: str = "bundle"
    revision: str = ""
    statistics: str = "imagenet"
    sha256: str = ""  # of the weights file in that repository, checked when it arrives
    licence: str = ""

    def __post_init__(self) -> None:
        wanted = ARCHS
        require(
            self.kind in wanted,
            f"tower.kind is {self.kind!r}; allowed: {', '.join(wanted)}",
        )
        require(
            isinstance(self.arch, wanted[self.kind]),
            f"tower {self.name}: kind {self.kind} needs a {wanted[self.kind].__name__}, found {type(self.arch).__name__}",
        )
        require(
            self.statistics in STATISTICS,
            f"tower.statistics is {self.statistics!r}; allowed: {', '.join(STATISTICS)}",
        )
        require(
            self.arch.width % self.arch.heads == 0,
            f"tower {self.name}: width is no multiple of heads",
        )

    @property
    def travels(self) -> bool:
        """Whether its weights travel in the bundle: no public repository has them."""
        return self.source.partition(":")[0] == "bundle"

    @property
    def public(self) -> bool:
        """Whether its weights come from a public repository rather than the bundle or a seed."""
        return not self.travels and self.seed is None

    @property
    def seed(self) -> int | None:
        """Of a tower of random weights; None: its weights are somebody's."""
        kind, _, text = self.source.partition(":")
        if kind != "random":
            return None
        require(text.isdigit(), f"tower {self.name}: source {self.source!r}; expected random:SEED, SEED a whole number")
        return int(text)

    @property
    def derived_from(self) -> str:
        """The DINOv2 tower of the bundle whose image weights a CLIP takes; empty: its weights are its own."""
        return self.source.partition(":")[2] if self.travels else ""

    @property
    def stored_name(self) -> str:
        """The tower whose file holds this one's image weights: itself, or the one that it is derived from."""
        return self.derived_from or self.name


@dataclass(frozen=True)
class AdapterConfig:
    """How a tower is adapted.

    `none`: frozen. `lora`. `effort` (QTFP's: the residual rank-`rank` part of each projection). `norm`: the LayerNorms'
    weights and biases alone (GenD, WACV 2026). `full`: the whole tower.
    shared: q, k and v have LoRA's down projection in common, which is LoRA on the packed `qkv` of timm.
    """

    kind: str = "lora"
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.15
    projections: tuple[str, ...] = ("q", "k", "v", "o")
    shared: bool = False

    def __post_init__(self) -> None:
        kinds = ("none", "lora", "effort", "norm", "full")
        require(
            self.kind in kinds,
            f"adapter.kind is {self.kind!r}; allowed: {', '.join(kinds)}",
        )
        require(self.rank > 0, f"adapter.rank is {self.rank}; it must be positive")
        require(
            0 <= self.dropout < 1,
            f"adapter.dropout is {self.dropout}; it must lie in [0, 1)",
        )
        require(
            set(self.projections) <= set("qkvo"),
            f"adapter.projections {self.projections}: only q, k, v, o",
        )
        require(
            not self.shared or (self.kind == "lora" and set("qkv") <= set(self.projections)),
            f"adapter.shared is of lora on q, k and v; found {self.kind} on {', '.join(self.projections)}",
        )


# ---------------------------------------------------------------------------------------------------- members
@dataclass(frozen=True)
class StreamConfig:
    """The DINOv2 streams (arXiv 2604.25889). Focal loss, gamma 2, alpha 1; the fusion head's shape."""

    focal_gamma: float = 2.0
    focal_alpha: float = 1.0
    fusion_hidden: int = 512
    fusion_dropout: float = 0.2
    normalize: bool = False  # global, face: the head reads features at length one (GenD)
    spread: bool = False  # it reads each feature's standard deviation over the patches beside the class token (ours)


@dataclass(frozen=True)
class LayersConfig:
    """`layers`: tokens of the last blocks, a head for each (first place of NTIRE 2026, github.com/qcf-568/DINOMAC).

    last: how many blocks. deep: weight of the summed cross-entropies of all heads but the last block's, which is the one
    that scores. hidden: width between a head's two linear layers; 0: one layer. dropout: between them.
    """

    last: int = 4
    deep: float = 0.25
    hidden: int = 1024
    dropout: float = 0.2

    def __post_init__(self) -> None:
        require(self.last > 0, f"layers.last is {self.last}; it must be positive")
        require(self.deep > 0, f"layers.deep is {self.deep}; it must be positive (one head alone is the kind global)")
        require(self.hidden >= 0, f"layers.hidden is {self.hidden}; it cannot be negative")
        require(0 <= self.dropout < 1, f"layers.dropout is {self.dropout}; it must lie in [0, 1)")


@dataclass(frozen=True)
class TopkConfig:
    """`topk`: every patch has a logit, and the picture the mean of its highest ones (multiple-instance learning).

    share: of the patches, rounded, at least one.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"topk.share is {self.share}; it must lie in (0, 1]")


@dataclass(frozen=True)
class FeatureLossConfig:
    """Weights of losses on any member's pooled features at length one, beside the member's own; 0: none.

    uniformity and alignment: Wang and Isola, ICML 2020; alignment is between pictures of one class, as in GenD (WACV
    2026). contrast: supervised contrastive (Khosla et al., NeurIPS 2020) at `temperature`. Each is of one process's
    micro-batch.
    """

    uniformity: float = 0.0
    alignment: float = 0.0
    contrast: float = 0.0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name in ("uniformity", "alignment", "contrast"):
            value = getattr(self, name)
            require(value >= 0, f"features.{name} is {value}; it cannot be negative")
        require(self.temperature > 0, f"features.temperature is {self.temperature}; it must be positive")


@dataclass(frozen=True)
class InferenceConfig:
    """How often a picture is looked at when it is scored; the logits are averaged.

    sides: px; none: the view's own. The largest is cut from the picture, the others are made from it smaller. mirrored:
    each mirrored too. Every look costs a whole forward, one of k times the side k^2 times the patches.
    """

    sides: tuple[int, ...] = ()
    mirrored: bool = False

    def __post_init__(self) -> None:
        require(all(side > 0 for side in self.sides), f"inference.sides {self.sides}: they must be positive")
        require(len(set(self.sides)) == len(self.sides), f"inference.sides {self.sides}: one stands twice")

    @property
    def looks(self) -> int:
        """Forwards for one picture."""
        return max(1, len(self.sides)) * (2 if self.mirrored else 1)


@dataclass(frozen=True)
class QtfpConfig:
    """QTFP (CVPR 2026); what the paper leaves open is marked `ours`.

    The defaults build the paper's plain form and are what a saved configuration without a field means; the presets ask
    for `presets.QTFP_LIVE` instead.
    pool: `queries`, or `cls` for the ablation's base.
    key_width: channels of the learned key projection per head (ours); 0: none, the paper's attention.
    query_std: of the starting queries' entries. With a key projection their length has no effect, and this only sets how
        fast they turn.
    readout: `mean` classifies the mean of the gathered tokens (paper), `each` sums one linear head a query (ours).
    weight_scope: what delta is standardised over before it weights a patch in FLCL: the `picture` or the real pictures
        of the `batch`.
    diversity: weight of the penalty on queries that look alike at fakes (ours); 0: none.
    raal_reference: whose CLS attention aligns: the tower's as `adapted` (detached), or the `pretrained` one's.
    raal_warmup: steps without RAAL; its weight then rises over as many again (ours). 0: full from the first, which makes
        queries CLS-like before they have found anything, and then they stay that. About a quarter of the training.
    """

    queries: int = 4
    query_std: float = 0.02
    heads: int = 1  # 1: the paper's attention; more: multi-head variant
    pool: str = "queries"
    flcl: float = 0.14
    raal: float = 1.0
    temperature: float = 0.1
    weight_temperature: float = 1.0  # tau_w
    ema_decay: float = 0.99
    chunk: int = 0  # rows of the similarity matrix computed at once; 0: all
    raal_reference: str = "adapted"
    key_width: int = 0
    readout: str = "mean"
    weight_scope: str = "batch"
    diversity: float = 0.0
    raal_warmup: int = 0

    def __post_init__(self) -> None:
        choices = {
            "pool": ("queries", "cls"),
            "raal_reference": ("adapted", "pretrained"),
            "readout": ("mean", "each"),
            "weight_scope": ("picture", "batch"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(
                value in allowed,
                f"qtfp.{name} is {value!r}; allowed: {', '.join(allowed)}",
            )
        require(
            self.queries > 0 and self.heads > 0 and self.query_std > 0,
            "qtfp.queries, qtfp.heads and qtfp.query_std must be positive",
        )
        require(
            self.key_width == 0 or self.key_width >= self.queries,
            f"qtfp.key_width is {self.key_width}; it must be 0, or at least qtfp.queries ({self.queries}) for distinct starts",
        )
        require(
            self.diversity >= 0 and self.raal_warmup >= 0,
            f"qtfp.diversity {self.diversity} and qtfp.raal_warmup {self.raal_warmup} cannot be negative",
        )


@dataclass(frozen=True)
class VlaforgeConfig:
    """VLAForge (CVPR 2026, arXiv 2603.24454): ForgePerceiver, modulated class tokens, identity-aware scoring.

    vla_channel: what weighs the perceiver's maps in the local score: A_VLA's fake channel as it is (`raw`), or after the
        softmax over real and fake (`softmax`: files written before this field existed; it dies in training).
    vla_scale: A_VLA is this number times a cosine, so fake minus real stays within twice it. The released code has
        100 times an unbounded inner product. 30 fits a frozen text tower, whose two sentences hardly differ; where the
        text tower is learned (`train_text`) they move apart, and 10 does.
    vla_norm: whether the patches in the joint space are standardised channel by channel (ours). Without it their common
        part fills the cosine, and where the text is learned the two sentences fall into one within twenty steps.
    bias_scale: the learned factor of the attention biases, at the start; they begin with about half of it as their
        spread over the patches, in the nats of an attention score.
    copy_gain: how much the global head sees a copy's difference from the class token enlarged; 1 as published. A tower
        trained whole on this task has so steady a class token that a bias of spread 1 moves a copy by a ninth of
        what another picture does, and a trained head does not notice; `compact` enlarges it.
    depth: blocks of CLIP that the picture and the copies of its class token pass; 0: all. Of a tower trained whole on
        this task the last ones know the generators that it was trained on.
    adapter: the released code's change of CLIP's patches (preset `code`): after block `adapter_after` (1-based), through
        `adapter_width` channels, added back at `adapter_share`.
    """

    width: int = 192
    blocks: int = 8
    heads: int = 3
    patch: int = 16
    input_side: int = 256  # pixels the ForgePerceiver sees; CLIP sees view.side resized to its own side
    queries: int = 128
    decoder_hidden: int = 256
    decoder_out: int = 128
    fusion_after: tuple[int, ...] = (
        1,
        2,
        3,
    )  # ForgePerceiver blocks (1-based) after which CLIP tokens are fused in
    fusion_layers: tuple[int, ...] = (
        1,
        8,
        15,
    )  # CLIP layers (1-based) whose tokens are fused
    alpha: float = 0.5
    train_text: bool = False  # compact: no pre-trained text tower exists, so it is learned
    vla_channel: str = "raw"
    vla_scale: float = 30.0
    vla_norm: bool = True
    bias_scale: float = 2.0
    copy_gain: float = 1.0
    depth: int = 0
    adapter: bool = False
    adapter_after: int = 11
    adapter_width: int = 192
    adapter_share: float = 0.05
    losses: str = "paper"  # which preset the weights below came from, for the record
    w_global: float = 1.0
    w_local: float = 1.0
    w_localization: float = 1.0
    w_dice: float = 1.0
    w_focal: float = 0.0
    w_orthogonality: float = 1.0
    w_intra: float = 0.0
    w_clip: float = 0.0
    contrast_temperature: float = 0.5
    patch_forged_share: float = 0.1

    def __post_init__(self) -> None:
        require(
            len(self.fusion_after) == len(self.fusion_layers),
            "vlaforge.fusion_after and vlaforge.fusion_layers differ in length",
        )
        require(
            self.input_side % self.patch == 0,
            "vlaforge.input_side must be a multiple of vlaforge.patch",
        )
        require(
            0 <= self.alpha <= 1,
            f"vlaforge.alpha is {self.alpha}; it must lie in [0, 1]",
        )
        require(
            self.queries >= 4,
            f"vlaforge.queries is {self.queries}; the heads need 4",
        )
        require(
            self.width % self.heads == 0,
            "vlaforge.width must be a multiple of vlaforge.heads",
        )
        require(
            all(1 <= n <= self.blocks for n in self.fusion_after),
            f"vlaforge.fusion_after {self.fusion_after} must lie in 1..{self.blocks}",
        )
        require(
            self.vla_channel in ("raw", "softmax"),
            f"vlaforge.vla_channel is {self.vla_channel!r}; allowed: raw, softmax",
        )
        require(
            1 <= self.vla_scale <= 100,
            f"vlaforge.vla_scale is {self.vla_scale}; it must lie in [1, 100]",
        )
        require(
            self.bias_scale > 0 and self.copy_gain > 0,
            "vlaforge.bias_scale and vlaforge.copy_gain must be positive",
        )
        require(self.depth >= 0, f"vlaforge.depth is {self.depth}; it must be a number of blocks, or 0 for all of them")
        require(
            self.adapter_after > 0 and self.adapter_width > 0,
            "vlaforge.adapter_after and vlaforge.adapter_width must be positive",
        )


VLAFORGE_LOSSES = {
    "paper": {},
    "code": {
        "losses": "code",
        "adapter": True,
        "w_global": 10.0,
        "w_local": 10.0,
        "w_localization": 200.0,
        "w_dice": 100.0,
        "w_focal": 100.0,
        "w_orthogonality": 1.0,
        "w_intra": 20.0,
        "w_clip": 10.0,
    },
}


# ---------------------------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class DegradationConfig:
    """The extreme compound engine (arXiv 2604.25889).

    `strength` None draws s ~ Beta(beta, beta) anew for each op; a number fixes it (severity sweeps).
    `growth` bounds the working picture at this multiple of the input side.
    """

    global_p: float = 0.5
    op_p: float = 0.3
    cycle_p: float = 0.3
    cycles: tuple[int, int] = (1, 5)
    beta: float = 1.2
    strength: float | None = None
    ops: tuple[str, ...] = OPS
    distractor_p: float = 0.15
    text_p: float = 0.9
    jpeg_quality: tuple[int, int] = (10, 95)
    noise_sigma: float | None = None  # of 255: fixes the level of gaussian_noise (sweeps)
    growth: float = 2.0

    def __post_init__(self) -> None:
        for name in ("global_p", "op_p", "cycle_p", "distractor_p", "text_p"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"degradation.{name} is {value}; it must lie in [0, 1]")
        if self.strength is not None:
            require(
                0 <= self.strength <= 1,
                f"degradation.strength is {self.strength}; it must lie in [0, 1]",
            )
        unknown = set(self.ops) - set(OPS)
        require(
            not unknown,
            f"degradation.ops: unknown {sorted(unknown)}; known: {', '.join(OPS)}",
        )
        low, high = self.jpeg_quality
        require(
            1 <= low <= high <= 100,
            f"degradation.jpeg_quality is {self.jpeg_quality}; it must rise within 1..100",
        )
        require(
            1 <= self.cycles[0] <= self.cycles[1],
            f"degradation.cycles is {self.cycles}",
        )
        require(
            self.noise_sigma is None or self.noise_sigma >= 0,
            f"degradation.noise_sigma is {self.noise_sigma}; it cannot be negative",
        )
        require(
            self.growth >= 1,
            f"degradation.growth is {self.growth}; it must be at least 1",
        )


@dataclass(frozen=True)
class AugmentConfig:
    """Geometric augmentation, before the degradation engine, on picture and mask together."""

    flip_p: float = 0.5
    rotate_p: float = 0.5
    rotate_degrees: float = 10.0
    crop_p: float = 0.0  # random square crop of at least `crop_min` of the side
    crop_min: float = 0.8
    # Share of a batch's fake slots that take a real face and blend it with itself (label 1, with a mask).
    self_blend_p: float = 0.0
    # Look, of both classes alike: brightness, contrast, saturation and hue; and sharper or softer.
    colour_p: float = 0.0
    sharpness_p: float = 0.0
    # px; pictures are brought to this square before augmentation and engine, as the challenge's are.
    side: int = 256

    def __post_init__(self) -> None:
        shares = (
            "flip_p",
            "rotate_p",
            "crop_p",
            "self_blend_p",
            "colour_p",
            "sharpness_p",
        )
        for name in shares:
            value = getattr(self, name)
            require(0 <= value <= 1, f"augment.{name} is {value}; it must lie in [0, 1]")
        require(
            0 < self.crop_min <= 1,
            f"augment.crop_min is {self.crop_min}; it must lie in (0, 1]",
        )
        require(
            0 <= self.rotate_degrees <= 180,
            f"augment.rotate_degrees is {self.rotate_degrees}; it must lie in [0, 180]",
        )
        require(self.side > 0, f"augment.side is {self.side}; it must be positive")


@dataclass(frozen=True)
class SamplingConfig:
    """Which pictures make an epoch, and in which proportion.

    balance: `none` shuffles; `balanced` forces half real, half fake in every batch; `temperature` also draws a source
        of n pictures with weight n ** (1 - temperature): 1 draws sources alike, 0 as they are.
    paired: a fake is drawn together with a real picture of its group (the manifest's column), where there is one, and a
        self-blended one with the picture that it is made of; pairs are in one batch.
    cap, drop: per source and class, as `SOURCE/real=VALUE` or `SOURCE/fake=VALUE`: at most so many pictures; a share
        dropped at random (seeded, fixed over the run).
    leave_out: generators whose fakes are left out of training: what a picture by a generator nobody knew would meet.
    frames: at most so many frames of one video.
    """

    balance: str = "balanced"
    temperature: float = 0.5
    cap: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    frames: int = 8
    fully_generated: tuple[str, ...] = ()  # generators that make whole faces: their forgery mask is the face region
    on_unreadable: str = "fail"  # or `drop`: counted, reported
    paired: bool = False

    def __post_init__(self) -> None:
        allowed = ("none", "balanced", "temperature")
        require(
            self.balance in allowed,
            f"sampling.balance is {self.balance!r}; allowed: {', '.join(allowed)}",
        )
        require(
            not self.paired or self.balance != "none", "sampling.paired needs sampling.balance balanced or temperature"
        )
        require(
            self.on_unreadable in ("fail", "drop"),
            f"sampling.on_unreadable is {self.on_unreadable!r}",
        )
        require(self.frames > 0, f"sampling.frames is {self.frames}; it must be positive")
        require(
            0 <= self.temperature <= 1,
            f"sampling.temperature is {self.temperature}; it must lie in [0, 1]",
        )


@dataclass(frozen=True)
class OptimConfig:
    """Adam, linear warm-up from 1 % of the rate, cosine to `final_lr`, stepped per optimizer step."""

    lr: float = 5e-6
    head_lr: float = 0.0  # 0: the same rate as the adapter
    layer_decay: float = 1.0  # each deeper-to-shallower block multiplies its rate by this (full fine-tuning)
    weight_decay: float = 5e-4
    decoupled: bool = False  # True: AdamW
    warmup_steps: int = 200
    warmup_start: float = 0.01
    schedule: str = "cosine"  # or `constant`
    final_lr: float = 1e-6
    clip_norm: float = 0.0  # 0: no clipping

    def __post_init__(self) -> None:
        require(
            self.schedule in ("cosine", "constant"),
            f"optim.schedule is {self.schedule!r}",
        )
        require(self.lr > 0, f"optim.lr is {self.lr}; it must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """The loop. `batch` pictures a process and step, `accumulate` steps an optimizer step."""

    epochs: int = 10
    # Optimizer steps of an epoch, whatever the data's size; 0: as many as the data fills.
    steps_per_epoch: int = 0
    batch: int = 32
    accumulate: int = 16
    max_steps: int = 0  # optimizer steps of a phase; 0: as many as its epochs make
    validate_every: int = 0  # optimizer steps; 0: once an epoch
    save_every: int = 200  # optimizer steps between resumable checkpoints
    seed: int = 0
    precision: str = "auto"  # `bf16`, `float32`; auto: bf16 on a GPU, float32 else
    grad_checkpointing: bool = False
    head_epochs: int = 0  # first phase that trains the head alone (fusion: 3)
    head_lr: float = 1e-4
    head_warmup_steps: int = 500
    validation_seed: int = 7  # of the degraded validation pictures
    # Decay of an average over the steps' weights, which is what is validated and saved; 0: the last step's weights.
    average: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.precision in ("auto", "bf16", "float32"),
            f"train.precision is {self.precision!r}",
        )
        require(
            self.batch > 0 and self.accumulate > 0,
            "train.batch and train.accumulate must be positive",
        )
        require(self.epochs > 0, f"train.epochs is {self.epochs}; it must be positive")
        require(
            0 <= self.average < 1,
            f"train.average is {self.average}; it must lie in [0, 1)",
        )
        require(
            self.steps_per_epoch >= 0,
            f"train.steps_per_epoch is {self.steps_per_epoch}; it cannot be negative",
        )


@dataclass(frozen=True)
class MemberConfig:
    """One member, complete.

    name: its own in a bundle: letters, digits, `-` and `_`. kind: which class it is, one of KINDS; empty: its name.
    """

    name: str
    view: ViewConfig
    tower: TowerConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    clip: TowerConfig | None = None  # fusion: the frozen second tower
    face: FaceConfig = field(default_factory=FaceConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    qtfp: QtfpConfig = field(default_factory=QtfpConfig)
    vlaforge: VlaforgeConfig = field(default_factory=VlaforgeConfig)
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kind: str = ""
    layers: LayersConfig = field(default_factory=LayersConfig)
    topk: TopkConfig = field(default_factory=TopkConfig)
    features: FeatureLossConfig = field(default_factory=FeatureLossConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", self.name)
        require(
            self.kind in KINDS,
            f"member {self.name!r} has the kind {self.kind!r}; known: {', '.join(KINDS)}",
        )
        require(
            re.fullmatch(r"[A-Za-z0-9_-]+", self.name) is not None,
            f"member name {self.name!r}: letters, digits, - and _ only",
        )
        needs = KINDS[self.kind]
        require(
            needs.text or self.view.side % self.tower.arch.patch == 0,
            f"{self.name}: view.side {self.view.side} is no multiple of the tower's patch {self.tower.arch.patch}",
        )
        require(
            needs.second_tower == (self.clip is not None),
            f"{self.name}: `clip` belongs to the fusion member alone",
        )
        require(
            not needs.text or self.tower.kind == "clip",
            "vlaforge needs a CLIP tower with its text encoder",
        )
        self._check_inference()
        require(
            not self.sampling.paired or self.train.batch % 2 == 0,
            f"{self.name}: sampling.paired needs an even train.batch, found {self.train.batch}",
        )
        require(
            self.kind != "layers" or self.layers.last <= self.tower.arch.layers,
            f"{self.name}: layers.last is {self.layers.last}; the tower has {self.tower.arch.layers} blocks",
        )

    def _check_inference(self) -> None:
        towers = [tower for tower in (self.tower, self.clip) if tower is not None]
        for tower in towers if self.inference.sides else ():
            require(tower.kind != "clip", f"{self.name}: inference.sides; {tower.name} takes pictures of one side")
            for side in self.inference.sides:
                patch = tower.arch.patch
                require(side % patch == 0, f"{self.name}: inference.sides has {side}, no multiple of the patch {patch}")

    @property
    def seen(self) -> ViewConfig:
        """What is cut from a picture that is scored: the view, or at the largest of `inference.sides`."""
        if not self.inference.sides:
            return self.view
        side = max(self.inference.sides)
        return replace(self.view, resize=round(self.view.resize * side / self.view.side), side=side)

    @property
    def stores_tower(self) -> bool:
        """Whether a whole tower is stored with it: one trained whole, or one of ours whose LayerNorms were tuned.

        Of a public tower with tuned LayerNorms, these alone are stored, with the member.
        """
        return self.adapter.kind == "full" or (self.adapter.kind == "norm" and self.tower.travels)

    @property
    def needs_masks(self) -> bool:
        """Whether it trains with masks of what was forged."""
        return KINDS[self.kind].masks

    @property
    def needs_faces(self) -> bool:
        """Whether it trains with located faces: it sees them, pictures are blended there, or they bound a mask."""
        return self.view.source == "face" or self.augment.self_blend_p > 0 or self.needs_masks


DISCRETE_MEANS = ("levels", "levels_rounded", "maximum", "noisy_or")


@dataclass(frozen=True)
class VoteConfig:
    """The vote (arXiv 2604.25889).

    weights: votes per member, by name. step: the grid of a level. mean: `levels` (discretized), `levels_rounded`
    (the mean rounded to the grid again: the published entry), `maximum` and `noisy_or` (of levels: one expert may
    speak for all), `probability` or `logit` (no grid).
    threshold: fake at or above; unsure: half-width of the band around it. false_alarm: the share of real pictures that
    the threshold calls fake at most, as a mean over real sources; worst_false_alarm: the same of the worst source.
    """

    weights: dict[str, int]
    step: float = 0.1
    mean: str = "levels"
    threshold: float = 0.5
    unsure: float = 0.0
    false_alarm: float | None = None
    worst_false_alarm: float | None = None

    def __post_init__(self) -> None:
        allowed = (*DISCRETE_MEANS, "probability", "logit")
        require(
            self.mean in allowed,
            f"vote.mean is {self.mean!r}; allowed: {', '.join(allowed)}",
        )
        require(bool(self.weights), "vote.weights is empty; name at least one member")
        require(
            all(w >= 0 for w in self.weights.values()),
            f"vote.weights {self.weights}: votes cannot be negative",
        )
        require(
            sum(self.weights.values()) > 0,
            f"vote.weights {self.weights}: somebody must vote",
        )
        require(0 < self.step <= 1, f"vote.step is {self.step}; it must lie in (0, 1]")

    @property
    def discrete(self) -> bool:
        """Whether members' scores become levels, so that a small change of a logit may change a vote by a step."""
        return self.mean in DISCRETE_MEANS


# ---------------------------------------------------------------------------------------------------- to and from JSON
# What held before a field existed: a file that lacks it was written then.
BUILT_IN = {VlaforgeConfig: {"vla_channel": "softmax", "vla_scale": 100.0, "vla_norm": False}}


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of this room as plain JSON values (tuples become lists)."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """The dataclass `kind` from JSON values; a field that is missing has its default, or what `BUILT_IN` says.

    Raises:
        ConfigError: an unknown or missing field or a value of the wrong type, with its dotted name.
    """
    require(
        isinstance(values, dict),
        f"{where or kind.__name__}: expected an object, found {type(values).__name__}",
    )
    values = BUILT_IN.get(kind, {}) | values
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    require(
        not unknown,
        f"{where or kind.__name__}: unknown field {', '.join(unknown)}; known: {', '.join(hints)}",
    )
    given = {name: _typed(hints[name], value, f"{where}.{name}".strip("."), values) for name, value in values.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"{where or kind.__name__}: {error}") from None


def _typed(hint: Any, value: Any, where: str, siblings: dict[str, Any]) -> Any:
    """`value` (JSON) as the type `hint`; numbers widen from int to float and nothing else is converted."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [o for o in typing.get_args(hint) if o is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        if Dinov2Arch in options:
            hint = ARCHS.get(siblings.get("kind"), ClipArch)
        else:
            hint = options[0]
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        require(
            isinstance(value, list | tuple),
            f"{where}: expected a list, found {value!r}",
        )
        return tuple(_typed(item, v, f"{where}[{i}]", {}) for i, v in enumerate(value))
    if typing.get_origin(hint) is dict:
        item = typing.get_args(hint)[1]
        require(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
        return {k: _typed(item, v, f"{where}.{k}", {}) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    correct = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(correct, f"{where}: expected {hint.__name__}, found {value!r}")
    return value


def override(config: Any, settings: list[str] | tuple[str, ...]) -> Any:
    """`config` with each `dotted.field=value` applied in order, every value typed by its field.

    Lists are comma-separated (`degradation.ops=blur,jpeg`), `none` is None where the field allows it, and
    `vlaforge.losses=paper|code` also sets the weights of that preset.

    Raises:
        ConfigError: a setting without `=`, an unknown field, or a value that does not fit its field.
    """
    values = to_dict(config)
    for setting in settings:
        path, separator, text = setting.partition("=")
        require(bool(separator), f"--set {setting}: expected field=value")
        if path == "vlaforge.losses" and text in VLAFORGE_LOSSES:
            defaults = to_dict(VlaforgeConfig())
            weights = {name: defaults[name] for name in VLAFORGE_LOSSES["code"]}
            values["vlaforge"] |= weights | VLAFORGE_LOSSES[text]
            continue
        *parents, name = path.split(".")
        node, owner = values, config
        for parent in parents:
            _known(owner, parent, path)
            node, owner = node[parent], getattr(owner, parent)
            require(
                dataclasses.is_dataclass(owner),
                f"--set {path}: {parent!r} has no fields",
            )
        _known(owner, name, path)
        hint = typing.get_type_hints(type(owner))[name]
        node[name] = _parse(hint, text, path)
    return from_dict(type(config), values)  # checked once, with all of them in place


def _known(owner: Any, name: str, where: str) -> None:
    known = [f.name for f in dataclasses.fields(owner)]
    require(
        name in known,
        f"--set {where}: unknown field {name!r}; known: {', '.join(known)}",
    )


def _parse(hint: Any, text: str, where: str) -> Any:
    """The text of a `--set` as a value of type `hint`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if text.lower() == "none":
            return None
        hint = next(o for o in typing.get_args(hint) if o is not type(None))
    if typing.get_origin(hint) is tuple:
        return tuple(_parse(typing.get_args(hint)[0], part, where) for part in text.split(",") if part)
    if hint is bool:
        require(
            text.lower() in ("true", "false", "1", "0"),
            f"--set {where}: expected true or false, found {text!r}",
        )
        return text.lower() in ("true", "1")
    require(hint in (int, float, str), f"--set {where}: set the fields inside it one by one")
    try:
        return hint(text)
    except ValueError:
        raise ConfigError(f"--set {where}: expected {hint.__name__}, found {text!r}") from None
