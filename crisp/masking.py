"""iBOT's patch masks: which patches of a global view the student sees as the mask token.

A global view is masked with probability `mask_probability`, at a ratio drawn uniformly from `mask_ratio`. Blocks
(BEiT's, as iBOT uses them) are placed one after the other until the target, ratio · n patches, is reached or ten tries
in a row add nothing; the count stays at or below the target. "rand" masks exactly int(ratio · n) patches.

Every draw is addressed by (seed, epoch, sample, view): see `crisp.philox`. The loops are compiled, since in plain
Python they take longer than everything else about a batch; the functions' `.py_func` are the same in Python.
"""

import math

import numpy as np
from numpy.typing import NDArray

from crisp.config import ViewsConfig
from crisp.jit import compiled
from crisp.philox import Stream, uniform4, word

GLOBAL_VIEWS = 2
_TRIES = 10
_MASK = word(Stream.MASK)
_FIRST = np.uint64(0)  # block of the draws that decide whether a view is masked, and how much
_ONE = np.uint64(1)


def patch_masks(views: ViewsConfig, *, seed: int, epoch: int, sample_id: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The masks of the two global views.

    Args:
        views: the fields mask_*, and the grid of a global view.
        seed: of the run.
        epoch: from 0.
        sample_id: [B].

    Returns:
        [2, B, n] bool, n = grid², row by row; True: masked.
    """
    grid = views.global_grid
    masks = np.zeros((GLOBAL_VIEWS, len(sample_id), grid, grid), np.bool_)
    draw_masks(
        masks,
        word(seed),
        word(epoch),
        np.asarray(sample_id, np.uint64),
        views.mask_probability,
        *views.mask_ratio,
        math.log(views.mask_aspect[0]),
        math.log(views.mask_aspect[1]),
        views.mask_shape == "block",
    )
    return masks.reshape(GLOBAL_VIEWS, len(sample_id), grid * grid)


@compiled
def draw_masks(  # type: ignore[no-untyped-def]
    masks, seed, epoch, sample_id, probability, low_ratio, high_ratio, low_log_aspect, high_log_aspect, block_shaped
):
    """Fill all-False `masks` [views, B, h, w] bool; seed, epoch and sample_id [B] are uint64."""
    views, batch, height, width = masks.shape
    for view in range(views):
        lane = np.uint64(view)
        for b in range(batch):
            sample = sample_id[b]
            masked, ratio, _, _ = uniform4(seed, epoch, _FIRST, lane, sample, _MASK)
            if masked >= probability:
                continue
            target = (low_ratio + ratio * (high_ratio - low_ratio)) * (height * width)
            if block_shaped:
                place_blocks(masks[view, b], target, low_log_aspect, high_log_aspect, seed, epoch, lane, sample)
            else:
                pick_patches(masks[view, b], int(target), seed, epoch, lane, sample)


@compiled
def place_blocks(mask, target, low_log_aspect, high_log_aspect, seed, epoch, lane, sample):  # type: ignore[no-untyped-def]
    """Mask blocks of an all-False `mask` [h, w] until `target` patches (a float) are reached or nothing more fits."""
    height, width = mask.shape
    smallest_area = (min(height, width) // 3) ** 2
    block = _FIRST
    masked = 0
    while masked < target:
        remaining = target - masked
        added = 0
        for _ in range(_TRIES):
            block += _ONE
            area_draw, aspect_draw, top_draw, left_draw = uniform4(seed, epoch, block, lane, sample, _MASK)
            # Near the target the upper end lies below the lower one: the range is meant to turn over then.
            area = smallest_area + area_draw * (remaining - smallest_area)
            aspect = math.exp(low_log_aspect + aspect_draw * (high_log_aspect - low_log_aspect))
            h = round(math.sqrt(area * aspect))
            w = round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top = int(top_draw * (height - h + 1))
            left = int(left_draw * (width - w + 1))
            new = h * w - mask[top : top + h, left : left + w].sum()
            if 0 < new <= remaining:
                mask[top : top + h, left : left + w] = True
                added = new
                break
        if added == 0:
            break
        masked += added


@compiled
def pick_patches(mask, count, seed, epoch, lane, sample):  # type: ignore[no-untyped-def]
    """Mask `count` patches of an all-False `mask` [h, w], each subset as likely (selection sampling, Knuth 3.4.2)."""
    flat = mask.reshape(-1)
    block = _FIRST
    wanted = count
    for start in range(0, flat.size, 4):
        block += _ONE
        draws = uniform4(seed, epoch, block, lane, sample, _MASK)
        for i in range(min(4, flat.size - start)):
            if draws[i] * (flat.size - start - i) < wanted:
                flat[start + i] = True
                wanted -= 1
