"""Bundles: a folder of members, their towers, their calibrators and the vote, every file under its SHA-256.

    BUNDLE/ensemble.json                name, members, vote, calibrators, towers, label order, SHA-256 of every file
    BUNDLE/MEMBER/config.json           the member's resolved `MemberConfig`
    BUNDLE/MEMBER/model.safetensors     what the member trained, under stable keys
    BUNDLE/towers/NAME.safetensors      towers trained by us; public ones are named by repository and commit instead
    BUNDLE/golden.json                  the logits that seeded pictures must give (the self-test)
    BUNDLE/claims.json                  mechanisms that the card claims, for `solution.studies.mechanisms`; may be absent

Reads and writes such folders and loads their members. Where a folder comes from is the business of `store`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from solution.bundles import hub
from solution.bundles.members import (
    FORMAT,
    SCALE,
    check_format,
    fill_tower,
    load_member,
    pack_tower,
    read_config,
    tower_configs,
    unpack_rows,
)
from solution.config import (
    ConfigError,
    MemberConfig,
    TowerConfig,
    VoteConfig,
    from_dict,
    to_dict,
)
from solution.errors import MemberError, WeightsError
from solution.io import write_atomically
from solution.models import calibration
from solution.models.calibration import Calibrator
from solution.models.keys import is_text, to_stable
from solution.models.libraries import LIBRARIES
from solution.models.member import Member
from solution.models.towers import build_tower, tower_state

LABEL_ORDER = ("real", "fake")
MANIFEST, GOLDEN, CLAIMS = "ensemble.json", "golden.json", "claims.json"
_MEMBER_FILES = ("config.json", "model.safetensors")
_FIELDS = ("format", "name", "label_order", "members", "vote", "calibrators", "towers")
_FIELDS += ("files", "report", "licence", "data", "base_model", "datasets")


# ------------------------------------------------------------------------------------------------ towers
class StableFile(Mapping[str, torch.Tensor]):
    """A tower's .safetensors as a mapping from stable key to CPU tensor, in any layout of `KEY_TABLE` or our own, packed
    (`members.pack_tower`) or not.

    Tensors are read when asked for and belong to the asker alone, so a pass over a file of gigabytes needs the memory
    of one tensor.

    Raises:
        WeightsError: damaged, or no tower in a known layout.
    """

    def __init__(self, path: Path, *, image_only: bool = False):
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                keys = file.keys()
                shapes = {key: file.get_slice(key).get_shape() for key in keys}
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: damaged ({error}); fetch it again") from error
        self.layout = _layout(path, shapes)
        self._source: dict[str, str] = {}  # stable key -> key in the file
        self._packed = {key.removesuffix(SCALE) for key in shapes if key.endswith(SCALE)}
        for key, shape in shapes.items():
            if key.endswith(SCALE):
                continue
            for name in self._split(key, torch.empty(shape, device="meta")):
                if not (image_only and is_text(name)):
                    self._source[name] = key

    def _split(self, key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What one tensor of the file is under stable keys: one tensor, several (packed projections), or none."""
        if self.layout == "stable":
            return {key: tensor}
        return to_stable({key: tensor}, self.layout)

    def __getitem__(self, name: str) -> torch.Tensor:
        # Opened anew each time: pages of a mapped file count as memory for as long as the mapping lives.
        key = self._source[name]
        with safe_open(self.path, framework="pt") as file:
            tensor = file.get_tensor(key)
            if key in self._packed:
                tensor = unpack_rows(tensor, file.get_tensor(key + SCALE))
            elif not tensor.is_floating_point():
                raise WeightsError(f"{self.path}: {key} is {tensor.dtype} without {key + SCALE}; fetch the file again")
            return self._split(key, tensor)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def _layout(path: Path, keys: Mapping[str, Any]) -> str:
    """Which of the layouts a tower's file has, by its keys."""
    if "patch_embed.proj.weight" in keys:
        up, down = (keys.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
        packed = up is not None and down is not None and up[0] == 2 * down[1]
        return "timm_gated" if packed else "timm"
    marks = {
        "patch.weight": "stable",
        "embeddings.cls_token": "dinov2",
        "visual.class_embedding": "open_clip",
        "vision_model.embeddings.class_embedding": "hf_clip",
        "embeddings.class_embedding": "hf_clip",
    }
    for key, layout in marks.items():
        if key in keys:
            return layout
    raise WeightsError(
        f"{path}: no tower in a known layout; found keys like {sorted(keys)[:3]}, expected one of {sorted(marks)}"
    )


TOWER_FILES = {
    "dinov2": ("model.safetensors",),
    "clip": ("open_clip_model.safetensors", "model.safetensors"),
    "timm": ("model.safetensors",),
}


def tower_weights(
    config: TowerConfig, source_override: str | None = None, *, offline: bool = False
) -> Mapping[str, torch.Tensor]:
    """The weights a tower starts from, under stable keys, for `members.fill_tower`.

    source_override: a folder in the Hub's layout, a .safetensors file (one of `members.dump_tower`, or the Hub's), or
        `[hf:]owner/name[@revision]`; None: `config.source`. For a CLIP derived from a DINOv2 tower
        (`bundle:OTHER`), the file is OTHER's.
    offline: use no network, only folders and the Hub's cache.

    Raises:
        WeightsError: nothing there, another architecture, or the Hub's refusal, with what to do.
    """
    if config.seed is not None and source_override is None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)
            return {name: tensor.detach() for name, tensor in tower_state(build_tower(config)).items()}
    path = resolve_tower(config, source_override, offline=offline)
    state = StableFile(path, image_only=config.kind == "clip" and not config.arch.text_layers)
    wanted = "dinov2" if config.derived_from else config.kind
    if state.layout != "stable" and wanted not in state.layout:
        raise WeightsError(
            f"{path}: holds a tower in the layout {state.layout}, expected a {wanted} for tower {config.name}"
        )
    if not config.derived_from and state.layout != "stable":
        check_geometry(path.parent, config)
    return state


