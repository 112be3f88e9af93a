"""Variants over seeds compared on the same pictures, and traces that must not give a label away."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from solution.config import override
from solution.data.manifest import Item, ManifestError
from solution.evaluation import metrics
from solution.presets import preset
from solution.studies import ablate, shortcuts

ROOT = Path(__file__).resolve().parents[2]


def write_run(folder, variant, seed, labels, logits, member="qtfp", unseen=0):
    """unseen: how many of the last pictures are of the unseen split, by turns of source b and c."""
    path = folder / f"{variant}-{seed}" / member / "validation.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "source", "split", "clean", "degraded"])
        for index, (label, both) in enumerate(zip(labels, logits.T)):
            where = ("bc"[index // 2 % 2], "unseen") if index >= len(labels) - unseen else ("a", "val")
            rows.writerow([f"{index}.png", label, *where, *both])


@pytest.fixture
def runs(tmp_path):
    """Two seeds of `cls`, three of the better `queries`; the pictures' noise is shared, as it is between members."""
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 300)
    shared = rng.normal(size=(2, 600))
    known = {}
    for variant, strength, seeds in (("cls", 0.7, (0, 1)), ("queries", 1.3, (0, 1, 2))):
        for seed in seeds:
            logits = strength * labels + shared + 0.2 * rng.normal(size=(2, 600))
            known[variant, seed] = logits
            write_run(tmp_path / "qtfp", variant, seed, labels, logits)
    return tmp_path, labels, known


def test_variants_are_compared_on_the_seeds_that_both_have(runs):
    out, labels, known = runs
    rows = ablate.compare(out / "qtfp", ablate.STUDIES["qtfp"], draws=300)
    assert [row["variant"] for row in rows] == ["cls", "queries"]
    first, second = rows
    assert (first["seeds"], second["seeds"]) == ([0, 1], [0, 1, 2])
    aucs = [metrics.auc(labels, known["queries", s][1]) for s in range(3)]
    assert second["degraded"]["auc"] == aucs
    assert second["degraded"]["mean"] == pytest.approx(np.mean(aucs))
    difference = second["clean"]["difference"]
    assert difference["paired_seeds"] == [0, 1]
    assert difference["value"] == pytest.approx(np.mean(difference["by_seed"]))
    assert 0 < difference["low"] < difference["value"] < difference["high"]
    assert "difference" not in first["clean"]
    lines = ablate.table(rows).splitlines()
    assert len(lines) == 4 and lines[3].startswith("| queries | 0, 1, 2 | .")


def test_unseen_generators_are_judged_apart_as_the_mean_of_their_sources(tmp_path):
    """Source c is found by the second variant alone: its mean over both sources rises by half of that, seen stays."""
    rng = np.random.default_rng(0)
    labels, logits = np.tile([0, 1], 300), rng.normal(size=(2, 600))
    logits[:, :200] += 2 * labels[:200]
    found = logits.copy()
    of_c = np.arange(600) // 2 % 2 == 1
    found[:, 200:] += 9 * (labels * of_c)[200:]
    for variant, values in (("cls", logits), ("queries", found)):
        write_run(tmp_path / "qtfp", variant, 0, labels, values, unseen=400)
    first, second = ablate.compare(tmp_path / "qtfp", ablate.STUDIES["qtfp"], draws=300)
    assert list(second)[3:] == ["clean", "degraded", "unseen_clean", "unseen_degraded", "mean"]
    assert first["clean"]["auc"] == [metrics.auc(labels[:200], logits[0, :200])] and first["clean"]["mean"] > 0.85
    sources = np.where(of_c, "c", "b")[200:]
    by_source = metrics.auc_by_source(labels[200:], logits[1, 200:], sources)
    assert first["unseen_degraded"]["mean"] == pytest.approx(by_source)
    assert second["clean"]["difference"]["value"] == second["clean"]["difference"]["high"] == 0
    gain = second["unseen_clean"]["difference"]
    assert 0.15 < gain["low"] < gain["value"] < gain["high"] < 0.35
    assert gain["value"] == pytest.approx(second["unseen_clean"]["mean"] - first["unseen_clean"]["mean"])
    four = [second[name]["mean"] for name in ("clean", "degraded", "unseen_clean", "unseen_degraded")]
    assert second["mean"]["mean"] == pytest.approx(np.mean(four))
    assert 0.07 < second["mean"]["difference"]["low"] < second["mean"]["difference"]["high"] < 0.18
    assert "| unseen_degraded | minus first | mean | minus first |" in ablate.table([first, second])


def test_a_generator_left_out_is_judged_on_its_own_pictures(tmp_path):
    """Without `b` in training its fakes look real; those of `a`, and the reals, score as ever."""
    made_by = ["", "a", "b"] * 40
    lines = ["path,label,split,generator"]
    for index, generator in enumerate(made_by):
        (tmp_path / f"{index}.png").touch()
        lines.append(f"{index}.png,{int(bool(generator))},val,{generator}")
    data = tmp_path / "data.csv"
    data.write_text("\n".join(lines) + "\n")
    labels = np.array([bool(g) for g in made_by], int)
    noise = np.random.default_rng(0).normal(size=(2, len(labels)))
    study = ablate.leave_out_study("global", ["b"], 5)
    folder = tmp_path / "leave-out-global"
    write_run(folder, ablate.ALL, 0, labels, 3 * labels + noise, member="global")
    blind = 3 * labels * (np.array(made_by) != "b") + noise
    write_run(folder, "without b", 0, labels, blind, member="global")
    with_it, without = ablate.compare_left_out(folder, study, data, draws=100)
    assert (with_it["generator"], with_it["pictures"], without["pictures"]) == ("b", 80, 80)
    assert with_it["clean"]["mean"] > 0.95 and 0.3 < without["clean"]["mean"] < 0.7
    assert without["clean"]["difference"]["high"] < -0.2
    assert "b: without b" in ablate.table([with_it, without])
    call = ["--leave-out", "b", "--out", str(tmp_path), "--table", "--", "--data", str(data)]
    assert ablate.main(call) == 0 and (tmp_path / "leave-out-global.json").is_file()


