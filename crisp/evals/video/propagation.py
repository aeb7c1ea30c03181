"""Label propagation as DINO evaluates it (Caron et al., 2021, section 4.2.2, after Jabri et al., 2020).

A patch of a new frame takes the soft labels of its nearest patches in a few frames before it. Axes: T context frames,
C channels (background first), h×w patches, D width.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from crisp.evals.video.masks import object_ids
from crisp.evals.video.protocol import BACKGROUND_ID, NEIGHBOURHOOD_PATCHES, QUEUE_FRAMES, TEMPERATURE, TOP_K

# Side of the squares of patches that are looked up together: small, so that little outside their neighbourhoods is
# computed (of 30×52 patches about half), and large enough for the matrix products.
TILE_PATCHES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftMask:
    """A frame's labels."""

    ids: tuple[int, ...]
    """Object of each channel after the background's"""
    values: Tensor
    """[1 + objects, h, w] float, sums to 1 over channels"""


def propagate(features: Iterable[Tensor], starts: Mapping[int, NDArray[np.uint8]]) -> Iterator[SoftMask | None]:
    """Soft masks of a sequence, frame by frame.

    The context of a frame is every frame where objects were given, and the last 7 others, from a queue that starts
    empty. A frame with given objects is never queued. Of a later such frame, the given objects are as given and the rest is
    propagated; it stays in the context as the first frame does, since it is the first one of its objects.

    Args:
        features: [h, w, D] of each frame.
        starts: frame → ids [H, W] at the original size; an id that was given before is ignored.

    Yields:
        The frame's mask; None before the first start.
    """
    given: list[tuple[Tensor, Tensor]] = []
    queue: deque[tuple[Tensor, Tensor]] = deque(maxlen=QUEUE_FRAMES)
    ids: tuple[int, ...] = ()
    for frame, raw in enumerate(features):
        feature = F.normalize(raw, dim=-1)
        mask: SoftMask | None = None
        if context := [*given, *queue]:
            values = propagate_labels(
                feature,
                torch.stack([feature for feature, _ in context]),
                torch.stack([with_channels(values, 1 + len(ids)) for _, values in context]),
            )
            mask = SoftMask(ids=ids, values=values)
        new = new_objects(starts[frame], ids) if frame in starts else ()
        if new:
            mask = add_objects(mask, starts[frame], new, grid=feature.shape[:2], like=feature)
            ids = mask.ids
            given.append((feature, mask.values))
        elif mask is not None:
            queue.append((feature, mask.values))
        yield mask


def propagate_labels(target: Tensor, context: Tensor, labels: Tensor) -> Tensor:
    """Labels of a frame from those of its context, square by square, so that memory does not grow with h·w squared.

    A patch looks at those that are at most 12 rows and 12 columns away, in every context frame. Their weights are
    exp(cos / 0.1); those below the 5th largest are dropped, so that ties with it stay; the rest is divided by its sum.

    Args:
        target: [h, w, D], l2-normalised.
        context: [T, h, w, D], l2-normalised.
        labels: [T, C, h, w].

    Returns:
        [C, h, w].
    """
    height, width, _ = target.shape
    reach = NEIGHBOURHOOD_PATCHES
    rows = torch.arange(height, device=target.device)
    columns = torch.arange(width, device=target.device)
    propagated = labels.new_empty(labels.shape[1:])
    for top in range(0, height, TILE_PATCHES):
        tile_rows = slice(top, min(top + TILE_PATCHES, height))
        near_rows = slice(max(0, top - reach), tile_rows.stop + reach)
        row_is_near = (rows[tile_rows, None] - rows[None, near_rows]).abs() <= reach
        for left in range(0, width, TILE_PATCHES):
            tile_columns = slice(left, min(left + TILE_PATCHES, width))
            near_columns = slice(max(0, left - reach), tile_columns.stop + reach)
            column_is_near = (columns[tile_columns, None] - columns[None, near_columns]).abs() <= reach
            is_near = row_is_near[:, None, :, None] & column_is_near[None, :, None, :]  # [a, b, rows, columns]
            propagated[:, tile_rows, tile_columns] = _propagate_tile(
                target[tile_rows, tile_columns],
                context[:, near_rows, near_columns],
                labels[:, :, near_rows, near_columns],
                is_near,
            )
    return propagated


