"""The page: without Gradio one clear line; what a drop does; and in a real browser, where Chromium and Gradio are there."""

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import cv2
import pytest
from people import collage, two_people
from tiny import make_bundle

from solution import app
from solution.config import VoteConfig

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LACKING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
with_gradio = pytest.mark.skipif("gradio" in LACKING, reason="not installed: gradio")
LACKING += [] if CHROMIUM and shutil.which("chromedriver") else ["chromium and chromedriver"]
in_a_browser = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
WAIT = 300  # seconds at most, of a busy machine


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    vote = VoteConfig({"global": 1, "qtfp": 1, "vlaforge": 1}, threshold=0.6, unsure=0.01)
    return make_bundle(folder, ("global", "qtfp", "vlaforge"), vote=vote).folder


@pytest.fixture
def files(tmp_path):
    """A collage of four, a clip of two people, and a broken file."""
    picture, _ = collage()
    cv2.imwrite(str(tmp_path / "four.png"), picture[:, :, ::-1])
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    two_people(tmp_path / "two.mp4")
    return tmp_path


# ------------------------------------------------------------------------------------------------ without Gradio
def test_without_gradio_one_line_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert app.main([]) == 3
    assert capsys.readouterr().err == 'app: the page needs Gradio, which is not installed: pip install "gradio>=6,<7"\n'


def test_a_port_that_is_taken_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(app.KitError, match="in use; name another"):
            app._check_port("127.0.0.1", taken.getsockname()[1])
    app._check_port("127.0.0.1", 0)


def test_every_answer_of_the_server_forbids_outside_sources():
    sent = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    async def send(message):
        sent.append(message)

    asyncio.run(app._Policy(page)({}, None, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"a"] == b"b" and b"default-src 'self'" in headers[b"content-security-policy"]
    assert b"http" not in headers[b"content-security-policy"]


def test_only_the_uploads_of_dead_processes_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"{app.UPLOADS}{ended.pid}-a", f"{app.UPLOADS}{os.getpid()}-b", f"{app.UPLOADS}x"):
        (tmp_path / name / "inside").mkdir(parents=True)
    app._delete_stale()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{app.UPLOADS}{os.getpid()}-b", f"{app.UPLOADS}x"]


# ------------------------------------------------------------------------------------------------ what a drop does
@pytest.fixture(scope="module")
def room(weights):
    """A room that takes as uploads what lies in the test's folder: set `uploads`."""
    room = app.Room(str(weights), "cpu", Path())
    room.examiner.files.close()
    room.examiner.reader.frames = 8
    return room


@pytest.fixture
def drop(room, files):
    """What drops files of the test's folder by name and takes them: the visit that they wait in."""
    room.uploads = files.resolve()

    def dropped(*names, visit=None):
        emptied, visit, said = room.take([str(files / name) for name in names], visit or app.Visit())
        assert emptied is None and all(upload.name in said for upload in visit.waiting)
        return visit

    return dropped


