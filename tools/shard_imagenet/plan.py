"""Which files make up which shard: decided from the listing alone, before anything is read.

What is rejected later makes a shard smaller and moves nothing else. So a shard depends on its own files only: it can be
made by anyone, in any order, or again, and its bytes are the same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crisp.pipelines.order import key_of, shuffle
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import Listing
from crisp.shard_imagenet.writer import SAMPLE_OVERHEAD_BYTES

Ints = NDArray[np.int64]

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The files of each shard."""

    files: int
    """In all"""
    starts: Ints
    """[S + 1] where each shard begins in the order of the files, and where the last ends"""
    seed: int | None
    """Of the shuffle; None: the order is the source's"""
    bytes: int
    """Of all shards, as far as known: sizes in the source × the ratio that re-encoding is expected to leave"""

    @property
    def shards(self) -> int:
        """S"""
        return len(self.starts) - 1

    def numbers(self, shard: int) -> Ints:
        """Numbers of a shard's files, in order."""
        return _in_order(np.arange(self.starts[shard], self.starts[shard + 1]), self.files, self.seed)


def plan_shards(listing: Listing, cfg: ShardConfig, *, ratio: float = 1.0) -> Plan:
    """Cut the files into shards of `cfg.shard_bytes` or `cfg.shard_samples`.

    Args:
        listing: the files.
        cfg: size of a shard, and whether to shuffle.
        ratio: bytes of a re-encoded image over those of its file, on average.
    """
    files = len(listing)
    seed = cfg.seed if cfg.shuffle == "yes" or (cfg.shuffle == "auto" and listing.by_class) else None

    def sizes() -> Iterator[Ints]:
        for start in range(0, files, _CHUNK):
            numbers = _in_order(np.arange(start, min(start + _CHUNK, files)), files, seed)
            yield (listing.rows["size"][numbers] * ratio).astype(np.int64) + SAMPLE_OVERHEAD_BYTES

    if cfg.shard_samples is not None:
        starts = np.append(np.arange(0, files, cfg.shard_samples), files)
    else:
        starts = np.array([*cut(sizes(), cfg.shard_bytes), files])
    return Plan(files=files, starts=starts, seed=seed, bytes=sum(int(part.sum()) for part in sizes()))


def cut(sizes: Iterable[Ints], limit: int) -> Iterator[int]:
    """Where runs of items begin that are as long as can be with a total of at most `limit`.

    Args:
        sizes: of the items, in pieces; an item beyond the limit is a run of its own.
        limit: total of a run.
    """
    yield 0
    first, run, total = 0, 0, 0  # items before this piece; items of the open run, and their total
    for piece in sizes:
        ends = np.cumsum(piece)
        begin, base = 0, -total  # where in the piece the open run goes on, and what its total is counted from
        while begin < len(piece):
            stop = int(np.searchsorted(ends, base + limit, side="right"))
            if run == 0 and stop == begin:  # one item beyond the limit
                stop += 1
            if stop >= len(piece):
                break
            yield first + stop
            begin, run, base = stop, 0, int(ends[stop - 1]) if stop else 0
        run += len(piece) - begin
        total = int(ends[-1]) - base if len(piece) else total
        first += len(piece)


def _in_order(positions: Ints, files: int, seed: int | None) -> Ints:
    """Numbers of the files at these positions: a bijection computed for each, so that nothing lists them all."""
    if seed is None:
        return positions
    return shuffle(positions, np.full(len(positions), files), np.full(len(positions), key_of(seed)[0]))
