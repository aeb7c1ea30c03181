"""Label propagation as DINO evaluates it (Caron et al., 2021, section 4.2.2, after Jabri et al., 2020).

A patch of a new frame takes the soft labels of its nearest patches in a few frames before it. Axes: T context frames,
C channels (background first), h×w patches, D width.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """A frame's labels of the objects that were given in one and the same frame."""

    ids: tuple[int, ...]
    """Object of each channel after the background's"""
    values: Tensor
    """[1 + objects, h, w] float; they sum to 1 over channels"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Objects that were given together, and what a frame takes their labels from: (features, labels) of frames."""

    ids: tuple[int, ...]
    first: tuple[Tensor, Tensor]
    """The frame where they were given"""
    queue: deque[tuple[Tensor, Tensor]]
    """The last 7 after it; starts empty"""

    def propagate(self, feature: Tensor) -> SoftMask:
        """Labels of a frame's features [h, w, D]."""
        features, labels = zip(self.first, *self.queue, strict=True)
        return SoftMask(ids=self.ids, values=propagate_labels(feature, torch.stack(features), torch.stack(labels)))


def propagate(features: Iterable[Tensor], starts: Mapping[int, NDArray[np.uint8]]) -> Iterator[list[SoftMask]]:
    """Soft masks of a sequence, frame by frame.

    Objects that are given in one frame are propagated together: from that frame, which is never queued, and from the
    last 7 frames after it. Those given in another frame are propagated beside them, in the same way: a frame from
    before an object was given says nothing about it. Where a later object is given, the earlier ones are not.

    Args:
        features: [h, w, D] of each frame.
        starts: frame → ids [H, W] at the original size; an id that was given before is ignored.

    Yields:
        The frame's masks, one for each frame that objects were given in so far.
    """
    groups: list[_Group] = []
    for frame, raw in enumerate(features):
        feature = F.normalize(raw, dim=-1)
        masks = [group.propagate(feature) for group in groups]
        new = new_objects(starts[frame], masks) if frame in starts else ()
        if new:
            given = given_labels(starts[frame], new, grid=feature.shape[:2], like=feature)
            masks = [SoftMask(ids=mask.ids, values=_make_room(mask.values, given)) for mask in masks]
        for group, mask in zip(groups, masks, strict=True):
            group.queue.append((feature, mask.values))
        if new:
            groups.append(_Group(ids=new, first=(feature, given), queue=deque(maxlen=QUEUE_FRAMES)))
            masks.append(SoftMask(ids=new, values=given))
        yield masks


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


def new_objects(mask: NDArray[np.uint8], known: Sequence[SoftMask]) -> tuple[int, ...]:
    """Objects of a mask [H, W] without labels so far; all of the original's, also those too small for the grid."""
    ids = {index for soft in known for index in soft.ids}
    return tuple(index for index in object_ids(mask) if index not in ids)


def given_labels(mask: NDArray[np.uint8], ids: tuple[int, ...], *, grid: tuple[int, ...], like: Tensor) -> Tensor:
    """Labels [1 + objects, h, w] of a frame where objects are given.

    Args:
        mask: ids [H, W] at the original size; nearest to the patch grid.
        ids: those that count, all else is background.
        grid: h, w.
        like: a tensor of the dtype and device wanted.
    """
    height, width = grid
    nearest = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    small = torch.from_numpy(np.asarray(nearest).astype(np.int64)).to(like.device)
    objects = torch.stack([small == index for index in ids]).to(like.dtype)
    return torch.cat([1 - objects.sum(0, keepdim=True), objects])


def _make_room(values: Tensor, given: Tensor) -> Tensor:
    """Labels [C, h, w] that are background where another label [*, h, w] is given to an object."""
    background = torch.zeros_like(values)
    background[0] = 1
    return torch.where(given[:1] == 1, values, background)


def read_out(masks: Sequence[SoftMask], *, patch_px: int, height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Ids [height_px, width_px] of a frame's soft masks.

    Bilinear to the prepared frame's size (corners not aligned), every channel stretched to 0…1 by its own minimum and
    maximum (a constant one becomes 0), the largest channel wins, nearest to the original size. Where objects of several
    masks win against their backgrounds, the largest of them does.
    """
    if not masks:
        return np.full((height_px, width_px), BACKGROUND_ID, dtype=np.uint8)
    ids, strength = None, None  # [H, W] so far: the winner, and its stretched channel (0 for background)
    for mask in masks:
        values, channel = _stretched(mask.values, patch_px).max(0)
        here = torch.tensor([BACKGROUND_ID, *mask.ids], dtype=torch.uint8, device=channel.device)[channel]
        claim = torch.where(channel > 0, values, torch.zeros_like(values))
        if ids is None or strength is None:
            ids, strength = here, claim
        else:
            ids, strength = torch.where(claim > strength, here, ids), torch.maximum(claim, strength)
    assert ids is not None
    return np.asarray(Image.fromarray(ids.cpu().numpy()).resize((width_px, height_px), Image.Resampling.NEAREST))


def _stretched(values: Tensor, patch_px: int) -> Tensor:
    """Labels [C, h, w] at the prepared frame's size, every channel from 0 to 1."""
    large = F.interpolate(values[None], scale_factor=patch_px, mode="bilinear", align_corners=False)[0]
    low = large.amin((1, 2), keepdim=True)
    span = large.amax((1, 2), keepdim=True) - low
    return (large - low) / torch.where(span > 0, span, torch.ones_like(span))
