"""Entry: a page where a person drops pictures or a clip and sees, for each face, a verdict in words and what is behind it.

    python -m solution.app [--weights BUNDLE] [--host 127.0.0.1] [--port 7860]

Needs Gradio (`pip install "gradio>=6,<7"`), which is not among the kit's requirements. Sends nothing anywhere: the page
loads nothing from outside (its Content-Security-Policy forbids it), an upload is deleted once it was judged, and the page
is to be reached from this machine only unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from solution.errors import KitError, door, tell

SHIPPED = Path(__file__).resolve().parents[1] / "weights" / "compact"
INSTALL = 'the page needs Gradio, which is not installed: pip install "gradio>=6,<7"'
FILES = 8  # at once
LARGEST = 200  # MB, of one file
WAITING = 16  # people in the queue
SHOWN = 16  # answers on a page, of several drops
KEPT = 1024  # px, longer side of a picture that is kept, in memory, for Score-CAM
REMEMBERED = 600  # seconds
SESSIONS = 64  # pages of which Gradio keeps in memory what they show
SWEEP = 20, 60  # seconds: how often files are looked for that nobody judged, and how old they may grow
CLOSING = 1  # seconds that open pages have at the end
CHANNELS = 32  # of Score-CAM
UPLOADS = "kit-uploads-"  # and the number of the process: the folder of its uploads
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; base-uri 'self'; form-action 'self'"
)
HEAD = """# Does this face look fake?
Drop pictures or a clip: every face gets a verdict. What you drop is read on the machine that serves this page and sent no
further. Its file is deleted once it was judged, or soon after where it was refused; what this page shows of it
stays in that machine's memory for a while. At most {files} files at once, of {largest} MB each (one that is larger
refuses the whole drop), clips of up to {minutes:.0f} minutes."""
# A screen reader says what changes there.
SPOKEN = """() => document.getElementById("said").setAttribute("aria-live", "polite")"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m solution.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", default=str(SHIPPED), help="as of submit.py (default: weights/compact)")
    add("--host", default="127.0.0.1", help="address to bind to; 0.0.0.0: reachable from other machines")
    add("--port", type=int, default=7860)
    add("--device", default="auto", help="as of submit.py")
    return parser


# ------------------------------------------------------------------------------------------------ what a drop does
class Upload(NamedTuple):
    """A dropped file: where Gradio put it, and a link to it in a folder of its own.

    Gradio puts equal files of two people into one place, the later over the earlier.
    """

    theirs: Path
    own: Path

    @property
    def name(self) -> str:
        """The file's."""
        return self.own.name

    def forget(self) -> None:
        """Delete it; but not what someone else put into its place."""
        with contextlib.suppress(FileNotFoundError):
            if self.theirs.samefile(self.own):
                self.theirs.unlink()
        shutil.rmtree(self.own.parent, ignore_errors=True)


@dataclass
class Visit:
    """One open page. waiting: what it dropped and nobody read yet. left: files beyond `FILES`, not taken.

    stops, clears: how often that was asked for; what is under way ends when a number changes.
    """

    waiting: list[Upload] = field(default_factory=list)
    left: int = 0
    stops: int = 0
    clears: int = 0

    def forget(self) -> None:
        """Delete what waits."""
        while self.waiting:
            self.waiting.pop().forget()


Step = tuple[Any, Any, Any]  # what the page shows: answers as HTML, the answers, what is said of the work as HTML
SAME: Step = ({"__type__": "update"},) * 3  # as `gradio.skip`: the page stays as it is


