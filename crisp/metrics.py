"""What a run writes while it goes on: metrics.jsonl and TensorBoard events."""

import json
from pathlib import Path
from typing import Any, Protocol

from crisp.runs import METRICS_FILE


class Sink(Protocol):
    """Somewhere else that a run's values go, too."""

    def write(self, values: dict[str, Any]) -> None:
        """`values` holds step and numbers."""

    def close(self) -> None:
        """Flush."""


class MetricsWriter:
    """Appends to RUN/metrics.jsonl, to TensorBoard events in RUN/tensorboard, and to a further sink if there is one.

    Opened by a resumed run, it first drops the lines after the checkpoint's step, which will be written again.
    """

    def __init__(self, run: Path, *, from_step: int, sink: Sink | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        path = run / METRICS_FILE
        drop_later_lines(path, from_step)
        self._file = path.open("a")
        self._sink = sink
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """One line; `values` holds step and numbers."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self.show(values)

    def show(self, values: dict[str, Any]) -> None:
        """Values that have a file of their own: to TensorBoard and the sink alone."""
        for name, value in values.items():
            if name != "step":
                self._events.add_scalar(name, value, values["step"])
        if self._sink:
            self._sink.write(values)

    def close(self) -> None:
        """Flush all."""
        self._file.close()
        self._events.close()
        if self._sink:
            self._sink.close()


def drop_later_lines(path: Path, step: int) -> None:
    """Leave the whole lines up to a step in a file of lines like metrics.jsonl; later ones will come again."""
    if path.exists():
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        replacement = path.with_suffix(".partial")
        replacement.write_text("".join(kept))
        replacement.replace(path)


def _whole_lines(path: Path) -> list[str]:
    """The lines that were written to their end: a killed process may leave half of one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl."""
    return [json.loads(line) for line in _whole_lines(path)]
