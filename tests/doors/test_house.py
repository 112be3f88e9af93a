"""The shape of the house: one-way floors by wing, light imports, no forbidden words, formatted sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# From the ground up. What stands on a floor imports from its own wing and from the floors below; `data` and `models`
# share a floor and do not know of each other. Files beside the wings that are not of the ground are doors.
GROUND = {"config", "presets", "preset_dinov3", "preset_gend", "records", "errors", "io"}
FLOORS = {"ground": 0, "data": 1, "models": 1, "bundles": 2, "scoring": 3, "evaluation": 4}
FLOORS |= {"training": 5, "studies": 6, "doors": 7}
WINGS = set(FLOORS) - {"ground", "doors"}


def rooms(house):
    """The Python files of a `solution` folder, `__init__.py` apart."""
    return sorted(p for p in house.rglob("*.py") if p.stem != "__init__")


ROOMS = rooms(ROOT / "solution")
each_room = pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.relative_to(ROOT / "solution").as_posix())


def wing_of(parts):
    """The wing of a module by its names below `solution`: ("data", "images") or ("train",)."""
    if parts[0] in WINGS:
        return parts[0]
    return "ground" if parts[0] in GROUND else "doors"


def imported(path):
    """Dotted names that a file imports from `solution` or from submit.py, wherever in the file, as tuples."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            if node.level:
                names = [f"solution.{'.' * node.level}{node.module or ''}"]
            elif node.module == "solution" or (node.module or "").startswith("solution."):
                parts = node.module.split(".")
                # `from solution.data import images` names a room, `from solution.config import preset` does not.
                whole = len(parts) == 1 or len(parts) == 2 and parts[1] in WINGS
                names = [f"{node.module}.{a.name}" for a in node.names] if whole else [node.module]
            elif node.module == "submit":
                names = ["solution.submit"]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("solution.")]
            names += ["solution.submit" for a in node.names if a.name == "submit"]
        yield from (tuple(name.split(".")[1:]) for name in names)


def wrong_ways(house):
    """What breaks the order of the floors in a `solution` folder, a line each."""
    found = []
    for path in rooms(house):
        place = path.relative_to(house)
        if len(place.parts) > 2:
            found.append(f"{place}: no folder inside a wing")
            continue
        if len(place.parts) == 2 and place.parts[0] not in WINGS:
            found.append(f"{place}: {place.parts[0]} is no wing")
            continue
        wing = wing_of(place.with_suffix("").parts)
        for parts in imported(path):
            other = wing_of(parts) if parts[0] else "relative import"
            if other != wing and FLOORS.get(other, 9) >= FLOORS[wing]:
                found.append(f"{place} ({wing}) imports {'.'.join(parts)} ({other})")
    return found


# ------------------------------------------------------------------------------------------------ the checker itself
@pytest.fixture
def made_up(tmp_path):
    """Writes {place: source} as a house and returns what is wrong with it."""

    def build(files):
        for place, source in files.items():
            path = tmp_path / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return wrong_ways(tmp_path)

    return build


def test_a_house_in_order_passes(made_up):
    assert not made_up(
        {
            "config.py": "import json\nfrom solution.errors import Refused\n",
            "data/images.py": "from solution import config\nfrom solution.data.faces import locate\n",
            "bundles/hub.py": "from solution.models import towers\nimport solution.data.images\n",
            "studies/drift.py": "from solution.evaluation.measure import Condition\n",
            "train.py": "from solution import evaluate\nfrom solution.studies import drift\n",
        }
    )


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("config.py", "from solution.data import images"),
        ("io.py", "import solution.train"),
        ("data/images.py", "from solution.models.towers import build_tower"),
        ("models/qtfp.py", "from solution.data import images"),
        ("models/qtfp.py", "def f():\n    from solution.evaluation import metrics\n"),
        ("bundles/hub.py", "from solution.scoring import vote"),
        ("scoring/ensemble.py", "from solution.weights import open_bundle"),
        ("scoring/ensemble.py", "from solution import config, weights"),
        ("evaluation/report.py", "from solution.studies import drift"),
        ("studies/gpu.py", "from solution import train"),
        ("studies/gpu.py", "import submit"),
        ("data/images.py", "from ..models import towers"),
        ("data/faces/yunet.py", ""),
        ("helpers/faces.py", ""),
    ],
)
def test_a_house_out_of_order_is_told(made_up, place, source):
    (line,) = made_up({place: source, "records.py": ""})
    assert line.startswith(place)


# ------------------------------------------------------------------------------------------------ this house
def test_imports_go_one_way():
    assert wrong_ways(ROOT / "solution") == []


def test_every_wing_is_there():
    assert {p.parent.name for p in ROOMS} == WINGS | {"solution"}
    assert all(p.read_text() == "" for p in (ROOT / "solution").rglob("__init__.py"))


def test_the_tests_are_laid_out_by_wing():
    folders = {p.parent.relative_to(ROOT / "tests").as_posix() for p in (ROOT / "tests").rglob("test_*.py")}
    assert folders == WINGS | {"doors"}


@each_room
def test_a_room_opens_with_its_sentence(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_public_functions_are_documented():
    bare = []
    for path in ROOMS:
        for node in ast.parse(path.read_text()).body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if named and node.name not in ("main", "parse") and not ast.get_docstring(node):
                bare.append(f"{path.name}: {node.name}")
    assert not bare


def test_nothing_names_a_machine_or_loads_loosely():
    forbidden = re.compile(r"/work/|/tmp/|/opt/|strict\s*=\s*False|except\s*:|pickle\.load|weights_only\s*=\s*False")
    texts = [p for p in ROOT.rglob("*.md") if not {".venv", ".git", "runs"} & set(p.relative_to(ROOT).parts)]
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *texts, *ROOMS]:
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


# ------------------------------------------------------------------------------------------------ light imports
def loaded_by(code):
    """The modules that a fresh interpreter has after `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


def test_files_and_pictures_import_without_torch():
    assert "torch" not in loaded_by("import solution.data.images, solution.scoring.files, solution.config")


def test_scoring_imports_nothing_of_studies_augmentation_or_import():
    loaded = loaded_by("import submit, solution.scoring.stream, solution.scoring.judge, solution.scoring.cluster")
    unwanted = ("solution.studies", "solution.data.self_blend", "solution.bundles.ntire26", "albumentations")
    assert not {name for name in loaded if name.startswith(unwanted)}
