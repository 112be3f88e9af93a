"""One pass where several members look at the same pictures through the same weights.

Takes members that are about to score; a tower keeps its plain pass (no adapter) of a tensor of pictures, and answers from it
when it, or another tower of the same stored weights, is asked about that very tensor again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from solution.models.member import Member
    from solution.models.towers import Tower, TowerOutput


@dataclass
class Passes:
    """The plain passes of one set of weights, by the tensor of pictures (the object, not its values)."""

    made: dict[int, tuple[torch.Tensor, TowerOutput, bool]] = field(default_factory=dict)

    def find(self, images: torch.Tensor, *, patches: bool) -> TowerOutput | None:
        """The pass of `images`; None where there is none, or none with the patches' tokens that are asked for."""
        _, output, whole = self.made.get(id(images), (None, None, False))
        return output if whole or not patches else None

    def keep(self, images: torch.Tensor, output: TowerOutput, *, patches: bool) -> None:
        """Keep what was made of `images`; the tensor is held, so that no other one gets its place."""
        self.made[id(images)] = images, output, patches


@contextmanager
def one_pass_each(members: Iterable[Member]) -> Iterator[None]:
    """Within, members make one plain pass of a tensor of pictures, where several of them ask for it.

    A pass without the patches' tokens serves no one who reads them: let those members go first.
    """
    towers = [tower for member in members for tower in member.towers()]
    users = Counter(map(_weights, towers))
    passes = {weights: Passes() for weights, count in users.items() if count > 1}
    for tower in towers:
        tower.passes = passes.get(_weights(tower))
    try:
        yield
    finally:
        for tower in towers:
            tower.passes = None


def _weights(tower: Tower) -> tuple[str, str]:
    """What makes two towers of one bundle give the same tokens: the stored weights, and how pixels are normalised."""
    return tower.config.stored_name, tower.config.statistics
