"""Pixel labels of a patch from its nearest neighbours in a bank of labelled patches (CAPI's k-NN segmentation).

The bank of ADE20K holds 5.17 M patches. Neither its features nor its labels have to fit the device: both may be memory
maps, the features pass chunk by chunk, and labels are taken for the neighbours alone.

Axes: M queries, N patches of the bank, D width of the features, p² pixels of a patch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from crisp.errors import CrispError
from crisp.evals.segmentation.neighbours import (
    DISTANCES,
    KEY_CHUNK,
    QUERY_CHUNK,
    Distance,
    check_search,
    nearest,
    rows,
)

MAX_K = 127
"""Votes are counted in one byte, and compared together with the label in two"""
MODE_PIXELS = 65_536
"""Pixels voted on at a time: the counts of 30 neighbours then take 2 MB, which a processor's cache holds"""


@torch.no_grad()
def predict_pixels_grid(
    queries: Tensor,
    bank_features: Tensor | NDArray[np.floating],
    bank_labels: Tensor | NDArray[np.uint8],
    *,
    ks: Sequence[int],
    distances: Sequence[Distance] = DISTANCES,
    key_chunk: int = KEY_CHUNK,
    query_chunk: int = QUERY_CHUNK,
    dtype: torch.dtype = torch.float32,
) -> dict[tuple[int, Distance], Tensor]:
    """For every pixel the label that most of the k nearest patches have there, unweighted, ties to the smallest label.

    All k and all distances come from one pass over the bank (`neighbours.nearest`, which defines "nearest" and says
    what it holds in memory). Give as many queries at once as there is room for: the bank is read once per call.

    Args:
        queries: [M, D], finite, on the device that is to compute.
        bank_features: [N, D], finite, on any device, or an array such as a memory map.
        bank_labels: [N, p²] uint8 (p: side of a patch in pixels), likewise.
        ks: numbers of neighbours, from 1 to N and `MAX_K`.
        distances: of `DISTANCES`.
        key_chunk: patches of the bank on the device at a time. The results do not depend on it.
        query_chunk: queries compared with them at a time. The results do not depend on it.
        dtype: float32, or bfloat16 as CAPI has it for ADE20K: features are rounded to it.

    Returns:
        [M, p²] uint8 by (k, distance), on the CPU.

    Raises:
        CrispError: a k out of range, features that are not finite, shapes or types that do not fit.
    """
    check_votes(bank_features, bank_labels, ks)
    neighbours = nearest(
        queries, bank_features,
        k=max(ks), distances=distances, key_chunk=key_chunk, query_chunk=query_chunk, dtype=dtype,
    )  # fmt: skip
    predictions = {
        (k, distance): torch.empty(len(queries), bank_labels.shape[1], dtype=torch.uint8)
        for distance in distances
        for k in ks
    }
    for distance, found in neighbours.items():
        for start in range(0, len(queries), query_chunk):
            part = slice(start, start + query_chunk)
            labels = _labels_of(bank_labels, found[part]).to(queries.device, non_blocking=True)
            for k, modes in pixel_modes(labels, ks).items():
                predictions[k, distance][part] = modes.cpu()
    return predictions


