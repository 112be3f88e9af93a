"""Layouts of raw data sets: labels, splits, people, masks and pairs as each data set has them; nothing guessed."""

import shutil

import pytest
from raw_sets import empty, write_json

from solution.data.labels import label_of
from solution.data.layouts import LAYOUTS, find_entries
from solution.data.lists import ManifestError
from solution.data.raw import LayoutError, PassedOver, folder_meaning
from solution.data.splitting import components, split_entries
from solution.data.ties import tied


def by_name(found):
    return {entry.name: entry for entry in found.entries}


def reasons(found):
    return {row["reason"]: row["count"] for row in found.passed.rows()}


# ------------------------------------------------------------------------------------------------ words
@pytest.mark.parametrize(
    ("word", "label"),
    [
        *((w, 0) for w in ("real", "Real", "REAL", "0", 0, "0.0", "original", "Celeb-real", "YouTube-real", "0_real")),
        *(
            (w, 0)
            for w in (
                "FF-real",
                "DFDC_Real",
                "CelebDFv2_real",
                "pristine",
                "youtube",
                "actors",
                "real_videos",
                "nature",
            )
        ),
        *(
            (w, 1)
            for w in (
                "fake",
                "FAKE",
                "1",
                1,
                "1.0",
                "1_fake",
                "ai",
                "FF-DF",
                "FF-F2F",
                "DFDCP_FakeA",
                "Celeb-synthesis",
            )
        ),
        *((w, None) for w in ("un-real", "unreal", "maybe", "2", "", "surreal", "not_fake", None)),
    ],
)
def test_a_label_is_known_or_none(word, label):
    assert label_of(word) == label


def test_a_folder_says_label_split_both_or_nothing():
    assert folder_meaning("training_real") == (0, "train")
    assert folder_meaning("fake_test") == (1, "test")
    assert folder_meaning("Valid") == (None, "val")
    assert folder_meaning("real_vs_fake") == (None, "")
    assert folder_meaning("StyleGAN") == (None, "")


# ------------------------------------------------------------------------------------------------ FaceForensics++
def ff_tree(root):
    for comp in ("c23", "c40"):
        empty(root, *(f"original_sequences/youtube/{comp}/videos/{n:03d}.mp4" for n in range(4)))
        empty(root, *(f"manipulated_sequences/Face2Face/{comp}/videos/{n}.mp4" for n in ("000_001", "002_003")))
    empty(root, "manipulated_sequences/Face2Face/masks/videos/000_001.mp4")
    empty(root, "original_sequences/actors/c23/videos/01__exit_phone_room.mp4")
    empty(root, "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__exit_phone_room__YVGY8LOK.mp4")
    empty(root, "manipulated_sequences/DeepFakeDetection/c23/masks/01_02__exit_phone_room__YVGY8LOK/0000.png")
    for split, pairs in {"train": [["000", "001"]], "val": [["002", "003"]], "test": []}.items():
        write_json(root / f"{split}.json", pairs)
    return root


def test_faceforensics(tmp_path):
    found = find_entries(ff_tree(tmp_path))
    entries = by_name(found)
    assert found.layout == "ff++" and len(entries) == 14 and not found.cropped
    fake = entries["manipulated_sequences/Face2Face/c40/videos/000_001"]
    assert (fake.label, fake.generator, fake.split, fake.source) == (1, "Face2Face", "train", "ff++-c40")
    assert fake.people == ("ff++:000", "ff++:001")
    assert fake.place == "original_sequences/youtube/c40/videos/000"
    # One mask serves every compression.
    assert fake.masks == ("manipulated_sequences/Face2Face/masks/videos/000_001.mp4",)
    assert entries["manipulated_sequences/Face2Face/c23/videos/002_003"].masks == ()
    assert entries["original_sequences/youtube/c23/videos/002"].split == "val"
    dfd = entries["manipulated_sequences/DeepFakeDetection/c23/videos/01_02__exit_phone_room__YVGY8LOK"]
    assert dfd.place == "original_sequences/actors/c23/videos/01__exit_phone_room"
    assert dfd.people == ("actor:01", "actor:02") and len(dfd.masks) == 1 and dfd.source == "dfd-c23"


def test_faceforensics_people_of_two_splits_are_passed_over(tmp_path):
    ff_tree(tmp_path)
    empty(tmp_path, "manipulated_sequences/FaceSwap/c23/videos/000_003.mp4")
    found = find_entries(tmp_path)
    assert reasons(found)["its two people are in different official splits"] == 1
    assert not any("FaceSwap" in e.name for e in found.entries)


