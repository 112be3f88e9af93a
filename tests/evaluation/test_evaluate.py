"""Evaluation end to end with a scorer of known quality: numbers, protocol, resuming, report, and fitting a bundle."""

import contextlib
import csv
import dataclasses
import json
import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from solution import evaluate
from solution.config import MEMBERS, OPS, DegradationConfig, VoteConfig
from solution.data.manifest import Item
from solution.evaluation import fit, kept, measure, metrics, report
from solution.evaluation.conditions import degraded_conditions, limit_frames, limit_items, sweep_conditions
from solution.evaluation.measure import CLEAN
from solution.models.calibration import Calibrator, sigmoid
from solution.presets import NTIRE26_VOTE
from solution.scoring.vote import combine

PROTOCOL = {"title": "a test", "manifest": "none"}


def seeded(*parts):
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in parts])


class Scorer:
    """Logits that know the label, the less the stronger the degradation; counts the pictures it is asked for."""

    def __init__(self, members=MEMBERS[:3], fail_after=None):
        self.members, self.fail_after, self.asked = members, fail_after, 0

    def __call__(self, items, *, degradation, seed, progress):
        if self.fail_after is not None and self.asked >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += len(items)
        strength = 0.0
        if degradation is not None:
            strength = 0.5 if degradation.strength is None else degradation.strength
        logits = {}
        for number, member in enumerate(self.members):
            noise = 1.2 + 0.3 * number + 2 * strength
            drawn = [seeded(i.name, member).normal() + strength * seeded(i.name, member, seed).normal() for i in items]
            signs = np.array([2 * i.label - 1 for i in items])
            logits[member] = 2.0 * (signs + noise * np.array(drawn)) + 1.0
        return logits


def items(n=120, folder=Path("nowhere"), videos=False):
    """n pictures of two mixed sources and, last, ten fakes of a source that has no reals."""
    found = []
    for k in range(n):
        source = "one" if k % 3 else "two"
        label = k % 2
        if k >= n - 10:
            source, label = "fakes", 1
        name = f"{source}/{k}.png"
        video = f"clip{k // 4 % 3}" if videos and source != "fakes" else ""
        found.append(Item(name, folder / name, label, source=source, video=video))
    return found


def bundle(members=MEMBERS[:3], **vote):
    calibrators = {m: Calibrator("platt", (0.4, -0.4), fitted_on="a drawing", n_real=5, n_fake=6) for m in members}
    vote = VoteConfig(dict.fromkeys(members, 1), **vote)
    made = SimpleNamespace(vote=vote, calibrators=calibrators, hash="ab" * 32, precision="float32")
    made.fingerprint = lambda: {"weights": made.hash, "precision": made.precision}
    return made


def evaluated(out, *, drawn=False, **changes):
    """`evaluate.run` with the scorer and bundle above; figures only where a test looks at them."""
    settings = {
        "scorer": Scorer(),
        "ensemble": bundle(),
        "out": out,
        "conditions": [CLEAN, *degraded_conditions([1, 2])],
        "protocol": PROTOCOL,
    }
    options = {"draws": 50, "progress": False}
    options |= {name: changes.pop(name) for name in [*changes] if hasattr(evaluate.Options, name)}
    given = changes.pop("items", None) or items()
    with contextlib.ExitStack() as stack:
        if not drawn:
            stack.enter_context(mock.patch.object(report, "write_report"))
        return evaluate.run(given, options=evaluate.Options(**options), **{**settings, **changes})


