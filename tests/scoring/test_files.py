"""Submission files: the right bytes, or none, and every way in which they can be wrong named."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solution.io import atomic_file, write_atomically
from solution.scoring.files import (
    TRACK_COLUMNS,
    SidecarRow,
    SubmissionError,
    Track,
    check_submission,
    ensure_writable,
    listing_record,
    main,
    members_path,
    order_warning,
    read_scores,
    run_path,
    score_format,
    sidecar_columns,
    write_scores,
    write_sidecar,
)

ROWS = [("b/2.png", 0.25), ("a.png", 1), ("b/10.png", 0.5000004), ('q",\n.png', 0.0)]


# ---------------------------------------------------------------------------------------------------- writing
def test_the_csv_keeps_the_order_and_quotes_odd_names(tmp_path):
    out = tmp_path / "preds.csv"
    write_scores(iter(ROWS), out)
    assert out.read_text().splitlines()[:3] == [
        "image,score",
        "b/2.png,0.250000",
        "a.png,1.000000",
    ]
    assert list(read_scores(out).items()) == [(name, round(float(p), 6)) for name, p in ROWS]
    assert not out.read_bytes().count(b"\r")


def test_the_challenge_file_follows_name_order(tmp_path):
    write_scores(ROWS, tmp_path / "preds.txt", decimals=2)
    assert (tmp_path / "preds.txt").read_bytes() == b"1.00\n0.50\n0.25\n0.00\n"
    assert read_scores(tmp_path / "preds.txt")["line 2"] == 0.5


def test_the_zip_holds_exactly_that_and_is_the_same_each_time(tmp_path):
    for name in ("one.zip", "two.zip"):
        write_scores(ROWS if name == "one.zip" else ROWS[::-1], tmp_path / name, 3)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.namelist() == ["submission.txt"]
        assert archive.read("submission.txt") == b"1.000\n0.500\n0.250\n0.000\n"
    assert list(read_scores(tmp_path / "one.zip").values()) == [1, 0.5, 0.25, 0]


names = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.floats(0, 1), min_size=1, max_size=20))
def test_any_names_come_back(tmp_path_factory, scores):
    out = tmp_path_factory.mktemp("csv") / "x.csv"
    write_scores(scores.items(), out, decimals=9)
    back = read_scores(out)
    assert list(back) == list(scores)
    assert all(abs(back[name] - scores[name]) < 1e-9 for name in scores)


@pytest.mark.parametrize("bad", [-1e-9, 1.0001, math.nan, math.inf])
@pytest.mark.parametrize("suffix", ["csv", "txt", "zip"])
def test_a_score_that_is_none_leaves_the_old_file_alone(tmp_path, bad, suffix):
    out = tmp_path / f"x.{suffix}"
    write_scores(ROWS, out)
    before = out.read_bytes()
    with pytest.raises(SubmissionError, match="'bad.png' is"):
        write_scores([*ROWS, ("bad.png", bad)], out)
    assert out.read_bytes() == before and os.listdir(tmp_path) == [out.name]


def test_a_name_twice_and_an_unknown_suffix_are_refused(tmp_path):
    with pytest.raises(SubmissionError, match="'a.png' comes twice"):
        write_scores([*ROWS, ("a.png", 0.1)], tmp_path / "x.csv")
    with pytest.raises(SubmissionError, match="carriage"):
        write_scores([("a\r.png", 0.1)], tmp_path / "x.csv")
    with pytest.raises(SubmissionError, match=".csv, .txt, .zip"):
        write_scores(ROWS, tmp_path / "x.json")
    assert score_format("A/B.ZIP") == ".zip" and os.listdir(tmp_path) == []


def test_minus_zero_is_zero(tmp_path):
    write_scores([("a", -0.0)], tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_text() == "0.000000\n"


def test_an_interrupted_write_leaves_nothing(tmp_path):
    out = tmp_path / "x.bin"
    write_atomically(out, b"\x00\r\n")
    with pytest.raises(KeyboardInterrupt), atomic_file(out) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert out.read_bytes() == b"\x00\r\n" and os.listdir(tmp_path) == ["x.bin"]
    write_atomically(out, "ä\n")
    assert out.read_bytes() == "ä\n".encode()


def test_a_write_that_fails_names_its_target(tmp_path):
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(IsADirectoryError) as told:
        write_atomically(tmp_path / "x.csv", "x")
    assert told.value.filename == str(tmp_path / "x.csv")
    with pytest.raises(OSError, match="No space") as told, atomic_file(tmp_path / "y.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert told.value.filename == str(tmp_path / "y.csv")
    with pytest.raises(FileNotFoundError) as told, atomic_file(tmp_path / "y.csv"):
        (tmp_path / "gone").read_bytes()
    assert told.value.filename == str(tmp_path / "gone") and os.listdir(tmp_path) == ["x.csv"]


def test_a_new_file_has_the_usual_rights_and_a_link_is_kept(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_atomically(tmp_path / "link.txt", "x")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "x"
    assert (tmp_path / "real.txt").stat().st_mode == usual.stat().st_mode


def test_an_unwritable_output_is_known_before_any_work(tmp_path):
    ensure_writable(tmp_path / "new.csv")
    assert os.listdir(tmp_path) == []
    (tmp_path / "old.csv").write_text("old")
    ensure_writable(tmp_path / "old.csv")
    assert (tmp_path / "old.csv").read_text() == "old"
    (tmp_path / "folder.csv").mkdir()
    for path, reason in (
        (tmp_path / "no" / "x.csv", "create it first"),
        (tmp_path / "folder.csv", "not a regular file"),
        (tmp_path / "old.csv" / "x.csv", "no folder"),
        (tmp_path / "old.csv" / "x.csv", "old.csv is there"),
        (tmp_path / ("n" * 300 + ".csv"), "name too long"),
        (Path("/dev/null"), "not a regular file"),
        (Path("/proc/x.csv"), "cannot be written"),
    ):
        with pytest.raises(SubmissionError, match=f"(?i){reason}"):
            ensure_writable(path)


# ---------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "header"),
        ("name,score\na,0.5\n", "name,score"),
        ("image,score\na,0.5,1\n", "line 2.*two columns"),
        ("image,score\na,high\n", "line 2.*'high'"),
        ("image,score\na,0.5\nb,nan\n", "line 3.*'nan'"),
        ("image,score\na,1.5\n", "'1.5'"),
        ("image,score\na,0.5\na,0.5\n", "line 3.*twice"),
        ("image,score\n", "no scores"),
    ],
)
def test_a_wrong_csv_is_named_with_its_line(tmp_path, content, reason):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(SubmissionError, match=reason):
        check_submission(tmp_path / "x.csv")


def test_a_wrong_zip_is_named(tmp_path):
    path = tmp_path / "x.zip"
    for members, reason in (
        ({}, "exactly one"),
        ({"preds.txt": "0.5\n"}, "preds.txt"),
        ({"submission.txt": "0.5\n", "readme": ""}, "readme"),
        ({"submission.txt": "0.5\n\n0.5\n"}, "line 2"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in members.items():
                archive.writestr(name, text)
        with pytest.raises(SubmissionError, match=reason):
            check_submission(path)
    path.write_bytes(b"no zip")
    with pytest.raises(SubmissionError, match="not a sound zip"):
        check_submission(path)
    with pytest.raises(SubmissionError, match="No such file"):
        read_scores(tmp_path / "gone.zip")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SubmissionError, match="UTF-8"):
        read_scores(tmp_path / "x.txt")


def test_check_counts_and_summarises(tmp_path):
    write_scores(ROWS, tmp_path / "x.zip")
    assert check_submission(tmp_path / "x.zip", 4) == (4, 0.0, 1.0, 4)
    with pytest.raises(SubmissionError, match="4 scores; expected 5"):
        check_submission(tmp_path / "x.zip", 5)


def test_the_order_warning_names_the_first_pair():
    assert order_warning(["0001.png", "0002.png", "0010.png"]) is None
    assert order_warning(["b.png", "a.png", "a2b3.png"]) is None
    warning = order_warning(["1.png", "2.png", "10.png"])
    assert "'10.png' comes before '2.png'" in warning
    assert order_warning(["7.png", "0010.png", "x/100.png", "x/11.png"]) is not None
    assert order_warning([]) is None


# ---------------------------------------------------------------------------------------------------- sidecar
def sidecar(names_, *, failed=(), frames=False) -> list[SidecarRow]:
    rows = []
    for name in names_:
        if name in failed:
            rows.append(SidecarRow(name, "failed", "bad\nfile\0", None, {}, {}, 0.5, "failed"))
            continue
        p, level = {"global": 0.123456789, "face": 0.9}, {"global": 0.1, "face": 0.9}
        face = (1.25, -3.0, 20.04, 30.0, 0.98765, None)
        rows.append(SidecarRow(name, "ok", "", face, p, level, 0.5, "unsure"))
        if frames:
            rows += [rows[-1]._replace(frame=i, face=None) for i in (3, 11)]
    return rows


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_sidecar_has_its_columns_in_order(tmp_path):
    out = members_path(tmp_path / "preds.zip")
    assert out.name == "preds.members.csv"
    rows = sidecar(["a,b.png", "c.png"], failed=["c.png"])
    write_sidecar(iter(rows), out, ["global", "face"])
    header = (
        "image,status,error,face_x0,face_y0,face_x1,face_y1,face_score,global_p,global_level,face_p,face_level,"
        "score,verdict"
    )
    assert ",".join(sidecar_columns(["global", "face"])) == header
    assert out.read_text().splitlines() == [
        header,
        '"a,b.png",ok,,1.2,-3.0,20.0,30.0,0.9877,0.123457,0.1,0.900000,0.9,0.500000,unsure',
        "c.png,failed,bad file,,,,,,,,,,0.500000,failed",
    ]


def test_frames_have_rows_of_their_own(tmp_path):
    rows = sidecar(["a.mp4"], frames=True)
    with pytest.raises(SubmissionError, match="frames=True"):
        write_sidecar(rows, tmp_path / "x.csv", ["global"])
    write_sidecar(rows, tmp_path / "x.csv", ["global"], frames=True)
    table = read_table(tmp_path / "x.csv")
    assert [(row["image"], row["frame"]) for row in table] == [
        ("a.mp4", ""),
        ("a.mp4", "3"),
        ("a.mp4", "11"),
    ]
    with pytest.raises(SubmissionError, match="'broken'.*ok, failed"):
        write_sidecar([rows[0]._replace(status="broken")], tmp_path / "x.csv", [])
    with pytest.raises(SubmissionError, match="'guilty'.*fake, real"):
        write_sidecar([rows[0]._replace(verdict="guilty")], tmp_path / "x.csv", [])
    assert read_table(tmp_path / "x.csv") == table


def test_faces_and_tracks_have_rows_and_columns_of_their_own(tmp_path):
    (whole,) = sidecar(["a.mp4"])
    track = whole._replace(who=2, track=Track(5, 3, 30, 0.25, 0.4))
    rows = [whole, track, track._replace(track=None, frame=3)]
    with pytest.raises(SubmissionError, match="people=True"):
        write_sidecar(rows, tmp_path / "x.csv", ["global"], frames=True)
    write_sidecar(rows, tmp_path / "x.csv", ["global"], decimals=2, frames=True, people=True)
    table = read_table(tmp_path / "x.csv")
    assert list(table[0])[:4] == ["image", "face", "frame", "status"]
    assert [(row["face"], row["frame"]) for row in table] == [("", ""), ("2", ""), ("2", "3")]
    of_track = [[row[name] for name in TRACK_COLUMNS] for row in table]
    assert of_track == [[""] * 5, ["5", "3", "30", "0.25", "0.40"], [""] * 5]


# ---------------------------------------------------------------------------------------------------- merging
def part(folder: Path, index: int, names_, shard="auto", weights="w1", run=None, **more) -> str:
    path = folder / f"part{index}.csv"
    write_scores([(name, 0.5 + index / 10) for name in names_], path, decimals=4)
    if shard is not None:
        record = {"shard": f"{index}/3" if shard == "auto" else shard, "weights": weights, **(run or {})}
        write_atomically(run_path(path), json.dumps(record))
    rows = sidecar(names_, **more)
    write_sidecar(rows, members_path(path), ["global"], frames=more.get("frames", False))
    return str(path)


def test_three_parts_make_the_whole(tmp_path, capsys):
    parts = [
        part(tmp_path, 3, ["c.png", "f.png"]),
        part(tmp_path, 1, ["a.mp4", "d.png"], frames=True),
        part(tmp_path, 2, ["b.png", "e.png"]),
    ]
    out = tmp_path / "preds.csv"
    assert main(["merge", *parts, "--out", str(out)]) == 0
    assert "6 scores from 3 parts" in capsys.readouterr().out
    assert out.read_text() == (
        "image,score\na.mp4,0.6000\nb.png,0.7000\nc.png,0.8000\nd.png,0.6000\ne.png,0.7000\nf.png,0.8000\n"
    )
    table = read_table(members_path(out))
    assert [row["image"] for row in table if row["frame"] == ""] == list(read_scores(out))
    assert [row["frame"] for row in table if row["image"] == "a.mp4"] == ["", "3", "11"]
    merged = json.loads(run_path(out).read_text())["merged"]
    assert merged[parts[0]]["shard"] == "3/3"
    assert main(["merge", *parts, "--out", str(tmp_path / "preds.zip")]) == 0
    assert check_submission(tmp_path / "preds.zip", 6).highest == 0.8


def test_failed_rows_are_counted_and_told(tmp_path, capsys):
    parts = [part(tmp_path, 1, ["a"], failed=["a"], shard=None)]
    parts.append(part(tmp_path, 2, ["b"], shard=None))
    assert main(["merge", *parts, "--out", str(tmp_path / "p.csv")]) == 4
    assert "1 rows failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"leave_out": 2}, "shard 2/3 is missing"),
        ({"shard": "1/3"}, "both shard 1/3"),
        ({"shard": "3/4"}, "one of 3"),
        ({"shard": None}, 'expected "shard"'),
        ({"weights": "w2"}, "different weights"),
        ({"names": ["c.png", "a.png"]}, "'a.png' is in another part"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, capsys, change, reason):
    parts = [part(tmp_path, 1, ["a.png"]), part(tmp_path, 2, ["b.png"])]
    options = {k: v for k, v in change.items() if k in ("shard", "weights")}
    parts.append(part(tmp_path, 3, change.get("names", ["c.png"]), **options))
    if "leave_out" in change:
        del parts[change["leave_out"] - 1]
    out = tmp_path / "preds.csv"
    assert main(["merge", *parts, "--out", str(out)]) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists() and not members_path(out).exists()


ALL = {"listing": listing_record(["a.png", "b.png", "c.png"])}


@pytest.mark.parametrize(
    ("names_", "run", "reason"),
    [
        (["c.png"], {}, "different listings, of 3 and unknown inputs"),
        (["c.png"], {"listing": listing_record(["a.png", "b.png", "d.png"])}, "different listings, of 3 and 3 inputs"),
        ([], ALL, "2 rows, which are not those of the 3 inputs"),
        (["d.png"], ALL, "3 rows, which are not those of the 3 inputs"),
        (["c.png"], ALL | {"listing": 5}, "expected an object as 'listing', found 5"),
        (["c.png"], ALL, ""),
    ],
)
def test_shards_are_of_one_listing_and_have_all_of_it(tmp_path, capsys, names_, run, reason):
    parts = [part(tmp_path, 1, ["a.png"], run=ALL), part(tmp_path, 2, ["b.png"], run=ALL)]
    parts.append(part(tmp_path, 3, names_, run=run))
    out = tmp_path / "preds.csv"
    assert main(["merge", *parts, "--out", str(out)]) == (2 if reason else 0)
    assert reason in capsys.readouterr().err and out.exists() == (not reason)


@pytest.mark.parametrize("key", ["precision", "frames", "video_mean", "device", "torch", "batch", "input"])
def test_parts_scored_differently_are_refused_by_what_differs(tmp_path, capsys, key):
    parts = [part(tmp_path, i, [f"{i}.png"], run={"scoring": {"people": "one", key: f"x{i % 2}"}}) for i in (1, 2, 3)]
    refused = key in ("precision", "frames", "video_mean")
    assert main(["merge", *parts, "--out", str(tmp_path / "preds.csv")]) == (2 if refused else 0)
    assert (f"{key} is 'x1' in one and 'x0' in the other" in capsys.readouterr().err) == refused


def test_without_sidecars_it_is_said_that_failures_are_unknown(tmp_path, capsys):
    parts = [part(tmp_path, i, [f"{i}.png"]) for i in (1, 2, 3)]
    members_path(parts[1]).unlink()
    assert main(["merge", *parts, "--out", str(tmp_path / "preds.csv")]) == 0
    told = capsys.readouterr().out
    assert told.endswith(f"how many of them failed is unknown: there is no {members_path(parts[1])}\n")
    assert not members_path(tmp_path / "preds.csv").exists()


def test_the_check_command(tmp_path, capsys):
    write_scores(ROWS, tmp_path / "x.csv")
    assert main(["check", str(tmp_path / "x.csv"), "--count", "4"]) == 0
    assert "4 scores, 0 to 1, 4 distinct" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "x.csv"), "--count", "3"]) == 2
    assert "expected 3" in capsys.readouterr().err


def test_the_module_runs_and_stays_light():
    code = (
        "import sys, solution.scoring.files as s\n"
        "heavy = {'torch', 'numpy', 'pandas', 'cv2', 'PIL'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else s.main(['check', 'gone.csv']))"
    )
    folder = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == "files: gone.csv: No such file or directory\n"
