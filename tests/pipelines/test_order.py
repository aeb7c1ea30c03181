"""The order of samples, against a twin that materialises everything and in the properties that runs rely on."""

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from crisp.errors import CrispError
from crisp.pipelines.order import (
    EpochLayout,
    epoch_and_step,
    global_batch_samples,
    rank_slots,
    samples_of_parts,
    shuffle,
)

M64 = 2**64 - 1
UNEVEN = (7, 31, 1, 0, 18, 44, 3, 25, 25, 9, 60, 2)  # 225 samples


def layout_of(sizes=UNEVEN, *, global_batch=16, parts=8, window_shards=2, seed=3) -> EpochLayout:
    return EpochLayout(
        shard_samples=sizes, global_batch=global_batch, parts=parts, window_shards=window_shards, seed=seed
    )


# ---- the twin: plain integers and lists, everything materialised ------------------------------------------------


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def key_of(*words: int) -> int:
    key = 0
    for word in words:
        key = mix(key ^ (word & M64))
    return key


def permutation(size: int, key: int) -> list[int]:
    a = math.isqrt(size - 1) + 1
    b = math.ceil(size / a)

    def once(position: int) -> int:
        left, right = divmod(position, b)
        for i in range(0, 16, 2):
            left = (left + mix(key ^ i << 32 ^ right) % a) % a
            right = (right + mix(key ^ (i + 1) << 32 ^ left) % b) % b
        return left * b + right

    images = []
    for position in range(size):
        image = once(position)
        while image >= size:
            image = once(image)
        images.append(image)
    return images