def row_of(results, **wanted):
    found = [row for row in [*results["rows"], *results["single_class"]] if all(row[k] == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, found)
    return found[0]


# ------------------------------------------------------------------------------------------------ numbers
def test_numbers_are_those_of_the_scores(tmp_path):
    results = evaluated(tmp_path)
    given, scorer = items(), Scorer()
    labels = np.array([i.label for i in given])
    logits = scorer(given, degradation=None, seed=0, progress=False)
    for member in MEMBERS[:3]:
        row = row_of(results, who=member, condition="clean", scope="all")
        p = sigmoid(0.4 * logits[member] - 0.4)
        assert row["auc"] == metrics.auc(labels, logits[member])
        assert row["ece"] == pytest.approx(metrics.ece(labels, p), abs=1e-12)
        assert (row["threshold"], row["n"]) == (0.5, 120)
    votes = np.mean([np.rint(10 * sigmoid(0.4 * x - 0.4)) for x in logits.values()], 0)
    row = row_of(results, who="ensemble", condition="clean", scope="all")
    assert row["auc"] == pytest.approx(metrics.auc(labels, np.round(votes, 9)), abs=1e-12)

    config = DegradationConfig(global_p=1.0)
    degraded = [scorer(given, degradation=config, seed=s, progress=False)["face"] for s in (1, 2)]
    row = row_of(results, who="face", condition="degraded", scope="all")
    expected = np.mean([metrics.auc(labels, x) for x in degraded])
    assert row["auc"] == pytest.approx(expected, abs=1e-12)
    assert row["auc_low"] < expected < row["auc_high"]


def test_sources_pools_and_a_source_of_one_class(tmp_path):
    results = evaluated(tmp_path, pools={"mixed": ["two", "fakes"]})
    scopes = {row["scope"] for row in results["rows"]}
    assert scopes == {"all", "one", "two", "mixed"}
    only = row_of(results, who="face", condition="clean", scope="fakes")
    assert (only["n"], only["label"]) == (10, "fake") and 0 <= only["accuracy"] <= 1
    assert "all fake" in only["protocol"]
    pooled = row_of(results, who="face", condition="clean", scope="mixed")
    two = row_of(results, who="face", condition="clean", scope="two")
    assert pooled["n"] == two["n"] + 10 and pooled["n_real"] == two["n_real"]
    with pytest.raises(evaluate.EvaluationError, match="no picture of source three"):
        evaluated(tmp_path, pools={"p": ["three"]})


def test_videos_are_source_label_and_name(tmp_path):
    results = evaluated(tmp_path, items=items(videos=True))
    row = row_of(results, who="face", condition="clean", scope="all", unit="video")
    # Three clip names in two sources with both labels: far more videos than three.
    keys = {(i.source, i.label, i.video) for i in items(videos=True) if i.video}
    reals = sum(label == 0 for _, label, _ in keys)
    assert len(keys) > 6 and (row["n"], row["n_real"]) == (len(keys), reals)
    told = rf"{len(keys)} videos \({reals} real, \d+ fake\), \d+ to \d+ frames"
    assert re.search(told, row["protocol"])


def test_every_number_has_its_protocol(tmp_path):
    results = evaluated(tmp_path, conditions=[CLEAN, *sweep()])
    assert results["robustness"] and results["rows"]
    for row in results["rows"] + results["single_class"] + results["robustness"]:
        assert f"{row['n']} pictures" in row["protocol"]
        assert "bundle abababababab" in row["protocol"]
    mixed = [r for r in results["robustness"] if r["family"] == "jpeg_quality"]
    assert "JPEG at quality 5, seed 7" in mixed[-1]["protocol"]
    for fact in ("bundle", "pictures", "vote", "calibrators", "threshold"):
        assert results["protocol"][fact]


def test_comparisons_name_both_methods_and_agree(tmp_path):
    results = evaluated(tmp_path)
    labels = np.array([i.label for i in items()])
    for test in results["comparisons"]:
        assert test["a"] == "ensemble" and test["low"] <= test["difference"] <= test["high"]
        if test["condition"] == "clean":
            row = row_of(results, who=test["b"], condition="clean", scope="all")
            assert test["auc_b"] == row["auc"] and test["n"] == len(labels)
    methods = {(t["condition"], t["b"], t["method"]) for t in results["comparisons"]}
    assert len(methods) == 2 * 3 * 2


# ------------------------------------------------------------------------------------------------ robustness
def sweep():
    """The sweep's first and last levels of the mix, one op, JPEG and noise."""
    wanted = {"mix", "blur", "jpeg_quality", "noise_sigma"}
    found = [c for c in sweep_conditions(7) if c.family in wanted]
    ends = []
    for family in wanted:
        of_family = [c for c in found if c.family == family]
        ends += [of_family[0], of_family[-1]]
    return sorted(ends, key=found.index)


def test_the_sweep_has_every_op_the_mix_jpeg_and_noise():
    conditions = sweep_conditions(7)
    by_family = {}
    for condition in conditions:
        by_family.setdefault(condition.family, []).append(condition)
    assert list(by_family) == ["mix", *OPS, "jpeg_quality", "noise_sigma"]
    for op in OPS:
        configs = [c.degradation for c in by_family[op]]
        assert [c.strength for c in configs] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        assert all((c.ops, c.op_p, c.cycle_p, c.global_p) == ((op,), 1, 0, 1) for c in configs)
    mix = by_family["mix"][-1].degradation
    assert (mix.ops, mix.op_p, mix.strength) == (OPS, 0.3, 1.0)
    jpeg = [c.degradation.jpeg_quality for c in by_family["jpeg_quality"]]
    assert jpeg[0] == (100, 100) and jpeg[-1] == (5, 5)
    assert [c.degradation.noise_sigma for c in by_family["noise_sigma"]][-1] == 60.0
    assert len({c.name for c in conditions}) == len(conditions)


def test_the_sweep_reaches_the_pixels():
    """The engine does what a condition says: quality 5 is worse than 100, sigma 60 has a deviation of 60."""
    from solution.data.degradation import degrade

    conditions = {c.name: c.degradation for c in sweep_conditions(7)}
    ramp = np.linspace(0, 255, 64)
    picture = np.stack([np.add.outer(ramp, ramp) / 2] * 3, axis=2).astype(np.uint8)

    def change(name, image):
        degraded = degrade(image, conditions[name], np.random.default_rng(1))
        return np.abs(degraded.astype(float) - image).mean()

    assert change("jpeg_quality 5", picture) > 2 * change("jpeg_quality 100", picture)
    grey = np.full((128, 128, 3), 127, dtype=np.uint8)
    # Mean absolute deviation of a Gaussian: sigma * sqrt(2 / pi).
    for sigma in (10, 30):
        expected = sigma * np.sqrt(2 / np.pi)
        assert change(f"noise_sigma {sigma}", grey) == pytest.approx(expected, rel=0.05)
    assert change("noise_sigma 0", grey) == 0


def test_change_and_flips_are_against_the_clean_picture(tmp_path):
    results = evaluated(tmp_path, conditions=[CLEAN, *sweep()])
    rows = {(r["family"], r["level"], r["who"]): r for r in results["robustness"]}
    same = rows["clean", 0.0, "face"]
    assert (same["score_change"], same["flips"]) == (0, 0)
    for who in ("face", "ensemble"):
        weak, strong = rows["blur", 0.0, who], rows["blur", 1.0, who]
        assert strong["auc"] < weak["auc"] and strong["flips"] > weak["flips"]
        assert strong["score_change"] > 0.05
    given, scorer = items(), Scorer()
    clean = scorer(given, degradation=None, seed=0, progress=False)["face"]
    config = next(c for c in sweep() if c.name == "blur 1.0").degradation
    blurred = scorer(given, degradation=config, seed=7, progress=False)["face"]
    p, q = (sigmoid(0.4 * x - 0.4) for x in (clean, blurred))
    found = rows["blur", 1.0, "face"]
    assert found["flips"] == np.mean((p >= 0.5) != (q >= 0.5))
    assert found["score_change"] == pytest.approx(np.mean(np.abs(p - q)), abs=1e-12)


# ------------------------------------------------------------------------------------------------ resuming
def test_a_sweep_resumes_and_never_scores_twice(tmp_path):
    conditions = [CLEAN, *sweep()]
    broken = Scorer(fail_after=3 * 120)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path, scorer=broken, conditions=conditions)
    assert len(list((tmp_path / "scores").glob("*.npz"))) == 3
    rest = Scorer()
    resumed = evaluated(tmp_path, scorer=rest, conditions=conditions)
    assert rest.asked == (len(conditions) - 3) * 120
    idle = Scorer(fail_after=0)
    again = evaluated(tmp_path, scorer=idle, conditions=conditions)
    assert idle.asked == 0
    whole = evaluated(tmp_path / "whole", conditions=conditions)
    assert json.dumps(resumed) == json.dumps(again) == json.dumps(whole)


