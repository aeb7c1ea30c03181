"""The loaders that are measured: what each is, why it may be missing, and how it is opened."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crisp.benchmarks.peers.clock import Opener, Spec, Views
from crisp.config import train_config_from_json
from crisp.errors import CrispError
from crisp.pipelines.dali_extra import dali_available
from crisp.shard_format import Codec, open_shards

PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A loader that can be measured."""

    about: str
    ceiling: bool = False
    """No loader, but what no loader can surpass"""
    reads_folder: bool = False
    script: str = ""
    """In `peers/`, run by an interpreter that may be another one; else it is opened by `prepare`"""
    needs_dali: bool = False
    on_gpu: bool = False
    """With --device gpu it renders there; the others render on the CPU and their batches are copied"""


BACKENDS = {
    "cpu": Backend(about="our CPU renderer"),
    "dali": Backend(about="our DALI graph, told every draw", needs_dali=True, on_gpu=True),
    "dali-random": Backend(about="DALI's own reader and random numbers", needs_dali=True, on_gpu=True),
    "torchvision-pil": Backend(about="ImageFolder, PIL, torchvision, DataLoader: iBOT's loader", reads_folder=True),
    "webdataset-pil": Backend(about="the same from our shards, with webdataset"),
    "torchvision-v2": Backend(about="ImageFolder, torchvision's decoder and v2 on tensors", reads_folder=True),
    "spdl": Backend(about="SPDL's pipeline of threads, v2 on tensors", reads_folder=True, script="loader_spdl.py"),
    "decode-only": Backend(about="ceiling: decoding alone", ceiling=True, on_gpu=True),
    "cached-batch": Backend(about="ceiling: the CPU renderer's loader with nothing to render", ceiling=True),
}

_FOLDER = "images"


def why_missing(name: str, *, device: str, peers_python: Path | None) -> str | None:
    """Why a backend cannot be measured here; None if it can."""
    backend = BACKENDS[name]
    if (backend.needs_dali or (name == "decode-only" and device == "gpu")) and not dali_available():
        return "DALI is not installed; pip install 'crisp-ssl[cuda13]', or [cuda12]"
    if backend.script:
        python = str(peers_python or sys.executable)
        try:
            done = subprocess.run([python, PEERS / backend.script, "--check"], capture_output=True, text=True)
        except OSError as error:
            return f"{python}: {error.strerror}; name an interpreter with --peers-python"
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return f"{said}; install peers/requirements.txt elsewhere and name its interpreter with --peers-python"
    return None


def prepare(spec: Spec) -> Opener:
    """Import what a backend needs; a function that opens it then.

    Raises:
        CrispError: as the loader's own.
    """
    name, on_gpu = spec["backend"], spec["device"] == "gpu"
    if name in ("cpu", "dali", "cached-batch"):
        return _prepare_ours(spec)
    if name == "dali-random":
        from crisp.benchmarks.peers import loader_dali_random

        return loader_dali_random.dali_random(spec)
    if name == "decode-only" and on_gpu:
        from crisp.benchmarks.peers import loader_dali_random

        return loader_dali_random.dali_decode(spec)
    from crisp.benchmarks.peers import loader_torchvision

    openers: dict[str, Callable[[Spec], Opener]] = {
        "torchvision-pil": loader_torchvision.folder_pil,
        "webdataset-pil": loader_torchvision.webdataset_pil,
        "torchvision-v2": loader_torchvision.folder_v2,
    }
    opener = openers[name](spec)
    return _copied_to_gpu(opener) if on_gpu else opener


def _prepare_ours(spec: Spec) -> Opener:
    import torch

    from crisp.pipelines.loader import build_train_loader

    config = train_config_from_json(spec["config"])
    device = torch.device("cuda", 0) if spec["device"] == "gpu" else torch.device("cpu")
    if config.data.renderer == "dali":
        importlib.import_module("crisp.pipelines.dali")
    if spec["backend"] == "cached-batch":
        _render_once()

    @contextmanager
    def open_ours() -> Iterator[Iterator[Views]]:
        loader = build_train_loader(config, rank=0, world_size=1, device=device)
        try:
            yield ((batch.reference, batch.global_views.unbind(0), batch.local_views.unbind(0)) for batch in loader)
        finally:
            loader.close()

    return open_ours


def _render_once() -> None:
    """Have the CPU renderers of this process give their first batch again and again.

    What is left is everything else that the loader does: order, plan, reading, checksums, handing over.
    """
    from crisp.pipelines.cpu import CpuRenderer

    begin, kept = CpuRenderer.begin, list[_Rendered]()

    def once(renderer: CpuRenderer, work: Any) -> Any:
        if not kept:
            kept.append(_Rendered(begin(renderer, work).batch()))
        return kept[0]

    CpuRenderer.begin = once  # type: ignore[assignment,method-assign]


class _Rendered:
    """In place of a `Rendering`: a batch that is there already."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def batch(self) -> Any:
        return self._batch


def _copied_to_gpu(opener: Opener) -> Opener:
    """As a training step copies: from the DataLoader's page-locked memory, without waiting."""

    @contextmanager
    def open_copied() -> Iterator[Iterator[Views]]:
        def copied(batches: Iterator[Views]) -> Iterator[Views]:
            for reference, *views in batches:
                first, second = ([view.cuda(non_blocking=True) for view in group] for group in views)
                yield reference.cuda(non_blocking=True), first, second

        with opener() as batches:
            yield copied(batches)

    return open_copied


def extract_images(shards: Path, folder: Path, *, limit: int) -> Path:
    """Copy images into class folders, at most `limit`, evenly spread over the shards: what an ImageFolder reads.

    Raises:
        CrispError: shards that cannot be read.
    """
    from crisp.pipelines.shards import ShardSet

    opened = ShardSet(shards)
    if len(opened) == 0:
        raise CrispError(f"{shards}: holds no image; shard a folder that has some")
    target = folder / _FOLDER
    for sample_id in np.unique(np.linspace(0, len(opened) - 1, min(limit, len(opened))).astype(np.int64)):
        row = opened.index[sample_id]
        file = target / f"{int(row['label']) + 1:05d}" / f"{sample_id:010d}.{Codec(int(row['codec'])).extension}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(opened.read(int(sample_id)))
    return target


def check_shards(shards: Path, *, batch: int) -> None:
    """Say what is wrong with the shards before anything is measured.

    Raises:
        CrispError: they cannot be read, or hold less than a batch.
    """
    manifest, _ = open_shards(shards)
    if manifest.samples < batch:
        raise CrispError(f"batch={batch}: {shards} has {manifest.samples} samples; take a smaller batch")