def resolve_tower(config: TowerConfig, source_override: str | None = None, *, offline: bool = False) -> Path:
    """The .safetensors file that holds a tower's starting weights; see `tower_weights`.

    A file that arrives from the pinned repository is checked against `config.sha256`.
    """
    source = source_override or config.source
    local = Path(source)
    if local.is_file():
        return local
    names = TOWER_FILES["dinov2" if config.derived_from else config.kind]
    if local.is_dir():
        found = [local / name for name in names if (local / name).is_file()]
        if found:
            return found[0]
        raise WeightsError(f"{local}: found none of {', '.join(names)}; expected a tower in the Hub's layout")
    if (config.travels and source_override is None) or local.suffix == ".safetensors":
        raise WeightsError(
            f"tower {config.name}: {source} is neither a file nor a public repository; name a folder in the Hub's "
            "layout, or the .safetensors of the training that made it"
        )
    ref = hub.parse_ref(source)
    if source_override is None:
        ref = replace(ref, revision=config.revision or "main")
    here = [path for name in names if (path := hub.cached(ref, name))]
    path = here[0] if here else hub.fetch_first(ref, names, offline=offline)
    if LIBRARIES[config.kind].described:
        hub.fetch(hub.pin(ref, path), "config.json", offline=offline)
    if config.sha256 and source_override is None and not here:
        hub.check_sha256(path, config.sha256)
    return path


def read_geometry(folder: Path, kind: str) -> dict[str, Any] | None:
    """Fields of `Dinov2Arch`, `ClipArch` or `TimmArch` from the `config.json` beside a tower; None where no such file says."""
    path = folder / "config.json"
    return LIBRARIES[kind].geometry(json.loads(path.read_text())) if path.is_file() else None


def check_geometry(folder: Path, config: TowerConfig) -> None:
    """Refuse a folder whose config.json describes another tower than `config.arch`: heads, for one, leave no trace in
    the shapes of weights.

    Raises:
        WeightsError: naming the field, what was found and what was expected; or a DINOv2 or timm folder without config.json.
    """
    geometry = read_geometry(folder, config.kind)
    if geometry is None and LIBRARIES[config.kind].described:
        raise WeightsError(
            f"{folder}/config.json: missing, or of no {config.kind}; a tower's folder carries its config.json"
        )
    for name, found in (geometry or {}).items():
        expected = getattr(config.arch, name)
        if found != expected:
            raise WeightsError(f"{folder}/config.json: {name} is {found}, expected {expected} for tower {config.name}")