def test_other_weights_pictures_or_seeds_score_anew(tmp_path):
    evaluated(tmp_path, conditions=[CLEAN])
    other = bundle()
    other.hash = "cd" * 32
    rougher = bundle()
    rougher.precision = "bfloat16"
    changes = [
        {"ensemble": other},
        {"ensemble": rougher},
        {"items": items(110)},
        {"conditions": degraded_conditions([1])},
        {"conditions": degraded_conditions([2])},
    ]
    for change in changes:
        scorer = Scorer()
        evaluated(tmp_path, **{"conditions": [CLEAN], "scorer": scorer} | change)
        assert scorer.asked > 0, change
    # Another vote or calibrator over the same weights' logits needs no scoring.
    scorer = Scorer(fail_after=0)
    again = bundle(mean="probability")
    evaluated(tmp_path, conditions=[CLEAN], scorer=scorer, ensemble=again)


def test_other_code_or_another_file_of_the_same_name_and_size_scores_anew(tmp_path, monkeypatch):
    one = tmp_path / "0.png"
    one.write_bytes(b"the picture")
    given = [dataclasses.replace(item, path=one) if i == 0 else item for i, item in enumerate(items())]

    def asked():
        scorer = Scorer()
        evaluated(tmp_path / "out", conditions=[CLEAN], items=given, scorer=scorer)
        return scorer.asked

    assert (asked(), asked()) == (120, 0)
    one.write_bytes(b"another one")
    assert (asked(), asked()) == (120, 0)
    kept.code_hash.cache_clear()
    monkeypatch.setattr(kept, "source_hash", lambda *modules: f"changed {modules}")
    assert (asked(), asked()) == (120, 0)
    kept.code_hash.cache_clear()  # of the changed sources


def test_the_hash_of_the_code_covers_every_wing_that_makes_a_score(monkeypatch):
    named = []
    monkeypatch.setattr(kept, "source_hash", lambda *modules: named.extend(modules) or "")
    kept.code_hash.__wrapped__("studies.drift")
    assert named == ["data", "models", "bundles", "scoring", "studies.drift"]


def test_a_damaged_score_file_is_named(tmp_path):
    evaluated(tmp_path, conditions=[CLEAN])
    (path,) = (tmp_path / "scores").glob("*.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(evaluate.EvaluationError, match="delete it and run again"):
        evaluated(tmp_path, conditions=[CLEAN])


def test_logits_that_are_not_finite_or_not_all_there_refuse(tmp_path):
    def broken(given, **_):
        return {"global": np.full(len(given), np.nan)}

    def short(given, **_):
        return {"global": np.zeros(len(given) - 1)}

    for scorer in (broken, short):
        with pytest.raises(evaluate.EvaluationError, match="expected 120 finite logits"):
            evaluated(tmp_path, scorer=scorer)
    with pytest.raises(ValueError, match="no scores from fusion"):
        evaluated(tmp_path, scorer=Scorer(MEMBERS[:2]))


# ------------------------------------------------------------------------------------------------ pictures
def test_limit_keeps_the_proportions_and_the_order():
    given = items()
    few = limit_items(given, 30, seed=0)
    assert len(few) == 30 and [given.index(i) for i in few] == sorted(given.index(i) for i in few)
    share = np.mean([i.source == "one" for i in given])
    assert np.mean([i.source == "one" for i in few]) == pytest.approx(share, abs=0.05)
    assert few == limit_items(given, 30, seed=0)
    assert few != limit_items(given, 30, seed=1)
    assert limit_items(given, 0, 0) == given
    assert limit_items(given, 999, 0) == given


def test_frames_are_spread_over_each_video():
    given = items(videos=True)
    few = limit_frames(given, 2)
    for key in {(i.source, i.label, i.video) for i in given if i.video}:
        of_video = [i for i in given if (i.source, i.label, i.video) == key]
        kept = [i for i in few if (i.source, i.label, i.video) == key]
        assert len(kept) == min(2, len(of_video))
        places = [of_video.index(i) / len(of_video) for i in kept]
        assert len(kept) < 2 or (places[0] < 0.5 <= places[1])
    assert sum(i.source == "fakes" for i in few) == 10  # no video, no limit


def manifest(folder, given):
    """Small pictures and their manifest on disk."""
    for item in given:
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = zlib.crc32(item.name.encode()) % 200
        Image.new("RGB", (24, 20), (shade, 90, 30)).save(path)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "source", "split", "video"])
        writer.writerows([i.name, i.label, i.source, "val", i.video] for i in given)
    return folder / "manifest.csv"


