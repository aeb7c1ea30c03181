"""What evaluations have in common around their work: the world of ranks, errors that all share, the precision."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch

from crisp.distributed import World, gather_over_ranks, world_from_environment
from crisp.errors import CrispError
from crisp.evals.config import EvalConfig

_T = TypeVar("_T")

# The main rank may fit a classifier for hours while the others wait. torchrun ends them all when one fails.
_PATIENCE = timedelta(days=7)


@contextmanager
def evaluation_world(config: EvalConfig) -> Iterator[World]:
    """This process alone, or the ranks that torchrun started, of which the main one tells what goes on.

    Raises:
        CrispError: a GPU asked for where there is none.
    """
    with world_from_environment(config.device, timeout=_PATIENCE) as world:
        if not world.is_main:
            logging.getLogger("crisp").setLevel(logging.WARNING)
        yield world


def autocast(config: EvalConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass in the chosen precision."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.precision))


def from_main(world: World, work: Callable[[], _T]) -> _T:
    """What the main rank's work returns, on every rank; its CrispError is raised on every rank."""
    return together(work if world.is_main else lambda: None)[0]  # type: ignore[return-value]


def together(work: Callable[[], _T]) -> list[_T]:
    """Every rank's value; a rank's user error is raised on all of them, so that none waits for one that has left."""
    value: _T | None = None
    problem: str | None = None
    try:
        value = work()
    except CrispError as error:
        problem = str(error)
    told = gather_over_ranks((value, problem))
    for _, text in told:
        if text is not None:
            raise CrispError(text)
    return [value for value, _ in told]  # type: ignore[misc]  # None only beside a problem