def test_dfd_as_kaggle_ships_it(tmp_path):
    empty(tmp_path, "DFD_original sequences/01__walk.mp4", "DFD_manipulated_sequences/01_02__walk__ABCDEFGH.mp4")
    entries = by_name(find_entries(tmp_path))
    assert [e.label for e in entries.values()] == [1, 0]
    assert entries["DFD_manipulated_sequences/01_02__walk__ABCDEFGH"].place == "DFD_original sequences/01__walk"


# ------------------------------------------------------------------------------------------------ Celeb-DF
def celeb_tree(root, listed):
    empty(root, "Celeb-real/id0_0000.mp4", "Celeb-real/id1_0000.mp4", "YouTube-real/00000.mp4")
    empty(root, "Celeb-synthesis/id0_id1_0000.mp4", "Celeb-synthesis/id1_id0_0000.mp4")
    (root / "List_of_testing_videos.txt").write_text(listed)
    return root


def test_celeb_df_where_one_means_real(tmp_path):
    found = find_entries(celeb_tree(tmp_path, "1 YouTube-real/00000.mp4\n0 Celeb-synthesis/id0_id1_0000.mp4\n"))
    entries = by_name(found)
    assert found.layout == "celeb-df"
    assert {n: (e.label, e.split) for n, e in entries.items()} == {
        "Celeb-real/id0_0000": (0, "train"),
        "Celeb-real/id1_0000": (0, "train"),
        "YouTube-real/00000": (0, "test"),
        "Celeb-synthesis/id0_id1_0000": (1, "test"),
        "Celeb-synthesis/id1_id0_0000": (1, "train"),
    }
    assert entries["Celeb-synthesis/id0_id1_0000"].place == "Celeb-real/id0_0000"
    assert entries["Celeb-synthesis/id0_id1_0000"].people == ("celeb:0", "celeb:1")


def test_celeb_df_list_turned_round_is_refused(tmp_path):
    with pytest.raises(LayoutError, match="1 means real"):
        find_entries(celeb_tree(tmp_path, "0 YouTube-real/00000.mp4\n"))


# ------------------------------------------------------------------------------------------------ DFDC
def test_dfdc(tmp_path):
    empty(tmp_path, *(f"dfdc_train_part_0/{n}.mp4" for n in ("a", "b", "c", "unlisted")))
    rows = {
        "a.mp4": {"label": "REAL", "split": "train", "original": None},
        "b.mp4": {"label": "FAKE", "split": "train", "original": "a.mp4"},
        "c.mp4": {"label": "FAKE", "split": "train", "original": "gone.mp4"},
        "lost.mp4": {"label": "REAL", "split": "train", "original": None},
    }
    write_json(tmp_path / "dfdc_train_part_0/metadata.json", rows)
    found = find_entries(tmp_path)
    entries = by_name(found)
    assert found.layout == "dfdc"
    assert {n[-1]: (e.label, e.people, e.split) for n, e in entries.items()} == {
        "a": (0, ("dfdc:a",), ""),
        "b": (1, ("dfdc:a",), ""),
        "c": (1, ("dfdc:gone",), ""),
    }
    assert entries["dfdc_train_part_0/b"].place == "dfdc_train_part_0/a"
    assert reasons(found) == {"in metadata.json, but not there": 1, "not in metadata.json or labels.csv": 1}


def test_dfdc_test_set_has_a_table(tmp_path):
    empty(tmp_path, "train/part_0/a.mp4", "test/x.mp4")
    write_json(tmp_path / "train/part_0/metadata.json", {"a.mp4": {"label": "FAKE", "split": "train"}})
    (tmp_path / "test/labels.csv").write_text("filename,label\nx.mp4,0\n")
    assert {n: (e.label, e.split) for n, e in by_name(find_entries(tmp_path)).items()} == {
        "train/part_0/a": (1, "train"),
        "test/x": (0, "test"),
    }


def test_dfdc_unknown_label_is_refused(tmp_path):
    empty(tmp_path, "a.mp4")
    write_json(tmp_path / "metadata.json", {"a.mp4": {"label": "MAYBE"}})
    with pytest.raises(LayoutError, match="MAYBE"):
        find_entries(tmp_path)


