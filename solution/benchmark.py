"""Entry: measured speed of each stage, one sub-command for each.

`python -m solution.benchmark STAGE --help`. A stage is a function `add_STAGE(stages)` that adds its parser and names the
function that runs it (`set_defaults(run=...)`: takes the parsed arguments, prints its figures, returns the exit code).
Pictures are uint8 RGB HWC.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from solution.config import DegradationConfig
from solution.data import degradation
from solution.data.drawn import photo_like
from solution.errors import FAILURES, UsageError, door
from solution.studies.gpu import add_gpu
from solution.studies.throughput import add_inference, add_parity


# ------------------------------------------------------------------------------------------------ what stages share
def picture_of(path: Path | None, side: int) -> np.ndarray:
    """The picture at `path` as a (side, side) square, or a photo-like one without a path."""
    if path is None:
        return photo_like(side)
    from solution.data.images import UnreadableInput, decode_image, resize_image

    try:
        image = decode_image(path)
    except UnreadableInput as error:
        raise UsageError(f"--image {error}") from None
    edge = min(image.shape[:2])
    return resize_image(np.ascontiguousarray(image[:edge, :edge]), side, side)


def summary(milliseconds: list[float]) -> str:
    """`N/s, mean, p50, p95, p99, max` of per-picture times in ms."""
    times = np.array(milliseconds)
    p50, p95, p99 = np.quantile(times, [0.5, 0.95, 0.99])
    return (
        f"{1000 / times.mean():7.0f} pictures/s   mean {times.mean():.3f} ms   p50 {p50:.3f}   "
        f"p95 {p95:.2f}   p99 {p99:.2f}   max {times.max():.2f}"
    )


# ------------------------------------------------------------------------------------------------ degrade
def add_degrade(stages: argparse._SubParsersAction) -> None:
    """`degrade`: the extreme compound engine."""
    parser = stages.add_parser("degrade", help="the extreme compound engine")
    parser.add_argument("--side", type=int, default=252, help="px of the pictures")
    parser.add_argument("--count", type=int, default=2000, help="pictures to degrade")
    parser.add_argument("--image", type=Path, help="a picture instead of a random one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="time a loader of so many workers instead: decode a JPEG file, then degrade it with --global-p",
    )
    parser.add_argument("--global-p", type=float, default=0.5, help="with --workers")
    parser.set_defaults(run=run_degrade)


def run_degrade(args: argparse.Namespace) -> int:
    """Time the engine in this process, then each op's share; or a loader's workers."""
    degradation.use_one_opencv_thread()
    image = picture_of(args.image, args.side)
    if args.workers:
        rate = loader_rate(image, args.workers, args.count, args.global_p, args.seed)
        print(
            f"{args.workers} loader workers, decoding and global_p {args.global_p}, {args.side} px: {rate:.0f} pictures/s"
        )
        return 0
    config = DegradationConfig(global_p=1.0)
    for index in range(50):  # fills caches and tables
        degradation.degrade(image, config, np.random.default_rng([args.seed, 1, index]), image)
    wall, busy = [], []
    for index in range(args.count):
        rng = np.random.default_rng([args.seed, index])
        begun, begun_busy = time.perf_counter(), time.thread_time()
        degradation.degrade(image, config, rng, image)
        wall.append(1000 * (time.perf_counter() - begun))
        busy.append(1000 * (time.thread_time() - begun_busy))
    print(f"degrade, one process, {args.side} px, {args.count} pictures, global_p 1")
    print(f"  elapsed   {summary(wall)}")
    print(f"  processor {summary(busy)}   (without what other programs took)")
    print_shares(image, config, args.count, args.seed)
    return 0


def print_shares(image: np.ndarray, config: DegradationConfig, count: int, seed: int) -> None:
    """Print each op's share of the processor time, its mean time and its slowest, over `count` recipes."""
    spent = defaultdict(list)
    for index in range(count):
        begun = time.thread_time()
        recipe = degradation.sample_recipe(config, np.random.default_rng([seed, index]))
        spent["(sampling)"].append(time.thread_time() - begun)
        work = image
        for op in recipe:
            begun = time.thread_time()
            work = degradation.apply_op(work, op, image.shape[:2], image)
            spent[op.name].append(time.thread_time() - begun)
    total = sum(map(sum, spent.values()))
    print(f"  {'op':22} {'share':>6} {'mean ms':>8} {'max ms':>8} {'times':>6}")
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1])):
        mean, slowest = 1000 * np.mean(times), 1000 * max(times)
        share = f"{sum(times) / total:.1%}"
        print(f"  {name:22} {share:>6} {mean:8.3f} {slowest:8.2f} {len(times):6}")


