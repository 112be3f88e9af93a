"""The commands that the README gives, run as it gives them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "2"}


def run(*command, cwd=ROOT, **environment):
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_main_command_scores_every_photo(tmp_path):
    command = "python submit.py --input tests/photos --out preds.csv"
    assert f"pip install -r requirements.txt && {command}" in README
    out = tmp_path / "preds.csv"
    done = run(sys.executable, "submit.py", "--input", "tests/photos", "--out", out)
    assert done.returncode == 0, done.stderr
    photos = sorted(p.name for p in (ROOT / "tests/photos").iterdir())
    assert [row["image"] for row in rows(out)] == photos
    assert all(0 <= float(row["score"]) <= 1 for row in rows(out))
    record = json.loads((tmp_path / "preds.run.json").read_text())
    assert record["counts"]["failed"] == 0
    assert record["weights"]["name"] == "compact"


def test_the_shipped_weights_compute_here_what_they_should():
    done = run(sys.executable, "submit.py", "--selftest", "--device", "cpu")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def test_the_shipped_bundle_is_whole_and_small_enough():
    folder = ROOT / "weights/compact"
    done = run(sys.executable, "-m", "solution.weights", "verify", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size <= 90e6


def test_train_sh_says_what_it_misses(tmp_path):
    for given, missing in [({}, "set DATA"), ({"DATA": "x"}, "set PRESET")]:
        done = run("bash", "train.sh", **given)
        assert done.returncode != 0 and missing in done.stderr
    done = run("bash", "train.sh", DATA="x", PRESET="compact", OUT=str(tmp_path))
    assert done.returncode != 0 and "set TOWER" in done.stderr
    assert run("bash", "train.sh", "--fast").returncode == 2


def test_smoke_training_leaves_a_bundle_that_scores(tmp_path):
    """`bash train.sh --smoke`: data, five members, calibration, bundle; then a submission with it."""
    out = tmp_path / "smoke"
    done = run("bash", "train.sh", "--smoke", OUT=str(out), EXTRA="--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train.sh: done" in done.stdout
    members = json.loads((out / "bundle/ensemble.json").read_text())["members"]
    assert members == ["global", "face", "fusion", "qtfp", "vlaforge"]
    csv_out = tmp_path / "preds.csv"
    done = run(
        sys.executable, "submit.py", "--weights", out / "bundle", "--input", out / "data/val",
        "--out", csv_out, "--members", "all", "--exact",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(rows(csv_out)) == 16
    columns = rows(tmp_path / "preds.members.csv")[0]
    assert {f"{m}_p" for m in members} < set(columns)


@pytest.mark.parametrize("name", ["submit.py", "train.sh", "test.sh", "LICENSE"])
def test_the_shape_of_the_kit(name):
    assert (ROOT / name).is_file()
    allowed = {
        "README.md",
        "requirements.txt",
        "submit.py",
        "train.sh",
        "test.sh",
        "LICENSE",
    }
    tracked = run("git", "ls-files").stdout.split()
    assert {t for t in tracked if "/" not in t} - allowed <= {".gitignore"}
