"""Doors: what a user can cause ends in one line and its exit code; help comes at once; scoring imports no more than it needs."""

import ast
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_bundle, make_pictures

import submit
from solution import errors
from solution.errors import KitError, UsageError, door
from solution.models.devices import pick_device

ROOT = Path(__file__).resolve().parents[2]


def has_entry(path):
    return 'if __name__ == "__main__"' in path.read_text()


DOORS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "solution").rglob("*.py")
    if has_entry(path)
)


def raising(error):
    @door("prog", interrupted="interrupted; go on", refused=(ArithmeticError,))
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KitError("a\n  thing is missing"), 3, "prog: a thing is missing"),
        (UsageError("--x 3: expected 1 or 2"), 2, "prog: --x 3: expected 1 or 2"),
        (OSError(errno.ENOSPC, "No space left on device", "out.csv"), 3, "prog: out.csv: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "out.csv"), 3, "prog: out.csv: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "out.csv"), 3, "prog: out.csv: Is a directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "prog: No space left on device"),
        (ZeroDivisionError("division by zero"), 2, "prog: division by zero"),
        (KeyboardInterrupt(), 130, "prog: interrupted; go on"),
    ],
)
def test_what_a_user_can_cause_is_one_line(error, code, line, capsys):
    assert raising(error)() == code
    told = capsys.readouterr()
    assert told.out == "" and told.err.strip() == line


def test_json_that_is_none_is_named(capsys):
    @door("prog")
    def main():
        json.loads("{")

    assert main() == 2
    assert capsys.readouterr().err.startswith("prog: no JSON: ")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ValueError("x"), OSError("x")])
def test_a_mistake_in_the_code_shows_its_traceback(error):
    with pytest.raises(type(error)):
        raising(error)()


def test_every_error_of_the_kit_has_an_exit_code():
    """Each class that a room defines comes from the common base, so every door knows how it ends."""
    strays = []
    for path in [*(ROOT / "solution").rglob("*.py"), ROOT / "submit.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base) for base in node.bases}
                if bases & {"Exception", "ValueError", "RuntimeError"} and not bases & {"KitError", "UsageError"}:
                    strays.append(node.name)
    # The base itself, and the GPU benchmark's signal between its own stages.
    assert sorted(strays) == ["KitError", "LeftOut"]
    assert {errors.USAGE, errors.ENVIRONMENT, errors.FAILURES, errors.INTERRUPTED} == {2, 3, 4, 130}


# ------------------------------------------------------------------------------------------------ devices
def test_devices_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for word in ("gpu", "meta", "cpux"):
        with pytest.raises(UsageError, match=f"--device {word}: no such device"):
            pick_device(word)
    with pytest.raises(errors.DeviceError, match="--device cuda: torch sees no GPU"):
        pick_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(errors.DeviceError, match="--device mps"):
        pick_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(errors.DeviceError, match="there are 2 GPUs"):
        pick_device("cuda:2")


@pytest.mark.parametrize("word, code", [("gpu", 2), ("cuda", 3)])
def test_a_missing_device_ends_a_submission_in_one_line(word, code, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert submit.main(["--selftest", "--device", word]) == code
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and told.err.startswith(f"submit: --device {word}: ")


# ------------------------------------------------------------------------------------------------ at once
@pytest.mark.parametrize("name", ["submit", *DOORS])
def test_help_comes_at_once(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # CPU seconds, which a busy machine stretches little; importing torch alone takes more.
    assert spent < 1.5, f"{spent:.2f} s"


# ------------------------------------------------------------------------------------------------ no more than needed
def test_scoring_imports_no_studies_no_augmentation_and_no_importer(tmp_path):
    make_bundle(tmp_path / "bundle", ("global", "face"))
    make_pictures(tmp_path / "in", 2)
    words = ["--weights", tmp_path / "bundle", "--input", tmp_path / "in", "--out", tmp_path / "preds.csv"]
    words += ["--device", "cpu", "--workers", "0", "--explain", "1"]
    code = (
        "import sys, submit; code = submit.main(sys.argv[1:]); assert code == 0, code; "
        "print('\\n'.join(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.splitlines())
    assert "solution.scoring.ensemble" in modules
    unwanted = ("solution.studies", "solution.data.training", "solution.bundles.ntire26", "albumentations")
    assert not [m for m in modules if m.startswith(unwanted)]