def loader_rate(image: np.ndarray, workers: int, count: int, global_p: float, seed: int) -> float:
    """Pictures/s of a PyTorch loader whose workers decode a JPEG file and degrade it, without their start."""
    import tempfile

    from PIL import Image
    from torch.utils.data import DataLoader

    batch, spare = 32, 4 * workers  # batches before the clock starts
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.jpg"
        Image.fromarray(image).save(path, quality=95)
        dataset = DegradedFile(path, count + spare * batch, global_p, seed)
        loader = DataLoader(dataset, batch, num_workers=workers)
        batches = iter(loader)
        for _ in range(spare):
            next(batches)
        begun = time.perf_counter()
        seen = sum(len(images) for images in batches)
        return seen / (time.perf_counter() - begun)


class DegradedFile:
    """A map-style dataset: `count` times the picture at `path`, decoded and degraded anew, uint8 HWC."""

    def __init__(self, path: Path, count: int, global_p: float, seed: int) -> None:
        self.path, self.count, self.seed = path, count, seed
        self.config = DegradationConfig(global_p=global_p)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        from solution.data.images import decode_image

        image = decode_image(self.path)
        rng = np.random.default_rng([self.seed, index])
        return degradation.degrade(image, self.config, rng, image)


# ------------------------------------------------------------------------------------------------ vlaforge
def add_vlaforge(stages: argparse._SubParsersAction) -> None:
    """`vlaforge`: one CLIP pass and the copies against the straightforward three passes."""
    parser = stages.add_parser("vlaforge", help="vlaforge's one CLIP pass against the straightforward three")
    parser.add_argument("--preset", default="giant", help="giant (default) or compact")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.set_defaults(run=run_vlaforge)


def run_vlaforge(args: argparse.Namespace) -> int:
    """Time both formulations on random weights and print their ratio and largest difference; 4 when they differ."""
    import torch

    from solution.bundles.members import build_member, random_towers
    from solution.presets import preset

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = preset(args.preset, "vlaforge")
    member = build_member(config, random_towers([config])).eval()
    plain, side, worst = three_passes(member), config.view.side, 0.0
    print(f"vlaforge {args.preset}, CPU, {torch.get_num_threads()} threads, random weights, seconds a forward")
    for count in args.batch:
        images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        with torch.inference_mode():
            quick, straight = member(images), plain(images)  # warms up, too
            gap = max(
                (quick.logit - straight.logit).abs().max().item(),
                *((quick.evidence[n] - straight.evidence[n]).abs().max().item() for n in quick.evidence),
            )
            times = {id(m): [] for m in (member, plain)}
            for _ in range(args.repeat):  # in turn, so that other load hits both
                for m in (member, plain):
                    begun = time.perf_counter()
                    m(images)
                    times[id(m)].append(time.perf_counter() - begun)
        one, three = min(times[id(member)]), min(times[id(plain)])
        print(
            f"  batch {count}: one pass {one:.2f}, three passes {three:.2f}, {three / one:.2f} times as fast, "
            f"largest difference {gap:.1e}"
        )
        worst = max(worst, gap)
    return 0 if worst <= 1e-4 else FAILURES


def three_passes(member):
    """A `Vlaforge` sharing `member`'s weights, computed as written down: three full CLIP passes, a sentence at a time.

    One pass for the layers' tokens, one for the class embedding, one of copies, class token and patches together under
    a joint attention mask; every sentence goes through the text tower alone and padded. The same scores, slower.
    """
    import copy

    import torch

    plain = copy.copy(member)
    plain.look = lambda images: _two_passes(member, images)
    plain.directed_classes = lambda seen, bias: _joint_pass(member, seen, bias)
    plain.sentences = lambda classes: torch.stack([_sentences_alone(member, one) for one in classes])
    return plain


def _two_passes(member, images):
    """The tokens of a first pass and the class token of a second; `start` holds all tokens before the first block."""
    import torch.nn.functional as F

    from solution.models.vlaforge import ClipPass

    tower, fused, arch = member.tower, member.config.vlaforge.fusion_layers, member.tower.config.arch
    side, last = arch.image_side, member.depth or arch.layers
    images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    first = tower(images, keep=(*fused, last)).hidden
    second = tower(images, keep=(last,)).hidden
    hidden = {number: first[number][:, 1:] for number in fused}
    start, _ = tower.embed(images)
    classes, patches = tower.last_norm(second[last])[:, 0], tower.last_norm(first[last])[:, 1:]
    return ClipPass(classes, patches, start, hidden, [], [])


