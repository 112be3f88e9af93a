"""The extreme compound engine: sample a `Recipe`, apply a `Recipe`.

A recipe is data: a tuple of `Op(name, params)` with plain JSON values. All randomness that matters is in it (noise ops
carry their seed); the same recipe on the same picture gives the same bytes. `python -m solution.data.degradation --image X
--out grid.png --log recipes.jsonl` draws what the members train on and writes the recipes down; `--recipe
recipes.jsonl` replays them.

Pictures are RGB HWC, float32 in [0, 1] or uint8; the input is never written, the output has its shape and type. No op
but a resize, which is undone at the end, moves pixels beyond the picture's own grid, so localisation masks stay valid.

Source: arXiv 2604.25889, the compound degradation engine. Mended defects: ops that write into their input, float64
results, values outside [0, 1], banding that was rarer the stronger it was, motion kernels that collapse to a point,
fonts and line types that crash, a pasted patch that is still normalised, a configured strength that nothing reads.

Differences left from the published engine, each with its reason:
- The working picture grows to at most `config.growth` (2) times its input side; theirs has no bound. 1.6 % of the
  pictures notice, and they were the slowest ones.
- Every op works on float32; theirs rounds to 8 bits inside grey, fade, exposure, chroma subsampling and Poisson noise. Here
  only JPEG is an 8-bit step, with the resizes that follow it directly: faster, and rounding is no part of the others.
- Noise levels are real numbers in the stated ranges (speckle: integers, as published, times s); theirs draws integers
  for Gaussian noise too. One step of an integer level is under 1/255.
- Random fields come from 16-bit words (|z| up to 4.3), photon counts above 6 from a skewed Gaussian, wide anisotropic
  kernels end at 4 standard deviations: for speed, each within a grey level of the exact result.
- A motion kernel is a line of the stated length at every angle; theirs spans the whole side horizontally.
- Glitch bands are 1..8 s px, at least 1, and cut at the picture's foot; theirs allows 2 px below s = 0.25 and leaves
  out bands that reach the foot. The stated range is kept at every strength and every picture size.
- Text: the 95 characters that Hershey fonts can draw, in plain 8-connected lines, placed on the working
  picture; theirs also picks white space that OpenCV cannot draw and line types that crash, placed by the input's size.
- The pasted patch is cut from the other picture at its own scale and placed wholly inside; theirs shrinks the whole
  picture into it and may cut it at the border. Without another picture a text is drawn instead; theirs skips the op.
  One degraded picture in 220 has a patch.
- Pictures of 10 px or less are resized in the JPEG and resize cycles too: a recipe is drawn without knowing the size.
- Moire counts whole pixels, x = 0..W-1; theirs stretches the grid by W / (W - 1), under 0.5 % at 252 px.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import cv2
import numpy as np

from solution.config import OPS, DegradationConfig
from solution.data import degradation_ops as ops
from solution.errors import door


class Op(NamedTuple):
    """One step of a recipe: an op's name and its parameters, plain JSON values."""

    name: str
    params: dict[str, Any]


Recipe = tuple[Op, ...]
RESTORE = "restore"  # the last op of a non-empty recipe: back to the input size


def use_one_opencv_thread() -> None:
    """Keep OpenCV on the calling thread. Entries call it before any worker is forked.

    A forked worker that sets it after its parent has used OpenCV's pool hangs.
    """
    cv2.setNumThreads(1)


def sample_recipe(config: DegradationConfig, rng: np.random.Generator) -> Recipe:
    """Draw a recipe; empty when `config.global_p` leaves the picture clean.

    First, with `cycle_p`, some cycles of JPEG and resize with one strength; then `config.ops` in a random order, each
    with `op_p` and its own strength. The recipe fits pictures of any size.
    """
    if rng.random() >= config.global_p:
        return ()
    drawn = _draw_cycles(config, rng) if rng.random() < config.cycle_p else []
    for index in rng.permutation(len(config.ops)):
        name = config.ops[index]
        if rng.random() >= config.op_p:
            continue
        if name == "distractor" and rng.random() >= config.distractor_p:
            continue
        drawn.append(_draw_op(name, _strength(config, rng), config, rng))
    bounded = _bound_growth(drawn, config.growth)
    method = ops.SMOOTH[int(rng.integers(len(ops.SMOOTH)))]
    return (*bounded, Op(RESTORE, {"method": method})) if bounded else ()


