from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crisp.shard_imagenet.plan import Plan, cut


def _cut_plainly(sizes: list[int], limit: int) -> list[int]:
    """One item after the other."""
    starts, count, total = [0], 0, 0
    for i, size in enumerate(sizes):
        if count and total + size > limit:
            starts.append(i)
            count, total = 0, 0
        count, total = count + 1, total + size
    return starts


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=60),
    st.integers(1, 30),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_cut_is_greedy_in_whatever_pieces_the_sizes_come(sizes: list[int], limit: int, seams: list[int]) -> None:
    pieces = np.split(np.array(sizes), sorted(seam for seam in seams if seam <= len(sizes)))
    assert list(cut(pieces, limit)) == _cut_plainly(sizes, limit)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_file_is_in_one_shard(seed: int | None) -> None:
    plan = Plan(files=1000, starts=np.array([0, 10, 400, 1000]), seed=seed, bytes=0)
    shards = [plan.numbers(i).tolist() for i in range(plan.shards)]
    assert [len(shard) for shard in shards] == [10, 390, 600]
    files = [number for shard in shards for number in shard]
    assert sorted(files) == list(range(1000))
    in_order = all(a < b for a, b in pairwise(files))
    assert in_order == (seed is None)


def test_the_shuffle_mixes_classes() -> None:
    plan = Plan(files=100_000, starts=np.arange(0, 100_001, 1000), seed=3, bytes=0)
    classes = [len(set((plan.numbers(i) // 100).tolist())) for i in range(plan.shards)]
    # 1000 draws from 1000 classes of equal size meet 1 − 1/e of them
    assert 600 < np.mean(classes) < 665
