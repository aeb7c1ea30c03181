"""A scheduler's wish to stop: SIGTERM or SIGUSR1, heard by any rank, followed by all after the same step."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from crisp.distributed import World

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Whether to stop; made by `interruption`."""

    def __init__(self, world: World) -> None:
        self._several = world.size > 1
        # On the host, so that the answer costs the device no wait.
        self._group: Any = dist.new_group(backend="gloo") if self._several else None
        self._asked = 0
        self._under_way: tuple[Any, torch.Tensor] | None = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        if not self._asked:
            log.info("%s: saving after this step, then leaving", signal.Signals(number).name)
        self._asked = number

    def stop_now(self) -> bool:
        """Called by every rank after every step: whether it was the last. Collective, without a wait.

        With several ranks the answer is that of the step before, which has had a step's time to arrive.
        """
        if not self._several:
            return bool(self._asked)
        previous = self._under_way
        asked = torch.tensor(self._asked)
        self._under_way = dist.all_reduce(asked, group=self._group, async_op=True), asked
        if previous is None:
            return False
        previous[0].wait()
        return bool(previous[1])


@contextmanager
def interruption(world: World) -> Iterator[Interruption]:
    """Hear the signals while this is open. Collective."""
    heard = Interruption(world)
    before = {number: signal.signal(number, heard.hear) for number in SIGNALS}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
