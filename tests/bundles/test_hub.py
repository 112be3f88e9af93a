"""The Hub, played by a small HTTP server here: first download, cached, offline, interrupted, wrong hash, refusals."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny import bundle_config, pack_member

from solution import weights
from solution.bundles import bundle, hub, ntire26, selftest, store
from solution.bundles.bundle import load_members
from solution.bundles.ntire26 import FILES, import_ntire26
from solution.bundles.store import open_bundle
from solution.config import AdapterConfig, MemberConfig, TowerConfig
from solution.errors import WeightsError
from solution.models.towers import build_tower
from solution.presets import preset

ROOT = Path(__file__).resolve().parents[2]
COMMIT, OLDER = "a" * 40, "b" * 40
LORA = AdapterConfig("lora", rank=4, alpha=8.0, dropout=0.0)  # leaves a public tower as it is


class FakeHub(ThreadingHTTPServer):
    """What huggingface_hub asks of the Hub to download files: HEAD and GET of /owner/name/resolve/revision/path.

    repositories: (owner/name, commit) -> {path: bytes}. branches: name -> commit. gated: repositories nobody may read.
    breaks: path -> how many GETs end after half of the file. corrupt: paths whose last byte arrives changed.
    log: (method, path, range) of every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.branches = {}, {"main": COMMIT}
        self.gated, self.breaks, self.corrupt, self.log = set(), {}, set(), []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def add(self, repository, folder, commit=COMMIT, inside=""):
        files = self.repositories.setdefault((repository, commit), {})
        for path in Path(folder).rglob("*"):
            if path.is_file():
                files[inside + path.relative_to(folder).as_posix()] = path.read_bytes()

    def gets(self):
        return [path for method, path, _ in self.log if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body):
        owner, name, word, revision, path = self.path.strip("/").split("/", 4)
        assert word == "resolve"
        self.server.log.append((self.command, path, self.headers.get("Range")))
        repository = f"{owner}/{name}"
        commit = self.server.branches.get(revision, revision)
        if repository in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if repository not in {known for known, _ in self.server.repositories}:
            return self.refuse(401, "RepoNotFound")
        files = self.server.repositories.get((repository, commit))
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        self.send_file(files[path], path, commit, body)

    def send_file(self, content, path, commit, body):
        start = 0
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            total = len(content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        if not body:
            return
        if self.server.breaks.get(path, 0) > 0:
            self.server.breaks[path] -= 1
            half = content[start : start + (len(content) - start) // 2]
            self.wfile.write(half)
            self.wfile.flush()
            self.close_connection = True
            return
        if path in self.server.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content[start:])


@pytest.fixture
def server(tmp_path, monkeypatch):
    with FakeHub() as hub_server:
        threading.Thread(target=hub_server.serve_forever, args=[0.01], daemon=True).start()
        home = tmp_path / "home"
        template = hub_server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub_server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda s: None)
        yield hub_server
        hub_server.shutdown()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bundle with a tower of its own and one with a public tower (tests/tower), and that tower's repository."""
    folder = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    own = pack_member(folder / "own", bundle_config("global"))
    config = preset("tiny", "face")
    arch = config.tower.arch
    tower = TowerConfig("public", "dinov2", arch, source="tests/tower", revision="main")
    torch.manual_seed(1)
    model = build_tower(tower).model
    repository = folder / "tower"
    repository.mkdir()
    save_file(model.state_dict(), repository / "model.safetensors", {"format": "pt"})
    (repository / "config.json").write_text(model.config.to_json_string())
    public = pack_member(
        folder / "public",
        MemberConfig("face", config.view, tower, LORA),
    )
    return SimpleNamespace(own=own.folder, public=public.folder, tower=repository)


