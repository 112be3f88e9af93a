"""The commands that the documents give, taken from their text: they run, and name nothing that is not there.

What is substituted is the data, the weights, the sizes and where results go; everything else is the document's word.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from make_smoke_data import write
from tiny import make_bundle, make_faces

import submit
from solution import train
from solution.presets import preset
from solution.studies import ablate

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "solution/README.md",
        "solution/studies/README.md",
        "weights/README.md",
        "weights/RESULTS.md",
    )
]


# ------------------------------------------------------------------------------------------------ finding them
def commands_in(text):
    """The `python ...` commands of a Markdown text as lists of words: fenced, indented, or within a line."""
    fence = re.compile(r"^```[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\\\n\s*", " ", text)  # a line that goes on
    blocks = fence.findall(text)
    text = fence.sub("", text)
    blocks += re.findall(r"^ {4}(\S[^\n]*)", text, flags=re.MULTILINE)
    lines = [x for b in blocks for x in b.splitlines()]
    # Within a line of prose, and over the end of one.
    lines += re.findall(r"`(python [^`]+)`", text)
    found = []
    for line in lines:
        for part in line.split("&&"):
            if not part.strip().startswith("python "):
                continue
            words = shlex.split(part, comments=True)[1:]
            if words not in found:
                found.append(words)
    return found


COMMANDS = [words for path in DOCUMENTS for words in commands_in(path.read_text())]


def commands_of(door):
    """The commands that start `door` (`submit.py`, or a module's last name) with options, without `python`.

    What is met in a sentence as a bare name, or asks for help, is no command to run.
    """
    start = [door] if door.endswith(".py") else ["-m", f"solution.{door}"]
    rest = [w[len(start) :] for w in COMMANDS if w[: len(start)] == start]
    found = [words for words in rest if any(x.startswith("--") for x in words) and "--help" not in words]
    assert found, f"no document gives a command of {door}"
    return found


def test_commands_are_found_wherever_they_stand():
    text = """
Run `python -m solution.a --data
m.csv`, or

    python -m solution.b --out x   # why

```bash
pip install x && python submit.py --input a \\
  --out b
```
"""
    assert commands_in(text) == [
        ["submit.py", "--input", "a", "--out", "b"],
        ["-m", "solution.b", "--out", "x"],
        ["-m", "solution.a", "--data", "m.csv"],
    ]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_names_what_is_there(words):
    files = [ROOT / "submit.py", *(ROOT / "solution").rglob("*.py")]
    if words[:2] == ["-m", "pytest"]:
        paths = [word for word in words[2:] if word.endswith(".py")]
        assert all((ROOT / path).is_file() for path in paths)
        return
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words[1]
    else:
        assert (ROOT / words[0]).is_file()
        files.append(ROOT / words[0])
    code = "".join(path.read_text() for path in files)
    for word in words:
        if word.startswith("--") and word not in ("--", "--help"):
            assert f'"{word.partition("=")[0]}"' in code, word


# ------------------------------------------------------------------------------------------------ running them
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, scores, a bundle for scoring, one that localises: all of them tiny."""
    folder = tmp_path_factory.mktemp("readme")
    manifest = write(folder / "data", train=8, val=6)
    with manifest.open("a", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([name, 0, "photograph", "val"] for name in make_faces(folder / "data", 2))
    with manifest.open(newline="") as file:
        pictures = [row for row in csv.DictReader(file) if row["split"] == "val"]
    scores = [f"{p['path']},{0.1 + 0.1 * i}" for i, p in enumerate(pictures)]
    labels = [f"{p['path']},{p['label']}" for p in pictures]
    (folder / "preds.csv").write_text("\n".join(["image,score", *scores]))
    (folder / "labels.csv").write_text("\n".join(["path,label", *labels]))
    make_bundle(folder / "compact", ("global", "face"))
    make_bundle(folder / "localizing", ("vlaforge",))
    return folder


def substituted(words, place, out, weights="compact", tower="tiny-wide"):
    """The command's own words, with tiny data and weights, and results under `out`; tower: what a member needs."""
    stored = "tiny-global" if tower == "tiny-wide" else "tiny-semantic"  # of as many blocks
    file = place / f"compact/towers/{stored}.safetensors"
    given = {
        "--data": place / "data/manifest.csv",
        "--weights": place / weights,
        "--preds": place / "preds.csv",
        "--labels": place / "labels.csv",
        "--preset": "tiny",
        "--tower": f"{tower}={file}",
    }
    made, before = [], ""
    for word in words:
        if before in ("--out", "--scores"):
            word = out / word
        made.append(str(given.get(before, word)))
        before = word
    return made


def run(door, words):
    """`python -m solution.DOOR` in this process; its exit code."""
    return importlib.import_module(f"solution.{door}").main(words)


def test_the_first_command_scores_every_photo(tmp_path):
    words = next(w for w in commands_of("submit.py") if "tests/photos" in w)
    readme = (ROOT / "README.md").read_text()
    assert f"pip install -r requirements.txt && python {shlex.join(['submit.py', *words])}" in readme
    place = words.index("--out") + 1
    words[place] = tmp_path / words[place]
    done = subprocess.run(
        [sys.executable, "submit.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with words[place].open(newline="") as file:
        rows = list(csv.DictReader(file))
    photos = sorted(p.name for p in (ROOT / "tests/photos").iterdir())
    assert [row["image"] for row in rows] == photos
    assert all(0 <= float(row["score"]) <= 1 for row in rows)
    record = json.loads(words[place].with_suffix(".run.json").read_text())
    assert record["counts"]["failed"] == 0
    assert record["weights"]["name"] == "compact"


def test_the_shipped_weights_compute_here_what_they_should(capsys):
    assert ["--selftest"] in commands_of("submit.py")
    assert submit.main(["--selftest", "--device", "cpu"]) == 0
    assert "passed" in capsys.readouterr().out


def test_what_evaluates_runs_and_so_does_what_reads_its_scores(place, tmp_path):
    seen = set()
    few, sizes = ["--draws", "10", "--quiet"], ["--limit", "8", "--device", "cpu", "--workers", "0"]
    for words in sorted(commands_of("evaluate"), key=len, reverse=True):
        options = {x for x in words if x.startswith("--")}
        if options <= seen and "--preds" not in options:
            continue  # nothing that an earlier one has not shown
        made = substituted(words, place, tmp_path)
        assert run("evaluate", [*made, *few, *(sizes if "--data" in options else [])]) == 0, words
        out = Path(made[made.index("--out") + 1])
        assert (out / "evaluation.json").is_file() and (out / "report.html").is_file()
        seen |= options
    assert {"--data", "--degraded", "--robustness", "--preds", "--labels"} <= seen
    for words in commands_of("studies.shortcuts"):
        assert run("studies.shortcuts", substituted(words, place, tmp_path)) == 0, words


def test_what_localises_runs(place, tmp_path):
    for words in commands_of("studies.localize"):
        made = substituted(words, place, tmp_path, "localizing")
        assert run("studies.localize", [*made, "--count", "2", "--pictures", "1"]) == 0, words
        out = Path(made[made.index("--out") + 1])
        assert (out / "localization.json").is_file()
        assert len(list(out.glob("*.png"))) == 1


def test_what_leaves_a_generator_out_runs(place, tmp_path, monkeypatch, capsys):
    with (place / "data/manifest.csv").open(newline="") as file:
        pictures = list(csv.DictReader(file))
    manifest = place / "data/generators.csv"
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split", "generator"])
        rows.writerows(
            [p["path"], p["label"], p["split"], "ab"[i // 2 % 2] * int(p["label"])] for i, p in enumerate(pictures)
        )
    monkeypatch.setattr(ablate, "run_to_its_end", lambda c: train.main(c[3:]))
    (words,) = [w for w in commands_of("studies.ablate") if "--leave-out" in w]
    made = substituted(words, place, tmp_path)
    for option, value in (("--leave-out", "a"), ("--steps", "2"), ("--data", str(manifest))):
        made[made.index(option) + 1] = value
    small = ["--quiet", "--set", "train.batch=4"]
    assert run("studies.ablate", [*made, *small]) == 0
    assert "| a: without a | 0 |" in capsys.readouterr().out


def test_what_ablates_runs(place, tmp_path, monkeypatch, capsys):
    for number, words in enumerate(w for w in commands_of("studies.ablate") if "--study" in w):
        name = words[words.index("--study") + 1]
        study = ablate.STUDIES[name]
        tower = preset("tiny", study.member).tower.name
        made = substituted(words, place, tmp_path / str(number), tower=tower)
        # In this process; that a training of its own is started and ends is shown in test_studies.
        monkeypatch.setattr(ablate, "run_to_its_end", lambda c: train.main(c[3:]))
        monkeypatch.setitem(ablate.STUDIES, name, replace(study, shared=ablate._short(2)))
        split = made.index("--")
        first, other, *_ = study.variants
        few = ["--seeds", "0", "--variants", f"{first},{other}"]
        more = ["--workers", "0", "--quiet", "--set", "train.batch=4"]
        assert run("studies.ablate", [*made[:split], *few, *made[split:], *more]) == 0, words
        assert f"| {other} | 0 |" in capsys.readouterr().out


def test_the_lines_of_python_score_pictures(place, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert '"weights/compact"' in code
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code.replace("weights/compact", str(place / "compact")), names)  # noqa: S102
    assert len(names["scores"]) == len(list((ROOT / "tests/photos").iterdir()))
    assert all(0 <= score <= 1 for score in names["scores"])


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1100