def _strength(config: DegradationConfig, rng: np.random.Generator) -> float:
    """The fixed strength of a sweep, or s ~ Beta(beta, beta)."""
    if config.strength is not None:
        return config.strength
    return float(rng.beta(config.beta, config.beta))


def _draw_op(name: str, strength: float, config: DegradationConfig, rng: np.random.Generator) -> Op:
    extra = {}
    if name == "jpeg":
        extra["quality"] = config.jpeg_quality
    elif name == "distractor":
        extra["text_p"] = config.text_p
    elif name == "gaussian_noise":
        extra["sigma"] = config.noise_sigma
    return Op(name, ops.DRAW[name](strength, rng, **extra))


def _draw_cycles(config: DegradationConfig, rng: np.random.Generator) -> list[Op]:
    """1 to 5 cycles of JPEG and resize; a coin decides which starts; one strength for all."""
    low, high = config.cycles
    strength = _strength(config, rng)
    pair = ("jpeg", "resize") if rng.random() < 0.5 else ("resize", "jpeg")
    count = int(rng.integers(low, high + 1))
    return [_draw_op(name, strength, config, rng) for name in pair * count]


def _bound_growth(drawn: list[Op], growth: float) -> list[Op]:
    """The same ops with every resize held to `growth` times the input side, cumulated over the recipe."""
    bounded, total = [], 1.0
    for op in drawn:
        if op.name == "resize":
            scale = min(op.params["scale"], growth / total)
            total *= scale
            op = Op(op.name, {**op.params, "scale": scale})
        bounded.append(op)
    return bounded


def apply_recipe(image: np.ndarray, recipe: Recipe, donor: np.ndarray | None = None) -> np.ndarray:
    """Apply `recipe` to a uint8 or float32 [0, 1] RGB HWC picture; a new array of the same shape and type.

    donor: another picture (uint8 or float32 HWC) from which a pasted patch is cut; without one the patch is replaced by
    the text that was drawn with it.

    Raises:
        TypeError, ValueError: an image of another type or shape; an unknown op; a resize that nothing restores.
    """
    if image.dtype not in (np.uint8, np.float32):
        raise TypeError(f"expected a uint8 or float32 picture, found {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected an RGB picture (H, W, 3), found {image.shape}")
    work = np.ascontiguousarray(image)
    for op in recipe:
        work = apply_op(work, op, image.shape[:2], donor)
    if work.shape != image.shape:
        raise ValueError(
            f"the recipe ends at {work.shape[:2]} instead of {image.shape[:2]}: "
            f"it resizes without a closing {RESTORE!r}"
        )
    if work is image:
        return work.copy()
    return ops.to_uint8(work) if image.dtype == np.uint8 else ops.to_float(work)


def degrade(
    image: np.ndarray,
    config: DegradationConfig,
    rng: np.random.Generator,
    donor: np.ndarray | Callable[[], np.ndarray] | None = None,
) -> np.ndarray:
    """Sample a recipe and apply it to a uint8 or float32 RGB HWC picture; a new array of the same shape and type.

    donor: as in `apply_recipe`, or a function that gives it: it is called only for a recipe that pastes a patch, as
    one in some hundred does.
    """
    recipe = sample_recipe(config, rng)
    if callable(donor):
        donor = donor() if any(_pastes(op) for op in recipe) else None
    return apply_recipe(image, recipe, donor)


def _pastes(op: Op) -> bool:
    return op.name == "distractor" and op.params["kind"] == "patch"


