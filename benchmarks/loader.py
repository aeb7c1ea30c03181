"""Samples per second of each renderer, through the loader that training uses, against a torchvision/PIL loader.

    python -m crisp.benchmarks.loader --shards DIR [--backends cpu torchvision-pil] [--json FILE]

Backends take turns, so that what else the machine does falls on all of them; each turn opens its loader anew, lets it
run until its prefetch is steady, and then counts. Give it shards of photographs at their original size: small images
flatter whoever decodes slowly. `results/loader.md` has figures and what each change gave.
"""

import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from crisp.benchmarks.machine import processor
from crisp.benchmarks.peers.torchvision_pil import open_torchvision_pil
from crisp.config import DataConfig, Interpolation, OptimConfig, TrainConfig, ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.loader import build_train_loader, renderer_threads

Backend = Literal["cpu", "dali-cpu", "torchvision-pil"]

NOTES = (
    "torchvision-pil makes the same reference, global and local views, but no masks or affines; its colour is in HSV, "
    "contrast about the image's mean (ours: one YIQ matrix); its blur is three box filters (ours: the Gaussian)."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchConfig:
    """Measure loaders on a folder of shards."""

    shards: Path
    """Folder written by `crisp shard`."""
    backends: tuple[Backend, ...] = ("cpu", "dali-cpu", "torchvision-pil")
    """Loaders to measure."""
    threads: int = 0
    """Threads of a renderer, and workers of the DataLoader; 0: the cores of this machine."""
    batch: int = 32
    """Images per batch."""
    rounds: int = 3
    """Turns of each backend; the median is reported."""
    seconds: float = 4.0
    """Length of a turn, after its warm-up."""
    interpolation: Interpolation = "bicubic"
    """Filter of every resize."""
    json: Path | None = None
    """Also write configuration, machine and results here."""

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "seconds"):
            value = getattr(self, name)
            if value <= 0:
                raise CrispError(f"{name}={value}: must be positive")
        if not self.backends:
            raise CrispError("backends: none given; name one or more of cpu, dali-cpu, torchvision-pil")
        if self.threads < 0:
            raise CrispError(f"threads={self.threads}: must be 0 (all cores) or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn of one backend."""

    samples_per_s: float
    cpu_ms_per_sample: float
    """Of this process and its workers; unlike the rate, it hardly suffers from what else the machine does"""
    cores_busy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One backend: medians over its turns, and the slowest and the fastest turn."""

    backend: str
    samples_per_s: float
    slowest: float
    fastest: float
    cpu_ms_per_sample: float
    cores_busy: float


def bench_loader(config: LoaderBenchConfig) -> list[Result]:
    """Interleaved turns of every backend, in the order named.

    Raises:
        CrispError: shards that cannot be read, a batch larger than the data, DALI missing where it is named.
    """
    views = ViewsConfig(interpolation=config.interpolation)
    threads = renderer_threads(config.threads, 1)
    turns: dict[str, list[Turn]] = {backend: [] for backend in config.backends}
    for _ in range(config.rounds):
        for backend, done in turns.items():
            with _opener(backend, config, views, threads)() as batches:
                done.append(_take_turn(batches, config, threads))
    return [_summary(backend, done) for backend, done in turns.items()]


def _opener(
    backend: str, config: LoaderBenchConfig, views: ViewsConfig, threads: int
) -> Callable[[], AbstractContextManager[Iterator[Any]]]:
    if backend == "torchvision-pil":
        return lambda: open_torchvision_pil(config.shards, views, batch=config.batch, workers=threads)
    renderer: Literal["cpu", "dali"] = "cpu" if backend == "cpu" else "dali"
    train = TrainConfig(
        data=DataConfig(shards=config.shards, renderer=renderer, threads=threads, parts=1),
        views=views,
        optim=OptimConfig(global_batch=config.batch),
    )

    @contextmanager
    def open_crisp() -> Iterator[Iterator[Any]]:
        loader = build_train_loader(train, rank=0, world_size=1, device=torch.device("cpu"))
        try:
            yield iter(loader)
        finally:
            loader.close()

    return open_crisp


def _take_turn(batches: Iterator[Any], config: LoaderBenchConfig, threads: int) -> Turn:
    # Prefetch: 2 batches of ours, 2 per worker of a DataLoader; after these have gone the rate is steady.
    for _ in range(2 * threads + 2):
        next(batches)
    count, start, cpu_start = 0, time.perf_counter(), _cpu_seconds()
    # DataLoader workers make a batch each, and so deliver in volleys: whole volleys are counted.
    while count % threads or time.perf_counter() - start < config.seconds:
        next(batches)
        count += 1
    elapsed, cpu = time.perf_counter() - start, _cpu_seconds() - cpu_start
    samples = count * config.batch
    return Turn(samples_per_s=samples / elapsed, cpu_ms_per_sample=cpu / samples * 1e3, cores_busy=cpu / elapsed)


def _cpu_seconds() -> float:
    """Processor time of this process and of its living children."""
    total, ticks = time.process_time(), os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        # The fields after the command's name, which is in parentheses; user and system time are the 14th and 15th.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def _summary(backend: str, turns: Sequence[Turn]) -> Result:
    rates = [turn.samples_per_s for turn in turns]
    return Result(
        backend=backend,
        samples_per_s=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        cpu_ms_per_sample=statistics.median(turn.cpu_ms_per_sample for turn in turns),
        cores_busy=statistics.median(turn.cores_busy for turn in turns),
    )


def results_table(results: Sequence[Result]) -> Table:
    """The results for a terminal, against torchvision-pil where it was measured."""
    peer = next((result for result in results if result.backend == "torchvision-pil"), None)
    table = Table(title="loader", caption=NOTES if peer else None)
    table.add_column("backend", no_wrap=True)
    for heading in ("samples/s", "range", "CPU ms/sample", "cores busy", "× PIL"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.backend,
            f"{result.samples_per_s:.0f}",
            f"{result.slowest:.0f}–{result.fastest:.0f}",
            f"{result.cpu_ms_per_sample:.2f}",
            f"{result.cores_busy:.1f}",
            f"{result.samples_per_s / peer.samples_per_s:.1f}" if peer else "",
        )
    return table


def hardware() -> str:
    """Processor, usable cores, operating system and torch version, in one line."""
    return f"{processor()}, {platform.system()}, torch {torch.__version__}"


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(LoaderBenchConfig, args=args, prog="crisp bench loader", description=__doc__)
    results = bench_loader(config)
    console = Console()
    console.print(results_table(results))
    console.print(f"{date.today()}, {hardware()}", markup=False, highlight=False)
    if config.json is not None:
        measured = {
            "date": str(date.today()),
            "hardware": hardware(),
            "config": {**dataclasses.asdict(config), "shards": str(config.shards), "json": str(config.json)},
            "results": [dataclasses.asdict(result) for result in results],
        }
        config.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
