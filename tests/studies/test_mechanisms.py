"""Interventions do what they say, a dead mechanism is called dead and a live one alive, claims are held to it."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from tiny import bundle_config, make_pictures

from solution.bundles.bundle import write_bundle
from solution.bundles.members import build_member, dump_tower, random_towers, save_member
from solution.config import VoteConfig
from solution.data.faces import FaceLocator
from solution.data.manifest import Item, read_manifest
from solution.errors import WeightsError
from solution.evaluation.conditions import degraded_conditions
from solution.evaluation.measure import CLEAN, EvaluationError
from solution.models.calibration import Calibrator
from solution.models.towers import tower_state
from solution.presets import preset
from solution.scoring.ensemble import load_ensemble
from solution.scoring.stream import score_pictures
from solution.studies import mechanism_tables, mechanisms, probes
from solution.studies.mechanism_tables import Draws, Scores
from solution.studies.probes import BUILT, Given, Pool

needs_detector = pytest.mark.skipif(not FaceLocator.available(), reason="the face detector's package is not installed")
DRAWS = Draws(0, 200)


def tiny(kind, *, name=None, seed=0, **fields):
    """A member of random weights, enlarged so that pictures differ, in eval mode."""
    config = replace(preset("tiny", kind), name=name or kind, kind=kind)
    for part, values in fields.items():
        config = replace(config, **{part: replace(getattr(config, part), **values)})
    torch.manual_seed(seed)
    member = build_member(config, random_towers([config])).eval()
    with torch.no_grad():
        for key, value in member.stored_state().items():
            if "lora" in key:
                value.normal_(std=0.3)
        for key, value in tower_state(member.tower).items():
            if key.startswith("blocks") and key.endswith("weight"):
                value.mul_(2)
            elif ".scale" in key:  # LayerScale starts at 1e-5 in CLIP's layout
                value.fill_(1)
    return member


def given(member, count=4, **more):
    side = member.config.view.side
    torch.manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8)
    images = images.repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)
    return Given(images, torch.arange(count).roll(1), **more)


@torch.inference_mode()
def probed(member, batch=None):
    return probes.probe(member, batch or given(member))


def largest_change(logits, mechanism):
    return (logits[mechanism] - logits[BUILT]).abs().max().item()


# ------------------------------------------------------------------------------------------------ vlaforge
def lively(**fields):
    """A vlaforge on whose score every part has a say."""
    fields.setdefault("vlaforge", {"copy_gain": 20.0})
    member = tiny("vlaforge", **fields)
    with torch.no_grad():
        member.decoder.bias_scale.fill_(8)
        member.local_head.weight.mul_(5)
        for layer in member.global_head.classify[::2]:
            layer.weight.mul_(3)
    return member


@pytest.fixture
def vlaforge():
    return lively()


@torch.inference_mode()
def test_vlaforge_interventions_are_what_its_forward_gives_when_a_part_is_replaced(vlaforge, monkeypatch):
    batch = given(vlaforge)
    other, logits = batch.other, probed(vlaforge, batch).logits
    assert torch.allclose(logits[BUILT], vlaforge(batch.images).logit, atol=1e-6)
    perceive, read, say = vlaforge.perceive, vlaforge.read, vlaforge.sentences

    def with_perceived(change):
        def replaced(images, seen):
            perceived, maps, bias = perceive(images, seen)
            return perceived, *change(maps, bias)

        return {"perceive": replaced}

    ways = {
        "bias zeroed": with_perceived(lambda maps, bias: (maps, bias * 0)),
        "bias of another picture": with_perceived(lambda m, bias: (m, bias[other])),
        "maps of another picture": with_perceived(lambda m, bias: (m[other], bias)),
        "perceiver without pixels": {"perceive": lambda images, seen: perceive(images * 0 + 0.5, seen)},
        "identity zeroed": {"sentences": lambda classes: say(classes * 0)},
        "identity of another picture": {"sentences": lambda c: say(c[other])},
        "prompts swapped": {"sentences": lambda classes: say(classes).flip(1)},
        "VLA map of another picture": {"read": lambda seen: (read(seen)[0], read(seen)[1][other])},
    }
    for mechanism, parts in ways.items():
        with monkeypatch.context() as patch:
            for name, part in parts.items():
                patch.setattr(vlaforge, name, part)
            expected = vlaforge(batch.images).logit
        assert torch.allclose(logits[mechanism], expected, atol=1e-5), mechanism
    for mechanism in (*ways, "bias permuted over patches"):
        assert largest_change(logits, mechanism) > 1e-3, mechanism
    for name, alpha in (("local score alone", 0.0), ("alpha 0.75", 0.75)):
        settings = replace(vlaforge.config.vlaforge, alpha=alpha)
        with monkeypatch.context() as patch:
            built = replace(vlaforge.config, vlaforge=settings)
            patch.setattr(vlaforge, "config", built)
            expected = vlaforge(batch.images).logit
        assert torch.allclose(logits[name], expected, atol=1e-5)
    assert "alpha 0.5" not in logits  # as built


def test_what_a_dead_vlaforge_is_given_changes_nothing(vlaforge):
    with torch.no_grad():
        vlaforge.local_head.weight.zero_()
        vlaforge.decoder.bias_scale.zero_()
    logits, told = probed(vlaforge)
    told = {name: values.double().numpy() for name, values in told.items()}
    means = probes.scores_at_mean(0.5, told)
    assert np.ptp(told["local score"]) == 0
    for mechanism in logits:
        if mechanism.startswith(("bias", "identity", "prompts", "VLA", "maps")):
            assert largest_change(logits, mechanism) < 1e-6, mechanism
    built = logits[BUILT].double().numpy()
    assert np.allclose(means["local score at its mean"], built, atol=1e-5)
    assert np.ptp(means["global score at its mean"]) == 0
    # A mixture with a constant is another scale, and the same order.
    order = np.argsort(built)
    assert (np.argsort(logits["alpha 0.25"].numpy()) == order).all()


def test_the_patch_adapter_can_be_left_out():
    member = tiny("vlaforge", vlaforge={"adapter": True, "adapter_share": 5.0})
    logits = probed(member).logits
    assert largest_change(logits, "patch adapter off") > 1e-4
    assert member.adapter_of_patches.share == 5.0


# ------------------------------------------------------------------------------------------------ qtfp
@torch.inference_mode()
def test_qtfp_interventions_are_its_own_forward_with_these_options():
    member = tiny("qtfp")
    with torch.no_grad():
        member.pool.log_scale.fill_(2)
    batch = given(member)
    logits, told = probed(member, batch)
    output = member(batch.images)
    patches = output.query_attention.shape[-1]
    ways = {
        "uniform attention": torch.full((1, 1, patches), 1 / patches),
        "CLS attention": member.cls_attention(output, batch.images)[:, None],
        "attention of another picture": output.query_attention[batch.other],
    }
    for mechanism, attention in ways.items():
        expected = member(batch.images, attention=attention).logit
        assert torch.allclose(logits[mechanism], expected, atol=1e-6)
        assert largest_change(logits, mechanism) > 1e-5
    for k in range(member.config.qtfp.queries):
        keep = torch.arange(member.config.qtfp.queries) != k
        expected = member(batch.images, keep=keep).logit
        assert torch.allclose(logits[f"query {k + 1} dropped"], expected, atol=1e-6)
    assert (told["entropy"] < 0.99).all() and (told["correlation"] < 0.9).all()


def test_equal_queries_without_a_temperature_are_dead():
    settings = {"key_width": 0, "heads": 1, "readout": "mean"}
    member = tiny("qtfp", qtfp=settings)
    with torch.no_grad():
        member.pool.queries.zero_()
    logits, told = probed(member)
    assert torch.allclose(told["entropy"], torch.ones(4))
    for mechanism in logits:
        if mechanism.startswith(("uniform", "query", "attention of")):
            assert largest_change(logits, mechanism) < 1e-6, mechanism


def test_a_member_that_classifies_cls_has_no_queries_to_intervene_on():
    assert set(probed(tiny("qtfp", qtfp={"pool": "cls"})).logits) == {BUILT}


def test_patches_inside_a_fake_are_ranked_by_hand():
    masks = torch.zeros(3, 4, 4)
    masks[0, :2, :2], masks[1] = 1, 1  # one patch of four; all; none
    forged = probes.forged_patches(masks, torch.empty(3, 2, 2))
    assert forged.tolist() == [[True, False, False, False], [True] * 4, [False] * 4]
    scores = torch.tensor([[0.5, 0.1, 0.5, 0.9]]).expand(3, -1)
    found = probes.auc_inside(scores, forged)
    assert found[0] == pytest.approx(0.5) and found[1:].isnan().all()


# ------------------------------------------------------------------------------------------------ streams
@torch.inference_mode()
def test_an_adapter_is_switched_off_and_on_again():
    member = tiny("fusion", adapter={"kind": "lora"}, stream={"spread": False})
    batch = given(member)
    before = member(batch.images).logit
    logits = probed(member, batch).logits
    assert torch.equal(member(batch.images).logit, before)
    plain = member.tower(batch.images, adapter=None).cls_token
    pooled = torch.cat([plain, member.clip(batch.images).cls_token], dim=1)
    expected = probes.two_class_logit(member.head(pooled))
    assert torch.allclose(logits["adapter off"], expected, atol=1e-6)
    assert largest_change(logits, "adapter off") > 1e-3


def test_a_half_that_the_head_ignores_is_dead():
    member = tiny("fusion")
    cut = member.pooled_width
    with torch.no_grad():
        member.head[0].weight[:, cut:] = 0
        member.head[0].weight[:, :cut].mul_(10)
    logits, told = probed(member)
    found = probes.parts_at_mean(member, told["pooled"].double().numpy())
    built = logits[BUILT].numpy()
    assert np.allclose(found["second half at its mean"], built, atol=1e-6)
    assert np.abs(found["first half at its mean"] - built).max() > 1e-3


def test_a_spread_that_the_head_ignores_is_dead():
    member = tiny("face")
    width = member.tower.width
    with torch.no_grad():
        member.head.weight[:, width:] = 0
    logits, told = probed(member)
    (name, found), *others = probes.parts_at_mean(member, told["pooled"].double().numpy()).items()
    assert name == "spread at its mean" and not others
    assert np.allclose(found, logits[BUILT].numpy(), atol=1e-6)
    with torch.no_grad():
        member.head.weight[:, width:].normal_()
    logits, told = probed(member)
    found = probes.parts_at_mean(member, told["pooled"].double().numpy())[name]
    assert np.abs(found - logits[BUILT].numpy()).max() > 1e-3


def test_only_pictures_that_were_cut_are_looked_at_uncut():
    member = tiny("face")
    batch = given(member)
    whole = batch.images.clone()
    whole[2] = 255 - whole[2]
    logits = probed(member, batch._replace(whole=whole)).logits
    changed = logits["whole picture"] != logits[BUILT]
    assert changed.tolist() == [False, False, True, False]


def test_halves_that_are_one_are_told_from_halves_that_are_two():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 40)) * 0.8 ** np.arange(40)
    turned = x @ np.linalg.qr(rng.normal(size=(40, 40)))[0] + 3
    foreign = rng.normal(size=(100, 30))
    assert mechanism_tables.predictability(x, turned) > 0.99
    assert mechanism_tables.predictability(x, foreign) < 0.1
    labels = np.arange(100) % 2
    for second, word in ((turned, "same features"), (foreign, "different")):
        told = {"pooled": np.concatenate([x, second], axis=1)}
        found = {q.name: q for q in mechanism_tables.quantities(labels, told, 40)}
        assert ("cosine of the halves" in found) == (second is turned)
        for name in ("second half from the first", "first half from the second"):
            # Independent of x, yet of higher rank: neither tells of the other.
            assert found[name].judge([{"mean": float(found[name].values)}]) == word


# ------------------------------------------------------------------------------------------------ words
def as_scores(logits):
    p = 1 / (1 + np.exp(-logits))
    return Scores(logits, p, p)


def test_words_by_what_a_mechanism_does():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    noise = rng.normal(size=200)
    signal = labels * 2.0 + rng.normal(size=200)
    told = {
        "acts and helps": (signal, noise),
        "acts": (noise, noise + 0.3),
        "dead": (signal, signal + 1e-3 * noise),
    }
    for word, (before, after) in told.items():
        before, after = as_scores(before), as_scores(after)
        found = mechanism_tables.compare(labels, before, after, DRAWS)
        assert mechanism_tables.word_of({"clean": found}) == word
        assert found["n_real"] == found["n_fake"] == 100
        assert found["auc"]["low"] <= found["auc"]["mean"] <= found["auc"]["high"]
    # Harm is no help, and one class has no AUC.
    harm = mechanism_tables.compare(labels, as_scores(noise), as_scores(signal), DRAWS)
    assert mechanism_tables.word_of({"clean": harm}) == "acts"
    alone = mechanism_tables.compare(labels * 0, as_scores(noise), as_scores(signal), DRAWS)
    assert alone["auc"] is None and mechanism_tables.word_of({"clean": alone}) == "acts"
    dead = mechanism_tables.compare(labels, as_scores(noise), as_scores(noise), DRAWS)
    helps = mechanism_tables.compare(labels, as_scores(signal), as_scores(noise), DRAWS)
    both = {"clean": dead, "degraded": helps}
    assert mechanism_tables.word_of(both) == "acts and helps"


def test_another_mixture_keeps_the_values_of_the_built_one():
    p = np.array([0.9, 0.1, 0.4])
    assert np.allclose(mechanism_tables.in_order(p, np.array([3.0, -7.0, 0.0])), p)
    assert np.allclose(mechanism_tables.in_order(p, np.zeros(3)), 0.4)


def test_words_of_measurements():
    told = {"correlation": np.zeros(2), "entropy": np.zeros(2), "inside: w": np.zeros(2)}
    found = {q.name: q for q in mechanism_tables.quantities(np.arange(2), told, 0)}

    def word(quantity, **numbers):
        return found[quantity].judge([numbers])

    assert word("correlation between queries, fakes", mean=0.95) == "alike"
    assert word("correlation between queries, fakes", mean=0.3) == "differ"
    assert word("w inside a fake", mean=0.6, low=0.52) == "finds"
    assert word("w inside a fake", mean=0.6, low=0.49) == "blind"
    assert word("w inside a fake, less its real twin", mean=0.1, low=0.02) == "finds"
    assert word("w inside a fake, less its real twin", mean=0.1, low=-0.02) == "blind"
    assert word("entropy of attention / ln P", mean=1.0) == ""


def test_claims_are_judged_where_a_mechanism_does_best():
    words = [("a", "x", "dead"), ("a", "x", "acts"), ("a", "y", "dead")]
    words += [("b", "z", "acts"), ("b", "z", "acts and helps")]
    rows = [dict(zip(("member", "mechanism", "word"), w)) for w in words]
    found = mechanism_tables.judge_claims(["a/x", "a/y", "b/z", "b/none"], rows)
    assert list(found.values()) == ["acts", "dead", "acts and helps", "not measured"]


# ------------------------------------------------------------------------------------------------ pictures
def test_no_picture_is_given_its_own_or_left_alone():
    names = ["a", "a", "b", "c", "c"]
    for seed in range(20):
        other = probes.others(names, np.random.default_rng(seed))
        assert all(names[j] != names[i] for i, j in enumerate(other))
    items = tuple(Item(str(i), None, 0) for i in range(9))
    sizes = [len(c) for c in Pool("val", items).chunks(4)]
    assert sizes == [4, 5]
    assert [len(c) for c in Pool("val", items, blended=True).chunks(4)] == [2, 2, 2, 3]
    with pytest.raises(EvaluationError, match="1 pictures"):
        Pool("val", items[:1])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Five real pictures and five with a bright square, split `val`."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures"), 10)
    rows = ["path,label,source,split"]
    for index in range(10):
        name = f"{index:05d}.png"
        if index % 2:
            picture = cv2.imread(str(folder / name))
            picture[20:40, 20:40] = 250
            cv2.imwrite(str(folder / name), picture)
        rows.append(f"{name},{index % 2},s,val")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder / "manifest.csv"


@needs_detector
def test_a_blended_picture_stands_beside_its_real_twin(manifest):
    items, _ = read_manifest(manifest, split="val")
    eyes = probes.Eyes({"vlaforge": preset("tiny", "vlaforge")})
    for how in (CLEAN, *degraded_conditions([3])):
        (alone,) = eyes.plain(items[0], how)
        real, fake = eyes.blended(items[0], how, seed=0)
        assert (real.label, fake.label) == (0, 1)
        assert np.array_equal(real.views[0], alone.views[0])
        assert not np.array_equal(real.views[0], fake.views[0])
        assert real.masks[0] is fake.masks[0] and fake.masks[0].max() > 0.5
        assert fake.masks[0].shape == fake.views[0].shape[:2]


# ------------------------------------------------------------------------------------------------ the command
@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Members whose names say nothing of their kinds; vlaforge's local branch is dead."""
    folder = tmp_path_factory.mktemp("weights") / "bundle"
    kinds = {"first": "global", "crops": "face", "two": "fusion"}
    kinds |= {"asks": "qtfp", "reads": "vlaforge"}
    for name, kind in kinds.items():
        if kind == "vlaforge":
            member = lively(name=name)
            torch.nn.init.zeros_(member.local_head.weight)
        else:
            member = tiny(kind, name=name)
        save_member(member, folder / name)
    for name in ("semantic", "face", "global"):  # which no member of the bundle writes
        (tower,) = random_towers([bundle_config(name) if name == "semantic" else preset("tiny", name)]).values()
        dump_tower(tower, folder / "towers" / f"tiny-{name}.safetensors")
    calibrators = {"reads": Calibrator("platt", (4.0, 0.0))}
    vote = VoteConfig({name: 1 for name in ("first", "crops", "reads")} | {"two": 0})
    vote = replace(vote, weights=vote.weights | {"asks": 0}, mean="probability")
    return write_bundle(folder, list(kinds), vote, calibrators)