def test_runs_on_other_pictures_are_not_compared(runs):
    out, labels, known = runs
    write_run(out / "qtfp", "cls", 5, labels[:-1], known["cls", 0][:, :-1])
    with pytest.raises(ManifestError, match="cls-5.*other validation pictures"):
        ablate.compare(out / "qtfp", ablate.STUDIES["qtfp"], draws=10)


def test_the_table_of_nothing_is_an_error(tmp_path, capsys):
    call = ["--study", "qtfp", "--out", str(tmp_path), "--table"]
    assert ablate.main(call) == 2
    assert "no finished run" in capsys.readouterr().err


def test_a_failed_training_stops_the_study_with_its_exit_code(tmp_path, capfd):
    call = ["--study", "recipe", "--out", str(tmp_path), "--seeds", "3"]
    data = ["--data", str(tmp_path / "nothing.csv"), "--preset", "tiny"]
    assert ablate.main([*call, "--", *data]) == 2
    error = capfd.readouterr().err
    assert "no such manifest" in error and "preset-3; see above" in error


def test_an_interrupted_training_may_finish_its_checkpoint(tmp_path):
    child = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), pathlib.Path(sys.argv[1]).touch(), sys.exit(130)))
print("ready", flush=True)
time.sleep(20)
"""
    words = [sys.executable, "-c", child, str(tmp_path / "saved")]
    code = f"from solution.studies import ablate; raise SystemExit(ablate.run_to_its_end({words!r}))"
    whole = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert whole.stdout.readline() == b"ready\n"
    os.killpg(whole.pid, signal.SIGINT)
    assert whole.wait(timeout=20) == 130 and (tmp_path / "saved").exists()


@pytest.mark.parametrize("study", ablate.STUDIES.values(), ids=ablate.STUDIES)
def test_every_variant_is_a_configuration_of_its_own(study):
    config = preset("compact", study.member)
    made = [override(config, [*study.shared, *v]) for v in study.variants.values()]
    assert all(made.count(one) == 1 for one in made)


# ------------------------------------------------------------------------------------------------ shortcuts
@pytest.mark.parametrize("quality", [5, 30, 49, 50, 75, 90, 95, 100])
def test_jpeg_quality_is_read_from_the_tables(quality, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    picture.save(tmp_path / "a.jpg", quality=quality)
    assert shortcuts.jpeg_quality(tmp_path / "a.jpg") == quality
    picture.save(tmp_path / "a.png")
    assert shortcuts.jpeg_quality(tmp_path / "a.png") == shortcuts.LOSSLESS


def test_the_view_loses_what_the_file_gives_away(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for index in range(24):
        fake = index % 2
        side = 256 if fake else 192  # the files of fakes are larger, and finer written
        noise = Image.fromarray(rng.integers(0, 255, (14, 14, 3), np.uint8))
        path = tmp_path / f"{index}.jpg"
        noise.resize((side, side), 2).save(path, quality=95 if fake else 60)
        found.append(shortcuts.traces(Item(path.name, path, fake), 56))
    labels = np.tile([0, 1], 12)
    auc = {n: metrics.auc(labels, [t[n] for t in found]) for n in found[0]}
    assert auc["file bytes"] == auc["file pixels"] == auc["file JPEG quality"] == 1
    assert auc["view pixels"] == 0.5
    assert 0.1 < auc["view JPEG bytes"] < 0.9


def test_pairs_of_one_stratum_alone_are_counted():
    labels = np.array([0, 1, 0, 1, 0])
    scores = np.array([0.2, 0.1, 0.5, 0.6, 0.9])  # wrong, then right and wrong
    strata = np.array([0, 0, 1, 1, 1])
    assert shortcuts.auc_within(labels, scores, strata) == pytest.approx(1 / 3)
    assert shortcuts.auc_within(labels, scores, np.arange(5)) is None


def test_the_command_joins_scores_by_name_and_refuses_missing_ones(tmp_path, capsys):
    rng = np.random.default_rng(1)
    rows, scored = ["path,label,source,split"], ["condition,image,ensemble"]
    for index in range(20):
        noise = rng.integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png,{index % 2},s{index % 4 // 2},val")
        scored.append(f"clean,{index}.png,{index / 20}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    (tmp_path / "s.csv").write_text("\n".join(scored))
    call = ["--data", str(tmp_path / "m.csv"), "--side", "28"]
    assert shortcuts.main([*call, "--scores", str(tmp_path / "s.csv")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in out[2:]] == ["| s0", "| s1", "| all"]
    assert "ensemble, views alike" in out[0]
    assert shortcuts.main([*call, "--scores", str(tmp_path / "none.csv")]) == 2
    assert "none.csv: not found" in capsys.readouterr().err
    (tmp_path / "s.csv").write_text("\n".join(scored[:-1]))
    assert shortcuts.main([*call, "--scores", str(tmp_path / "s.csv")]) == 2
    assert "no clean score of 1 pictures" in capsys.readouterr().err
