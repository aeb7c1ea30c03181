"""TrainLoader: order + plan + shards + a renderer → Batch, rendered ahead of the step, resumable by one integer."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from crisp.batch import Batch
from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.faults import FaultLog
from crisp.pipelines.prefetch import PrefetchedCpuRenderer
from crisp.pipelines.shard_cache import ShardCache
from crisp.pipelines.shard_prefetch import ShardPrefetcher
from crisp.pipelines.shards import ShardSet
from crisp.pipelines.source import TrainSource
from crisp.storage import Location

log = logging.getLogger(__name__)


class BatchStream(Protocol):
    """What a renderer offers the loader."""

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Batches of steps first_step, first_step + 1, … without end, on the loader's device."""

    def close(self) -> None:
        """Stop threads and processes."""


class TrainLoader:
    """Endless batches of one rank, from the step in its state.

    The state counts batches handed out, not those rendered ahead. Iterating again continues from there. An epoch has
    `steps_per_epoch` full global batches; what is left over, fewer samples than one, is not shown in that epoch
    (`crisp.pipelines.order`). Epochs follow each other without a pause.
    """

    def __init__(
        self,
        stream: BatchStream,
        source: TrainSource,
        *,
        renderer: str,
        prefetcher: ShardPrefetcher | None,
        closing: Callable[[], None],
    ) -> None:
        self._stream, self._source = stream, source
        self._prefetcher, self._closing = prefetcher, closing
        self._step = 0
        self.steps_per_epoch = source.layout.steps_per_epoch
        self.renderer = renderer
        """Name of the renderer in use: cpu, dali-cpu or dali-gpu"""
        self.batch_size = source.batch_size
        """Images of this rank per step"""
        self.fingerprint = source.shards.manifest.index_fingerprint
        """Identifies the data: the shard index's fingerprint"""

    def __iter__(self) -> Iterator[Batch]:
        self._look_ahead()
        for batch in self._stream.batches(self._step):
            self._step += 1
            self._look_ahead()
            yield batch

    def _look_ahead(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.advance(self._step)

    @property
    def replaced(self) -> int:
        """Samples of this rank that a neighbour stood in for, since this process began."""
        self._source.faults.refresh()
        return self._source.faults.replaced

    def state_dict(self) -> dict[str, Any]:
        """The number of steps consumed."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many steps. Takes effect at the next `iter`."""
        self._step = int(state["step"])

    def close(self) -> None:
        """Stop the renderer's threads and processes."""
        self._stream.close()
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._closing()


def choose_renderer(name: str, device: torch.device) -> str:
    """`cpu` or `dali` for the config's `auto`, `cpu` or `dali`: DALI where the run has a GPU."""
    if name != "auto":
        return name
    return "dali" if device.type == "cuda" else "cpu"


def renderer_threads(threads: int, ranks_per_node: int) -> int:
    """The configured number, or this machine's usable cores shared by its ranks."""
    return threads or max(1, len(os.sched_getaffinity(0)) // ranks_per_node)


def build_train_loader(
    config: TrainConfig,
    *,
    rank: int,
    world_size: int,
    nodes: int = 1,
    device: torch.device,
    faults_folder: Path | None = None,
) -> TrainLoader:
    """The loader of one rank.

    Args:
        config: the run; `data.shards` must be set.
        rank: of `world_size` ranks on `nodes` machines, node by node.
        world_size: any; ranks differ by at most one image per step.
        nodes: where it divides `data.parts`, a node reads only its own parts.
        device: where the batches shall lie.
        faults_folder: of the run's fault logs: those there are repeated, this rank's is written. Default: a temporary
            one, which goes when the loader is closed.

    Raises:
        CrispError: no shards named, unreadable shards, more damaged ones than `data.max_bad_share` allows, a batch
            larger than the data, DALI missing.
    """
    shards = open_shard_set(config)
    _check_sizes(shards, config.data.max_bad_share)
    temporary = tempfile.TemporaryDirectory(prefix="crisp-faults-") if faults_folder is None else None
    faults = FaultLog(
        faults_folder if temporary is None else Path(temporary.name),  # type: ignore[arg-type]
        name=f"rank-{rank:05d}.jsonl",
        samples=len(shards),
        max_bad_share=config.data.max_bad_share,
    )
    chosen = choose_renderer(config.data.renderer, device)
    source = TrainSource(
        config,
        shards,
        faults,
        rank=rank,
        world_size=world_size,
        nodes=nodes,
        check_headers=chosen == "dali",
        check_late=chosen == "cpu",
    )
    threads = renderer_threads(config.data.threads, max(1, world_size // nodes))
    dtype = {"float32": torch.float32, "float16": torch.float16}[config.data.pixels]
    stream: BatchStream
    if chosen == "dali":
        from crisp.pipelines.dali import DaliRenderer  # DALI is an extra

        stream = DaliRenderer(
            config.views,
            source=source,
            replace=source.replace,
            batch_size=source.batch_size,
            device="gpu" if device.type == "cuda" else "cpu",
            device_id=device.index,
            threads=threads,
            prefetch_batches=config.data.prefetch_batches,
            options=config.data.dali,
            largest_px=largest_px(shards),
            timeout_s=config.data.sample_timeout_s,
            dtype=dtype,
        )
        chosen = "dali-gpu" if device.type == "cuda" else "dali-cpu"
    else:
        renderer = CpuRenderer(
            config.views,
            threads=threads,
            dtype=dtype,
            replace=source.replace,
            check=source.check,
            timeout_s=config.data.sample_timeout_s,
            pin_memory=device.type == "cuda",
        )
        stream = PrefetchedCpuRenderer(renderer, source, depth=config.data.prefetch_batches, device=device)
    log.info(
        "renderer %s (data.renderer=%s, device %s), %d threads, %d images per step of this rank",
        chosen, config.data.renderer, device, threads, source.batch_size,
    )  # fmt: skip
    return TrainLoader(
        stream,
        source,
        renderer=chosen,
        prefetcher=(
            ShardPrefetcher(shards.cache, source.layout, source.slots, ranks=max(1, world_size // nodes))
            if shards.cache is not None
            else None
        ),
        closing=temporary.cleanup if temporary is not None else lambda: None,
    )


def open_shard_set(config: TrainConfig) -> ShardSet:
    """The shards that a config names, through the cache where they are remote.

    Raises:
        CrispError: none named, or they cannot be opened.
    """
    data = config.data
    if data.shards is None:
        raise CrispError("data.shards: not given; name a folder written by 'crisp shard' with --data.shards DIR")
    if (local := Location.of(data.shards).local) is not None:
        return ShardSet(local, verify=data.verify_checksums)
    cache = ShardCache(data.shards, folder=data.cache, limit_bytes=int(data.cache_gb * 1e9))
    return ShardSet(cache=cache, verify=data.verify_checksums)


def _check_sizes(shards: ShardSet, max_bad_share: float) -> None:
    """Damage that can be seen at once: better now than after hours, but a few samples are no reason to stop."""
    damaged = shards.damaged_sizes()
    lost = sum(shards.manifest.shards[shard].samples for shard, _ in damaged)
    if damaged and lost > max_bad_share * len(shards):
        raise CrispError(damaged[0][1] if len(damaged) == 1 else f"{len(damaged)} shards are damaged; {damaged[0][1]}")
    for _, message in damaged:
        log.warning("%s", message)


def largest_px(shards: ShardSet) -> tuple[int, int]:
    """Width and height that all but one in a thousand images keep below, from a sample of the index."""
    rows = shards.index[np.unique(np.linspace(0, len(shards) - 1, min(len(shards), 10_000)).astype(np.int64))]
    width, height = (int(np.quantile(rows[side], 0.999)) for side in ("width", "height"))
    return width, height
