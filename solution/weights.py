"""Entry: bring bundles here, check them, show them, push them; the self-test that shows they compute what they should.

`--weights` everywhere takes a local folder (no network is touched), `hf:owner/name[@revision][:subfolder]`, or a preset:
`compact` (shipped in weights/compact) and `ntire26` (the published fourth-place entry, imported on first use).

    python -m solution.weights import-ntire26 --out BUNDLE     the published checkpoints as a bundle
    python -m solution.weights pull hf:owner/name              everything a bundle needs, its public towers included
    python -m solution.weights push BUNDLE owner/name          with a model card made from the bundle
    python -m solution.weights push BUNDLE --space owner/name  the page of solution.app as a Space
    python -m solution.weights verify|show|golden BUNDLE
    python -m solution.weights cut TOWER --blocks N --out FILE the first blocks of a tower that training wrote
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from solution.errors import UsageError, door, tell
from solution.presets import NTIRE26_REPOSITORY

# What needs torch is imported inside functions: --help answers at once.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m solution.weights", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser(
        "import-ntire26",
        help="Import of the checkpoints that the NTIRE 2026 fourth-place entry published, into a bundle.",
    )
    add.add_argument(
        "--from",
        dest="source",
        default=NTIRE26_REPOSITORY,
        help="folder with the three published files, or hf:owner/name[@revision] (default: %(default)s)",
    )
    tower = "folder in the Hub's layout or Hub id of the public tower (default: the pinned one)"
    add.add_argument("--dino", help=f"DINOv2-giant: {tower}")
    add.add_argument("--clip", help=f"CLIP ViT-L/14: {tower}")
    add.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    add.add_argument(
        "--keep-tower",
        action="store_true",
        help="keep a tower that differs from the public one whole (4.5 GB) instead of refusing",
    )
    add.add_argument(
        "--no-golden",
        action="store_true",
        help="leave out the self-test's logits (their forward passes take a few minutes on CPU)",
    )
    add = commands.add_parser("pull", help="download a bundle and its public towers into the Hub's cache")
    add.add_argument("weights", help="hf:owner/name[@revision][:subfolder], or a folder")
    add.add_argument("--out", type=Path, help="also copy the bundle into this folder")
    add.add_argument("--force", action="store_true", help="even what the cache has")
    add = commands.add_parser("push", help="upload a bundle with a model card")
    add.add_argument("weights", help="the bundle")
    add.add_argument("repository", nargs="?", help="owner/name of the bundle")
    add.add_argument("--space", metavar="OWNER/NAME", help="the page of solution.app with this bundle, as a Space")
    add.add_argument("--evaluation", type=Path, help="evaluation.json, for the card")
    add.add_argument("--private", action="store_true")
    add.add_argument("--dry-run", action="store_true", help="print the card or the Space's files, upload nothing")
    add = commands.add_parser("cut", help="the first blocks of a tower that training wrote, as a tower of its own")
    add.add_argument("tower", type=Path, help="its .safetensors file")
    add.add_argument("--blocks", type=int, required=True, help="how many of its blocks are kept")
    add.add_argument("--out", type=Path, required=True, help="the new file, whose name is the new tower's")
    helps = {
        "verify": "check every file and the cached public towers against their SHA-256",
        "show": "a table of members, towers and hashes",
        "golden": "compute the self-test's logits on CPU and put them into the bundle",
    }
    for name, text in helps.items():
        add = commands.add_parser(name, help=text)
        add.add_argument("weights", help="folder, hf:owner/name..., compact or ntire26")
    return parser


@door("weights", interrupted="interrupted; what arrived whole is kept")
def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; 0 done, 2 usage, 3 environment or weights, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    {
        "import-ntire26": _import,
        "pull": _pull,
        "push": _push,
        "verify": _verify,
        "show": _show,
        "golden": _golden,
        "cut": _cut,
    }[arguments.command](arguments)
    return 0


def _show(arguments: argparse.Namespace) -> None:
    from solution.bundles.card import show
    from solution.bundles.store import open_bundle

    print(show(open_bundle(arguments.weights, verify=False)))


def _golden(arguments: argparse.Namespace) -> None:
    from solution.bundles.bundle import GOLDEN
    from solution.bundles.selftest import add_golden
    from solution.bundles.store import open_bundle

    print(add_golden(open_bundle(arguments.weights)).folder / GOLDEN)


def _cut(arguments: argparse.Namespace) -> None:
    from solution.bundles.members import cut_tower

    tower = cut_tower(arguments.tower, arguments.out, arguments.blocks)
    print(f"{arguments.out}: tower {tower.name}, {tower.arch.layers} blocks")


def _import(arguments: argparse.Namespace) -> None:
    from solution.bundles import ntire26
    from solution.bundles.card import show
    from solution.bundles.selftest import add_golden

    bundle = ntire26.import_ntire26(
        arguments.out,
        source=arguments.source,
        dino=arguments.dino,
        clip=arguments.clip,
        keep_tower=arguments.keep_tower,
        report=tell,
    )
    if not arguments.no_golden:
        tell("computing the self-test's logits")
        bundle = add_golden(bundle)
    print(show(bundle))


def _pull(arguments: argparse.Namespace) -> None:
    from solution.bundles import hub, store
    from solution.bundles.bundle import MANIFEST, read_bundle
    from solution.bundles.card import show

    if arguments.weights.startswith("hf:"):
        bundle = store.download(hub.parse_ref(arguments.weights), force=arguments.force)
    else:
        bundle = store.open_bundle(arguments.weights, report=tell)
    store.fetch_towers(bundle, report=tell)
    if arguments.out:
        for name in (*bundle.files, MANIFEST):
            target = arguments.out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / name, target)
        bundle = read_bundle(arguments.out)
    print(show(bundle))


def _push(arguments: argparse.Namespace) -> None:
    from solution.bundles.card import model_card
    from solution.bundles.store import open_bundle, push
    from solution.errors import WeightsError

    if not (arguments.repository or arguments.space):
        raise UsageError("push: name the bundle's repository owner/name, --space owner/name, or both")
    bundle = open_bundle(arguments.weights)
    if arguments.space:
        _push_space(bundle, arguments)
    if not arguments.repository:
        return
    evaluation = None
    if arguments.evaluation:
        try:
            evaluation = json.loads(arguments.evaluation.read_text())
        except (OSError, ValueError) as error:
            raise WeightsError(f"{arguments.evaluation}: unreadable ({error})") from None
    if arguments.dry_run:
        print(model_card(bundle, arguments.repository, evaluation))
        return
    print(push(bundle, arguments.repository, evaluation=evaluation, private=arguments.private))


def _push_space(bundle, arguments: argparse.Namespace) -> None:
    import tempfile

    from solution.bundles.space import push_space, write_space

    if not arguments.dry_run:
        print(push_space(bundle, arguments.space, private=arguments.private))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_space(bundle, Path(folder), arguments.space.rpartition("/")[2])
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            print(f"{path.stat().st_size:12,}  {path.relative_to(folder).as_posix()}")


def _verify(arguments: argparse.Namespace) -> None:
    from solution.bundles import hub
    from solution.bundles.bundle import MANIFEST, resolve_tower
    from solution.bundles.store import open_bundle

    bundle = open_bundle(arguments.weights)
    print(f"{bundle.folder}: {len(bundle.files)} files match {MANIFEST} {bundle.hash}")
    for tower in bundle.towers.values():
        if not tower.public:
            continue
        path = resolve_tower(tower, offline=bundle.offline)
        if tower.sha256:
            hub.check_sha256(path, tower.sha256)
        print(f"tower {tower.name}: {path} {'matches' if tower.sha256 else 'is there'}")


if __name__ == "__main__":
    sys.exit(main())
