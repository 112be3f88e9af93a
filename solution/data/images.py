"""Find pictures and videos; decode pictures to uint8 RGB HWC, or fail naming the file.

Takes paths; returns `Input` records and (H, W, 3) uint8 RGB arrays, row 0 at the top as a viewer shows the picture.
Pictures go through Pillow: OpenCV's JPEG decoder gives the same pixels 1.4 times as fast (0.19 ms against 0.27 ms on
224 px faces), but fills what a truncated file lacks with grey and does not say so. With a JPEG that was cut and then
closed with an end marker (FFD9) both do: libjpeg only warns, and neither Pillow, OpenCV nor torchvision hands that on.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, overload

import cv2
import numpy as np
from PIL import Image, ImageFile, features

from solution.data.labels import LABEL_COLUMNS, PATH_COLUMNS, label_of
from solution.errors import KitError, UsageError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"}
)
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow's names
# The brands in the first box of an AVIF and of a HEIC file.
_AVIF, _HEIF = {b"avif", b"avis"}, {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}
MAX_PIXELS = 1 << 27  # 134 M: a 108-megapixel phone picture passes, 400 MB decoded

_TURN = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_DIMMEST_MASK = 16  # of 255; below it the values of a mask are numbers of classes
# What this kit draws into a folder, by the file that it writes there too: reports, explanations, prepared data sets.
_DRAWN = {
    "report.json": re.compile("figures"),
    "evaluation.json": re.compile("figures"),
    "explain.html": re.compile(r"contact(-\d+)?\.png"),
    "prepared.jsonl": re.compile(r"preview\.png|masks"),
}
_LABELLED = re.compile(r"(.*?)[\t ,;]+([^\t ,;]+)")  # a path, what separates, and the last word
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # how `https://` begins where pathlib has had it
_DOWNLOAD = "not a path; nothing is fetched from the net here: download it first and give the file's path"
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class InputError(UsageError):
    """Nothing to score, or a list that cannot be read: names the path, what was found and what was expected."""


class UnreadableInput(KitError):
    """One picture or video that cannot be read: `path`, and `reason` (what was found, what was expected)."""

    def __init__(self, path: Path | str, reason: str = "") -> None:
        # A loader's worker hands on its message alone, as the first argument.
        super().__init__(path, reason)  # both, so that it survives pickling to and fro
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return ": ".join(filter(None, (printable(str(self.path)), self.reason)))


class Input(NamedTuple):
    """One thing to score. `name` is its POSIX path relative to the input folder: scores join by it."""

    name: str
    path: Path
    kind: str  # "image" or "video"


class Inputs(Sequence[Input]):
    """A read-only list of `Input` that keeps names only, so that a million of them cost about 100 MB and no more.

    passed_over: how many files of a folder are no inputs, by suffix; under `hidden` the dot files, dot folders and
    `__MACOSX` folders; under `output` the pictures that an earlier run of this kit left there (`is_output`).
    notes: what else a reader should hear of a list, a line each.
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        renamed: dict[str, str],
        passed_over: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self._root, self._names, self._renamed = root, names, renamed
        self.passed_over, self.notes = dict(passed_over or {}), tuple(notes)

    def passed(self) -> str:
        """What was passed over, in words: `12 files passed over: 9 hidden, 3 .txt`; empty where nothing was."""
        parts = [f"{n} {what}" for what, n in sorted(self.passed_over.items(), key=lambda entry: (-entry[1], entry[0]))]
        more = f", and of {len(parts) - 12} more kinds" if len(parts) > 12 else ""
        said = f"{sum(self.passed_over.values())} files passed over: {', '.join(parts[:12])}{more}"
        return printable(said) if parts else ""

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Input: ...
    @overload
    def __getitem__(self, index: slice) -> Inputs: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Inputs(self._root, self._names[index], self._renamed, self.passed_over, self.notes)
        name = self._names[index]
        return Input(name, self._root / self._renamed.get(name, name), kind_of(name))


