"""Splits of a raw data set: nobody who is validated on is trained on, whatever its authors wrote."""

from solution.data.raw import Entry, PassedOver
from solution.data.splitting import split_entries


def entry(name, label, split, *people):
    return Entry(name, (f"{name}.mp4",), "video", label, "s", split=split, people=people)


def test_of_a_person_in_two_official_splits_val_keeps_its_entries_and_train_loses_them():
    entries = [
        entry("a", 0, "train", "anna"),
        entry("b", 1, "train", "anna", "berta"),
        entry("c", 0, "train", "carla"),
        entry("d", 1, "train", "carla"),
        entry("e", 0, "val", "berta"),
        entry("f", 1, "val", "dora"),
    ]
    passed = PassedOver()
    placed, _ = split_entries(entries, "official", 0, passed)
    assert [(e.name, e.split) for e, _ in placed] == [(n, "train") for n in "acd"] + [(n, "val") for n in "ef"]
    assert passed.rows() == [{"reason": "a person of it is in val", "count": 1, "example": "b"}]
