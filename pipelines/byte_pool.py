"""Bytes that are used again once nobody holds them; no torch here, as in all that reads ahead of DALI."""

import threading
import weakref

import numpy as np
from numpy.typing import NDArray


class BytePool:
    """Lends out bytes and takes them back when the last view of them is gone: fresh memory costs a fault per 4 kB.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> memoryview:
        """Writable, uninitialised."""
        with self._lock:
            memory = self._free.pop() if self._free else None
        if memory is None or len(memory) < size:
            memory = np.empty(size + size // 4, np.uint8)  # sizes vary from batch to batch
        lent = memory[:size]
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return memoryview(lent)  # type: ignore[arg-type]  # NumPy arrays are buffers, which Python 3.11 cannot say
