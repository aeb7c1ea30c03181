"""What ranks share: errors, and rows that each makes a part of."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from crisp.distributed import World
from crisp.evals.running import together

_T = TypeVar("_T")


def agreed(work: Callable[[], _T]) -> _T:
    """This rank's value of what all ranks do; an error of one of them is raised on all. Collective.

    For values that are too large to send, unlike `crisp.evals.running.together`.
    """
    held: list[_T] = []
    together(lambda: held.append(work()))
    return held[0]


def share_of(count: int, world: World) -> slice:
    """The rows of this rank among `count`: contiguous, in the order of ranks, sizes that differ by at most one."""
    return slice(count * world.rank // world.size, count * (world.rank + 1) // world.size)


def gather_rows(mine: Tensor, count: int, world: World) -> Tensor:
    """All ranks' rows. Collective.

    Args:
        mine: [m, F], the rows `share_of(count, world)`.
        count: of all rows.
        world: this rank's.

    Returns:
        [count, F] on the device of `mine`.
    """
    if world.size == 1:
        return mine
    longest = -(-count // world.size)
    padded = mine.new_zeros(longest, *mine.shape[1:])  # a gather wants the same number from each
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    lengths = [count * (rank + 1) // world.size - count * rank // world.size for rank in range(world.size)]
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
