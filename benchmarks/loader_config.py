"""What `crisp bench loader` measures, and the work order of a single turn."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crisp.benchmarks.loader_backends import BACKENDS
from crisp.config import DaliConfig, DataConfig, OptimConfig, TrainConfig, ViewsConfig, to_json
from crisp.errors import CrispError

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchConfig:
    """Measure loaders on a folder of shards."""

    shards: Path
    """Folder written by `crisp shard`."""
    backends: tuple[str, ...] = ()
    """Loaders to measure: cpu, dali (our renderers), dali-random, torchvision-pil, webdataset-pil, torchvision-v2, spdl
    (others), decode-only, cached-batch (ceilings). Default: all that are installed."""
    device: Device = "cpu"
    """Where the batches shall lie, and where DALI renders."""
    threads: int = 0
    """Threads of a renderer; 0: the cores of this machine."""
    workers: int = 0
    """Processes of a DataLoader; 0: as many as threads."""
    batch: int = 32
    """Images per batch."""
    rounds: int = 3
    """Turns of each backend; the median is reported."""
    seconds: float = 4.0
    """Length of a turn, after its warm-up."""
    prefetch_batches: int = 2
    """Batches that our renderers and DALI make ahead."""
    read_threads: int = 4
    """Threads that read images ahead of the CPU renderer."""
    dali: DaliConfig = field(default_factory=DaliConfig)
    """Of our DALI renderer."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The recipe."""
    ceiling: bool = True
    """Measure the parts of the CPU renderer, and how it grows from one thread to all."""
    folder_images: int = 5000
    """Images, spread over the shards, that are copied to a temporary folder for loaders that read folders."""
    peers_python: Path | None = None
    """Interpreter for spdl (peers/requirements.txt); default: this one."""
    tune: bool = False
    """Find the best settings of our renderer for this machine, and print the flags for `crisp train`."""
    json: Path | None = None
    """Also write configuration, machine and results here."""
    picture: Path | None = None
    """Also draw the results here, as a PNG."""

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "seconds", "prefetch_batches", "read_threads", "folder_images"):
            value = getattr(self, name)
            if value <= 0:
                raise CrispError(f"{name}={value}: must be positive")
        for name, automatic in (("threads", "all cores"), ("workers", "as many as threads")):
            value = getattr(self, name)
            if value < 0:
                raise CrispError(f"{name}={value}: must be 0 ({automatic}) or more")
        for name in self.backends:
            if name not in BACKENDS:
                raise CrispError(f"backends: there is no {name!r}; choose from {', '.join(BACKENDS)}")
            if self.backends.count(name) > 1:
                raise CrispError(f"backends: {name} is named twice; name it once")

    @property
    def used_threads(self) -> int:
        """Threads of a renderer."""
        return self.threads or len(os.sched_getaffinity(0))

    def train_config(self, *, renderer: Literal["cpu", "dali"] = "cpu", threads: int = 0) -> TrainConfig:
        """The run whose loader is measured; `threads` other than those configured, where given."""
        return TrainConfig(
            data=DataConfig(
                shards=str(self.shards),
                renderer=renderer,
                threads=threads or self.used_threads,
                prefetch_batches=self.prefetch_batches,
                read_threads=self.read_threads,
                parts=1,
                dali=self.dali,
            ),
            views=self.views,
            optim=OptimConfig(global_batch=self.batch),
        )

    def spec(self, backend: str, run: TrainConfig, *, folder: Path | None = None) -> dict[str, Any]:
        """A turn's work order, as JSON types.

        Args:
            backend: one of `BACKENDS`, or `loader_turn.PARTS`.
            run: whose loader it is.
            folder: the same images as files, for whoever reads folders.
        """
        workers = self.workers or run.data.threads
        return {
            "backend": backend,
            "device": self.device,
            "config": to_json(run),
            "workers": workers,
            # What is made ahead: `prefetch_batches` of ours, 2 per worker of a DataLoader; after these the rate is
            # steady.
            "warm_up": 2 * max(workers, run.data.threads) + run.data.prefetch_batches,
            "seconds": self.seconds,
            "folder": str(folder),
        }
