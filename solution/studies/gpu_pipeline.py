"""Stages of the GPU benchmark: from files to logits, and training with its loader."""

from __future__ import annotations

import copy
import gc
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from solution.data.drawn import drawn_face
from solution.studies.gpu_bench import (
    PHOTOS,
    STREAMS,
    Bench,
    LeftOut,
    build,
    config_of,
    forward_of,
    peak_gb,
    peak_reset,
    pictures,
)
from solution.studies.gpu_towers import departure, prepare_exact


# ------------------------------------------------------------------------------------------------ end to end
def draw_files(bench: Bench) -> list:
    """`Input`s: JPEG files of photographs and drawn faces, cut and brought to sizes by a seed, made once."""
    import cv2

    from solution.data.images import Input, decode_image

    folder = bench.folder / "pictures"
    if not folder.exists():
        folder.mkdir()
        photos = [decode_image(p) for p in sorted(PHOTOS.glob("*"))] if PHOTOS.is_dir() else []
        rng = np.random.default_rng(0)
        kinds = min(bench.sizes.files, 96)
        for index in range(kinds):
            side = int(bench.sizes.side * rng.uniform(0.6, 1.4))
            if photos and index % 2:
                picture = photos[int(rng.integers(len(photos)))]
                height = max(32, round(side * picture.shape[0] / picture.shape[1]))
                picture = cv2.resize(picture, (side, height), interpolation=cv2.INTER_AREA)
            else:
                picture = drawn_face(side, index)
            noisy = picture + rng.normal(0, 4, picture.shape)
            picture = np.clip(noisy, 0, 255).astype(np.uint8)
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))]
            path = folder / f"{index:05d}.jpg"
            cv2.imwrite(str(path), picture[:, :, ::-1].copy(), quality)
        for index in range(kinds, bench.sizes.files):
            shutil.copyfile(folder / f"{index % kinds:05d}.jpg", folder / f"{index:05d}.jpg")
    return [Input(path.name, path, "image") for path in sorted(folder.iterdir())]


def batches_of(inputs: Sequence, count: int, size: int) -> list[list[tuple[int, Any]]]:
    """Batches of (index, Input) of `count` inputs, from the first on again when they are used up."""
    listed = [(i, inputs[i % len(inputs)]) for i in range(count)]
    return [listed[i : i + size] for i in range(0, count, size)]


def steady_rate(parts: Iterable[int], skip: int) -> float:
    """Items/s of what yields how many items it made, from the `skip`-th part on (at least one is timed).

    All workers finish their first part at about the same time; without it, the rest is theirs at their own pace.
    """
    marks, total = [], 0
    begun = time.perf_counter()
    for count in parts:
        total += count
        marks.append((time.perf_counter(), total))
    if len(marks) == 1:
        return total / (marks[0][0] - begun)
    start, before = marks[min(skip, len(marks) - 1) - 1]
    end, _ = marks[-1]
    return (total - before) / (end - start)


def loader_only(bench: Bench, views: Sequence, batches: list) -> float:
    """Pictures/s of the scoring loader alone: decoding, faces, views, by its workers."""
    from torch.utils.data import DataLoader

    from solution.data.views import quiet_worker
    from solution.scoring.stream import Reader

    loader = DataLoader(
        Reader(views),
        sampler=batches,
        batch_size=None,
        num_workers=bench.workers,
        worker_init_fn=quiet_worker,
        pin_memory=bench.device.type == "cuda",
        prefetch_factor=2,
    )
    return steady_rate((len(part.rows) for part in loader), bench.workers)