@pytest.fixture
def kit(monkeypatch):
    """`solution.scoring.ensemble` and `.stream` as evaluation sees them, without towers."""
    module = ModuleType("scoring")
    module.loaded = []

    def load_ensemble(weights, device, *, second_look):
        module.loaded.append((weights, device))
        module.second_look = second_look
        return bundle(threshold=0.6, false_alarm=0.05)

    def score_pictures(ensemble, given, *, batch_size, workers, **settings):
        return Scorer()(given, **settings)

    module.load_ensemble, module.score_pictures = load_ensemble, score_pictures
    for name in ("ensemble", "stream"):
        monkeypatch.setitem(sys.modules, f"solution.scoring.{name}", module)
        monkeypatch.setattr(f"solution.scoring.{name}", module, raising=False)
    return module


def test_the_command_writes_everything(tmp_path, kit, capsys):
    path = manifest(tmp_path, items(60))
    out = tmp_path / "out"
    command = f"--data {path} --weights w --out {out} --split val --degraded --draws 50 --quiet"
    command += " --pool both=one+two --seeds 3 4 --limit 50"
    assert evaluate.main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "ensemble" in printed and "50 pictures" in printed
    assert "mean of seeds 3, 4" in printed
    results = json.loads((out / "evaluation.json").read_text())
    assert results["protocol"]["split"] == "val"
    assert "0.6 (at most 5% false alarms" in results["protocol"]["threshold"]
    row = row_of(results, who="ensemble", condition="clean", scope="all")
    assert row["threshold"] == 0.6 and row["n"] == 50
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 50 and set(MEMBERS[:3]) | {"ensemble"} < set(rows[0])
    for name in ("roc", "histograms", "reliability", "agreement"):
        assert Image.open(out / "figures" / f"{name}.png").width > 400
    assert "data:image/jpeg;base64," in (out / "report.html").read_text()
    assert evaluate.main([*command.split(), "--no-thumbnails"]) == 0
    assert "data:image" not in (out / "report.html").read_text()
    assert kit.second_look and evaluate.main([*command.split(), "--fast"]) == 0
    assert not kit.second_look
    names = [path.name for path in (out / "scores").iterdir()]
    assert len(names) == 6  # apart from the default's


def test_the_command_refuses_in_a_line(tmp_path, kit, capsys):
    path = manifest(tmp_path, items(20))
    out = f"--out {tmp_path / 'out'}"
    assert evaluate.main(f"{out}".split()) == 2
    assert evaluate.main(f"--data {path} {out}".split()) == 2
    assert evaluate.main(f"--data {tmp_path / 'no.csv'} --weights w {out}".split()) == 2
    assert evaluate.main(f"--data {path} --weights w {out} --pool x".split()) == 2

    def missing(*_, **__):
        from solution.errors import WeightsError

        raise WeightsError("w: no bundle there")

    capsys.readouterr()
    kit.load_ensemble = missing
    assert evaluate.main(f"--data {path} --weights w {out}".split()) == 3
    assert capsys.readouterr().err == "evaluate: w: no bundle there\n"


