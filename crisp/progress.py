"""What a run shows while it goes on: a bar on a terminal, plain lines in a log file."""

import logging
import sys
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def describe(values: dict[str, Any]) -> str:
    """One line of figures, under 80 columns with the bar above it."""
    return (
        f"epoch {values['epoch']:>3}  loss {values['loss']:6.3f} = cls {values['loss_cls']:.3f} "
        f"+ patch {values['loss_patch']:.3f} + region {values['loss_region']:.3f}"
    )


def describe_rates(values: dict[str, Any]) -> str:
    """The second line: how fast, and how much of the step was waiting for data."""
    return (
        f"{values['images_per_s']:7.1f} img/s  data wait {values['data_wait_share']:4.0%}  "
        f"regions valid {values['region_valid_frac']:4.0%}  lr {values['learning_rate']:.2e}"
    )


def describe_time(seconds: float) -> str:
    """3h05m or 4m10s: for a log file, which has no bar."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s"


class TrainProgress:
    """Shows the figures of each logged step; a silent one for ranks that don't print.

    A bar on a terminal, redrawn twice a second, so that a slow line to it keeps up; log lines go above it. Plain lines
    in a file, and on a terminal that cannot move its cursor.
    """

    def __init__(self, *, steps: int, first_step: int, silent: bool) -> None:
        self._steps, self._silent = steps, silent
        self._console = Console(stderr=True, quiet=silent)
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeRemainingColumn(), expand=True
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=first_step)
        self._figures = Text()
        self._live = Live(Group(self._bar, self._figures), console=self._console, refresh_per_second=2)
        self._animated = self._console.is_terminal and not self._console.is_dumb_terminal and not silent
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> "TrainProgress":
        if self._animated:
            stream = sys.stderr
            self._live.start()  # from here on, sys.stderr is rich's, which prints above the bar
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    self._redirected.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._live.stop()

    def advance(self, step: int) -> None:
        """A step is done."""
        self._bar.update(self._task, completed=step)

    def show(self, values: dict[str, Any]) -> None:
        """Figures of a logged step."""
        if self._animated:
            self._figures.plain = f"{describe(values)}\n{describe_rates(values)}"
        elif not self._silent:
            width = len(str(self._steps))
            left = describe_time((self._steps - values["step"]) * values["step_s"])
            place = f"step {values['step']:>{width}}/{self._steps}"
            line = f"{place}  {describe(values)}  {describe_rates(values)}  {left} left"
            self._console.print(line, soft_wrap=True, highlight=False)