class Room:
    """One loaded ensemble, and what is said of files by it. For one event at a time, but `take`, `stop` and `clear`."""

    def __init__(self, weights: str, device: str, uploads: Path) -> None:
        """uploads: the folder that they are under; no other file is read."""
        from solution.bundles.store import open_bundle
        from solution.data.faces import FaceLocator
        from solution.evaluation.answers import Examiner
        from solution.evaluation.explainer import Explainer
        from solution.scoring.ensemble import load_ensemble, voters

        self.uploads = uploads.resolve()
        bundle = open_bundle(weights, report=tell)
        self.ensemble = load_ensemble(bundle, device, members=voters(bundle))
        tell(f"{bundle.name} {bundle.hash[:12]}: {self.ensemble.describe()}")
        faces = FaceLocator.available()
        if not faces:
            tell("no face detector is installed: whole pictures are judged")
        self.examiner = Examiner(self.ensemble, bundle, faces=faces)
        self.quick, self.thorough = (Explainer(self.ensemble, channels, faces=faces) for channels in (0, CHANNELS))

    def take(self, files: Sequence[str] | None, visit: Visit) -> tuple[None, Visit, str]:
        """Take a drop out of Gradio's hands at once: the emptied list of files, the visit, and what is said."""
        self._sweep()
        paths = [path for path in map(Path, files or ()) if self._uploaded(path)]
        free = max(0, FILES - len(visit.waiting))
        for path in paths[:free]:
            own = Path(tempfile.mkdtemp(dir=self.uploads)) / path.name
            os.link(path, own)
            visit.waiting.append(Upload(path, own))
        for path in paths[free:]:
            path.unlink(missing_ok=True)
        visit.left = len(paths[free:])
        return None, visit, _said([f"{upload.name} waits for its turn." for upload in visit.waiting])

    def _sweep(self) -> None:
        """Delete what broken uploads left: Gradio itself deletes what arrived and nobody took."""
        for path in self.uploads.iterdir():
            with contextlib.suppress(OSError):
                if path.is_file() and time.time() - path.stat().st_mtime > sum(SWEEP):
                    path.unlink()

    def _uploaded(self, path: Path) -> bool:
        """Whether it is a file that came with a drop and is still there."""
        return path.resolve().is_relative_to(self.uploads) and path.is_file()

    def dropped(self, visit: Visit, earlier: list[Any]) -> Iterator[Step]:
        """Verdicts of what waits as they come, then degraded copies and maps; above the `earlier` answers."""
        from solution.evaluation.answers import announced

        asked = visit.stops, visit.clears
        answers: list[Any] = []
        if not visit.waiting:  # the drop before took its files along
            yield SAME
            return

        def step(work: Sequence[str], *, done: bool = False) -> Step:
            shown = [*answers, *earlier][:SHOWN]
            return self.examiner.html(shown, pending=not done), shown, _said([*map(announced, answers), *work])

        while (waiting := list(visit.waiting)) and asked == (visit.stops, visit.clears):
            upload, *others = waiting
            number = len(answers) + 1
            reading = f"Reading {upload.name} ({number} of {number + len(others)}) ..."
            yield step([reading, *(f"{other.name} waits." for other in others)])
            if upload not in visit.waiting:  # stopped meanwhile
                break
            visit.waiting.remove(upload)
            try:
                answers.append(self.examiner.examine(upload.own, upload.name))
            finally:
                upload.forget()
        for number, answer in enumerate(answers, 1):
            if asked == (visit.stops, visit.clears):
                yield step([f"Looking closer at {answer.name} ({number} of {len(answers)}) ..."])
            for face in answer.examined:
                if asked == (visit.stops, visit.clears):
                    self.examiner.degrade(face)
                    face.maps = self._maps(face, self.quick)
            _shrink(answer)
        left = [f"{visit.left} more files were not judged: at most {FILES} at once."] if visit.left else []
        yield step(left, done=True) if visit.clears == asked[1] else SAME

    def stop(self, visit: Visit) -> str:
        """End what is under way for a page after its present step; what waits is deleted. What is said."""
        visit.stops += 1
        visit.forget()
        return _said(["Stopped: what was begun is still finished, nothing else."])

    def clear(self, visit: Visit) -> Step:
        """Forget everything that a page dropped."""
        visit.clears += 1
        visit.forget()
        return self.examiner.html([]), [], ""

    def asked_why(self, visit: Visit, answers: list[Any]) -> Iterator[Step]:
        """Score-CAM of what the page shows, face by face."""
        if not answers:
            nothing = "Drop a picture first; what was dropped is forgotten after ten minutes."
            yield self.examiner.html([]), [], _said([nothing])
            return
        asked = visit.stops, visit.clears
        faces = [(answer.name, face) for answer in answers for face in answer.examined]
        for number, (name, face) in enumerate(faces, 1):
            yield (
                self.examiner.html(answers, pending=True),
                answers,
                _said([f"Score-CAM of {name}, face {number} of {len(faces)} ..."]),
            )
            if asked != (visit.stops, visit.clears):
                break
            face.maps = self._maps(face, self.thorough)
        yield (self.examiner.html(answers), answers, "") if visit.clears == asked[1] else SAME

    def _maps(self, face: Any, explainer: Any) -> dict[str, Any]:
        from solution.evaluation.explainer import see_found
        from solution.evaluation.pages import card

        views, chosen = self.examiner.views_of(face.picture, face.face, face.several)
        boxes = {config: [face.face] if face.face else [] for config in chosen}
        return card(explainer.explain_seen("", face.picture, see_found(face.picture, views, boxes)))


