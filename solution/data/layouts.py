"""Which layout a raw data set has, and everything in it by that layout.

Takes a folder as its authors or its mirrors ship it, or a DeepfakeBench JSON; gives `Found`. Labels come from the data set's
own folders and lists through a table of known names; what is not in it is refused. No picture is opened here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from solution.data import data_sets, listed_sets
from solution.data.images import printable
from solution.data.raw import (
    KNOWN,
    Entry,
    Found,
    LayoutError,
    Tree,
    folder_meaning,
    plain,
    stem,
    walk,
)

# ---------------------------------------------------------------------------------------------------- choosing
_LAYOUTS: dict[str, tuple[Callable[[Tree], Iterator[Entry]], bool]] = {
    "ff++": (data_sets.faceforensics, False),
    "celeb-df": (data_sets.celeb_df, False),
    "dfdc": (data_sets.dfdc, False),
    "dfdcp": (data_sets.dfdc_preview, False),
    "deepfakebench": (listed_sets.deepfakebench, True),
    "wilddeepfake": (data_sets.wilddeepfake, True),
    "df40": (data_sets.df40, True),
    "kaggle": (listed_sets.kaggle, False),
    "ntire": (listed_sets.ntire, False),
    "folders": (listed_sets.folders, False),
}
LAYOUTS = tuple(_LAYOUTS)


_MOST_LISTS = 100


def _depth(name: str) -> int:
    return name.count("/")


def detect(tree: Tree) -> str:
    """The name of a tree's layout.

    Raises:
        LayoutError: none fits, or several data sets lie side by side.
    """
    folders = tree.folders()
    words = {plain(name) for name in folders}
    bases = {name.rpartition("/")[2].lower() for name in tree.lists}
    pictures = [stem(name).rpartition("/")[2] for name in tree.pictures]
    # Some sets ship a JSON a picture: the lists that matter stand above them.
    if any(listed_sets.bench_content(tree, name) is not None for name in sorted(tree.lists, key=_depth)[:_MOST_LISTS]):
        return "deepfakebench"
    found = {
        "ff++": bool(folders & set(data_sets.FF_ROOTS) or words & set(data_sets.DFD_ROOTS)),
        "celeb-df": "celeb_synthesis" in words,
        "dfdcp": "dataset.json" in bases,
        "dfdc": "metadata.json" in bases,
        "wilddeepfake": len(words & {"real_train", "fake_train", "real_test", "fake_test"}) >= 2,
        "ntire": bool(pictures) and all(listed_sets.NTIRE_NAME.fullmatch(own) for own in pictures),
    }
    several = [name for name, there in found.items() if there]
    if set(several) <= {"ff++"} and "manipulated_sequences" not in folders and _df40_folders(tree):
        return "df40"
    if len(several) > 1:
        raise LayoutError(
            f"{tree.root}: several data sets ({', '.join(several)}); prepare each folder by itself, or say --layout"
        )
    if several:
        return several[0]
    if any(n.lower().endswith((".csv", ".tsv")) and listed_sets.labelled_rows(tree, n) for n in tree.lists):
        return "kaggle"
    if any(folder_meaning(name)[0] is not None for name in folders):
        return "folders"
    # Where folders say the label, a list of numbers may be one of classes.
    if any(n.lower().endswith(".txt") and listed_sets.labelled_rows(tree, n) for n in tree.lists):
        return "kaggle"
    names = ", ".join(printable(n) for n in sorted(folders)[:12]) or "no folders"
    raise LayoutError(f"{tree.root}: no known layout; found {names}. Known are {', '.join(LAYOUTS)}; {KNOWN}")


def _df40_folders(tree: Tree) -> bool:
    """Whether a folder of a DF40 method stands above every folder that says a label."""
    for name in (*tree.pictures, *tree.videos):
        for part in name.split("/")[:-1]:
            if plain(part) in data_sets.DF40_METHODS:
                return True
            if folder_meaning(part)[0] is not None:
                break
    return False


def find_entries(source: Path, layout: str = "auto", leave_out: Path | None = None) -> Found:
    """Everything that a raw data set holds, by its layout.

    source: the data set's folder, or a DeepfakeBench JSON (its folder is then the root). leave_out: a folder inside it
    that is not entered.

    Raises:
        LayoutError: nothing there, an unknown layout, a label that the table does not know, a file with both labels.
    """
    source = Path(source)
    if not source.exists():
        raise LayoutError(f"{printable(str(source))}: there is no such folder")
    root = source if source.is_dir() else source.parent
    tree = walk(root, leave_out)
    if not source.is_dir():
        if source.suffix.lower() != ".json":
            raise LayoutError(f"{source}: expected a folder or a DeepfakeBench JSON")
        tree.lists = [source.name]
        if listed_sets.bench_content(tree, source.name) is None:
            raise LayoutError(
                f"{source}: not DeepfakeBench's data set -> label -> split -> video -> label and frames; a metadata.json or a "
                "split list is read with its data set: give the folder"
            )
        layout = "deepfakebench" if layout == "auto" else layout
    if not tree.pictures and not tree.videos:
        raise LayoutError(f"{root}: no pictures or videos in it")
    layout = detect(tree) if layout == "auto" else layout
    read, cropped = _LAYOUTS[layout]
    entries = sorted(read(tree), key=lambda entry: entry.name)
    if not entries:
        reasons = "; ".join(f"{row['count']} {row['reason']} (e.g. {row['example']})" for row in tree.passed.rows())
        raise LayoutError(f"{root}: nothing in it is of the layout {layout}. {reasons}".rstrip())
    return Found(layout, _unique(entries), tree.passed, cropped)


def _unique(entries: list[Entry]) -> list[Entry]:
    """Names made unique: a.png and a.jpg in one folder keep their suffix in it."""
    counts = Counter(entry.name for entry in entries)
    return [
        entry if counts[entry.name] == 1 else replace(entry, name=entry.files[0].replace(".", "_")) for entry in entries
    ]
