"""The k nearest patches of a bank of millions, exactly: a cheap product sorts out, float64 decides.

What "nearest" means is settled here, so that neither chunk sizes nor device nor matrix product have a say: distances
are those of the given features (rounded to `dtype`) as float64 gives them, and of equally near patches the one with the
smaller number in the bank comes first.

Almost all the work is the matrix of products. It is done once for both distances, of unit vectors in a cheap type
(bfloat16 where the hardware multiplies it), and its error is bounded: by Cauchy and Schwarz a product of unit vectors
is wrong by at most the length of what rounding cut off them, plus what the sum and the result lose. So a patch whose
approximate cosine stays below the bound for the k-th place cannot be a neighbour. Only the maxima of blocks of patches
are looked at. A block holds patches of about the same length, so that its maximum bounds the Euclidean distance
as well. What remains, some tens of patches per query, is evaluated in float64.

Axes: M queries, N patches of the bank, n of a chunk, D width; q queries at a time. A chunk is cut into tiles t, a tile
into blocks b of `BLOCK` patches.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.errors import CrispError
from crisp.evals.segmentation.precision import exact_products

log = logging.getLogger(__name__)

Distance = Literal["cosine", "l2"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
KEY_CHUNK = 262_144
QUERY_CHUNK = 1024
BLOCK = 32
TILE = 4096
"""Patches per matrix product: with 1024 queries its result takes 8 MB in bfloat16, read again while it is in cache"""
BLOCKS_AT_ONCE = 16_384
QUERIES_AT_ONCE = 64
"""Queries whose block maxima are looked at together"""
PAIRS_AT_ONCE = 1024
"""Pairs evaluated in float64 at a time: 3 × 3 MB at D = 384, for the cache's sake"""
SLACK = 2e-6
"""Relative, for the float32 in which bounds are computed: 16 roundings of 2⁻²³"""
TINY = 1e-30
"""Vectors shorter than this count as zero"""
LONGEST = 1e15
"""Squares of lengths have to fit float32"""


