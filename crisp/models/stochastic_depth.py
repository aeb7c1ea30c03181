"""Stochastic depth that skips the work: which images pass through which residual branch (Huang et al., 2016).

Each image skips each branch by a coin of its own, as timm's `DropPath` has it; but here the branch is only run on the
images that take it. The coins are tossed on the host, so that a GPU need not be asked how many there are, and by
address (`crisp.philox`): they are the same for any number of ranks and micro-batches.
Axes: V views, B images, depth blocks; a block has two branches, attention and MLP.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.philox import Stream, uniforms


class BlockRows(NamedTuple):
    """Rows of the flattened [V·B] images that pass through a block's branches."""

    attention: Tensor
    """[kept] int64, ascending"""
    mlp: Tensor
    """[kept] int64, ascending"""
    scale: float
    """1 / probability of being kept"""


def depth_rates(rate: float, depth: int) -> list[float]:
    """Probability of skipping each block's branches: linear from 0 to `rate`."""
    return np.linspace(0, rate, depth).tolist()


def draw_kept(
    rates: Sequence[float], *, seed: int, step: int, slots: NDArray[np.int64], views: int
) -> NDArray[np.bool_]:
    """Whether an image passes through a branch.

    Args:
        rates: [depth] probability of skipping.
        seed: of the run.
        step: global step.
        slots: [B] places of the images in the global batch.
        views: V.

    Returns:
        [depth, 2, V, B] bool
    """
    draws = uniforms(
        Stream.STOCHASTIC_DEPTH,
        seed=seed,
        epoch=step,
        sample=slots[None],
        lane=np.arange(views)[:, None],
        blocks=-(-2 * len(rates) // 4),
    )  # [V, B, at least 2·depth]
    branches = draws[..., : 2 * len(rates)].reshape(views, len(slots), len(rates), 2)
    return np.ascontiguousarray((branches >= np.asarray(rates)[:, None]).transpose(2, 3, 0, 1))


def kept_rows(kept: NDArray[np.bool_], rates: Sequence[float], *, device: torch.device) -> list[BlockRows | None]:
    """The same as row numbers on a device, sent there at once; None for a block that skips nothing.

    Args:
        kept: [depth, 2, V, B], as `draw_kept` gives it, or some of its views and images.
        rates: [depth]
        device: of the images.
    """
    flat = kept.reshape(len(rates), 2, -1)
    rows = [np.flatnonzero(branch) for block, rate in zip(flat, rates, strict=True) if rate > 0 for branch in block]
    if not rows:
        return [None] * len(rates)
    packed = torch.from_numpy(np.concatenate(rows))
    if device.type == "cuda":  # the host goes on at once
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = iter(packed.split([len(part) for part in rows]))
    return [BlockRows(next(parts), next(parts), 1 / (1 - rate)) if rate > 0 else None for rate in rates]
