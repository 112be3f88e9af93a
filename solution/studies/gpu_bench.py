"""What the GPU benchmark's stages share: how large everything is, what is left of the budget, clocks, members, FLOP.

`Bench` holds a run; every stage takes it and its own entry of `found`, a dict of plain values.
"""

from __future__ import annotations

import gc
import itertools
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from solution.config import KINDS
from solution.models.flops import member_flops

STREAMS = ("global", "face", "fusion")
PHOTOS = Path(__file__).resolve().parents[2] / "tests" / "photos"


@dataclass(frozen=True)
class Sizes:
    """How large everything is: on a GPU, or tiny for a rehearsal on CPU.

    preset: of the members. matrix: side of the matrix product. copy: bytes of the copy. batch: rows at once where no
    search says better. batches: searched. parity: pictures that are compared. files: JPEG files; listed: how often each
    is scored by the compact bundle. train: batch of the LoRA step; whole: of the whole fine-tuning, at each of `sides`.
    repeats: timed calls, of which the median counts. workers: loader processes. bundle_members, bundle_batch: of the
    trained bundle; None: all, and the batch that it takes itself.
    """

    preset: str = "giant"
    whole_preset: str = "compact"
    matrix: int = 8192
    copy: int = 1 << 32
    batch: int = 64
    batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    parity: int = 128
    files: int = 2000
    listed: int = 10
    side: int = 400
    giant_files: int = 1024
    plain_files: int = 256
    train: int = 32
    whole: int = 256
    sides: tuple[int, ...] = (112, 168, 224)
    loader_batches: int = 300
    repeats: int = 5
    workers: int = 16
    bundle_members: tuple[str, ...] | None = None
    bundle_batch: int | None = None


TINY = Sizes(
    matrix=64,
    copy=1 << 16,
    batch=4,
    batches=(2, 4),
    parity=8,
    files=6,
    listed=2,
    side=96,
    giant_files=6,
    plain_files=4,
    train=2,
    whole=4,
    sides=(56, 112),
    loader_batches=3,
    repeats=1,
    workers=1,
    bundle_members=("global",),
    bundle_batch=4,
)


class LeftOut(Exception):
    """This is not measured; the message says why (mostly: too little is left of the budget)."""


@dataclass
class Bench:
    """A run: where, how large, until when, and what was found (`found`, which `path` holds as JSON).

    exact: the members in float32. fast: by precision, the same members made fast. logits: by way, by member.
    batch: the best one found. rates: FLOP/s of a matrix product by type.
    """

    device: Any
    sizes: Sizes
    workers: int
    weights: str
    ends: float
    path: Path
    folder: Path = Path()
    found: dict[str, Any] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    straight: dict[str, float] = field(default_factory=dict)
    fast: dict[str, float] = field(default_factory=dict)
    batch: int = 0

    def left(self) -> float:
        """Seconds left of the budget."""
        return self.ends - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Go on only where so many seconds are left; a rehearsal needs none of them, but some time at all.

        Raises:
            LeftOut: they are not.
        """
        least = 0.0 if self.device.type == "cpu" else seconds
        if self.left() <= least:
            raise LeftOut(f"{what}: {max(0.0, self.left()):.0f} s left, {least:.0f} needed")

    def run(self, name: str, stage: Callable[[Bench, dict], None], seconds: float) -> None:
        """One stage, where so many seconds are left: its result, the reason it was skipped, or its error, into `found` and the file."""
        import torch

        begun, entry = time.monotonic(), {}
        self.found["stages"][name] = entry
        try:
            self.need(seconds, name)
            stage(self, entry)
            entry["state"] = "done"
        except LeftOut as error:
            entry |= {"state": "part" if entry else "skipped", "reason": str(error)}
        # Recorded with its trace; the other stages go on and the exit code says it.
        except Exception as error:  # noqa: BLE001
            text = "".join(traceback.format_exception(error))
            entry |= {"state": "failed", "reason": text}
        entry["seconds"] = round(time.monotonic() - begun, 2)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.write()
        print(f"[{self.left():4.0f} s left] {name}: {entry['state']}", flush=True)
        if entry["state"] != "done":
            print(entry["reason"].rstrip(), flush=True)

    def write(self) -> None:
        """`found` as JSON, whole or not at all."""
        from solution.io import write_atomically

        write_atomically(self.path, json.dumps(self.found, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ measuring
def seconds_of(bench: Bench, call: Callable[[], Any], *, repeats: int = 0) -> float:
    """Seconds of a call, the median of several after a warm one; on a GPU by its own events."""
    import torch

    repeats = repeats or bench.sizes.repeats
    call()
    if bench.device.type != "cuda":
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return float(np.median(times))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in itertools.pairwise(marks)])) / 1e3


def peak_reset(bench: Bench) -> None:
    """Count peak memory anew."""
    import torch

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gb(bench: Bench) -> float | None:
    """GB allocated on the GPU at most since `peak_reset`; None on CPU."""
    import torch

    if bench.device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def pictures(bench: Bench, count: int, side: int, seed: int = 0):
    """(count, 3, side, side) uint8 on the device: seeded coarse patches under fine noise."""
    import torch
    import torch.nn.functional as F

    drawn = torch.Generator(bench.device).manual_seed(seed)
    coarse, fine = (torch.rand(count, 3, size, size, generator=drawn, device=bench.device) for size in (8, side))
    grown = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    return (255 * (0.8 * grown + 0.2 * fine)).clamp(0, 255).to(torch.uint8)


def config_of(bench: Bench, preset_name: str, name: str) -> Any:
    """The member's configuration; in a rehearsal with its towers cut down, sharing and adapters as they are."""
    from solution.presets import preset

    config = preset(preset_name, name)
    tiny = preset("tiny", name)
    if bench.sizes != TINY or KINDS[config.kind].text:
        return tiny if bench.sizes == TINY else config

    def small(tower):
        arch = replace(tower.arch, width=32, layers=2, heads=2, image_side=56)
        return replace(tower, arch=arch)

    return replace(
        config,
        view=tiny.view,
        tower=small(config.tower),
        clip=config.clip and small(config.clip),
        qtfp=tiny.qtfp,
    )


