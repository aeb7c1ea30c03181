"""How many GPUs this node can feed, from measured rates, for originals and for shards of 320 and 256 px.

    crisp bench feed --images DIR [--gpu-images-per-s 400 1000 2500] [--json FILE]
    crisp bench feed --shards DIR …                                              (or: python -m crisp.benchmarks.feed)

The images are sharded as they are, and re-encoded at quality 90 with a short side of 320 and 256 px, into a temporary
folder. Then the training loader is measured on each, in turns; nothing is trained meanwhile. A node that delivers R
samples/s feeds R ÷ G GPUs that each train on G images/s, rounded down to a tenth. `results/feed.md` has figures.
"""

import dataclasses
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from crisp.benchmarks.loader_backends import extract_images
from crisp.benchmarks.loader_rate import LoaderRate, measure_loader
from crisp.benchmarks.machine import hardware
from crisp.benchmarks.report_file import check_report, write_report
from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.distributed import pick_device
from crisp.errors import CrispError
from crisp.shard_format import open_shards
from crisp.shard_imagenet import ShardConfig, shard_imagenet

log = logging.getLogger(__name__)

SHORT_SIDES_PX = (320, 256)
QUALITY = 90

ASSUMPTIONS = (
    "Assumed: the shards lie in the page cache, so storage must deliver the MB/s shown; every core of the node is free "
    "for the loader; all GPUs' ranks together are as fast as the one loader measured here, which has all cores."
)
_ON_CPU = (
    "Measured with batches left in the memory of the host. With GPUs in the node, DALI decodes and renders on them: "
    "measure there with --device gpu."
)
_ON_GPU = (
    "Measured with one GPU to itself, on which DALI decodes and renders: while that GPU trains it is slower, and each "
    "further GPU brings a renderer of its own, which shares the cores with the others."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedConfig:
    """Measure how many GPUs this node can feed."""

    images: str | None = None
    """Photographs at their original size, in any layout that `crisp shard` takes; a few thousand are plenty."""
    shards: Path | None = None
    """In place of images: a folder written by `crisp shard`, bytes untouched."""
    max_images: int = 4000
    """Of the shards, so many images are taken, evenly spread."""
    gpu_images_per_s: tuple[float, ...] = (400, 1000, 2500)
    """Images per second that one GPU trains on; several may be named."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where the batches shall lie; on the GPU, DALI renders there."""
    threads: int = 0
    """Threads of the renderer; 0: the cores of this machine."""
    batch: int = 64
    """Images per batch."""
    rounds: int = 5
    """Turns on each of the shards; medians are reported."""
    seconds: float = 4.0
    """Length of a turn, after its warm-up."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The recipe."""
    json: Path | None = None
    """Also write configuration, machine and results here."""

    def __post_init__(self) -> None:
        if (self.images is None) == (self.shards is None):
            raise CrispError("give one of --images DIR and --shards DIR: what shall be measured")
        for name in ("max_images", "batch", "rounds", "seconds"):
            value = getattr(self, name)
            if value <= 0:
                raise CrispError(f"{name}={value}: must be positive")
        if self.threads < 0:
            raise CrispError(f"threads={self.threads}: must be 0 (all cores) or more")
        if not self.gpu_images_per_s or min(self.gpu_images_per_s) <= 0:
            raise CrispError(f"gpu_images_per_s={self.gpu_images_per_s}: name positive rates, as in 400 1000")

    @property
    def cores(self) -> int:
        """That the renderer may use."""
        available = len(os.sched_getaffinity(0))
        return min(self.threads, available) if self.threads else available

    def train_config(self, shards: Path) -> TrainConfig:
        """The run whose loader is measured."""
        return TrainConfig(
            data=DataConfig(shards=str(shards), threads=self.threads, parts=1),
            views=self.views,
            optim=OptimConfig(global_batch=self.batch),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fed:
    """What one kind of shards gives: medians over the rounds."""

    shards: str
    """'original' or the short side"""
    samples: int
    kb_per_sample: float
    """Of the image files, in 10³ bytes"""
    samples_per_s: float
    slowest: float
    fastest: float
    rounds: list[float]
    """Samples per second of each round"""
    samples_per_s_per_core: float
    cpu_ms_per_sample: float
    read_mb_per_s: float
    """What storage delivers at this rate, in 10⁶ bytes"""
    renderer: str
    gpus: dict[str, float]
    """GPUs that the node feeds, by their images per second"""


def gpus_fed(samples_per_s: float, gpu_images_per_s: float) -> float:
    """GPUs of a rate that a node of a rate keeps busy, rounded down to a tenth."""
    return math.floor(10 * samples_per_s / gpu_images_per_s) / 10


def read_mb_per_s(samples_per_s: float, kb_per_sample: float) -> float:
    """What must come from storage, in 10⁶ bytes per second."""
    return samples_per_s * kb_per_sample / 1e3


def summarise(
    name: str,
    turns: Sequence[LoaderRate],
    *,
    samples: int,
    kb_per_sample: float,
    cores: int,
    gpu_images_per_s: Sequence[float],
) -> Fed:
    """The turns on one kind of shards."""
    rates = [turn.samples_per_s for turn in turns]
    rate = statistics.median(rates)
    return Fed(
        shards=name,
        samples=samples,
        kb_per_sample=kb_per_sample,
        samples_per_s=rate,
        slowest=min(rates),
        fastest=max(rates),
        rounds=rates,
        samples_per_s_per_core=rate / cores,
        cpu_ms_per_sample=statistics.median(turn.cpu_ms_per_sample for turn in turns),
        read_mb_per_s=read_mb_per_s(rate, kb_per_sample),
        renderer=turns[0].renderer,
        gpus={f"{gpu_rate:g}": gpus_fed(rate, gpu_rate) for gpu_rate in gpu_images_per_s},
    )


def bench_feed(config: FeedConfig) -> list[Fed]:
    """Shard, then measure in turns.

    Raises:
        CrispError: images or shards that cannot be read, fewer than a batch, no GPU where one is asked for.
    """
    device = pick_device("cuda" if config.device == "gpu" else "cpu", 0)
    with tempfile.TemporaryDirectory(prefix="crisp-bench-") as folder:
        made = make_shards(config, Path(folder))
        turns: dict[str, list[LoaderRate]] = {name: [] for name in made}
        for number in range(1, config.rounds + 1):
            for name, shards in made.items():
                turn = measure_loader(config.train_config(shards), device=device, seconds=config.seconds)
                turns[name].append(turn)
                log.info("round %d of %d: %s: %.0f samples/s", number, config.rounds, name, turn.samples_per_s)
        results = []
        for name, shards in made.items():
            index = open_shards(shards)[1]
            results.append(
                summarise(
                    name,
                    turns[name],
                    samples=len(index),
                    kb_per_sample=float(index["length"].mean()) / 1e3,
                    cores=config.cores,
                    gpu_images_per_s=config.gpu_images_per_s,
                )
            )
    return results


def make_shards(config: FeedConfig, folder: Path) -> dict[str, Path]:
    """The same images as they are and re-encoded, by name.

    Raises:
        CrispError: they cannot be read, or are fewer than a batch.
    """
    if config.shards is not None:
        source = str(extract_images(config.shards, folder, limit=config.max_images))
    else:
        assert config.images is not None, "one of the two"
        source = config.images
    original = _shard(source, folder / "original", short_side=None)
    samples = open_shards(original)[0].samples
    if samples < config.batch:
        raise CrispError(f"batch={config.batch}: there are {samples} images; take a smaller batch, or more images")
    made = {"original": original}
    for side in SHORT_SIDES_PX:
        # From the shards just written: the same images in the same order, whatever the layout of the source.
        made[f"{side} px"] = _shard(str(original), folder / str(side), short_side=side)
    return made


def _shard(source: str, out: Path, *, short_side: int | None) -> Path:
    cfg = ShardConfig(source=source, out=str(out), short_side=short_side, quality=QUALITY)
    done = shard_imagenet(cfg)
    # A source with train and val gives two folders; training reads the first.
    split = next((each for each in done if each.split == "train"), done[0])
    return Path(str(split.out))


# --- the command line -----------------------------------------------------------------------------------------------


def rates_table(results: Sequence[Fed]) -> Table:
    """What the loader delivers from each kind of shards."""
    table = Table(title="loader alone", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("shards", no_wrap=True)
    for heading in ("kB each", "samples/s", "range", "per core", "CPU ms each", "reads MB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for fed in results:
        table.add_row(
            fed.shards,
            f"{fed.kb_per_sample:.1f}",
            f"{fed.samples_per_s:.0f}",
            f"{fed.slowest:.0f}–{fed.fastest:.0f}",
            f"{fed.samples_per_s_per_core:.0f}",
            f"{fed.cpu_ms_per_sample:.2f}",
            f"{fed.read_mb_per_s:.0f}",
        )
    return table


def gpus_table(results: Sequence[Fed]) -> Table:
    """GPUs that this node feeds, by the images per second of one."""
    table = Table(title="GPUs that this node feeds", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("GPU trains on", no_wrap=True)
    for fed in results:
        table.add_column(fed.shards, justify="right", no_wrap=True)
    for rate in results[0].gpus:
        table.add_row(f"{rate} img/s", *(f"{fed.gpus[rate]:.1f}" for fed in results))
    return table


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(FeedConfig, args=args, prog="crisp bench feed", description=__doc__)
    check_report(config.json)
    console = Console()
    about = hardware()  # before: the load is what others do
    results = bench_feed(config)
    console.print(rates_table(results))
    console.print(gpus_table(results))
    console.print(
        f"{results[0].samples} images, renderer {results[0].renderer}, {config.cores} cores.", highlight=False
    )
    console.print(f"{ASSUMPTIONS} {_ON_CPU if config.device == 'cpu' else _ON_GPU}", highlight=False)
    console.print(f"{date.today()}, {about}", markup=False, highlight=False)
    write_report(
        config.json, config, hardware=about, measured={"results": [dataclasses.asdict(fed) for fed in results]}
    )


if __name__ == "__main__":
    main()