def test_dfdc_preview(tmp_path):
    empty(tmp_path, "original_videos/11/11_A.mp4", "method_A/22/22_A.mp4")
    rows = {
        "original_videos/11/11_A.mp4": {"label": "real", "set": "train", "target_id": 11, "swapped_id": None},
        "method_A/22/22_A.mp4": {"label": "fake", "set": "test", "target_id": 22, "swapped_id": 33},
    }
    write_json(tmp_path / "dataset.json", rows)
    found = find_entries(tmp_path)
    fake = by_name(found)["method_A/22/22_A"]
    assert found.layout == "dfdcp"
    assert (fake.label, fake.split, fake.generator, fake.people) == (1, "test", "method_A", ("dfdcp:22", "dfdcp:33"))


# ------------------------------------------------------------------------------------------------ DeepfakeBench
def bench(label, splits, frames, compression=None):
    def video():
        tree = {"000": {"label": label, "frames": frames}}
        return {compression: tree} if compression else tree

    return {"FF-real" if label in (0, "FF-real") else "FF-DF": {split: video() for split in splits}}


def test_deepfakebench_labels_backslashes_and_masks(tmp_path):
    empty(tmp_path, *(f"rgb/ff/frames/000/{n}.png" for n in range(3)), "rgb/ff/masks/000/1.png")
    frames = [f"datasets\\rgb\\ff\\frames\\000\\{n}.png" for n in range(3)]
    write_json(tmp_path / "FF.json", {"FF": bench("FF-DF", ["train"], frames, "c23")})
    found = find_entries(tmp_path)
    (entry,) = found.entries
    assert found.layout == "deepfakebench" and found.cropped
    assert (entry.kind, entry.label, entry.split, entry.generator) == ("frames", 1, "train", "FF-DF")
    assert len(entry.files) == 3 and entry.masks == ("rgb/ff/masks/000/1.png",)
    assert find_entries(tmp_path / "FF.json").entries == found.entries


@pytest.mark.parametrize("splits", [["train", "test"], ["train", "val", "test"], ["test", "val"]])
def test_deepfakebench_a_video_stands_in_one_split(tmp_path, splits):
    empty(tmp_path, "a/0.png", "a/1.png", "b/0.png")
    tree = bench(0, splits, ["a/0.png", "a/1.png"])
    tree["FF-real"].setdefault("train", {})["001"] = {"label": 0, "frames": ["b/0.png"]}
    write_json(tmp_path / "x.json", {"FF": tree})
    found = find_entries(tmp_path)
    assert {e.name: e.split for e in found.entries} == {"a": "test", "b/0": "train"}
    assert reasons(found) == {"listed in another split than test too": 1}


def test_deepfakebench_a_label_listed_in_every_split_has_none(tmp_path):
    empty(tmp_path, "a/0.png", "b/0.png")
    tree = bench(0, ["train", "val", "test"], ["a/0.png"]) | bench("FF-DF", ["test"], ["b/0.png"])
    write_json(tmp_path / "x.json", {"FF": tree})
    assert {e.name: e.split for e in find_entries(tmp_path).entries} == {"a/0": "", "b/0": "test"}


def test_deepfakebench_videos_that_share_a_folder(tmp_path):
    empty(tmp_path, *(f"a/{n}.png" for n in range(4)))
    tree = bench(0, ["train"], ["a/0.png", "a/1.png"])
    tree["FF-real"]["train"]["001"] = {"label": 0, "frames": ["a/2.png", "a/3.png"]}
    write_json(tmp_path / "x.json", {"FF": tree})
    assert sorted(len(e.files) for e in find_entries(tmp_path).entries) == [2, 2]
    tree["FF-DF"] = {"test": {"002": {"label": 1, "frames": ["a/3.png"]}}}
    write_json(tmp_path / "x.json", {"FF": tree})
    with pytest.raises(LayoutError, match="a/3.png has both labels"):
        find_entries(tmp_path)


@pytest.mark.parametrize("content", [[["071", "054"]], {"a.mp4": {"label": "REAL"}}, ["a.png"], {}])
def test_another_json_by_itself_is_refused(tmp_path, content):
    empty(tmp_path, "a.png")
    with pytest.raises(LayoutError, match="give the folder"):
        find_entries(write_json(tmp_path / "list.json", content))


