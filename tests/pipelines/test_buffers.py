"""Memory comes back when the last view of it is gone, and not before."""

import torch

from crisp.pipelines.buffers import BufferPool
from crisp.pipelines.byte_pool import BytePool


def test_bytes_come_back_with_the_last_view() -> None:
    pool = BytePool()
    memory = pool.take(1000)
    assert len(memory) == 1000
    part = memory[10:20].toreadonly()
    memory[10:20] = b"0123456789"
    del memory
    other = pool.take(900)
    other[:] = bytes(900)
    assert bytes(part) == b"0123456789"
    del part
    again = pool.take(1100)  # what was asked for first has room for a quarter more
    again[10:20] = b"abcdefghij"
    assert bytes(other[10:20]) == bytes(10)
    assert len(pool._free) == 0


def test_memory_that_is_too_small_is_let_go() -> None:
    pool = BytePool()
    small = pool.take(10)
    del small
    assert len(pool._free) == 1
    assert len(pool.take(1000)) == 1000
    (kept,) = pool._free
    assert len(kept) >= 1000


def test_tensors_come_back_with_the_last_view() -> None:
    pool = BufferPool()
    tensor = pool.take((4, 8), torch.float32)
    tensor.fill_(3)
    row, address = tensor[1], tensor.data_ptr()
    del tensor
    other = pool.take((4, 8), torch.float32)
    assert other.data_ptr() != address
    assert row.tolist() == [3.0] * 8
    del row
    assert pool.take((4, 8), torch.float32).data_ptr() == address