def apply_op(work: np.ndarray, op: Op, shape: tuple[int, int], donor: np.ndarray | None = None) -> np.ndarray:
    """One step of a recipe on the working picture (uint8 or float32); `shape` is the (H, W) to restore.

    JPEG leaves uint8 and a resize keeps what it finds, so a chain of them never visits float32; every other op does.
    """
    name, params = op
    if name == RESTORE:
        return ops.resize_to(work, shape, **params)
    if name == "jpeg":
        return ops.jpeg(ops.to_uint8(work), **params)
    if name == "resize":
        return ops.resize(work, **params)
    if name == "distractor":
        return ops.distractor(ops.to_float(work), donor=donor, **params)
    if name not in ops.APPLY:
        raise ValueError(f"recipe op {name!r} is unknown; known: {_known()}")
    return ops.APPLY[name](ops.to_float(work), **params)


def _known() -> str:
    return ", ".join((*OPS, RESTORE))


def recipe_to_json(recipe: Recipe) -> str:
    """One line of JSON: `[[name, params], ...]`."""
    return json.dumps([[op.name, op.params] for op in recipe])


def recipe_from_json(text: str) -> Recipe:
    """The recipe that `recipe_to_json` wrote.

    Raises:
        ValueError: no JSON list of [name, params] pairs, or an unknown op.
    """
    try:
        pairs = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a recipe: {error}") from None
    recipe = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        step = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], dict)
        if not step:
            raise ValueError(f"not a recipe step [name, params]: {pair!r}")
        if pair[0] not in (*OPS, RESTORE):
            raise ValueError(f"recipe op {pair[0]!r} is unknown; known: {_known()}")
        recipe.append(Op(*pair))
    return tuple(recipe)


# ------------------------------------------------------------------------------------------------ for the eye
def describe(op: Op) -> str:
    """`name value value`: what an op does, without its seed and places."""
    words = [op.name]
    for key, value in op.params.items():
        if isinstance(value, float):
            words.append(f"{value:.2g}")
        elif isinstance(value, str | int) and key not in ("seed", "grey"):
            words.append(str(value))
        elif key == "bands":
            words.append(f"{len(value)} bands")
    return " ".join(words)


