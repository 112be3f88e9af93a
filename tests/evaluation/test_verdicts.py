"""The table of verdicts, the videos' timelines, and the answers of the app, without a browser."""

import base64
import csv
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from people import collage, two_people
from tiny import make_bundle, make_faces

from solution.config import VoteConfig
from solution.data import views
from solution.data.images import Input, find_inputs
from solution.evaluation import report, verdicts
from solution.evaluation.answers import COPIES, Examiner, announced
from solution.evaluation.pages import MARKS
from solution.scoring.ensemble import load_ensemble
from solution.scoring.files import SidecarRow, Track, write_sidecar
from solution.scoring.judge import judge
from solution.scoring.stream import Reader, stream

BOX = (10.0, 10.0, 60.0, 60.0, 0.9)
RATES = {
    "clean": {"called": {"real": {"fake": 0.02, "unsure": 0.1}, "fake": {"fake": 0.6, "unsure": 0.1, "real": 0.3}}}
}
RECORD = {"threshold": 0.5, "unsure": 0.1, "asked": None, "measured": RATES, "by_source": None, "on": "90 pictures"}


def line(name, score, word, who=None, frame=None, track=None, face=BOX):
    return SidecarRow(name, "ok", "", face, {"face": score}, {"face": score}, score, word, frame, who, track)


@pytest.fixture
def scored(tmp_path):
    """Inputs and their sidecar: a real and a fake face in one picture, a clip of two people, nobody, and a broken file."""
    cv2.imwrite(str(tmp_path / "a.png"), np.full((100, 100, 3), 90, np.uint8))
    cv2.imwrite(str(tmp_path / "nobody.png"), np.full((100, 100, 3), 90, np.uint8))
    two_people(tmp_path / "clip.mp4")
    (tmp_path / "broken<.jpg").write_bytes(b"no picture")
    inputs = find_inputs(tmp_path)
    rows = [
        line("a.png", 0.9, "fake"),
        line("a.png", 0.1, "real", who=1),
        line("a.png", 0.9, "fake", who=2),
        SidecarRow("broken<.jpg", "failed", "no <picture>", None, {}, {}, 0.5, "failed"),
        line("clip.mp4", 0.6, "unsure", face=None),
        line("clip.mp4", 0.2, "real", who=1, track=Track(2, 1, 4, 0.1, 0.0)),
        line("clip.mp4", 0.3, "real", who=1, frame=1),
        line("clip.mp4", 0.1, "real", who=1, frame=4),
        line("clip.mp4", 0.6, "unsure", who=2, track=Track(3, 4, 10, 0.2, 0.66)),
        line("clip.mp4", 0.4, "real", who=2, frame=4),
        line("clip.mp4", 0.8, "fake", who=2, frame=7),
        line("clip.mp4", 0.6, "unsure", who=2, frame=10),
        line("nobody.png", 0.7, "no_face", face=None),
    ]
    sidecar = tmp_path / "preds.members.csv"
    write_sidecar(rows, sidecar, ["face"], frames=True, people=True)
    return verdicts.read_judged(sidecar, inputs)


def test_faces_and_tracks_stand_for_their_input_and_have_their_frames(scored):
    assert [(*j.key, j.verdict, len(j.frames)) for j in scored] == [
        ("a.png", 1, "real", 0),
        ("a.png", 2, "fake", 0),
        ("broken<.jpg", None, "failed", 0),
        ("clip.mp4", 1, "real", 2),
        ("clip.mp4", 2, "unsure", 3),
        ("nobody.png", None, "no_face", 0),
    ]
    told = [[row["frame"] for row in j.telling(2, 0.5)] for j in scored if j.frames]
    assert told == [["4", "1"], ["7", "10"]]  # of a real one those that look most real


