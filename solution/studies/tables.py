"""Tables that other commands of this kit left, read with pandas: a training's `validation.csv`, an evaluation's `scores.csv`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from solution.data.manifest import ManifestError

if TYPE_CHECKING:
    import pandas as pd


def read_scores(path: Path, *, words: Sequence[str], numbers: Sequence[str], what: str) -> pd.DataFrame:
    """The table at `path`: its columns `words` as they stand there, `numbers` as float64 to the last digit.

    what: what should lie there and who writes it, for the message.

    Raises:
        ManifestError: no such file, columns that are missing, or a number that is none.
    """
    import pandas as pd  # takes its time: --help answers without it

    if not path.is_file():
        raise ManifestError(f"{path}: not found; expected {what}")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if table.empty or not {*words, *numbers} <= set(table):
        raise ManifestError(f"{path}: expected rows with columns {', '.join([*words, *numbers])}")
    try:
        return table.astype(dict.fromkeys(numbers, float))
    except ValueError as error:
        raise ManifestError(f"{path}: not a number in {' or '.join(numbers)} ({error})") from None
