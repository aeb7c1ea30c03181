"""Regions as a picture: the reference with its seed and region, and both global views with theirs (Figures 12, 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.viz.figure import PAGE_WIDTH_IN, new_figure, save_png
from crisp.viz.sheet import Group, caption, new_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

RED, BLUE = "#e00000", "#1646ff"
_PANEL_IN = 1.9
_FADED = "0.5"
"""Of what is said about a region that does not count in the loss"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionPictures:
    """What is drawn of S samples, one seed each. N patches of the reference, n of a global view."""

    reference: NDArray[np.uint8]
    """[S, H, W, 3]"""
    global_views: NDArray[np.uint8]
    """[2, S, h, w, 3]"""
    region: NDArray[np.bool_]
    """[S, N] patches of the reference, row by row"""
    view_regions: NDArray[np.bool_]
    """[2, S, n] the region followed into both views"""
    seed: NDArray[np.int64]
    """[S] index of a reference patch"""
    valid: NDArray[np.bool_]
    """[S] seen well enough in both views to count in the loss"""
    patch_px: int
    """Side of a patch, in the reference and in the views"""


def denormalise(images: Tensor) -> NDArray[np.uint8]:
    """Normalised images [..., 3, H, W] as a loader yields them → uint8 [..., H, W, 3] for the eye."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=images.device)[:, None, None]
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def draw_regions(pictures: RegionPictures, target: Path, *, title: str = "") -> Path:
    """Write `region_rows` as a PNG for a screen; returns `target`.

    Raises:
        CrispError: matplotlib is missing.
    """
    return save_png(region_rows(pictures, title=title), target)


def region_rows(pictures: RegionPictures, *, title: str = "", width_in: float | None = None) -> Figure:
    """A column per sample and three rows: reference, global view 1, global view 2 (paper, Figures 12 and 13).

    Columns are 1.9 inches wide, or less where all together must not be wider than `width_in`. The seed is a blue dot,
    the region is red patches; above each image stands how many patches it holds.

    Raises:
        CrispError: matplotlib is missing.
    """
    samples = len(pictures.reference)
    panel_in = _PANEL_IN if width_in is None else min(_PANEL_IN, (width_in - 0.4) / samples)
    figure = new_figure(panel_in * samples + 0.4, (panel_in + 0.3) * 3 + (0.4 if title else 0.0))
    axes = figure.subplots(3, samples, squeeze=False)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    for sample in range(samples):
        valid = bool(pictures.valid[sample])
        panel = axes[0, sample]
        _draw_panel(panel, pictures.reference[sample], pictures.region[sample], pictures.patch_px)
        _draw_seed(
            panel, int(pictures.seed[sample]), pictures.reference.shape[2] // pictures.patch_px, pictures.patch_px
        )
        _label(panel, f"{_patches(pictures.region[sample])} · {'valid' if valid else 'not valid'}", faded=not valid)
        for view in range(2):
            panel = axes[1 + view, sample]
            mask = pictures.view_regions[view, sample]
            _draw_panel(panel, pictures.global_views[view, sample], mask, pictures.patch_px)
            _label(panel, _patches(mask), faded=not valid)
    for row, name in enumerate(("reference", "global view 1", "global view 2")):
        axes[row, 0].set_ylabel(name, fontsize=9)
    return figure


def region_columns(
    models: Sequence[RegionPictures], names: Sequence[str], *, width_in: float = PAGE_WIDTH_IN
) -> Figure:
    """A row per sample, and three columns for each model: reference with seed and region, and both global views.

    Args:
        models: the same samples, views and seeds, with what each model makes of them.
        names: of the models.
        width_in: of the page.

    Raises:
        CrispError: see `new_sheet`.
    """
    labels = ("reference", "view 1", "view 2")
    groups = [Group(head=name, units=(1.0, 1.0, 1.0), labels=labels) for name in names]
    sheet = new_sheet(groups, [1.0] * len(models[0].reference), width_in=width_in, captions=True)
    for sample, panels in enumerate(sheet.panels):
        for pictures, (reference, *views) in zip(models, panels, strict=True):
            colour = "black" if pictures.valid[sample] else _FADED
            _draw_panel(reference, pictures.reference[sample], pictures.region[sample], pictures.patch_px)
            columns = pictures.reference.shape[2] // pictures.patch_px
            _draw_seed(reference, int(pictures.seed[sample]), columns, pictures.patch_px, size=4)
            caption(reference, _patches(pictures.region[sample]), colour=colour)
            for view, panel in enumerate(views):
                mask = pictures.view_regions[view, sample]
                _draw_panel(panel, pictures.global_views[view, sample], mask, pictures.patch_px)
                caption(panel, _patches(mask), colour=colour)
    return sheet.figure


def _draw_panel(panel: Axes, image: NDArray[np.uint8], mask: NDArray[np.bool_], patch_px: int) -> None:
    """The image with the mask's patches in red and an outline around them, in continuous pixel coordinates."""
    from matplotlib.collections import LineCollection

    height, width = image.shape[:2]
    grid = mask.reshape(height // patch_px, width // patch_px)
    panel.imshow(image, extent=(0, width, height, 0), interpolation="antialiased")
    panel.imshow(
        np.ones(grid.shape), extent=(0, width, height, 0), interpolation="nearest",
        cmap=_all_red(), alpha=0.45 * grid,
    )  # fmt: skip
    edges = [np.array(edge).T * patch_px for edge in _outline(grid)]
    # A pale edge beside the outline, which must be seen on red things, too.
    for colour, stroke in (("white", 2.0), (RED, 1.2)):
        panel.add_collection(LineCollection(edges, colors=colour, linewidths=stroke, capstyle="round"))
    panel.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def _all_red() -> ListedColormap:
    from matplotlib.colors import ListedColormap

    return ListedColormap([RED])


def _outline(grid: NDArray[np.bool_]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Cell edges between the region and the rest: ((x0, x1), (y0, y1)) in cells."""
    padded = np.pad(grid, 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])  # edge above cell (row, column)
    edges = [((x, x + 1), (y, y)) for y, x in zip(rows.tolist(), columns.tolist(), strict=True)]
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])  # edge left of it
    return edges + [((x, x), (y, y + 1)) for y, x in zip(rows.tolist(), columns.tolist(), strict=True)]


def _draw_seed(panel: Axes, seed: int, columns: int, patch_px: int, *, size: float = 7) -> None:
    row, column = divmod(seed, columns)
    panel.plot(
        [(column + 0.5) * patch_px], [(row + 0.5) * patch_px],
        marker="o", markersize=size, color=BLUE, markeredgecolor="white", markeredgewidth=size / 6,
    )  # fmt: skip


def _patches(mask: NDArray[np.bool_]) -> str:
    count = int(mask.sum())
    return f"{count} patch{'es' * (count != 1)}"


def _label(panel: Axes, text: str, *, faded: bool) -> None:
    panel.set_title(text, fontsize=8, color=_FADED if faded else "black", pad=3)