def cut(items: list, pieces: int) -> list[list]:
    return [items[i * len(items) // pieces : (i + 1) * len(items) // pieces] for i in range(pieces)]


def whole_epoch(sizes, *, global_batch, parts, window_shards, seed, epoch) -> tuple[list[list[int]], list[int]]:
    """All global batches of an epoch and the samples left out."""
    rows = iter(range(sum(sizes)))
    shards = [list(itertools.islice(rows, size)) for size in sizes]
    order = sorted(range(len(shards)), key=lambda shard: key_of(seed, epoch, 0, shard))
    sequence = [row for shard in order for row in shards[shard]]
    start = key_of(seed, epoch, 1) % len(sequence)
    sequence = sequence[start:] + sequence[:start]

    window_samples = round(window_shards * len(sequence) / len(sizes))
    shuffled_parts = []
    for p, part in enumerate(cut(sequence, parts)):
        shuffled = []
        for w, window in enumerate(cut(part, max(1, math.floor(len(part) / window_samples + 0.5)))):
            shuffled += [window[i] for i in permutation(len(window), key_of(seed, epoch, 2, p, w))]
        shuffled_parts.append(shuffled)

    share = global_batch // parts
    batches = []
    for step in range(len(sequence) // global_batch):
        taken = [part[step * share : (step + 1) * share] for part in shuffled_parts]
        batches.append([row for column in zip(*taken, strict=True) for row in column])
    left_out = [row for part in shuffled_parts for row in part[len(batches) * share :]]
    return batches, left_out


LAYOUTS = [
    {},
    {"window_shards": 50},
    {"window_shards": 1, "seed": -5},
    {"parts": 1},
    {"parts": 16},
    {"global_batch": 225, "parts": 5},
    {"sizes": (64,), "global_batch": 8},
    {"sizes": (3,) * 40, "global_batch": 12, "parts": 4, "window_shards": 4},
    {"sizes": (1,), "global_batch": 1, "parts": 1},
]


@pytest.mark.parametrize("given", LAYOUTS)
@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_equals_the_twin_that_materialises_everything(given, epoch):
    layout = layout_of(**given)
    batches, left_out = whole_epoch(
        list(layout.shard_samples),
        global_batch=layout.global_batch,
        parts=layout.parts,
        window_shards=layout.window_shards,
        seed=layout.seed,
        epoch=epoch,
    )
    computed = [global_batch_samples(layout, epoch, step).tolist() for step in range(layout.steps_per_epoch)]
    assert computed == batches
    assert len(left_out) == layout.samples % layout.global_batch
    assert sorted(itertools.chain(left_out, *batches)) == list(range(layout.samples))


# ---- the bijection ----------------------------------------------------------------------------------------------


def shuffled(size: int, key: int) -> np.ndarray:
    return shuffle(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))


@pytest.mark.parametrize("key", [0, 1, 2**63 + 12345])
def test_shuffle_is_a_bijection_of_every_size(key):
    for size in [*range(1, 400), 1023, 1024, 1025, 9999, 10_000, 10_001, 65_537, 163_840]:
        image = shuffled(size, key)
        assert image.dtype == np.int64
        assert np.array_equal(np.sort(image), np.arange(size)), size


def test_shuffle_of_mixed_domains_equals_each_alone():
    sizes = np.array([1, 2, 3, 10, 97, 1000])
    keys = np.arange(6, dtype=np.uint64) + np.uint64(99)
    positions = sizes - 1
    together = shuffle(positions, sizes, keys)
    alone = [shuffled(int(n), int(k))[-1] for n, k in zip(sizes, keys, strict=True)]
    assert together.tolist() == alone


def chi_square(counts: np.ndarray) -> float:
    """Excess of Pearson's statistic over its expectation, in standard deviations."""
    expected = counts.mean()
    degrees = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_permutations_of_a_small_domain_are_equally_likely(size):
    keys = np.repeat(np.arange(24_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), size)
    position = np.tile(np.arange(size), 24_000)
    images = shuffle(position, np.full(len(keys), size), keys).reshape(-1, size)
    counts = Counter(map(tuple, images.tolist()))
    assert len(counts) == math.factorial(size)
    assert chi_square(np.array(list(counts.values()))) < 4


def test_places_and_neighbours_are_uniform_over_keys():
    size, trials = 37, 20_000
    keys = np.repeat(np.arange(trials, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95), size)
    images = shuffle(np.tile(np.arange(size), trials), np.full(len(keys), size), keys).reshape(trials, size)
    places = np.stack([np.bincount(images[:, i], minlength=size) for i in range(size)])
    assert all(chi_square(row) < 4.5 for row in places)
    apart = (images[:, 1:] - images[:, :-1]) % size  # 1 … size − 1, each as likely
    assert chi_square(np.bincount(apart.ravel(), minlength=size)[1:]) < 4


def test_a_large_shuffle_has_no_trend():
    size = 100_000
    image = shuffled(size, 42)
    index = np.arange(size)
    assert abs(np.corrcoef(index, image)[0, 1]) < 4 / math.sqrt(size)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 4 / math.sqrt(size)
    assert (image == index).sum() < 10  # fixed points: one is expected
    blocks = np.histogram2d(index, image, bins=20)[0]
    assert abs(chi_square(blocks)) < 4


# ---- what runs rely on ------------------------------------------------------------------------------------------


def test_parts_cover_the_data_once():
    layout = layout_of()
    bounds = np.arange(layout.parts + 1) * layout.samples // layout.parts
    part = np.repeat(np.arange(layout.parts), np.diff(bounds))
    nth = np.arange(layout.samples) - bounds[part]
    for epoch in range(5):
        rows = samples_of_parts(layout, epoch, part=part, nth=nth)
        assert np.array_equal(np.sort(rows), np.arange(layout.samples))


def test_epochs_and_seeds_differ_and_repeat():
    first = global_batch_samples(layout_of(), 0, 0)
    assert np.array_equal(first, global_batch_samples(layout_of(), 0, 0))
    assert not np.array_equal(first, global_batch_samples(layout_of(), 1, 0))
    assert not np.array_equal(first, global_batch_samples(layout_of(seed=4), 0, 0))


def test_left_out_samples_change_from_epoch_to_epoch():
    layout = layout_of(global_batch=112)  # 1 of 225 is left out
    left_out = set()
    for epoch in range(60):
        shown = [global_batch_samples(layout, epoch, step) for step in range(layout.steps_per_epoch)]
        (missing,) = set(range(layout.samples)) - set(np.concatenate(shown).tolist())
        left_out.add(missing)
    assert len(left_out) > 40


def test_parts_of_a_single_shard_change_from_epoch_to_epoch():
    layout = layout_of((64,), global_batch=8)
    slots = np.array([0])  # part 0 alone
    seen = [{int(global_batch_samples(layout, epoch, step, slots)[0]) for step in range(8)} for epoch in range(2)]
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("world_size", "nodes"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)]
)
def test_every_world_sees_the_same_global_batches(world_size, nodes):
    layout = layout_of()
    slots = [rank_slots(16, rank=rank, world_size=world_size, nodes=nodes) for rank in range(world_size)]
    assert np.array_equal(np.sort(np.concatenate(slots)), np.arange(16))
    counts = [len(rank) for rank in slots]
    assert max(counts) - min(counts) <= 1
    for epoch, step in [(0, 0), (0, 13), (5, 7)]:
        whole = global_batch_samples(layout, epoch, step)
        assembled = np.full(16, -1)
        for rank in slots:
            assembled[rank] = global_batch_samples(layout, epoch, step, rank)
        assert np.array_equal(assembled, whole)