@torch.no_grad()
def nearest(
    queries: Tensor,
    bank: Tensor | NDArray[np.floating],
    *,
    k: int,
    distances: Sequence[Distance] = DISTANCES,
    key_chunk: int = KEY_CHUNK,
    query_chunk: int = QUERY_CHUNK,
    dtype: torch.dtype = torch.float32,
    screen: torch.dtype | None = None,
) -> dict[Distance, Tensor]:
    """Numbers of the k nearest patches of the bank, nearest first, for all distances in one pass.

    Memory on the device, beside the queries: `query_chunk` × `key_chunk` products in the screening type (537 MB in
    bfloat16 as given), a chunk of the bank in float32 and in that type (604 MB at D = 384), their like in float32 where
    a chunk is screened again, and 16·k bytes per query and distance. A memory map's pages are the system's.

    Args:
        queries: [M, D], finite, on the device that is to compute.
        bank: [N, D], finite, on any device, or an array such as a memory map; read once.
        k: from 1 to N.
        distances: "cosine" (a vector of length 0 has cosine 0 with all) and "l2", Euclidean.
        key_chunk, query_chunk: bound the memory; the result does not depend on them.
        dtype: float32 or bfloat16: the features are rounded to it first.
        screen: float32 or bfloat16, the type of the products; bfloat16 if not given and the hardware has it. The result
            does not depend on it.

    Returns:
        [M, k] int64 by distance, on the device of the queries.

    Raises:
        CrispError: a k out of range, an unknown distance or type, widths that differ, features that are not finite.
    """
    check_search(bank, k)
    if unknown := [name for name in distances if name not in DISTANCES]:
        raise CrispError(f"distance={unknown[0]!r}: there is none of that name; choose from {', '.join(DISTANCES)}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise CrispError(f"dtype={dtype}: features are compared in torch.float32 or torch.bfloat16")
    if queries.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise CrispError(
            f"queries of shape {tuple(queries.shape)}: the bank's features have width {bank.shape[1]}; "
            f"take both from one model"
        )
    if screen is None:
        screen = torch.bfloat16 if multiplies_bfloat16(queries.device) else torch.float32
    ours = [_Queries(part, dtype, screen) for part in queries.split(query_chunk)]
    found = [{name: _Best(len(part.exact), k, queries.device) for name in distances} for part in ours]
    rescreened = 0
    space = _Space(queries.device)
    with exact_products(queries.device):
        for start in range(0, len(bank), key_chunk):
            features = rows(bank, start, start + key_chunk).to(queries.device, non_blocking=True)
            keys = _Keys(features, start, dtype)
            for part, best in zip(ours, found, strict=True):
                candidates = _Candidates(part, keys, best, screen, space)
                if screen != torch.float32 and candidates.many:
                    rescreened += 1
                    candidates = _Candidates(part, keys, best, torch.float32, space)
                candidates.settle()
    log.debug("%d × %d patches screened in %s, %d chunk(s) again in float32", *queries.shape, screen, rescreened)
    return {name: torch.cat([best[name].patches for best in found]) for name in distances}


def check_search(bank: Tensor | NDArray[np.floating], k: int) -> None:
    """Refuse a bank or a k that cannot be.

    Raises:
        CrispError: not [N, D], or a k outside [1, N].
    """
    if bank.ndim != 2:
        raise CrispError(f"bank of shape {tuple(bank.shape)}: give one row of features per patch")
    if not 1 <= k <= len(bank):
        raise CrispError(f"k={k}: the bank has {len(bank)} patches; choose from 1 to that")


def rows(bank: Tensor | NDArray[np.floating], start: int, stop: int) -> Tensor:
    """Rows of the bank as a tensor, a copy if it is an array: memory maps may be read-only."""
    return bank[start:stop] if isinstance(bank, Tensor) else torch.from_numpy(np.array(bank[start:stop]))


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 there: any CUDA device, a CPU with instructions for them."""
    if device.type == "cuda":
        return True
    flags = Path("/proc/cpuinfo")
    return flags.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.read_text().split())


def _lengths(exact: Tensor, what: str) -> Tensor:
    """[n] float64, finite; in slices that fit a cache, since the whole in float64 is large."""
    lengths = torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in exact.split(1024)])
    if bad := int((~(lengths < LONGEST)).sum()):
        raise CrispError(
            f"{bad} of {len(exact)} features of {what} are not finite or longer than {LONGEST:g}, so the backbone has "
            f"diverged; evaluate an earlier checkpoint"
        )
    return lengths


def _unit(exact: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit vectors in a type [n, D], and the length of what rounding cut off each [n] float32."""
    unit = exact / lengths.clamp_min(TINY).float()[:, None]
    rounded = unit.to(dtype)
    return rounded, torch.linalg.vector_norm(unit - rounded, dim=1)


class _Queries:
    """Some queries: as given, their lengths, and as unit vectors for the screening."""

    def __init__(self, features: Tensor, dtype: torch.dtype, screen: torch.dtype) -> None:
        self.exact = features.to(dtype).float()  # [q, D]
        self.lengths = _lengths(self.exact, "the images to label")  # [q] float64
        self.units = {kind: _unit(self.exact, self.lengths, kind) for kind in {screen, torch.float32}}


class _Keys:
    """A chunk of the bank, arranged so that blocks hold patches of similar length and every tile all lengths.

    Position t·T + i·B + b is member i of block b of tile t (T patches and B blocks in a tile): the maximum over i is
    then taken between long rows, which is what vector units like. The last block is filled up with copies, which are
    never found.
    """

    def __init__(self, features: Tensor, start: int, dtype: torch.dtype) -> None:
        self.exact = features.to(dtype).float()  # [n, D]
        self.lengths = _lengths(self.exact, f"the bank (rows from {start} on)")  # [n] float64
        self.start, self.count = start, len(features)
        self.tiles = -(-self.count // TILE)
        self.blocks = -(-self.count // (self.tiles * BLOCK))
        order = self.lengths.argsort(stable=True)
        missing = self.tiles * self.blocks * BLOCK - self.count
        padded = torch.cat([order, order[-1:].expand(missing)])
        grouped = self.lengths[padded].view(self.blocks, self.tiles, BLOCK)
        self.shortest = grouped.amin(dim=2).T.flatten().float()  # [tiles · blocks]
        self.longest = grouped.amax(dim=2).T.flatten().float()
        padded[self.count :] += self.count  # marks the copies
        arranged = padded.view(self.blocks, self.tiles, BLOCK).permute(1, 2, 0).reshape(self.tiles, -1)
        self.copies = arranged >= self.count  # [tiles, T]
        self.rows = arranged - self.count * self.copies  # [tiles, T] int64: where in the chunk
        self.has_copies = missing > 0
        self._units: dict[torch.dtype, tuple[Tensor, float]] = {}

    def units(self, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Unit vectors [tiles, T, D] in a type, and the greatest length that rounding cut off."""
        if dtype not in self._units:
            units = torch.empty(*self.rows.shape, self.exact.shape[1], dtype=dtype, device=self.exact.device)
            cut = self.lengths.new_zeros((), dtype=torch.float32)
            for arranged, rows_ in zip(units.flatten(0, 1).split(1024), self.rows.flatten().split(1024), strict=True):
                rounded, lost = _unit(self.exact[rows_], self.lengths[rows_], dtype)
                arranged.copy_(rounded)
                cut = torch.maximum(cut, lost.max())
            self._units[dtype] = units, float(cut)
        return self._units[dtype]


class _Best:
    """The nearest so far: larger scores are nearer."""

    def __init__(self, count: int, k: int, device: torch.device) -> None:
        self.scores = torch.full((count, k), -torch.inf, dtype=torch.float64, device=device)
        self.patches = torch.full((count, k), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)

    def merge(self, queries: Tensor, scores: Tensor, patches: Tensor) -> None:
        """Take in some pairs: [P] number of the query, score, patch."""
        count, k = self.scores.shape
        near = scores >= self.scores[queries, -1]
        own = torch.arange(count, device=queries.device).repeat_interleave(k)
        queries = torch.cat([own, queries[near]])
        scores = torch.cat([self.scores.flatten(), scores[near]])
        patches = torch.cat([self.patches.flatten(), patches[near]])
        order = patches.argsort(stable=True)
        order = order[scores[order].argsort(descending=True, stable=True)]
        order = order[queries[order].argsort(stable=True)]
        first = torch.searchsorted(queries[order], torch.arange(count, device=queries.device))
        kept = order[(first[:, None] + torch.arange(k, device=queries.device)).flatten()]
        self.scores, self.patches = scores[kept].view(count, k), patches[kept].view(count, k)


class _Candidates:
    """What of a chunk may be among the nearest of some queries.

    Scores: cosine, and for "l2" the product less half the squared length of the patch, which orders as distance does.
    """

    def __init__(
        self, ours: _Queries, keys: _Keys, best: dict[Distance, _Best], screen: torch.dtype, space: "_Space"
    ) -> None:
        self._ours, self._keys, self._best = ours, keys, best
        self._length = ours.lengths.float()[:, None]  # [q, 1]
        unit, cut = ours.units[screen]
        key_units, key_cut = keys.units(screen)
        count, width = unit.shape
        # Σ|x·y| of unit vectors is at most 1; a sum of D terms loses at most D roundings of it, here with a factor of 4
        # for units that truncate; a bfloat16 result loses half of its last of 8 bits.
        lost = 4 * width * 2.0**-24 + SLACK + (1.01 * 2.0**-9 if screen == torch.bfloat16 else 0.0)
        self._margin = (key_cut + cut * (1 + key_cut) + lost)[:, None]  # [q, 1], in units of cosine
        self._products = space.take((keys.tiles, count, BLOCK, keys.blocks), screen)  # [t, q, i, b]
        largest = torch.empty(count, keys.tiles, keys.blocks, device=unit.device)
        for tile, products in enumerate(self._products):
            torch.mm(unit, key_units[tile].T, out=products.view(count, -1))
            if keys.has_copies:
                products.view(count, -1)[:, keys.copies[tile]] = -torch.inf
            largest[:, tile] = products.amax(dim=1)
        self._k = next(iter(best.values())).scores.shape[1]
        self._bars: dict[Distance, Tensor] = {}
        parts = [self._choose(largest[part].flatten(1), part) for part in _slices(count, QUERIES_AT_ONCE)]
        self._chosen = torch.cat(parts)  # [P, 2]: query, block; by query
        self.many = len(self._chosen) > count * max(4 * self._k, keys.count // 128)
        """So many that a finer screening costs less than looking at them"""

    def _choose(self, largest: Tensor, part: slice) -> Tensor:
        """Blocks whose largest product [q, blocks] may belong to a neighbour, for some of the queries.

        The k-th largest maximum, taken as low as it may be, bounds the k-th place from below: there are k patches that
        reach it.
        """
        keys, length, margin = self._keys, self._length[part], self._margin[part]
        worse, better = largest - margin, largest + margin
        chosen = torch.zeros_like(largest, dtype=torch.bool)
        for name, best in self._best.items():
            lowest, highest = worse, better
            if name == "l2":
                lowest = torch.minimum(worse * keys.shortest, worse * keys.longest).mul_(length)
                lowest -= keys.longest.square() * (0.5 * (1 + SLACK))
                highest = torch.maximum(better * keys.shortest, better * keys.longest).mul_(length)
                highest -= keys.shortest.square() * (0.5 * (1 - SLACK))
            bar = best.scores[part, -1:]
            if largest.shape[1] >= self._k:
                bar = torch.maximum(bar, lowest.topk(self._k, dim=1).values[:, -1:])
            bar = (bar - SLACK * bar.abs()).float()
            self._bars.setdefault(name, torch.empty_like(self._length))[part] = bar
            chosen |= highest >= bar
        found = chosen.nonzero()
        found[:, 0] += part.start
        return found

    def settle(self) -> None:
        """Evaluate what may be near in float64, and keep the best."""
        for blocks in self._chosen.split(BLOCKS_AT_ONCE):
            queries, found = self._near(blocks)
            scores: dict[Distance, list[Tensor]] = {name: [] for name in self._best}
            for part in _slices(len(queries), PAIRS_AT_ONCE):
                for name, values in self._exact_scores(queries[part], found[part]).items():
                    scores[name].append(values)
            for name, best in self._best.items():
                if scores[name]:
                    best.merge(queries, torch.cat(scores[name]), found + self._keys.start)

    def _near(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs [P] of query and row of the chunk, of these blocks, that the bound does not exclude."""
        keys = self._keys
        query, block = blocks.T
        tile, block = block // keys.blocks, block % keys.blocks
        members = torch.arange(BLOCK, device=blocks.device)
        product = self._products[tile[:, None], query[:, None], members, block[:, None]].float()  # [P, BLOCK]
        product += self._margin[query]
        near = torch.zeros_like(product, dtype=torch.bool)
        place = (members * keys.blocks).add(block[:, None])
        found = keys.rows[tile[:, None], place]
        for name, bar in self._bars.items():
            if name == "cosine":
                near |= product >= bar[query]
            else:
                length = keys.lengths[found].float()
                score = product * length * self._length[query] - length.square() * (0.5 * (1 - SLACK))
                near |= score >= bar[query]
        if keys.has_copies:
            near &= ~keys.copies[tile[:, None], place]
        pair, member = near.nonzero(as_tuple=True)
        return query[pair], found[pair, member]

    def _exact_scores(self, queries: Tensor, found: Tensor) -> dict[Distance, Tensor]:
        """[P] float64 by distance. Each is computed alike wherever it stands, so equal features give equal scores."""
        ours, keys = self._ours, self._keys
        product = (ours.exact[queries].double() * keys.exact[found].double()).sum(dim=1)
        scores: dict[Distance, Tensor] = {}
        for name in self._best:
            if name == "cosine":
                lengths = ours.lengths[queries].clamp_min(TINY) * keys.lengths[found].clamp_min(TINY)
                scores[name] = product / lengths
            else:
                scores[name] = product - keys.lengths[found].square() / 2
        return scores


class _Space:
    """Memory for the products, kept: to get and clear it anew for each chunk takes a sixth of the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the next is taken."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._bytes[:size].view(dtype).view(shape)


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
