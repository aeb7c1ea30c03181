"""One process, or several under torchrun: rank, world, device and clean shutdown."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from crisp.errors import CrispError


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks (itself in a world of one)."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value
