"""How far an evaluation is: a bar on a terminal, a plain line now and then in a log file."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crisp.progress import describe_time

log = logging.getLogger(__name__)

LINE_EVERY_S = 60.0
"""Where there is no bar, a line is logged so often"""


@contextmanager
def bar(title: str, total: int, *, silent: bool = False) -> Iterator[Callable[[int], None]]:
    """Show the progress of some work; on a terminal of 80 columns, too, where the title is cut.

    Args:
        title: what is done.
        total: steps of it.
        silent: show nothing; for ranks that don't print.

    Yields:
        A function to call with the number of further steps that are done.
    """
    console = Console(stderr=True)
    if silent:
        yield lambda steps: None
    elif console.is_terminal and not console.is_dumb_terminal:
        with _animated(console, title, total) as advance:
            yield advance
    else:
        yield _Lines(title, total)


@contextmanager
def _animated(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    width = max(20, console.width // 2)
    shown = title if len(title) <= width else title[: width - 1] + "…"
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, refresh_per_second=4)
    stream = sys.stderr
    with progress:
        # sys.stderr is rich's now, which prints above the bar; handlers made before hold the bare one.
        moved = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream
        ]
        for handler in moved:
            handler.setStream(sys.stderr)
        task = progress.add_task(shown, total=total)
        try:
            yield lambda steps: progress.advance(task, steps)
        finally:
            for handler in moved:
                handler.setStream(stream)


class _Lines:
    """The bar of a log file."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._began_s = self._logged_s = time.monotonic()

    def __call__(self, steps: int) -> None:
        self._done = min(self._total, self._done + steps)
        now_s = time.monotonic()
        if self._done == self._total or now_s - self._logged_s >= LINE_EVERY_S:
            self._logged_s = now_s
            took_s = now_s - self._began_s
            left = describe_time(took_s / max(1, self._done) * (self._total - self._done))
            log.info(
                "%s: %d/%d  %s, %s left", self._title, self._done, self._total, describe_time(took_s), left
            )  # fmt: skip