def test_deepfakebench_unknown_label_is_refused(tmp_path):
    empty(tmp_path, "a/0.png")
    write_json(tmp_path / "x.json", {"FF": bench("un-real", ["train"], ["a/0.png"])})
    with pytest.raises(ManifestError, match="un-real"):
        find_entries(tmp_path)


def test_deepfakebench_labels_that_disagree_are_refused_and_odd_places_counted(tmp_path):
    empty(tmp_path, "a/0.png")
    tree = bench("FF-DF", ["train"], ["a/0.png"])
    write_json(tmp_path / "x.json", {"FF": tree, "version": 2})
    found = find_entries(tmp_path)
    assert len(found.entries) == 1 and reasons(found)["not as DeepfakeBench writes it (x.json)"] == 1
    tree["FF-DF"]["train"]["000"]["label"] = "FF-real"
    write_json(tmp_path / "x.json", {"FF": tree})
    with pytest.raises(ManifestError, match="'FF-real' under 'FF-DF', which say the opposite"):
        find_entries(tmp_path)


def test_deepfakebench_without_frames_says_so(tmp_path):
    empty(tmp_path, "a/0.png")
    write_json(tmp_path / "x.json", {"FF": bench("FF-real", ["train"], None)})
    with pytest.raises(LayoutError, match="no frame of the video is there"):
        find_entries(tmp_path)


# ------------------------------------------------------------------------------------------------ folders of frames
def test_wilddeepfake(tmp_path):
    empty(tmp_path, *(f"deepfake_in_the_wild/fake_train/7/fake/{s}/{n}.png" for s in (1, 2) for n in (1, 2)))
    empty(tmp_path, "deepfake_in_the_wild/real_test/3/real/0/1.png", "deepfake_in_the_wild/real_test/4.tar.gz")
    found = find_entries(tmp_path)
    entries = by_name(found)
    assert found.layout == "wilddeepfake" and len(entries) == 3 and found.cropped
    fakes = [e for e in entries.values() if e.label]
    assert {e.split for e in fakes} == {"train"} and len({e.people for e in fakes}) == 1
    assert reasons(found)["archive: unpack it first"] == 1


def test_df40(tmp_path):
    empty(tmp_path, *(f"simswap/ff/000_003/{n}.png" for n in range(2)), "simswap/cdf/id0_id1_0000/0.png")
    empty(tmp_path, "sd2.1/ff/7.png", "heygen/fake/v1/0.png", "heygen/real/v2/0.png")
    found = find_entries(tmp_path)
    entries = by_name(found)
    assert found.layout == "df40"
    assert entries["simswap/ff/000_003"].people == ("ff++:000", "ff++:003")
    assert entries["simswap/cdf/id0_id1_0000"].generator == "simswap"
    assert entries["sd2.1/ff/7"].masks == ("whole",) and entries["sd2.1/ff/7"].kind == "picture"
    assert {e.label for n, e in entries.items() if n.startswith("heygen/real")} == {0}


# ------------------------------------------------------------------------------------------------ plain folders
def test_folders_with_splits_generators_and_masks(tmp_path):
    empty(tmp_path, "train/Real/a.jpg", "train/Fake/StyleGAN/b.png", "valid/Fake/StyleGAN/c.png", "valid/Real/d.jpg")
    empty(tmp_path, "train/masks/StyleGAN/b.png", "._x.jpg", "__MACOSX/real/a.jpg", "train/Real/note.doc")
    found = find_entries(tmp_path)
    entries = by_name(found)
    assert found.layout == "folders" and len(entries) == 4
    assert entries["train/Fake/StyleGAN/b"].generator == "StyleGAN"
    assert entries["train/Fake/StyleGAN/b"].masks == ("train/masks/StyleGAN/b.png",)
    assert entries["valid/Real/d"].split == "val"
    assert reasons(found) == {"hidden folder": 1, "hidden file": 1, "no picture or video (.doc)": 1}


@pytest.mark.parametrize("names", [("0_real", "1_fake"), ("nature", "ai"), ("training_real", "training_fake")])
def test_folders_of_usual_names(tmp_path, names):
    empty(tmp_path, f"{names[0]}/a.png", f"{names[1]}/a.png")
    assert [e.label for e in find_entries(tmp_path).entries if e.name.startswith(names[1])] == [1]