def _joint_pass(member, seen, bias):
    """Copies, class token and patches through all blocks as one sequence; the copies in the joint space (B, Q, E)."""
    import torch
    import torch.nn.functional as F

    from solution.models.blocks import finish_block, split_heads

    tower, (count, heads, queries, patches) = member.tower, bias.shape
    length = queries + 1 + patches
    mask = bias.new_zeros(count, heads, length, length)
    mask[..., :queries] = float("-inf")
    mask[..., range(queries), range(queries)] = 0.0
    mask[:, :, :queries, queries] = float("-inf")
    mask[:, :, :queries, queries + 1 :] = bias
    x = torch.cat([seen.start[:, :1].expand(-1, queries, -1), seen.start], dim=1)
    for block in tower.blocks(member.depth):
        h = block.norm1(x)
        q, k, v = (split_heads(p(h), heads) for p in (block.q, block.k, block.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = finish_block(block, x, attended)
    return member.project(tower.last_norm(x)[:, :queries])


def _sentences_alone(member, embedding):
    """The two sentences (2, E) of one class embedding (E,), one call of the text tower each, padded to its context."""
    import torch
    import torch.nn.functional as F

    from solution.models.vlaforge import encode_prompts, prompt_embeddings

    length = member.tower.config.arch.context
    found = []
    for tokens in member.tokens:
        padded = F.pad(tokens, (0, length - len(tokens)))[None]
        identity = member.to_words(embedding[None])
        words = prompt_embeddings(member.tower, padded, member.place, identity)
        found.append(encode_prompts(member.tower, words, padded)[0, 0])
    return torch.stack(found)


# ------------------------------------------------------------------------------------------------ faces
FACE_FREE = (  # scikit-image's pictures without a human face; chelsea is a cat
    *("brick", "cell", "chelsea", "clock", "coffee", "colorwheel", "grass", "gravel"),
    *("horse", "hubble_deep_field", "immunohistochemistry", "logo", "moon", "page"),
    *("retina", "rocket", "shepp_logan_phantom", "text"),
)


def add_faces(stages: argparse._SubParsersAction) -> None:
    """`faces`: what the face search finds under damage, and what it finds where there is no face."""
    parser = stages.add_parser("faces", help="the face search: detection, false finds, speed")
    parser.add_argument(
        "--faces",
        type=Path,
        action="append",
        default=[],
        help="pictures with a face each: a folder, a list, or a manifest with a `path` column; may be repeated "
        "(without it: scikit-image's astronaut)",
    )
    parser.add_argument("--count", type=int, default=300, help="faces drawn from each")
    parser.add_argument("--tiles", type=int, default=14, help="of each face-free one")
    parser.add_argument("--split", help="rows of a manifest to draw from, by their split")
    parser.add_argument(
        "--thresholds",
        default="0.6,0.7,0.8,0.9",
        help="face.score_threshold, several to compare",
    )
    parser.add_argument("--search-side", type=int, help="face.search_side")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run_faces)


def run_faces(args: argparse.Namespace) -> int:
    """Print found / right (overlaps the clean picture's face by half) in %, and false finds, under each damage."""
    from skimage import data

    from solution.config import FaceConfig
    from solution.data.faces import FaceLocator

    degradation.use_one_opencv_thread()
    thresholds = [float(text) for text in args.thresholds.split(",")]
    side = {"search_side": args.search_side} if args.search_side else {}
    locators = {t: FaceLocator(FaceConfig(t, **side)) for t in thresholds}
    sources = {str(path): _face_pictures(path, args) for path in args.faces}
    sources = sources or {"scikit-image's astronaut": [data.astronaut()]}
    free = _face_free(args.tiles, args.seed)
    shown = "  ".join(f"{t:g}".center(16) for t in thresholds)
    print(f"{'':10}{'':9}{shown}   at face.score_threshold")
    for name, damage in _damages().items():
        for source, pictures in sources.items():
            cells, spent = [], 0.0
            worse = _damaged(pictures, damage, args.seed)
            for locator in locators.values():
                begun = time.perf_counter()
                found = [locator.locate(picture) for picture in worse]
                spent += time.perf_counter() - begun
                right = _right(found, pictures, locator)
                share = sum(map(bool, found)) / len(found)
                cells.append(f"{share:6.1%} /{right / len(found):6.1%} ")
            each = 1000 * spent / len(worse) / len(locators)
            line = "  ".join(cells)
            print(f"{name:10}{'found':9}{line}  {len(worse)} of {source}, {each:.1f} ms")
        empty = _damaged(free, damage, args.seed)
        counts = [sum(bool(loc.locate(p)) for p in empty) for loc in locators.values()]
        line = "  ".join(f"{count:<16}" for count in counts)
        print(f"{'':10}{'false':9}{line}  {len(empty)} face-free pictures and tiles")
    _tell_small(locators, args.seed)
    _tell_cost(FaceLocator(FaceConfig(**side)), args.seed)
    return 0


# Width and height of a frame, and the share of it that a face takes: 1080p, 4K, a tall screenshot with a face of 400 px.
FRAMES = ((1920, 1080, 0.005), (3840, 2160, 0.002), (1080, 8000, 0.0185))
BACKGROUNDS = ("brick", "chelsea", "coffee", "grass", "gravel", "retina", "rocket")


def empty_frames(width: int, height: int, *, backgrounds: tuple[str, ...] = BACKGROUNDS) -> list[np.ndarray]:
    """Frames (height, width, 3) uint8 of pictures without a face."""
    from skimage import data

    from solution.data.images import resize_image

    frames, side = [], max(width, height)
    for name in backgrounds:
        picture = getattr(data, name)()
        picture = np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture
        frames.append(resize_image(np.ascontiguousarray(picture), side, side)[:height, :width].copy())
    return frames


def pasted_faces(
    width: int, height: int, share: float, seed: int, *, backgrounds: tuple[str, ...] = BACKGROUNDS
) -> list[tuple[np.ndarray, tuple[int, int, int, int]]]:
    """Frames (height, width, 3) uint8 of face-free pictures, a face of `share` of the area pasted into each, and its box."""
    from skimage import data

    from solution.config import FaceConfig
    from solution.data.faces import FaceLocator
    from solution.data.images import resize_image

    photo = data.astronaut()
    (face, *_) = FaceLocator(FaceConfig()).locate(photo)
    x0, y0, x1, y1 = (round(v) for v in face[:4])
    around = (x1 - x0) // 3
    patch = photo[max(0, y0 - around) : y1 + around, max(0, x0 - around) : x1 + around]
    scale = (share * width * height / ((x1 - x0) * (y1 - y0))) ** 0.5
    patch = resize_image(patch, round(patch.shape[1] * scale), round(patch.shape[0] * scale))
    left, top = round(min(around, x0) * scale), round(min(around, y0) * scale)
    rng, found = np.random.default_rng(seed), []
    for frame in empty_frames(width, height, backgrounds=backgrounds):
        x, y = int(rng.integers(width - patch.shape[1])), int(rng.integers(height - patch.shape[0]))
        frame[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
        corner = x + left, y + top
        found.append((frame, (*corner, corner[0] + round((x1 - x0) * scale), corner[1] + round((y1 - y0) * scale))))
    return found


def _tell_small(locators: dict, seed: int) -> None:
    """A line a frame of `FRAMES`: in how many the pasted face is found, and what is found where none was pasted."""
    from solution.data.faces import overlap
    from solution.records import FaceBox

    for width, height, share in FRAMES:
        pictures = pasted_faces(width, height, share, seed)
        cells, spent = [], 0.0
        for locator in locators.values():
            begun = time.perf_counter()
            found = [locator.locate(picture) for picture, _ in pictures]
            spent += time.perf_counter() - begun
            hits = [
                sum(overlap(face, FaceBox(*box, 1.0)) > 0.5 for face in faces)
                for faces, (_, box) in zip(found, pictures, strict=True)
            ]
            beside = sum(len(faces) - hit for faces, hit in zip(found, hits, strict=True))
            cells.append(f"{sum(map(bool, hits))} of {len(pictures)}, {beside} false".ljust(16))
        each = 1000 * spent / len(pictures) / len(locators)
        name = f"{share:.2%}"
        print(f"{name:10}{'found':9}{'  '.join(cells)}  pasted into {width}x{height} px, {each:.0f} ms")


# Width and height of what the search's cost is told for, and the share of a face that its first copy shows.
SIZES = ((256, 256, 0.25), (1024, 768, 0.05), *((width, height, 0.05) for width, height, _ in FRAMES))


def _tell_cost(locator, seed: int, *, backgrounds: tuple[str, ...] = BACKGROUNDS) -> None:
    """A line a size and kind of frame: processor time of the whole search, over that of its first copy alone, false finds."""
    from solution.data.faces import overlap
    from solution.records import FaceBox

    small = {(width, height): share for width, height, share in FRAMES}
    print(f"cost of the search at face.score_threshold {locator.config.score_threshold:g}, over that of one copy alone")
    for width, height, large in SIZES:
        kinds = {f"face of {large:.0%}": pasted_faces(width, height, large, seed, backgrounds=backgrounds)}
        if share := small.get((width, height)):
            kinds[f"face of {share:.2%}"] = pasted_faces(width, height, share, seed, backgrounds=backgrounds)
        kinds["no face"] = [(frame, None) for frame in empty_frames(width, height, backgrounds=backgrounds)]
        for kind, pictures in kinds.items():
            spent, false = {True: 0.0, False: 0.0}, 0
            locator.locate(pictures[0][0])  # buffers of this size
            for picture, box in pictures:
                for once in (True, False):  # in turn, so that other load hits both
                    begun = time.thread_time()
                    faces = locator.locate(picture, once=once)
                    spent[once] += 1000 * (time.thread_time() - begun) / len(pictures)
                false += sum(box is None or overlap(face, FaceBox(*box, 1.0)) <= 0.5 for face in faces)
            print(
                f"{width:5}x{height:<5} {kind:14} {spent[False]:7.1f} ms a picture, {spent[False] / spent[True]:5.1f} times "
                f"the first copy's {spent[True]:.1f} ms; {false} false finds in {len(pictures)}"
            )


def _right(found, pictures, locator) -> int:
    """How many of the damaged pictures' best faces overlap the clean picture's best one by half."""
    from solution.data.faces import overlap

    right = 0
    for faces, picture in zip(found, pictures, strict=True):
        clean = locator.locate(picture) if faces else []
        right += bool(clean) and overlap(faces[0], clean[0]) > 0.5
    return right


def _face_pictures(path: Path, args: argparse.Namespace) -> list[np.ndarray]:
    """`args.count` pictures of a folder, list or manifest, drawn by `args.seed`."""
    import csv

    from solution.data.images import VIDEO_SUFFIXES, decode_image, find_inputs

    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if args.split in (None, r["split"])]
        paths = [path.parent / row["path"] for row in rows]
    else:
        paths = [found.path for found in find_inputs(path)]
    paths = [p for p in paths if p.suffix.lower() not in VIDEO_SUFFIXES]
    order = np.random.default_rng(args.seed).permutation(len(paths))[: args.count]
    return [decode_image(paths[index]) for index in order]


def _face_free(tiles: int, seed: int) -> list[np.ndarray]:
    """scikit-image's face-free pictures, whole and `tiles` tiles of each, 64 to 384 px brought to 256."""
    from skimage import data

    from solution.data.images import resize_image

    rng, pictures = np.random.default_rng(seed), []
    for name in FACE_FREE:
        picture = np.asarray(getattr(data, name)())
        scale = 255 if picture.max() <= 1 else 1
        picture = (picture * scale).astype(np.uint8)
        if picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=2)
        picture = np.ascontiguousarray(picture[..., :3])
        pictures.append(picture)
        for _ in range(tiles):
            side = min(*picture.shape[:2], int(rng.choice((64, 96, 128, 192, 256, 384))))
            y = int(rng.integers(picture.shape[0] - side + 1))
            x = int(rng.integers(picture.shape[1] - side + 1))
            tile = np.ascontiguousarray(picture[y : y + side, x : x + side])
            pictures.append(resize_image(tile, 256, 256))
    return pictures