# ------------------------------------------------------------------------------------------------ downloads
def test_first_download_then_cache_then_offline(server, packed, monkeypatch):
    server.add("tests/own", packed.own)
    opened = open_bundle("hf:tests/own")
    assert opened.hash == bundle.read_bundle(packed.own).hash
    assert COMMIT in opened.folder.parts  # pinned, although the name said main
    assert sorted(server.gets()) == sorted([*opened.files, "ensemble.json"])
    assert load_members(opened).keys() == {"global"}

    with pytest.raises(WeightsError, match="cache is not changed"):
        selftest.add_golden(opened)

    server.log.clear()
    assert open_bundle("hf:tests/own").hash == opened.hash
    assert server.gets() == []  # one look at the branch, nothing fetched

    server.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_bundle("hf:tests/own").hash == opened.hash
    assert open_bundle(f"hf:tests/own@{COMMIT}").hash == opened.hash
    assert server.log == []
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        open_bundle("hf:tests/other")


def test_the_environment_alone_makes_it_offline(server, packed):
    server.add("tests/own", packed.own)
    open_bundle("hf:tests/own")
    server.log.clear()
    environment = os.environ | {
        "HF_ENDPOINT": server.address,
        "HF_HOME": constants.HF_HOME,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "solution.weights", "verify", "hf:tests/own"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "files match ensemble.json" in done.stdout
    assert server.log == []


def test_a_broken_connection_is_resumed_where_it_stopped(server, packed):
    server.add("tests/own", packed.own)
    name = "towers/tiny-global.safetensors"
    server.breaks[name] = 2
    assert open_bundle("hf:tests/own").folder.is_dir()
    ranges = [where for method, path, where in server.log if path == name]
    size = len(server.repositories["tests/own", COMMIT][name])
    starts = [int(r.strip("bytes=-")) for r in ranges if r]
    assert len(starts) == 2 and 0 < starts[0] < starts[1] < size


def test_after_an_interruption_only_what_is_missing_is_fetched(server, packed):
    server.add("tests/own", packed.own)
    name = "towers/tiny-global.safetensors"
    server.breaks[name] = 10**9
    with pytest.raises(WeightsError, match="could not be fetched") as caught:
        open_bundle("hf:tests/own")
    assert "\n" not in str(caught.value) and "try again" in str(caught.value)
    done = set(server.gets()) - {name}
    assert done
    server.breaks.clear()
    server.log.clear()
    assert load_members(open_bundle("hf:tests/own"))
    assert name in server.gets() and not done & set(server.gets())


@pytest.mark.parametrize("how", ["on the way", "in the repository"])
def test_a_wrong_hash_names_the_file_and_force_heals(server, packed, how):
    server.add("tests/own", packed.own)
    files = server.repositories["tests/own", COMMIT]
    name = "global/model.safetensors"
    right = files[name]
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    if how == "on the way":
        server.corrupt.add(name)
    else:
        files[name] = wrong
    with pytest.raises(WeightsError) as caught:
        open_bundle("hf:tests/own")
    hashes = [hashlib.sha256(content).hexdigest() for content in (right, wrong)]
    for word in (name, *hashes, "pull --force"):
        assert word in str(caught.value)
    server.corrupt.clear()
    files[name] = right
    with pytest.raises(WeightsError, match=hashes[1]):
        open_bundle("hf:tests/own")  # the cache still has the wrong one
    assert weights.main(["pull", "--force", "hf:tests/own"]) == 0
    assert open_bundle("hf:tests/own").name == "own"


def test_a_revision_and_a_subfolder(server, packed):
    server.add("tests/many", packed.own, OLDER, "bundles/own/")
    server.add("tests/many", packed.public, COMMIT)
    server.branches["v1"] = OLDER
    opened = open_bundle("hf:tests/many@v1:bundles/own")
    assert opened.configs.keys() == {"global"}
    assert opened.folder.parts[-3:] == (OLDER, "bundles", "own")
    assert open_bundle("hf:tests/many").configs.keys() == {"face"}


def test_a_branch_that_moves_during_a_download_changes_nothing(server, packed, monkeypatch):
    server.add("tests/own", packed.own)
    server.add("tests/own", packed.public, OLDER)
    pin = hub.pin

    def moved(*given):
        server.branches["main"] = OLDER
        return pin(*given)

    monkeypatch.setattr(hub, "pin", moved)
    opened = open_bundle("hf:tests/own")
    assert opened.hash == bundle.read_bundle(packed.own).hash and COMMIT in opened.folder.parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf:tests/none", ["tests/none", "no such repository", "hf auth login"]),
        ("hf:tests/own@v9", ["tests/own", "no revision 'v9'"]),
        ("hf:tests/own:deep", ["no file deep/ensemble.json"]),
        ("hf:tests/gated", ["gated", "accept its terms", "tests/gated"]),
        ("hf:own", ["hf:owner/name[@revision][:subfolder]"]),
    ],
)
def test_a_refusal_says_in_one_line_what_to_do(server, packed, capsys, text, words):
    server.add("tests/own", packed.own)
    server.gated.add("tests/gated")
    assert weights.main(["verify", text]) == 3
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for word in words:
        assert word in told


