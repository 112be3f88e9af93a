"""Where bundles come from and go to: a preset, a local folder, the Hugging Face Hub.

Takes what `--weights` names: a local folder (no network is touched), `hf:owner/name[@revision][:subfolder]`, `compact`
(shipped in weights/compact) or `ntire26` (the published fourth-place entry, imported on first use); returns a `Bundle`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from solution.bundles import hub
from solution.bundles.bundle import MANIFEST, Bundle, read_bundle, read_manifest, resolve_tower
from solution.bundles.hub import HubRef
from solution.bundles.members import FORMAT
from solution.errors import WeightsError
from solution.presets import PRESETS

COMPACT = Path(__file__).resolve().parents[2] / "weights" / "compact"
Report = Callable[[str], None]


def _silent(line: str) -> None:
    """The default `report`: libraries say nothing."""


# ------------------------------------------------------------------------------------------------ from somewhere
def open_bundle(weights: str, *, verify: bool = True, report: Report = _silent) -> Bundle:
    """The bundle that `--weights` names: a preset, `hf:owner/name[@revision][:subfolder]`, or a local folder.

    A preset's name means the preset; a folder of that name is `./compact`. A local folder uses no network, for its public
    towers neither: `pull FOLDER` brings those into the Hub's cache once. `ntire26` is imported on first use (about 15 GB
    of downloads) and kept beside the Hub's cache.

    Raises:
        WeightsError: nothing there, damaged, or out of reach, with what to do.
    """
    if weights == "compact":
        return read_bundle(COMPACT, verify=verify)
    if weights == "ntire26":
        return _published(verify=verify, report=report)
    if weights.startswith("hf:"):
        return download(hub.parse_ref(weights), verify=verify)
    folder = Path(weights)
    if folder.is_dir():
        return read_bundle(folder, verify=verify)
    hint = (
        f"no weights are published for the preset {weights}: train it (train.sh)"
        if weights in PRESETS
        else "expected a bundle's folder, hf:owner/name[@revision][:subfolder], compact or ntire26"
    )
    raise WeightsError(f"--weights {weights}: no such folder; {hint}")


def download(ref: HubRef, *, force: bool = False, verify: bool = True) -> Bundle:
    """The bundle at a place on the Hub, all of its files from one commit and checked against ensemble.json.

    Raises:
        WeightsError: see `hub.fetch` and `bundle.read_bundle`.
    """
    path = hub.fetch(ref, MANIFEST, force=force)
    pinned = hub.pin(ref, path)
    for name in read_manifest(path)["files"]:
        hub.fetch(pinned, name, force=force)
    return read_bundle(path.parent, verify=verify, offline=False)


def fetch_towers(bundle: Bundle, *, report: Report = _silent) -> list[Path]:
    """Bring the bundle's public towers into the Hub's cache; their files, each with its pinned SHA-256."""
    paths = []
    for tower in bundle.towers.values():
        if tower.public:
            path = resolve_tower(tower)
            if tower.sha256:
                hub.check_sha256(path, tower.sha256)
            report(f"tower {tower.name}: {path}")
            paths.append(path)
    return paths


def published_home() -> Path:
    """Where the imported `ntire26` bundle is kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "bundles" / f"ntire26-{FORMAT}"


def _published(*, verify: bool, report: Report) -> Bundle:
    from solution.bundles import ntire26
    from solution.bundles.selftest import add_golden

    home = published_home()
    if not (home / MANIFEST).is_file():
        report(f"importing the published entry into {home}, once")
        partial = home.with_name(f"{home.name}.partial-{os.getpid()}")
        try:
            add_golden(ntire26.import_ntire26(partial, report=report))
            partial.replace(home)
        except OSError:
            if not (home / MANIFEST).is_file():  # else another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return read_bundle(home, verify=verify, offline=False)


# ------------------------------------------------------------------------------------------------ to the Hub
def push(
    bundle: Bundle,
    repository: str,
    *,
    evaluation: dict[str, Any] | None = None,
    private: bool = False,
) -> str:
    """Upload a verified bundle with its card in one commit; the commit's address.

    Raises:
        WeightsError: a tower that nobody else could find, or the Hub's refusal.
    """
    from huggingface_hub import CommitOperationAdd

    local = [t for t in bundle.towers.values() if t.public and Path(t.source).exists()]
    if local:
        raise WeightsError(
            f"tower {local[0].name} is read from {local[0].source}, which only this machine has: import again with "
            "--keep-tower or with the tower's Hub repository"
        )
    from solution.bundles.card import model_card

    card = model_card(bundle, repository, evaluation)
    files = [CommitOperationAdd("README.md", card.encode())]
    files += [CommitOperationAdd(name, str(bundle.folder / name)) for name in (*bundle.files, MANIFEST)]
    with hub.uploading(repository) as api:
        api.create_repo(repository, exist_ok=True, private=private)
        made = api.create_commit(repository, files, commit_message=f"{bundle.name} {bundle.hash[:12]}")
    return made.commit_url
