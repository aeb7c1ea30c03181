"""A matplotlib figure without pyplot: no global state, no display, and errors that say what to do."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crisp.errors import CrispError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = {".png": "png", ".pdf": "pdf"}
PAGE_WIDTH_IN = 7.0
"""Of a page's text"""
DPI = 300

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072b2", "#e69f00", "#009e73"
VERMILION, PURPLE, SKY = "#d55e00", "#cc79a7", "#56b4e9"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)


def new_figure(width_in: float, height_in: float, *, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure on the Agg canvas, `width_in` × `height_in` inches.

    Raises:
        CrispError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CrispError(f"pictures need matplotlib ({error}); pip install 'crisp-ssl[demo]'") from error
    figure = Figure(figsize=(width_in, height_in), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def check_out(out: Path) -> None:
    """That a picture can be written under this name; nothing is written yet.

    Raises:
        CrispError: neither .png nor .pdf, a folder of that name, or matplotlib is missing.
    """
    if out.suffix.lower() not in FORMATS:
        raise CrispError(f"out={out}: pictures are written as {' or '.join(FORMATS)}; name such a file")
    if out.is_dir():
        raise CrispError(f"out={out}: a folder; name a file in it, as in {out / ('picture' + out.suffix)}")
    new_figure(1, 1)


def save_figure(figure: Figure, target: Path, *, dpi: int = DPI) -> Path:
    """Write the figure as PNG or PDF by its suffix, whole or not at all, making the folder; returns `target`.

    Letters in a PDF stay letters (TrueType), as publishers want them. Neither holds a date.

    Raises:
        CrispError: another suffix, or it cannot be written.
    """
    import matplotlib as mpl

    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every table of a font in a PDF
    suffix = target.suffix.lower()
    if suffix not in FORMATS:
        raise CrispError(f"out={target}: pictures are written as {' or '.join(FORMATS)}; name such a file")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    metadata = {"CreationDate": None} if suffix == ".pdf" else {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"pdf.fonttype": 42}):
            figure.savefig(partial, format=FORMATS[suffix], dpi=dpi, metadata=metadata)
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CrispError(f"{target}: cannot be written ({error.strerror}); choose another file with --out") from error
    return target


def save_png(figure: Figure, target: Path, *, dpi: int = 120) -> Path:
    """Write the figure for a screen, making the folder where needed; returns `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=dpi)
    return target
