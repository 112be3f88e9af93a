"""The page: without Gradio one clear line; what a drop does; and in a real browser, where Chromium and Gradio are there."""

import asyncio
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
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


def test_a_drop_is_answered_at_once_then_in_full_and_is_deleted(weights, files, monkeypatch):
    monkeypatch.setattr(app, "CHANNELS", 2)
    monkeypatch.setattr(app, "FILES", 3)
    monkeypatch.setattr("solution.evaluation.answers.EXAMINED", 2)
    room = app.Room(str(weights), "cpu")
    room.examiner.files.close()
    room.examiner.reader.frames = 8
    dropped = [str(files / name) for name in ("four.png", "broken.jpg", "two.mp4", "extra.png")]
    shutil.copy(files / "four.png", files / "extra.png")
    steps = list(room.dropped(dropped))
    assert not any(Path(path).exists() for path in dropped)
    first, last = steps[0][0], steps[-1][0]
    assert first.count("<article data-verdict") == 1 and first.count('class="face"') == 4
    assert "Looking closer" in first and "degraded copies" not in first and "text/csv" not in first
    assert last.count("<article data-verdict") == 3 and last.count("on degraded copies") == 4
    assert "broken.jpg" in last and "Could not be read" in last and "1 more files were not judged" in last
    for words in ("global: attention", "vlaforge: localisation", "qtfp: query attention", "text/csv"):
        assert words in last
    assert "Score-CAM" not in last
    why = [html for html, _ in room.asked_why(steps[-1][1])]
    assert "global: Score-CAM" in why[-1] and "all Score-CAMs" in why[-1] and "text/csv" in why[-1]
    ((nothing, _),) = room.asked_why([])
    assert "Drop a picture first" in nothing


# ------------------------------------------------------------------------------------------------ in a browser
@pytest.fixture
def served(weights, tmp_path):
    """The address of a running page, and the folder that its uploads go to."""
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
            yield f"http://127.0.0.1:{port}", uploads
        finally:
            server.terminate()
            server.wait(WAIT)


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
def test_in_a_browser_uploads_get_verdicts_and_a_download(served, browser, files, tmp_path):
    import json

    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    address, uploads = served
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
    # Nothing was loaded from elsewhere, and nothing that was uploaded is still there.
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert urls and not [u for u in urls if not u.startswith((address, "data:", "blob:", "chrome"))]
    assert not [p for p in uploads.rglob("*") if p.suffix in (".png", ".jpg", ".mp4")]