def test_folders_of_videos_frames(tmp_path):
    empty(tmp_path, *(f"fake/000_001/{n:04d}.jpg" for n in range(5)), *(f"real/000/{n:04d}.jpg" for n in range(5)))
    entries = by_name(find_entries(tmp_path))
    assert set(entries) == {"fake/000_001", "real/000"}
    assert entries["fake/000_001"].kind == "frames" and entries["real/000"].people == ("ff++:000",)


def test_frames_below_a_folder_of_that_name_are_videos(tmp_path):
    empty(tmp_path, *(f"{label}/frames/0000_x/{n}.png" for label in ("real", "fake") for n in range(3)))
    entries = by_name(find_entries(tmp_path))
    assert entries["fake/frames/0000_x"].kind == "frames" and entries["fake/frames/0000_x"].generator == ""


def test_videos_named_as_faceforensics_names_them_are_pairs(tmp_path):
    empty(tmp_path, "real/519.mp4", "fake/Deepfakes_519_515.mp4", "fake/FaceSwap_634_660.mp4")
    entries = by_name(find_entries(tmp_path))
    fake = entries["fake/Deepfakes_519_515"]
    assert (fake.people, fake.place, fake.generator) == (("ff++:519", "ff++:515"), "real/519", "Deepfakes")
    assert entries["fake/FaceSwap_634_660"].place == ""


def test_folders_of_people_are_groups(tmp_path):
    empty(tmp_path, *(f"real/person{p}/{n}.jpg" for p in range(5) for n in range(2)), "fake/1.png", "fake/2.png")
    entries = find_entries(tmp_path).entries
    assert len({e.people for e in entries if not e.label}) == 5
    assert len({e.people for e in entries if e.label}) == 2


def test_unknown_folders_are_refused_by_name(tmp_path):
    empty(tmp_path, "wolves/a.png", "sheep/b.png")
    with pytest.raises(LayoutError, match="sheep, wolves.*Known are .*pristine"):
        find_entries(tmp_path)
    empty(tmp_path, "real/c.png")
    with pytest.raises(LayoutError, match="sheep, wolves"):
        find_entries(tmp_path)


def test_a_folder_of_both_labels_is_refused(tmp_path):
    empty(tmp_path, "fake/real/a.png", "real/b.png")
    with pytest.raises(LayoutError, match="both labels"):
        find_entries(tmp_path)


def test_several_data_sets_are_refused(tmp_path):
    empty(tmp_path, "ff/original_sequences/youtube/c23/videos/000.mp4", "celeb/Celeb-synthesis/id0_id1_0000.mp4")
    with pytest.raises(LayoutError, match="several data sets"):
        find_entries(tmp_path)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "folders"])
def test_a_layout_that_does_not_fit_is_refused(tmp_path, layout):
    empty(tmp_path, "real/a.png", "fake/b.png")
    with pytest.raises(LayoutError):
        find_entries(tmp_path, layout)


def test_what_prepare_made_is_no_data_set(tmp_path):
    empty(tmp_path, "real/a.png", "fake/b.png", "out/images/real/a.jpg", "out/prepared.jsonl")
    found = find_entries(tmp_path)
    assert len(found.entries) == 2 and reasons(found) == {"output of an earlier prepare": 1}
    with pytest.raises(LayoutError, match="train on its manifest.csv"):
        find_entries(tmp_path / "out")


def test_one_name_with_two_suffixes(tmp_path):
    empty(tmp_path, "real/a.png", "real/a.jpg", "fake/b.png")
    assert sorted(by_name(find_entries(tmp_path))) == ["fake/b", "real/a_jpg", "real/a_png"]


# ------------------------------------------------------------------------------------------------ tables
def test_kaggle_table(tmp_path):
    empty(tmp_path, "images/a.jpg", "images/b.jpg", "images/extra.jpg")
    (tmp_path / "train.csv").write_text("image_id,label\na,0\nb,1.0\nlost,1\n")
    (tmp_path / "images").rename(tmp_path / "pics")
    assert {n: e.label for n, e in by_name(find_entries(tmp_path)).items()} == {"pics/a": 0, "pics/b": 1}
    (tmp_path / "train.csv").write_text("path;label\npics/a.jpg;real\n/home/me/pics/b.jpg;FAKE\npics/lost.jpg;1\n")
    found = find_entries(tmp_path)
    assert found.layout == "kaggle"
    assert {n: (e.label, e.split) for n, e in by_name(found).items()} == {
        "pics/a": (0, "train"),
        "pics/b": (1, "train"),
    }
    assert reasons(found) == {"in train.csv, but not there": 1, "in no table": 1}