def test_an_unreachable_hub_is_told_in_one_line(server, monkeypatch):
    nobody = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(server.address, "http://[::1]:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    with pytest.raises(WeightsError, match="cannot be reached") as caught:
        open_bundle("hf:tests/own")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ towers
def test_a_local_folder_never_touches_the_network(server, packed, capsys):
    server.add("tests/tower", packed.tower)
    opened = open_bundle(str(packed.public))
    with pytest.raises(WeightsError, match="no network may be used"):
        load_members(opened)
    assert server.log == []
    assert weights.main(["pull", str(packed.public)]) == 0
    server.log.clear()
    assert load_members(open_bundle(str(packed.public))).keys() == {"face"}
    assert server.log == []


def test_a_bundle_from_the_hub_fetches_its_public_tower_once(server, packed):
    server.add("tests/tower", packed.tower)
    server.add("tests/public", packed.public)
    first = load_members(open_bundle("hf:tests/public"))["face"]
    assert {"model.safetensors", "config.json"} <= set(server.gets())
    server.log.clear()
    again = load_members(open_bundle("hf:tests/public"))["face"]
    local = load_members(open_bundle(str(packed.public)), towers_from={"public": str(packed.tower)})["face"]
    assert server.gets() == []
    pictures = selftest.golden_pictures(56)
    with torch.inference_mode():
        logits = [m(pictures).logit for m in (first, again, local)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_the_commit_of_a_public_tower_is_recorded(server, packed, tmp_path):
    """`main` may move; the bundle stays with what it was made on."""
    server.add("tests/tower", packed.tower)
    tower = bundle.read_bundle(packed.public).towers["public"]
    assert tower.revision == "main"
    bundle.tower_weights(tower)
    config = preset("tiny", "face")
    config = MemberConfig("face", config.view, tower, LORA)
    made = pack_member(tmp_path / "made", config)
    assert made.towers["public"].revision == COMMIT
    assert made.configs["face"].tower.revision == COMMIT


def test_a_tower_with_another_hash_is_refused_when_it_arrives(server, packed):
    server.add("tests/tower", packed.tower)
    tower = bundle.read_bundle(packed.public).towers["public"]
    wrong = TowerConfig("x", "dinov2", tower.arch, tower.source, "main", sha256="0" * 64)
    with pytest.raises(WeightsError, match="SHA-256 is .*, expected 0000"):
        bundle.tower_weights(wrong)


def test_pull_checks_a_tower_that_the_cache_has_already(server, packed, tmp_path, capsys):
    server.add("tests/tower", packed.tower)
    tower = bundle.read_bundle(packed.public).towers["public"]
    tower = replace(tower, sha256=hub.sha256(packed.tower / "model.safetensors"))
    made = pack_member(tmp_path / "made", MemberConfig("face", preset("tiny", "face").view, tower, LORA))
    assert weights.main(["pull", str(made.folder)]) == 0
    cached = hub.cached(hub.HubRef("tests/tower"), "model.safetensors").resolve()
    cached.write_bytes(cached.read_bytes()[:-1] + b"!")
    assert weights.main(["pull", str(made.folder)]) == 3
    assert f"expected {tower.sha256}" in capsys.readouterr().err


def test_a_clip_repository_gives_whichever_file_it_has(server, packed, tmp_path):
    ref = hub.HubRef("tests/clip")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/model.safetensors").write_bytes(b"x")
    server.add("tests/clip", tmp_path / "clip")
    names = bundle.TOWER_FILES["clip"]
    assert hub.fetch_first(ref, names).name == "model.safetensors"
    server.gated.add("tests/clip2")
    with pytest.raises(WeightsError, match="gated"):
        hub.fetch_first(hub.HubRef("tests/clip2"), names)


# ------------------------------------------------------------------------------------------------ the published entry
def test_ntire26_is_imported_on_first_use_and_kept(server, tmp_path, monkeypatch):
    from test_ntire26 import write_published

    files = write_published(tmp_path / "files")
    server.add("lpmkhoa/hcmusaqua-ntire26-weights", files)
    towers = {"dino": str(files / "dino"), "clip": str(files / "clip")}

    def tiny_towers(out, **options):  # the pinned giant towers are not to be had here
        return import_ntire26(out, **towers, **options)

    monkeypatch.setattr(ntire26, "import_ntire26", tiny_towers)
    lines = []
    first = open_bundle("ntire26", report=lines.append)
    assert set(FILES.values()) <= set(server.gets()) and lines
    assert selftest.run_selftest(first).passed
    origin = json.loads((first.folder / "face/config.json").read_text())["training"]
    assert origin["imported"]["from"] == (f"hf:lpmkhoa/hcmusaqua-ntire26-weights@{COMMIT}/{FILES['face']}")
    server.log.clear()
    assert open_bundle("ntire26").hash == first.hash
    assert server.log == []
    assert [p.name for p in first.folder.parent.iterdir()] == [first.folder.name]


# ------------------------------------------------------------------------------------------------ upload
class Uploads:
    """Stands for HfApi and keeps what it is given."""

    made, files = [], {}

    def create_repo(self, repository, **options):
        self.made.append((repository, options))

    def create_commit(self, repository, operations, commit_message):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")


def test_what_is_pushed_can_be_pulled(server, packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Uploads)
    row = {"who": "ensemble", "condition": "clean", "scope": "all", "unit": "image"}
    row |= {"auc": 0.91234, "protocol": "100 pictures of nobody"}
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps({"rows": [row, row | {"who": "global"}]}))
    arguments = ["push", packed.own, "me/mine", "--evaluation", evaluation]
    assert weights.main([str(a) for a in arguments]) == 0
    assert capsys.readouterr().out == "https://hub/me/mine/commit/1\n"
    for name, content in Uploads.files.items():
        path = tmp_path / "uploaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    server.add("me/mine", tmp_path / "uploaded")
    assert weights.main(["pull", "hf:me/mine", "--out", str(tmp_path / "copy")]) == 0
    shutil.rmtree(constants.HF_HOME)
    assert open_bundle(str(tmp_path / "copy")).hash == open_bundle(str(packed.own)).hash
    card = huggingface_hub.ModelCard(Uploads.files["README.md"].decode())
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.metrics == ["roc_auc"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("roc_auc", 0.9123)
    for word in ("100 pictures of nobody", "Intended use", "Degradation protocol"):
        assert word in card.text


def test_a_bundle_that_only_this_machine_can_load_is_not_pushed(tmp_path, packed):
    config = preset("tiny", "face")
    tower = TowerConfig("t", "dinov2", config.tower.arch, source=str(packed.tower))
    made = pack_member(tmp_path / "b", MemberConfig("face", config.view, tower, LORA))
    with pytest.raises(WeightsError, match="only this machine has"):
        store.push(made, "me/mine")
