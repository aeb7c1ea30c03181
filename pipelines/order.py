"""Which sample comes when: a pure function of (seed, epoch, step, slot). Nothing lists an epoch.

Each epoch the shards are permuted and laid end to end, starting at a random sample; this sequence of N samples is
cut into P contiguous *parts* of near-equal size (a shard may straddle two) and each part into *windows* of a given
number of shards, within which samples are shuffled. Step t takes the samples t·G/P … (t+1)·G/P − 1 of every part:
slot s of the global batch of G belongs to part s mod P, whatever the number of processes. So the global batches are
the same in every world, and a node that takes every N-th slot reads only parts i, i+N, … when N divides P.

A part's last samples, for which no full batch is left, are not shown in that epoch (drop_last): fewer than G in all,
and other ones in each epoch.

The shuffle within a window is a keyed bijection evaluated per sample, not a shuffled list, so any step of any epoch
costs the same: .2 ms for 64 samples, plus one sort of the shards per epoch. Memory is O(shards + G).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

# What a key is for, so that no two uses share one.
_SHARDS, _START, _WINDOW = range(3)
_ROUNDS = 16  # with 12, the permutations of 5 and 6 elements are measurably not equally likely


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochLayout:
    """The constants of a run from which the order follows. Instances compare by identity.

    Raises:
        CrispError: fewer samples than one global batch.
    """

    shard_samples: Sequence[int] | Ints
    """[S] samples in each shard, in the index's order"""
    global_batch: int
    """G, a multiple of `parts`"""
    parts: int
    """P"""
    window_shards: int
    """Shuffle window, in shards of mean size"""
    seed: int

    def __post_init__(self) -> None:
        assert self.global_batch % self.parts == 0, "the config refuses this"
        if self.samples < self.global_batch:
            raise CrispError(
                f"optim.global_batch={self.global_batch}: larger than the data ({self.samples} samples), so an epoch "
                f"has no full batch; lower optim.global_batch or shard more images"
            )

    @functools.cached_property
    def sizes(self) -> Ints:
        """[S] samples in each shard."""
        return np.asarray(self.shard_samples, np.int64)

    @functools.cached_property
    def first_rows(self) -> Ints:
        """[S] sample id of each shard's first sample."""
        return np.cumsum(self.sizes) - self.sizes

    @functools.cached_property
    def samples(self) -> int:
        """N, the samples of the data set."""
        return int(self.sizes.sum())

    @property
    def window_samples(self) -> int:
        """Length aimed at for a window; the real ones are near-equal shares of a part."""
        return max(1, round(self.window_shards * self.samples / len(self.sizes)))

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch, N // G."""
        return self.samples // self.global_batch


def epoch_and_step(layout: EpochLayout, global_step: int) -> tuple[int, int]:
    """Epoch, and step within it, of a step counted since the run began; all from 0."""
    return divmod(global_step, layout.steps_per_epoch)


