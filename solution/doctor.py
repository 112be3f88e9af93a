"""Entry: say what this machine has and what it lacks, before a long run finds out.

`python -m solution.doctor [--weights BUNDLE] [--device cpu|cuda] [--json]` prints one line per check (name, ok / note /
FAIL, what was found, what to do). Nothing is downloaded. Exit code 0, or 3 when a check failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from solution.errors import door
from solution.io import cores

# Nothing but the standard library in these: the doctor must come even where torch does not import.
ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
# What the published entry takes, in GB: downloads and cache on disk, memory for its towers in float32.
DISK_GIANT, MEMORY_GIANT, MEMORY_COMPACT = 22, 8, 2


@dataclass(frozen=True)
class Check:
    """One finding. status: `ok`, `note` (works, but know it) or `FAIL` (`advice` says what to do)."""

    name: str
    status: str
    found: str
    advice: str = ""


def examine(weights: str | None = None, device: str | None = None) -> list[Check]:
    """All checks, in order; one that raises is a failed check that tells the error.

    weights: the bundle to verify (None: `compact`, if it is there). device: where the forward pass runs (None: the GPU
        if there is one).
    """
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("torch pair", check_torch_pair),
        ("device", check_device),
        ("memory", check_memory),
        ("disk", check_disk),
        ("write access", check_write_access),
        ("hub", check_hub),
        ("face detector", check_face_detector),
        ("weights", lambda: check_weights(weights)),
        ("forward pass", lambda: check_forward(device)),
    ]
    found = []
    for name, check in checks:
        try:
            found.append(check())
        except Exception as error:  # noqa: BLE001 - a check that breaks is a finding
            text = " ".join(f"{type(error).__name__}: {error}".split())
            found.append(Check(name, "FAIL", text, "see the checks above"))
    return found


def check_python() -> Check:
    """The interpreter is recent enough."""
    found = f"{platform.python_version()} on {platform.platform()} ({sys.executable})"
    if sys.version_info >= OLDEST_PYTHON:
        return Check("python", "ok", found)
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Check("python", "FAIL", found, f"install Python {wanted} or newer")


def check_packages() -> Check:
    """Every line of requirements.txt is met by what is installed."""
    from packaging.requirements import Requirement

    met, unmet = [], []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        wanted = Requirement(text)
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{text} (not installed)")
            continue
        fits = wanted.specifier.contains(version, prereleases=True)
        (met if fits else unmet).append(f"{wanted.name} {version}")
    if unmet:
        advice = "pip install -r requirements.txt"
        return Check("packages", "FAIL", f"unmet: {', '.join(unmet)}", advice)
    return Check("packages", "ok", ", ".join(met))


def check_torch_pair() -> Check:
    """torch and torchvision import, and torchvision's compiled operators load into this torch."""
    torch = importlib.import_module("torch")
    torchvision = importlib.import_module("torchvision")
    found = f"torch {torch.__version__} with torchvision {torchvision.__version__}"
    try:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    except (RuntimeError, NotImplementedError) as error:
        return Check(
            "torch pair",
            "FAIL",
            f"{found}: {str(error).splitlines()[0]}",
            "install the two together from one index: pip install --force-reinstall torch torchvision",
        )
    return Check("torch pair", "ok", found)


def check_device() -> Check:
    """What computes: the GPUs with CUDA and driver, or the CPU, named as such."""
    import torch

    driver = _nvidia_smi()
    if torch.cuda.is_available():
        names = [
            f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
            for i in range(torch.cuda.device_count())
        ]
        found = f"GPU: {', '.join(names)}; CUDA {torch.version.cuda}, driver {driver or 'unknown'}"
        return Check("device", "ok", found)
    found = f"CPU: {cores()} cores, {torch.get_num_threads()} threads; no GPU in use"
    if driver:
        advice = (
            "the driver sees a GPU, torch does not: install a torch built for CUDA"
            if torch.version.cuda is None
            else f"torch is built for CUDA {torch.version.cuda}: update the driver, and check CUDA_VISIBLE_DEVICES"
        )
        return Check("device", "note", f"{found}, though driver {driver} is", advice)
    return Check(
        "device",
        "note",
        found,
        "compact runs well on a CPU; the giant members want a GPU",
    )


def _nvidia_smi() -> str:
    """The NVIDIA driver's version, or nothing where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    done = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else ""


def check_memory() -> Check:
    """Main memory, and what it is enough for; a container's limit counts."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total, free = min(total, int(text)), min(free, int(text))
    found = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
    if free < MEMORY_COMPACT * 1e9:
        advice = f"free some: even compact wants {MEMORY_COMPACT} GB"
        return Check("memory", "FAIL", found, advice)
    if free < MEMORY_GIANT * 1e9:
        advice = f"enough for compact; the giant members want {MEMORY_GIANT} GB on a CPU"
        return Check("memory", "note", found, advice)
    return Check("memory", "ok", found)


def check_disk() -> Check:
    """Free space here and in the Hub's cache."""
    from huggingface_hub import constants

    places = {"here": Path.cwd(), "Hub cache": Path(constants.HF_HUB_CACHE)}
    free = {name: shutil.disk_usage(_existing(path)).free for name, path in places.items()}
    found = ", ".join(f"{name} {size / 1e9:.0f} GB free" for name, size in free.items())
    if free["here"] < 1e9:
        return Check("disk", "FAIL", found, "free at least 1 GB")
    if free["Hub cache"] < DISK_GIANT * 1e9:
        advice = f"the published entry takes {DISK_GIANT} GB in the cache; HF_HOME moves it"
        return Check("disk", "note", found, advice)
    return Check("disk", "ok", found)