def _said(lines: Sequence[str]) -> str:
    """Lines as HTML."""
    return "<br>".join(map(html.escape, lines))


def _shrink(answer: Any) -> None:
    """Keep of the pictures in an answer at most `KEPT` px, each once."""
    pictures = {id(face.picture): face.picture for face in answer.faces}
    small = {key: _smaller(picture) for key, picture in pictures.items()}
    for face in answer.faces:
        face.picture, scale = small[id(face.picture)]
        face.face = face.face and face.face._replace(
            **{side: scale * getattr(face.face, side) for side in ("x0", "y0", "x1", "y1")}, landmarks=None
        )


def _smaller(picture: Any) -> tuple[Any, float]:
    """A picture of at most `KEPT` px, and what it was scaled by."""
    from solution.data.images import resize_image

    height, width = picture.shape[:2]
    scale = min(1.0, KEPT / max(height, width))
    return resize_image(picture, max(1, round(width * scale)), max(1, round(height * scale))), scale


# ------------------------------------------------------------------------------------------------ the page
def build(room: Room):
    """The page as Gradio's Blocks, its queue limited to one event at a time."""
    import gradio

    from solution.data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES
    from solution.evaluation.answers import LONGEST

    with gradio.Blocks(title="Does this face look fake?", analytics_enabled=False, delete_cache=SWEEP) as page:
        gradio.Markdown(HEAD.format(files=FILES, largest=LARGEST, minutes=LONGEST / 60))
        files = gradio.File(
            file_count="multiple",
            file_types=sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES),
            label="Pictures or a clip",
            elem_id="files",
            height=220,
        )
        files.async_move_resource_to_block_cache = _never_fetched
        with gradio.Row():
            why = gradio.Button(
                "Show what drove the scores (Score-CAM, slow)", elem_id="why", size="sm", interactive=False
            )
            stop = gradio.Button("Stop", elem_id="stop", size="sm")
            clear = gradio.Button("Clear", elem_id="clear", size="sm")
        said = gradio.HTML("", elem_id="said")
        answers = gradio.HTML(room.examiner.html([]), elem_id="answers")
        visit = gradio.State(Visit(), delete_callback=Visit.forget)
        kept = gradio.State([], time_to_live=REMEMBERED)
        shown = [answers, kept, said]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        at_once = private | {"queue": False, "trigger_mode": "multiple"}
        in_turn = private | {"concurrency_id": "ensemble", "concurrency_limit": 1}
        taken = files.upload(room.take, [files, visit], [files, visit, said], **at_once)
        judged = taken.then(room.dropped, [visit, kept], shown, trigger_mode="multiple", **in_turn)
        explained = why.click(room.asked_why, [visit, kept], shown, **in_turn)
        stop.click(room.stop, visit, said, **at_once)
        cleared = [event(room.clear, visit, shown, **at_once) for event in (clear.click, files.clear)]
        for event in (judged, explained, *cleared):
            event.then(lambda kept: gradio.update(interactive=bool(kept)), kept, why, **at_once)
        page.load(None, js=SPOKEN)
    # Mounted, not launched: without this Gradio takes any path of this machine for an upload.
    page.has_launched = True
    page.state_session_capacity = SESSIONS
    return page.queue(max_size=WAITING, api_open=False)


