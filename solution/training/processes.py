"""Where a training runs: this process among its siblings, its device, its loader processes.

Takes what torchrun says in the environment; gives `World` and `Machine`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch


@dataclass(frozen=True)
class World:
    """This process among its siblings."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Machine:
    """What a training runs on. workers: loader processes of this process; 0: it reads its pictures itself."""

    device: torch.device
    world: World = World()
    workers: int = 0
    progress: bool = True

    @property
    def tells(self) -> bool:
        """Whether this process reports to people."""
        return self.progress and self.world.leads


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[World]:
    """Join torchrun's process group when there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(hours=12),  # the others wait while rank 0 validates
    )
    try:
        yield World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()


def commit() -> str:
    """The commit of this checkout, with `+` when its files differ from it; empty outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()