def _existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def check_write_access() -> Check:
    """A file can be made here, in the Hub's cache, and among temporary files."""
    from huggingface_hub import constants

    places = [Path.cwd(), Path(constants.HF_HUB_CACHE), Path(tempfile.gettempdir())]
    denied = []
    for place in places:
        try:
            with tempfile.NamedTemporaryFile(dir=_existing(place)):
                pass
        except OSError as error:
            denied.append(f"{place} ({error.strerror})")
    if denied:
        return Check(
            "write access",
            "FAIL",
            f"denied: {', '.join(denied)}",
            "run in a folder of your own; HF_HOME and TMPDIR move the others",
        )
    return Check("write access", "ok", ", ".join(map(str, places)))


def check_hub() -> Check:
    """How the Hub would be reached, and which public towers and bundles are here already. No request is made."""
    from huggingface_hub import constants, get_token

    from solution import presets
    from solution.bundles import hub
    from solution.bundles.store import published_home

    here = ["ntire26 bundle"] if published_home().is_dir() else []
    fusion = presets.preset("ntire26", "fusion")
    for tower in (fusion.tower, fusion.clip):
        ref = hub.HubRef(tower.source, tower.revision)
        files = ("model.safetensors", "open_clip_model.safetensors")
        if any(hub.cached(ref, name) for name in files):
            here.append(tower.source)
    login = "logged in" if get_token() else "not logged in"
    found = f"{constants.ENDPOINT}, cache {constants.HF_HUB_CACHE}, {login}; cached: {', '.join(here) or 'none'}"
    if constants.HF_HUB_OFFLINE:
        return Check("hub", "note", f"offline (HF_HUB_OFFLINE); {found}")
    return Check("hub", "ok", found)


def check_face_detector() -> Check:
    """The detector's model is installed and OpenCV reads it."""
    import numpy as np

    from solution.config import FaceConfig
    from solution.data.faces import FaceLocator, detector_file

    FaceLocator(FaceConfig()).locate(np.zeros((64, 64, 3), np.uint8))
    return Check("face detector", "ok", str(detector_file()))


def check_weights(weights: str | None) -> Check:
    """The bundle is there and every file matches its SHA-256; a preset that was never imported is not imported here."""
    from solution.bundles.bundle import MANIFEST
    from solution.bundles.store import COMPACT, open_bundle, published_home
    from solution.errors import WeightsError

    name = weights or "compact"
    if weights is None and not (COMPACT / MANIFEST).is_file():
        return Check("weights", "note", "no weights/compact", "name others: --weights")
    if name == "ntire26" and not (published_home() / MANIFEST).is_file():
        advice = f"python -m solution.weights import-ntire26 --out {published_home()}"
        return Check("weights", "note", "ntire26 is not imported yet", advice)
    if name.startswith("hf:"):
        return Check(
            "weights",
            "note",
            f"{name} is on the Hub",
            f"python -m solution.weights pull {name}",
        )
    try:
        bundle = open_bundle(name)
    except WeightsError as error:
        return Check("weights", "FAIL", str(error), "restore or fetch the bundle")
    size = sum((bundle.folder / file).stat().st_size for file in bundle.files)
    found = f"{bundle.name}: {', '.join(bundle.configs)}; {len(bundle.files)} files, {size / 1e6:.0f} MB, hashes match"
    return Check("weights", "ok", found)


def check_forward(device: str | None) -> Check:
    """One forward pass of a tiny member, on the device and on the CPU, which must agree."""
    import torch

    from solution.bundles.members import build_member, random_towers
    from solution.presets import preset

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = preset("tiny", "global")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        member = build_member(config, random_towers([config])).eval()
    side = config.view.side
    pictures = torch.arange(2 * 3 * side * side).remainder(251).to(torch.uint8)
    pictures = pictures.view(2, 3, side, side)
    with torch.inference_mode():
        expected = member(pictures).logit
        member, pictures = member.to(device), pictures.to(device)
        member(pictures)  # the first call pays for setting up
        start = time.perf_counter()
        found = member(pictures).logit.cpu()
        spent = (time.perf_counter() - start) * 1e3
    if not torch.isfinite(found).all() or (found - expected).abs().max() > 2e-2:
        return Check(
            "forward pass",
            "FAIL",
            f"{device} gives {found.tolist()}, the CPU {expected.tolist()}",
            "this device computes wrongly with this torch: update driver and torch, or use --device cpu",
        )
    return Check("forward pass", "ok", f"a tiny member on {device}: {spent:.1f} ms")


@door("doctor")
def main(argv: Sequence[str] | None = None) -> int:
    """Print the checks as text or JSON; 0 all well, 3 something failed."""
    parser = argparse.ArgumentParser(prog="python -m solution.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="the bundle to verify (default: compact)")
    parser.add_argument("--device", help="where the forward pass runs, e.g. cpu, cuda")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    checks = examine(arguments.weights, arguments.device)
    well = all(check.status != "FAIL" for check in checks)
    if arguments.json:
        listed = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"ok": well, "checks": listed}, indent=1))
        return 0 if well else 3
    for check in checks:
        print(f"{check.name:14} {check.status:4}  {check.found}")
        if check.advice:
            print(f"{'':14} ->    {check.advice}")
    print("all well" if well else "something is missing: see FAIL above")
    return 0 if well else 3


if __name__ == "__main__":
    sys.exit(main())
