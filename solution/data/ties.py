"""What belongs together because something ties it, directly or through others: the pictures of a person, of a video.

Takes groups of hashable keys; gives for each key one that stands for all that it is tied to.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def tied(groups: Iterable[Sequence[Key]]) -> dict[Key, Key]:
    """Key -> the key that stands for all that the groups tie together with it (union-find), in the order of the keys."""
    parent: dict[Key, Key] = {}

    def root(key: Key) -> Key:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for keys in groups:
        for key in keys:
            parent[root(key)] = root(keys[0])
    return {key: root(key) for key in parent}
