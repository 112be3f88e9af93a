"""Import of the checkpoints that the NTIRE 2026 fourth-place entry published, into a bundle.

Takes their three files (`dinov2_252.pth`, `dinov2_252_crop.pth`, `dinov2_clip.pth`): each a flat float32 state dict with
the whole DINOv2-giant inside, written by transformers 4 and peft. Returns a bundle of the members `global`, `face` and
`fusion`: LoRA and heads bit for bit, on one public tower that their files are shown to contain.

Files are memory-mapped and read one at a time; the public tower is compared tensor by tensor. Peak memory is that of
one DINOv2-giant in float32 (4.6 GB) and the libraries.
"""

from __future__ import annotations

import pickle
import re
import statistics
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from solution import presets
from solution.bundles import hub
from solution.bundles.bundle import (
    About,
    Bundle,
    StableFile,
    read_geometry,
    resolve_tower,
    tower_weights,
    write_bundle,
)
from solution.bundles.members import build_member, save_member
from solution.config import AdapterConfig, ClipArch, Dinov2Arch, MemberConfig, TowerConfig
from solution.errors import WeightsError
from solution.models.keys import to_stable
from solution.models.towers import empty_tower, load_state
from solution.presets import NTIRE26_REPOSITORY, NTIRE26_VOTE

FILES = {
    "global": "dinov2_252.pth",
    "face": "dinov2_252_crop.pth",
    "fusion": "dinov2_clip.pth",
}
ALPHA_PER_RANK = 2.0  # their LoRA: rank 32, alpha 64; alpha is not in the files

# Their key -> where it goes. `{i}` is a block, `{w}` weight or bias. Groups: `tower` and `clip` keep the library's key
# and go through `keys.KEY_TABLE`; `adapter` and `own` give our stable key.
_DINO, _CLIP = "backbone.vision_model.base_model.model.", "backbone.clip_model."
_ATTENTION = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
}
_BLOCK = ("norm1.{w}", "layer_scale1.lambda1", "norm2.{w}", "layer_scale2.lambda1")
_MLP = {
    True: ("mlp.weights_in.{w}", "mlp.weights_out.{w}"),
    False: ("mlp.fc1.{w}", "mlp.fc2.{w}"),
}
_CLIP_BLOCK = ("layer_norm1.{w}", "layer_norm2.{w}", "mlp.fc1.{w}", "mlp.fc2.{w}")
_CLIP_BLOCK += tuple(f"self_attn.{p}_proj.{{w}}" for p in ("q", "k", "v", "out"))


def published_keys(dino: Dinov2Arch, clip: ClipArch | None = None) -> dict[str, tuple[str, str]]:
    """Every key of a stream's published file -> (group, key there), for towers of the given geometry; clip: fusion's."""
    table: dict[str, tuple[str, str]] = {}

    def add(prefix: str, group: str, pattern: str) -> None:
        for kind in ("weight", "bias") if "{w}" in pattern else ("",):
            key = pattern.replace("{w}", kind)
            table[prefix + key] = (group, key)

    for name in ("cls_token", "mask_token", "position_embeddings"):
        add(_DINO, "tower", f"embeddings.{name}")
    add(_DINO, "tower", "embeddings.patch_embeddings.projection.{w}")
    add(_DINO, "tower", "layernorm.{w}")
    for i in range(dino.layers):
        layer = f"encoder.layer.{i}."
        for pattern in (*_BLOCK, *_MLP[dino.swiglu]):
            add(_DINO, "tower", layer + pattern)
        for role, path in _ATTENTION.items():
            for kind in ("weight", "bias"):
                table[f"{_DINO}{layer}{path}.base_layer.{kind}"] = (
                    "tower",
                    f"{layer}{path}.{kind}",
                )
            for side in "AB":
                table[f"{_DINO}{layer}{path}.lora_{side}.default.weight"] = (
                    "adapter",
                    f"blocks.{i}.attn.{role}.lora_{side}",
                )
    if clip is None:
        for kind in ("weight", "bias"):
            table[f"backbone.last_layer.{kind}"] = ("own", f"head.{kind}")
        return table
    for pattern in ("class_embedding", "patch_embedding.weight"):
        add(_CLIP, "clip", f"vision_model.embeddings.{pattern}")
    add(_CLIP, "clip", "vision_model.embeddings.position_embedding.weight")
    for name in ("pre_layrnorm", "post_layernorm"):  # the first is spelt so
        add(_CLIP, "clip", f"vision_model.{name}.{{w}}")
    for i in range(clip.layers):
        for pattern in _CLIP_BLOCK:
            add(_CLIP, "clip", f"vision_model.encoder.layers.{i}.{pattern}")
    for index in (0, 3):
        for kind in ("weight", "bias"):
            table[f"backbone.fusion_head.{index}.{kind}"] = (
                "own",
                f"head.{index}.{kind}",
            )
    return table