async def _never_fetched(path: str | Path | None) -> str | None:
    """What a client names as its upload, once Gradio found that it is one; addresses it would fetch.

    Raises:
        KitError: it is an address.
    """
    if path is not None and "://" in str(path):
        raise KitError("only uploaded files are judged, no addresses")
    return path if path is None else str(path)


class _Policy:
    """ASGI middleware: every answer forbids the browser to load anything from elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, sealed)


def web_app(room: Room):
    """The page as an ASGI application; the kit's own look: fonts of the system, none from outside."""
    import gradio
    from fastapi import FastAPI

    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        build(room),
        "/",
        max_file_size=f"{LARGEST}mb",
        app_kwargs={"openapi_url": None},
        ssr_mode=False,
        footer_links=[],
        theme=theme,
    )
    app.add_middleware(_Policy)
    return app


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise KitError(f"{host} port {port}: {error}; name another with --host, --port") from None


def _delete_stale() -> None:
    """Delete the uploads of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{UPLOADS}*"):
        number = folder.name.removeprefix(UPLOADS).partition("-")[0]
        # Elsewhere than on POSIX, the signal 0 is no question.
        if os.name == "posix" and number.isdecimal():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except (OSError, OverflowError):
                continue  # another user's, or no process's


def _serve(app: Any, room: Room, host: str, port: int) -> None:
    """Serve until interrupted, by Ctrl-C or by the system; what is being read then is given up.

    Raises:
        KeyboardInterrupt: that is how it ends.
        KitError: the port is not to be had.
    """
    import uvicorn

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Its log would have a traceback for every page that is open at the end.
    config = uvicorn.Config(app, host=host, port=port, log_level="critical", timeout_graceful_shutdown=CLOSING)
    server = uvicorn.Server(config)
    noted = server.handle_exit

    def closing(number: int, frame: Any) -> None:
        room.examiner.files.process.terminate()
        noted(number, frame)

    server.handle_exit = closing
    try:
        server.run()
    except SystemExit:
        raise KitError(f"{host} port {port} was taken meanwhile; name another with --host, --port") from None
    raise KeyboardInterrupt  # where the shell that started it has signals ignored


@door("app", interrupted="closed")
def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; 3 where Gradio, the weights or the port are not to be had."""
    args = _parser().parse_args(argv)
    _delete_stale()
    with tempfile.TemporaryDirectory(prefix=f"{UPLOADS}{os.getpid()}-") as uploads:
        # Read when Gradio is imported: where uploads go, and that nobody is told of its use, nor the browser's history.
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_RUN_HISTORY"] = "False"
        try:
            import gradio  # noqa: F401
            import uvicorn  # noqa: F401
        except ModuleNotFoundError as error:
            raise KitError(INSTALL) from error
        _check_port(args.host, args.port)
        room = Room(args.weights, args.device, Path(uploads))
        app = web_app(room)
        host = f"[{args.host}]" if ":" in args.host else args.host
        tell(f"open http://{host}:{args.port} (Ctrl-C closes it)")
        _serve(app, room, args.host, args.port)
    return 0


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    os._exit(ended)  # at once: a thread may still be computing what nobody waits for