def _damages() -> dict:
    """Name -> (uint8 picture, rng) -> uint8 picture: the engine, and single damages at full strength."""

    def engine(**changes):
        config = DegradationConfig(global_p=1.0, **changes)
        return lambda picture, rng: degradation.degrade(picture, config, rng)

    def alone(op):
        return engine(ops=(op,), op_p=1.0, cycle_p=0.0, strength=1.0)

    return {
        "clean": lambda picture, rng: picture,
        "engine": engine(),
        "op_p 0.5": engine(op_p=0.5),
        "noise": alone("gaussian_noise"),
        "blur": alone("blur"),
        "jpeg 10": engine(ops=("jpeg",), op_p=1.0, cycle_p=0.0, jpeg_quality=(10, 10)),
        "dark": lambda picture, rng: (picture * 0.1).astype(np.uint8),
    }


def _damaged(pictures: list[np.ndarray], damage, seed: int) -> list[np.ndarray]:
    return [damage(picture, np.random.default_rng([seed, index])) for index, picture in enumerate(pictures)]


STAGES = (
    add_degrade,
    add_vlaforge,
    add_faces,
    add_inference,
    add_parity,
    add_gpu,
)


@door("benchmark")
def main(argv: list[str] | None = None) -> int:
    """Run the stage that the first argument names."""
    parser = argparse.ArgumentParser(prog="python -m solution.benchmark", description="Measured speed of each stage.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for add in STAGES:
        add(stages)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    raise SystemExit(main())
