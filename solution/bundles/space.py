"""The page of `solution.app` as a Space of the Hub: its files, generated from this kit and a bundle, and their upload.

Takes a `Bundle`; writes a folder that starts with `python app.py` and needs no network: the kit's own sources, the bundle,
requirements, a card with the metadata that the Hub reads.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from solution.bundles import hub
from solution.bundles.bundle import MANIFEST, Bundle
from solution.errors import WeightsError

SDK = "6.31.0"  # of Gradio, that the page was tested with
ROOT = Path(__file__).resolve().parents[2]
START = '''"""Starts the page with the bundle beside this file."""

import sys
from pathlib import Path

from solution.app import main

sys.exit(main(["--weights", str(Path(__file__).resolve().parent / "bundle"), "--host", "0.0.0.0", *sys.argv[1:]]))
'''


def card(bundle: Bundle, title: str) -> str:
    """The README.md of the Space: its metadata, and what a visitor is told."""
    from huggingface_hub import SpaceCardData

    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=SDK,
        python_version="3.11",
        app_file="app.py",
        license=bundle.about.licence or "other",
    )
    return f"""---
{data.to_yaml()}
---

# {title}

Scores faces in pictures and clips with the bundle `{bundle.name}` (`{bundle.hash[:12]}`). A score is evidence and no proof;
the page says what its threshold is worth and what it does not know. What is dropped is read on the machine that serves
the page, sent no further, and deleted once it was judged.

{bundle.about.data}
"""


def write_space(bundle: Bundle, folder: Path, title: str) -> Path:
    """The Space's files in `folder`, which must be empty or not be there; the folder.

    Raises:
        WeightsError: there is something in the folder, or a tower of the bundle is not in it.
    """
    outside = [tower.name for tower in bundle.towers.values() if tower.public]
    if outside:
        raise WeightsError(
            f"{bundle.name}: its tower {outside[0]} is not in the bundle; a Space holds everything that it needs: push a "
            "bundle that stores its towers, such as compact"
        )
    if folder.exists() and any(folder.iterdir()):
        raise WeightsError(f"{folder} is not empty; name a new folder for the Space's files")
    for source in sorted((ROOT / "solution").rglob("*")):
        if source.suffix in (".py", ".html"):
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for name in (*bundle.files, MANIFEST):
        target = folder / "bundle" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, target)
    for name in ("requirements.txt", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "app.py").write_text(START, encoding="utf-8")
    (folder / "README.md").write_text(card(bundle, title), encoding="utf-8")
    return folder


def push_space(bundle: Bundle, repository: str, *, private: bool = False) -> str:
    """Upload the Space `owner/name` in one commit; the commit's address.

    Raises:
        WeightsError: see `write_space`, or the Hub's refusal.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_space(bundle, Path(folder), repository.rpartition("/")[2])
        with hub.uploading(repository) as api:
            api.create_repo(repository, repo_type="space", space_sdk="gradio", exist_ok=True, private=private)
            made = api.upload_folder(
                repo_id=repository,
                repo_type="space",
                folder_path=folder,
                commit_message=f"{bundle.name} {bundle.hash[:12]}",
            )
    return made.commit_url