def kind_of(name: str) -> str:
    """What a name's suffix promises: `video`, else `image`."""
    return "video" if _suffix(name) in VIDEO_SUFFIXES else "image"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def printable(name: str) -> str:
    r"""`name` with control characters and bytes that are not UTF-8 written as \xNN; equal when there are none."""
    return _UNPRINTABLE.sub(lambda m: f"\\x{ord(m[0]) & 0xFF:02x}", name)


def is_media(name: str) -> bool:
    """Whether a name's suffix promises a picture or a video."""
    return _suffix(name) in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def labelled(line: str) -> tuple[str, str]:
    """The path and the label of a list's line such as `a.jpg 0`, with blanks, a tab, `,` or `;` between; the label is ""
    in a line without one. Quotes around either are left out.
    """
    found = _LABELLED.fullmatch(line.strip())
    path, label = found.groups() if found else (line.strip(), "")
    if is_media(label.strip("\"'")):  # the end of a name with blanks in it
        path, label = line.strip(), ""
    return path.strip("\"'"), label.strip("\"'")


def heads_labels(line: str) -> bool:
    """Whether a line is the header of such lines: `image label`."""
    path, label = labelled(line.lower())
    return path in PATH_COLUMNS and label in LABEL_COLUMNS


def stable_seed(name: str) -> int:
    """A 32-bit number that depends on the name alone: what is drawn for a picture is drawn from it."""
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))


# ---------------------------------------------------------------------------------------------------- finding
def find_inputs(source: Path) -> Inputs:
    """The pictures and videos that `source` names, sorted by name.

    source: a folder (walked with its sub-folders and links), a picture, a video, or a .txt file with one path a line
        (relative to the list's folder; or one path before each NUL, as `find -print0` writes; blank lines are skipped,
        and lines that begin with # and name no file; what it names is taken for a picture unless its suffix says
        video). Where a line as it stands names no file, blanks at its end and quotes around it are left out and `\\`
        is read as `/`, if that names one. UTF-8, or UTF-16 with its mark. Labels after the paths (`a.jpg 0`) are left
        out, and `Inputs.notes` says so.

    Dot files, dot folders, `__MACOSX` and what this kit itself wrote into a folder are passed over
    (`Inputs.passed_over`).
    What a suffix of `IMAGE_SUFFIXES` or `VIDEO_SUFFIXES` promises is listed even if it turns out unreadable, an empty
    folder called x.png included. A name with control characters or bytes that are not UTF-8 is written with \\xNN.

    Raises:
        InputError: nothing there, nothing to score in it, a folder that may not be read, a name listed twice, or an
            address (`https://...`) in place of a path.
    """
    source = Path(source)
    try:
        mode = source.stat().st_mode
    except OSError as error:
        if _ADDRESS.match(source.as_posix()):
            raise InputError(f"{printable(str(source))} is an address, {_DOWNLOAD}") from None
        raise InputError(
            f"{printable(str(source))}: {error.strerror or error}; expected a folder, a picture, a video, "
            "or a .txt list of paths"
        ) from None
    if stat.S_ISDIR(mode):
        passed: Counter[str] = Counter()
        names = _walk(str(source), passed)
        if not names:
            known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise InputError(f"{source}: no pictures or videos in it; looked for {known}")
        return _inputs(source, names, passed)
    if _suffix(source.name) == ".txt":
        names, notes = _read_list(source)
        return _inputs(source.parent, names, notes=notes)
    if _suffix(source.name) in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return _inputs(source.parent, [source.name])
    known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    raise InputError(
        f"{printable(str(source))}: suffix {source.suffix!r} is not known; expected a folder, "
        f"a .txt list of paths, or one of {known}"
    )