def towers_only(bench: Bench, ensemble: Any) -> float:
    """Pictures/s of an ensemble on views that lie on the device, a transfer of its logits a batch."""
    import torch

    size = ensemble.batch_size
    views = [pictures(bench, size, v.view.side) for v in ensemble.views]
    ensemble.launch(views)
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    begun, before = time.perf_counter(), None
    rounds = max(4, min(20, 1024 // size)) if bench.device.type == "cuda" else 1
    for _ in range(rounds):
        launched = ensemble.launch(views)
        if before is not None:
            before.double().cpu()
        before = launched
    before.double().cpu()
    return rounds * size / (time.perf_counter() - begun)


def both(bench: Bench, ensemble: Any, batches: list) -> float:
    """Pictures/s of files to logits, as submit.py does it."""
    from solution.scoring.stream import Reader, stream

    rows = stream(ensemble, batches, Reader(ensemble.views), workers=bench.workers)
    skip = min(bench.workers, max(1, len(batches) // 4))
    return steady_rate((len(done) for done in rows), skip)


def pipeline(bench: Bench, entry: dict, ensemble: Any, inputs: list, count: int) -> None:
    """Loader alone, towers alone and both; which of them starves the other, and second looks."""
    batches = batches_of(inputs, count, ensemble.batch_size)
    entry["ensemble"], entry["pictures"] = ensemble.describe(), count
    entry["batch"], entry["workers"] = ensemble.batch_size, bench.workers
    entry["towers_only"] = towers_only(bench, ensemble)
    # Small batches, so that many of them come from every worker.
    small = batches_of(inputs, count, min(16, ensemble.batch_size))
    entry["loader_only"] = loader_only(bench, ensemble.views, small)
    slower = "loader" if entry["loader_only"] < entry["towers_only"] else "towers"
    entry["bound_by"] = slower
    entry["end_to_end"] = both(bench, ensemble, batches)
    looks = sum(ensemble.looks.values()) / count / len(ensemble.members)
    entry["second_looks"] = looks


def trained(bench: Bench, **options) -> Any:
    """The trained bundle's ensemble."""
    from solution.scoring.ensemble import load_ensemble

    return load_ensemble(
        bench.weights,
        str(bench.device),
        members=bench.sizes.bundle_members,
        batch_size=bench.sizes.bundle_batch,
        **options,
    )


def stage_pipeline_compact(bench: Bench, entry: dict) -> None:
    """The trained bundle, as submit.py scores it: with and without second looks, and compiled."""
    need_bundle(bench)
    inputs = draw_files(bench)
    count = bench.sizes.files * bench.sizes.listed
    for name, looks in (("without_second_looks", False), ("default", True)):
        bench.need(10, name)
        ensemble = trained(bench, second_look=looks)
        pipeline(bench, entry.setdefault(name, {}), ensemble, inputs, count)


def need_bundle(bench: Bench) -> None:
    """Go on only where the trained bundle is.

    Raises:
        LeftOut: it is not.
    """
    from solution.bundles.store import COMPACT

    folder = COMPACT if bench.weights == "compact" else Path(bench.weights)
    if not folder.is_dir():
        raise LeftOut(f"no bundle {bench.weights} here")


def stage_pipeline_giant(bench: Bench, entry: dict) -> None:
    """Three giant streams from files: ours with and without second looks, against three float32 runs of their own."""
    import torch

    from solution.config import VoteConfig
    from solution.models.calibration import Calibrator
    from solution.scoring.ensemble import Ensemble, make_fast

    prepare_exact(bench)
    inputs = draw_files(bench)
    calibrators = {}
    for name, exact in bench.logits["float32"].items():
        slope = 2 / max(float(exact.std()), 1e-9)
        calibrators[name] = Calibrator("platt", (slope, -slope * float(np.median(exact))))

    def ensemble(names, members, kind, batch):
        return Ensemble(
            members=members,
            configs={name: bench.configs[name] for name in names},
            vote=VoteConfig(dict.fromkeys(names, 1)),
            calibrators={name: calibrators[name] for name in names},
            hash="random",
            device=bench.device,
            precision=kind,
            batch_size=batch,
        )

    for name, looks in (("without_second_looks", False), ("with_second_looks", True)):
        bench.need(20, name)
        made = ensemble(STREAMS, copy.deepcopy(bench.exact), "float16", bench.batch)
        make_fast(made, second_look=looks)
        pipeline(bench, entry.setdefault(name, {}), made, inputs, bench.sizes.giant_files)
        del made
    spent = 0.0
    for name in STREAMS:
        bench.need(15, f"{name} alone in float32")
        alone = {name: copy.deepcopy(bench.exact[name])}
        made = ensemble([name], alone, "float32", min(16, bench.sizes.batch))
        batches = batches_of(inputs, bench.sizes.plain_files, made.batch_size)
        spent += 1 / both(bench, made, batches)
        del made, alone
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    entry["straightforward_end_to_end"] = 1 / spent
    ours_rate = entry["without_second_looks"]["end_to_end"]
    entry["times_the_straightforward_way"] = ours_rate * spent


def engine(config: Any) -> Any:
    """The degradation without drawn text where OpenCV, from 5 on, draws none on float pictures."""
    import cv2

    return replace(config, text_p=0.0) if int(cv2.__version__[0]) >= 5 else config


def stage_compact_parity(bench: Bench, entry: dict) -> None:
    """The trained bundle on the bundled photographs, degraded many ways: default and plain half against float32."""
    from solution.config import DegradationConfig
    from solution.data.manifest import Item
    from solution.scoring.stream import score_pictures

    need_bundle(bench)
    photos = sorted(PHOTOS.glob("*")) if PHOTOS.is_dir() else []
    if not photos:
        raise LeftOut("the bundled photographs are not here")
    each = max(1, 8 * bench.sizes.parity // len(photos) // 2)
    items = [Item(f"{p.name}#{k}", p, 0) for p in photos for k in range(each)]
    entry["pictures"] = len(items)
    ways = {
        "float32": {"exact": True},
        "default": {},
        "without_second_looks": {"second_look": False},
        "bfloat16": {"second_look": False, "precision": "bfloat16"},
    }
    exact: dict[str, np.ndarray] = {}
    for way, options in ways.items():
        bench.need(8, way)
        ensemble = trained(bench, **options)
        logits = score_pictures(
            ensemble,
            items,
            degradation=engine(DegradationConfig(global_p=1.0)),
            batch_size=min(32, ensemble.batch_size),
            workers=bench.workers,
            progress=False,
        )
        p = {n: ensemble.calibrators[n].apply(z) for n, z in logits.items()}
        if way == "float32":
            exact = p
            continue
        entry[way] = {n: departure(v, exact[n], ensemble.vote.step) for n, v in p.items()}
        pairs = [(v, exact[n]) for n, v in p.items()]
        joined = (np.concatenate(part) for part in zip(*pairs))
        entry[way]["all"] = departure(*joined, ensemble.vote.step)
        looks = sum(ensemble.looks.values()) / len(items) / len(p)
        entry[way]["second_looks"] = looks


# ------------------------------------------------------------------------------------------------ training
def stage_training(bench: Bench, entry: dict) -> None:
    """A LoRA step of giant `global`, checkpointing off and on; the compact tower's whole fine-tuning at its sides."""
    import torch

    bench.exact = {}
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    configs, members = build(bench, ["global"])
    batch = bench.sizes.train
    for slim in (False, True):
        bench.need(10, "a LoRA step")
        members["global"].tower.checkpointing = slim
        name = "lora, checkpointing" if slim else "lora"
        entry[name] = train_rate(bench, members["global"], batch, configs["global"].view.side)
    del members
    configs, members = build(bench, ["wide"], preset_name=bench.sizes.whole_preset)
    for side in bench.sizes.sides:
        bench.need(8, f"whole fine-tuning at {side} px")
        name = f"whole, {side} px"
        entry[name] = train_rate(bench, members["wide"], bench.sizes.whole, side)


def train_rate(bench: Bench, member: Any, batch: int, side: int) -> dict[str, Any]:
    """Pictures/s of training steps in bfloat16 autocast by when they read their numbers, and peak memory.

    pictures_per_s: once a step, as train.py does. reads_at_once: each as soon as it is asked for. without_reads: never.
    """
    from solution.models.optimization import make_optimizer, phases

    member.train()
    optimizer = make_optimizer(member, phases(member.config)[-1])
    data = training_batch(bench, batch, side)
    peak_reset(bench)
    result: dict[str, Any] = {"batch": batch}
    ways = {
        "pictures_per_s": "once",
        "reads_at_once": "at once",
        "without_reads": "never",
    }
    for name, reads in ways.items():
        spent = step_seconds(bench, member, optimizer, data, reads)
        result[name] = batch / spent
    result["peak_gb"] = peak_gb(bench)
    return result


def training_batch(bench: Bench, batch: int, side: int):
    """A `Batch` of half real, half fake pictures, on the host, page-locked for a GPU."""
    import torch

    from solution.records import Batch

    images = pictures(bench, batch, side).cpu()
    if bench.device.type == "cuda":
        images = images.pin_memory()
    return Batch(images=images, labels=torch.arange(batch) % 2)


def step_seconds(bench: Bench, member: Any, optimizer: Any, data: Any, reads: str) -> float:
    """Wall seconds a training step; reads: of loss and gradient norm, `once` (late), `at once`, or `never`."""
    import torch
    from torch import nn

    from solution.models.optimization import phases
    from solution.models.streams import as_two_class, focal_loss

    limit = phases(member.config)[-1].optim.clip_norm
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step():
        optimizer.zero_grad(set_to_none=True)
        batch = data.to(bench.device)
        with torch.autocast(bench.device.type, torch.bfloat16):
            output = member(batch.images)
            loss = focal_loss(as_two_class(output.logit), batch.labels)
        if reads == "at once":
            # Finite or not, its part for the log, and itself.
            float(torch.isfinite(loss)), loss.item(), loss.item()
        loss.backward()
        if reads == "once" and not np.isfinite(loss.item()):
            raise RuntimeError("the loss of a training step is not finite")
        if limit:
            norm = nn.utils.clip_grad_norm_(trained, limit)
            if reads == "at once":
                norm.item()
        optimizer.step()
        if limit and reads == "once":
            norm.item()

    cuda = bench.device.type == "cuda"
    rounds = 10 if cuda else 1
    for _ in range(3 if cuda else 1):
        step()
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(rounds):
        step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / rounds


def stage_training_loader(bench: Bench, entry: dict) -> None:
    """Pictures/s of the training loader alone (decoding, augmentation, the engine), beside the steps' rates."""
    from solution.data.epochs import Sample
    from solution.data.manifest import Item
    from solution.data.training import TrainingViews, training_loader

    items = [Item(given.name, given.path, index % 2) for index, given in enumerate(draw_files(bench))]
    batch, entry["workers"] = min(32, bench.sizes.whole), bench.workers
    for name in dict.fromkeys((bench.sizes.whole_preset, bench.sizes.preset)):
        bench.need(12, f"the loader of {name}")
        config = config_of(bench, name, "global")
        config = replace(config, degradation=engine(config.degradation))
        plan = [
            [Sample(0, b * batch + i, (b * batch + i) % len(items), False) for i in range(batch)]
            for b in range(bench.sizes.loader_batches)
        ]
        views = TrainingViews(items, config, {}, 0)
        loader = training_loader(views, plan, workers=bench.workers)
        entry[name] = steady_rate((len(part.labels) for part in loader), bench.workers)
    steps = bench.found["stages"].get("training", {})
    for name, step in steps.items():
        if isinstance(step, dict):
            preset_name = bench.sizes.whole_preset if "whole" in name else bench.sizes.preset
            faster = entry[preset_name] > step["pictures_per_s"]
            entry[f"{name} is bound by"] = "the step" if faster else "the loader"


def stage_syncs(bench: Bench, entry: dict) -> None:
    """What waiting for numbers costs: each batch's logits at once, one batch late, or at the end; small steps."""
    import torch

    configs, members = build(bench, ["wide"], preset_name=bench.sizes.whole_preset)
    member, side = members["wide"], configs["wide"].view.side
    for batch in dict.fromkeys((bench.sizes.train, bench.sizes.whole)):
        views = pictures(bench, batch, side)
        call = forward_of(member, views)
        rounds = 30 if bench.device.type == "cuda" else 1
        found: dict[str, float] = {}
        for way in ("at the end", "one late", "at once"):
            call()
            waiting: list[Any] = []
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(rounds):
                waiting.append(call())
                if way == "at once" or (way == "one late" and len(waiting) > 1):
                    waiting.pop(0).double().cpu()
            for left in waiting:
                left.double().cpu()
            found[way] = rounds * batch / (time.perf_counter() - begun)
        entry[f"scoring, batch {batch}, pictures_per_s"] = found
        bench.need(4, "training steps")
        entry[f"training, batch {batch}"] = train_rate(bench, member, batch, side)
        member.eval()
