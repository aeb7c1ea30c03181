"""A grid that is fixed in the reference, in any view of it (NumPy; pure functions, coordinates of `crisp.geometry`)."""

import string
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crisp.geometry import apply

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class GridLine:
    """A line across the reference."""

    axis: Literal["x", "y"]
    """The coordinate that is the same all along it: x for a vertical line"""
    at_px: float
    """That coordinate, in reference pixels"""


def grid_lines(reference_px: int, *, step_px: int) -> list[GridLine]:
    """Lines every `step_px` from the left and the top, and those of the right and lower border."""
    places = _places(reference_px, step_px)
    return [GridLine(axis=axis, at_px=float(at)) for axis in ("x", "y") for at in places]


def grid_nodes(reference_px: int, *, step_px: int) -> dict[str, tuple[float, float]]:
    """Every second inner crossing as (x, y) by name: the letter of its column and the number of its row, from a0 on."""
    places = _places(reference_px, step_px)
    inner = range(1, len(places) - 1, 2)
    return {_column(i) + str(j): (float(places[i]), float(places[j])) for j in inner for i in inner}


def _column(number: int) -> str:
    """a … z, aa, ab, …"""
    more, letter = divmod(number, 26)
    return (_column(more - 1) if more else "") + string.ascii_lowercase[letter]


def _places(reference_px: int, step_px: int) -> NDArray[np.int64]:
    return np.append(np.arange(0, reference_px, step_px), reference_px)


def map_line(line: GridLine, view_from_reference: Array, *, reference_px: int, view_px: int) -> Array | None:
    """The part of a grid line that a view shows, in view pixels.

    Args:
        line: in the reference, from border to border.
        view_from_reference: [2, 3].
        reference_px: side of the reference.
        view_px: side of the view.

    Returns:
        Its two ends [2, 2] as (x, y); None: the view shows nothing of it.
    """
    ends = [[line.at_px, 0.0], [line.at_px, float(reference_px)]]
    if line.axis == "y":
        ends = [end[::-1] for end in ends]
    return clip_segment(apply(view_from_reference, np.array(ends)), view_px)


def clip_segment(ends: Array, side_px: float) -> Array | None:
    """The part of a segment [2, 2] in the square [0, side] × [0, side]; None if there is none (Liang and Barsky)."""
    start, along = ends[0], ends[1] - ends[0]
    first, last = 0.0, 1.0  # as shares of the segment
    for axis in range(2):
        if along[axis] == 0:
            if not 0 <= start[axis] <= side_px:
                return None
            continue
        enter, leave = sorted(((0 - start[axis]) / along[axis], (side_px - start[axis]) / along[axis]))
        first, last = max(first, enter), min(last, leave)
    if first >= last:
        return None
    return start + np.array([[first], [last]]) * along


def map_nodes(
    nodes: dict[str, tuple[float, float]], view_from_reference: Array, *, view_px: int
) -> dict[str, tuple[float, float]]:
    """The named points of the reference that a view shows, in view pixels."""
    shown = {}
    for name, point in nodes.items():
        x, y = apply(view_from_reference, np.array([point]))[0].tolist()
        if 0 <= x <= view_px and 0 <= y <= view_px:
            shown[name] = (x, y)
    return shown


def map_patch(patch: int, view_from_reference: Array, *, grid: int, patch_px: int) -> Array:
    """The corners [4, 2] of a patch of the reference in view pixels, on the view or off it.

    Args:
        patch: its number, row by row.
        view_from_reference: [2, 3].
        grid: patches along a side of the reference.
        patch_px: side of a patch.
    """
    row, column = divmod(patch, grid)
    corners = np.array([[column, row], [column + 1, row], [column + 1, row + 1], [column, row + 1]], np.float64)
    return apply(view_from_reference, corners * patch_px)
