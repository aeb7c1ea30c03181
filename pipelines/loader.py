"""TrainLoader: order + plan + shards + a renderer → Batch, rendered ahead of the step, resumable by one integer."""

import logging
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from crisp.batch import Batch
from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.order import EpochLayout
from crisp.pipelines.shards import ShardSet
from crisp.pipelines.source import TrainSource

log = logging.getLogger(__name__)


class BatchStream(Protocol):
    """What a renderer offers the loader."""

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Batches of steps first_step, first_step + 1, … without end, on the loader's device."""

    def close(self) -> None:
        """Stop threads and processes."""


class PrefetchedCpuRenderer:
    """The CPU renderer, run `depth` batches ahead by a thread that also copies to the device.

    Up to `depth` + 2 batches are alive at once: those waiting, the one being rendered, the one being used.
    """

    def __init__(self, renderer: CpuRenderer, source: TrainSource, *, depth: int, device: torch.device) -> None:
        self._renderer, self._source, self._depth, self._device = renderer, source, depth, device
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def batches(self, first_step: int) -> Iterator[Batch]:
        """See `BatchStream`."""
        self._halt()
        self._stop = stop = threading.Event()
        ready: queue.Queue[Batch | BaseException] = queue.Queue(self._depth)
        self._thread = threading.Thread(
            target=self._work, args=(first_step, ready, stop), name="crisp-prefetch", daemon=True
        )
        self._thread.start()
        while not stop.is_set():  # another iterator was asked for, or the renderer was closed
            try:
                item = ready.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            yield item

    def _work(self, step: int, ready: "queue.Queue[Batch | BaseException]", stop: threading.Event) -> None:
        item: Batch | BaseException
        while not stop.is_set():
            try:
                batch = self._renderer.render(self._source(step))
                item = batch.to(self._device, non_blocking=True)  # itself where it is there already
            except BaseException as error:  # noqa: BLE001  handed to the consumer, which raises it
                item = error
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """See `BatchStream`."""
        self._halt()
        self._renderer.close()


class TrainLoader:
    """Endless batches of one rank, from the step in its state.

    The state counts batches handed out, not those rendered ahead. Iterating again continues from there.
    """

    def __init__(
        self, stream: BatchStream, layout: EpochLayout, *, renderer: str, batch_size: int, fingerprint: str
    ) -> None:
        self._stream = stream
        self._step = 0
        self.steps_per_epoch = layout.steps_per_epoch
        self.renderer = renderer
        """Name of the renderer in use: cpu, dali-cpu or dali-gpu"""
        self.batch_size = batch_size
        """Images of this rank per step"""
        self.fingerprint = fingerprint
        """Identifies the data: the shard index's fingerprint"""

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream.batches(self._step):
            self._step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The number of steps consumed."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many steps. Takes effect at the next `iter`."""
        self._step = int(state["step"])

    def close(self) -> None:
        """Stop the renderer's threads and processes."""
        self._stream.close()


def choose_renderer(name: str, device: torch.device) -> str:
    """`cpu` or `dali` for the config's `auto`, `cpu` or `dali`: DALI where the run has a GPU."""
    if name != "auto":
        return name
    return "dali" if device.type == "cuda" else "cpu"


def renderer_threads(threads: int, ranks_per_node: int) -> int:
    """The configured number, or this machine's usable cores shared by its ranks."""
    return threads or max(1, len(os.sched_getaffinity(0)) // ranks_per_node)


def build_train_loader(
    config: TrainConfig, *, rank: int, world_size: int, nodes: int = 1, device: torch.device
) -> TrainLoader:
    """The loader of one rank.

    Args:
        config: the run; `data.shards` must be set.
        rank: of `world_size` ranks on `nodes` machines, node by node.
        world_size: any; ranks differ by at most one image per step.
        nodes: where it divides `data.parts`, a node reads only its own parts.
        device: where the batches shall lie.

    Raises:
        CrispError: no shards named, unreadable shards, a batch larger than the data, DALI missing.
    """
    if config.data.shards is None:
        raise CrispError("data.shards: not given; name a folder written by 'crisp shard' with --data.shards DIR")
    shards = ShardSet(config.data.shards, verify=config.data.verify_checksums)
    shards.check_sizes()
    source = TrainSource(config, shards, rank=rank, world_size=world_size, nodes=nodes)
    threads = renderer_threads(config.data.threads, max(1, world_size // nodes))
    chosen = choose_renderer(config.data.renderer, device)
    stream: BatchStream
    if chosen == "dali":
        from crisp.pipelines.dali import DaliRenderer  # DALI is an extra

        stream = DaliRenderer(
            config.views,
            source=source,
            batch_size=source.batch_size,
            device="gpu" if device.type == "cuda" else "cpu",
            device_id=device.index,
            threads=threads,
            prefetch_batches=config.data.prefetch_batches,
        )
        chosen = "dali-gpu" if device.type == "cuda" else "dali-cpu"
    else:
        stream = PrefetchedCpuRenderer(
            CpuRenderer(config.views, threads=threads),
            source,
            depth=config.data.prefetch_batches,
            device=device,
        )
    log.info(
        "renderer %s (data.renderer=%s, device %s), %d threads, %d images per step of this rank",
        chosen, config.data.renderer, device, threads, source.batch_size,
    )  # fmt: skip
    return TrainLoader(
        stream,
        source.layout,
        renderer=chosen,
        batch_size=source.batch_size,
        fingerprint=shards.manifest.index_fingerprint,
    )