def test_video_files_become_frames_once(tmp_path, kit):
    import cv2

    rows = [["path", "label", "source", "video"]]
    for name, label in (("a", 0), ("b", 1), ("c", 0), ("d", 1)):
        writer = cv2.VideoWriter(str(tmp_path / f"{name}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
        for k in range(12):
            writer.write(np.full((48, 64, 3), 20 * k, np.uint8))
        writer.release()
        rows.append([f"{name}.mp4", label, "clips", ""])
    path = tmp_path / "clips.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    command = f"--data {path} --weights w --out {tmp_path / 'out'} --frames 3 --draws 20 --quiet"
    assert evaluate.main(command.split()) == 0
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    row = row_of(results, who="face", condition="clean", scope="all", unit="video")
    assert (row["n"], row["frames"]) == (4, [3, 3])
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    assert len([p for p in written if "frames" in p.parts]) == 12
    assert evaluate.main(command.split()) == 0
    for frame, time in written.items():
        if "frames" in frame.parts:
            assert frame.stat().st_mtime_ns == time


# ------------------------------------------------------------------------------------------------ anyone's scores
def scores_and_labels(folder, prefix=""):
    labels = [["path", "label", "source"]]
    preds = [["image", "score"]]
    for item in items(60):
        labels.append([item.name, ("real", "fake")[item.label], item.source])
        preds.append([prefix + item.name, round(seeded(item.name).random(), 4)])
    for name, rows in (("labels.csv", labels), ("preds.csv", preds)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return labels[1:], preds[1:]


def test_anyones_scores_join_by_name(tmp_path, capsys):
    labels, preds = scores_and_labels(tmp_path)
    with (tmp_path / "preds.csv").open("w", newline="") as file:  # another order, one more
        csv.writer(file).writerows([["image", "score"], ["extra.png", 0.5], *preds[::-1]])
    out = tmp_path / "out"
    command = f"--preds {tmp_path}/preds.csv --labels {tmp_path}/labels.csv --out {out} --draws 50"
    assert evaluate.main(command.split()) == 0
    results = json.loads((out / "evaluation.json").read_text())
    y = [label == "fake" for _, label, _ in labels]
    p = [score for _, score in preds]
    row = row_of(results, who="scores", condition="given", scope="all")
    assert row["auc"] == metrics.auc(np.array(y).astype(int), np.array(p))
    assert "1 predictions without a label" in results["protocol"]["left out"]
    assert "preds.csv" in row["protocol"] and (out / "report.html").exists()
    assert {r["scope"] for r in results["rows"]} == {"all", "one", "two"}


def test_scores_that_do_not_fit_their_labels_refuse(tmp_path, capsys):
    def run(*more):
        files = f"--preds {tmp_path}/preds.csv --labels {tmp_path}/labels.csv"
        code = evaluate.main(f"{files} --out {tmp_path}/out --draws 20".split() + [*more])
        return code, capsys.readouterr().err

    _, preds = scores_and_labels(tmp_path, prefix="elsewhere/")
    code, error = run()
    assert code == 2 and "no score for 60 of 60" in error and "--by-name" in error
    assert run("--by-name") == (0, "")

    def rewrite(rows):
        with (tmp_path / "preds.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    scores_and_labels(tmp_path)
    rewrite([["image", "score"], *preds, preds[0]])
    assert f"preds.csv, line 62: {preds[0][0]} occurs twice" in run()[1]
    rewrite([["image", "score"], ["a.png", "nan"]])
    assert "preds.csv, line 2: the score is 'nan'" in run()[1]
    rewrite([["image", "score"], ["a.png", "3.5"]])
    assert "--logits" in run()[1]
    rewrite([["file", "verdict"], ["a.png", "3.5"]])
    assert "none of the columns score" in run()[1]
    rewrite([["image", "score"]])
    assert "no rows" in run()[1]


def test_given_scores_are_measured_on_the_splits_asked_for(tmp_path, capsys):
    _, preds = scores_and_labels(tmp_path)
    words = ("train", "Validation", "unseen", "")
    labels = [[i.name, k // 4 % 2, words[k % 4]] for k, i in enumerate(items(60))]

    def run(*more, header="Subset"):
        with (tmp_path / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", "label", header], *labels])
        files = f"--preds {tmp_path}/preds.csv --labels {tmp_path}/labels.csv --out {tmp_path}/out --draws 20"
        code = evaluate.main([*files.split(), *more])
        return code, capsys.readouterr().err

    def measured():
        results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        return results["protocol"], row_of(results, who="scores", condition="given", scope="all")

    assert run() == (0, "")
    assert (measured()[0]["split"], measured()[1]["n"]) == ("all rows", 60)
    with (tmp_path / "preds.csv").open("w", newline="") as file:  # those of `unseen` are enough for it
        csv.writer(file).writerows([["image", "score"], *preds[2::4]])
    assert "no score for" in run("--split", "val,unseen")[1]
    assert run("--split", "unseen") == (0, "")
    protocol, row = measured()
    y, p = np.array([label for _, label, _ in labels[2::4]]), np.array([score for _, score in preds[2::4]])
    assert (row["n"], row["auc"]) == (15, metrics.auc(y, p))
    assert (
        protocol["split"] == "unseen" and protocol["origin"].endswith(", split unseen") and "left out" not in protocol
    )
    code, error = run("--split", "unseen,test")
    assert code == 2 and "labels.csv: no row of split 'test'; it has train, unseen, val" in error
    code, error = run("--split", "val", header="remark")
    assert code == 2 and "no row names a split, and --split val was asked for" in error


@pytest.mark.parametrize(
    "option",
    ["--weights w", "--degraded", "--robustness", "--frames 3", "--limit 9", "--device cpu", "--fast", "--batch-size 2"]
    + ["--workers 0"],
)
def test_options_of_a_bundle_are_refused_with_given_scores(tmp_path, capsys, option):
    scores_and_labels(tmp_path)
    command = f"--preds {tmp_path}/preds.csv --labels {tmp_path}/labels.csv --out {tmp_path}/out {option}"
    assert evaluate.main(command.split()) == 2
    name = option.split()[0]
    assert (
        capsys.readouterr().err == f"evaluate: {name} goes with --data and means nothing with --preds; leave it out\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--labels l.csv", "--logits", "--by-name", "--threshold .7"])
def test_options_of_given_scores_are_refused_with_a_bundle(tmp_path, kit, capsys, option):
    command = f"--data {manifest(tmp_path, items(20))} --weights w --out {tmp_path / 'out'} {option}"
    assert evaluate.main(command.split()) == 2
    assert f"{option.split()[0]} goes with --preds and means nothing with --data" in capsys.readouterr().err


def test_swapped_labels_are_suspected_and_what_was_taken_as_fake_is_said(tmp_path, capsys):
    for name, header, column in (("preds", "filename,label", (0.9, 0.1)), ("labels", "ID,target", ("0.0", "1.0"))):
        rows = [header, *(f"{k}.png,{column[k % 2]}" for k in range(40))]
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    command = f"--preds {tmp_path}/preds.csv --labels {tmp_path}/labels.csv --out {tmp_path}/out --draws 20"
    assert evaluate.main(command.split()) == 0
    told = capsys.readouterr()
    assert "taken as fake (label 1): 20 pictures, as real (label 0): 20; a high score means fake" in told.out
    (line,) = told.err.splitlines()
    assert "AUC 0.000" in line and "are the labels swapped" in line
    row = {"who": "scores", "condition": "given", "scope": "all", "auc": 0.47, "auc_low": 0.4, "auc_high": 0.54}
    assert evaluate.swapped({"rows": [row]}) == []


def test_given_logits_become_probabilities(tmp_path):
    scores_and_labels(tmp_path)
    pictures, given, _ = evaluate.read_predictions(tmp_path / "preds.csv", tmp_path / "labels.csv", logits=True)
    assert given.p["scores"].min() >= 0.5  # logits of 0 to 1
    assert pictures.labels.sum() == sum(i.label for i in items(60))


# ------------------------------------------------------------------------------------------------ report
class Outline(HTMLParser):
    """Open tags, outside references, and whether every element closes."""

    VOID = frozenset({"meta", "br", "img", "path", "use", "link", "input", "hr"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.seen = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def outline(path):
    found = Outline()
    found.feed(path.read_text(encoding="utf-8"))
    assert not found.open
    return found


def test_the_report_stands_alone_and_follows_light_and_dark(tmp_path):
    given = items(60, folder=tmp_path)
    manifest(tmp_path, given)
    conditions = [CLEAN, *sweep()]
    evaluated(tmp_path, items=given, conditions=conditions, drawn=True)
    found = outline(tmp_path / "report.html")
    assert found.links and all(x.startswith(("#", "data:")) for x in found.links)
    assert not {"script", "link", "iframe"} & set(found.seen)
    text = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text and "var(--s0)" in text
    assert "@import" not in text and "url(http" not in text
    # Every colour of a figure is the page's: none is left that only suits one scheme.
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", figures)
    for family in ("random mix", "blur", "JPEG quality", "noise sigma"):
        assert family in text
    names = {p.stem for p in (tmp_path / "figures").glob("*.png")}
    assert {
        "roc",
        "reliability",
        "histograms",
        "severity",
        "flips",
        "agreement",
    } <= names


def test_names_cannot_break_the_page(tmp_path):
    given = items(60)
    evil = '<script>alert(1)</script>&".png'
    given = [Item(f"{i.name}{evil}", i.path, i.label, source=evil) for i in given]
    evaluated(tmp_path, items=given, conditions=[CLEAN], drawn=True)
    assert "script" not in outline(tmp_path / "report.html").seen


def test_the_submission_report_needs_no_labels(tmp_path):
    rows = []
    for k, item in enumerate(items(40, folder=tmp_path)):
        manifest(tmp_path, [item])
        p = {f"{m}_p": seeded(item.name, m).random() for m in MEMBERS[:3]}
        score = float(np.mean(list(p.values())))
        rows.append({"image": item.name, "path": item.path, "score": score, "error": ""} | p)
    failed = {"image": "broken.png", "score": 0.5, "error": "truncated <file>"}
    page = report.write_submission_report([*rows, failed], tmp_path / "r", threshold=0.4)
    found = outline(page)
    assert all(x.startswith(("#", "data:")) for x in found.links)
    text = page.read_text()
    assert "truncated &lt;file&gt;" in text and "No labels" in text
    told = json.loads((tmp_path / "r" / "report.json").read_text())
    assert (told["pictures"], len(told["failures"])) == (41, 1)
    scores = np.array([row["score"] for row in rows])
    assert told["above_threshold"] == np.mean(scores >= 0.4)
    assert told["members"] == list(MEMBERS[:3])
    assert sum(told["histogram"]["score"]["share"]) == pytest.approx(1)
    nearest = [rows[i]["image"] for i in np.argsort(np.abs(scores - 0.4), kind="stable")]
    gallery = text[text.index("Most uncertain pictures") :].partition("</section>")[0]
    shown = re.findall(r'class="picture" title="([^"]*)"', gallery)
    assert len(shown) > 3 and shown == nearest[: len(shown)]
    assert (tmp_path / "r" / "figures" / "disagreement.png").exists()


def test_a_submission_without_one_score_still_reports(tmp_path):
    failed = [{"image": "a.png", "score": 0.5, "error": "unreadable"}]
    page = report.write_submission_report(failed, tmp_path)
    assert "none scored" in page.read_text() and "unreadable" in page.read_text()
    one = [{"image": "a.png", "score": 0.3, "error": "", "global_p": 0.3}]
    assert "0.300" in report.write_submission_report(one, tmp_path).read_text()


# ------------------------------------------------------------------------------------------------ fitting
def validation(seed=0, n=1000):
    """Two good members, overconfident and shifted, and one that guesses; clean and degraded logits."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    logits = {}
    for condition, noise in (("clean", 1.0), ("degraded", 1.2)):
        signs = 2 * labels - 1
        logits[condition] = {
            "global": 4 * (signs + noise * rng.normal(size=n)) + 3,
            "face": 6 * (signs + 1.2 * noise * rng.normal(size=n)) - 2,
            "fusion": 5 * rng.normal(size=n),
        }
    return logits["clean"], logits["degraded"], labels


def fitted_on_drawing(clean, degraded, labels, **options):
    return fit.fit_ensemble(clean, degraded, fit.Known.plain(labels), fit.FitOptions(**{"draws": 200} | options))


@pytest.fixture(scope="module")
def fitted():
    clean, degraded, labels = validation()
    return fit.fit_ensemble(clean, degraded, fit.Known.plain(labels), fit.FitOptions(draws=200), fitted_on="a drawing")


def test_fitting_halves_the_calibration_error_of_every_member(fitted):
    calibrators, _, comparison = fitted
    for name, by_condition in comparison["members"].items():
        assert calibrators[name].fitted_on == "a drawing"
        assert calibrators[name].n_real + calibrators[name].n_fake == 2000
        for condition in ("clean", "degraded"):
            told = by_condition[condition]
            good = told["ece_after"] <= max(0.03, told["ece_before"] / 2)
            assert good, (name, condition, told)
            assert told["log_loss_after"] < told["log_loss_before"]
            assert 0.01 < told["ece_floor"] < told["ece_floor_high"] < 0.08


def test_the_member_that_guesses_gets_no_vote(fitted):
    _, vote, comparison = fitted
    # Levels earn their place or go; whichever way is chosen, the guesser has nothing to say in it.
    assert vote.weights["fusion"] <= 0.02 * vote.weights["global"], comparison["chosen"]
    assert comparison["search"]["weights"]["fusion"] == 0
    assert comparison["search"]["weights"]["global"] >= comparison["search"]["weights"]["face"] > 0
    assert all(fold["fusion"] == 0 for fold in comparison["weights_by_fold"])
    assert (vote.step, vote.false_alarm, vote.worst_false_alarm) == (0.1, 0.05, 0.1)


def test_the_threshold_holds_its_rate_and_the_band_its_share(fitted):
    calibrators, vote, comparison = fitted
    clean, degraded, labels = validation()
    scores = np.concatenate(
        [
            evaluate.calibrated(
                CLEAN,
                logits,
                SimpleNamespace(calibrators=calibrators, vote=vote, hash=""),
            ).p["ensemble"]
            for logits in (clean, degraded)
        ]
    )
    both = np.tile(labels, 2)
    assert np.mean(scores[both == 0] >= vote.threshold) <= 0.05
    assert np.mean(np.abs(scores - vote.threshold) < vote.unsure - 1e-9) <= 0.1
    asked = comparison["at_threshold"]
    rates = [asked[c]["false_alarms"] for c in ("clean", "degraded")]
    assert asked["asked"] == 0.05 and np.mean(rates) == pytest.approx(0.05, abs=0.03)
    assert asked["clean"]["fakes_found"] > asked["degraded"]["fakes_found"]
    for cell in (asked["clean"], asked["degraded"]):  # `unsure` takes from what is above the threshold, and from below
        real, fake = cell["called"]["real"], cell["called"]["fake"]
        assert sum(real.values()) == pytest.approx(1) and sum(fake.values()) == pytest.approx(1)
        assert real["fake"] < cell["false_alarms"] < real["fake"] + real["unsure"]
        assert fake["fake"] < cell["fakes_found"] < fake["fake"] + fake["unsure"]


def test_the_ways_of_voting_stand_side_by_side(fitted):
    _, _, comparison = fitted
    ways = comparison["ways"]
    assert set(ways) == {*fit.WAYS, "best single", "published recipe"}
    for way in ways.values():
        for told in way.values():
            assert told["low"] < told["value"] < told["high"]
    for condition in ("clean", "degraded"):
        value = {way: told[condition]["value"] for way, told in ways.items()}
        assert value["levels_rounded"] < value["levels"] <= value["probability"] + 0.003
        assert value["levels"] > value["best single"]
        assert ways["levels"][condition]["minus_best_single"]["low"] > 0
        assert ways["best single"][condition]["minus_best_single"]["difference"] == 0
    p = {n: sigmoid(x) for n, x in validation()[0].items()}
    published = combine(p, NTIRE26_VOTE)
    way = ways["published recipe"]["clean"]
    assert way["value"] == pytest.approx(metrics.auc(validation()[2], published), abs=1e-12)
    gain = ways["levels"]["clean"]["minus_published_recipe"]
    assert gain["difference"] == pytest.approx(ways["levels"]["clean"]["value"] - way["value"], abs=1e-12)
    json.dumps(comparison, allow_nan=False)


def several_generators(seed=0, n=1200):
    """`common` sees the fakes of six seen generators alone, `odd` those of the two unseen ones, `twin` repeats `common`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    made_by = np.array([f"g{k}" for k in range(8)])[rng.integers(0, 8, n)]
    unseen = np.isin(made_by, ["g6", "g7"])  # a real picture of those sources is unseen too
    sources = np.where(unseen, made_by, "many")
    signal = {"common": ~unseen, "twin": ~unseen, "odd": unseen}
    noise = rng.normal(size=n)
    logits = {
        name: 4 * labels * sees - 2 + (noise if name != "odd" else rng.normal(size=n)) * 1.5
        for name, sees in signal.items()
    }
    known = fit.Known.plain(labels, sources=sources, generators=np.where(labels, made_by, ""), unseen=unseen)
    return logits, known


def test_a_vote_is_chosen_for_unseen_generators_too():
    logits, known = several_generators()
    _, vote, comparison = fit.fit_ensemble(logits, logits, known, fit.FitOptions(draws=50))
    assert vote.weights["odd"] > 0
    ways = comparison["ways"]
    assert set(ways["levels"]) == {"clean", "degraded", "unseen_clean", "unseen_degraded"}
    assert "over generators" in comparison["protocol"]
    assert ways[comparison["chosen"]]["unseen_clean"]["value"] > 0.75
    assert comparison["rank_correlation"]["clean"]["common twin"] > 0.6
    assert set(comparison["at_threshold"]["false_alarms_by_source"]) == {"many", "g6", "g7"}
    at = comparison["at_threshold"]
    assert set(at["false_alarms_by_source_clean"]) == {"many", "g6", "g7"}
    assert at["false_alarms_by_source_clean"] == at["false_alarms_by_source"]  # clean and "degraded" are the same here
    assert max(at["false_alarms_by_source_as_fitted"].values()) <= 0.1
    of = {(row["generator"], row["condition"]): row for row in comparison["generators"]}
    assert len(of) == 16 and of["g6", "clean"]["unseen"] and not of["g0", "clean"]["unseen"]
    assert of["g6", "clean"]["auc"]["odd"] > 0.9
    assert of["g0", "clean"]["auc"]["odd"] < 0.6
    # Blind to what is unseen, the same pictures give the odd member nothing to say.
    blind = known._replace(generators=known.labels.astype(str), unseen=np.zeros(len(known.labels), bool))
    seen = fit.fit_ensemble(logits, logits, blind, fit.FitOptions(draws=50))[2]
    assert set(seen["ways"]["levels"]) == {"clean", "degraded"} and "over pictures" in seen["protocol"]


def test_a_generator_is_on_one_side_of_a_fold_with_the_reals_of_its_unseen_source():
    _, known = several_generators()
    folds = fit.make_folds(known, fit.FitOptions())
    assert folds.over == "generators" and set(folds.number) == set(range(5))
    for generator in np.unique(known.generators[known.labels == 1]):
        assert len(set(folds.number[known.generators == generator])) == 1
    for source in ("g6", "g7"):
        assert len(set(folds.number[known.sources == source])) == 1
    assert len(set(folds.number[(known.sources == "many") & (known.labels == 0)])) == 5


def test_fitting_refuses_what_does_not_belong_together():
    clean, degraded, labels = validation(n=100)
    del degraded["face"]
    with pytest.raises(ValueError, match="expected the same members"):
        fitted_on_drawing(clean, degraded, labels)
    clean, degraded, labels = validation(n=100)
    with pytest.raises(ValueError, match="logits for"):
        fitted_on_drawing(clean, degraded, labels[:-1])


def test_unseen_generators_stand_apart_and_false_alarms_by_source():
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 300)
    sources = np.repeat(["known", "far", "near"], 200)
    splits = np.where(sources == "known", "val", "unseen")
    strength = np.where(sources == "known", 6.0, np.where(sources == "near", 2.0, 0.0))
    scores = sigmoid(strength * (labels - 0.5) + rng.normal(size=600))
    names = tuple(map(str, range(600)))
    pictures = measure.Pictures(names, names, labels, tuple(sources), ("",) * 600, tuple(splits))
    run = measure.Run(CLEAN, {"ensemble": scores, "blind": np.full(600, 0.5)})
    limits = {"ensemble": 0.5, "blind": 0.5}
    results = measure.measure(pictures, [run], thresholds=limits, protocol={"origin": "x"}, draws=100)
    scopes = {row["scope"]: row["auc"] for row in results["rows"] if row["who"] == "ensemble"}
    assert scopes["seen generators"] == scopes["known"] > 0.99 > scopes["unseen generators"]
    ensemble, blind = results["unseen"]
    assert ensemble["sources"] == 2 and ensemble["auc"] == pytest.approx((scopes["far"] + scopes["near"]) / 2)
    assert ensemble["auc_low"] < ensemble["auc"] < ensemble["auc_high"]
    assert blind["ensemble_minus"]["value"] == pytest.approx(ensemble["auc"] - 0.5)
    alarms = {row["source"]: row["rate"] for row in results["false_alarms"]}
    assert results["false_alarms"][0]["source"] == "far" and alarms["known"] < 0.02
    assert alarms["far"] == np.mean(scores[(sources == "far") & (labels == 0)] >= 0.5)
    text = evaluate.text_table(results)
    assert "unseen generators, mean over 2 sources, ensemble" in text and "false alarms on far" in text
    seen = dataclasses.replace(pictures, splits=())
    assert not measure.measure(seen, [run], thresholds=limits, protocol={"origin": "x"}, draws=20)["unseen"]


def test_the_worst_errors_are_the_worst():
    labels = np.array([0, 0, 1, 1])
    pictures = measure.Pictures(tuple("abcd"), tuple("abcd"), labels, ("",) * 4, ("",) * 4)
    given = evaluate.Condition("given", "given", "as given")
    run = measure.Run(given, {"scores": np.array([0.9, 0.6, 0.4, 0.8])})
    results = measure.measure(pictures, [run], thresholds={"scores": 0.5}, protocol={"origin": "x"}, draws=20)
    worst = results["worst"]["given"]
    assert [w["name"] for w in worst["false_alarms"]] == ["a", "b"]
    assert [w["name"] for w in worst["misses"]] == ["c"]
    assert worst["counts"] == {"false_alarms": 2, "misses": 1}


def test_a_handful_of_pictures_is_enough_to_fit_and_fewer_refuse():
    clean, degraded, labels = validation(n=100)
    few = np.r_[np.flatnonzero(labels == 0)[:4], np.flatnonzero(labels == 1)[:5]]
    sets = [{n: x[few] for n, x in c.items()} for c in (clean, degraded)]
    calibrators, vote, comparison = fitted_on_drawing(*sets, labels[few], draws=50)
    assert set(calibrators) == set(vote.weights) == set(clean)
    assert "9 pictures" in comparison["protocol"]
    assert "2-fold" in comparison["protocol"]
    with pytest.raises(ValueError, match="needs four real and four fake"):
        sets = [{n: x[few[1:]] for n, x in c.items()} for c in (clean, degraded)]
        fitted_on_drawing(*sets, labels[few[1:]])


def test_seeds_are_versions_of_a_picture_and_not_more_pictures():
    clean, degraded, labels = validation(n=200)
    once = fitted_on_drawing(clean, degraded, labels, folds=2)
    twice = fitted_on_drawing(clean, [degraded, degraded], labels, folds=2)
    assert twice[1].weights == once[1].weights
    for way, told in once[2]["ways"].items():
        for condition in ("clean", "degraded"):
            again = twice[2]["ways"][way][condition]
            assert again["high"] - again["low"] == pytest.approx(
                told[condition]["high"] - told[condition]["low"], rel=0.3
            )
    assert "200 pictures" in twice[2]["protocol"] and "2 seeds" in twice[2]["protocol"]
