"""Every door over a table of what a user can get wrong: one line that says so, the exit code of the contract, no traceback."""

import errno
import importlib
import os
import re
import signal
import sys
import types

import pytest
import torch
from make_smoke_data import write
from tiny import make_bundle, make_pictures

# Door, what follows it, exit code, and what the line says. Words in braces are paths of `places`.
TABLE = [
    # a device that this machine has not, or that is none
    ("submit", "--input {pictures} --out {out}.csv --weights {bundle} --device cuda", 3, "sees no GPU"),
    ("submit", "--input {pictures} --out {out}.csv --weights {bundle} --device gpu", 2, "no such device"),
    ("solution.evaluate", "--data {manifest} --weights {bundle} --out {out} --device cuda", 3, "sees no GPU"),
    ("solution.explain", "pictures --input {pictures} --weights {bundle} --out {out} --device cuda", 3, "sees no GPU"),
    ("solution.train", "--member global --data {manifest} --out {out} --device cuda", 3, "sees no GPU"),
    (
        "solution.studies.mechanisms",
        "--weights {bundle} --data {manifest} --out {out} --device gpu",
        2,
        "no such device",
    ),
    ("solution.studies.localize", "--weights {bundle} --data {manifest} --out {out} --device cuda", 3, "sees no GPU"),
    # nothing there
    ("submit", "--input {gone} --out {out}.csv --weights {bundle}", 2, "No such file"),
    ("submit", "--input {empty} --out {out}.csv --weights {bundle}", 2, "no pictures or videos"),
    ("submit", "--input {pictures} --out {gone}/a.csv --weights {bundle}", 3, "no folder"),
    ("submit", "--input {pictures} --out {out}.csv --weights {gone}", 3, "no such folder"),
    ("solution.train", "--member global --data {gone} --out {out}", 2, "no such manifest"),
    ("solution.train", "--member global --data {empty} --out {out}", 2, "expected the folders real/ and fake/"),
    ("solution.train", "--member global --data {clips} --out {out}", 2, "python -m solution.prepare"),
    ("solution.train", "--member nobody --data {manifest} --out {out}", 2, "nobody"),
    ("solution.train", "--member global --data {manifest} --out {out} --set optim.l=1", 2, "optim.l"),
    ("solution.assemble", "--members {gone} --names global --data {manifest} --out {out}", 3, "gone"),
    (
        "solution.assemble",
        "--members {gone} --names global --data {manifest} --out {out} --worst-false-alarms 10",
        2,
        "'10'; expected a share of pictures between 0 and 1",
    ),
    ("solution.evaluate", "--data {gone} --weights {bundle} --out {out}", 2, "no such manifest"),
    ("solution.evaluate", "--preds {gone}.csv --labels {labels} --out {out}", 2, "No such file"),
    ("solution.evaluate", "--out {out}", 2, "give either --data"),
    ("solution.explain", "pictures --input {gone} --weights {bundle} --out {out}", 2, "No such file"),
    ("solution.prepare", "{gone} --out {out}", 2, "gone"),
    ("solution.prepare", "{empty} --out {out}", 2, "empty"),
    ("solution.weights", "show {gone}", 3, "gone"),
    ("solution.weights", "verify {gone}", 3, "gone"),
    ("solution.benchmark", "faces --faces {gone}", 2, "gone"),
    ("solution.benchmark", "degrade --image {gone}.png", 2, "No such file"),
    ("solution.benchmark", "degrade --image {file}", 2, "not a picture"),
    ("solution.benchmark", "vlaforge --preset nothing", 2, "nothing"),
    ("solution.benchmark", "inference --weights {gone}", 3, "ended with code 3"),
    ("solution.benchmark", "parity --data {gone} --weights {bundle}", 2, "gone"),
    ("solution.benchmark", "gpu --out {file}", 3, "GPU"),
    ("solution.studies.ablate", "--study nothing --out {out}", 2, "nothing"),
    ("solution.studies.ablate", "--study qtfp --out {out} --table", 2, "no finished run"),
    ("solution.studies.ablate", "--study qtfp --out {out} --seeds 0,x -- --data {manifest}", 2, "seeds"),
    ("solution.studies.ablate", "--leave-out nobody --out {out} --table -- --data {manifest}", 2, ""),
    ("solution.studies.ablate", "--leave-out sdxl --out {out} -- --data", 2, "--data"),
    ("solution.studies.qtfp_tokens", "--study --seeds 0", 2, "at least 1"),
    ("solution.studies.qtfp_tokens", "--study --memory", 2, "not allowed"),
    ("solution.studies.shortcuts", "--data {bad_csv}", 2, "perhaps"),
    ("solution.studies.localize", "--weights {gone} --data {manifest} --out {out}", 3, "gone"),
    ("solution.studies.localize", "--weights {bundle} --data {gone} --out {out}", 2, "gone"),
    ("solution.studies.mechanisms", "--weights {gone} --data {manifest} --out {out}", 3, "gone"),
    ("solution.studies.mechanisms", "--weights {bundle} --data {gone} --out {out}", 2, "gone"),
    ("solution.app", "--weights {gone}", 3, "gone"),
    ("solution.app", "--weights {bad_bundle}", 3, "ensemble.json"),
    ("solution.app", "--weights {bundle} --device gpu", 2, "no such device"),
    ("solution.app", "--weights {bundle} --port 99999", 3, "--port"),
    ("solution.explain", "drift --data {gone} --weights {bundle} --out {out}", 2, "gone"),
    ("solution.explain", "drift --data {bad_csv} --weights {bundle} --out {out}", 2, "perhaps"),
    ("submit", "--input {labelled} --out {out}.csv --weights {bundle}", 2, "line 2"),
    ("solution.train", "--member global --data {labelled} --out {out}", 2, "no label in it"),
    ("solution.data.self_blend", "--input {gone} --out {out}", 2, "No such file"),
    ("solution.data.degradation", "--image {gone}.png --out {out}.png", 2, "No such file"),
    ("solution.studies.shortcuts", "--data {gone}", 2, "no such manifest"),
    ("solution.scoring.files", "check {gone}.csv", 2, "No such file"),
    ("solution.scoring.files", "merge {gone}.csv --out {out}.csv", 2, "No such file"),
    # outputs that are something else
    ("submit", "--input {pictures} --out {folder_csv} --weights {bundle}", 3, "not a regular file"),
    ("submit", "--input {list} --out {list} --weights {bundle}", 2, "is the --input"),
    ("solution.evaluate", "--preds {preds} --labels {labels} --out {file}", 3, "file"),
    ("solution.prepare", "{tree} --out {file} --crop none --workers 0 --quiet", 3, "file"),
    ("solution.prepare", "{tree} --out {occupied} --crop none --workers 0 --quiet", 2, "did not make"),
    # contents
    ("solution.train", "--member global --data {bad_json} --out {out}", 2, "no JSON"),
    ("solution.train", "--member global --data {bad_csv} --out {out}", 2, "label is 'perhaps'"),
    ("solution.train", "--member global --data {columns} --out {out}", 2, "column path, label is missing"),
    ("solution.evaluate", "--preds {preds} --labels {bad_csv} --out {out}", 2, "perhaps"),
    ("solution.evaluate", "--preds {columns} --labels {labels} --out {out}", 2, "none of the columns"),
    ("solution.evaluate", "--data {clips} --frames 2 --weights {bundle} --out {out}", 2, "a.mp4"),
    ("solution.prepare", "{bad_json} --out {out}", 2, "bad.json"),
    ("solution.weights", "show {bad_bundle}", 3, "ensemble.json"),
    ("submit", "--input {pictures} --out {out}.csv --weights {bad_bundle}", 3, "ensemble.json"),
    ("solution.doctor", "--weights {gone}", 3, ""),
    (
        "solution.train",
        "--member global --preset tiny --random-towers --data {manifest} --out {out} --validation-limit 1 --workers 0 --quiet",
        2,
        "--validation-limit",
    ),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    for name in ("empty", "folder.csv", "occupied/images", "bad", "clips/real", "clips/fake"):
        (root / name).mkdir(parents=True)
    bundle = make_bundle(root / "bundle", ("global",)).folder
    pictures = make_pictures(root / "pictures", 2)
    make_pictures(root / "tree/real", 3)
    make_pictures(root / "tree/fake", 3, seed=1)
    names = ("clips/real/a.mp4", "clips/fake/b.mp4", "file", "bad.json", "bad/ensemble.json", "list.txt")
    contents = ("no video at all, only words", "other words that are none", "x", '{"a": [', "{", "pictures/00000.png\n")
    for name, content in zip(names, contents):
        (root / name).write_text(content)
    (root / "labelled.txt").write_text("pictures/00000.png 0\npictures/00001.png\n")
    tables = {
        "preds": "image,score\na.png,0.1\nb.png,0.9\n",
        "labels": "path,label\na.png,0\nb.png,1\n",
        "bad_csv": "path,label\na.png,perhaps\n",
        "columns": "a,b\n1,2\n",
    }
    for name, content in tables.items():
        (root / f"{name}.csv").write_text(content)
    return {
        "root": root,
        "bundle": bundle,
        "pictures": pictures,
        "manifest": write(root / "smoke"),
        "bad_json": root / "bad.json",
        "bad_bundle": root / "bad",
        "folder_csv": root / "folder.csv",
        "list": root / "list.txt",
        "labelled": root / "labelled.txt",
        **{name: root / name for name in ("empty", "gone", "file", "occupied", "clips", "tree")},
        **{name: root / f"{name}.csv" for name in tables},
    }


@pytest.fixture(autouse=True)
def as_before():
    """Doors set what happens on SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(door, words, places, tmp_path):
    """A door's exit code, as the shell would see it."""
    given = [word.format(out=tmp_path / "out", **places) for word in words.split()]
    try:
        return importlib.import_module(door).main(given)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(("door", "words", "code", "said"), TABLE, ids=lambda value: str(value)[:60])
def test_what_a_user_gets_wrong_is_one_line_and_its_code(
    door, words, code, said, places, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if door == "solution.app":  # which imports them first
        for library in ("gradio", "uvicorn"):
            monkeypatch.setitem(sys.modules, library, types.ModuleType(library))
    assert run(door, words, places, tmp_path) == code
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    if said:
        last = [line for line in told.err.splitlines() if line.strip()][-1]
        assert re.match(r"[\w. -]+: ", last) and said in told.err, told.err
    assert places["list"].read_text() == "pictures/00000.png\n"


QUICK = "--device cpu --workers 0"
FULL = [
    ("submit", f"--input {{pictures}} --out {{out}}.csv --weights {{bundle}} {QUICK}"),
    ("solution.evaluate", "--preds {preds} --labels {labels} --out {out}"),
    ("solution.prepare", "{tree} --out {out} --crop none --workers 0 --quiet"),
    (
        "solution.train",
        f"--member global --preset tiny --random-towers --data {{manifest}} --out {{out}} --quiet {QUICK}",
    ),
]


@pytest.mark.parametrize(("door", "words"), FULL, ids=[door for door, _ in FULL])
def test_a_full_disk_is_one_line(door, words, places, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run(door, words, places, tmp_path) == 3
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    assert told.err.splitlines()[-1].endswith("No space left on device")
