"""Splits that no person and no video crosses: official where there is one, else dealt by group and stratified by label.

Takes `Entry`s; gives each that is kept its split and the name of its group. All randomness comes from `seed`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from solution.data.raw import Entry, PassedOver
from solution.data.ties import tied

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
_FEW = 1.5  # people in test's share, below which train needs them more
_CUT = 0.5  # of all entries: a larger group is cut by person


def split_entries(
    entries: Sequence[Entry], policy: str, seed: int, passed: PassedOver
) -> tuple[list[tuple[Entry, str]], list[str]]:
    """(entry with its split, name of its group) of every entry that is kept, and remarks for the reader.

    policy: `official` keeps the data set's own splits, holds a tenth of train out as val where it has none, and deals what
    has none; `group` deals people, `random` deals videos. An entry whose people fall into different splits is passed over.
    """
    rng, remarks = np.random.default_rng(seed), []
    if policy == "random":
        shares = SHARES
        kept = _dealt([[e] for e in entries], shares, rng)
        remarks.append("--splits random: a person can stand on both sides; the manifest names no groups")
        return [(entry, "") for entry in kept], remarks
    blank = [replace(e, split="") for e in entries] if policy == "group" else list(entries)
    kept = _official(blank, rng, passed)
    kept = _no_shared_people(kept, passed, remarks)
    missing = [
        f"{split} has no {word}"
        for split in ("train", "val")
        for label, word in enumerate(("real", "fake"))
        if not any(e.split == split and e.label == label for e in kept)
    ]
    if missing:
        remarks.append(
            f"{'; '.join(missing)}: too few groups to hold some out, or one label alone (try --splits random)"
        )
    return [(entry, group) for entry, group in zip(kept, _group_names(kept))], remarks


def _official(entries: list[Entry], rng: np.random.Generator, passed: PassedOver) -> list[Entry]:
    """Every entry with a split: its own, that of its people, or one that is dealt."""
    fixed, free = [e for e in entries if e.split], [e for e in entries if not e.split]
    where: dict[str, set[str]] = defaultdict(set)
    for entry in fixed:
        for person in entry.people:
            where[person].add(entry.split)
    loose = []
    for entry in free:
        splits = set().union(*(where[p] for p in entry.people if p in where))
        if len(splits) > 1:
            passed.add("its people stand in different splits", entry.name)
        elif splits:
            fixed.append(replace(entry, split=splits.pop()))
        else:
            loose.append(entry)
    there = {e.split for e in fixed}
    shares = {k: v for k, v in SHARES.items() if k not in there or k == "train"}
    fixed += _deal_people(loose, shares, rng, passed)
    if not any(e.split == "val" for e in fixed):
        train = [e for e in fixed if e.split == "train"]
        rest = [e for e in fixed if e.split != "train"]
        fixed = rest + _deal_people(train, {"train": 0.9, "val": 0.1}, rng, passed)
    return sorted(fixed, key=lambda entry: entry.name)


def _no_shared_people(entries: list[Entry], passed: PassedOver, remarks: list[str]) -> list[Entry]:
    """Without the training entries whose people are validated on; people that train and test share are remarked."""
    people = {s: {p for e in entries if e.split == s for p in e.people} for s in SHARES}
    kept = []
    for entry in entries:
        if entry.split == "train" and people["val"] & set(entry.people):
            passed.add("a person of it is in val", entry.name)
        else:
            kept.append(entry)
    shared = {p for e in kept if e.split in ("train", "val") for p in e.people} & people["test"]
    if shared:
        remarks.append(
            f"the official test split shares {len(shared)} people with train and val (e.g. {min(shared)}), as its authors "
            "made it; --splits group separates them"
        )
    return kept


# ---------------------------------------------------------------------------------------------------- dealing
def components(entries: Iterable[Entry]) -> dict[str, str]:
    """Person -> the first (by name) of all that entries tie together, directly or through others."""
    one_of = tied(entry.people for entry in entries)
    first: dict[str, str] = {}
    for person, one in one_of.items():
        first[one] = min(person, first.get(one, person))
    return {person: first[one] for person, one in one_of.items()}


def _group_names(entries: list[Entry]) -> list[str]:
    """The group of each entry: the people tied together within its split.

    A group of an official test split that train or val shares is named `test: ...`: the reader would leave all of train
    out, and it is the authors' protocol.
    """
    by_split = {s: components(e for e in entries if e.split == s) for s in {e.split for e in entries}}
    names = [by_split[e.split][e.people[0]] if e.people else "" for e in entries]
    learned = {name for name, e in zip(names, entries) if e.split != "test"}
    return [f"test: {name}" if e.split == "test" and name in learned else name for name, e in zip(names, entries)]


def _deal_people(
    entries: list[Entry], shares: Mapping[str, float], rng: np.random.Generator, passed: PassedOver
) -> list[Entry]:
    """Groups dealt whole; one that ties most entries together is cut by person, and what straddles is passed over."""
    group = components(entries)
    units: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        units[group[entry.people[0]] if entry.people else entry.name].append(entry)
    whole, kept = [], []
    for name in sorted(units):
        people = sorted({p for e in units[name] for p in e.people})
        if len(units[name]) <= _CUT * len(entries) or len(people) < 3:
            whole.append(units[name])
            continue
        side = _cut(units[name], people, shares, rng)
        for entry in units[name]:
            splits = {side[p] for p in entry.people}
            if len(splits) == 1:
                kept.append(replace(entry, split=splits.pop()))
            else:
                passed.add("its people were dealt to different splits", entry.name)
    return kept + _dealt(whole, shares, rng)


def _cut(
    entries: Sequence[Entry], people: Sequence[str], shares: Mapping[str, float], rng: np.random.Generator
) -> dict[str, str]:
    """Person -> split: each split but train takes its share of the people, those that most entries tie together.

    It takes more where its people alone make no entry of a label, at most half of those that are left.
    """
    ties: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        for person in entry.people:
            ties[person].update(set(entry.people) - {person})
    labels, total = {e.label for e in entries}, sum(shares.values())
    free, side = [people[i] for i in rng.permutation(len(people))], dict.fromkeys(people, "train")
    for split in (s for s in shares if s != "train"):
        if split == "test" and shares[split] / total * len(people) < _FEW:
            continue
        chosen: list[str] = []
        wanted, most = max(1, round(shares[split] / total * len(people))), len(free) // 2
        while len(chosen) < most:
            inside = {e.label for e in entries if set(e.people) <= set(chosen)}
            if len(chosen) >= wanted and inside == labels:
                break
            chosen.append(max(free, key=lambda p: sum(ties[p][c] for c in chosen)))
            free.remove(chosen[-1])
        side |= dict.fromkeys(chosen, split)
    return side


def _dealt(units: Sequence[Sequence[Entry]], shares: Mapping[str, float], rng: np.random.Generator) -> list[Entry]:
    """The entries of `units` with splits: large units first, each to the split that lacks most of its labels.

    Where a label has two units or more, val gets one of them.
    """
    counts = np.array([[sum(e.label == c for e in unit) for c in (0, 1)] for unit in units], float).reshape(-1, 2)
    names = list(shares)
    total = sum(shares.values())
    lacking = np.array([counts.sum(axis=0) * shares[name] / total for name in names])
    order = rng.permutation(len(units))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    side = np.zeros(len(units), int)
    scale = np.maximum(counts.sum(axis=0), 1)
    for unit in order:
        side[unit] = int(np.argmax(lacking @ (counts[unit] / scale)))
        lacking[side[unit]] -= counts[unit]
    if "val" in names:
        val = names.index("val")
        for label in (0, 1):
            holders = [u for u in order[::-1] if counts[u, label] and side[u] == names.index("train")]
            if len(holders) > 1 and not counts[side == val, label].any():
                side[holders[0]] = val
    return [replace(e, split=names[side[u]]) for u, unit in enumerate(units) for e in unit]
