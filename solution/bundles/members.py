"""Config -> module, module -> file, file -> module.

A member's folder holds `config.json` (the resolved `MemberConfig` and how it was trained) and `model.safetensors` (what
it trained, under stable keys). A tower trained whole lies apart, `towers/NAME.safetensors`, because members share it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from solution.config import MemberConfig, TowerConfig, from_dict, to_dict
from solution.errors import WeightsError
from solution.io import write_atomically
from solution.models.adapters import add_adapter
from solution.models.heads import Layers, Topk
from solution.models.keys import is_text
from solution.models.member import Member
from solution.models.qtfp import Qtfp
from solution.models.streams import Fusion, Stream
from solution.models.towers import Tower, build_tower, dinov2_as_clip, empty_tower, load_state, tower_state
from solution.models.vlaforge import Vlaforge

FORMAT = 1
# The class of each kind in `config.KINDS`.
CLASSES: dict[str, type[Member]] = {
    "global": Stream,
    "face": Stream,
    "fusion": Fusion,
    "qtfp": Qtfp,
    "vlaforge": Vlaforge,
    "layers": Layers,
    "topk": Topk,
}


def tower_configs(configs: Iterable[MemberConfig]) -> dict[str, TowerConfig]:
    """The towers that members need, by name, including those that another is derived from first.

    Raises:
        WeightsError: two members mean different towers by one name, or one of them changes it and keeps that to itself.
    """
    configs = list(configs)
    towers: dict[str, TowerConfig] = {}
    for config in configs:
        users = [c.name for c in configs if config.tower.name in (c.tower.name, c.clip.name if c.clip else "")]
        if config.adapter.kind == "norm" and config.tower.public and len(set(users)) > 1:
            raise WeightsError(
                f"member {config.name} tunes the LayerNorms of the public tower {config.tower.name!r}, which "
                f"{', '.join(sorted(set(users) - {config.name}))} uses too; give its tower another name (tower.name=...)"
            )
        for tower in (config.tower, config.clip):
            if tower is None:
                continue
            if towers.setdefault(tower.name, tower) != tower:
                raise WeightsError(
                    f"member {config.name}: its tower {tower.name!r} differs from another member's tower of that name; "
                    "members of one bundle share a tower or name it differently"
                )
    return towers


def build_member(config: MemberConfig, towers: dict[str, Tower], *, decompose: bool = True) -> Member:
    """The member on `towers` (by name), its adapter added, its own parts newly initialised.

    decompose: False when Effort's factors are about to be loaded.
    """
    tower = towers[config.tower.name]
    add_adapter(tower, config.name, config.adapter, decompose=decompose)
    second = [towers[config.clip.name]] if config.clip else []
    return CLASSES[config.kind](config, tower, *second)


def random_towers(configs: Iterable[MemberConfig], *, device: str = "cpu") -> dict[str, Tower]:
    """All towers of `configs` with random weights: for benchmarks, tests and (`device="meta"`) counting."""
    return {n: build_tower(c, device=device) for n, c in tower_configs(configs).items()}


def fill_tower(
    config: TowerConfig,
    state: dict[str, torch.Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    matrices: torch.dtype | None = None,
    what: str = "",
) -> Tower:
    """The tower `config` with the weights `state` (stable keys).

    For a CLIP whose image tower is the bundle's DINOv2 tower, `state` is that tower's and the text part, which the
    member itself has trained or will train, starts at random. matrices: see `empty_tower`; not for such a CLIP.
    """
    if not config.derived_from:
        tower = empty_tower(config, device=device, dtype=dtype, matrices=matrices)
        load_state(tower_state(tower), state, what or f"tower {config.name}")
        return tower
    tower = build_tower(config).to(device)
    tower.model.to(dtype)  # not the normalisation buffers
    image = dinov2_as_clip(state, config.arch)
    own = {k: t for k, t in tower_state(tower).items() if not is_text(k)}
    load_state(own, image, what or f"tower {config.name} from {config.derived_from}")
    return tower


def dump_tower(tower: Tower, path: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a tower's own weights, adapters aside, as `path` (safetensors, stable keys), whole or not at all."""
    state = {k: t.detach().to(dtype).cpu().contiguous() for k, t in tower_state(tower).items()}
    _write_tower(path, tower.config, state)


def _write_tower(path: Path, config: TowerConfig, state: dict[str, torch.Tensor]) -> None:
    # One entry: safetensors writes several in an order that changes from run to run, and bundles are hashed.
    meta = {"tower": json.dumps({"format": FORMAT} | to_dict(config))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(state, meta))


SCALE = "/scale"  # the key of an int8 matrix's row scales, after the matrix's own
LEAST_COLUMNS = 64  # a shorter row is not worth a scale


