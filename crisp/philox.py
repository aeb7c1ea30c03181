"""Random numbers by address: Philox4x64-10, where any draw is a function of (key, counter) alone.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is (seed, epoch), the counter
(block, lane, sample, stream), so that a draw depends on nothing that was drawn before it and on nothing else in the
batch. The words are those of `numpy.random.Philox(key=[seed, epoch], counter=[block, lane, sample, stream])`, the
plain twin; making that object costs more than all of a sample's draws.
"""

import enum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crisp.jit import compiled


class Stream(enum.IntEnum):
    """What a draw is for; no two uses share a stream. A lane is a view, or 0 where there is one per sample."""

    CROP = 0
    APPEARANCE = 1
    MASK = 2
    SEED = 3
    STOCHASTIC_DEPTH = 4


_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


@compiled
def _high_word(a, b):  # type: ignore[no-untyped-def]
    """Upper 64 bits of the product of two 64-bit words."""
    a_low, a_high, b_low, b_high = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle = a_high * b_low + ((a_low * b_low) >> _HALF)
    carry = ((middle & _LOW) + a_low * b_high) >> _HALF
    return a_high * b_high + (middle >> _HALF) + carry


@compiled
def uniform4(seed, epoch, block, lane, sample, stream):  # type: ignore[no-untyped-def]
    """Four float64 in [0, 1) of one address (uint64 each), for compiled callers. Blocks are counted from 0."""
    k0, k1 = seed, epoch
    # NumPy's generator counts up before it draws, so its first block has counter 1.
    c0, c1, c2, c3 = block + np.uint64(1), lane, sample, stream
    for _ in range(10):
        c0, c1, c2, c3 = (
            _high_word(_MULTIPLIERS[1], c2) ^ c1 ^ k0,
            _MULTIPLIERS[1] * c2,
            _high_word(_MULTIPLIERS[0], c0) ^ c3 ^ k1,
            _MULTIPLIERS[0] * c0,
        )
        k0 += _KEY_STEPS[0]
        k1 += _KEY_STEPS[1]
    shift, unit = np.uint64(11), 2.0**-53
    return (c0 >> shift) * unit, (c1 >> shift) * unit, (c2 >> shift) * unit, (c3 >> shift) * unit


@compiled
def _fill(out, seed, epoch, first_block, lanes, samples, stream):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for block in range(out.shape[1]):
            address = first_block + np.uint64(block), lanes[i], samples[i], stream
            out[i, block, 0], out[i, block, 1], out[i, block, 2], out[i, block, 3] = uniform4(seed, epoch, *address)


def uniforms(
    stream: Stream, *, seed: int, epoch: int, sample: ArrayLike, lane: ArrayLike = 0, first_block: int = 0, blocks: int
) -> NDArray[np.float64]:
    """The uniform draws of some samples and lanes, four to a block.

    Args:
        stream: what they are for.
        seed: any integer, taken modulo 2^64.
        epoch: from 0.
        sample: [...] sample ids.
        lane: [...] broadcast with `sample`.
        first_block: draws before 4 · first_block are skipped, at no cost.
        blocks: draws wanted, / 4.

    Returns:
        [..., 4 · blocks] float64 in [0, 1), 53 random bits each.
    """
    samples, lanes = np.broadcast_arrays(np.asarray(sample, np.uint64), np.asarray(lane, np.uint64))
    out = np.empty((samples.size, blocks, 4))
    _fill(out, word(seed), word(epoch), word(first_block), lanes.flatten(), samples.flatten(), word(stream))
    return out.reshape(*samples.shape, 4 * blocks)


def word(value: int) -> np.uint64:
    """An integer modulo 2^64, as compiled functions take seeds and addresses."""
    return np.uint64(int(value) % 2**64)
