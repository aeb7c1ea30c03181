"""A table whose rows are numbers, as curves: Figure 6 of the paper, for M and L too."""

from pathlib import Path

from crisp.ablate.paper import DEFAULTS, FIGURES, PARAMETERS
from crisp.ablate.table import AblationTable
from crisp.viz.figure import new_figure, save_png

CURVES = ("layers", "threshold", "blocks")
"""Tables that are drawn: their rows are numbers"""

_OURS, _PAPER = "#0072b2", "#d55e00"
_COLUMNS = 3


def draw_curves(table: AblationTable, target: Path) -> Path | None:
    """Write a PNG with a panel for each column that has a figure of ours: ours as a line, the paper's as open circles.

    The paper's default is a dotted line.

    Returns:
        `target`; None where the rows are no numbers, or there is nothing to draw.

    Raises:
        CrispError: matplotlib is missing.
    """
    columns = [name for name in table.columns if any(name in row.ours for row in table.rows)]
    if table.table not in CURVES or not columns:
        return None
    high = -(-len(columns) // _COLUMNS)
    wide = min(len(columns), _COLUMNS)
    figure = new_figure(3.4 * wide, 2.8 * high + 0.4)
    figure.suptitle(f"{table.title}, scale {table.scale}", fontsize=10)
    panels = figure.subplots(high, wide, squeeze=False).flat
    for panel, name in zip(panels, columns, strict=False):
        ours = sorted((float(row.name), row.ours[name]) for row in table.rows if name in row.ours)
        panel.plot(*zip(*ours, strict=True), "o-", color=_OURS, markersize=4, label="ours")
        theirs = sorted(
            (float(row), figures[name].value)
            for row, figures in FIGURES.get(table.table, {}).items()
            if name in figures
        )
        if theirs:
            panel.plot(
                *zip(*theirs, strict=True), "o--", color=_PAPER, markersize=5, markerfacecolor="none", label="paper"
            )
            panel.legend(fontsize=7)
        panel.axvline(float(DEFAULTS[table.table]), color="0.6", linestyle=":", linewidth=1)
        panel.set_title(f"{name} (%)", fontsize=9)
        panel.set_xlabel(PARAMETERS[table.table], fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in list(panels)[len(columns) :]:
        panel.set_axis_off()
    return save_png(figure, target)