def draw_ops(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """Every op at strengths 0.1 to 1 (rows by columns) on `image`, (S, S, 3) uint8 RGB; a labelled uint8 RGB sheet."""
    side, donor = image.shape[0], image[:, ::-1]
    only = DegradationConfig(global_p=1, op_p=1, cycle_p=0, distractor_p=1)
    strengths = [tenth / 10 for tenth in range(1, 11)]
    rows = [_row([_label(f"strength {s}", side, 20) for s in strengths], 20)]
    for name in OPS:
        cells = []
        for column, strength in enumerate(strengths):
            rng = np.random.default_rng([seed, OPS.index(name), column])
            config = replace(only, ops=(name,), strength=strength)
            cells.append(degrade(image, config, rng, donor))
        rows.append(_row([_label(name, 160, side), *cells], side, indent=0))
    return _stack(rows)


def draw_recipes(image: np.ndarray, recipes: Sequence[Recipe]) -> np.ndarray:
    """`recipes` applied to `image`, (S, S, 3) uint8 RGB, beside their steps, four a row; a uint8 RGB sheet."""
    side, rows = image.shape[0], []
    for first in range(0, len(recipes), 4):
        cells = []
        for recipe in recipes[first : first + 4]:
            steps = "\n".join(describe(op) for op in recipe)
            degraded = apply_recipe(image, recipe, image[:, ::-1])
            cells += [degraded, _label(steps, 230, side)]
        rows.append(_row(cells, side, indent=0))
    return _stack(rows)


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of any width over each other, each 4 px apart, on white."""
    width = max(row.shape[1] for row in rows)
    spare = [((0, 4), (0, width - row.shape[1]), (0, 0)) for row in rows]
    padded = [np.pad(r, s, constant_values=255) for r, s in zip(rows, spare)]
    return np.concatenate(padded)


def _row(cells: list[np.ndarray], height: int, indent: int = 164) -> np.ndarray:
    """Cells side by side, 4 px apart, after `indent` white px."""
    parts = [np.full((height, indent, 3), 255, np.uint8)]
    for cell in cells:
        parts += [cell, np.full((height, 4, 3), 255, np.uint8)]
    return np.concatenate(parts, axis=1)


def _label(text: str, width: int, height: int) -> np.ndarray:
    """Black lines of `text` on white, (height, width, 3) uint8; lines that do not fit are counted."""
    label = np.full((height, width, 3), 255, np.uint8)
    lines, room = text.split("\n"), max(1, height // 13)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"and {len(lines) - room + 1} more"]
    for number, line in enumerate(lines):
        place = (4, 13 * number + 12)
        style = (cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        cv2.putText(label, line, place, *style)
    return label


@door("degradation")
def main(argv: list[str] | None = None) -> int:
    """Draw every op and twelve random recipes on `--image`, or the recipes of `--recipe`, into `--out`."""
    parser = argparse.ArgumentParser(
        prog="python -m solution.data.degradation",
        description="Draw every op at strengths 0.1 to 1 and twelve random recipes, or replay logged recipes.",
    )
    parser.add_argument("--image", type=Path, required=True, help="a picture")
    parser.add_argument("--out", type=Path, required=True, help="the sheet, .png")
    parser.add_argument("--side", type=int, default=168, help="px of a cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="write the twelve recipes here, JSON")
    parser.add_argument("--recipe", type=Path, help="replay recipes, JSON, one a line")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out {args.out}: expected a name that ends in .png")
    if args.side < 64:
        parser.error(f"--side {args.side}: expected at least 64 px")
    if args.log and args.recipe:
        parser.error("--log and --recipe: a replay draws no recipes that it could log")
    use_one_opencv_thread()
    square = _square(args.image, args.side, parser.error)
    if args.recipe:
        recipes = _read_recipes(args.recipe, parser.error)
        try:
            grid = draw_recipes(square, recipes)
        except (KeyError, TypeError, ValueError, cv2.error) as error:
            parser.error(f"--recipe {args.recipe}: it cannot be applied: {error}")
    else:
        drawn = [
            sample_recipe(DegradationConfig(global_p=1), np.random.default_rng(seed))
            for seed in ([args.seed, 100, index] for index in range(12))
        ]
        if args.log:
            lines = "".join(recipe_to_json(recipe) + "\n" for recipe in drawn)
            _write(args.log, "--log", lines.encode(), parser.error)
        grid = _stack([draw_ops(square, args.seed), draw_recipes(square, drawn)])
    _, data = cv2.imencode(".png", cv2.cvtColor(grid, cv2.COLOR_RGB2BGR))
    _write(args.out, "--out", data.tobytes(), parser.error)
    print(f"{args.out}: {grid.shape[1]} x {grid.shape[0]} px")
    return 0


def _square(path: Path, side: int, fail: Callable[[str], NoReturn]) -> np.ndarray:
    """The centre square of the picture at `path`, (side, side, 3) uint8 RGB."""
    from solution.data.images import UnreadableInput, decode_image, resize_image

    try:
        image = decode_image(path)
    except UnreadableInput as error:
        fail(str(error))
    height, width = image.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return resize_image(image[top : top + edge, left : left + edge], side, side)


def _read_recipes(path: Path, fail: Callable[[str], NoReturn]) -> list[Recipe]:
    """The recipes in the file at `path`, one line of JSON each."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        recipes = [recipe_from_json(line) for line in lines]
    except OSError as error:
        fail(f"--recipe {path}: {error.strerror}")
    except ValueError as error:
        fail(f"--recipe {path}: {error}")
    if not recipes:
        fail(f"--recipe {path}: no recipe in it")
    return recipes


def _write(path: Path, option: str, data: bytes, fail: Callable[[str], NoReturn]) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        fail(f"{option} {path}: {error.strerror}")


if __name__ == "__main__":
    raise SystemExit(main())
