"""Weighted k-nearest-neighbour classification of frozen features (the protocol of DINO and iBOT on ImageNet)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from crisp.errors import CrispError

Rows = Tensor | NDArray[np.float32]
"""[N, D]; an array may be a memory map larger than memory"""

BANK_CHUNK = 65536
"""Training features on the device at a time"""


def knn_accuracy(
    train_features: Rows,
    train_labels: Tensor,
    test_features: Rows,
    test_labels: Tensor,
    *,
    k: Sequence[int] = (10, 20, 100, 200),
    classes: int,
    temperature: float = 0.07,
    chunk: int = 256,
    bank_chunk: int = BANK_CHUNK,
    device: torch.device | None = None,
) -> dict[int, float]:
    """Share of test features whose class is that with most votes among the k nearest training features.

    Features are l2-normalised; a neighbour votes for its class with exp(cos / temperature). Equal votes go to the
    smaller label; which of several equally near features is the k-th is not defined. All k come from one search.

    Args:
        train_features: [N, D], any floating type; compared in float32.
        train_labels: [N] int64 in [0, classes).
        test_features: [M, D].
        test_labels: [M] int64.
        k: numbers of neighbours.
        classes: number of classes C.
        temperature: of the votes.
        chunk: test features compared at a time.
        bank_chunk: training features compared at a time.
        device: where they are compared; the CPU if not given.

    Returns:
        Accuracy in [0, 1] by k.

    Raises:
        CrispError: a k outside [1, N], no test features, or features that are not finite.
    """
    if not len(test_features):
        raise CrispError("no test images: k-NN has nothing to classify; give a test set")
    hits = knn_hits(
        train_features, train_labels, test_features, test_labels, k=k, classes=classes, temperature=temperature,
        chunk=chunk, bank_chunk=bank_chunk, device=device,
    )  # fmt: skip
    return {count: right / len(test_features) for count, right in hits.items()}


@torch.no_grad()
def knn_hits(
    train_features: Rows,
    train_labels: Tensor,
    test_features: Rows,
    test_labels: Tensor,
    *,
    k: Sequence[int],
    classes: int,
    temperature: float,
    chunk: int = 256,
    bank_chunk: int = BANK_CHUNK,
    device: torch.device | None = None,
) -> dict[int, int]:
    """How many test features `knn_accuracy` classifies right, by k; there may be none. The same arguments."""
    if not k or min(k) < 1 or max(k) > len(train_features):
        raise CrispError(f"k={tuple(k)}: needs numbers from 1 to the {len(train_features)} training images")
    cosines, neighbours = nearest(
        train_features, test_features, k=max(k), chunk=chunk, bank_chunk=bank_chunk, device=device
    )
    # On the CPU: sums by index have no fixed order on a GPU, and equal votes must go the same way in every run.
    weights, votes_for = (cosines.cpu().double() / temperature).exp(), train_labels.cpu()[neighbours.cpu()]
    right = dict.fromkeys(k, 0)
    for start in range(0, len(weights), chunk):
        rows = slice(start, start + chunk)
        for count in right:
            votes = torch.zeros(len(weights[rows]), classes, dtype=torch.float64)
            votes.scatter_add_(1, votes_for[rows, :count], weights[rows, :count])
            right[count] += int((votes.argmax(dim=1) == test_labels[rows].cpu()).sum())
    return right


@torch.no_grad()
def nearest(
    train_features: Rows,
    test_features: Rows,
    *,
    k: int,
    chunk: int = 256,
    bank_chunk: int = BANK_CHUNK,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The k training features of largest cosine to each test feature, nearest first.

    The bank passes over the device once, in chunks; each chunk's best are merged with the best so far. Memory on the
    device: the test features, `bank_chunk` · D, `chunk` · `bank_chunk` cosines, and 12 bytes · M · k.

    Args:
        train_features: [N, D], N ≥ k.
        test_features: [M, D].
        k: neighbours.
        chunk: test features compared at a time.
        bank_chunk: training features compared at a time.
        device: where.

    Returns:
        [M, k] float32 cosines, and [M, k] int64 rows of `train_features`, on the device.

    Raises:
        CrispError: features that are not finite.
    """
    device = device or torch.device("cpu")
    queries = torch.cat([part for _, part in _unit_rows(test_features, bank_chunk, device, "test")])  # [M, D]
    best = torch.full((len(queries), k), -torch.inf, device=device)
    best_rows = torch.zeros((len(queries), k), dtype=torch.int64, device=device)
    for first, keys in _unit_rows(train_features, bank_chunk, device, "training"):
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            found, where = (queries[rows] @ keys.T).topk(min(k, len(keys)), dim=1)
            best[rows], order = torch.cat([best[rows], found], dim=1).topk(k, dim=1)
            best_rows[rows] = torch.cat([best_rows[rows], where + first], dim=1).gather(1, order)
    return best, best_rows


def _unit_rows(features: Rows, rows: int, device: torch.device, name: str) -> Iterator[tuple[int, Tensor]]:
    """First row and l2-normalised float32 rows of each chunk. An error tells all that are not finite."""
    bad = 0
    for start in range(0, max(1, len(features)), rows):
        part = features[start : start + rows]
        tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))  # a copy: maps are read-only
        tensor = tensor.to(device, torch.float32, non_blocking=True)
        bad += int((~tensor.isfinite()).any(dim=1).sum())
        yield start, F.normalize(tensor, dim=1)
    if bad:
        raise CrispError(
            f"{bad} of {len(features)} {name} features are not finite, so the backbone has diverged; "
            f"evaluate an earlier checkpoint"
        )
