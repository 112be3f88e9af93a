"""The shape of the house: one-way imports, light imports, no forbidden words, formatted sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A room imports only rooms to its left.
ORDER = [
    "config",
    "records",
    "images",
    "degradation_ops",
    "metrics",
    "calibration",
    "vote",
    "submission",
    "faces",
    "degradation",
    "pseudo_fakes",
    "data",
    "backbones",
    "member",
    "streams",
    "qtfp",
    "vlaforge",
    "flops",
    "members",
    "hub",
    "bundle",
    "published",
    "weights",
    "journal",
    "fastpath",
    "predict",
    "train",
    "ablate",
    "shortcuts",
    "localize",
    "measure",
    "report",
    "evaluate",
    "fit",
    "assemble",
    "maps",
    "drift",
    "drift_figures",
    "explain_page",
    "explain",
    "doctor",
    "throughput",
    "benchmark_gpu",
    "benchmark",
]


def rooms():
    return sorted((ROOT / "solution").glob("*.py"))


def imported_rooms(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("solution"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("solution."))


@pytest.mark.parametrize("path", rooms(), ids=lambda p: p.stem)
def test_a_room_imports_only_rooms_above_it(path):
    if path.stem == "__init__":
        assert path.read_text() == ""
        return
    assert path.stem in ORDER, f"{path.name} has no place in the order of rooms"
    wrong = [r for r in imported_rooms(path) if ORDER.index(r) >= ORDER.index(path.stem)]
    assert not wrong, f"{path.name} imports {wrong}"


@pytest.mark.parametrize("path", rooms(), ids=lambda p: p.stem)
def test_a_room_opens_with_its_sentence(path):
    if path.stem != "__init__":
        assert ast.get_docstring(ast.parse(path.read_text()))


def test_public_functions_are_documented():
    bare = []
    for path in rooms():
        for node in ast.parse(path.read_text()).body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if named and node.name not in ("main", "parse") and not ast.get_docstring(node):
                bare.append(f"{path.name}: {node.name}")
    assert not bare


def test_nothing_names_a_machine_or_loads_loosely():
    forbidden = re.compile(r"/work/|/tmp/|/opt/|strict\s*=\s*False|except\s*:|pickle\.load|weights_only\s*=\s*False")
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("*.md"), *rooms()]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if forbidden.search(line):
                found.append(f"{path.name}:{number}: {line.strip()}")
    assert not found


def test_sources_are_formatted_and_clean():
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "solution", "tests", "submit.py"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_submission_rooms_import_without_torch():
    code = "import sys, solution.data.images, solution.scoring.files, solution.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
