"""What the words for labels and splits in people's data sets mean: tables, and nothing guessed.

Takes a word as a manifest, a JSON or a folder writes it; gives 0 (real) or 1 (fake), a split's usual name, or None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# The usual names of a table's columns, the likeliest first.
PATH_COLUMNS = (
    *("path", "image", "filename", "file", "name", "image_name", "image_path", "img", "img_path", "img_name"),
    *("filepath", "file_path", "file_name", "id", "image_id"),
)
LABEL_COLUMNS = ("label", "target", "class", "is_fake", "labels")
OTHER_COLUMNS = {
    "source": ("source", "dataset"),
    "split": ("split", "subset", "partition", "phase"),
    "generator": ("generator", "method"),
    "group": ("group", "identity", "subject", "person"),
    "video": ("video", "video_id", "clip"),
    "mask": ("mask", "mask_path"),
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


REAL = _words(
    """real reals original originals pristine youtube actors nature natural authentic genuine bonafide unaltered
    camera ffhq celebahq"""
)
FAKE = _words(
    """fake fakes manipulated generated synthetic synthesis synthesized forged tampered deepfake deepfakes ai aigc aigen
    spoof swapped"""
)
# Of FaceForensics++, Celeb-DF, DFDC and its preview, DF40 and GenImage.
GENERATORS = _words(
    """df f2f fs nt sh fsh fh fakea fakeb face2face faceswap neuraltextures faceshifter deepfakedetection
    fsgan simswap inswap inswapper blendface uniface mobileswap e4s facedancer deepfacelab fomm wav2lip mraa oneshot
    pirender tpsm lia dagan sadtalker mcnet hyperreve hyperreenact heygen
    vqgan stylegan stylegan2 stylegan3 styleganxl progan biggan cyclegan stargan starganv2 styleclip e4e collabdiff
    ddpm ddim rddm pixart dit sit midjourney whichisreal adm glide wukong vqdm dalle dalle2 dalle3
    sd sdv4 sdv5 sd14 sd15 sd21 sdxl"""
)
# Words that say nothing of the label: what kind of files, and the data sets' own names.
NEUTRAL = _words(
    """video videos image images img imgs pic pics picture pictures photo photos face faces frame frames crop crops
    cropped sequence sequences class label folder data dataset
    ff ffpp faceforensics dfd dfdc dfdcp dfdcpreview celeb celebdf celebdfv1 celebdfv2 cdf cdfv1 cdfv2 uadfv
    deeperforensics wilddeepfake df40 genimage diffusionface c0 c23 c40 raw v1 v2 v3"""
)
_NUMBERS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
_SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
EXPECTED = "expected 0 or real, 1 or fake, or a known name such as original, FF-real, manipulated, Celeb-synthesis"


def label_of(word: object, *, generators: bool = True) -> int | None:
    """0 for what is known to be real, 1 for what is known to be fake, None for all else.

    word: a number 0 or 1, or a name. Every part of a name must be known, and the parts that say something must agree:
    `FF-real`, `0_real` and `real_videos` are real, `un-real`, `1_real` and `real_fake` are nothing. generators: whether
    a generator's name alone says fake.
    """
    if isinstance(word, bool) or word is None:
        return None
    text = str(word).strip().lower()
    if text in _NUMBERS:
        return _NUMBERS[text]
    parts = [part for part in re.split(r"[^a-z0-9+]+", text.replace("++", "pp")) if part]
    said = {_part(part) for part in parts} - {""}
    named = any(part in REAL | FAKE or (generators and part in GENERATORS) for part in parts)
    return said.pop() if named and len(said) == 1 and None not in said else None


def _part(part: str) -> int | str | None:
    if part in _NUMBERS:
        return _NUMBERS[part]
    if part in NEUTRAL:
        return ""
    return 0 if part in REAL else 1 if part in FAKE | GENERATORS else None


def column_of(header: Iterable[str | None], names: Iterable[str]) -> str | None:
    """The column of a table that goes by one of `names`, capitals and blanks apart, as its header writes it; or None."""
    written = {name.strip().lower(): name for name in header if name is not None}
    return next((written[name] for name in names if name in written), None)


def split_of(word: str) -> str:
    """`train`, `val`, `test` or `unseen` for their usual spellings, any other word as it stands, "" for none."""
    text = word.strip()
    return "unseen" if text.lower() == "unseen" else _SPLITS.get(_bare(text), text)


def is_split(word: str) -> bool:
    """Whether a word is a usual spelling of a split."""
    return _bare(word) in _SPLITS


def _bare(split: str) -> str:
    """A split's word without `set` or `split` behind it: `train` of `Train_Set`."""
    return re.sub(r"[\s_-]*(set|split)$", "", split.strip().lower())
