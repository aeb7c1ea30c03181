"""What a run writes while it goes on: metrics.jsonl and TensorBoard events."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to RUN/metrics.jsonl and to TensorBoard events in RUN/tensorboard.

    Opened by a resumed run, it first drops the lines after the checkpoint's step, which will be written again.
    """

    def __init__(self, run: Path, *, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        path = run / METRICS_FILE
        if path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= from_step]
            replacement = path.with_suffix(".partial")
            replacement.write_text("".join(kept))
            replacement.replace(path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """One line; `values` holds step and numbers."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for name, value in values.items():
            if name != "step":
                self._events.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._events.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines that were written to their end: a killed process may leave half of one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl."""
    return [json.loads(line) for line in _whole_lines(path)]
