"""The scripts at the top: what train.sh asks for, what it leaves, and the shape of the kit."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import make_smoke_data
import pytest

import submit
from solution import assemble, presets, train, weights
from solution.config import MEMBERS, override
from solution.studies import mechanisms

ROOT = Path(__file__).resolve().parents[2]
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


def test_the_shipped_bundle_is_whole_and_small_enough():
    folder = ROOT / "weights/compact"
    assert weights.main(["verify", str(folder)]) == 0
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size <= 110e6


def test_train_sh_says_what_it_misses(tmp_path):
    for given, missing in [({}, "set DATA"), ({"DATA": "x"}, "set PRESET")]:
        done = run("bash", "train.sh", **given)
        assert done.returncode != 0 and missing in done.stderr
    done = run("bash", "train.sh", DATA="x", PRESET="compact", OUT=str(tmp_path))
    assert done.returncode != 0 and "set TOWER" in done.stderr
    assert run("bash", "train.sh", "--fast").returncode == 2


def asked_for(**environment):
    """The words of every `python` command that train.sh starts, in order; PYTHON=echo prints them instead."""
    given = ["--smoke"] if "PRESET" not in environment else []
    done = run("bash", "train.sh", *given, PYTHON="echo", **environment)
    assert done.returncode == 0, done.stderr
    *commands, last = done.stdout.splitlines()
    assert last.startswith("train.sh: done")
    return [line.split() for line in commands]


@pytest.mark.parametrize("preset", ["compact", "giant"])
def test_train_sh_asks_for_what_training_takes(preset, tmp_path):
    (tmp_path / "data.csv").touch()
    *trainings, assembling, last = asked_for(
        PRESET=preset,
        DATA=str(tmp_path / "data.csv"),
        TOWER=str(tmp_path),
        OUT=str(tmp_path / "out"),
    )
    names = []
    for _, module, *words in trainings:
        if module == "solution.weights":
            name = Path(words[-1]).stem.removeprefix("s14-")
            assert words[0] == "cut" and words[2:4] == ["--blocks", str(presets.CUT_BLOCKS[name])]
            continue
        assert module == "solution.train"
        args = train.parse(words)
        names.append(args.member)
        override(presets.preset(args.preset, args.member), args.set)
    assert set(MEMBERS) <= set(names)
    assert assembling[1] == "solution.assemble"
    assert last[1] == "solution.studies.mechanisms" and mechanisms.parse(last[2:]).limit == 200


@pytest.mark.parametrize(
    ("members", "trained"),
    [
        ("vlaforge", ["tight", "vlaforge", "vlaforge"]),
        ("fusion", ["tight", "norms", "fusion"]),
        ("global tight face", ["wide", "tight", "global", "face"]),
        ("face vlaforge", ["tight", "face", "vlaforge", "vlaforge"]),
        ("qtfp", ["qtfp"]),
    ],
)
def test_what_a_member_looks_through_is_trained_before_it(members, trained, tmp_path):
    commands = asked_for(
        PRESET="compact", MEMBERS=members, DATA="x", TOWER=str(tmp_path), OUT=str(tmp_path), BUNDLE="1"
    )
    found = [words[words.index("--member") + 1] for words in commands if "--member" in words]
    assert found == trained


def scores_with_every_member(out, folder):
    """A submission of the smoke data's validation pictures with the bundle, checked."""
    members = json.loads((out / "bundle/ensemble.json").read_text())["members"]
    assert members == list(MEMBERS)
    words = ["--weights", out / "bundle", "--input", out / "data/val", "--exact"]
    words += ["--out", folder / "preds.csv", "--members", "all", "--device", "cpu"]
    assert submit.main([str(word) for word in words]) == 0
    assert len(rows(folder / "preds.csv")) == 16
    columns = rows(folder / "preds.members.csv")[0]
    assert {f"{m}_p" for m in members} < set(columns)


def test_what_smoke_training_asks_for_leaves_a_bundle_that_scores(tmp_path):
    """Data, five members and the tower that two of them look through, calibration, bundle, a submission: one process."""
    out = tmp_path / "smoke"
    (_, *data), *trainings, assembling, last = asked_for(OUT=str(out), EXTRA="--quiet")
    assert data == ["--out", str(out / "data")]
    make_smoke_data.write(out / "data")
    for _, module, *words in trainings:
        assert {"solution.train": train, "solution.weights": weights}[module].main(words) == 0
    assert assembling[:2] == ["-m", "solution.assemble"] and assemble.main(assembling[2:]) == 0
    assert last[:2] == ["-m", "solution.studies.mechanisms"] and mechanisms.main([*last[2:], "--draws", "20"]) == 0
    assert (out / "mechanisms/mechanisms.md").is_file()
    scores_with_every_member(out, tmp_path)


@pytest.mark.slow
def test_smoke_training_leaves_a_bundle_that_scores(tmp_path):
    """The same through `bash train.sh --smoke`, every step in a process of its own."""
    out = tmp_path / "smoke"
    done = run("bash", "train.sh", "--smoke", OUT=str(out), EXTRA="--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train.sh: done" in done.stdout
    scores_with_every_member(out, tmp_path)


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
    assert {t for t in tracked if "/" not in t} - allowed <= {".gitignore", ".ruff.toml"}