def test_lists_of_a_path_and_a_label(tmp_path):
    empty(tmp_path, "pics/a.jpg", "pics/b.jpg", "pics/c.jpg")
    (tmp_path / "train.txt").write_text("pics/a.jpg 0\npics/b.jpg fake\n")
    (tmp_path / "val.txt").write_text("pics/c.jpg\t1\n")
    (tmp_path / "README.txt").write_bytes(b"caf\xe9 is no table\n")
    (tmp_path / "names.txt").write_text("pics/a.jpg\npics/b.jpg\n")
    found = find_entries(tmp_path)
    assert found.layout == "kaggle"
    assert {n: (e.label, e.split) for n, e in by_name(found).items()} == {
        "pics/a": (0, "train"),
        "pics/b": (1, "train"),
        "pics/c": (1, "val"),
    }
    # Where folders say the label, numbers may be those of classes.
    empty(tmp_path, "real/d.jpg", "fake/e.jpg")
    shutil.rmtree(tmp_path / "pics")
    (tmp_path / "train.txt").write_text("real/d.jpg 17\n")
    assert find_entries(tmp_path).layout == "folders"


def test_tables_written_where_their_author_had_the_files(tmp_path):
    empty(tmp_path, "real_vs_fake/pics/train/real/1.jpg", "real_vs_fake/pics/train/fake/2.jpg", "real_vs_fake/0.jpg")
    (tmp_path / "train.csv").write_text(
        "id,path,label\n1,train/real/1.jpg,0\n2,C:\\me\\train\\fake\\2.jpg,1\n0,elsewhere/0.jpg,1\n"
    )
    found = find_entries(tmp_path)
    assert sorted(e.label for e in found.entries) == [0, 1]
    # A bare name is no reason to take a file of another folder.
    assert reasons(found) == {"in train.csv, but not there": 1, "in no table": 1}