def left(folder):
    """The files in a folder and in those in it."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_a_drop_is_answered_at_once_then_in_full_and_is_deleted(room, drop, files, monkeypatch):
    monkeypatch.setattr(app, "FILES", 3)
    monkeypatch.setattr("solution.evaluation.answers.EXAMINED", 2)
    dropped = ("four.png", "broken.jpg", "two.mp4", "extra.png")
    shutil.copy(files / "four.png", files / "extra.png")
    visit = drop(*dropped)
    steps = list(room.dropped(visit, []))
    assert not any((files / name).exists() for name in dropped) and not left(files)
    told = [said for _, _, said in steps]
    assert told[0] == "Reading four.png (1 of 3) ...<br>broken.jpg waits.<br>two.mp4 waits."
    assert told[1].startswith("four.png: ") and told[1].endswith("Reading broken.jpg (2 of 3) ...<br>two.mp4 waits.")
    assert "Looking closer at four.png (1 of 3)" in told[3] and "Looking closer" not in told[-1]
    assert "broken.jpg: could not be read<br>" in told[-1] and "1 more files were not judged" in told[-1]
    first, last = steps[1][0], steps[-1][0]
    assert first.count("<article data-verdict") == 1 and first.count('class="face"') == 4
    assert "degraded copies" not in first and "text/csv" not in first
    assert last.count("<article data-verdict") == 3 and last.count("on degraded copies") == 4
    assert "broken.jpg" in last and "Could not be read" in last
    for words in ("global: attention", "vlaforge: localisation", "qtfp: query attention", "text/csv"):
        assert words in last
    assert "Score-CAM" not in last and " nats" not in last


def test_score_cam_says_at_once_that_it_works(room, drop, monkeypatch):
    monkeypatch.setattr(room.thorough, "channels", 2)
    visit = drop("four.png")
    *_, (_, kept, _) = room.dropped(visit, [])
    steps = list(room.asked_why(visit, kept))
    assert "Score-CAM of four.png, face 1 of 4" in steps[0][2] and "global: Score-CAM" not in steps[0][0]
    why = steps[-1][0]
    assert "global: Score-CAM" in why and "all Score-CAMs" in why and "text/csv" in why
    ((nothing, _, said),) = room.asked_why(visit, [])
    assert "Drop a picture first" in said and "<article data-verdict" not in nothing


def test_a_second_drop_leaves_the_first_one_as_it_is(room, drop, files):
    visit = drop("broken.jpg")
    *_, (_, kept, _) = room.dropped(visit, [])
    # While the second is read a third one comes, with a file that is gone; its own event finds nothing left to do.
    (files / "more.jpg").write_bytes(b"no picture")
    (files / "late.jpg").write_bytes(b"no picture")
    drop("more.jpg", visit=visit)
    steps = room.dropped(visit, kept)
    next(steps)
    drop("late.jpg", "broken.jpg", visit=visit)
    *_, (shown, kept, said) = steps
    assert [answer.name for answer in kept] == ["more.jpg", "late.jpg", "broken.jpg"]
    assert [shown.index(f">{name}<") for name in ("more.jpg", "late.jpg", "broken.jpg")] == sorted(
        shown.index(f">{name}<") for name in ("more.jpg", "late.jpg", "broken.jpg")
    )
    assert "broken.jpg" not in said
    assert list(room.dropped(visit, kept)) == [app.SAME]


def test_equal_files_of_two_people_are_each_read(room, drop, files):
    """Gradio lays the second over the first."""
    mine = drop("four.png")
    picture, _ = collage()
    cv2.imwrite(str(files / "again.png"), picture[:, :, ::-1])
    (files / "again.png").replace(files / "four.png")
    *_, (_, (answer,), _) = room.dropped(mine, [])
    assert answer.verdict != "failed" and (files / "four.png").exists()
    *_, (_, (answer,), _) = room.dropped(drop("four.png"), [])
    assert answer.verdict != "failed" and not (files / "four.png").exists()


def test_nothing_but_uploads_is_taken(room, drop, files, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    shutil.copy(files / "four.png", elsewhere)
    (files / "link.png").symlink_to(elsewhere)
    visit = drop(str(elsewhere), "link.png", "/dev/zero", "https://example.org/a.png", "../secret.png", ".")
    assert not visit.waiting and elsewhere.exists()


def test_what_a_broken_upload_left_goes_with_the_next_drop(drop, files):
    for name, age in (("old.part", 3600), ("new.part", 0)):
        (files / name).touch()
        os.utime(files / name, (time.time() - age,) * 2)
    drop()
    assert not (files / "old.part").exists() and (files / "new.part").exists()


def test_a_stop_keeps_what_was_read_and_a_clear_nothing(room, drop, files):
    for end in ("stop", "clear"):
        for name in ("a.jpg", "b.jpg"):
            (files / name).write_bytes(b"no picture")
        visit = drop("a.jpg", "b.jpg")
        steps = room.dropped(visit, [])
        next(steps), next(steps)
        getattr(room, end)(visit)
        rest = list(steps)
        assert not {"a.jpg", "b.jpg"} & set(left(files)) and not visit.waiting
        if end == "clear":
            assert rest == [app.SAME]
        else:
            html, kept, said = rest[-1]
            assert [answer.name for answer in kept] == ["a.jpg"] and "text/csv" in html and "b.jpg" not in said
    assert room.clear(visit)[1:] == ([], "")


# ------------------------------------------------------------------------------------------------ served
@pytest.fixture
def server(weights, tmp_path):
    """A running page: its process, address, the folder that its uploads go to, and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uploads = tmp_path / "temporary"
    uploads.mkdir()
    command = [sys.executable, "-m", "solution.app", "--weights", str(weights), "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "server.log", "w+") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, env={**app.os.environ, "TMPDIR": str(uploads)}, stdout=log, stderr=log
        )
        try:
            until = time.monotonic() + WAIT
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
            yield server, f"http://127.0.0.1:{port}", uploads, tmp_path / "server.log"
        finally:
            server.terminate()
            server.wait(WAIT)


