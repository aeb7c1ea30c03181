"""How fast the step and the loader are here, briefly. `crisp bench step` and `crisp bench loader` measure with care."""

import time
from dataclasses import replace
from typing import Literal

import torch

from crisp.benchmarks.intervals import median_interval
from crisp.benchmarks.loader_rate import measure_loader, settle
from crisp.benchmarks.step_contenders import CONTENDERS, synthetic_batch
from crisp.config import TrainConfig
from crisp.doctor.check import Finding, Wrong
from crisp.doctor.config import Context
from crisp.doctor.data_checks import SHARDS
from crisp.pipelines.dali_extra import dali_available
from crisp.recipes import recipe_named

RECIPE = {"cpu": "demo", "cuda": "vits16"}
"""Whose step is measured: ViT-S/16 takes a CPU minutes"""
BATCH = 32
STEPS = {"cpu": 7, "cuda": 15}
WARM_UP = 3
LOADER_S = 2.0


def _config(context: Context) -> TrainConfig:
    recipe = recipe_named(RECIPE[context.device])
    return replace(
        recipe,
        data=replace(recipe.data, shards=str(context.folder / SHARDS), parts=1, renderer=_renderer(context)),
        optim=replace(recipe.optim, global_batch=BATCH, micro_batch=0 if context.device == "cuda" else BATCH),
    )


def _renderer(context: Context) -> Literal["auto", "cpu"]:
    return "auto" if context.device == "cuda" and dali_available() else "cpu"


def step(context: Context) -> Finding:
    """Training steps on a batch that is already there."""
    config, device = _config(context), torch.device(context.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    take = CONTENDERS["crisp"](config, synthetic_batch(config, device))
    seconds = []
    for number in range(-WARM_UP, STEPS[context.device]):
        settle(device)
        start_s = time.perf_counter()
        take()
        settle(device)
        if number >= 0:
            seconds.append(time.perf_counter() - start_s)
    interval = median_interval(seconds)
    values = {"step_s": interval.median, "images_per_s": BATCH / interval.median}
    said = f"{config.recipe}, batch {BATCH}, {config.precision}: {interval} s, {values['images_per_s']:.0f} images/s"
    if device.type == "cuda":
        values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        said += f", {values['peak_gb']:.1f} GB"
    return Finding(figure=said, values=values)


def loader(context: Context) -> Finding:
    """The loader of that run alone, from generated images of ImageNet's size that lie in memory."""
    rate = measure_loader(_config(context), device=torch.device(context.device), seconds=LOADER_S)
    return Finding(
        figure=f"{rate.renderer}: {rate.samples_per_s:.0f} images/s, {rate.cpu_ms_per_sample:.1f} ms of CPU each",
        values={"samples_per_s": rate.samples_per_s, "cpu_ms_per_sample": rate.cpu_ms_per_sample},
    )


def headroom(context: Context) -> Finding:
    """How much faster the loader is than the step that it feeds."""
    ratio = context.values["loader speed"]["samples_per_s"] / context.values["step speed"]["images_per_s"]
    if context.device == "cuda" and ratio < 1:
        raise Wrong(f"the loader delivers {ratio:.2f} times what the step takes: training waits for it")
    shared = "" if context.device == "cuda" else "; both had all cores, which they share when training"
    return Finding(figure=f"the loader delivers {ratio:.1f} times what the step takes{shared}", values={"ratio": ratio})