def test_a_name_that_two_files_have_is_nobodys(tmp_path):
    empty(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg")
    (tmp_path / "labels.csv").write_text("id,label\n1,0\n2,1\n")
    assert [e.name for e in find_entries(tmp_path).entries] == ["b/2"]


def test_kaggle_words_stand_above_numbers_and_folders_contradict(tmp_path):
    empty(tmp_path, "real/a.jpg", "fake/b.jpg")
    (tmp_path / "train.csv").write_text("id,label,label_str,path\n1,1,real,real/a.jpg\n2,0,fake,fake/b.jpg\n")
    assert {e.name: e.label for e in find_entries(tmp_path).entries} == {"real/a": 0, "fake/b": 1}
    (tmp_path / "train.csv").write_text("label,path\n1,real/a.jpg\n0,fake/b.jpg\n")
    with pytest.raises(LayoutError, match="folder of the other label"):
        find_entries(tmp_path)


def test_table_of_another_encoding_is_named(tmp_path):
    empty(tmp_path, "a.jpg")
    (tmp_path / "train.csv").write_bytes("path,label\nä.jpg,0\n".encode("cp1252"))
    with pytest.raises(ManifestError, match="not UTF-8"):
        find_entries(tmp_path)


def test_ntire_pictures(tmp_path):
    empty(tmp_path, "0000_real.png", "0001_fake.png")
    found = find_entries(tmp_path)
    assert found.layout == "ntire" and [e.label for e in found.entries] == [0, 1]


# ------------------------------------------------------------------------------------------------ splits
def crossing(placed):
    """People on both sides of train and val."""
    people = {s: {p for e, _ in placed if e.split == s for p in e.people} for s in ("train", "val")}
    return people["train"] & people["val"]


def test_official_splits_stand(tmp_path):
    found = find_entries(ff_tree(tmp_path))
    placed, remarks = split_entries(found.entries, "official", 0, found.passed)
    splits = {e.name: e.split for e, _ in placed}
    assert splits["original_sequences/youtube/c23/videos/002"] == "val"
    assert splits["manipulated_sequences/Face2Face/c23/videos/000_001"] == "train"
    assert not crossing(placed) and not remarks
    groups = {e.name: g for e, g in placed}
    assert groups["original_sequences/youtube/c23/videos/001"] == groups["original_sequences/youtube/c40/videos/000"]


def test_groups_are_dealt_whole_and_stratified(tmp_path):
    names = [f"{n:03d}" for n in range(40)]
    empty(tmp_path, *(f"original_sequences/youtube/c23/videos/{n}.mp4" for n in names))
    pairs = [f"{a}_{b}" for a, b in zip(names[::2], names[1::2])]
    empty(tmp_path, *(f"manipulated_sequences/Deepfakes/c23/videos/{n}.mp4" for n in pairs))
    found = find_entries(tmp_path)
    placed, remarks = split_entries(found.entries, "group", 3, found.passed)
    assert len(placed) == 60 and not crossing(placed) and not remarks
    counts = {
        s: [sum(e.split == s and e.label == c for e, _ in placed) for c in (0, 1)] for s in ("train", "val", "test")
    }
    assert counts == {"train": [32, 16], "val": [4, 2], "test": [4, 2]}
    assert placed == split_entries(found.entries, "group", 3, PassedOver())[0]
    assert placed != split_entries(found.entries, "group", 4, PassedOver())[0]


def test_what_is_tied_through_others_is_one():
    stands_for = tied([("a", "b"), ("c",), (), ("d", "e"), ("b", "e"), ("f", "c")])
    parts = {}
    for key, one in stands_for.items():
        parts.setdefault(one, set()).add(key)
    assert sorted(map(sorted, parts.values())) == [["a", "b", "d", "e"], ["c", "f"]]
    assert list(stands_for) == [*"abcdef"]


def test_people_who_are_all_tied_together_are_cut_apart(tmp_path):
    people = range(12)
    empty(tmp_path, *(f"Celeb-real/id{a}_0000.mp4" for a in people))
    empty(tmp_path, *(f"Celeb-synthesis/id{a}_id{(a + d) % 12}_0000.mp4" for a in people for d in (1, 5)))
    found = find_entries(tmp_path)
    assert len(set(components(found.entries).values())) == 1
    placed, remarks = split_entries(found.entries, "group", 0, found.passed)
    assert not crossing(placed) and not remarks
    assert len(placed) + reasons(found)["its people were dealt to different splits"] == len(found.entries)


def test_an_official_test_split_that_shares_people_is_said_and_kept(tmp_path):
    people = [f"id{a}_000{n}" for a in range(6) for n in range(2)]
    empty(tmp_path, *(f"Celeb-real/{p}.mp4" for p in people))
    empty(tmp_path, *(f"Celeb-synthesis/id{a}_id{b}_0000.mp4" for a in range(6) for b in range(6) if a != b))
    listed = "1 Celeb-real/id0_0000.mp4\n0 Celeb-synthesis/id0_id1_0000.mp4\n"
    (tmp_path / "List_of_testing_videos.txt").write_text(listed)
    found = find_entries(tmp_path)
    placed, remarks = split_entries(found.entries, "official", 0, found.passed)
    assert len([e for e, _ in placed if e.split == "test"]) == 2 and not crossing(placed)
    assert "shares 2 people" in remarks[0]
    groups = {s: {g for e, g in placed if e.split == s} for s in ("train", "val", "test")}
    # The reader keeps a group on one side only, so the authors' test split has groups of its own.
    assert not groups["test"] & (groups["train"] | groups["val"])


def test_val_is_held_out_of_an_official_train(tmp_path):
    empty(tmp_path, *(f"train/{label}/{n}.jpg" for label in ("real", "fake") for n in range(20)))
    empty(tmp_path, "test/real/a.jpg", "test/fake/b.jpg")
    found = find_entries(tmp_path)
    placed, _ = split_entries(found.entries, "official", 0, found.passed)
    assert [sum(e.split == s for e, _ in placed) for s in ("train", "val", "test")] == [36, 4, 2]


def test_two_of_each_label_are_enough_for_val(tmp_path):
    empty(tmp_path, *(f"{label}/{n}.jpg" for label in ("real", "fake") for n in range(2)))
    found = find_entries(tmp_path)
    placed, remarks = split_entries(found.entries, "official", 0, found.passed)
    assert sorted((e.split, e.label) for e, _ in placed) == [("train", 0), ("train", 1), ("val", 0), ("val", 1)]
    assert not remarks


def test_random_splits_name_no_groups(tmp_path):
    found = find_entries(ff_tree(tmp_path))
    placed, remarks = split_entries(found.entries, "random", 0, found.passed)
    assert {g for _, g in placed} == {""} and "a person can stand on both sides" in remarks[0]
