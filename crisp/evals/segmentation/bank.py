"""The patches of train that answer for others: features standardised as they are read, and the labels they carry.

Features stay on disk and come in pieces, so that a bank of ADE20K's size (5.17 M patches) needs no more memory than a
piece; the pixel labels, 256 bytes per patch, are held in memory (1.3 GB).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.evals.segmentation.standardise import Standardiser
from crisp.evals.segmentation.truth import Truth

_ROWS_AT_A_TIME = 65_536


class StandardisedRows:
    """Some patches of a split in order, standardised when they are read. Slices as an array does.

    Args:
        features: [images, n, D] float32, memory mapped.
        rows: [N] int64, numbers of patches, ascending; patch j of image i is i * n + j.
        standardiser: fitted before.
    """

    def __init__(self, features: NDArray[np.float32], rows: NDArray[np.int64], standardiser: Standardiser) -> None:
        self._flat = features.reshape(-1, features.shape[-1])  # a view
        self._rows, self._standardiser = rows, standardiser
        self.shape, self.ndim, self.dtype = (len(rows), features.shape[-1]), 2, np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, piece: slice) -> NDArray[np.float32]:
        """[m, D] of a slice."""
        return self._standardiser.in_place(torch.from_numpy(self._flat[self._rows[piece]])).numpy()

    def whole(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[N, D] on a device, made piece by piece."""
        out = torch.empty(self.shape, dtype=dtype, device=device)
        for start in range(0, len(self), _ROWS_AT_A_TIME):
            out[start : start + _ROWS_AT_A_TIME] = torch.from_numpy(self[start : start + _ROWS_AT_A_TIME])
        return out


class Bank:
    """Every patch of some images whose mode label is not ignored.

    Attributes:
        features: [N, D] float32 when read.
        labels: [N, p*p] uint8, ignored ones of mixed patches included.
        modes: [N] uint8, the patches' labels.
    """

    def __init__(
        self,
        features: NDArray[np.float32],
        truth: Truth,
        images: NDArray[np.int64],
        standardiser: Standardiser,
        ignored: Sequence[int],
    ) -> None:
        rows = kept_rows(truth, images, ignored)
        self.features = StandardisedRows(features, rows, standardiser)
        self.labels = torch.from_numpy(truth.pixels.reshape(-1, truth.pixels.shape[-1])[rows])
        self.modes = torch.from_numpy(truth.modes.reshape(-1)[rows])

    def __len__(self) -> int:
        return len(self.features)


def kept_rows(truth: Truth, images: NDArray[np.int64], ignored: Sequence[int]) -> NDArray[np.int64]:
    """Numbers [N] of the patches of these images whose mode label is not ignored."""
    rows = rows_of(images, truth.modes.shape[1])
    return rows[~np.isin(truth.modes.reshape(-1)[rows], ignored)]


def rows_of(images: NDArray[np.int64], patches: int) -> NDArray[np.int64]:
    """Numbers of all patches of these images."""
    return (images[:, None] * patches + np.arange(patches)).reshape(-1)


MEMORY_SHARE = 0.7
"""Of what is free, that features may take"""


def fits(rows: StandardisedRows, device: torch.device) -> bool:
    """Whether the rows, in float32, can be held on a device and leave room to compute."""
    return 4 * rows.shape[0] * rows.shape[1] <= MEMORY_SHARE * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had there now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as file:
        kilobytes = next(line for line in file if line.startswith("MemAvailable:")).split()[1]
    return 1024 * int(kilobytes)