def test_the_page_has_a_row_for_everything_the_most_suspicious_first(scored, tmp_path):
    why = {("a.png", 2): {"href": "../x.explain/explain.html#p1", "uri": "data:image/jpeg;base64,AA=="}}
    table = verdicts.verdict_section(scored, record=RECORD, frames=16, why=why)
    assert [(row["name"], row["who"]) for row in table["rows"]] == [
        ("a.png", 2),
        ("clip.mp4", 2),
        ("clip.mp4", 1),
        ("a.png", 1),
        ("nobody.png", ""),
        ("broken<.jpg", ""),
    ]
    assert [group["name"] for group in table["groups"]] == ["a.png"]
    (video,) = table["videos"]
    assert [len(person["telling"]) for person in video["people"]] == [2, 3]
    assert all(frame["uri"].startswith("data:") for person in video["people"] for frame in person["telling"])
    first, second = video["timeline"]["lines"]
    assert first["points"] == "0.0,105.0 213.3,135.0" and len(second["dots"]) == 3
    page = report.write_submission_report([], tmp_path / "r", threshold=0.5, verdicts=table)
    text = page.read_text()
    assert "Fake from 0.6, real below 0.4, between them unsure. Of 100 real pictures 2 were taken for fakes" in text
    assert "On: 90 pictures." in text.partition("What was measured")[2]
    assert "broken&lt;.jpg" in text and "no &lt;picture&gt;" in text and "<picture>" not in text
    assert 'href="../x.explain/explain.html#p1"' in text and text.count("<tr data-file") == 6
    assert not re.search(r"(?:src|href)=\"(?!data:|#|\.\./)", text) and "http" not in text.replace(
        "http://www.w3.org", ""
    )
    assert not verdicts.verdict_section([], record=RECORD, frames=1, why={})["rows"]


def test_a_timeline_shows_where_nothing_is_decided(scored):
    people = [j for j in scored if j.frames]
    bare, banded = verdicts.timeline(people, 0.5), verdicts.timeline(people, 0.5, 0.1)
    assert (bare["level"], bare["band"], bare["top"]) == ("threshold 0.5", "0.0", "75.0")
    assert (banded["level"], banded["band"], banded["top"]) == ("fake from 0.6", "30.0", "60.0")


def test_more_rows_than_are_listed_are_said(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "LISTED", 2)
    table = verdicts.verdict_section(scored, record=RECORD, frames=16, why={})
    text = report.write_submission_report([], tmp_path / "r", verdicts=table).read_text()
    assert text.count("<tr data-file") == 2 and "The 2 most suspicious of 6" in text


def test_scores_that_mean_nothing_keep_out_of_the_figures(tmp_path):
    rows = [
        {"image": name, "score": score, "error": "", "verdict": word, "face_p": score}
        for name, score, word in (("a.png", 0.9, "fake"), ("b.mp4", 0.1, "real"), ("nobody.png", 0.5, "no_face"))
    ]
    text = report.write_submission_report(rows, tmp_path / "r", threshold=0.5).read_text()
    told = json.loads((tmp_path / "r" / "report.json").read_text())
    assert (told["pictures"], told["no_face"], told["above_threshold"]) == (3, 1, 0.5)
    assert "Shares of 2 scored files." in text and "No face found" in text and "Most uncertain files" in text
    assert "nobody.png" not in text
    pictures = report.write_submission_report(rows[:1], tmp_path / "p", threshold=0.5).read_text()
    assert "Shares of 1 scored pictures." in pictures and "No face found" not in pictures


# ------------------------------------------------------------------------------------------------ answers
@pytest.fixture(scope="module")
def examiner(tmp_path_factory):
    vote = VoteConfig({"global": 1, "face": 2}, threshold=0.6, unsure=0.01)
    bundle = make_bundle(tmp_path_factory.mktemp("weights") / "tiny", ("global", "face"), vote=vote)
    return Examiner(load_ensemble(bundle, "cpu", exact=True), bundle, frames=8)


