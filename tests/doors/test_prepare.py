"""`python -m solution.prepare`: from raw trees to crops and a manifest, resumably, with every loss told."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from raw_sets import clip, faceforensics, picture, write_json

from solution import prepare, train
from solution.data import layouts
from solution.data.faces import FaceLocator
from solution.data.images import decode_image
from solution.data.preparing import Journal

ROOT = Path(__file__).resolve().parents[2]
DETECTOR = pytest.mark.skipif(not FaceLocator.available(), reason="no face detector")


def run(source, out, *more, workers=0):
    return prepare.main([str(source), "--out", str(out), "--workers", str(workers), "--quiet", "--frames", "3", *more])


def rows(out):
    with (out / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def report(out):
    return json.loads((out / "prepare.json").read_text())


@pytest.fixture(scope="module")
def forensics(tmp_path_factory):
    """A prepared FaceForensics++ in miniature: its source and its output."""
    folder = tmp_path_factory.mktemp("ff")
    source = faceforensics(folder / "FaceForensics++")
    assert run(source, folder / "out") == 0
    return source, folder / "out"


# ------------------------------------------------------------------------------------------------ FaceForensics++
@DETECTOR
def test_manifest_of_faceforensics(forensics):
    found = rows(forensics[1])
    assert list(found[0]) == ["path", "label", "source", "split", "generator", "group", "mask", "video"]
    assert len(found) == 12 * 3
    assert {(r["label"], r["generator"], bool(r["mask"])) for r in found} == {
        ("0", "", False),
        ("1", "Deepfakes", True),
    }
    assert {r["split"] for r in found} == {"train", "val"} and {r["source"] for r in found} == {"ff++-c23"}
    sides = {s: {r["group"] for r in found if r["split"] == s} for s in ("train", "val")}
    assert len(sides["train"]) == 2 and len(sides["val"]) == 1 and not sides["train"] & sides["val"]
    for row in found:
        image = decode_image(forensics[1] / row["path"])
        assert image.shape[0] == image.shape[1] < 192


@DETECTOR
def test_a_pair_is_cut_at_one_place_and_its_mask_alike(forensics):
    journal = [json.loads(line) for line in (forensics[1] / "prepared.jsonl").read_text().splitlines()[1:]]
    records = {record["name"]: record for record in journal}
    real = records["original_sequences/youtube/c23/videos/000"]
    fake = records["manipulated_sequences/Deepfakes/c23/videos/000_001"]
    assert real["squares"] == fake["squares"] and len(real["squares"]) == 3
    for (number, picture_name, mask_name), (_, real_name, _) in zip(fake["rows"], real["rows"]):
        mask = decode_image(forensics[1] / mask_name)[:, :, 0]
        changed = decode_image(forensics[1] / picture_name).astype(int) - decode_image(forensics[1] / real_name)
        changed = np.abs(changed).sum(axis=2)
        assert set(np.unique(mask)) <= {0, 255} and mask.shape == changed.shape, number
        assert changed[mask > 0].mean() > 5 * changed[mask == 0].mean()


@DETECTOR
def test_report_and_sheet(forensics):
    found = report(forensics[1])
    assert found["layout"] == "ff++" and found["labels"] == {"0": "real", "1": "fake"} and found["failed"] == []
    cell = {
        "split": "val",
        "label": 1,
        "name": "fake",
        "generator": "Deepfakes",
        "pictures": 6,
        "videos": 2,
        "masks": 6,
    }
    assert cell in found["counts"]
    assert any(
        line.startswith("FAKE (1)  manipulated_sequences/Deepfakes/c23/videos: 6") for line in found["taken_for"]
    )
    assert found["speed"]["pictures"] == 36 and set(found["speed"]["cpu_s"]) == {"decoding", "faces", "writing"}
    assert decode_image(forensics[1] / "preview.png").shape[1] == 1024


@DETECTOR
def test_training_runs_on_it(forensics, tmp_path, capsys):
    command = [
        *("--member", "vlaforge", "--preset", "tiny", "--random-towers", "--workers", "0"),
        *("--data", str(forensics[1] / "manifest.csv"), "--out", str(tmp_path)),
        *("--set", "train.max_steps=1", "--set", "train.batch=4"),
    ]
    assert train.main(command) == 0
    assert "masks: 12 of 12 fakes" in capsys.readouterr().err
    assert (tmp_path / "vlaforge" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ going on
def tree(folder):
    """Four videos without a list."""
    for n in range(2):
        clip(folder / f"real/{n}.mp4")
        clip(folder / f"fake/{n}.mp4", fake=True)
    return folder


def test_what_is_done_is_not_done_again(tmp_path, capsys):
    source, out = tree(tmp_path / "set"), tmp_path / "out"
    assert run(source, out, "--crop", "none") == 0
    before = {p: p.stat().st_mtime_ns for p in out.glob("images/**/*.jpg")}
    assert len(before) == 12
    manifest = (out / "manifest.csv").read_bytes()
    clip(source / "real/2.mp4")
    clip(source / "fake/1.mp4", fake=True, count=7)
    # The torn end of an interrupted run.
    with (out / "prepared.jsonl").open("a") as file:
        file.write('{"name": "real/')
    assert run(source, out, "--crop", "none") == 0
    assert report(out)["speed"]["pictures"] == 3 + 3 and len(rows(out)) == 15
    kept = {p for p, time in before.items() if p.exists() and p.stat().st_mtime_ns == time}
    assert {p.parent.name for p in before.keys() - kept} == {"1"}
    assert manifest != (out / "manifest.csv").read_bytes()


def test_interrupted_equals_uninterrupted(tmp_path, monkeypatch, capsys):
    source = tree(tmp_path / "set")
    assert run(source, tmp_path / "whole", "--crop", "none") == 0
    add, calls = Journal.add, []

    def interrupted(self, records):
        calls.append(records)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, records)

    monkeypatch.setattr(Journal, "add", interrupted)
    assert run(source, tmp_path / "out", "--crop", "none") == 130
    assert "goes on from here" in capsys.readouterr().err and not (tmp_path / "out" / "manifest.csv").exists()
    monkeypatch.undo()
    assert run(source, tmp_path / "out", "--crop", "none") == 0
    assert report(tmp_path / "out")["speed"]["pictures"] == 6
    assert (tmp_path / "out/manifest.csv").read_bytes() == (tmp_path / "whole/manifest.csv").read_bytes()


@DETECTOR
def test_a_new_real_takes_its_fakes_along(tmp_path):
    source, out = faceforensics(tmp_path / "set", pairs=2, count=3), tmp_path / "out"
    assert run(source, out) == 0
    clip(source / "original_sequences/youtube/c23/videos/000.mp4", count=4)
    assert run(source, out) == 0
    assert report(out)["speed"]["pictures"] == 3 + 3
    # A mask that changed is a change of its video.
    clip(source / "manipulated_sequences/Deepfakes/masks/videos/001_000.mp4", mask=True, count=3)
    assert run(source, out) == 0
    assert report(out)["speed"]["pictures"] == 3


def test_other_settings_are_refused_and_restart_begins_anew(tmp_path, capsys):
    source, out = tree(tmp_path / "set"), tmp_path / "out"
    assert run(source, out, "--crop", "none") == 0
    assert run(source, out, "--crop", "none", "--quality", "80") == 2
    assert "quality 95, now 80" in capsys.readouterr().err
    assert run(source, out, "--crop", "none", "--quality", "80", "--restart") == 0
    # Splits are dealt anew without a picture touched.
    assert run(source, out, "--crop", "none", "--quality", "80", "--splits", "random", "--seed", "5") == 0
    assert report(out)["speed"]["pictures"] == 0


def test_a_folder_that_is_not_ours_is_not_touched(tmp_path, capsys):
    source, out = tree(tmp_path / "set"), tmp_path / "out"
    (out / "images").mkdir(parents=True)
    (out / "images" / "mine.jpg").touch()
    assert run(source, out, "--restart") == 2
    assert (out / "images" / "mine.jpg").exists() and "did not make" in capsys.readouterr().err
    assert run(source, source) == 2 and run(source, tmp_path) == 2


def test_output_inside_the_source_is_no_input(tmp_path):
    source = tree(tmp_path / "set")
    assert run(source, source / "out", "--crop", "none") == 0
    assert run(source, source / "out", "--crop", "none") == 0
    assert len(rows(source / "out")) == 12


# ------------------------------------------------------------------------------------------------ broken things
def test_broken_files_are_named_and_passed_over(tmp_path, capsys):
    source, out = tree(tmp_path / "set"), tmp_path / "out"
    (source / "fake/broken.mp4").write_bytes(b"no video at all")
    (source / "real/empty.png").touch()
    assert run(source, out, "--crop", "none") == 4
    failed = {row["file"]: row["reason"] for row in report(out)["failed"]}
    assert set(failed) == {"fake/broken.mp4", "real/empty.png"} and "0 bytes" in failed["real/empty.png"]
    assert len(rows(out)) == 12 and "failed: fake/broken.mp4" in capsys.readouterr().err
    # A file that was mended is tried again.
    clip(source / "fake/broken.mp4", fake=True)
    picture(source / "real/empty.png")
    assert run(source, out, "--crop", "none") == 0
    assert len(rows(out)) == 16


def test_a_file_that_kills_or_hangs_its_process_ends_no_run(tmp_path):
    source, out = tree(tmp_path / "set"), tmp_path / "out"
    killer = tmp_path / "site"
    killer.mkdir()
    # A decoder's segmentation fault and one that hangs, as the workers meet them.
    (killer / "sitecustomize.py").write_text(
        "import builtins, os, time\n"
        "opened = builtins.open\n"
        "def open(path, *args, **kwargs):\n"
        "    if str(path).endswith('real/1.mp4'):\n"
        "        os.abort()\n"
        "    if str(path).endswith('fake/0.mp4'):\n"
        "        time.sleep(60)\n"
        "    return opened(path, *args, **kwargs)\n"
        "builtins.open = open\n"
    )
    command = [sys.executable, "-m", "solution.prepare", source, "--out", out, "--crop", "none", "--frames", "3"]
    done = subprocess.run(
        [*map(str, command), "--workers", "2", "--limit", "4"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(killer)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    failed = {row["file"]: row["reason"] for row in report(out)["failed"]}
    assert failed == {
        "fake/0.mp4": "reading it took more than 4 s",
        "real/1.mp4": "reading it crashed its process (SIGABRT)",
    }
    assert len(rows(out)) == 6


def test_names_of_any_kind(tmp_path):
    for n, name in enumerate((b"a b.png", b"\xc4.png", b"\xd6.png", "ä.png".encode())):
        for label in ("real", "fake"):
            path = Path(os.fsdecode(bytes(tmp_path / "set" / label) + b"/" + name))
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(tmp_path / "plain.png", n).rename(path)
    assert run(tmp_path / "set", tmp_path / "out", "--crop", "none") == 0
    paths = [r["path"] for r in rows(tmp_path / "out")]
    assert len(set(paths)) == 8 and all(path.isascii() and (tmp_path / "out" / path).is_file() for path in paths)


@DETECTOR
def test_a_broken_real_leaves_its_fake_a_place_of_its_own(tmp_path):
    source = faceforensics(tmp_path / "set", pairs=2, count=3)
    (source / "original_sequences/youtube/c23/videos/000.mp4").write_bytes(b"broken")
    (source / "manipulated_sequences/Deepfakes/masks/videos/000_001.mp4").write_bytes(b"broken")
    assert run(source, tmp_path / "out") == 4
    fake = [r for r in rows(tmp_path / "out") if r["video"].endswith("000_001")]
    assert len(fake) == 3 and not any(r["mask"] for r in fake)
    assert any("unreadable mask" in row["reason"] for row in report(tmp_path / "out")["passed_over"])


@DETECTOR
def test_where_no_face_is_found_is_told(tmp_path):
    for n in range(2):
        picture(tmp_path / f"set/fake/{n}.png", n, fake=True)
        picture(tmp_path / f"set/real/{n}.png", n)
    grey = tmp_path / "set/real/grey.png"
    picture(grey)
    import cv2

    cv2.imwrite(str(grey), np.full((64, 64, 3), 127, np.uint8))
    assert run(tmp_path / "set", tmp_path / "out") == 0
    reasons = {row["reason"]: row["example"] for row in report(tmp_path / "out")["passed_over"]}
    assert reasons["no face found"] == "real/grey" and len(rows(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere", "--out", "out"], 2),
        (["empty", "--out", "out"], 2),
        (["wolves", "--out", "out"], 2),
        (["badjson", "--out", "out"], 2),
        (["set", "--out", "set/real/a.png"], 3),
        (["set", "--out", "set/real/a.png/deeper"], 3),
    ],
)
def test_one_line_and_the_right_code(tmp_path, monkeypatch, capsys, arguments, code):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    picture(Path("wolves/a.png"))
    picture(Path("set/real/a.png"))
    picture(Path("set/fake/a.png"))
    picture(Path("badjson/a.png"))
    Path("badjson/metadata.json").write_text("{")
    assert prepare.main([*arguments, "--workers", "0", "--quiet", "--crop", "none"]) == code
    error = capsys.readouterr().err
    assert error.startswith("prepare: ") and error.count("\n") == 1


@pytest.mark.parametrize("extra", [["--crop", "big"], ["--frames", "0"], ["--quality", "101"], ["--workers", "-1"]])
def test_bad_words_are_refused(tmp_path, extra):
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(tmp_path), "--out", str(tmp_path / "out"), *extra])
    assert stop.value.code == 2


# ------------------------------------------------------------------------------------------------ other layouts
def test_folders_of_frames_are_sampled_evenly_in_number_order(tmp_path):
    for n in range(12):
        picture(tmp_path / f"set/real/000/{n}.png", n)
        picture(tmp_path / f"set/fake/000_001/{n}.png", n, fake=True)
    assert run(tmp_path / "set", tmp_path / "out", "--crop", "none") == 0
    names = [r["path"] for r in rows(tmp_path / "out") if r["label"] == "0"]
    assert [Path(n).stem for n in names] == ["000002", "000006", "000010"]


def test_pictures_keep_their_masks(tmp_path):
    three(tmp_path / "set", "real/{}.jpg", "fake/{}.jpg", "masks/{}.png")
    assert run(tmp_path / "set", tmp_path / "out", "--crop", "none") == 0
    fakes = [r for r in rows(tmp_path / "out") if r["label"] == "1"]
    assert all(decode_image(tmp_path / "out" / r["mask"]).max() == 255 for r in fakes) and len(fakes) == 3


def test_a_bench_json_by_itself(tmp_path):
    for n in range(2):
        picture(tmp_path / f"f/real/{n}/0.png", n)
        picture(tmp_path / f"f/fake/{n}/0.png", n, fake=True)
    sides = {
        name: {
            split: {f"{name}{n}": {"label": name, "frames": [f"f\\{name}\\{n}\\0.png"]}}
            for n, split in enumerate(("train", "test"))
        }
        for name in ("real", "fake")
    }
    assert run(write_json(tmp_path / "mine.json", {"Mine": sides}), tmp_path / "out") == 0
    assert sorted((r["label"], r["split"]) for r in rows(tmp_path / "out")) == [
        *(("0", "test"), ("0", "train"), ("1", "test"), ("1", "train")),
    ]


def celeb(root):
    clip(root / "Celeb-real/id0_0000.mp4")
    clip(root / "Celeb-synthesis/id0_id1_0000.mp4", fake=True)
    (root / "List_of_testing_videos.txt").write_text("0 Celeb-synthesis/id0_id1_0000.mp4\n")


def dfdc(root):
    clip(root / "part_0/a.mp4")
    clip(root / "part_0/b.mp4", fake=True)
    rows = {
        "a.mp4": {"label": "REAL", "split": "train"},
        "b.mp4": {"label": "FAKE", "split": "train", "original": "a.mp4"},
    }
    write_json(root / "part_0/metadata.json", rows)


def dfdcp(root):
    clip(root / "original_videos/1/a.mp4")
    clip(root / "method_A/2/b.mp4", fake=True)
    rows = {"original_videos/1/a.mp4": {"label": "real", "set": "train", "target_id": 1, "swapped_id": None}}
    rows["method_A/2/b.mp4"] = {"label": "fake", "set": "train", "target_id": 2, "swapped_id": 3}
    write_json(root / "dataset.json", rows)


def three(root, real, fake, mask=None):
    """Three pictures of each kind; real, fake, mask: their paths, with a field for their number."""
    for n in range(3):
        picture(root / real.format(n), n)
        picture(root / fake.format(n), n, fake=True)
        if mask is not None:
            picture(root / mask.format(n), n, mask=True)


def wilddeepfake(root):
    three(root, "real_train/0/real/0/{}.png", "fake_test/1/fake/0/{}.png")


def df40(root):
    inside = "simswap/ff/{}/000_003/{{:03d}}.png"
    three(root, "heygen/real/v1/{}.png", inside.format("frames"), inside.format("masks"))


def kaggle(root):
    three(root, "pics/a{}.jpg", "pics/b{}.jpg")
    (root / "train.csv").write_text(
        "filename,label\n" + "".join(f"pics/a{n}.jpg,0\npics/b{n}.jpg,1\n" for n in range(3))
    )


def ntire(root):
    three(root, "{:04d}_real.png", "1{:03d}_fake.png")


def forensics_frames(root):
    fakes = "manipulated_sequences/Face2Face/c23/{}/000_003/{{:04d}}.png"
    real = "original_sequences/youtube/c23/frames/000/{:04d}.png"
    three(root, real, fakes.format("frames"), fakes.format("masks"))


@pytest.mark.parametrize("build", [celeb, dfdc, dfdcp, wilddeepfake, df40, kaggle, ntire, forensics_frames])
def test_every_layout_from_end_to_end(tmp_path, build):
    build(tmp_path / "set")
    assert run(tmp_path / "set", tmp_path / "out", "--crop", "none") == 0
    found = rows(tmp_path / "out")
    assert sorted(row["label"] for row in found) == ["0"] * 3 + ["1"] * 3
    masks = sum(bool(row["mask"]) for row in found)
    assert masks == (3 if build in (df40, forensics_frames) else 0)
    fake = next(row for row in found if row["label"] == "1")
    yellow = decode_image(tmp_path / "out" / fake["path"]).astype(int)
    # What is called fake is what was made so: its face has lost its blue.
    assert (yellow[70:130, 105:150, 0] - yellow[70:130, 105:150, 2]).mean() > 70


def test_which_label_each_folder_got_is_printed(tmp_path, capsys):
    picture(tmp_path / "set/Real/a.png")
    picture(tmp_path / "set/Fake/a.png", fake=True)
    assert run(tmp_path / "set", tmp_path / "out", "--crop", "none") == 0
    out = capsys.readouterr().out
    assert "REAL (0)  Real: 1 pictures" in out and "FAKE (1)  Fake: 1 pictures" in out


def test_the_door_offers_every_layout():
    assert set(prepare.LAYOUTS) == set(layouts.LAYOUTS)


def test_help_comes_without_the_libraries():
    code = "import sys, solution.prepare as p\ntry: p.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--splits" in done.stdout, done.stderr
