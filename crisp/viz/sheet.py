"""A page of images: rows of equal height, groups of columns under heads, everything placed in inches.

Matplotlib's own layouts leave wide gaps between images of different sizes, and shrink them for their titles.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.viz.figure import PAGE_WIDTH_IN, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Image = NDArray[np.uint8]
"""[H, W, 3]"""

_GAP_IN, _GROUP_GAP_IN, _MARGIN_IN = 0.04, 0.12, 0.03
_HEAD_PT, _LABEL_PT = 8.0, 7.0
_LINE_IN = 1.25 / 72  # per point of the letters
_LETTER_IN = 0.57 / 72  # likewise, of DejaVu Sans
_LINE = 0.025  # between the maps of a mosaic, in their side
_UNIT_IN = 2.2  # at most; with few columns the page is narrower
_HIGHEST_IN = 200.0  # matplotlib draws up to 2^16 pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Columns under one head: what a model has to show."""

    head: str
    units: tuple[float, ...] = (1.0,)
    """Widths of its columns; a panel of width 1 is as high as the row's aspect says"""
    labels: tuple[str, ...] = ()
    """Of its columns, below the head"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """The figure, and its empty panels."""

    figure: Figure
    panels: list[list[list[Axes]]]
    """By row, group and column"""


def new_sheet(
    groups: Sequence[Group], aspects: Sequence[float], *, width_in: float = PAGE_WIDTH_IN, captions: bool = False
) -> Sheet:
    """Empty panels without axes.

    Args:
        groups: from left to right.
        aspects: height over width of each row's panels of one unit.
        width_in: of the page, at most.
        captions: leave room for a line above each panel (`caption`).

    Raises:
        CrispError: matplotlib is missing, or so many columns or rows that nothing would be seen.
    """
    columns = [unit for group in groups for unit in group.units]
    gaps = _GAP_IN * (len(columns) - len(groups)) + _GROUP_GAP_IN * (len(groups) - 1)
    unit_in = min(_UNIT_IN, (width_in - 2 * _MARGIN_IN - gaps) / sum(columns))
    width_in = unit_in * sum(columns) + 2 * _MARGIN_IN + gaps
    if unit_in < 0.2:
        raise CrispError(
            f"width_in={width_in:g}: {len(columns)} columns would be under 0.2 inches wide; "
            f"give fewer weights or a larger --width-in"
        )
    group_widths = [sum(g.units) * unit_in + _GAP_IN * (len(g.units) - 1) for g in groups]
    heads = [fit_lines(g.head, width, _HEAD_PT) for g, width in zip(groups, group_widths, strict=True)]
    head_in = max((text.count("\n") + 1 for text in heads if text), default=0) * _HEAD_PT * _LINE_IN
    label_in = _LABEL_PT * _LINE_IN if any(any(g.labels) for g in groups) else 0.0
    caption_in = _LABEL_PT * _LINE_IN if captions else 0.0
    heights = [unit_in * aspect for aspect in aspects]
    height_in = 2 * _MARGIN_IN + head_in + label_in + sum(heights) + caption_in * len(heights)
    height_in += _GAP_IN * (len(heights) - 1)
    if height_in > _HIGHEST_IN:
        raise CrispError(f"{len(heights)} rows would be {height_in:.0f} inches high; draw fewer images with --count")

    figure = new_figure(width_in, height_in, layout=None)
    panels: list[list[list[Axes]]] = [[[] for _ in groups] for _ in heights]
    left = _MARGIN_IN
    for number, (group, head) in enumerate(zip(groups, heads, strict=True)):
        middle = (left + group_widths[number] / 2) / width_in
        top = height_in - _MARGIN_IN
        figure.text(middle, (top - head_in) / height_in, head, fontsize=_HEAD_PT, ha="center", va="bottom",
                    linespacing=1.1, parse_math=False)  # fmt: skip
        for column, unit in enumerate(group.units):
            label = group.labels[column] if group.labels else ""
            figure.text((left + unit * unit_in / 2) / width_in, (top - head_in - label_in) / height_in, label,
                        fontsize=_LABEL_PT, ha="center", va="bottom", parse_math=False)  # fmt: skip
            below = top - head_in - label_in
            for row, high in enumerate(heights):
                below -= caption_in + high
                place = (left / width_in, below / height_in, unit * unit_in / width_in, high / height_in)
                axes = figure.add_axes(place)
                axes.set_axis_off()
                panels[row][number].append(axes)
                below -= _GAP_IN
            left += unit * unit_in + _GAP_IN
        left += _GROUP_GAP_IN - _GAP_IN
    return Sheet(figure=figure, panels=panels)


def fit_lines(text: str, width_in: float, size_pt: float) -> str:
    """The text in lines that fit a width, three at most."""
    letters = max(6, int(width_in / (size_pt * _LETTER_IN)))
    lines = textwrap.wrap(text, letters, max_lines=3, placeholder=" …")
    return "\n".join(lines)


def show(panel: Axes, image: Image, *, smooth: bool = False) -> None:
    """An image over a whole panel; patches stay sharp unless it is a photograph (`smooth`)."""
    height, width = image.shape[:2]
    panel.imshow(
        image, extent=(0, width, height, 0), aspect="auto", interpolation="antialiased" if smooth else "nearest"
    )
    panel.set(xlim=(0, width), ylim=(height, 0))


def caption(panel: Axes, text: str, *, colour: str = "black") -> None:
    """A line above a panel."""
    panel.set_title(text, fontsize=_LABEL_PT, pad=1.5, color=colour, parse_math=False)


def mosaic_shape(count: int, *, in_a_row: bool) -> tuple[int, int]:
    """Rows and columns of so many maps: beside each other, or about as many below."""
    rows = 1 if in_a_row else max(1, round(math.sqrt(count)))
    return rows, -(-count // rows)


def mosaic_units(shape: tuple[int, int]) -> float:
    """Width of a mosaic's panel whose maps, with the lines between them, keep their aspect."""
    rows, columns = shape
    return (columns * (1 + _LINE) - _LINE) / (rows * (1 + _LINE) - _LINE)


def mosaic(maps: Sequence[Image], shape: tuple[int, int]) -> Image:
    """Maps of one size, row by row, with white between them, as one image [H, W, 3].

    Args:
        maps: [h, w, 3] each; places that are left over stay white.
        shape: rows and columns.
    """
    rows, columns = shape
    factor = max(1, 240 // max(maps[0].shape[:2]))  # enlarged, so that the lines between may be thin
    tiles = [np.repeat(np.repeat(tile, factor, axis=0), factor, axis=1) for tile in maps]
    high, wide = tiles[0].shape[:2]
    line = max(1, round(_LINE * max(high, wide)))
    whole = np.full((rows * (high + line) - line, columns * (wide + line) - line, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        y, x = number // columns * (high + line), number % columns * (wide + line)
        whole[y : y + high, x : x + wide] = tile
    return whole


def coloured(values: NDArray[np.floating], colours: str) -> Image:
    """Values [h, w] in [0, 1] as a map [h, w, 3] in a colour map of matplotlib's."""
    from matplotlib import colormaps

    return (colormaps[colours](values)[..., :3] * 255).round().astype(np.uint8)
