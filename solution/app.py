"""Entry: a page where a person drops pictures or a clip and sees, for each face, a verdict in words and what is behind it.

    python -m solution.app [--weights BUNDLE] [--host 127.0.0.1] [--port 7860]

Needs Gradio (`pip install "gradio>=6,<7"`), which is not among the kit's requirements. Sends nothing anywhere: the page
loads nothing from outside (its Content-Security-Policy forbids it), uploads are deleted once they were read, and it is
to be reached from this machine only unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from solution.errors import KitError, door, tell

SHIPPED = Path(__file__).resolve().parents[1] / "weights" / "compact"
INSTALL = 'the page needs Gradio, which is not installed: pip install "gradio>=6,<7"'
FILES = 8  # at once
LARGEST = 200  # MB, of one file
WAITING = 16  # people in the queue
KEPT = 1024  # px, longer side of a picture that is kept, in memory, for Score-CAM
REMEMBERED = 600  # seconds
CHANNELS = 32  # of Score-CAM
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; base-uri 'self'; form-action 'self'"
)
HEAD = """# Does this face look fake?
Drop pictures or a clip: every face gets a verdict. What you drop is read on the machine that serves this page, sent no
further, and deleted once it was read. At most {files} files of {largest} MB, clips of up to {minutes:.0f} minutes."""


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
class Room:
    """One loaded ensemble, what is said of files by it, and what is remembered for Score-CAM. For one event at a time."""

    def __init__(self, weights: str, device: str) -> None:
        from solution.bundles.store import open_bundle
        from solution.data.faces import FaceLocator
        from solution.evaluation.answers import Examiner
        from solution.evaluation.explainer import Explainer
        from solution.scoring.ensemble import load_ensemble, voters

        bundle = open_bundle(weights, report=tell)
        self.ensemble = load_ensemble(bundle, device, members=voters(bundle))
        tell(f"{bundle.name} {bundle.hash[:12]}: {self.ensemble.describe()}")
        faces = FaceLocator.available()
        if not faces:
            tell("no face detector is installed: whole pictures are judged")
        self.examiner = Examiner(self.ensemble, bundle, faces=faces)
        self.quick, self.thorough = (Explainer(self.ensemble, channels, faces=faces) for channels in (0, CHANNELS))

    def dropped(self, files: Sequence[str] | None) -> Iterator[tuple[str, list[Any]]]:
        """Verdicts as they come, then degraded copies and maps: (HTML, what is kept) each time. Deletes the files."""
        paths = [Path(f) for f in files or ()]
        answers: list[Any] = []
        examiner = self.examiner
        examiner.start()
        try:
            for path in paths[:FILES]:
                answers.append(examiner.examine(path, path.name))
                yield examiner.html(answers, pending="Looking closer ..."), []
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
        for answer in answers:
            for face in self._examined(answer):
                examiner.degrade(face)
                face.maps = self._maps(face, self.quick)
            yield examiner.html(answers, pending="Looking closer ..."), []
        for answer in answers:
            for face in answer.faces:
                face.picture, face.face = _smaller(face.picture, face.face)
        left = (
            f"{len(paths) - FILES} more files were not judged: at most {FILES} at once." if len(paths) > FILES else ""
        )
        yield examiner.html(answers) + (f"<p>{left}</p>" if left else ""), [answers, list(examiner.rows)]

    def asked_why(self, kept: list[Any]) -> Iterator[tuple[str, list[Any]]]:
        """Score-CAM of what was dropped last, face by face."""
        if not kept:
            yield (
                self.examiner.html(
                    [], pending="Drop a picture first; what was dropped is forgotten after ten minutes."
                ),
                [],
            )
            return
        answers, self.examiner.rows = kept
        for answer in answers:
            for face in self._examined(answer):
                face.maps = self._maps(face, self.thorough)
                yield self.examiner.html(answers, pending="Score-CAM ..."), kept
        yield self.examiner.html(answers), kept

    def _examined(self, answer: Any) -> list[Any]:
        from solution.evaluation.answers import EXAMINED

        return answer.faces[:EXAMINED]

    def _maps(self, face: Any, explainer: Any) -> dict[str, Any]:
        from solution.evaluation.explainer import see_found
        from solution.evaluation.pages import card

        views, chosen = self.examiner.views_of(face.picture, face.face, face.several)
        boxes = {config: [face.face] if face.face else [] for config in chosen}
        return card(explainer.explain_seen("", face.picture, see_found(face.picture, views, boxes)))


def _smaller(picture: Any, face: Any) -> tuple[Any, Any]:
    """A picture of at most `KEPT` px, and the box in it."""
    from solution.data.images import resize_image

    height, width = picture.shape[:2]
    scale = min(1.0, KEPT / max(height, width))
    small = resize_image(picture, max(1, round(width * scale)), max(1, round(height * scale)))
    return small, face and face._replace(
        **{side: scale * getattr(face, side) for side in ("x0", "y0", "x1", "y1")}, landmarks=None
    )


# ------------------------------------------------------------------------------------------------ the page
def build(room: Room):
    """The page as Gradio's Blocks, its queue limited to one event at a time."""
    import gradio

    from solution.data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES
    from solution.evaluation.answers import LONGEST

    with gradio.Blocks(
        title="Does this face look fake?", analytics_enabled=False, delete_cache=(60, REMEMBERED)
    ) as page:
        gradio.Markdown(HEAD.format(files=FILES, largest=LARGEST, minutes=LONGEST / 60))
        files = gradio.File(
            file_count="multiple",
            file_types=sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES),
            label="Pictures or a clip",
            elem_id="files",
            height=220,
        )
        why = gradio.Button("Show what drove the scores (Score-CAM, slow)", elem_id="why", size="sm")
        answers = gradio.HTML(room.examiner.html([]), elem_id="answers")
        kept = gradio.State([], time_to_live=REMEMBERED)
        one = {
            "concurrency_id": "ensemble",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress": "minimal",
        }
        files.upload(room.dropped, files, [answers, kept], **one)
        why.click(room.asked_why, kept, [answers, kept], **one)
    return page.queue(max_size=WAITING, api_open=False)


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
        FastAPI(), build(room), "/", max_file_size=f"{LARGEST}mb", ssr_mode=False, footer_links=[], theme=theme
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


@door("app", interrupted="closed")
def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; 3 where Gradio, the weights or the port are not to be had."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="uploads-") as uploads:
        # Read when Gradio is imported: where uploads go, and that nobody is told of its use.
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ModuleNotFoundError as error:
            raise KitError(INSTALL) from error
        _check_port(args.host, args.port)
        app = web_app(Room(args.weights, args.device))
        host = f"[{args.host}]" if ":" in args.host else args.host
        tell(f"open http://{host}:{args.port} (Ctrl-C closes it)")
        uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