def pack_tower(path: Path) -> float:
    """Rewrite a tower's file of `dump_tower` with its matrices as int8 and a float16 scale a row; half the bytes.

    Returns the largest relative error of a matrix: the root mean square of what changed over that of what was there.
    """
    state = load_file(path)
    packed, worst = {}, 0.0
    for key, tensor in state.items():
        if tensor.ndim != 2 or tensor.shape[1] < LEAST_COLUMNS or not tensor.is_floating_point():
            packed[key] = tensor
            continue
        rows = tensor.float()
        scale = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-7).half()
        steps = (rows / scale.float()).round().clamp(-127, 127)
        packed[key], packed[key + SCALE] = steps.to(torch.int8), scale.squeeze(1)
        error = (steps * scale.float() - rows).square().mean().sqrt() / rows.square().mean().sqrt().clamp_min(1e-12)
        worst = max(worst, error.item())
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    write_atomically(path, save(packed, meta))
    return worst


def cut_tower(path: Path, out: Path, blocks: int) -> TowerConfig:
    """Write a tower's first `blocks` blocks and its last norm as `out`, a tower named as that file; what it is.

    Of a tower trained whole, the last blocks know most of what it was trained on; what stands before them tells more of
    what it was not (guillotine regularization, Bordes et al., TMLR 2023).

    path: a file of `dump_tower`, packed or not, which says what tower it holds.

    Raises:
        WeightsError: it does not say so, or has no more blocks than that.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: no .safetensors file ({error})") from None
    if "tower" not in meta:
        raise WeightsError(f"{path}: does not say which tower it holds; expected a file that training wrote to towers/")
    record = json.loads(meta["tower"])
    check_format(record, path)
    del record["format"]
    config = from_dict(TowerConfig, record, str(path))
    if not 0 < blocks < config.arch.layers:
        raise WeightsError(
            f"{path}: tower {config.name} has {config.arch.layers} blocks; cut it to 1 to {config.arch.layers - 1}"
        )
    gone = tuple(f"blocks.{number}." for number in range(blocks, config.arch.layers))
    config = replace(config, name=out.stem, arch=replace(config.arch, layers=blocks))
    state = {key: tensor for key, tensor in load_file(path).items() if not key.startswith(gone)}
    _write_tower(out, config, state)
    return config


def unpack_rows(steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 matrix (R, C) of int8 steps (R, C) and row scales (R,)."""
    return steps.float() * scale.float()[:, None]


def save_member(
    member: Member,
    folder: Path,
    *,
    training: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write `folder/config.json` and `folder/model.safetensors`; a whole tower goes to `folder/../towers/NAME`.

    training: how the member came to be (command, data, seed, steps, validation figures), kept for the reader.
    dtype: of floating-point weights on disk. Integer buffers keep their type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, state = member.config, member.stored_state()
    if config.stores_tower and not config.tower.travels:  # no public repository has what was trained
        config = replace(config, tower=replace(config.tower, source="bundle", revision="", sha256=""))
    if member.config.stores_tower:
        dump_tower(
            member.tower,
            folder.parent / "towers" / f"{member.config.tower.name}.safetensors",
            dtype=dtype,
        )
        state = {k: t for k, t in state.items() if not k.startswith("tower.")}
    packed = {k: _pack(t, dtype) for k, t in state.items()}
    write_atomically(folder / "model.safetensors", save(packed, {"format": str(FORMAT)}))
    record = {
        "format": FORMAT,
        "member": to_dict(config),
        "training": training or {},
    }
    write_atomically(folder / "config.json", json.dumps(record, indent=1) + "\n")


def _pack(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    packed = tensor.to(dtype)
    return packed if packed.isfinite().all() else tensor  # beyond float16's range


def check_format(record: Any, path: Path) -> None:
    """Raise `WeightsError` unless `record`, read from `path`, is a dict of this release's format."""
    found = record.get("format") if isinstance(record, dict) else record
    if not isinstance(record, dict) or found != FORMAT:
        raise WeightsError(f"{path}: format {found!r}, expected {FORMAT}; use a matching release")


def read_config(folder: Path) -> MemberConfig:
    """The `MemberConfig` saved in a member's folder.

    Raises:
        WeightsError: no config.json, or one of another format.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{path}: missing; a member's folder holds config.json and model.safetensors")
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path}: no JSON ({error}); fetch the bundle again") from None
    check_format(record, path)
    return from_dict(MemberConfig, record["member"], str(path))


def load_member(folder: Path, towers: dict[str, Tower]) -> Member:
    """The member saved in `folder`, on `towers`, in eval mode.

    Raises:
        WeightsError: files missing or damaged, or keys that do not fit, by name.
    """
    config = read_config(folder)
    member = build_member(config, towers, decompose=False)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise WeightsError(f"{path}: missing; a member's folder holds config.json and model.safetensors")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged ({error}); fetch it again") from None
    target = member.stored_state()
    if config.stores_tower:  # its tower was loaded from towers/
        target = {k: t for k, t in target.items() if not k.startswith("tower.")}
    load_state(target, state, str(path))
    tower = towers[config.tower.name]
    member.to(device=tower.mean.device)
    return member.eval()