def _inputs(
    root: Path, names: list[str], passed_over: Mapping[str, int] | None = None, notes: Sequence[str] = ()
) -> Inputs:
    """Names as the file system has them -> `Inputs` whose names print and are unique."""
    taken, renamed, shown = set(names), {}, []
    for name in sorted(names):
        clean = printable(name)
        if clean != name:
            while clean in taken:  # a file may really be called a\x0ab.png
                clean = "_" + clean
            taken.add(clean)
            renamed[clean] = name
        shown.append(clean)
    return Inputs(root, sorted(shown), renamed, passed_over, notes)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the data: a dot file or folder, or what macOS packs beside it."""
    return name.startswith(".") or name == "__MACOSX"


def is_output(name: str, siblings: Container[str]) -> bool:
    """Whether a file or folder is what this kit draws, told by what it writes beside it: figures, maps, previews, masks."""
    return any(mark in siblings and drawn.fullmatch(name) for mark, drawn in _DRAWN.items())


class _Folder(NamedTuple):
    """A folder to be walked.

    prefix: of the names in it. above: device and inode of each folder around it. called_so: which of it and those
    around it have the suffix of an input, by name.
    """

    path: str
    prefix: str
    above: frozenset[tuple[int, int]]
    called_so: tuple[str, ...]


def _walk(top: str, passed: Counter[str]) -> list[str]:
    """POSIX names below the folder `top`, relative to it; what is no input is counted in `passed`.

    A link to one of the folders around it is not followed. No recursion: folders may lie in each other by the thousand.
    """
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    names: list[str] = []
    called_so: dict[str, tuple[str, ...]] = {}  # by name, folders with the suffix of an input; as `_Folder.called_so`
    filled: set[str] = set()  # those of them that have an input in them
    waiting = [_Folder(top, "", frozenset(), ())]
    while waiting:
        folder = waiting.pop()
        try:
            here = os.stat(folder.path)
            inside = folder.above | {(here.st_dev, here.st_ino)}
            entries = list(os.scandir(folder.path)) if inside != folder.above else []
        except OSError as error:
            raise InputError(f"{printable(folder.path)}: {_why_not_walked(error)}") from None
        siblings = {entry.name for entry in entries}
        for entry in entries:
            name, suffix = folder.prefix + entry.name, _suffix(entry.name)
            if is_hidden(entry.name) or is_output(entry.name, siblings):
                passed["hidden" if is_hidden(entry.name) else "output"] += 1
            elif _is_folder(entry):
                around = folder.called_so
                if suffix in known:
                    called_so[name] = around
                    around = (*around, name)
                waiting.append(_Folder(entry.path, f"{name}/", inside, around))
            elif suffix in known:
                names.append(name)
                filled.update(folder.called_so)
            else:
                passed[suffix or "no suffix"] += 1
    for name, around in reversed(called_so.items()):  # the inner ones first
        if name not in filled:
            names.append(name)
            filled.update(around)
    return names


def _why_not_walked(error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return "longer than a path may be here; move what is in it further up, or give its folders shorter names"
    return f"{error.strerror or error}; a folder that cannot be read may hide pictures: make it readable or take it out"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points at itself: no folder, and its suffix says whether it is listed
        return False


def _read_list(source: Path) -> tuple[list[str], list[str]]:
    """The paths of a list, and what is to be said of it."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source}: begins as UTF-16 does, but is not ({error.reason}); save it as UTF-8"
            ) from None
    else:
        text = content.decode("utf-8-sig", errors="surrogateescape")
    lines = []
    for number, line in enumerate(text.split("\0" if "\0" in text else "\n"), start=1):
        line = as_file(source.parent, line.strip("\n") if "\0" in text else line.rstrip("\r"))
        if not line.strip() or _is_comment(source.parent, line):
            continue
        if "://" in line and not os.path.exists(source.parent / line):
            raise InputError(f"{source}, line {number}: {printable(line)!r} is an address, {_DOWNLOAD}")
        lines.append((number, line))
    lines, notes = _without_labels(source, lines)
    seen: dict[str, int] = {}
    for number, line in lines:
        name = PurePosixPath(line).as_posix()
        if name in seen:
            raise InputError(
                f"{source}, line {number}: {printable(name)} stands on line {seen[name]} already; "
                "scores join by name, so list each picture once"
            )
        seen[name] = number
    if not seen:
        raise InputError(f"{source}: the list is empty; expected one path a line")
    return list(seen), notes