def asked(address, body=None):
    """The text of an answer, of a refusal too."""
    request = urllib.request.Request(address, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


@with_gradio
def test_a_client_names_no_file_of_this_machine_and_ctrl_c_closes_open_pages(server, files):
    process, address, uploads, log = server
    took = next(d for d in json.loads(asked(f"{address}/config"))["dependencies"] if d["targets"][0][1] == "upload")
    for path, told in (
        (str(files / "four.png"), "was not uploaded by a user"),
        ("/dev/zero", "was not uploaded by a user"),
        ("https://example.org/a.png", "no addresses"),
    ):
        data = [[{"path": path, "meta": {"_type": "gradio.FileData"}}], None]
        body = {"data": data, "fn_index": took["id"], "session_hash": "someone"}
        assert told in asked(f"{address}/gradio_api/run/predict", body)
    assert all("Not Found" in asked(f"{address}/{page}") for page in ("docs", "redoc", "openapi.json"))
    with urllib.request.urlopen(f"{address}/gradio_api/heartbeat/someone") as page:
        assert b"ALIVE" in page.readline()
        told = len(log.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130
    assert log.read_text()[told:].strip() == "app: closed"
    assert not list(uploads.glob(f"{app.UPLOADS}*"))


# ------------------------------------------------------------------------------------------------ in a browser
@pytest.fixture
def browser(tmp_path):
    """Headless Chromium that notes every request and saves downloads in `tmp_path / "saved"`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "saved")})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@in_a_browser
def test_in_a_browser_uploads_get_verdicts_and_a_download(server, browser, files, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    _, address, uploads, _ = server
    wait = WebDriverWait(browser, WAIT)
    browser.set_window_size(500, 900)
    browser.get(address)
    upload = wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#files input[type=file]"))
    upload.send_keys("\n".join(str(files / name) for name in ("four.png", "broken.jpg", "two.mp4")))
    link = wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#answers a.download"))
    articles = browser.find_elements(By.CSS_SELECTOR, "#answers article[data-verdict]")
    assert len(articles) == 3
    four, broken, two = articles
    assert len(four.find_elements(By.CSS_SELECTOR, ".face")) == 4 and "degraded copies" in four.text
    assert broken.get_attribute("data-verdict") == "failed" and "not a picture" in broken.text
    assert len(two.find_elements(By.CSS_SELECTOR, ".face")) == 3 and "Sound is not judged" in two.text
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    # By keyboard: the maps open and close, the download starts.
    summary = four.find_element(By.CSS_SELECTOR, "summary")
    details = summary.find_element(By.XPATH, "..")
    opened = details.get_attribute("open")
    summary.send_keys(Keys.ENTER)
    assert details.get_attribute("open") != opened
    link.send_keys(Keys.ENTER)
    saved = tmp_path / "saved" / "scores.members.csv"
    wait.until(lambda _: saved.exists())
    assert saved.read_text().count("four.png") == 5
    # Spoken to who does not see it; a second drop goes above the first, and a clear takes both.
    said = browser.find_element(By.ID, "said")
    assert said.get_attribute("aria-live") == "polite" and "broken.jpg: could not be read" in said.text
    browser.find_element(By.CSS_SELECTOR, "#files input[type=file]").send_keys(str(files / "broken.jpg"))
    names = "return [...document.querySelectorAll('#answers article[data-verdict] h2')].map((e) => e.textContent)"
    wait.until(lambda d: len(d.execute_script(names)) == 4 and d.find_elements(By.CSS_SELECTOR, "#answers a.download"))
    assert browser.execute_script(names) == ["broken.jpg", "four.png", "broken.jpg", "two.mp4"]
    browser.find_element(By.ID, "clear").click()
    wait.until(lambda d: not d.execute_script(names))
    # Nothing was loaded from elsewhere, and nothing that was uploaded is still there.
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert urls and not [u for u in urls if not u.startswith((address, "data:", "blob:", "chrome"))]
    assert not [p for p in uploads.rglob("*") if p.suffix in (".png", ".jpg", ".mp4")]
