"""Tables of our figures above the paper's, with the differences: for Markdown and for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crisp.evals.paper import PaperRow

MISSING = "–"
_NAME_WIDTH = 26
_GAP = 2
_DIFFERENCE_WIDTH = len(" (−10.0)")

POINT_NOTE = (
    "Some of the paper's figures lost their decimal point in the text that they were read from; it is put back "
    "(`crisp/evals/paper.py` says which).\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One metric of one evaluation."""

    head: str
    value: float | None
    """Ours, in percent; None where it was not measured"""
    std: float | None = None
    paper: Sequence[PaperRow] = ()
    """The paper's figures for it"""


Cells = tuple[list[str], list[list[str]]]
"""Heads and lines: ours first. Two columns name the model, then come pairs of a figure and a difference."""


def figure(value: float, std: float | None = None) -> str:
    """28.2, or 49.3 ± 0.8."""
    return f"{value:.1f}" if std is None else f"{value:.1f} ± {std:.1f}"


def difference(ours: float, theirs: float) -> str:
    """Ours minus the paper's, signed, both with the one digit that the paper has."""
    value = round(round(ours, 1) - theirs, 1)
    return "±0.0" if value == 0 else f"{value:+.1f}".replace("-", "−")


def compare(name: str, columns: Sequence[Column]) -> Cells:
    """Our line, then one for each of the paper's models in print order.

    Args:
        name: of our model.
        columns: what was measured, or could have been.
    """
    theirs: dict[tuple[str, str], None] = {(row.label, row.arch): None for column in columns for row in column.paper}
    lines = [[name, "", *(cell for column in columns for cell in (_ours(column), ""))]]
    for model in theirs:
        line = list(model)
        for column in columns:
            row = next((row for row in column.paper if (row.label, row.arch) == model), None)
            line.append(MISSING if row is None else f"{row.value:.1f}")
            line.append("" if row is None or column.value is None else difference(column.value, row.value))
        lines.append(line)
    return ["model", "arch", *(cell for column in columns for cell in (column.head, "ours −"))], lines


def _ours(column: Column) -> str:
    return MISSING if column.value is None else figure(column.value, column.std)


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns padded, so that it reads as plain text, too; all but the first two to the right."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (heads, *lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(heads))]
    rule = [("-" * width) if i < 2 else ("-" * (width - 1) + ":") for i, width in enumerate(widths)]
    padded = [
        [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in pairs]
        for pairs in (enumerate(zip(line, widths, strict=True)) for line in (cells[0], rule, *cells[1:]))
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in padded)


def print_comparison(console: Console, name: str, columns: Sequence[Column]) -> None:
    """On a terminal of 80 columns or more: in several tables where one is too wide, differences in brackets."""
    for group in _groups(name, columns, console.width):
        console.print(_terminal_table(compare(name, group)))


def _terminal_table(cells: Cells) -> Table:
    heads, lines = cells
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    table.add_column(heads[0], no_wrap=True, overflow="ellipsis", max_width=_NAME_WIDTH)
    table.add_column(heads[1], no_wrap=True)
    joined = []
    for i in range(2, len(heads), 2):
        # The metric goes below what it is of, so that columns are as wide as their figures.
        table.add_column(Text("\n".join(heads[i].rsplit(" ", 1))), no_wrap=True)
        width = max(len(line[i].partition(" ")[0]) for line in lines)  # without a deviation
        joined.append([_joined(line[i], line[i + 1], width) for line in lines])
    for i, (line, *figures) in enumerate(zip(lines, *joined, strict=True)):
        table.add_row(*map(Text, [*line[:2], *figures]), style="bold" if i == 0 else None)
    return table


def _joined(shown: str, difference: str, width: int) -> str:
    value, space, deviation = shown.partition(" ")
    brackets = f"({difference})".rjust(_DIFFERENCE_WIDTH) if difference else ""
    return value.rjust(width) + space + deviation + brackets


def _groups(name: str, columns: Sequence[Column], width: int) -> Iterator[list[Column]]:
    """The columns in runs that fit beside the models' names."""
    wide = Console(width=10 * width)  # to measure, not to print
    group: list[Column] = []
    for column in columns:
        if group and wide.measure(_terminal_table(compare(name, [*group, column]))).maximum > width:
            yield group
            group = []
        group.append(column)
    if group:
        yield group


def describe(settings: Mapping[str, object]) -> str:
    """`k 20, distance cosine`."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())
