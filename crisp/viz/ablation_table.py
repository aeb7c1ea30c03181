"""An ablation as a table and as curves: our rows, and the paper's beside them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crisp.errors import CrispError
from crisp.viz.figure import BLUE, ORANGE, PAGE_WIDTH_IN, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANDOM = ", random"
"""What ends the name of a metric of random regions: it is drawn in the panel of the metric without it"""
_GREY = "0.9"
_ROW_IN = 0.2
_HEADER_TOP = -0.8
"""The header has two lines: rows are 1 high, and the first begins at 1"""
_HEADER_LETTERS = 11


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRow:
    """One value of what is changed."""

    value: float | str
    """A number, or a name"""
    scores: Mapping[str, float] = field(default_factory=dict)
    """By metric; what was not measured is left out"""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's, likewise"""
    default: bool = False
    """The method's own choice"""


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationTable:
    """Rows in order."""

    title: str
    parameter: str
    """What is changed: β, M, L, …"""
    rows: tuple[AblationRow, ...]

    @property
    def metrics(self) -> list[str]:
        """In the order in which rows have them."""
        return list(dict.fromkeys(metric for row in self.rows for metric in (*row.scores, *row.paper)))


def read_table(path: Path) -> AblationTable:
    """From JSON: {"title", "parameter", "rows": [{"value", "scores": {metric: x}, "paper": {…}, "default"}, …]}.

    Raises:
        CrispError: no such file, other content, or no score in it.
    """
    try:
        plain: Any = json.loads(path.read_text())
        rows = tuple(AblationRow(**row) for row in plain["rows"])
        table = AblationTable(title=str(plain["title"]), parameter=str(plain["parameter"]), rows=rows)
        numbers = [number for row in rows for scores in (row.scores, row.paper) for number in scores.values()]
    except OSError as error:
        raise CrispError(f"{path}: {error.strerror}; give the table that 'crisp ablate' wrote") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CrispError(f"{path}: not a table of an ablation ({error!r}); see crisp.viz.ablation_table") from error
    if not numbers or not all(isinstance(number, int | float) for number in numbers):
        raise CrispError(f"{path}: {'scores that are no numbers' if numbers else 'no scores'}; run the ablation first")
    return table


def draw_ablation(table: AblationTable, *, width_in: float = PAGE_WIDTH_IN) -> Figure:
    """A panel of curves for each metric, and the table below them with the default's row in grey.

    Ours are blue circles, the paper's orange squares with a dashed line, random regions grey diamonds. Names instead of
    numbers are not joined.

    Raises:
        CrispError: matplotlib is missing.
    """
    metrics = table.metrics
    drawn = [metric for metric in metrics if not metric.endswith(RANDOM)]
    columns = min(4, len(drawn))
    curve_rows = -(-len(drawn) // columns)
    heights = [1.7 * curve_rows, _ROW_IN * (len(table.rows) + 3)]
    figure = new_figure(width_in, sum(heights) + 0.3)
    figure.suptitle(table.title, fontsize=9, parse_math=False)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
    panels = list(above.subplots(curve_rows, columns, squeeze=False).flat)
    for panel, metric in zip(panels, drawn, strict=False):
        _draw_metric(panel, table, metric)
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    _draw_table(below.subplots(), table, metrics)
    return figure


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _draw_metric(panel: Axes, table: AblationTable, metric: str) -> None:
    numeric = all(_is_number(row.value) for row in table.rows)
    places = [float(row.value) if numeric else i for i, row in enumerate(table.rows)]
    series = (
        ("paper", ORANGE, "s", "--", [row.paper.get(metric) for row in table.rows]),
        ("random", "0.55", "d", "-", [row.scores.get(metric + RANDOM) for row in table.rows]),
        ("ours", BLUE, "o", "-", [row.scores.get(metric) for row in table.rows]),
    )
    labels = 0
    for label, colour, marker, line, values in series:
        points = sorted((x, y) for x, y in zip(places, values, strict=True) if y is not None)
        if points:
            labels += 1
            x, y = zip(*points, strict=True)
            panel.plot(x, y, color=colour, marker=marker, markersize=3.5, linewidth=1.2 if numeric else 0,
                       linestyle=line, label=label)  # fmt: skip
    for place, row in zip(places, table.rows, strict=True):
        if row.default:
            panel.axvline(place, color="0.8", linewidth=4, zorder=0)
    if not numeric:
        names = [str(row.value).replace("_", " ") for row in table.rows]
        panel.set_xticks(places, names, rotation=35, ha="right", rotation_mode="anchor", parse_math=False)
        panel.margins(x=0.15)
    panel.set_title(metric, fontsize=8, parse_math=False)
    panel.set_xlabel(table.parameter, fontsize=8, parse_math=False)
    panel.tick_params(labelsize=7)
    panel.grid(color=_GREY, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    if labels > 1:
        panel.legend(fontsize=6.5, frameon=False)


def _draw_table(panel: Axes, table: AblationTable, metrics: Sequence[str]) -> None:
    """Text between three rules, as papers set tables: ours, and the paper's in brackets."""
    lines = len(table.rows) + 1
    panel.set(xlim=(0, len(metrics) + 1), ylim=(lines, _HEADER_TOP))
    panel.set_axis_off()
    with_paper = any(row.paper for row in table.rows)
    symbol = table.parameter.split(":")[0]
    cells = [[symbol, *(textwrap.fill(metric, _HEADER_LETTERS, break_long_words=False) for metric in metrics)]]
    for number, row in enumerate(table.rows):
        if row.default:
            panel.axhspan(number + 1, number + 2, color=_GREY, linewidth=0)
        cells.append([_text(row.value), *(_cell(row, metric, with_paper) for metric in metrics)])
    for y, line in enumerate(cells):
        for x, text in enumerate(line):
            middle = y + 0.5 if y else (1 + _HEADER_TOP) / 2
            panel.text(x + 0.5 if x else 0.05, middle, text, fontsize=7.5, ha="center" if x else "left",
                       va="center", parse_math=False)  # fmt: skip
    for rule_y, thick in ((_HEADER_TOP, 1.2), (1, 0.6), (lines, 1.2)):
        panel.axhline(rule_y, color="black", linewidth=thick, clip_on=False)
    if with_paper:
        panel.set_title("ours (paper)", fontsize=7, loc="right", pad=2)


def _text(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, int | float) else value.replace("_", " ")


def _cell(row: AblationRow, metric: str, with_paper: bool) -> str:
    ours = f"{row.scores[metric]:.1f}" if metric in row.scores else "–"
    if not with_paper:
        return ours
    return f"{ours} ({row.paper[metric]:.1f})" if metric in row.paper else f"{ours} (–)"
