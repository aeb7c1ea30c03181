"""Addressed random numbers against NumPy's Philox, bit for bit."""

import numpy as np
import pytest

from crisp.philox import Stream, uniform4, uniforms, word


def numpy_uniforms(seed: int, epoch: int, sample: int, lane: int, stream: int, count: int) -> np.ndarray:
    key = np.array([seed % 2**64, epoch], np.uint64)
    counter = np.array([0, lane, sample, stream], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


@pytest.mark.parametrize(
    ("seed", "epoch", "sample", "lane"),
    [(0, 0, 0, 0), (1, 2, 3, 4), (-1, 299, 142_000_000, 11), (2**63 + 9, 2**40, 2**62, 2**33), (2**64 - 1, 1, 1, 0)],
)
def test_equals_numpy_bit_for_bit(seed, epoch, sample, lane):
    ours = uniforms(Stream.SEED, seed=seed, epoch=epoch, sample=sample, lane=lane, blocks=7)
    assert np.array_equal(ours, numpy_uniforms(seed, epoch, sample, lane, Stream.SEED, 28))


def test_broadcasts_sample_and_lane():
    ours = uniforms(Stream.CROP, seed=5, epoch=1, sample=np.array([[7], [9]]), lane=np.arange(3), blocks=2)
    assert ours.shape == (2, 3, 8)
    for i, sample in enumerate((7, 9)):
        for lane in range(3):
            assert np.array_equal(ours[i, lane], numpy_uniforms(5, 1, sample, lane, Stream.CROP, 8))


def test_later_blocks_alone_equal_those_of_the_whole():
    whole = uniforms(Stream.CROP, seed=5, epoch=1, sample=np.arange(6), blocks=5)
    later = uniforms(Stream.CROP, seed=5, epoch=1, sample=np.arange(6), first_block=3, blocks=2)
    assert np.array_equal(later, whole[:, 12:])


def test_streams_lanes_samples_epochs_and_seeds_differ():
    base = {"seed": 1, "epoch": 2, "sample": 3, "lane": 4, "blocks": 1}
    drawn = [uniforms(stream, **base) for stream in Stream]
    drawn += [uniforms(Stream.CROP, **{**base, name: base[name] + 1}) for name in ("seed", "epoch", "sample", "lane")]
    assert len({float(lot[0]) for lot in drawn}) == len(drawn)


def test_scalar_form_for_compiled_callers():
    drawn = uniform4(*map(word, (5, 1, 2, 3, 4, Stream.MASK)))
    whole = uniforms(Stream.MASK, seed=5, epoch=1, sample=4, lane=3, blocks=3)
    assert list(drawn) == whole[8:12].tolist()
