"""Scoring: every picture gets its own score, whatever the batch, the order, the precision or the interruption."""

import json
import multiprocessing
import os
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from tiny import make_bundle, make_pictures

from solution.bundles import bundle as bundle_room
from solution.bundles.bundle import load_members
from solution.bundles.members import build_member, random_towers
from solution.config import MEMBERS, AdapterConfig, DegradationConfig, VoteConfig
from solution.data import views
from solution.data.faces import FaceLocator, make_view
from solution.data.images import Input, UnreadableInput, decode_image, find_inputs
from solution.data.manifest import Item
from solution.data.training import ValidationViews
from solution.errors import KitError, WeightsError
from solution.models import merging
from solution.models.calibration import Calibrator
from solution.presets import preset
from solution.scoring.ensemble import (
    DOUBT,
    EVERY_LOOK,
    Ensemble,
    ScoringError,
    load_ensemble,
    narrow_early,
    second_look_margins,
    vote_among,
)
from solution.scoring.journal import Journal, Scored, journal_path, stamp
from solution.scoring.judge import judge
from solution.scoring.stream import Plan, Reader, score_pictures, stream
from solution.scoring.vote import combine, levels


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), 21)


@pytest.fixture(scope="module")
def exact(bundle):
    return load_ensemble(bundle, "cpu", exact=True)


def scores(ensemble, items, **settings):
    return score_pictures(ensemble, items, progress=False, **settings)


def items_of(folder):
    return list(find_inputs(folder))