def test_an_answer_is_what_scoring_says_and_tells_whether_it_holds(examiner, tmp_path):
    picture, _ = collage()
    cv2.imwrite(str(tmp_path / "four.png"), picture[:, :, ::-1])
    answer = examiner.examine(tmp_path / "four.png", "four.png")
    reader = Reader(examiner.ensemble.views, people="all")
    item = Input("four.png", tmp_path / "four.png", "image")
    (rows,) = stream(examiner.ensemble, [[(0, item)]], reader, workers=0)
    true = judge(rows, examiner.ensemble.vote, examiner.ensemble.calibrators)
    assert answer.score == true[0].score and answer.verdict == true[0].verdict
    assert [f.judged.score for f in answer.faces] == pytest.approx(
        sorted((r.score for r in true[1:]), reverse=True), abs=1e-6
    )
    examiner.degrade(answer.faces[0])
    assert list(answer.faces[0].held) == list(COPIES)
    # The picture itself as its own copy scores what it scored.
    views, chosen = examiner.views_of(answer.faces[0].picture, answer.faces[0].face, True)
    assert all(config.max_area == 1.0 for _, config in views if config) and set(chosen.values()) == {
        answer.faces[0].face
    }
    text = examiner.html([answer])
    assert text.count('class="face"') == 4 and "on degraded copies" in text
    assert "“Looks fake” is said of a score of 0.61 or above" in text and "Fake from 0.61, real below 0.59" in text
    assert "http" not in text and "<script" not in text
    saved = base64.b64decode(re.search(r"data:text/csv;base64,([^\"]+)", text)[1]).decode()
    assert saved.count("four.png") == 5


def test_a_copy_that_changes_nothing_scores_the_same(examiner, tmp_path, monkeypatch):
    picture, _ = collage()
    cv2.imwrite(str(tmp_path / "four.png"), picture[:, :, ::-1])
    for name, shown in (("four.png", picture), ("one.png", picture[:256, :256])):
        cv2.imwrite(str(tmp_path / name), shown[:, :, ::-1])
        answer = examiner.examine(tmp_path / name, name)
        monkeypatch.setattr("solution.evaluation.answers.COPIES", {"the same": lambda p: p})
        for face in answer.faces:
            examiner.degrade(face)
            # Boxes are kept to a tenth of a pixel, which can move a crop by one.
            assert face.held["the same"][0] == pytest.approx(face.judged.score, abs=0.1)


def test_odd_files_are_named_and_never_a_blank(examiner, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "text.pdf").write_bytes(b"%PDF")
    cv2.imwrite(str(tmp_path / "nobody.png"), np.full((90, 90, 3), 80, np.uint8))
    clip = two_people(tmp_path / "two.mp4")
    turned = examiner.examine(Path(__file__).parents[1] / "photos" / "turned.jpg", "turned.jpg")
    assert turned.notes == ["Turned upright, as the picture's metadata asks."]
    broken, pdf, nobody, video = (
        examiner.examine(tmp_path / name, name) for name in ("broken.jpg", "text.pdf", "nobody.png", clip.path.name)
    )
    assert broken.verdict == pdf.verdict == "failed" and "picture" in broken.error and ".pdf" in pdf.error
    assert nobody.verdict == "no_face" and len(nobody.faces) == 1
    assert "Sound is not judged." in video.notes and len(video.faces) == 3 and video.timeline["lines"]
    text = examiner.html([broken, pdf, nobody, video])
    assert text.count("<article data-verdict") == 4 and "Could not be read" in text and "No face found" in text
    assert examiner.csv([]).count("\n") == 1


def test_where_no_face_was_found_nothing_is_said_of_the_score(examiner, tmp_path):
    cv2.imwrite(str(tmp_path / "nobody.png"), np.full((90, 90, 3), 80, np.uint8))
    answer = examiner.examine(tmp_path / "nobody.png", "nobody.png")
    text = examiner.html([answer])
    assert not answer.examined and announced(answer) == "nobody.png: no face found: nothing to judge"
    assert text.count("<img") == 1 and answer.where in text and 'class="face"' not in text and ", score" not in text
    assert not re.search(r"score \d", text.partition("What a score means")[0])