@needs_detector
def test_members_are_measured_as_they_are_scored(bundle, manifest):
    items, _ = read_manifest(manifest, split="val")
    ensemble = load_ensemble(bundle, "cpu", exact=True)
    eyes = probes.Eyes(bundle.configs)
    for how in (CLEAN, *degraded_conditions([3])):
        found = probes.measure_pool(ensemble.members, eyes, Pool("val", tuple(items)), how, seed=0, batch=4)
        expected = score_pictures(ensemble, items, degradation=how.degradation, seed=how.seed, progress=False)
        assert found.labels.tolist() == [item.label for item in items]
        for name, logits in expected.items():
            assert np.allclose(found.logits[name][BUILT], logits, atol=1e-4)


@needs_detector
def test_the_command_calls_the_dead_dead_and_holds_claims_to_it(bundle, manifest, tmp_path, capsys, monkeypatch):
    call = ["--weights", str(bundle.folder), "--data", str(manifest), "--quiet"]
    call += ["--out", str(tmp_path / "out"), "--draws", "50", "--device", "cpu"]
    claims = bundle.folder / "claims.json"
    claims.write_text('["reads/bias zeroed"]')
    assert mechanisms.main(call) == 0
    results = json.loads((tmp_path / "out" / "mechanisms.json").read_text())
    assert results["claimed"] == ["reads/bias zeroed"]
    assert results["claims"]["reads/bias zeroed"].startswith("acts")
    assert list(results["pools"]) == ["val", "val, self-blended"]
    pool = results["pools"]["val"]
    words = {f"{r['member']}/{r['mechanism']}": r["word"] for r in pool["interventions"]}
    assert words["reads/local score at its mean"] == "dead"
    assert words["reads/VLA map of another picture"] == "dead"
    for name in ("ensemble/without first", "two/first half at its mean"):
        assert name in words
    assert "ensemble/without two" not in words and "crops/whole picture" in words
    blended = results["pools"]["val, self-blended"]["measurements"]
    measured = {f"{r['member']}/{r['mechanism']}" for r in blended}
    for name in ("asks/w", "asks/query attention", "reads/VLA map"):
        assert f"{name} inside a fake, less its real twin" in measured
    matrix = pool["rank_correlations"][0]["rank_correlation"]
    assert matrix[0][0] == pytest.approx(1) and len(matrix) == 5
    text = (tmp_path / "out" / "mechanisms.md").read_text()
    assert text in capsys.readouterr().out
    assert "| reads | local score at its mean | dead |" in text
    for name in ("mechanisms.png", "mechanisms-val-self-blended.png"):
        assert cv2.imread(str(tmp_path / "out" / name)).shape[0] > 300

    monkeypatch.setattr(mechanism_tables, "draw", lambda *_: None)
    claims.write_text('["reads/maps of another picture", "asks/telepathy"]')
    assert mechanisms.main([*call, "--limit", "4"]) == 4
    error = capsys.readouterr().err
    assert "reads/maps of another picture (dead)" in error
    assert "asks/telepathy (not measured)" in error
    claims.unlink()


def test_wrong_calls_end_in_a_line(bundle, manifest, tmp_path, capsys):
    call = ["--data", str(manifest), "--out", str(tmp_path), "--quiet"]
    weights = ["--weights", str(bundle.folder)]
    assert mechanisms.main([*call, *weights, "--split", "val,test"]) == 2
    assert mechanisms.main([*call, "--weights", str(tmp_path / "nowhere")]) == 3
    for split, batch in (("val", "1"), ("val", "x")):
        with pytest.raises(SystemExit) as stop:
            mechanisms.main([*call, *weights, "--batch-size", batch, "--split", split])
        assert stop.value.code == 2
    claims = bundle.folder / "claims.json"
    for text, reason in (
        ("{", "no JSON"),
        ('{"a": 1}', "expected a list"),
        ('["nobody/bias zeroed"]', "names no member"),
    ):
        claims.write_text(text)
        assert mechanisms.main([*call, *weights]) == 3
        assert reason in capsys.readouterr().err
        with pytest.raises(WeightsError, match=reason):
            mechanism_tables.read_claims(bundle)
    claims.unlink()