def build(bench: Bench, names: Sequence[str], seed: int = 0, preset_name: str = ""):
    """(configs, members) by name, towers shared, random weights made on the device, adapters that do something."""
    import torch

    from solution.bundles.members import build_member, random_towers

    torch.manual_seed(seed)
    chosen = preset_name or bench.sizes.preset
    configs = {n: config_of(bench, chosen, n) for n in names}
    towers = random_towers(configs.values(), device=str(bench.device))
    members = {}
    for name, config in configs.items():
        member = build_member(config, towers, decompose=False)
        members[name] = member.to(bench.device).eval()
    done = set()
    for member in members.values():
        for name, value in member.named_parameters():
            started = "lora_B" in name or name.rpartition(".")[2] in ("u", "s", "v")
            if started and id(value) not in done:
                value.data.normal_(0.0, 0.02)
                done.add(id(value))
    return configs, members


def forward_of(member: Any, views: Any) -> Callable[[], Any]:
    """A call that scores `views` with the member."""
    import torch

    def call():
        with torch.inference_mode():
            member.tower.use(member.adapter)
            return member(views).logit

    return call


def logits_of(member: Any, views: Any, batch: int) -> np.ndarray:
    """(N,) float64 logits of `views`, `batch` at once; a last smaller batch is filled up."""
    import torch

    found = []
    for start in range(0, len(views), batch):
        part = views[start : start + batch]
        spare = batch - len(part)
        if spare:
            part = torch.cat([part, part[-1:].expand(spare, -1, -1, -1)])
        logits = forward_of(member, part)()
        found.append(logits.double().cpu().numpy()[: batch - spare])
    return np.concatenate(found)


def held_bytes(members: Mapping[str, Any]) -> int:
    """Bytes of all weights, what is shared once."""
    storages = {}
    for member in members.values():
        for value in (*member.parameters(), *member.buffers()):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def shares(bench: Bench, names: Sequence[str], each: Mapping[str, float], kind: str):
    """Pictures/s of each stream and of all, with FLOP/s and its share of the measured rate of `kind`.

    each: seconds a picture.
    """
    flops = {n: member_flops(bench.configs[n], adapters=False) for n in names}
    rows = {name: (flops[name], each[name]) for name in names}
    rows["all"] = (sum(flops.values()), sum(each[name] for name in names))
    result = {}
    for name, (work, spent) in rows.items():
        result[name] = {
            "pictures_per_s": 1 / spent,
            "gflop_per_picture": work / 1e9,
            "tflops": work / spent / 1e12,
        }
        if kind in bench.rates:
            result[name]["share_of_matrix_rate"] = work / spent / bench.rates[kind]
    return result
