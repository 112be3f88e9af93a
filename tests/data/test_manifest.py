"""What people's manifests and folders mean: labels by a table, splits that share nothing, nothing left out unsaid."""

import csv
import json
import os
import shutil
import unicodedata
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from solution.data.images import find_inputs, stable_seed
from solution.data.labels import label_of, split_of
from solution.data.manifest import HIDDEN, OUTPUT, DropReport, ManifestError, manifest_splits, read_manifest


def save(path):
    """A picture of a colour that is its name's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = zlib.crc32(str(path).encode()).to_bytes(4, "big")[:3]
    Image.fromarray(np.full((8, 8, 3), list(colour), np.uint8)).save(path)


def pictures(folder, *names):
    for name in names:
        save(folder / name)


def table(folder, *rows, header="path,label,split,source,video,group"):
    path = folder / "m.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def names(source, split):
    return [item.name for item in read_manifest(source, split=split)[0]]


# ------------------------------------------------------------------------------------------------ words
@pytest.mark.parametrize(
    ("words", "label"),
    [
        (("0", 0, "0.0", "real", "Real", "FF-real", "original", "pristine", "YouTube-real", "actors", "0_real"), 0),
        (("real_videos", "Celeb-real", "DFDC_Real", "nature"), 0),
        (
            (
                "1",
                1,
                "1.0",
                "FAKE",
                "1_fake",
                "FF-DF",
                "FF-F2F",
                "Celeb-synthesis",
                "ai",
                "whichisreal_Fake",
                "DFD_fake",
            ),
            1,
        ),
        (
            ("un-real", "not real", "1_real", "real_fake", "unfake", "true", True, False, None, "", "2", "-1", "own_0"),
            None,
        ),
        (("videos", "fak", "0.5", "FaceForensics++", "reel"), None),
    ],
)
def test_labels_by_a_table_and_nothing_guessed(words, label):
    assert {word: label_of(word) for word in words} == dict.fromkeys(words, label)


def test_usual_spellings_of_splits():
    words = ("Train_Set", "trainset", "training set", "VAL-SET", "test split", "Unseen", "holdout", "set")
    assert [split_of(word) for word in words] == ["train", "train", "train", "val", "test", "unseen", "holdout", "set"]
    assert {split_of(w) for w in ("Train", "training", " TRAIN ")} == {"train"}
    assert {split_of(w) for w in ("valid", "Validation", "dev", "val")} == {"val"}
    assert split_of("testing") == "test" and split_of("unseen") == "unseen" and split_of("") == ""


def test_an_unknown_label_is_refused_by_name(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    with pytest.raises(ManifestError, match=r"line 3: label is 'un-real'; expected 0 or real"):
        read_manifest(table(tmp_path, ("a.png", 0), ("b.png", "un-real"), header="path,label"))
    for label, word in (("own_1", "own_1"), (2, "2"), (True, "True")):
        tree = {"D": {"own": {"train": {"v": {"label": label, "frames": ["a.png"]}}}}}
        (tmp_path / "b.json").write_text(json.dumps(tree))
        with pytest.raises(ManifestError, match=rf"D/own/train/v: label is '?{word}'?; expected"):
            read_manifest(tmp_path / "b.json")


def test_numbers_in_deepfakebench_json_and_labels_that_disagree(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    tree = {
        "D": {
            "own_a": {"training": {"v": {"label": 0, "frames": ["a.png"]}}},
            "own_b": {"training": {"w": {"label": 1, "frames": ["b.png"]}}},
        }
    }
    (tmp_path / "b.json").write_text(json.dumps(tree))
    items, _ = read_manifest(tmp_path / "b.json", split="train")
    assert [(i.name, i.label, i.generator) for i in items] == [("a.png", 0, ""), ("b.png", 1, "own_b")]
    (tmp_path / "b.json").write_text(json.dumps({"D": {"real": {"train": {"v": {"label": 1, "frames": []}}}}}))
    with pytest.raises(ManifestError, match="which say the opposite"):
        read_manifest(tmp_path / "b.json")


@pytest.mark.parametrize(
    "tree",
    [
        [["071", "054"]],
        [{"path": "a.png", "label": 0}],
        {"v0.mp4": {"label": "REAL", "split": "train"}},
        {"D": {"real": {"train": {"v": {"label": "real", "frames": None}}}}},
        {"D": {"real": {"train": {"v": None}}}},
    ],
)
def test_json_of_another_kind_is_one_line(tmp_path, tree):
    (tmp_path / "b.json").write_text(json.dumps(tree))
    with pytest.raises(ManifestError, match="should be") as raised:
        read_manifest(tmp_path / "b.json", split="train")
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------ splits
def test_spellings_of_splits_in_a_table_and_what_is_left_out(tmp_path):
    pictures(tmp_path, *(f"{n}.png" for n in range(8)))
    spelled = ("Train", "training", "valid", "validation", "dev", "test", "extra", "")
    source = table(
        tmp_path, *((f"{n}.png", n % 2, split) for n, split in enumerate(spelled)), header="path,label,split"
    )
    items, report = read_manifest(source, split="training")
    assert [i.name for i in items] == ["0.png", "1.png"]
    assert dict(report.dropped) == {
        "6.png": "split 'extra' is none of train, val, unseen, test",
        "7.png": "names no split, where other rows do",
    }
    assert names(source, "Val") == names(source, "val") == ["2.png", "3.png", "4.png"]
    assert names(source, "testing") == ["5.png"]
    assert manifest_splits(source) == {"train", "val", "test", "extra"}
    with pytest.raises(ManifestError, match="of split 'unseen'; it has extra, test, train, val"):
        read_manifest(source, split="unseen")


def test_training_shares_no_file_video_or_group_with_what_it_is_judged_on(tmp_path):
    pictures(tmp_path, *(f"{n}.png" for n in range(10)))
    (tmp_path / "link.png").symlink_to(tmp_path / "1.png")
    source = table(
        tmp_path,
        ("0.png", 0, "train", "s", "", ""),
        ("./1.png", 0, "train", "s", "", ""),
        ("2.png", 1, "train", "s", "v", ""),
        ("3.png", 1, "train", "other", "v", ""),
        ("4.png", 1, "train", "other", "", "anna"),
        ("5.png", 1, "train", "s", "w", "berta"),
        ("6.png", 0, "train", "s", "", ""),
        ("link.png", 0, "val", "s", "", ""),
        ("7.png", 1, "unseen", "s", "v", ""),
        ("8.png", 0, "test", "s", "", "anna"),
        ("6.png", 0, "test", "s", "", ""),
    )
    items, report = read_manifest(source, split="train")
    assert [(i.name, i.group) for i in items] == [("0.png", ""), ("3.png", ""), ("5.png", "berta")]
    assert dict(report.dropped) == {
        "./1.png": "its file is in split 'val' too, which keeps it",
        "2.png": "its video is in split 'unseen' too, which keeps it",
        "4.png": "its group is in split 'test' too, which keeps it",
        "6.png": "its file is in split 'test' too, which keeps it",
    }
    assert names(source, "val") == ["link.png"] and names(source, "test") == ["8.png", "6.png"]


def test_a_copy_under_another_name_is_the_same_picture(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png", "other.png")
    shutil.copyfile(tmp_path / "a.png", tmp_path / "copy.png")
    for name in ("empty.png", "void.png"):
        (tmp_path / name).touch()
    rows = [("a.png", 0, "train"), ("b.png", 1, "train"), ("empty.png", 1, "train"), ("c.png", 1, "train")]
    rows += [("copy.png", 0, "val"), ("other.png", 1, "val"), ("void.png", 1, "val")]
    items, report = read_manifest(table(tmp_path, *rows, header="path,label,split"), split="train")
    assert [i.name for i in items] == ["b.png", "empty.png", "c.png"]
    assert report.dropped == [("a.png", "a copy of it is in split 'val', which keeps it")]


def test_pictures_that_only_end_alike_are_no_copies(tmp_path):
    """Files of one size whose last bytes are the same, as uncompressed pictures on one ground are."""
    end = bytes(1000)
    for name, start in (("a.bmp", b"one" * 20), ("b.bmp", b"two" * 20), ("c.bmp", b"two" * 20), ("d.bmp", b"end" * 20)):
        (tmp_path / name).write_bytes(start + end)
    rows = [("a.bmp", 0, "train"), ("b.bmp", 1, "train"), ("c.bmp", 1, "val"), ("d.bmp", 0, "val")]
    items, report = read_manifest(table(tmp_path, *rows, header="path,label,split"), split="train")
    assert [i.name for i in items] == ["a.bmp"]
    assert report.dropped == [("b.bmp", "a copy of it is in split 'val', which keeps it")]


def test_a_file_with_two_labels_is_refused_in_every_spelling(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c/d.png")
    source = table(tmp_path, ("a.png", 0), ("b.png", 1), ("c/../a.png", "fake"), header="path,label")
    with pytest.raises(ManifestError, match=r"1 rows give a file the other label.* a.png is 0 and c/../a.png is 1"):
        read_manifest(source)


def parts(source):
    train, val = (read_manifest(source, split=split)[0] for split in ("train", "val"))
    assert not {i.name for i in train} & {i.name for i in val}
    return train, val


def test_a_small_folder_is_held_out_by_label(tmp_path):
    pictures(tmp_path, *(f"{kind}/{n}.png" for kind in ("real", "fake") for n in range(5)))
    train, val = parts(tmp_path)
    for some in (train, val):
        assert {i.label for i in some} == {0, 1}
    assert len(train) + len(val) == 10 and len(val) <= 4


def test_frames_in_sub_folders_are_held_out_together(tmp_path):
    for n in range(4):
        pictures(tmp_path, *(f"real/{n:03d}/{k}.png" for k in range(3)))
        pictures(tmp_path, *(f"fake/{n:03d}_{(n + 1) % 4:03d}/{k}.png" for k in range(3)))
    train, val = parts(tmp_path)
    clips = [{i.name.split("/")[1][:3] for i in some} for some in (train, val)]
    assert not clips[0] & clips[1] and len(clips[0] | clips[1]) == 4
    for some in (train, val):
        assert {i.label for i in some} == {0, 1}


def test_sub_folders_whose_names_say_nothing_stay_apart(tmp_path):
    for method in "abcdefghij":
        pictures(tmp_path, f"fake/{method}/images/1.png", f"fake/{method}/images/2.png", f"real/{method}/images/1.png")
    train, val = parts(tmp_path)
    folders = [{i.path.parent for i in some} for some in (train, val)]
    assert not folders[0] & folders[1] and len(folders[0] | folders[1]) == 20
    for some in (train, val):
        assert {i.label for i in some} == {0, 1}


def test_no_class_is_held_out_whole(tmp_path):
    """Names whose number would hold them out: one video of all reals, and both fakes that there are."""
    drawn = [text for n in range(60) if stable_seed(text := f"{n}.png") % 10 == 0][:2]
    video = next(text for n in range(60) if stable_seed(text := f"v{n}") % 10 == 0)
    rows = [*((f"r{n}.png", 0, video) for n in range(3)), *((name, 1, "") for name in drawn)]
    pictures(tmp_path, *(row[0] for row in rows))
    train, val = parts(table(tmp_path, *rows, header="path,label,video"))
    assert [i.label for i in train] == [0, 0, 0, 1] and [i.label for i in val] == [1]


@pytest.mark.parametrize("column", ["video", "group"])
def test_rows_of_one_video_or_group_are_held_out_together(tmp_path, column):
    rows = []
    for n in range(30):
        save(tmp_path / f"{n}.png")
        rows.append((f"{n}.png", n % 2, f"v{n // 5}"))
    train, val = parts(table(tmp_path, *rows, header=f"path,label,{column}"))
    kept = [{getattr(i, column) for i in some} for some in (train, val)]
    assert not kept[0] & kept[1] and len(kept[0] | kept[1]) == 6 and len(train) + len(val) == 30


# ------------------------------------------------------------------------------------------------ folders
@pytest.mark.parametrize(
    ("real", "fake"), [("0_real", "1_fake"), ("Real", "Fake"), ("nature", "ai"), ("original", "df")]
)
def test_folders_under_their_usual_names(tmp_path, real, fake):
    pictures(tmp_path, f"{real}/a.png", f"{real}/b.png", f"{fake}/c.png", f"{fake}/d.png")
    items, report = read_manifest(tmp_path)
    assert Counter(i.label for i in items) == {0: 2, 1: 2}
    assert report.notes == [f"{real}/ is real: 2 files", f"{fake}/ is fake: 2 files"]
    assert report.notes[0] in report.summary()


def test_split_folders_above_and_below_the_labels_and_data_sets_above_both(tmp_path):
    for split in ("Train", "valid", "test"):
        pictures(tmp_path / "above", f"{split}/real/{split}.png", f"{split}/fake/{split}.png")
        pictures(tmp_path / "below", f"real/{split}/{split}.png", f"fake/{split}/{split}.png")
        pictures(tmp_path / "sets", f"midjourney/{split}/nature/{split}.png", f"midjourney/{split}/ai/{split}.png")
        pictures(tmp_path / "sets", f"own/{split}/nature/{split}.png", f"own/{split}/ai/{split}.png")
    for kind, count in (("above", 2), ("below", 2), ("sets", 4)):
        for split, name in (("train", "Train"), ("val", "valid"), ("test", "test")):
            items, _ = read_manifest(tmp_path / kind, split=split)
            assert len(items) == count and {i.path.stem for i in items} == {name}
            assert Counter(i.label for i in items) == {0: count // 2, 1: count // 2}
    assert {i.source for i in read_manifest(tmp_path / "sets")[0]} == {"midjourney", "own"}


def test_what_says_no_label_is_passed_over_and_counted(tmp_path):
    pictures(tmp_path, "real/a.png", "fake/b.png", "masks/b.png", "loose.png")
    items, report = read_manifest(tmp_path)
    assert len(items) == 2
    assert dict(report.dropped) == {
        "masks/": "a folder whose name and sub-folders say no label",
        "loose.png": "in no folder that says a label",
    }
    pictures(tmp_path / "unknown", "reel/a.png", "fak/b.png")
    with pytest.raises(ManifestError, match="expected the folders real/ and fake/ .*found fak, reel"):
        read_manifest(tmp_path / "unknown")


def test_hidden_files_and_folders_are_passed_over_and_counted(tmp_path):
    pictures(tmp_path, "real/a.png", "fake/b.png", "real/.thumbnails/a.png", "real/__MACOSX/a.png")
    for name in ("real/._a.png", "fake/.b.png"):
        (tmp_path / name).write_bytes(b"junk")
    items, report = read_manifest(tmp_path)
    assert [i.name for i in items] == ["real/a.png", "fake/b.png"]
    hidden = {"real/.thumbnails", "real/__MACOSX", "real/._a.png", "fake/.b.png"}
    assert dict(report.dropped) == dict.fromkeys(hidden, HIDDEN)
    rows = [("real/a.png", 0), ("real/._a.png", 0), ("real/__MACOSX/a.png", 0), ("fake/b.png", 1)]
    items, report = read_manifest(table(tmp_path, *rows, header="path,label"))
    assert [i.name for i in items] == ["real/a.png", "fake/b.png"] and len(report.dropped) == 2


def test_what_two_readings_pass_over_is_told_once(tmp_path):
    pictures(tmp_path, *(f"{kind}/{split}/{split}.png" for kind in ("real", "fake") for split in ("train", "val")))
    (tmp_path / "real/val/notes.txt").touch()
    (tmp_path / "real/.DS_Store").touch()
    (_, train), (_, val) = (read_manifest(tmp_path, split=split) for split in ("train", "val"))
    lost = DropReport()
    lost.take(val, train)
    assert train.dropped == [("real/.DS_Store", HIDDEN)]
    assert lost.dropped == [("real/val/notes.txt", "not a picture (.txt)")]


def test_linked_folders_are_followed_and_never_in_a_circle(tmp_path):
    pictures(tmp_path, "data/real/a.png", "data/fake/b.png", "elsewhere/c.png")
    (tmp_path / "data/fake/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/real/up").symlink_to(tmp_path / "data/real")
    items, _ = read_manifest(tmp_path / "data")
    assert [(i.name, i.label) for i in items] == [("real/a.png", 0), ("fake/b.png", 1), ("fake/more/c.png", 1)]


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    pictures(tmp_path, "real/a.png", "fake/b.png")
    os.rename(os.fsencode(tmp_path / "real/a.png"), os.fsencode(tmp_path) + b"/real/\xc4\xe3.png")
    items, _ = read_manifest(tmp_path)
    assert items[0].name == r"real/\xc4\xe3.png" and items[0].path.is_file()
    items[0].name.encode()


# ------------------------------------------------------------------------------------------------ tables
def test_a_backslash_is_a_slash_where_that_file_is_there(tmp_path):
    pictures(tmp_path, "real/a.png", "fake/b.png", r"odd\c.png", "masks/b.png")
    rows = [(r"real\a.png", 0, ""), (r"fake\b.png", 1, r"masks\b.png"), (r"odd\c.png", 1, "")]
    items, _ = read_manifest(table(tmp_path, *rows, header="path,label,mask"))
    assert [i.name for i in items] == [row[0] for row in rows]
    assert all(i.path.is_file() for i in items)
    assert items[1].mask == str(tmp_path / "masks/b.png")


def test_a_class_of_one_video_stays_in_training_and_the_others_units_whole(tmp_path):
    rows = [(f"real/{n}.png", 0, "only") for n in range(4)]
    rows += [(f"fake/{n // 3}/{n}.png", 1, "") for n in range(30)]
    pictures(tmp_path, *(row[0] for row in rows))
    train, val = parts(table(tmp_path, *rows, header="path,label,video"))
    assert sum(i.label == 0 for i in train) == 4
    assert {i.label for i in val} == {1} and len(val) % 3 == 0


def test_encodings_are_read_or_named(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    text = "path,label,source\na.png,0,café\nb.png,1,café\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "m.csv").write_bytes(text.encode(encoding))
        assert [i.source for i in read_manifest(tmp_path / "m.csv")[0]] == ["café", "café"]
    (tmp_path / "m.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(ManifestError, match="m.csv, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"):
        read_manifest(tmp_path / "m.csv")


def test_a_missing_mask_is_not_known_and_said(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png", "m.png")
    rows = [("a.png", 0, ""), ("b.png", 1, "m.png"), ("c.png", 1, "gone.png")]
    items, report = read_manifest(table(tmp_path, *rows, header="path,label,mask"))
    assert [i.mask for i in items] == ["", str(tmp_path / "m.png"), ""]
    assert report.notes == ["masks: 1 are missing, and count as not known (e.g. of c.png)"]


@pytest.mark.parametrize(
    ("header", "label"),
    [("id,target", "1.0"), ("Filename,Label", "fake"), ("image_path,is_fake", "1"), ("ID , Class", "FAKE")],
)
def test_usual_names_of_columns(tmp_path, header, label):
    pictures(tmp_path, "a.png", "b.png")
    source = table(tmp_path, ["a.png", label], ["b.png", "0"], header=header)
    items, _ = read_manifest(source)
    assert [(item.name, item.label) for item in items] == [("a.png", 1), ("b.png", 0)]


def test_other_columns_are_refused_by_name(tmp_path):
    with pytest.raises(ManifestError, match=r"column path, label is missing; found \['face', 'verity'\]"):
        read_manifest(table(tmp_path, ["a.png", "0"], header="face,verity"))


def test_a_folder_of_videos_says_what_makes_pictures_of_it(tmp_path):
    for name in ("real/a.mp4", "fake/b.mov"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x" * 40)
    with pytest.raises(ManifestError, match=r"dropped \d: a video; python -m solution.prepare SOURCE --out DIR makes"):
        read_manifest(tmp_path, split="train")


def test_figures_of_an_earlier_run_are_no_pictures(tmp_path):
    pictures(tmp_path, "real/a.png", "fake/b.png", "fake/p.report/figures/c.png")
    (tmp_path / "fake/p.report/report.json").write_text("{}")
    items, report = read_manifest(tmp_path)
    assert [item.name for item in items] == ["real/a.png", "fake/b.png"]
    assert ("fake/p.report/figures", OUTPUT) in report.dropped


# ------------------------------------------------------------------------------------------------ tables
@pytest.mark.parametrize("between", [" ", "\t", ",", ", ", ";", "   "])
@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv"])
def test_a_path_and_a_label_a_line_without_a_header(tmp_path, between, suffix):
    pictures(tmp_path, "a.png", "my b.png", "c,d.png")
    source = tmp_path / f"list.{suffix}"
    lines = [f"a.png{between}0", "# said by hand", f"my b.png{between}fake", f"c,d.png{between}1.0", ""]
    source.write_text("\r\n".join(lines))
    items, _ = read_manifest(source)
    assert [(item.name, item.label) for item in items] == [("a.png", 0), ("my b.png", 1), ("c,d.png", 1)]
    source.write_text("image label\na.png real\n" if between == " " else '"a.png"\t"real"\n')
    assert [(item.name, item.label) for item in read_manifest(source)[0]] == [("a.png", 0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.png 0\nb.png perhaps\n", "line 2: label is 'perhaps'"),
        ("a.png 0\nb.png\n", "line 2: no label in it"),
        # As Celeb-DF has it, where 1 is real.
        ("1 a.png\n0 b.png\n", "line 1: no label in it"),
        ("path,label\n", "no row in it"),
        ("", "no row in it"),
        ("path,label,label\na.png,0,1\n", "column label occurs twice"),
        ("path,label\na.png,0\nb,c.png,1\n", "line 3: 3 fields under 2 columns"),
    ],
)
def test_tables_that_cannot_be_read_without_guessing(tmp_path, text, said):
    pictures(tmp_path, "a.png", "b.png")
    for name in ("t.csv", "t.txt"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ManifestError, match=said):
            read_manifest(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "path;label;split\na.png;real;train\nb.png;fake;val\n",
        "sep=;\r\npath;label;split\r\na.png;0;Train\r\nb.png;1;Valid\r\n",
        "path\tlabel\tsplit\na.png\t0\ttraining\nb.png\t1\tdev\n",
        " Path , Label , Split \n a.png , Real , TRAIN \n b.png , FAKE , VAL \n",
        "path,label,split\ra.png,0,train\rb.png,1,val\r",
        "\n\npath,label,split,\na.png,0,train,\n,,,\nb.png,1,val,\n",
    ],
)
def test_tables_as_other_programs_write_them(tmp_path, text):
    pictures(tmp_path, "a.png", "b.png")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        items, report = read_manifest(tmp_path / "t.csv")
        assert [(i.name, i.label, i.split) for i in items] == [("a.png", 0, "train"), ("b.png", 1, "val")]
        assert not report.dropped


def test_columns_by_their_usual_names_and_the_others_told(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "t.csv").write_text(
        "File_Name,Target,Subset,Identity,Video_ID,Dataset,quality\na.png,0,Train,x,1,s,9\nb.png,1,Val,y,2,s,9\n"
    )
    items, report = read_manifest(tmp_path / "t.csv")
    assert [(i.split, i.group, i.video, i.source) for i in items] == [("train", "x", "1", "s"), ("val", "y", "2", "s")]
    assert report.notes == ["columns that are not read: 'quality'"]


def test_names_whose_accents_macos_takes_apart(tmp_path):
    apart, whole = unicodedata.normalize("NFD", "ü.png"), unicodedata.normalize("NFC", "ü.png")
    pictures(tmp_path, apart, "b.png")
    items, _ = read_manifest(table(tmp_path, [whole, 0], ["b.png", 1], header="path,label"))
    assert [(item.name, item.path.name) for item in items] == [(whole, apart), ("b.png", "b.png")]
    (tmp_path / "list.txt").write_text(f"{whole}\nb.png\n")
    assert all(item.path.is_file() for item in find_inputs(tmp_path / "list.txt"))


def test_text_with_nul_bytes_is_refused_and_a_second_mark_is_none(tmp_path):
    pictures(tmp_path, "a.png")
    for encoding in ("utf-16-le", "utf-32"):
        (tmp_path / "t.csv").write_bytes("path,label\na.png,0\n".encode(encoding))
        with pytest.raises(ManifestError, match="save it as UTF-8"):
            read_manifest(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes("\ufeff\ufeffpath,label\na.png,0\n".encode())
    assert len(read_manifest(tmp_path / "t.csv")[0]) == 1