def _is_comment(folder: Path, line: str) -> bool:
    """Whether a line begins with # and is not the name of a file in `folder`, with or without a label behind it."""
    return line.startswith("#") and not any(os.path.isfile(folder / name) for name in (line, labelled(line)[0]))


def _without_labels(source: Path, lines: list[tuple[int, str]]) -> tuple[list[tuple[int, str]], list[str]]:
    """The lines (number, text) without the labels behind their paths, where all have one; and a note that says so."""
    folder, cut, plain, labels = source.parent, [], [], Counter()
    for number, line in lines:
        path, label = labelled(line)
        word, _, rest = line.strip().partition(" ")
        if not label and rest and label_of(word) is not None and os.path.exists(folder / rest.strip()):
            path, label = rest.strip(), word  # as Celeb-DF writes it
        path = as_file(folder, path)
        # A line that names a file is its name, whatever it ends in.
        if not label or os.path.exists(folder / line):
            plain.append((number, line))
        elif label_of(label) is not None:
            cut.append((number, path))
            labels[label] += 1
        elif os.path.exists(folder / path) and not heads_labels(line):
            raise InputError(
                f"{source}, line {number}: no file is called {printable(line)!r}, though {printable(path)!r} is there; "
                f"a line has one path, with perhaps a label behind it, and {label!r} is none"
            )
        elif number != lines[0][0] or not heads_labels(line):
            plain.append((number, line))
    if not any(os.path.exists(folder / path) for _, path in cut):
        return lines, []
    if plain:
        raise InputError(
            f"{source}: line {cut[0][0]} has a label behind its path, and line {plain[0][0]} has none "
            f"({printable(plain[0][1])!r}); give each line one, or none"
        )
    said = ", ".join(f"{label} on {count}" for label, count in labels.most_common(4))
    note = f"{source}: the labels behind its paths ({said} lines) are not read: scores come from the pictures alone"
    return cut, [note]


def as_file(folder: Path, line: str) -> str:
    """A path as a list writes it, or where only so it is a file in `folder`: without the blanks and quotes around it, with
    `/` for a backslash, or with its accents composed otherwise (macOS takes letters apart).
    """
    plain = line.strip()
    if plain[:1] == plain[-1:] and plain[:1] in ("'", '"') and len(plain) > 2:
        plain = plain[1:-1]
    if (plain == line and "\\" not in line and line.isascii()) or os.path.lexists(folder / line):
        return line
    slashes = plain.replace("\\", "/")
    for changed in (plain, slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))):
        if os.path.exists(folder / changed):
            return changed
    return line