# ------------------------------------------------------------------------------------------------ bundles
@dataclass(frozen=True)
class About:
    """What a bundle says of itself, for its reader and its model card.

    licence: an identifier of the Hub's list (`apache-2.0`, `other`). data: what it was trained on and what that allows, in
    words. base_model, datasets: their names on the Hub.
    """

    licence: str = ""
    data: str = ""
    base_model: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened: everything but the weights themselves.

    hash: SHA-256 of ensemble.json, which holds those of all other files.
    towers: every tower its members need, by name.
    files: path inside the bundle -> SHA-256.
    report: figures of the ensemble, by name.
    offline: True for a local folder: loading its members uses no network either.
    """

    folder: Path
    name: str
    configs: dict[str, MemberConfig]
    vote: VoteConfig
    calibrators: dict[str, Calibrator]
    hash: str
    towers: dict[str, TowerConfig]
    files: dict[str, str]
    report: dict[str, Any]
    about: About
    offline: bool = True


def read_bundle(folder: Path, *, verify: bool = True, offline: bool = True) -> Bundle:
    """The bundle in a local folder.

    verify: check the SHA-256 of every file.

    Raises:
        WeightsError: no bundle, a damaged one, or one of another format; the message names the file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        member = (folder / "model.safetensors").is_file()
        raise WeightsError(
            f"{folder}: no {MANIFEST}; "
            + (
                "this is one member's folder, a bundle is the folder around it"
                if member
                else "a bundle is a folder that train.sh or python -m solution.weights has written"
            )
        )
    record = read_manifest(path)
    check_files(folder, record["files"], hashes=verify)
    towers = record["towers"]
    try:
        configs = {name: _with_commits(read_config(folder / name), towers) for name in record["members"]}
        vote = from_dict(VoteConfig, record["vote"], f"{path}: vote")
        calibrators = {
            name: calibration.from_dict(values, f"{path}: calibrators.{name}")
            for name, values in record["calibrators"].items()
        }
    except ConfigError as error:
        raise WeightsError(f"{error}; use a matching release") from error
    _check_names(str(path), configs, vote, calibrators)
    _check_halves(str(path), configs, record["files"])
    return Bundle(
        folder=folder,
        name=record["name"],
        configs=configs,
        vote=vote,
        calibrators=calibrators,
        hash=hub.sha256(path),
        towers=tower_configs(configs.values()),
        files=record["files"],
        report=record["report"],
        about=About(record["licence"], record["data"], tuple(record["base_model"]), tuple(record["datasets"])),
        offline=offline,
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """ensemble.json as a dict with all of its fields and the right format, or a `WeightsError`."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path}: no JSON ({error}); fetch it again") from None
    check_format(record, path)
    missing = [name for name in _FIELDS if name not in record]
    extra = sorted(set(record) - set(_FIELDS))
    if missing or extra:
        raise WeightsError(f"{path}: missing fields {missing}, unknown fields {extra}")
    if tuple(record["label_order"]) != LABEL_ORDER:
        raise WeightsError(f"{path}: label_order {record['label_order']}, expected {list(LABEL_ORDER)}")
    return record


def _with_commits(config: MemberConfig, towers: dict[str, dict[str, str]]) -> MemberConfig:
    """The config with each public tower at the commit that the bundle recorded."""

    def fixed(tower: TowerConfig | None) -> TowerConfig | None:
        commit = towers.get(tower.name, {}).get("revision") if tower else None
        return replace(tower, revision=commit) if commit else tower

    return replace(config, tower=fixed(config.tower), clip=fixed(config.clip))


def _check_names(
    where: str,
    members: Mapping[str, Any],
    vote: VoteConfig,
    calibrators: Mapping[str, Any],
) -> None:
    """Whoever votes is in the bundle; whoever is in the bundle has a calibrator."""
    absent = sorted(set(vote.weights) - set(members))
    if absent:
        raise WeightsError(f"{where}: vote.weights names {', '.join(absent)}, not in the bundle ({', '.join(members)})")
    if set(calibrators) != set(members):
        raise WeightsError(f"{where}: calibrators of {sorted(calibrators)}, expected those of {sorted(members)}")


def _check_halves(where: str, configs: Mapping[str, MemberConfig], files: Mapping[str, str]) -> None:
    """A member on two towers looks through two: not through one twice, by name or by what lies in their files."""
    for name, config in configs.items():
        if config.clip is None:
            continue
        halves = [tower.stored_name for tower in (config.tower, config.clip)]
        hashes = [files.get(f"towers/{half}.safetensors") for half in halves]
        if halves[0] == halves[1] or (hashes[0] and hashes[0] == hashes[1]):
            raise WeightsError(
                f"{where}: both halves of {name} are the tower {halves[0]!r}, the same features twice; expected another "
                "backbone as its second half (the published one is CLIP): train it on one, as train.sh does"
            )


def check_files(folder: Path, files: dict[str, str], *, hashes: bool = True) -> None:
    """Every file of the list is there, with its SHA-256.

    Raises:
        WeightsError: the first that is missing, lies outside the bundle, or differs.
    """
    for name, expected in files.items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute():
            raise WeightsError(f"{folder}/{MANIFEST}: {name!r} is no path inside the bundle")
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path}: missing, though {MANIFEST} lists it; fetch the bundle again")
        if hashes:
            hub.check_sha256(path, expected)


def write_bundle(
    folder: Path,
    members: Sequence[str],
    vote: VoteConfig,
    calibrators: Mapping[str, Calibrator],
    *,
    name: str = "",
    report: dict[str, Any] | None = None,
    about: About = About(),
) -> Bundle:
    """Make `folder` a bundle of the named members; ensemble.json is written last and atomically.

    members: names of the members' folders (of `members.save_member`) in `folder`; see `collect`. A member without a
        calibrator gets the identity.
    report: figures of the ensemble, by name.

    Raises:
        WeightsError: a member or tower that is not there or cannot be read, a vote for an absent member.
    """
    folder = Path(folder)
    configs = {member: read_config(folder / member) for member in members}
    for member, config in configs.items():
        if config.name != member:
            raise WeightsError(f"{folder / member}: holds the member {config.name!r}, expected {member!r}")
    towers = {tower.name: _whereabouts(tower) for tower in tower_configs(configs.values()).values()}
    files = [f"{member}/{file}" for member in members for file in _MEMBER_FILES]
    files += [entry["file"] for entry in towers.values() if "file" in entry]
    files += [name for name in (GOLDEN, CLAIMS) if (folder / name).is_file()]
    calibrators = {m: calibrators.get(m, Calibrator()) for m in members}
    _check_names(str(folder), configs, vote, calibrators)
    check_files(folder, dict.fromkeys(files, ""), hashes=False)
    record = {
        "format": FORMAT,
        "name": name or folder.resolve().name,
        "label_order": list(LABEL_ORDER),
        "members": list(members),
        "vote": to_dict(vote),
        "calibrators": {m: calibration.to_dict(c) for m, c in calibrators.items()},
        "towers": towers,
        "files": {file: hub.sha256(folder / file) for file in dict.fromkeys(files)},
        "report": report or {},
        **to_dict(about),
    }
    write_atomically(folder / MANIFEST, json.dumps(record, indent=1) + "\n")
    return read_bundle(folder, verify=False)


def collect(source: Path, folder: Path, members: Sequence[str], *, int8: bool = False) -> None:
    """Copy the members that `solution.train` left in `source`, and the towers that travel with them, to `folder`.

    int8: the towers' matrices as int8 with a scale a row (`members.pack_tower`). A self-test of other weights goes.

    Raises:
        WeightsError: a file that is not there.
    """
    configs = [read_config(source / member) for member in members]
    files = [f"{member}/{file}" for member in members for file in _MEMBER_FILES]
    files += [f"towers/{tower.stored_name}.safetensors" for tower in tower_configs(configs).values() if tower.travels]
    for file in files:
        if not (source / file).is_file():
            raise WeightsError(f"{source / file}: missing; train that member first")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, folder / file)
        if int8 and file.startswith("towers/"):
            pack_tower(folder / file)
    (folder / GOLDEN).unlink(missing_ok=True)


def _whereabouts(tower: TowerConfig) -> dict[str, Any]:
    """Where a bundle's tower is: in a file of its own, in a public repository at a commit, or in a seed."""
    if tower.travels:
        return {"file": f"towers/{tower.stored_name}.safetensors"}
    if tower.seed is not None:
        return {"random": tower.seed}
    return {"source": tower.source, "revision": _commit(tower)}


def _commit(tower: TowerConfig) -> str:
    """The commit of a public tower: what the config pins, else what the Hub's cache holds; empty for a local folder."""
    if Path(tower.source).exists():
        return ""
    ref = replace(hub.parse_ref(tower.source), revision=tower.revision or "main")
    for name in TOWER_FILES[tower.kind]:
        if not ref.pinned and (path := hub.cached(ref, name)):
            return hub.pin(ref, path).revision
    return ref.revision


def load_members(
    bundle: Bundle,
    names: Sequence[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    towers_from: Mapping[str, str] | None = None,
    matrices: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Member]:
    """The named members of a bundle (None: all), in eval mode, on towers they share.

    dtype: of all weights; pictures are normalised in float32 whatever it is.
    matrices: tower name -> what its blocks' matrices are held in from the start, so that a large tower never needs
        the memory of its float32 weights.
    towers_from: tower name -> folder, file or Hub id to read it from instead (see `tower_weights`).

    Raises:
        MemberError: an unknown name.
        WeightsError: weights that are missing, damaged or of another architecture.
    """
    chosen = list(bundle.configs) if names is None else list(names)
    unknown = [name for name in chosen if name not in bundle.configs]
    if unknown:
        raise MemberError(f"{bundle.folder}: no member {', '.join(unknown)}; it holds {', '.join(bundle.configs)}")
    overrides = dict(towers_from or {})
    stored = {tower.stored_name for tower in bundle.towers.values()}
    unknown = sorted(set(overrides) - set(bundle.towers) - stored)
    if unknown:
        raise WeightsError(f"{bundle.folder}: no tower {', '.join(unknown)}; it has {', '.join(bundle.towers)}")
    towers = {}
    for name, config in tower_configs(bundle.configs[n] for n in chosen).items():
        source = overrides.get(name) or overrides.get(config.stored_name)
        source = source or _own_file(bundle, config)
        state = tower_weights(config, source, offline=bundle.offline)
        # A derived tower is made in float32: casting it whole would also cast its normalisation buffers.
        early = torch.float32 if config.derived_from else dtype
        towers[name] = fill_tower(
            config,
            state,
            device=device,
            dtype=early,
            matrices=(matrices or {}).get(name),
            what=str(getattr(state, "path", config.source)),
        )
    members = {name: load_member(bundle.folder / name, towers) for name in chosen}
    if dtype != torch.float32:
        for member in members.values():
            for parameter in member.parameters():
                parameter.data = parameter.data.to(dtype)
    return members


def member_hash(bundle: Bundle, name: str) -> str:
    """What a member's logits depend on: SHA-256 over its files, those of its towers, and the commits of public ones."""
    towers = [tower for tower in (bundle.configs[name].tower, bundle.configs[name].clip) if tower is not None]
    paths = [f"{name}/{file}" for file in _MEMBER_FILES]
    paths += [f"towers/{tower.stored_name}.safetensors" for tower in towers if tower.travels]
    parts = [[path, bundle.files[path]] for path in paths]
    parts += [[tower.name, tower.source, tower.revision] for tower in towers if not tower.travels]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _own_file(bundle: Bundle, config: TowerConfig) -> str | None:
    """The path of a tower that travels in the bundle; None for a public or a random one."""
    if not config.travels:
        return None
    path = bundle.folder / "towers" / f"{config.stored_name}.safetensors"
    if not path.is_file():
        raise WeightsError(f"{path}: missing; the bundle's tower {config.name!r} is read from it")
    return str(path)
