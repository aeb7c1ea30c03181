"""What every evaluation does around its own work: its world of ranks, and the precision of forward passes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch

from crisp.distributed import World, world_from_environment
from crisp.evals.config import EvalConfig

# The main rank may fit a classifier for hours while the others wait. torchrun ends them all when one fails.
_PATIENCE = timedelta(days=7)


@contextmanager
def evaluation_world(config: EvalConfig) -> Iterator[World]:
    """This process alone, or the ranks that torchrun started.

    Raises:
        CrispError: a GPU asked for where there is none.
    """
    with world_from_environment(config.device, timeout=_PATIENCE) as world:
        yield world


def autocast(config: EvalConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass in the chosen precision."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.precision))
