"""One process, or several under torchrun: rank, world, device, what ranks tell each other, and clean shutdown."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from crisp.errors import CrispError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Where this process stands."""

    rank: int
    size: int
    local_rank: int
    nodes: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one that writes and prints."""
        return self.rank == 0


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device for `auto`, `cuda` or `cpu`.

    Raises:
        CrispError: a GPU asked for where there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise CrispError(
            "device=cuda: no GPU is visible to PyTorch; use --device cpu, or check the driver with nvidia-smi"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise CrispError(
            f"local rank {local_rank}: this machine has {torch.cuda.device_count()} GPUs; "
            f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def world_from_environment(device_name: str, *, timeout: timedelta | None = None) -> Iterator[World]:
    """Join the process group that torchrun describes, or be a world of one; `timeout` bounds each collective's wait."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = World(
        rank=int(os.environ.get("RANK", "0")),
        size=size,
        local_rank=local_rank,
        nodes=max(1, size // int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))),
        device=device,
    )
    if size == 1:
        yield world
        return
    # Gloo beside NCCL: what ranks tell each other on the host (files of a checkpoint) needs no GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks (itself in a world of one)."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where no process group is."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_over_ranks(value: T) -> list[T]:
    """Every rank's value in the order of ranks (its own alone in a world of one). Collective, on the host.

    For small plain values: they travel pickled, between processes that trust each other as parts of one run.
    """
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[T | None] = [None] * size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all of them are filled


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor, as a view: a DTensor's shard (perhaps empty), or all of a plain tensor."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
