"""Where members compute and how precisely: the device that a word names, the precision that suits it, the cores of a rank.

What is measured here was measured on an AMD EPYC (Zen 5) core, compact towers at 168 px.
"""

from __future__ import annotations

import os

import torch

from solution.errors import DeviceError, UsageError
from solution.io import cores

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def pick_device(name: str) -> torch.device:
    """`auto`: a GPU when there is one, else the CPU; otherwise the device of that name.

    Ranks that torchrun starts on one machine take one GPU each.

    Raises:
        UsageError: a word that names no device. DeviceError: one that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count() > 1:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        name = f"cuda:{local % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name}: no such device; expected auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"--device {name}: torch sees no GPU here; --device cpu, or see python -m solution.doctor")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"--device {name}: this machine has none; --device cpu")
    return device


def pick_precision(device: torch.device) -> str:
    """The fastest precision of PRECISIONS that `device` computes matrix products in.

    GPU: float16, which costs what bfloat16 costs and keeps three more bits: logits of DINOv2-S depart from float32 by
    0.00075 (rms) instead of 0.0089. DINOv2 and CLIP were pre-trained in it; a logit that overflows is computed again in
    float32 where there are second looks, else the run stops and says --exact. CPU: bfloat16 where the processor has
    instructions for it (3.2 times as fast as float32), else float32.
    Not int8: dynamic quantisation of the blocks was 1.07 times (per channel) to 1.26 times (per tensor) as fast as
    bfloat16, but changed 27 to 31 % of the levels (bfloat16: 3 %) and lost 0.0009 to 0.0023 AUC.
    """
    if device.type == "cuda":
        return "float16"
    able = torch.cpu.get_capabilities()
    has = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if has else "float32"


def set_threads() -> None:
    """Share the cores between the ranks on this machine, unless OMP_NUM_THREADS was set by hand.

    torchrun sets OMP_NUM_THREADS=1 itself when it starts several ranks, which leaves cores idle.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, cores() // local))
