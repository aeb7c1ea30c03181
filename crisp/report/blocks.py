"""What a section is made of: sentences, tables, charts and pictures, all plain text until the template escapes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from crisp.report.curves import Curve

MOST_ROWS = 200
"""Of a table; what is beyond is counted, not shown"""
MOST_CHARACTERS = 400
"""Of a cell"""
ALL = 1_000_000
"""Columns: however many there are"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A sentence or two."""

    text: str
    kind: Literal["note"] = "note"
    loud: bool = False
    """Something is wrong"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Cells as they are shown."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """Leading columns that stand to the left; the others are figures"""
    folded: bool = False
    """Shown when it is asked for"""
    ours: int = 0
    """Leading rows that are emphasised"""
    kind: Literal["table"] = "table"

    @property
    def shown(self) -> list[list[str]]:
        """The rows, bounded."""
        return [[_bounded(cell) for cell in row] for row in self.rows[:MOST_ROWS]]

    @property
    def left_out(self) -> int:
        """Rows beyond the bound."""
        return max(0, len(self.rows) - MOST_ROWS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A line of a chart."""

    label: str
    run: int
    """Decides the colour"""
    curve: Curve
    dash: int = 0
    """Which dash pattern, where a run has several lines in a chart"""
    faint: bool = False
    """Behind a smoother one"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Lines over the step."""

    title: str
    series: Sequence[Series]
    percent: bool = False
    """Values are shares in [0, 1]"""
    logarithmic: bool = False
    x_label: str = "step"
    legend_note: str = ""
    """What all its lines have in common"""
    kind: Literal["chart"] = "chart"


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image that is part of the page."""

    caption: str
    step: int
    data_uri: str
    width_px: int
    height_px: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Filmstrip:
    """Pictures of one kind and run, of which the slider shows one."""

    title: str
    pictures: Sequence[Picture]
    """By step"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slider:
    """Filmstrips that one slider moves through."""

    moments: Sequence[tuple[int, str]]
    """Step, and what the slider says there"""
    strips: Sequence[Filmstrip]
    kind: Literal["slider"] = "slider"


Block = Note | Table | Chart | Slider


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page that is always there."""

    id: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def _bounded(cell: str) -> str:
    return cell if len(cell) <= MOST_CHARACTERS else cell[: MOST_CHARACTERS - 1] + "…"
