"""Forty malformed or odd files, each of which once broke somebody's pipeline.

`make_odd_files(folder)` writes them and returns name -> whether its picture can be read. Nothing is left to chance: the
same call writes the same files.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from skimage import data


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def _png(header: tuple, rows: bytes) -> bytes:
    """A PNG from its header fields (width, height, bits, colour type) and its filtered rows."""
    ihdr = struct.pack(">IIBBBBB", *header, 0, 0, 0)
    parts = (
        _chunk(b"IHDR", ihdr),
        _chunk(b"IDAT", zlib.compress(rows)),
        _chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _png_bits16(picture: np.ndarray) -> bytes:
    """An RGB or grey PNG of 16 bits; Pillow cannot write the former."""
    height, width = picture.shape[:2]
    wide = (picture.astype(np.uint32) * 257).astype(">u2").reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    return _png((width, height, 16, 2 if picture.ndim == 3 else 0), rows)


def _turned(face: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _encode(face, "JPEG", exif=exif, quality=90)


def _sound(face: Image.Image) -> dict[str, bytes]:
    """Odd, but every pixel is there."""
    grey, small = face.convert("L"), np.asarray(face)
    alpha = face.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(face.size))
    palette = face.quantize(64)
    keyed = PngImagePlugin.PngInfo()
    keyed.add_text("comment", "x" * 2000)
    turned = face.rotate(90)
    frames = [face.quantize(32), turned.quantize(32)]
    gif = _encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    return {
        "plain.jpg": _encode(face, "JPEG", quality=90),
        "UPPER.JPEG": _encode(face, "JPEG", quality=90),
        "progressive.jpg": _encode(face, "JPEG", progressive=True),
        "grey.jpg": _encode(grey, "JPEG"),
        "cmyk.jpg": _encode(face.convert("CMYK"), "JPEG"),
        "exif_rotated.jpg": _turned(face, 6),
        "exif_mirrored.jpg": _turned(face, 5),
        "exif_nonsense.jpg": _turned(face, 77),
        "animated_gif_called.jpg": gif,
        "png_called.jpg": _encode(face, "PNG"),
        "jpg_called.png": _encode(face, "JPEG"),
        "bits16_grey.png": _png_bits16(np.asarray(grey)),
        "bits16_rgb.png": _png_bits16(small),
        "one_bit.png": _encode(grey.convert("1"), "PNG"),
        "palette.png": _encode(palette, "PNG"),
        "palette_alpha.png": _encode(palette, "PNG", transparency=bytes(range(64))),
        "alpha.png": _encode(alpha, "PNG", pnginfo=keyed),
        "grey_alpha.png": _encode(alpha.convert("LA"), "PNG"),
        "one_pixel.png": _encode(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"),
        "strip_20000x3.png": _encode(face.resize((20000, 3)), "PNG"),
        "picture.webp": _encode(face, "WEBP"),
        "picture.bmp": _encode(face, "BMP"),
        "pages.tif": _encode(face, "TIFF", save_all=True, append_images=[turned]),
        "naïve 脸 🙂.png": _encode(face, "PNG"),
        "long_" + "n" * 240 + ".png": _encode(face, "PNG"),
        'quote",comma.png': _encode(face, "PNG"),
        "new\nline.png": _encode(face, "PNG"),
        "trailing_bytes.png": _encode(face, "PNG") + b"left over" * 50,
    }


def _broken(face: Image.Image) -> dict[str, bytes]:
    """A suffix that promises a picture, and none in it."""
    jpg, png = _encode(face, "JPEG"), _encode(face, "PNG")
    return {
        "zero_bytes.png": b"",
        "truncated.jpg": jpg[: len(jpg) // 2],
        "truncated.png": png[: len(png) // 2],
        "only_a_header.jpg": jpg[:20],
        "text_called.png": b"this is not a picture\n" * 9,
        "bomb_claims_60000x60000.png": _png((60000, 60000, 8, 2), b"\0" * 1000),
        "damaged_pixels.png": _png((64, 64, 8, 2), b"\x05\xff" * 3000),
    }


def make_odd_files(folder: Path) -> dict[str, bool]:
    """Write the forty entries into `folder` (made when missing).

    Returns:
        name -> whether the picture can be read, by the name that its row shows (bytes that do not print are escaped);
        29 can, or 30 for a user whom the permissions of a file do not bind (root).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    face = Image.fromarray(data.astronaut()[:200, 130:330]).resize((96, 96))
    sound, broken = _sound(face), _broken(face)
    for name, content in (sound | broken).items():
        (folder / name).write_bytes(content)
    readable = {name.replace("\n", "\\x0a"): True for name in sound}
    readable |= dict.fromkeys(broken, False)
    readable |= _entries(folder, sound["plain.jpg"])
    assert len(readable) == 40
    return readable


def _entries(folder: Path, jpg: bytes) -> dict[str, bool]:
    """What is odd about the entry rather than about its content."""
    secret = folder / "no_permission.jpg"
    secret.write_bytes(jpg)
    secret.chmod(0)
    (folder / "folder_called_x.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")  # a link to itself
    (folder / "back.png").symlink_to(folder, target_is_directory=True)  # holds itself
    bytewise = os.fsencode(folder) + b"/not_utf8_\xff.jpg"
    with open(bytewise, "wb") as file:
        file.write(jpg)
    return {
        secret.name: os.access(secret, os.R_OK),
        "folder_called_x.png": False,
        "loop.png": False,
        "back.png": False,
        "not_utf8_\\xff.jpg": True,  # as its row shows it
    }