def global_batch_samples(layout: EpochLayout, epoch: int, step: int, slots: Ints | None = None) -> Ints:
    """Sample ids of a step's global batch, or of some of its slots (a rank's: `rank_slots`) at their cost alone.

    Args:
        layout: constants of the run.
        epoch: from 0.
        step: within the epoch, from 0.
        slots: [R] in [0, G); default all G.

    Returns:
        [R] int64, in the order of `slots`.
    """
    assert 0 <= step < layout.steps_per_epoch, f"step {step} of an epoch of {layout.steps_per_epoch}"
    if slots is None:
        slots = np.arange(layout.global_batch)
    nth = step * (layout.global_batch // layout.parts) + slots // layout.parts
    return samples_of_parts(layout, epoch, part=slots % layout.parts, nth=nth)


def rank_slots(global_batch: int, *, rank: int, world_size: int, nodes: int = 1) -> Ints:
    """Slots of the global batch that a rank takes: the same in every step, G/W of them give or take one.

    Ranks are numbered node by node, as torchrun does. Node i of N takes slots i, i+N, …; as slot s belongs to part
    s mod P, that is parts i, i+N, … when N divides P. Likewise each rank has parts of its own when W divides P.

    Returns:
        [R] int64, ascending.

    Raises:
        CrispError: more ranks than slots; ranks that cannot be shared evenly by the nodes.
    """
    if world_size > global_batch:
        raise CrispError(
            f"optim.global_batch={global_batch}: smaller than the {world_size} processes, so some would have nothing "
            f"to do; raise optim.global_batch or start fewer"
        )
    if world_size % nodes:
        raise CrispError(
            f"{world_size} processes on {nodes} nodes: not the same number on each; start torchrun with one "
            f"--nproc-per-node for all nodes"
        )
    node, local_rank = divmod(rank, world_size // nodes)
    return np.arange(local_rank * nodes + node, global_batch, world_size)


def samples_of_parts(layout: EpochLayout, epoch: int, *, part: Ints, nth: Ints) -> Ints:
    """Sample ids of the `nth` samples of parts in an epoch; a bijection from all (part, nth) to all samples.

    Args:
        layout: constants of the run.
        epoch: from 0.
        part: [R] in [0, P).
        nth: [R] in [0, size of the part), where part p covers positions p·N//P … (p+1)·N//P − 1 of the sequence.

    Returns:
        [R] int64.
    """
    part_start, part_size, windows = _windows_of(layout, part)
    window = ((nth + 1) * windows - 1) // part_size
    start = window * part_size // windows
    size = (window + 1) * part_size // windows - start
    key = key_of(layout.seed, epoch, _WINDOW, part, window)
    position = part_start + start + shuffle(nth - start, size, key)

    # Parts would hold the same samples in every epoch if there is only one shard; the random start prevents it.
    order, ends, first = _shard_sequence(layout, epoch)
    position = (position + first) % layout.samples
    place = np.searchsorted(ends, position, side="right")
    shard = order[place]
    return layout.first_rows[shard] + position - (ends[place] - layout.sizes[shard])


def _windows_of(layout: EpochLayout, part: Ints) -> tuple[Ints, Ints, Ints]:
    """Where parts [R] start in the sequence, their sizes, and their numbers of windows."""
    start = part * layout.samples // layout.parts
    size = (part + 1) * layout.samples // layout.parts - start
    # Windows are near-equal shares of the part: fixed lengths would leave a scrap at its end that is hardly shuffled.
    return start, size, np.maximum(1, (size + layout.window_samples // 2) // layout.window_samples)


@dataclass(frozen=True, slots=True)
class ComingShards:
    """What a rank reads around a step; shards in the order of the sequence, window by window, none twice."""

    current: tuple[int, ...]
    """Of the windows that the step reads from"""
    following: tuple[int, ...]
    """Of the windows after those, without the current ones; windows that begin sooner come first"""


def coming_shards(layout: EpochLayout, global_step: int, slots: Ints) -> ComingShards:
    """The shards that slots of the global batch read at a step, and soon.

    Within a window samples are shuffled, so any of its shards may be next. A shard that straddles two windows of one
    part is read in both, one after the other; one that straddles two parts, of which there are at most P, at the
    beginning of one and at the end of the other.
    """
    epoch, step = epoch_and_step(layout, global_step)
    per_part = layout.global_batch // layout.parts
    current: dict[int, None] = {}
    windows_after: list[tuple[int, list[int]]] = []  # the step at which a window begins, its shards
    for part in np.unique(slots % layout.parts):
        _, size, windows = (int(values[0]) for values in _windows_of(layout, np.array([part])))
        first, last = (((nth + 1) * windows - 1) // size for nth in (step * per_part, (step + 1) * per_part - 1))
        read = layout.steps_per_epoch * per_part  # samples of the part that this epoch shows
        for window in range(first, last + 1):
            current |= dict.fromkeys(_window_shards(layout, epoch, int(part), window))
        more = last + 1 < windows and (last + 1) * size // windows < read
        next_epoch, window = (epoch, last + 1) if more else (epoch + 1, 0)
        begins = next_epoch * layout.steps_per_epoch + window * size // windows // per_part
        windows_after.append((begins, _window_shards(layout, next_epoch, int(part), window)))
    following = dict.fromkeys(
        shard for _, shards in sorted(windows_after, key=lambda after: after[0]) for shard in shards
    )
    return ComingShards(tuple(current), tuple(shard for shard in following if shard not in current))


def _window_shards(layout: EpochLayout, epoch: int, part: int, window: int) -> list[int]:
    """The shards that a window of a part lies in, in the order of the sequence."""
    part_start, size, windows = (int(values[0]) for values in _windows_of(layout, np.array([part])))
    order, ends, first = _shard_sequence(layout, epoch)
    start = part_start + window * size // windows + first
    length = (window + 1) * size // windows - window * size // windows
    place = int(np.searchsorted(ends, start % layout.samples, side="right"))
    shards, left = [], length + start % layout.samples - int(ends[place] - layout.sizes[order[place]])
    while left > 0:
        shards.append(int(order[place]))
        left -= int(layout.sizes[order[place]])
        place = (place + 1) % len(order)
    return [shard for shard in shards if layout.sizes[shard]]


@functools.lru_cache(maxsize=4)
def _shard_sequence(layout: EpochLayout, epoch: int) -> tuple[Ints, Ints, int]:
    """An epoch's permutation of the shards [S], where each ends in the sequence [S], and where the sequence starts.

    Cached because it is the same for all steps of an epoch and sorts the shards (1 ms for 14,000).
    """
    # Sorting distinct random words is a uniform permutation, and unlike Generator.permutation it is ours to keep.
    order = np.argsort(key_of(layout.seed, epoch, _SHARDS, np.arange(len(layout.sizes))))
    start = key_of(layout.seed, epoch, _START)[0] % np.uint64(layout.samples)
    return order, np.cumsum(layout.sizes[order]), int(start)


def shuffle(position: Ints, size: Ints, key: Words) -> Ints:
    """Image of each position under a keyed pseudo-random bijection of {0 … size − 1}, computed per element.

    A Feistel network on {0 … a−1} × {0 … b−1} with a = ⌈√size⌉, b = ⌈size/a⌉, where a result outside is sent through
    again until it falls inside (cycle walking): Black & Rogaway, "Ciphers with arbitrary finite domains", 2002.
    As a·b − size < √size, few elements take a second turn.

    Args:
        position: [R] in [0, size).
        size: [R] length of each element's domain.
        key: [R] uint64; elements of one domain have one key.

    Returns:
        [R] int64 in [0, size).
    """
    columns = np.ceil(np.sqrt(size)).astype(np.int64)
    rows = -(-size // columns)
    image = _feistel(position, columns, rows, key)
    while (outside := np.flatnonzero(image >= size)).size:
        image[outside] = _feistel(image[outside], columns[outside], rows[outside], key[outside])
    return image


def _feistel(position: Ints, columns: Ints, rows: Ints, key: Words) -> Ints:
    """One pass of the network over {0 … rows·columns − 1}: each round adds a hash of one half to the other half."""
    a, b = columns.astype(np.uint64), rows.astype(np.uint64)
    left, right = np.divmod(position.astype(np.uint64), b)
    for i in range(0, _ROUNDS, 2):
        left = (left + _mix(key ^ _round(i) ^ right) % a) % a
        right = (right + _mix(key ^ _round(i + 1) ^ left) % b) % b
    return (left * b + right).astype(np.int64)


def _round(i: int) -> np.uint64:
    """The round's number in bits that no half reaches (halves are below 2^32)."""
    return np.uint64(i << 32)


def key_of(*words: int | Ints) -> Words:
    """A 64-bit hash of some integers or [R] arrays of them, broadcast to at least one dimension."""
    key = np.zeros(1, np.uint64)
    for word in words:
        if isinstance(word, int):
            key = _mix(key ^ np.uint64(word % 2**64))
        else:
            key = _mix(key ^ word.astype(np.uint64))
    return key


def _mix(words: Words) -> Words:
    """SplitMix64's output function, a bijection of 64-bit words (Steele, Lea & Flood, 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
