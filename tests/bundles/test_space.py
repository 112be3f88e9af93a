"""The Space's files: complete, started by themselves, refused where a bundle needs more than it holds."""

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest
from tiny import make_bundle

from solution import weights
from solution.bundles.space import write_space
from solution.config import VoteConfig
from solution.errors import WeightsError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("weights") / "tiny", ("global",), vote=VoteConfig({"global": 1}))


def test_the_files_start_by_themselves_and_name_what_is_missing(bundle, tmp_path):
    folder = write_space(bundle, tmp_path / "space", "faces")
    head = (folder / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in head and "app_file: app.py" in head and "title: faces" in head
    # Gradio is hidden, so that the start ends, at once and by name; nothing of this checkout is on the path.
    hidden = "import sys; sys.modules['gradio'] = None; sys.argv = ['app.py']; import runpy; runpy.run_path('app.py')"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "pip install" in done.stderr, done.stderr
    look = (
        "import solution.app as a; from solution.bundles.store import open_bundle;"
        "print(a.__file__, open_bundle('bundle').hash)"
    )
    done = subprocess.run([sys.executable, "-c", look], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(folder / "solution" / "app.py"), bundle.hash], done.stderr
    with pytest.raises(WeightsError, match="not empty"):
        write_space(bundle, folder, "faces")


def test_a_bundle_without_its_towers_makes_no_space(bundle, tmp_path):
    name, tower = next(iter(bundle.towers.items()))
    outside = replace(bundle, towers={name: replace(tower, source="owner/tower")})
    assert outside.towers[name].public
    with pytest.raises(WeightsError, match="is not in the bundle"):
        write_space(outside, tmp_path / "space", "faces")
    assert not (tmp_path / "space").exists()


def test_what_would_be_pushed_is_listed_and_nothing_named_is_usage(bundle, capsys):
    assert weights.main(["push", str(bundle.folder), "--space", "me/faces", "--dry-run"]) == 0
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert {"README.md", "app.py", "requirements.txt", "bundle/ensemble.json", "solution/app.py"} <= set(listed)
    assert "solution/evaluation/answer_template.html" in listed
    assert weights.main(["push", str(bundle.folder)]) == 2
    assert "--space" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="not installed: gradio")
def test_the_files_serve_the_page(bundle, tmp_path):
    folder = write_space(bundle, tmp_path / "space", "faces")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with open(tmp_path / "server.log", "w+") as log:
        command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 300
            page = b""
            while not page:
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "server.log").read_text()
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                        page = answer.read()
                        policy = answer.headers["content-security-policy"]
                except OSError:
                    time.sleep(0.5)
        finally:
            server.terminate()
            server.wait(60)
    assert b"Does this face look fake?" in page and policy.startswith("default-src 'self'")