# ---------------------------------------------------------------------------------------------------- pictures
def decode_image(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture at `path` as (H, W, 3) uint8 RGB.

    The content decides, not the suffix (a GIF or a multi-page TIFF gives its first frame). EXIF orientation is
    applied; grey, palette, YCbCr and CMYK become RGB (an embedded colour profile is not applied); 16 bits are scaled
    to 8; transparent parts become black, as the padding of a face crop is.

    max_pixels: larger pictures are refused before they are decoded (Pillow itself refuses above 179 M).

    Raises:
        UnreadableInput: no regular file, no picture, truncated (never a part of a picture), damaged, too large. What
            the decoder conceals is not told: of a JPEG that was cut and then closed with an end marker, the lost part
            comes grey (of a progressive one, blurred).
    """
    with open_regular(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is either harmless or refused here
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # a process-wide switch that some libraries leave on
        try:
            formats = _formats(path, file)
            with Image.open(file, formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise UnreadableInput(
                        path,
                        f"{image.width}x{image.height} px; at most {max_pixels} px",
                    )
                image.load()
                return _to_rgb(_upright(image))
        except UnreadableInput:
            raise
        except Image.UnidentifiedImageError:
            if formats != FORMATS:
                kind = {"AVIF": "AVIF", "HEIF": "HEIC"}[formats[-1]]
                raise UnreadableInput(path, f"damaged or truncated {kind} picture") from None
            raise UnreadableInput(path, f"not a picture of a kind read here ({', '.join(FORMATS)})") from None
        except Image.DecompressionBombError as error:
            raise UnreadableInput(path, f"too large: {error}") from None
        except Exception as error:  # Pillow's plugins raise anything on damaged files
            raise UnreadableInput(path, f"damaged picture ({type(error).__name__}: {error})") from error


def decode_mask(path: Path | str) -> np.ndarray:
    """The forgery mask at `path` as (H, W) float32 in [0, 1], 1 where forged.

    Grey from 0 to 255, or 0 and 1, or black and one other colour, which marks what is forged.

    Raises:
        UnreadableInput: see `decode_image`; several colours, or grey values that say classes rather than how forged.
    """
    image = decode_image(path)
    grey = image[:, :, 0]
    if (image != grey[:, :, None]).any():
        lit = image.reshape(-1, 3)[image.any(axis=2).ravel()]
        if (lit != lit[0]).any():
            raise UnreadableInput(
                path, "a mask of several colours; expected grey, 0 for what is real to 255 for forged"
            )
        return image.any(axis=2).astype(np.float32)
    highest = int(grey.max())
    if 1 < highest < _DIMMEST_MASK:
        raise UnreadableInput(path, f"a mask with values up to {highest}; expected 0 to 255, or 0 and 1")
    return grey.astype(np.float32) / (1 if highest == 1 else 255)


def open_regular(path: Path | str) -> BinaryIO:
    """A regular, non-empty file, opened; a named pipe would wait for ever and a device never end.

    Raises:
        UnreadableInput: no file, a folder, no regular file, an empty one, or one that may not be read.
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise UnreadableInput(path, "a folder, not a file")
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableInput(path, "not a regular file")
        if found.st_size == 0:
            raise UnreadableInput(path, "the file is empty (0 bytes)")
        return open(path, "rb")
    except OSError as error:
        raise UnreadableInput(path, error.strerror or str(error)) from None


def _formats(path: Path | str, file: BinaryIO) -> tuple[str, ...]:
    """Pillow's names of the kinds that this file may be; AVIF and HEIC where it begins like one and can be read here."""
    head = file.read(12)
    file.seek(0)
    brand = head[8:] if head[4:8] == b"ftyp" else b""
    if brand in _AVIF:
        if not features.check("avif"):
            raise UnreadableInput(path, 'an AVIF picture; to read it: pip install "pillow>=11.3"')
        return (*FORMATS, "AVIF")
    if brand in _HEIF:
        try:
            import pillow_heif
        except ModuleNotFoundError:
            raise UnreadableInput(path, "a HEIC picture; to read it: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
        return (*FORMATS, "HEIF")
    return FORMATS


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURN.get(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, KeyError, TypeError, OSError):
        turn = None  # damaged metadata around sound pixels: viewers show them as they lie
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """A loaded Pillow picture of any mode -> (H, W, 3) uint8."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        grey = ((grey * 255 + 32767) // 65535).astype(np.uint8)  # rounded, 65535 -> 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed range; save as 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return np.array(image.convert("RGB"))


def resize_image(image: np.ndarray, width: int, height: int, growth: str = "cubic") -> np.ndarray:
    """`image` (H, W) or (H, W, C) brought to (height, width): area when shrinking, `growth` (cubic or area) when growing.

    An axis that shrinks while the other grows is shrunk first. Nothing is resampled when the size is right already.
    Source: the published streams' preprocessing.
    """
    for w, h, how in (
        (min(width, image.shape[1]), min(height, image.shape[0]), cv2.INTER_AREA),
        (width, height, {"cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}[growth]),
    ):
        if (h, w) != image.shape[:2]:
            image = cv2.resize(image, (w, h), interpolation=how)
    return image
