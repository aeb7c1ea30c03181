"""What a data set of 142 million samples in 14,000 shards costs to open and to draw from.

Its index is a hole of 4.7 GB and its tars are empty: opening reads the manifest, the rows of the fingerprint and one
listing of the folder, and none of the tars. Cold, the index is dropped from the page cache before; as no disk has to be
read for a hole, that shows how much is read, not how long a disk takes for it.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crisp.config import DataConfig
from crisp.pipelines.order import EpochLayout, global_batch_samples
from crisp.shard_format import INDEX_DTYPE, INDEX_FILE, MANIFEST_FILE, Manifest, ShardInfo, fingerprint, open_shards

SAMPLES, SHARDS = 142_000_000, 14_000
GLOBAL_BATCH = 1024
_STEPS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestTurn:
    """One turn, in a process that had done nothing before."""

    open_ms: float
    order_ms: float
    """Sample ids of a random step of a random epoch: median"""
    order_ms_slowest: float
    rss_increase_mb: float
    """Peak of the process, less what it had before it opened the folder"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestResult:
    """Medians over the turns, and the worst of them."""

    samples: int
    shards: int
    open_ms: float
    """The index is in the page cache, at least where it is looked at"""
    open_ms_slowest: float
    open_cold_ms: float
    """The index is not in the page cache"""
    open_cold_ms_slowest: float
    order_ms: float
    order_ms_slowest: float
    rss_increase_mb: float
    """Of the worst turn"""
    index_bytes_per_sample: float


def write_manifest(folder: Path) -> None:
    """Make a folder as `crisp shard` leaves it, but with nothing in its files that opening doesn't look at."""
    folder.mkdir()
    with (folder / INDEX_FILE).open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (SAMPLES,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + SAMPLES * INDEX_DTYPE.itemsize)
    zeros = np.broadcast_to(np.zeros((), INDEX_DTYPE), SAMPLES)
    sizes = np.diff(np.arange(SHARDS + 1) * SAMPLES // SHARDS)
    # Sizes and checksums with as many digits as real ones.
    shards = tuple(
        ShardInfo(name=f"shard-{number:06d}.tar", samples=int(samples), bytes=268_000_000, checksum=2**32 - 1)
        for number, samples in enumerate(sizes)
    )
    for shard in shards:
        (folder / shard.name).touch()
    manifest = Manifest(samples=SAMPLES, rejected=0, classes=(), shards=shards, index_fingerprint=fingerprint(zeros))
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest.to_json()))


def take_manifest_turn(folder: Path, cold: bool) -> ManifestTurn:
    """Open the folder and draw random steps; to be called in a fresh process.

    Args:
        folder: made by `write_manifest`.
        cold: drop the index from the page cache before.
    """
    if cold:
        with (folder / INDEX_FILE).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = memory_bytes("VmRSS")
    start_s = time.perf_counter()
    manifest, _ = open_shards(folder)
    open_s = time.perf_counter() - start_s
    defaults = DataConfig(shards=str(folder))
    layout = EpochLayout(
        shard_samples=[shard.samples for shard in manifest.shards],
        global_batch=GLOBAL_BATCH,
        parts=defaults.parts,
        window_shards=defaults.shuffle_window_shards,
        seed=0,
    )
    random, times = np.random.default_rng(0), []
    for _ in range(_STEPS):
        epoch, step = int(random.integers(1000)), int(random.integers(layout.steps_per_epoch))
        start_s = time.perf_counter()
        global_batch_samples(layout, epoch, step)
        times.append(time.perf_counter() - start_s)
    return ManifestTurn(
        open_ms=open_s * 1e3,
        order_ms=statistics.median(times) * 1e3,
        order_ms_slowest=max(times) * 1e3,
        rss_increase_mb=(memory_bytes("VmHWM") - before) / 1e6,
    )


def summarise_manifest(folder: Path, cold: list[ManifestTurn], warm: list[ManifestTurn]) -> ManifestResult:
    """Medians and worst of some turns on a folder, first in each round those with a cold cache."""
    turns = cold + warm
    return ManifestResult(
        samples=SAMPLES,
        shards=SHARDS,
        open_ms=statistics.median(turn.open_ms for turn in warm),
        open_ms_slowest=max(turn.open_ms for turn in warm),
        open_cold_ms=statistics.median(turn.open_ms for turn in cold),
        open_cold_ms_slowest=max(turn.open_ms for turn in cold),
        order_ms=statistics.median(turn.order_ms for turn in turns),
        order_ms_slowest=max(turn.order_ms_slowest for turn in turns),
        rss_increase_mb=max(turn.rss_increase_mb for turn in turns),
        index_bytes_per_sample=(folder / INDEX_FILE).stat().st_size / SAMPLES,
    )


def memory_bytes(field: str) -> int:
    """From /proc: unlike getrusage's, its peak isn't inherited from the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