def _propagate_tile(target: Tensor, context: Tensor, labels: Tensor, is_near: Tensor) -> Tensor:
    """Labels [C, a, b] of a tile [a, b, D] from what lies around it in the context [T, rows, columns, …]."""
    a, b, _ = target.shape
    queries, keys = target.flatten(0, 1), context.flatten(0, 2)  # [a·b, D], [T·rows·columns, D]
    weights = (queries @ keys.T).div_(TEMPERATURE).exp_().unflatten(1, (len(context), -1))
    weights = weights.mul_(is_near.flatten(0, 1).flatten(1)[:, None, :]).flatten(1)
    fifth = weights.topk(min(TOP_K, weights.shape[1]), dim=1).values[:, -1:]
    weights = weights.masked_fill_(weights < fifth, 0)
    weights = weights / weights.sum(1, keepdim=True)
    by_source = labels.transpose(0, 1).flatten(1)  # [C, T·rows·columns]
    return (by_source @ weights.T).unflatten(1, (a, b))


def new_objects(mask: NDArray[np.uint8], ids: tuple[int, ...]) -> tuple[int, ...]:
    """Objects of a mask that are not among `ids`; all of the original's, also those too small for the patch grid."""
    return tuple(index for index in object_ids(mask) if index not in ids)


def add_objects(
    mask: SoftMask | None, given: NDArray[np.uint8], new: tuple[int, ...], *, grid: tuple[int, ...], like: Tensor
) -> SoftMask:
    """A frame's mask with new objects in channels of their own: a patch that is given to one is nobody else's.

    Args:
        mask: what was propagated; None at the first start, where all else is background.
        given: ids [H, W] at the original size; nearest to the patch grid.
        new: ids of `given` that are new.
        grid: h, w.
        like: a tensor of the dtype and device wanted.
    """
    height, width = grid
    nearest = Image.fromarray(given).resize((width, height), Image.Resampling.NEAREST)
    small = torch.from_numpy(np.asarray(nearest).astype(np.int64)).to(like.device)
    channels = torch.stack([small == index for index in new]).to(like.dtype)
    before = mask.values if mask is not None else like.new_ones(1, height, width)
    free = 1 - channels.sum(0)
    return SoftMask(ids=(*(mask.ids if mask else ()), *new), values=torch.cat([before * free, channels]))


def with_channels(values: Tensor, count: int) -> Tensor:
    """Labels [C, h, w] with channels of 0 for objects that came later."""
    return F.pad(values, (0, 0, 0, 0, 0, count - len(values)))


def read_out(mask: SoftMask, *, patch_px: int, height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Ids [height_px, width_px] of a soft mask.

    Bilinear to the prepared frame's size (corners not aligned), every channel stretched to 0…1 by its own minimum and
    maximum (a constant one becomes 0), the largest channel wins, nearest to the original size.
    """
    large = F.interpolate(mask.values[None], scale_factor=patch_px, mode="bilinear", align_corners=False)[0]
    low = large.amin((1, 2), keepdim=True)
    span = large.amax((1, 2), keepdim=True) - low
    winner = ((large - low) / torch.where(span > 0, span, torch.ones_like(span))).argmax(0)
    ids = torch.tensor([BACKGROUND_ID, *mask.ids], dtype=torch.uint8)[winner.cpu()].numpy()
    resized = Image.fromarray(ids).resize((width_px, height_px), Image.Resampling.NEAREST)
    return np.asarray(resized)
