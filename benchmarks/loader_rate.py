"""How fast the loader of a run delivers by itself: the one that training builds, with nobody who trains."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from crisp.batch import Batch
from crisp.benchmarks.peers.clock import cpu_seconds
from crisp.config import TrainConfig
from crisp.pipelines.loader import TrainLoader, build_train_loader


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderRate:
    """One turn of the loader."""

    samples_per_s: float
    cpu_ms_per_sample: float
    """Of this process and all below it; unlike the rate, it hardly suffers from what else the machine does"""
    renderer: str
    """cpu, dali-cpu or dali-gpu"""


def measure_loader(config: TrainConfig, *, device: torch.device, seconds: float) -> LoaderRate:
    """Open the loader, let its prefetch become steady, and count batches for a while.

    Args:
        config: the run; its global batch is one rank's.
        device: where the batches shall lie.
        seconds: to count for; at least one batch is.

    Raises:
        CrispError: as `build_train_loader`.
    """
    loader = build_train_loader(config, rank=0, world_size=1, device=device)
    with contextlib.closing(loader):
        batches = iter(loader)
        # What is made ahead was begun before the clock: after as many batches and one more the rate is steady.
        for _ in range(config.data.prefetch_batches + 1):
            next(batches)
        return _count(batches, loader, device, seconds)


def _count(batches: Iterator[Batch], loader: TrainLoader, device: torch.device, seconds: float) -> LoaderRate:
    settle(device)
    samples, start_s, cpu_start_s = 0, time.perf_counter(), cpu_seconds()
    while samples == 0 or time.perf_counter() - start_s < seconds:
        samples += len(next(batches))
    settle(device)
    elapsed_s, cpu_s = time.perf_counter() - start_s, cpu_seconds() - cpu_start_s
    return LoaderRate(
        samples_per_s=samples / elapsed_s, cpu_ms_per_sample=cpu_s / samples * 1e3, renderer=loader.renderer
    )


def settle(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