@pytest.mark.parametrize(("nodes", "world_size"), [(1, 4), (2, 8), (4, 8), (8, 8), (2, 6)])
def test_a_node_reads_only_its_parts(nodes, world_size):
    parts = 8
    for rank in range(world_size):
        node = rank // (world_size // nodes)
        slots = rank_slots(48, rank=rank, world_size=world_size, nodes=nodes)
        assert set((slots % parts % nodes).tolist()) == {node}


def test_a_batch_reads_few_shards():
    """With 8 parts and windows of 4 shards, a step touches at most 8 · (4 and two it cuts into) of 400 shards."""
    layout = layout_of((50,) * 400, global_batch=256, parts=8, window_shards=4)
    for step in range(layout.steps_per_epoch):
        rows = global_batch_samples(layout, 0, step, np.arange(0, 256, 8))
        assert len(set((rows // 50).tolist())) <= 2 * (4 + 2)  # one part; a step may straddle two windows


def test_epoch_and_step():
    layout = layout_of()
    assert layout.steps_per_epoch == 225 // 16 == 14
    assert epoch_and_step(layout, 0) == (0, 0)
    assert epoch_and_step(layout, 13) == (0, 13)
    assert epoch_and_step(layout, 14) == (1, 0)
    assert epoch_and_step(layout, 14 * 9 + 5) == (9, 5)


def test_any_step_of_a_web_scale_epoch():
    """142 million samples in 14,000 shards: first, middle and last steps, in little memory."""
    sizes = np.random.default_rng(0).integers(9_000, 11_300, 14_000)
    layout = layout_of(sizes, global_batch=2048, parts=64, window_shards=16)
    assert layout.samples > 140_000_000
    tracemalloc.start()
    rows = np.concatenate(
        [
            global_batch_samples(layout, epoch, step)
            for epoch in (0, 299)
            for step in (0, layout.steps_per_epoch // 2, layout.steps_per_epoch - 1)
        ]
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
    per_epoch = rows.reshape(2, -1)
    assert all(len(np.unique(epoch)) == epoch.size for epoch in per_epoch)
    assert rows.min() >= 0
    assert rows.max() < layout.samples


def test_too_little_data_is_refused():
    with pytest.raises(CrispError, match=r"optim.global_batch=512: larger than the data \(225 samples\)"):
        layout_of(global_batch=512)


def test_worlds_that_cannot_be_are_refused():
    with pytest.raises(CrispError, match="smaller than the 32 processes"):
        rank_slots(16, rank=0, world_size=32)
    with pytest.raises(CrispError, match="6 processes on 4 nodes"):
        rank_slots(16, rank=0, world_size=6, nodes=4)
