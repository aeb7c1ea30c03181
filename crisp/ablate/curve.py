"""A table whose rows are numbers, as curves: Figure 6 of the paper, for M and L too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crisp.ablate.evaluations import RANDOM
from crisp.ablate.paper import DEFAULTS, FIGURES, PARAMETERS
from crisp.ablate.table import AblationTable
from crisp.viz.figure import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = ("layers", "threshold", "blocks")
"""Tables that are drawn: their rows are numbers"""

_OURS, _PAPER = "#0072b2", "#d55e00"
_COLUMNS = 3


def draw_curves(table: AblationTable, target: Path) -> Path | None:
    """Write `curve_figure` as a PNG; returns `target`, or None where there is none."""
    figure = curve_figure(table)
    return None if figure is None else save_png(figure, target)


def curve_figure(table: AblationTable) -> Figure | None:
    """A panel for each column that has a figure of ours: ours as a line, the paper's as open circles.

    A column of random regions is a grey line in the panel of the discovered ones. The method's own choice is dotted.

    Returns:
        None where the rows are no numbers, or there is nothing to draw.

    Raises:
        CrispError: matplotlib is missing.
    """
    measured = [name for name in table.columns if any(name in row.ours for row in table.rows)]
    columns = [name for name in measured if not name.endswith(RANDOM)]
    if table.table not in CURVES or not columns:
        return None
    high, wide = -(-len(columns) // _COLUMNS), min(len(columns), _COLUMNS)
    figure = new_figure(3.4 * wide, 2.8 * high + 0.4)
    figure.suptitle(f"{table.title}, scale {table.scale}", fontsize=10)
    panels = list(figure.subplots(high, wide, squeeze=False).flat)
    for panel, name in zip(panels, columns, strict=False):
        lines = [panel.plot(*_ours(table, name), "o-", color=_OURS, markersize=4, label="ours")]
        if name + RANDOM in measured:
            lines.append(panel.plot(*_ours(table, name + RANDOM), "o-", color="0.6", markersize=3, label="random"))
        if theirs := _papers(table, name):
            lines.append(panel.plot(*theirs, "o--", color=_PAPER, markersize=5, markerfacecolor="none", label="paper"))
        if len(lines) > 1:
            panel.legend(fontsize=7)
        panel.axvline(float(DEFAULTS[table.table]), color="0.6", linestyle=":", linewidth=1)
        panel.set_title(f"{name} (%)", fontsize=9)
        panel.set_xlabel(PARAMETERS[table.table], fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in panels[len(columns) :]:
        panel.set_axis_off()
    return figure


def _ours(table: AblationTable, name: str) -> tuple[list[float], list[float]]:
    """Values of the rows and figures, in order of the values."""
    points = sorted((float(row.name), row.ours[name]) for row in table.rows if name in row.ours)
    return [x for x, _ in points], [y for _, y in points]


def _papers(table: AblationTable, name: str) -> tuple[list[float], list[float]] | None:
    """The paper's, also of rows that were not run."""
    figures = FIGURES.get(table.table, {})
    points = sorted((float(row), figures[row][name].value) for row in figures if name in figures[row])
    return ([x for x, _ in points], [y for _, y in points]) if points else None
