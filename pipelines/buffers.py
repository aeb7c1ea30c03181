"""Large tensors that are used again once nobody holds them."""

import math
import threading
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUMPY_TYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
}


class BufferPool:
    """Lends out tensors and takes their memory back when the last tensor or view that shows it is gone.

    A batch of 64 is 186 MB; touching that afresh costs tens of milliseconds of page faults, and returning it to the
    system and asking again costs them for every batch. Memory is kept for as many buffers as were ever lent at once.
    Thread-safe.

    Args:
        pin_memory: page-locked memory, from which a GPU copies without the host's help.
    """

    def __init__(self, *, pin_memory: bool = False) -> None:
        self._pin_memory = pin_memory
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor, float32 or float16."""
        key = (shape, dtype)
        numpy_type = _NUMPY_TYPES[dtype]
        with self._lock:
            free = self._free.setdefault(key, [])
            memory = free.pop() if free else None
        if memory is None:
            size = math.prod(shape) * numpy_type.itemsize
            if self._pin_memory:
                memory = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
            else:
                memory = np.empty(size, np.uint8)
        # The tensor's storage, and with it every tensor that shares it, holds this array and nothing else does.
        lent = memory.view(numpy_type).reshape(shape)
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)
