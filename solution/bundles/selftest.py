"""The self-test: seeded pictures, and the logits that a bundle's members must give for them wherever they run.

Takes a `Bundle` with a golden.json; returns how far its logits lie from those here, against the tolerance of the device.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from solution.bundles import hub
from solution.bundles.bundle import GOLDEN, MANIFEST, Bundle, load_members, read_bundle, read_manifest
from solution.bundles.members import FORMAT
from solution.errors import WeightsError
from solution.io import write_atomically
from solution.models.member import Member

# How far a logit may lie from the golden one, as a share of max(1, |logit|). float32 on a GPU: its convolutions may run
# in TF32, 10 bits of mantissa.
TOLERANCE = {
    ("cpu", torch.float32): 1e-3,
    ("cuda", torch.float32): 2e-2,
    ("cuda", torch.float16): 5e-2,
    ("cuda", torch.bfloat16): 0.3,
    ("cpu", torch.bfloat16): 0.3,
}
GOLDEN_PICTURES = 3


def golden_pictures(side: int, count: int = GOLDEN_PICTURES) -> torch.Tensor:
    """Seeded pictures (count, 3, side, side) uint8: coarse patches under fine noise.

    Made with SHAKE-256 and integers alone, so that every machine and library makes the same bytes.
    """
    cells, kinds = 8, count * 3
    raw = hashlib.shake_256(b"golden %d" % side).digest(kinds * (cells * cells + side * side))
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).int()
    coarse, fine = values.split([kinds * cells * cells, kinds * side * side])
    index = torch.arange(side) * cells // side  # (side,) -> cell
    coarse = coarse.view(kinds, cells, cells)[:, index][:, :, index]
    pictures = (coarse * 3 + fine.view(kinds, side, side)) // 4
    return pictures.to(torch.uint8).view(count, 3, side, side)


@torch.inference_mode()
def golden_logits(members: Mapping[str, Member]) -> dict[str, list[float]]:
    """Every member's logits on the golden pictures of its view."""
    logits = {}
    for name, member in members.items():
        device = next(member.parameters()).device
        pictures = golden_pictures(member.config.seen.side).to(device).split(1)
        # one by one: the activations of all would come on top of a giant member's towers
        logits[name] = [member.judge(picture).double().item() for picture in pictures]
    return logits


def make_golden(members: Mapping[str, Member]) -> dict[str, Any]:
    """The content of golden.json: the pictures' SHA-256 by side, and every member's logits on them."""
    sides = sorted({member.config.seen.side for member in members.values()})
    return {
        "format": FORMAT,
        "pictures": {str(side): _picture_hash(side) for side in sides},
        "logits": golden_logits(members),
        "made_with": f"torch {torch.__version__}, CPU, float32",
    }


def _picture_hash(side: int) -> str:
    return hashlib.sha256(golden_pictures(side).numpy().tobytes()).hexdigest()


def add_golden(bundle: Bundle) -> Bundle:
    """Compute golden.json of a bundle on CPU in float32, put it into the bundle, and open that again.

    Raises:
        WeightsError: the bundle lies in the Hub's cache, which is not ours to change.
    """
    if (bundle.folder / MANIFEST).is_symlink():
        raise WeightsError(
            f"{bundle.folder}: the Hub's cache is not changed; python -m solution.weights pull --out DIR makes a copy"
        )
    golden = make_golden(load_members(bundle))
    path = bundle.folder / GOLDEN
    write_atomically(path, json.dumps(golden, indent=1) + "\n")
    record = read_manifest(bundle.folder / MANIFEST)
    record["files"][GOLDEN] = hub.sha256(path)
    write_atomically(bundle.folder / MANIFEST, json.dumps(record, indent=1) + "\n")
    return read_bundle(bundle.folder, verify=False, offline=bundle.offline)


@dataclass(frozen=True)
class SelfTest:
    """Per member: the largest departure of a logit from the golden one (a share of max(1, |logit|)); what is allowed."""

    worst: dict[str, float]
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        return all(value <= self.tolerance for value in self.worst.values())

    def __str__(self) -> str:
        lines = [
            f"{name:10} {value:9.2e} {'ok' if value <= self.tolerance else 'DIFFERS'}"
            for name, value in self.worst.items()
        ]
        return "\n".join([f"self-test on {self.where}, tolerance {self.tolerance:g}", *lines])


def run_selftest(bundle: Bundle, device: str | torch.device = "cpu", *, dtype: torch.dtype = torch.float32) -> SelfTest:
    """Recompute the bundle's golden logits on `device` and compare.

    Raises:
        WeightsError: no golden file, pictures that come out differently, members that it does not know, or a device and
            dtype without a tolerance.
    """
    path = bundle.folder / GOLDEN
    if GOLDEN not in bundle.files:
        raise WeightsError(
            f"{path}: the bundle has none; make it where the bundle is known to be right: "
            f"python -m solution.weights golden {bundle.folder}"
        )
    golden = json.loads(path.read_text())
    key = (torch.device(device).type, dtype)
    if key not in TOLERANCE:
        raise WeightsError(f"the self-test has no tolerance for {dtype} on {device}")
    for side, expected in golden["pictures"].items():
        if _picture_hash(int(side)) != expected:
            raise WeightsError(f"{path}: the golden pictures of side {side} come out differently here")
    if set(golden["logits"]) != set(bundle.configs):
        raise WeightsError(
            f"{path}: of {sorted(golden['logits'])}, expected {sorted(bundle.configs)}; make it again: "
            f"python -m solution.weights golden {bundle.folder}"
        )
    members = load_members(bundle, device=device, dtype=dtype)
    worst = {}
    for name, found in golden_logits(members).items():
        pairs = zip(found, golden["logits"][name], strict=True)
        shares = [abs(x - y) / max(1.0, abs(y)) for x, y in pairs]
        # NaN compares false with everything: here it must fail
        worst[name] = math.inf if any(map(math.isnan, shares)) else max(shares)
    return SelfTest(worst, TOLERANCE[key], f"{device}, {str(dtype).split('.')[-1]}")
