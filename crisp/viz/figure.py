"""A matplotlib figure without pyplot: no global state, no display, and an error that says what to install."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crisp.errors import CrispError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure on the Agg canvas, `width_in` × `height_in` inches.

    Raises:
        CrispError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CrispError(f"pictures need matplotlib ({error}); pip install 'crisp-ssl[demo]'") from error
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, target: Path, *, dpi: int = 120) -> Path:
    """Write the figure, making the folder where needed; returns `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=dpi)
    return target