def test_the_picture_says_where_the_faces_are(examiner, tmp_path):
    picture, _ = collage()
    cv2.imwrite(str(tmp_path / "four.png"), picture[:, :, ::-1])
    answer = examiner.examine(tmp_path / "four.png", "four.png")
    data = base64.b64decode(answer.where.removeprefix("data:image/jpeg;base64,"))
    drawn = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)
    assert drawn.shape == (480, 480, 3)
    for face in answer.faces:
        x0, y0, _, y1 = (round(v * 480 / 512) for v in face.face[:4])
        edge = drawn[(y0 + y1) // 2 - 3 : (y0 + y1) // 2 + 3, x0 - 1 : x0 + 2].mean(axis=(0, 1))
        assert np.abs(edge - MARKS.get(face.judged.verdict, (92, 97, 104))).max() < 40


def test_of_a_clip_it_is_said_which_frame_is_shown_and_copied(examiner, tmp_path):
    answer = examiner.examine(two_people(tmp_path / "two.mp4").path, "two.mp4")  # 48 frames, 12 a second
    assert answer.pace == pytest.approx(1 / 12, rel=0.03)
    assert answer.time(24) == "0:02.0" and answer.timeline["first"] == answer.time(2)
    face = answer.faces[0]
    examiner.degrade(face)
    text = examiner.html([answer])
    when = f"the frame at {answer.time(face.row['frame'])}"
    assert f"Shown is {when}: score {float(face.row['score']):.2f}." in text and f"Of {when}: " in text
    held = all(word == face.row["verdict"] for _, word in face.held.values())
    assert ("The frame&#39;s verdict holds" in text or "The frame's verdict holds" in text) == held
    assert "of them score 0.6 or above" in text and "of them fake" not in text
    answer.pace = 0.0
    assert answer.time(24) == "frame 24"


def test_no_name_is_a_formula_in_the_page_s_download(examiner, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    names = ["=1+1.jpg", "@a.jpg", "-2.jpg", "+3.jpg", "\tb.jpg", "fine=.jpg"]
    saved = examiner.csv([examiner.examine(tmp_path / "x.jpg", name) for name in names])
    assert [row[0] for row in csv.reader(saved.splitlines())][1:] == [*(f"'{n}" for n in names[:-1]), "fine=.jpg"]


def test_a_long_clip_is_refused_by_its_length(examiner, tmp_path, monkeypatch):
    monkeypatch.setattr("solution.evaluation.answers.LONGEST", 3.0)
    examiner.files.close()  # the next process knows of it
    clip = two_people(tmp_path / "two.mp4")  # 48 frames, 12 a second
    assert "4 s long; at most 3 s" in examiner.examine(clip.path, "two.mp4").error


def test_a_file_that_ends_its_reader_is_an_answer_and_the_next_one_is_read(examiner, tmp_path, monkeypatch):
    make_faces(tmp_path, 1)
    for name in ("crash.png", "slow.png"):
        shutil.copy(tmp_path / "0.png", tmp_path / name)
    real = views.decode_image

    def decode(path):
        if path.name == "crash.png":
            os.kill(os.getpid(), signal.SIGSEGV)
        if path.name == "slow.png":
            time.sleep(60)
        return real(path)

    monkeypatch.setattr(views, "decode_image", decode)
    monkeypatch.setattr(examiner.reader.watch, "seconds", 1)
    monkeypatch.setattr(examiner.files, "seconds", 1)
    examiner.files.close()
    crash, slow, fine = (examiner.examine(tmp_path / name, name) for name in ("crash.png", "slow.png", "0.png"))
    assert crash.error == "reading it crashed its process (SIGSEGV)" and crash.verdict == "failed"
    assert slow.error == "reading it took more than 1 s"
    assert not fine.error and len(fine.faces) == 1
    examiner.files.close()