def predict_pixels_plain(
    queries: Tensor,
    bank_features: Tensor | NDArray[np.floating],
    bank_labels: Tensor | NDArray[np.uint8],
    *,
    ks: Sequence[int],
    distance: Distance,
    key_chunk: int = KEY_CHUNK,
    query_chunk: int = QUERY_CHUNK,
    dtype: torch.dtype = torch.float32,
) -> dict[int, Tensor]:
    """The same as it would be written on paper: all distances of a chunk, its nearest, their labels, their mode.

    The order of patches that are equally near up to rounding is not defined here: it depends on the matrix product. In
    float64, which this form accepts too, such cases are as good as none.
    """
    check_votes(bank_features, bank_labels, ks)
    work = torch.float32 if dtype == torch.bfloat16 else dtype
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    for ours in queries.to(dtype).to(work).split(query_chunk):
        found_distances, found_labels = [], []
        for start in range(0, len(bank_features), key_chunk):
            keys = rows(bank_features, start, start + key_chunk).to(ours.device).to(dtype).to(work)
            if distance == "cosine":
                distances = 1 - F.normalize(ours, dim=1) @ F.normalize(keys, dim=1).T  # [m, n]
            else:
                distances = ours.square().sum(1)[:, None] + keys.square().sum(1) - 2 * ours @ keys.T
            nearest_distances, indices = distances.topk(min(max(ks), len(keys)), dim=1, largest=False)
            found_distances.append(nearest_distances)
            found_labels.append(_labels_of(bank_labels, indices + start).to(ours.device))
        order = torch.cat(found_distances, dim=1).topk(max(ks), dim=1, largest=False).indices  # [m, k]
        labels = torch.cat(found_labels, dim=1)  # [m, candidates, p²]
        labels = labels.gather(1, order[:, :, None].expand(-1, -1, labels.shape[2]))
        for k in ks:
            predictions[k].append(labels[:, :k].mode(dim=1).values.cpu())
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def pixel_modes(labels: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """The most frequent label among the first k patches, pixel by pixel, ties to the smallest.

    Every pair of patches is compared once for all k: with 30 of them a third of the work of sorting each pixel's labels
    for each k, and no table of classes.

    Args:
        labels: [M, K, p²] uint8, nearest patch first.
        ks: from 1 to K, at most `MAX_K`.

    Returns:
        [M, p²] uint8 by k.
    """
    count, deepest, side = labels.shape
    by_patch = labels.transpose(0, 1).reshape(deepest, count * side)
    modes = {k: torch.empty(count * side, dtype=torch.uint8, device=labels.device) for k in ks}
    for start in range(0, count * side, MODE_PIXELS):
        part = by_patch[:, start : start + MODE_PIXELS].contiguous()  # [K, pixels]
        votes = torch.zeros_like(part)  # for the label that each patch has, among the first k
        same = torch.empty_like(part, dtype=torch.bool)
        before = 0
        for k in sorted(set(ks)):
            for voter in range(k):
                # earlier patches have voted for each other already
                new = slice(0 if voter >= before else before, k)
                torch.eq(part[new], part[voter], out=same[new])
                votes[new] += same[new].view(torch.uint8)
            before = k
            # votes · 256 − label: the largest has most votes, then the smallest label
            best = (votes[:k].to(torch.int16) << 8).sub_(part[:k]).amax(dim=0)
            modes[k][start : start + MODE_PIXELS] = best.neg_().bitwise_and_(255).to(torch.uint8)
    return {k: modes[k].view(count, side) for k in ks}


def check_votes(
    bank_features: Tensor | NDArray[np.floating], bank_labels: Tensor | NDArray[np.uint8], ks: Sequence[int]
) -> None:
    """Refuse what cannot be voted on.

    Raises:
        CrispError: as `predict_pixels_grid` says.
    """
    if not ks or min(ks) < 1 or max(ks) > MAX_K:
        raise CrispError(f"k={tuple(ks)}: needs numbers from 1 to {MAX_K}")
    check_search(bank_features, max(ks))
    if bank_labels.ndim != 2 or len(bank_labels) != len(bank_features):
        raise CrispError(
            f"labels of shape {tuple(bank_labels.shape)}: the {len(bank_features)} patches of the bank need one row of "
            f"pixel labels each"
        )
    if bank_labels.dtype not in (torch.uint8, np.uint8):
        raise CrispError(f"labels of type {bank_labels.dtype}: give uint8, with ids from 0 to 255")


def _labels_of(bank_labels: Tensor | NDArray[np.uint8], patches: Tensor) -> Tensor:
    """[..., p²] uint8 of patches given by number, where the labels are."""
    if isinstance(bank_labels, Tensor):
        return bank_labels[patches.to(bank_labels.device)]
    return torch.from_numpy(bank_labels[patches.cpu().numpy()])
