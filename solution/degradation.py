"""The extreme compound engine: sample a `Recipe`, apply a `Recipe`.

A recipe is data: a tuple of `Op(name, params)` with plain JSON values, so a run can log and replay what it saw. All
randomness that matters is in it (noise ops carry their seed); the same recipe on the same picture gives the same bytes.

Pictures are RGB HWC, float32 in [0, 1] (`apply_recipe`) or uint8 too (`degrade`); the input is never written, the
output has its shape and type. The working picture shrinks and grows with its resizes, by at most `config.growth` times
the input side (2: the published code has no bound, which touches 1.6 % of the pictures and makes its slowest ones), and
is resized back at the end. No op but that resize moves pixels beyond the picture's own grid, so localisation masks stay
valid.

Source: arXiv 2604.25889, the compound degradation engine. `python -m solution.degradation --image X --out grid.png`
draws what the members train on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from solution import degradation_ops as ops
from solution.config import OPS, DegradationConfig


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


def _draw_op(
    name: str, strength: float, config: DegradationConfig, rng: np.random.Generator
) -> Op:
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


def apply_recipe(
    image: np.ndarray, recipe: Recipe, donor: np.ndarray | None = None
) -> np.ndarray:
    """Apply `recipe` to `image`, float32 RGB HWC in [0, 1]; a new array of the same shape and type.

    donor: another picture (uint8 or float32 HWC) from which a pasted patch is cut; without one the patch is replaced by
    the text that was drawn with it.

    Raises:
        TypeError, ValueError: an image that is not float32 HWC with three channels; an unknown op.
    """
    if image.dtype != np.float32:
        raise TypeError(f"apply_recipe takes float32 in [0, 1], found {image.dtype}")
    return ops.to_float(_run(image, recipe, donor))


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
    if image.dtype not in (np.uint8, np.float32):
        raise TypeError(f"degrade takes uint8 or float32, found {image.dtype}")
    recipe = sample_recipe(config, rng)
    if callable(donor):
        donor = donor() if any(_pastes(op) for op in recipe) else None
    degraded = _run(image, recipe, donor)
    return ops.to_uint8(degraded) if image.dtype == np.uint8 else ops.to_float(degraded)


def _pastes(op: Op) -> bool:
    return op.name == "distractor" and op.params["kind"] == "patch"


def _run(image: np.ndarray, recipe: Recipe, donor: np.ndarray | None) -> np.ndarray:
    """Apply `recipe` to a uint8 or float32 picture; a new array, which may be either."""
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
    return work.copy() if work is image else work


def apply_op(
    work: np.ndarray, op: Op, shape: tuple[int, int], donor: np.ndarray | None = None
) -> np.ndarray:
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


def draw_grid(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """Every op at strengths 0.1 to 1 (rows by columns), then twelve random recipes with their steps.

    image: (S, S, 3) uint8 RGB. Returns a labelled uint8 RGB sheet; cells are shown pixel for pixel.
    """
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
    for first in range(0, 12, 4):
        cells = []
        for index in range(first, first + 4):
            rng = np.random.default_rng([seed, 100, index])
            recipe = sample_recipe(DegradationConfig(global_p=1), rng)
            degraded = ops.to_uint8(_run(image, recipe, donor))
            steps = "\n".join(describe(op) for op in recipe)
            cells += [degraded, _label(steps, 230, side)]
        rows.append(_row(cells, side, indent=0))
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


def main(argv: list[str] | None = None) -> int:
    """Draw the grid of `--image` into `--out`."""
    from solution.images import UnreadableInput, decode_image, resize_image

    parser = argparse.ArgumentParser(
        prog="python -m solution.degradation",
        description="Draw every op at strengths 0.1 to 1 and twelve random recipes.",
    )
    parser.add_argument("--image", type=Path, required=True, help="a picture")
    parser.add_argument("--out", type=Path, required=True, help="the sheet, .png")
    parser.add_argument("--side", type=int, default=168, help="px of a cell")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out {args.out}: expected a name that ends in .png")
    if args.side < 64:
        parser.error(f"--side {args.side}: expected at least 64 px")
    use_one_opencv_thread()
    try:
        image = decode_image(args.image)
    except UnreadableInput as error:
        parser.error(str(error))
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    grid = draw_grid(resize_image(square, args.side, args.side), args.seed)
    _, data = cv2.imencode(".png", cv2.cvtColor(grid, cv2.COLOR_RGB2BGR))
    try:
        args.out.write_bytes(data)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    print(f"{args.out}: {grid.shape[1]} x {grid.shape[0]} px")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
