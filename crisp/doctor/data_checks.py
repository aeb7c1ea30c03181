"""Whether shards can be made and read here, and every renderer shows the same of them."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from crisp.batch import Batch
from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.doctor.check import Finding, NotHere, Wrong
from crisp.doctor.config import Context
from crisp.doctor.photographs import write_photographs
from crisp.pipelines.constants import IMAGENET_STD
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.dali_extra import dali_available
from crisp.pipelines.loader import build_train_loader
from crisp.pipelines.plain import render_plain
from crisp.pipelines.plan import make_plan
from crisp.pipelines.source import Work
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.shard_imagenet.verify import verify_shards
from crisp.storage import Location

SHARDS = "shards"
"""Folder of the generated shards, in the scratch folder"""
IMAGES = 32
PIXELS = ("reference", "global_views", "local_views")
PLAIN_TOLERANCE = 0.05
"""Mean difference in levels of 255: both round to whole levels, and rarely to another one"""
DALI_TOLERANCE = {"dali-cpu": 0.5, "dali-gpu": 1.5}
"""Likewise: DALI keeps fractions between its stages, and a GPU's JPEG decoder rounds by itself"""


def shards(context: Context) -> Finding:
    """JPEGs become shards whose every byte is verified."""
    source, out = context.folder / "images", context.folder / SHARDS
    written = write_photographs(source, IMAGES)
    shard_imagenet(ShardConfig(source=str(source), out=str(out), shard_samples=8, workers=1))
    if problems := verify_shards(Location.of(str(out)), workers=1):
        raise Wrong(f"{len(problems)} problems; {problems[0].what}")
    kb = sum(path.stat().st_size for path in written) / len(written) / 1e3
    return Finding(figure=f"{IMAGES} images of {kb:.0f} kB", values={"images": IMAGES, "kb": kb})


def cpu_renderer(context: Context) -> Finding:
    """The compiled CPU renderer against the plain one in float64, every augmentation among the views."""
    views = ViewsConfig(reference_px=112, global_px=112, local_px=48, local_views=2)
    work = _work(write_photographs(context.folder / "plain", 5, seed=1), views)
    plan = work.plan
    for shown in (plan.solarize, plan.flip, plan.blur_sigma_px > 0, plan.color_factors[..., 3] != 0):
        assert shown.any(), "an augmentation is not among the views: take another seed"
    renderer = CpuRenderer(views, threads=2)
    with contextlib.closing(renderer):
        found, expected = renderer.render(work), render_plain(work, views)
    worst = _require_near(found, expected, PLAIN_TOLERANCE, "the CPU renderer", "the plain one")
    return Finding(figure=f"{worst:.1g} of 255 levels off, mean", values={"levels": worst})


def dali_renderer(context: Context) -> Finding:
    """DALI's loader (on the GPU where there is one) against the CPU renderer's, batch by batch."""
    if not dali_available():
        if context.device == "cuda":
            raise Wrong("DALI is not installed")
        raise NotHere("DALI is not installed")
    device, worst = torch.device(context.device), 0.0
    name = "dali-gpu" if device.type == "cuda" else "dali-cpu"
    expected = list(_batches(_config(context, renderer="cpu"), torch.device("cpu"), count=2))
    for found, of_cpu in zip(_batches(_config(context, renderer="dali"), device, count=2), expected, strict=True):
        _require_placed(found, device)
        levels = _require_near(found, of_cpu, DALI_TOLERANCE[name], name, "the CPU renderer")
        worst = max(worst, levels)
    return Finding(figure=f"{name}: {worst:.2f} of 255 levels off, mean", values={"levels": worst})


def loader_resumes(context: Context) -> Finding:
    """A loader that starts at a step gives the batch that one gives which came there, bit for bit."""
    config, device = _config(context, renderer="cpu"), torch.device("cpu")
    counted = list(_batches(config, device, count=3))[2]
    started = next(_batches(config, device, count=1, first_step=2))
    _require_equal(started, counted, "the batch of step 2, started there")
    return Finding(figure=f"step 2 again, {len(counted)} images bit for bit")


def loader_to_gpu(context: Context) -> Finding:
    """What the CPU renderer sends to the GPU arrives whole while the GPU is busy."""
    config, device = _config(context, renderer="cpu"), torch.device(context.device)
    expected = list(_batches(config, torch.device("cpu"), count=4))
    side = 2048 if device.type == "cuda" else 64
    load, late = torch.randn(side, side, device=device), []
    for batch in _batches(config, device, count=4):
        _require_placed(batch, device)
        for _ in range(8):
            load = load @ load / side**0.5
        late.append(Batch(**{field.name: getattr(batch, field.name).clone() for field in dataclasses.fields(Batch)}))
    for step, (found, of_host) in enumerate(zip(late, expected, strict=True)):
        _require_equal(found, of_host, f"the batch of step {step} on the GPU")
    return Finding(figure=f"{len(late)} batches bit for bit")


def _config(context: Context, *, renderer: str) -> TrainConfig:
    data = DataConfig(shards=str(context.folder / SHARDS), threads=2, parts=4)
    return TrainConfig(
        data=replace(data, renderer=renderer),  # type: ignore[arg-type]
        views=ViewsConfig(local_views=4),
        optim=OptimConfig(global_batch=8),
    )


def _batches(config: TrainConfig, device: torch.device, *, count: int, first_step: int = 0) -> Iterator[Batch]:
    loader = build_train_loader(config, rank=0, world_size=1, device=device)
    with contextlib.closing(loader):
        loader.load_state_dict({"step": first_step})
        yield from islice(iter(loader), count)


def _work(paths: list[Path], views: ViewsConfig) -> Work:
    sizes = np.array([Image.open(path).size for path in paths], np.int64)
    plan = make_plan(
        views, seed=4, epoch=0, sample_id=np.arange(len(paths)), height_px=sizes[:, 1], width_px=sizes[:, 0]
    )
    return Work(
        encoded=[memoryview(path.read_bytes()) for path in paths], plan=plan, label=np.zeros(len(paths), np.int64)
    )


def _require_near(found: Batch, expected: Batch, tolerance: float, one: str, other: str) -> float:
    """Images within a tolerance, all else equal; the worst mean difference of the three kinds, in levels of 255."""
    std, worst = torch.tensor(IMAGENET_STD, dtype=torch.float64)[:, None, None] * 255, 0.0
    for field in dataclasses.fields(Batch):
        ours, theirs = getattr(found, field.name).cpu(), getattr(expected, field.name).cpu()
        if field.name not in PIXELS:
            if not torch.equal(ours, theirs):
                raise Wrong(f"{field.name} of {one} is not that of {other}")
            continue
        levels = float(((ours.double() - theirs.double()) * std).abs().mean())
        if not levels <= tolerance:
            raise Wrong(f"{field.name} of {one} is {levels:.2f} of 255 levels off {other}'s, more than {tolerance:g}")
        worst = max(worst, levels)
    return worst


def _require_equal(found: Batch, expected: Batch, what: str) -> None:
    for field in dataclasses.fields(Batch):
        if not torch.equal(getattr(found, field.name).cpu(), getattr(expected, field.name).cpu()):
            raise Wrong(f"{what}: {field.name} is another")


def _require_placed(batch: Batch, device: torch.device) -> None:
    for field in dataclasses.fields(Batch):
        where = getattr(batch, field.name).device.type
        wanted = "cpu" if field.name == "patch_masks" else device.type
        if where != wanted:
            raise Wrong(f"{field.name} lies on {where}, it belongs on {wanted}")
