"""Makes tests/fixtures/h264.mp4: 600 numbered frames in H.264 as cameras write it, which OpenCV's wheels cannot.

    pip install av && python tests/make_clip.py

The clip is committed; this file says how it came to be and makes it again. Nothing else needs PyAV.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

CLIP = Path(__file__).parent / "fixtures" / "h264.mp4"
FRAMES = 600


def coded_frame(number: int) -> np.ndarray:
    """A picture (48, 160, 3) uint8 that says its number in ten black and white blocks."""
    frame = np.full((48, 160, 3), 90, np.uint8)
    for bit in range(10):
        frame[8:40, 16 * bit : 16 * bit + 16] = 255 if number >> bit & 1 else 0
    return frame


def read_code(frame: np.ndarray) -> int:
    """The number that a frame says."""
    return sum(int(frame[24, 16 * bit + 8].mean() > 128) << bit for bit in range(10))


def make_clip(path: Path) -> None:
    """Keyframes 250 apart with B-frames between, so that a seek lands far before what it was asked for."""
    import av

    with av.open(path, "w") as file:
        options = {"g": "250", "bf": "3", "sc_threshold": "0", "crf": "30"}
        stream = file.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 160, 48, "yuv420p"
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(coded_frame(number), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


if __name__ == "__main__":
    make_clip(CLIP)