# ------------------------------------------------------------------------------------------------ the ensemble
def test_a_logit_is_the_members_own_on_the_view_cut_by_hand(bundle, exact, pictures):
    items, members = items_of(pictures)[:5], load_members(bundle)
    found = scores(exact, items)
    for name, member in members.items():
        config = member.config
        cut = [make_view(decode_image(item.path), config.view, None, config.face) for item in items]
        views = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).contiguous()
        with torch.no_grad():
            expected = member(views).logit
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("size", [1, 4, 21])
def test_exact_scores_do_not_depend_on_the_batch(exact, pictures, size):
    items = items_of(pictures)
    together = scores(exact, items, batch_size=16)
    for name, values in scores(exact, items, batch_size=size).items():
        # float32 sums over logits of up to twenty
        np.testing.assert_allclose(values, together[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_scores_follow_the_items_not_the_order(exact, pictures):
    items = items_of(pictures)
    straight = scores(exact, items)
    order = np.random.default_rng(0).permutation(len(items))
    shuffled = scores(exact, [items[i] for i in order], workers=2)
    for name, values in shuffled.items():
        np.testing.assert_allclose(values, straight[name][order], atol=1e-5)
    assert len(np.unique(np.round(straight["face"], 4))) == len(items)


def test_members_share_their_tower_and_views(exact):
    assert exact.members["global"].tower is exact.members["face"].tower
    assert exact.members["global"].tower is exact.members["qtfp"].tower
    assert exact.view_of["global"] == exact.view_of["fusion"] == exact.view_of["qtfp"]
    assert len(exact.views) == 3  # 56 px: large faces whole, every face cut; 64 px


def test_each_picture_is_decoded_and_searched_once(exact, pictures, monkeypatch):
    decoded, searched = [], []
    real = views.decode_image
    monkeypatch.setattr(views, "decode_image", lambda path: decoded.append(path) or real(path))
    monkeypatch.setattr(FaceLocator, "locate", lambda self, image: searched.append(1) or [])
    items = items_of(pictures)
    reader = Reader(exact.views)
    reader[[(n, Input(item.name, item.path, "image")) for n, item in enumerate(items)]]
    assert decoded == [item.path for item in items]
    assert len(searched) == len(items)


def test_fewer_members_are_chosen_openly(bundle):
    chosen = load_ensemble(bundle, "cpu", members=["face", "qtfp"])
    assert chosen.vote.weights == {"face": 2, "qtfp": 2}
    silent = VoteConfig({"face": 3, "qtfp": 0, "global": 0})
    assert vote_among(silent, ["qtfp", "global"]).weights == {
        "qtfp": 1,
        "global": 1,
    }
    with pytest.raises(WeightsError, match="nobody"):
        load_ensemble(bundle, "cpu", members=["nobody"])


# ------------------------------------------------------------------------------------------------ precision
def test_merging_changes_nothing_but_rounding(bundle, exact, pictures):
    members = load_members(bundle)
    assert merging.merge_adapters(members, torch.float32)
    merged = replace(exact, members=members)
    items = items_of(pictures)
    expected = scores(exact, items)
    for name, values in scores(merged, items).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-4)
    kinds = {type(b.q) for b in members["face"].tower.blocks()}
    assert kinds == {merging.MergedLinear}
    alone = load_members(bundle, ["face"])
    merging.merge_adapters(alone, torch.float32)
    assert {type(b.q) for b in alone["face"].tower.blocks()} == {torch.nn.Linear}
    found = scores(replace(exact, members=alone, configs={"face": exact.configs["face"]}), items)
    np.testing.assert_allclose(found["face"], expected["face"], rtol=1e-4, atol=1e-4)


def test_adapters_stay_unmerged_where_memory_is_short(bundle, monkeypatch):
    monkeypatch.setitem(merging.MERGED_BYTES, "cpu", 1000)
    ensemble = load_ensemble(bundle, "cpu", precision="bfloat16")
    assert not ensemble.merged
    assert hasattr(next(iter(ensemble.members["face"].tower.blocks())).q, "base_layer")


def test_a_large_tower_is_read_in_half_precision_and_scores_the_same(bundle, pictures, monkeypatch):
    monkeypatch.setitem(merging.MERGED_BYTES, "cpu", 1000)  # unmerged both times
    given = {"precision": "bfloat16", "second_look": False}
    late = load_ensemble(bundle, "cpu", **given)
    monkeypatch.setattr("solution.scoring.ensemble.LARGE_TOWER", 0)
    seen = []
    read = bundle_room.fill_tower

    def spy(config, state, **options):
        tower = read(config, state, **options)
        seen.append((tower.config.name, next(tower.blocks()).q.weight.dtype))
        return tower

    monkeypatch.setattr(bundle_room, "fill_tower", spy)
    early = load_ensemble(bundle, "cpu", **given)
    assert ("tiny-global", torch.bfloat16) in seen
    assert not load_ensemble(bundle, "cpu", precision="bfloat16").exact
    items = items_of(pictures)
    late.batch_size = late.limit = early.batch_size
    for name, values in scores(late, items).items():
        np.testing.assert_array_equal(scores(early, items)[name], values)


def test_towers_with_effort_and_on_a_gpu_are_read_in_float32():
    configs = [preset("giant", name) for name in ("global", "qtfp")]
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    half = {"dinov2-giant": torch.bfloat16}
    assert narrow_early(configs, cpu, "bfloat16") == half
    assert narrow_early(configs, cpu, "float32") == {}
    assert narrow_early(configs, gpu, "float16") == {}


def test_effort_is_merged_before_it_is_narrowed():
    torch.manual_seed(0)
    config = replace(preset("tiny", "qtfp"), adapter=AdapterConfig("effort", rank=2))
    member = build_member(config, random_towers([config])).eval()
    with torch.no_grad():
        for key, value in member.stored_state().items():
            if key.endswith(("effort_u", "effort_v")):
                value.add_(torch.randn_like(value) * 0.3)
    images = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        expected = member(images).logit
        merging.merge_adapters({"qtfp": member}, torch.float32)
        torch.testing.assert_close(member(images).logit, expected, atol=1e-5, rtol=1e-4)
        merging.narrow([member], torch.bfloat16)
        torch.testing.assert_close(member(images).logit, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_holds_the_blocks_and_nothing_else(bundle, precision):
    ensemble = load_ensemble(bundle, "cpu", precision=precision)
    for name, member in ensemble.members.items():
        block = next(iter(member.tower.blocks()))
        assert block.q(torch.zeros(1, 2, 32, dtype=ensemble.dtype)).dtype == ensemble.dtype
        assert block.norm1.weight.dtype == torch.float32
        own = {k: p.dtype for k, p in member.own_parameters().items()}
        assert set(own.values()) == {torch.float32}, name
    images = torch.zeros(1, 3, 56, 56, dtype=torch.uint8)
    tokens, _ = ensemble.members["global"].tower.embed(images)
    assert tokens.dtype == torch.float32  # the residual stream


def test_a_second_look_keeps_the_levels_of_float32(bundle, exact, pictures):
    items = items_of(pictures)

    def all_levels(ensemble):
        found = scores(ensemble, items)
        p = {n: ensemble.calibrators[n].apply(z) for n, z in found.items()}
        return np.stack([levels(p[name]) for name in MEMBERS])

    expected = all_levels(exact)
    fast = load_ensemble(bundle, "cpu", precision="bfloat16", second_look=False)
    looked = load_ensemble(bundle, "cpu", precision="bfloat16")
    changed = np.mean(all_levels(fast) != expected)
    left = np.mean(all_levels(looked) != expected)
    assert changed > 0.02  # random members are touchier than trained ones
    assert left == 0
    assert 0 < sum(looked.looks.values()) < expected.size


def test_members_share_one_margin_but_one_that_overflows_is_always_looked_at(bundle, monkeypatch):
    told = {"global": 0.03, "face": 0.0, "fusion": 0.04, "qtfp": float("inf"), "vlaforge": 0.0}
    monkeypatch.setattr("solution.scoring.ensemble._measure_noise", lambda _: told)
    margins = load_ensemble(bundle, "cpu", precision="bfloat16").margins
    assert margins.pop("qtfp") == EVERY_LOOK
    assert set(margins) == {"global", "face", "fusion", "vlaforge"}
    shared = DOUBT * 0.015  # the median of the finite ones
    assert margins == pytest.approx({"global": shared, "face": shared, "fusion": DOUBT * 0.02, "vlaforge": shared})


def test_no_margin_is_nothing_while_a_member_departs():
    """Where most probes say nothing, a member that does depart is still looked at again."""
    margins = second_look_margins({"global": 0.0, "face": 0.0, "fusion": 0.04})
    assert margins == pytest.approx({"global": 0, "face": 0, "fusion": DOUBT * 0.02})
    assert second_look_margins({"global": float("inf")}) == {"global": EVERY_LOOK}


def test_no_second_look_where_votes_have_no_levels(bundle):
    smooth = replace(bundle, vote=replace(bundle.vote, mean="probability"))
    ensemble = load_ensemble(smooth, "cpu", precision="bfloat16")
    assert not ensemble.exact and not ensemble.margins


def test_what_half_precision_cannot_hold_is_computed_again(bundle, exact, pictures):
    ensemble = load_ensemble(bundle, "cpu", precision="float16")
    items = items_of(pictures)[:4]
    expected = scores(exact, items)["face"]
    member = ensemble.members["face"]
    member.register_forward_hook(lambda m, given, out: replace(out, logit=out.logit * torch.inf))
    np.testing.assert_allclose(scores(ensemble, items)["face"], expected, atol=1e-5)
    ensemble.exact = {}
    with pytest.raises(ScoringError, match="face: 4 of 4 logits"):
        scores(ensemble, items)


def test_memory_that_runs_out_halves_the_batch(bundle, exact, pictures, monkeypatch):
    items = items_of(pictures)
    expected = scores(exact, items)
    short = replace(exact)
    sizes, real = [], Ensemble._forward

    def forward(self, views):
        sizes.append(len(views[0]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, views)

    monkeypatch.setattr(Ensemble, "_forward", forward)
    for name, values in scores(short, items).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5)
    assert sizes[:3] == [16, 8, 4] and max(sizes[3:]) == 4 and short.limit == 4


@pytest.mark.slow
def test_compiled_members_score_the_same(bundle, exact, pictures):
    compiled = load_ensemble(bundle, "cpu", exact=True)
    compiled.compile()
    items = items_of(pictures)  # 21: the last batch is filled up
    expected = scores(exact, items)
    for name, values in scores(compiled, items).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-3, err_msg=name)


# ------------------------------------------------------------------------------------------------ degraded pictures
def test_degraded_scores_depend_on_seed_and_name_alone(exact, pictures):
    items, engine = items_of(pictures)[:8], DegradationConfig(global_p=1.0)
    first = scores(exact, items, degradation=engine, seed=3)
    again = scores(exact, items[::-1], degradation=engine, seed=3, batch_size=3, workers=1)
    other = scores(exact, items, degradation=engine, seed=4)
    clean = scores(exact, items)
    for name, values in first.items():
        np.testing.assert_allclose(again[name][::-1], values, atol=1e-5)
        assert not np.allclose(other[name], values, atol=1e-3)
        assert not np.allclose(clean[name], values, atol=1e-3)


def test_degraded_pictures_are_those_that_validation_sees(exact, pictures):
    engine = DegradationConfig(global_p=1.0)
    items = [Item(i.name, i.path, 0) for i in items_of(pictures)[:3]]
    config = exact.configs["global"]
    seen = ValidationViews(items, config, engine, 5)
    reader = Reader(exact.views, degradation=engine, seed=5)
    inputs = list(enumerate(items_of(pictures)[:3]))
    prepared = reader[inputs].views[exact.view_of["global"]].numpy()
    np.testing.assert_array_equal(prepared, np.stack([seen[i] for i in range(3)]))


def test_an_unreadable_picture_is_named_and_never_scored(exact, tmp_path):
    make_pictures(tmp_path, 2)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for workers in (0, 1):
        with pytest.raises(UnreadableInput, match="bad.png"):
            scores(exact, items_of(tmp_path), workers=workers)


# ------------------------------------------------------------------------------------------------ batches
def mixed_listing(folder, pictures=11, videos=3):
    folder.mkdir()
    for index in range(pictures):
        (folder / f"{index:02d}.png").touch()
    for index in range(videos):
        (folder / f"{index:02d}-clip.mp4").touch()
    return find_inputs(folder)


def test_the_plan_covers_everything_once_and_videos_stand_alone(tmp_path):
    inputs = mixed_listing(tmp_path / "in")
    plan = Plan(inputs, 4)
    everything = np.ones(len(inputs), bool)
    batches = list(plan.pending(everything))
    assert [len(b) for b in batches] == [4, 4, 3, 1, 1, 1] and plan.videos == 3
    assert sorted(i for b in batches for i, _ in b) == list(range(len(inputs)))
    assert all(item == inputs[i] for b in batches for i, item in b)
    assert [item.kind for b in batches[3:] for _, item in b] == ["video"] * 3


def test_parts_are_whole_batches_of_the_one_plan(tmp_path):
    inputs = mixed_listing(tmp_path / "in")
    plan, everything = Plan(inputs, 4), np.ones(len(inputs), bool)
    whole = [[i for i, _ in b] for b in plan.pending(everything)]
    parts = [plan.part(i, 3) for i in range(3)]
    found = [[i for i, _ in b] for p in parts for b in p.pending(everything)]
    assert sorted(found) == sorted(whole)
    assert np.sum([p.share() for p in parts], axis=0).tolist() == [1] * len(inputs)
    ranks = [plan.part(1, 2).part(r, 2) for r in range(2)]
    np.testing.assert_array_equal(ranks[0].share() | ranks[1].share(), plan.part(1, 2).share())
    left = everything.copy()
    left[whole[0]] = False
    assert [[i for i, _ in b] for b in plan.pending(left)] == whole[1:]


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_shards_have_the_same_inputs_whatever_the_batch(tmp_path, count):
    inputs = mixed_listing(tmp_path / "in", pictures=50, videos=3)
    shards = [(i, count) for i in range(1, count + 1)]
    shares = [[Plan(inputs, size, shard).share() for shard in shards] for size in (1, 4, 16, 256)]
    assert all(np.array_equal(shares[0], other) for other in shares[1:])
    assert np.sum(shares[0], axis=0).tolist() == [1] * len(inputs)
    assert np.ptp([share.sum() for share in shares[0]]) <= 4
    # Batches of up to a block are those of the whole run, and a shard's ranks share it out.
    whole = [[i for i, _ in b] for b in Plan(inputs, 4).pending(np.ones(len(inputs), bool))]
    plans = [Plan(inputs, 4, shard) for shard in shards]
    if count <= 3:
        found = [[i for i, _ in b] for plan in plans for b in plan.pending(np.ones(len(inputs), bool))]
        assert sorted(found) == sorted(whole)
    ranks = [plans[0].part(r, 2).share() for r in range(2)]
    np.testing.assert_array_equal(ranks[0] | ranks[1], shares[0][0])
    assert not (ranks[0] & ranks[1]).any()


# ------------------------------------------------------------------------------------------------ journal
HEADER = {"weights": "abc", "batch": 4}


def rows_of(inputs, indices, value=1.0):
    return [
        Scored(
            i,
            inputs[i].name,
            *stamp(inputs[i].path),
            faces=[None],
            logits={"face": [value + i]},
        )
        for i in indices
    ]


@pytest.fixture
def listing(tmp_path):
    make_pictures(tmp_path / "in", 8)
    return find_inputs(tmp_path / "in")


def test_a_journal_gives_back_what_it_was_given(listing, tmp_path):
    out = tmp_path / "preds.csv"
    journal = Journal(out, listing, HEADER)
    journal.append(rows_of(listing, [4, 5, 6, 7], value=1 / 3))
    journal.append(rows_of(listing, [0, 1]))
    journal.close()
    taken = Journal(out, listing, HEADER)
    assert taken.done.tolist() == [True] * 2 + [False] * 2 + [True] * 4
    found = list(taken.rows([1, 4, 7]))
    assert [row.index for row in found] == [1, 4, 7]
    assert found[1].logits == {"face": [4 + 1 / 3]}


@pytest.mark.parametrize("cut", [1, 20, 120])
def test_a_torn_line_takes_its_batch_with_it_and_no_more(listing, tmp_path, cut):
    out = tmp_path / "preds.csv"
    journal = Journal(out, listing, HEADER)
    journal.append(rows_of(listing, [0, 1, 2, 3]))
    journal.append(rows_of(listing, [4, 5, 6, 7]))
    journal.close()
    path = journal_path(out)
    os.truncate(path, path.stat().st_size - cut)
    taken = Journal(out, listing, HEADER)
    assert taken.done.tolist() == [True] * 4 + [False] * 4
    taken.append(rows_of(listing, [4, 5, 6, 7]))
    taken.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 3
    assert Journal(out, listing, HEADER).done.all()


def test_only_what_changed_or_failed_is_done_again(listing, tmp_path):
    out = tmp_path / "preds.csv"
    journal = Journal(out, listing, HEADER)
    journal.append(rows_of(listing, range(7)))
    failed = Scored(7, listing[7].name, *stamp(listing[7].path), error="no picture")
    journal.append([failed])
    journal.close()
    listing[2].path.write_bytes(b"something else")
    os.utime(listing[3].path, ns=(1, 1))
    done = Journal(out, listing, HEADER).done
    assert np.flatnonzero(~done).tolist() == [2, 3, 7]


def test_a_file_replaced_by_one_of_the_same_size_and_mtime_is_done_again(listing, tmp_path):
    out = tmp_path / "preds.csv"
    with Journal(out, listing, HEADER) as journal:
        journal.append(rows_of(listing, range(8)))
    for index in (2, 3):
        path = listing[index].path
        before = path.stat()
        content = bytes(255 - b for b in path.read_bytes())
        if index == 3:  # moved over it
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").replace(path)
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert stamp(path)[:2] == (before.st_size, before.st_mtime_ns)
    with Journal(out, listing, HEADER) as journal:
        assert np.flatnonzero(~journal.done).tolist() == [2, 3]


@pytest.mark.parametrize("line", ["5", '["a"]', '[["a", 1]]', '{"a": 1}', "[null]", '"x"'])
def test_a_line_that_is_no_batch_counts_as_torn(listing, tmp_path, line):
    out = tmp_path / "preds.csv"
    with Journal(out, listing, HEADER) as journal:
        journal.append(rows_of(listing, range(4)))
    with journal_path(out).open("a") as file:
        file.write(f"{line}\n")
    with Journal(out, listing, HEADER) as journal:
        assert journal.done.tolist() == [True] * 4 + [False] * 4
        journal.append(rows_of(listing, range(4, 8)))
    with Journal(out, listing, HEADER) as journal:
        assert journal.done.all()


def test_rows_follow_their_names_when_the_listing_grows(listing, tmp_path):
    out = tmp_path / "preds.csv"
    journal = Journal(out, listing, HEADER)
    journal.append(rows_of(listing, range(8)))
    journal.close()
    make_pictures(tmp_path / "in" / "0-first", 1)
    grown = find_inputs(tmp_path / "in")
    taken = Journal(out, grown, HEADER)
    assert np.flatnonzero(~taken.done).tolist() == [0]
    rows = list(taken.rows(range(1, 9)))
    assert [row.name for row in rows] == [item.name for item in listing]
    assert [row.logits["face"][0] for row in rows] == [1.0 + i for i in range(8)]


def test_another_header_is_another_run(listing, tmp_path):
    out = tmp_path / "preds.csv"
    journal = Journal(out, listing, HEADER)
    journal.append(rows_of(listing, range(8)))
    journal.close()
    other = Journal(out, listing, {**HEADER, "weights": "def"})
    assert not other.done.any() and "weights" in other.discarded
    other.close()
    assert not Journal(out, listing, HEADER).done.any()


def test_a_journal_that_is_not_used_is_kept_each_time(listing, tmp_path):
    out = tmp_path / "preds.csv"
    for number, weights in enumerate(("abc", "def", "abc")):
        with Journal(out, listing, {"weights": weights}) as journal:
            kept = tmp_path / ("preds.journal.old.jsonl" if number == 1 else "preds.journal.old2.jsonl")
            assert journal.discarded.endswith(f"made with another weights; kept as {kept}" if number else "")
            assert not journal.done.any()
            journal.append(rows_of(listing, range(8)))
    # Put back, it is taken up.
    (tmp_path / "preds.journal.old2.jsonl").replace(journal_path(out))
    with Journal(out, listing, {"weights": "def"}) as journal:
        assert journal.done.all() and not journal.discarded


@pytest.mark.parametrize("restart", [False, True])
def test_journals_of_ranks_that_are_no_more_do_not_come_back(listing, tmp_path, restart):
    out = tmp_path / "preds.csv"
    for rank in range(3):
        with Journal(out, listing, HEADER, rank=rank, ranks=3) as journal:
            journal.append(rows_of(listing, range(rank, 8, 3)))
    with Journal(out, listing, HEADER if restart else {"weights": "def"}, ranks=2, restart=restart) as journal:
        assert not journal.done.any()
    # Rank 1's own is emptied by itself.
    assert journal_path(out, 1).exists() and not journal_path(out, 2).exists()
    assert (tmp_path / "preds.journal.2.old.jsonl").exists() == (not restart)
    if restart:
        Journal(out, listing, HEADER, rank=1, ranks=2, restart=True).close()
        assert not Journal(out, listing, HEADER).done.any()


def test_a_rank_with_other_options_is_named(listing, tmp_path):
    out = tmp_path / "preds.csv"
    with Journal(out, listing, HEADER, ranks=2) as first:
        Journal(out, listing, {**HEADER, "batch": 8}, rank=1, ranks=2).close()
        with pytest.raises(KitError, match=r"preds.journal.1.jsonl: made with another batch"):
            first.gather(2)


def test_one_run_at_a_time_writes_a_journal_and_its_children_do_not_hold_it(listing, tmp_path):
    out, context = tmp_path / "preds.csv", multiprocessing.get_context("fork")
    with Journal(out, listing, HEADER) as journal:
        journal.append(rows_of(listing, range(4)))
        with pytest.raises(KitError, match="preds.journal.jsonl: another run writes it; .* --out"):
            Journal(out, listing, HEADER, restart=True)
        end = context.Event()
        child = context.Process(target=end.wait)
        child.start()
    with Journal(out, listing, HEADER) as journal:
        assert journal.done.tolist() == [True] * 4 + [False] * 4
    end.set()
    child.join()


def test_ranks_write_apart_and_are_gathered(listing, tmp_path):
    out = tmp_path / "preds.csv"
    ranks = [Journal(out, listing, HEADER, rank=r) for r in range(2)]
    for rank, journal in enumerate(ranks):
        journal.append(rows_of(listing, range(rank, 8, 2), value=10.0 * rank))
        journal.close()
    ranks[0].gather(2)
    assert ranks[0].done.all()
    values = [row.logits["face"][0] for row in ranks[0].rows(range(8))]
    assert values == [10.0 * (i % 2) + i for i in range(8)]
    assert Journal(out, listing, HEADER).done.all()  # a later, single run
    assert not Journal(out, listing, HEADER, restart=True).done.any()


# ------------------------------------------------------------------------------------------------ verdicts
VOTE = VoteConfig({"face": 2, "global": 1})
CALIBRATORS = {"face": Calibrator("temperature", (2.0,)), "global": Calibrator()}


def test_a_verdict_is_calibrated_levelled_and_voted():
    rows = [
        Scored(
            0,
            "a.png",
            1,
            1,
            1,
            faces=[[1, 2, 3, 4, 0.9]],
            logits={"face": [2.0], "global": [-3.0]},
        ),
        Scored(1, "b.png", 1, 1, 1, error="gone"),
        Scored(2, "c.png", 1, 1, 1, faces=[None], logits={"face": [0.1], "global": [0.4]}),
    ]
    found = judge(rows, VOTE, CALIBRATORS)
    assert [row.image for row in found] == ["a.png", "b.png", "c.png"]
    p = 1 / (1 + np.exp(-np.array([1.0, -3.0])))
    assert found[0].p_fake == pytest.approx({"face": p[0], "global": p[1]})
    assert found[0].level == {"face": 0.7, "global": 0.0}
    assert found[0].score == pytest.approx((2 * 0.7 + 0.0) / 3)
    assert found[1].status == "failed" and found[1].score == 0.5
    assert found[1].error == "gone" and not found[1].p_fake
    assert found[2].face is None and found[2].level == {"face": 0.5, "global": 0.6}
    # The threshold is 0.5; in the last one nobody looked for faces, which says nothing of whether there are any.
    assert [row.verdict for row in found] == ["real", "failed", "fake"]
    nobody = judge([rows[2]._replace(found=0)], VOTE, CALIBRATORS)[0]
    assert nobody.verdict == "no_face" and nobody.score == found[2].score


def test_a_video_is_the_mean_of_its_frames_or_of_their_logits():
    row = Scored(
        0,
        "clip.mp4",
        1,
        1,
        1,
        frames=[3, 9],
        faces=[[0, 0, 1, 1, 0.9], None],
        logits={"face": [4.0, -8.0], "global": [1.0, 2.0]},
    )
    by_score = judge([row], VOTE, CALIBRATORS)
    assert [r.frame for r in by_score] == [None, 3, 9]
    assert by_score[0].score == pytest.approx((by_score[1].score + by_score[2].score) / 2)
    by_logit = judge([row], VOTE, CALIBRATORS, video_mean="logit")[0]
    sigmoid = 1 / (1 + np.exp([1.0, -1.5]))  # means -2 / 2 and 1.5
    p = {"face": np.array([sigmoid[0]]), "global": np.array([sigmoid[1]])}
    assert by_logit.score == pytest.approx(combine(p, VOTE)[0])
    assert by_logit.p_fake == pytest.approx({n: v[0] for n, v in p.items()})


def test_a_video_takes_one_track_and_frames_in_order(exact, tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for value in range(0, 200, 10):
        writer.write(np.full((64, 64, 3), value, np.uint8))
    writer.release()
    (item,) = find_inputs(tmp_path)
    reader = Reader(exact.views, frames=4)
    prepared = reader[[(0, item)]]
    assert list(prepared.rows[0].frames) == [2, 7, 12, 17]
    means = prepared.views[0].float().mean(dim=(1, 2, 3))
    assert (means.diff() > 20).all()
    (rows,) = stream(exact, [[(0, item)]], reader, workers=0)
    assert len(rows[0].logits["face"]) == 4
