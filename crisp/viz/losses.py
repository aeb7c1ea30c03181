"""The losses of a run as curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.metrics import read_metrics
from crisp.viz.figure import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Key of a line of metrics.jsonl, and what it is called in the picture.
CURVES = {"loss": "total", "loss_cls": "[CLS]", "loss_patch": "patch", "loss_region": "region"}
_COLOURS = {"loss": "#222222", "loss_cls": "#0072b2", "loss_patch": "#d55e00", "loss_region": "#009e73"}

# Share of a run's lines that the smooth curve averages over.
_WINDOW = 0.1


def draw_losses(metrics: Path, target: Path) -> Path:
    """Write a PNG of the total loss and its three terms against the step: every line thin, their running mean bold.

    Each has its own panel and scale. A term that is 0 throughout (the region loss of an iBOT run) is left out.

    Args:
        metrics: a run's metrics.jsonl.
        target: where the PNG goes.

    Returns:
        `target`.

    Raises:
        CrispError: no such file, nothing logged yet, or matplotlib is missing.
    """
    if not metrics.is_file():
        raise CrispError(f"{metrics}: no such file; give the metrics.jsonl of a run")
    lines = read_metrics(metrics)
    if not lines:
        raise CrispError(f"{metrics}: no line yet; let the run log some steps first")
    steps = np.array([line["step"] for line in lines])
    curves = {key: np.array([line[key] for line in lines], np.float64) for key in CURVES}
    shown = [key for key, values in curves.items() if key == "loss" or values.any()]
    rows = -(-len(shown) // 2)
    figure = new_figure(9.2, 2.7 * rows + 0.3)
    panels = figure.subplots(rows, 2, squeeze=False, sharex=True).flat
    window = max(1, round(len(lines) * _WINDOW))
    figure.suptitle(f"Losses (thin: as logged; bold: mean of {window} logged lines)", fontsize=10)
    for panel, key in zip(panels, shown, strict=False):
        _draw_curve(panel, steps, curves[key], key, window)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel in panels[-2:]:
        panel.set_xlabel("step")
    return save_png(figure, target)


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the `window` values around each, of those there are at the ends. [T] → [T]."""
    box = np.ones(window)
    start = (window - 1) // 2
    middle = slice(start, start + len(values))
    return np.convolve(values, box)[middle] / np.convolve(np.ones_like(values), box)[middle]


def _draw_curve(panel: Axes, steps: NDArray[np.int64], values: NDArray[np.float64], key: str, window: int) -> None:
    panel.plot(steps, values, color=_COLOURS[key], linewidth=0.7, alpha=0.45)
    panel.plot(steps, running_mean(values, window), color=_COLOURS[key], linewidth=2)
    panel.set_title(CURVES[key], fontsize=10, loc="left")
    panel.grid(color="0.9", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.02)