# ------------------------------------------------------------------------------------------------ reading
def read_published(path: Path) -> dict[str, torch.Tensor]:
    """The flat state dict in `path`, memory-mapped, a leading `module.` taken off the keys.

    Raises:
        WeightsError: missing, damaged, holding anything but tensors (such as code), or not flat.
    """
    if not path.is_file():
        raise WeightsError(
            f"{path}: missing; expected the published file (see --from in python -m solution.weights import-ntire26 -h)"
        )
    if not zipfile.is_zipfile(path):
        raise WeightsError(f"{path}: no file of torch.save (it is no zip archive); fetch it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's message runs over many lines; what matters is the name that the pickle asked for
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it asks for {named[1]}" if named else "no plain torch.save"
        raise WeightsError(
            f"{path}: refused, it holds more than tensors, perhaps code ({found}); do not load it"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise WeightsError(f"{path}: damaged ({error}); fetch it again") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, expected a flat state dict")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise WeightsError(f"{path}: {key!r} is a {type(value).__name__}, expected a flat state dict of tensors")
        if not value.is_floating_point():
            raise WeightsError(f"{path}: {key} is {value.dtype}, expected floating point")
    return {key.removeprefix("module."): value for key, value in state.items()}


@dataclass(frozen=True)
class Parts:
    """One published file, sorted. Keys of `own` and `adapter` are stable keys, of the towers the library's."""

    path: Path
    tower: dict[str, torch.Tensor]
    clip: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor]
    own: dict[str, torch.Tensor]
    keys: dict[tuple[str, str], str]  # (group, key there) -> key in the file

    @property
    def rank(self) -> int:
        """Of its LoRA, from the shapes that most matrices agree on."""
        downs = [t for key, t in self.adapter.items() if key.endswith("lora_A")]
        return statistics.mode(t.shape[0] for t in downs if t.ndim == 2)


def sort_keys(
    path: Path,
    state: dict[str, torch.Tensor],
    member: str,
    dino: Dinov2Arch,
    clip: ClipArch | None,
) -> Parts:
    """The file's tensors by where they go.

    Raises:
        WeightsError: missing or unknown keys, by the file's own names.
    """
    table = published_keys(dino, clip)
    missing, unknown = sorted(set(table) - set(state)), sorted(set(state) - set(table))
    if missing or unknown:
        raise WeightsError(
            f"{path}: {len(missing)} missing keys {missing[:4]}, {len(unknown)} unknown keys {unknown[:4]}; "
            f"this is not the published file of the member {member}, or its towers are not the ones named"
        )
    groups: dict[str, dict[str, torch.Tensor]] = {
        "tower": {},
        "clip": {},
        "adapter": {},
        "own": {},
    }
    for key, (group, name) in table.items():
        groups[group][name] = state[key]
    return Parts(path, **groups, keys={where: key for key, where in table.items()})


def difference(parts: Parts, group: str, public: StableFile) -> str | None:
    """Where the tower inside the file departs from the public one: None where they are equal, bit for bit in float32.

    Raises:
        WeightsError: a tensor of another shape, or one that only one of them has.
    """
    layout = {"tower": "dinov2", "clip": "hf_clip"}[group]
    seen: set[str] = set()
    for key, tensor in getattr(parts, group).items():
        name = parts.keys[group, key]
        for stable, mine in to_stable({key: tensor}, layout).items():
            seen.add(stable)
            if stable not in public:
                raise WeightsError(f"{parts.path}: {name} has no counterpart in {public.path}")
            theirs = public[stable]
            if mine.shape != theirs.shape:
                raise WeightsError(
                    f"{parts.path}: {name} has shape {tuple(mine.shape)}, expected {tuple(theirs.shape)} as in {public.path}"
                )
            if not torch.equal(mine.float(), theirs.float()):
                worst = (mine.float() - theirs.float()).abs().max().item()
                return f"{name} differs by up to {worst:.3g}"
    absent = sorted(set(public) - seen)
    if absent:
        raise WeightsError(f"{public.path}: {absent[:4]} are not in {parts.path}")
    return None


# ------------------------------------------------------------------------------------------------ towers
def public_tower(preset: TowerConfig, spec: str | None) -> TowerConfig:
    """The public tower that `spec` names: a folder in the Hub's layout, a Hub id, or None for the preset's own.

    Its geometry (heads, for one, leave no trace in the files) is that of its config.json. A folder that holds the very
    file which the preset pins is recorded as the preset's repository and commit, any other by its own place.
    """
    if spec is None:
        resolve_tower(preset)
        return preset
    path = resolve_tower(preset, spec)
    if preset.sha256 and hub.sha256(path) == preset.sha256:
        return preset
    geometry = read_geometry(path.parent, preset.kind)
    if geometry is None:
        raise WeightsError(
            f"{path.parent}/config.json: missing or of another kind; the geometry of a {preset.kind} tower is read there"
        )
    if preset.kind == "dinov2":
        arch = Dinov2Arch(**geometry)
    else:
        arch = replace(ClipArch(text_layers=0), **geometry)
    if Path(spec).is_dir():
        folder = Path(spec).resolve()
        found = {"source": str(folder), "revision": "", "name": folder.name}
    else:
        ref = hub.pin(hub.parse_ref(spec), path)
        name = ref.repo.rpartition("/")[2]
        found = {"source": ref.repo, "revision": ref.revision, "name": name}
    return replace(preset, arch=arch, sha256=hub.sha256(path), **found)


@dataclass
class Shelf:
    """The towers that the files turn out to contain: the public one, or copies kept whole in the bundle."""

    folder: Path
    keep: bool
    kept: dict[tuple[str, str], TowerConfig]  # (group, name) -> kept tower

    def place(self, parts: Parts, group: str, public: TowerConfig) -> TowerConfig:
        """The tower of the bundle that equals the one inside the file.

        Raises:
            WeightsError: it differs from the public one and is not to be kept.
        """
        reason = difference(parts, group, tower_weights(public))
        if reason is None:
            return public
        if not self.keep:
            raise WeightsError(
                f"{parts.path}: the tower inside is not {public.source}: {reason}; name the tower it was trained on "
                "(--dino, --clip), or keep the one inside whole with --keep-tower"
            )
        for config in self.kept.values():
            if config.kind == public.kind:
                file = StableFile(self._file(config))
                if difference(parts, group, file) is None:
                    return config
        name = f"{public.name}-kept{len(self.kept) + 1}"
        config = replace(public, name=name, source="bundle", revision="", sha256="")
        layout = {"tower": "dinov2", "clip": "hf_clip"}[group]
        stable = to_stable(getattr(parts, group), layout)
        path = self._file(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(stable, partial)  # from the mapped file to disk, never whole in memory
        partial.replace(path)
        self.kept[group, name] = config
        return config

    def _file(self, config: TowerConfig) -> Path:
        return self.folder / "towers" / f"{config.name}.safetensors"


# ------------------------------------------------------------------------------------------------ import
def import_ntire26(
    out: Path,
    *,
    source: str = NTIRE26_REPOSITORY,
    dino: str | None = None,
    clip: str | None = None,
    keep_tower: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Make the bundle `out` of the three published files.

    source: a folder that holds them, or `hf:owner/name[@revision]`.
    dino, clip: the public towers they were built on, a folder or a Hub id (None: the preset's, at its pinned commit).
    keep_tower: keep a tower that differs from the public one whole in the bundle instead of refusing.
    report: called with one line per step.

    Raises:
        WeightsError: a file that is missing, damaged, holds code, or has a key too many, too few or of another shape; a
            tower that differs; with the name of the file and the key.
    """
    towers = {"tower": public_tower(presets.preset("ntire26", "fusion").tower, dino)}
    towers["clip"] = public_tower(presets.preset("ntire26", "fusion").clip, clip)
    shelf = Shelf(out, keep_tower, {})
    for member, path, origin in _files(source):
        report(f"{member}: {path}")
        config = _import_one(member, path, origin, towers, shelf, out)
        report(f"{member}: LoRA rank {config.adapter.rank}, tower {config.tower.name} from {config.tower.source}")
    about = About(
        licence="other",
        data="The weights of the NTIRE 2026 fourth-place entry (arXiv 2604.25889), imported from "
        f"{NTIRE26_REPOSITORY.removeprefix('hf:')}: trained by its authors on fourteen public deepfake sets, several of them "
        "for research only. Their licence applies, and DINOv2's (Apache-2.0) and CLIP's (MIT) to the towers.",
    )
    return write_bundle(out, list(FILES), NTIRE26_VOTE, {}, name="ntire26", about=about)


def _files(source: str) -> Iterator[tuple[str, Path, str]]:
    """(member, path, where it came from) of the published files, each fetched when its turn comes."""
    ref = None if Path(source).is_dir() else hub.parse_ref(source)
    for member, name in FILES.items():
        if ref is None:
            yield member, Path(source) / name, name
        else:
            path = hub.fetch(ref, name)
            ref = hub.pin(ref, path)
            yield member, path, f"{ref}/{name}"


def _import_one(
    member: str,
    path: Path,
    origin: str,
    towers: dict[str, TowerConfig],
    shelf: Shelf,
    out: Path,
) -> MemberConfig:
    """Import one file as `out/MEMBER`, in passes: the pages of a mapping count as memory until the mapping ends."""
    preset = presets.preset("ntire26", member)
    clip = towers["clip"] if preset.clip is not None else None

    def read() -> Parts:
        archs = towers["tower"].arch, clip.arch if clip else None
        return sort_keys(path, read_published(path), member, *archs)

    tower = shelf.place(read(), "tower", towers["tower"])
    clip = shelf.place(read(), "clip", clip) if clip else None
    parts = read()
    adapter = AdapterConfig("lora", parts.rank, ALPHA_PER_RANK * parts.rank, preset.adapter.dropout)
    config = replace(preset, tower=tower, clip=clip, adapter=adapter)
    # The towers stay unset: memory that nothing writes to is never taken, and only the member's own state is saved.
    empty = {t.name: empty_tower(t) for t in (config.tower, config.clip) if t}
    built = build_member(config, empty, decompose=False)
    state = {f"adapter.{k}": t for k, t in parts.adapter.items()}
    state |= {f"own.{k}": t for k, t in parts.own.items()}
    _check_shapes(parts, built.stored_state())
    load_state(built.stored_state(), state, str(path))
    imported = {"imported": {"from": origin, "sha256": hub.sha256(path)}}
    save_member(built, out / member, training=imported, dtype=torch.float32)
    return config


def _check_shapes(parts: Parts, target: dict[str, torch.Tensor]) -> None:
    """Refuse a misshaped adapter or head tensor by the file's own name for it."""
    for group in ("adapter", "own"):
        for key, tensor in getattr(parts, group).items():
            expected = target[f"{group}.{key}"].shape
            if tensor.shape != expected:
                raise WeightsError(
                    f"{parts.path}: {parts.keys[group, key]} has shape {tuple(tensor.shape)}, expected {tuple(expected)}"
                )
