"""One sample as the loader makes it: reference, all views, and a grid drawn through the affine on each.

    crisp viz views --shards DIR --out views.png [--sample 3 17] [--epoch 2] [--views.local-views 4]

The same index, plan and renderer as in training: a run with this seed and these views shows these pictures in this
epoch. Grid lines are fixed in the reference and mapped by `view_from_reference`: where they follow the content in every
view, crop, flip and affine agree.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro
from numpy.typing import NDArray

from crisp.config import DataConfig, TrainConfig, ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.loader import open_shard_set
from crisp.pipelines.plan import Plan, make_plan
from crisp.pipelines.source import Work
from crisp.viz.figure import new_figure
from crisp.viz.grid import GridLine, grid_lines, grid_nodes, map_line, map_nodes, map_patch
from crisp.viz.region_figure import BLUE, denormalise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_FORMATS = {".png": "png", ".pdf": "pdf"}
_DPI = 300
_WIDTH_IN = 7.0  # of a page's text
_LOCAL_COLUMNS = 5
_TITLE_IN, _MARGIN_IN = 0.34, 0.44  # two lines above a row; the line above all and the two below
# Vertical lines from left to right, horizontal ones from top to bottom: two ramps without a colour in common.
_RAMPS = {"x": "cool", "y": "autumn_r"}
_LEGEND = (
    "Lines: every {step_px} px of the reference, brought to each view by view_from_reference; cyan → magenta along x, "
    "yellow → red along y.\n"
    "Nodes: column and row of the grid. Blue: region seed. Pale: masked patches. Sizes: the crop in the original image."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsPictureConfig:
    """What to draw, and of which run."""

    shards: str
    """Folder written by `crisp shard`: a path, or a URL (s3, gs, http)."""
    out: Path
    """The picture, .png or .pdf; with several samples each has its number before the suffix."""
    sample: tuple[int, ...] = (0,)
    """Sample ids: rows of the shards' index, from 0."""
    epoch: int = 0
    """Epoch of the run, from 0: each has other crops."""
    seed: int = 0
    """Seed of the run."""
    grid_patches: int = 2
    """Distance of the grid's lines, in patches of the reference."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The recipe's views."""

    def __post_init__(self) -> None:
        if not self.sample:
            raise CrispError("sample: none given; name some, as in --sample 0 17")
        for name in ("epoch", "seed"):
            if getattr(self, name) < 0:
                raise CrispError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.grid_patches < 1:
            raise CrispError(f"grid_patches={self.grid_patches}: must be 1 or more")
        if self.out.suffix.lower() not in _FORMATS:
            raise CrispError(f"out={self.out}: pictures are written as {' or '.join(_FORMATS)}; name such a file")

    def target(self, sample_id: int) -> Path:
        """Where a sample's picture goes."""
        if len(self.sample) == 1:
            return self.out
        return self.out.with_name(f"{self.out.stem}-{sample_id}{self.out.suffix}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleViews:
    """A sample as it is shown in one epoch."""

    config: ViewsConfig
    plan: Plan
    """Of this sample alone: B = 1"""
    title: str
    reference_title: str
    reference: NDArray[np.uint8]
    """[R, R, 3]"""
    views: list[NDArray[np.uint8]]
    """2 + L of [s, s, 3]; the global ones come first"""


def render_samples(config: ViewsPictureConfig) -> list[SampleViews]:
    """Read, plan and render the samples, each alone: nothing of it depends on a batch.

    Raises:
        CrispError: shards that cannot be read, a sample that they don't have or that cannot be shown.
    """
    shards = open_shard_set(TrainConfig(data=DataConfig(shards=config.shards)))
    for sample_id in config.sample:
        if not 0 <= sample_id < len(shards):
            raise CrispError(
                f"sample={sample_id}: {config.shards} has {len(shards)} samples; name one from 0 to {len(shards) - 1}"
            )
    shown = []
    with contextlib.closing(CpuRenderer(config.views, threads=1)) as renderer:
        for sample_id in config.sample:
            row = shards.index[sample_id]
            plan = make_plan(
                config.views,
                seed=config.seed,
                epoch=config.epoch,
                sample_id=np.array([sample_id]),
                height_px=[row["height"]],
                width_px=[row["width"]],
            )
            work = Work(encoded=[shards.read(sample_id)], plan=plan, label=np.array([row["label"]], np.int64))
            batch = renderer.render(work)
            shown.append(
                SampleViews(
                    config=config.views,
                    plan=plan,
                    title=f"sample {sample_id} ({shards.key(sample_id)}), seed {config.seed}, epoch {config.epoch}",
                    reference_title=f"reference: {row['width']}×{row['height']} px\nthe whole image, made square",
                    reference=denormalise(batch.reference[0]),
                    views=[*denormalise(batch.global_views[:, 0]), *denormalise(batch.local_views[:, 0])],
                )
            )
    return shown


# --- the picture ----------------------------------------------------------------------------------------------------


def draw_views(shown: SampleViews, *, grid_patches: int = 2) -> Figure:
    """A page-wide figure: the reference and both global views above, the local views in rows of five below.

    The axes are in this order, each with continuous pixel coordinates. Grid lines have the `gid` of their place in the
    reference, as in 'x=32'.

    Args:
        shown: the sample.
        grid_patches: distance of the grid's lines, in patches of the reference.

    Raises:
        CrispError: matplotlib is missing.
    """
    views, plan = shown.config, shown.plan
    step_px = grid_patches * views.patch_px
    rows = -(-views.local_views // _LOCAL_COLUMNS)
    heights_in = [_WIDTH_IN / 3 + _TITLE_IN, *[_WIDTH_IN / _LOCAL_COLUMNS + _TITLE_IN] * rows]
    figure = new_figure(_WIDTH_IN, sum(heights_in) + _MARGIN_IN)
    # 15 columns: a third of the width is five of them, a fifth is three.
    places = figure.add_gridspec(1 + rows, 3 * _LOCAL_COLUMNS, height_ratios=heights_in)
    corners = [(0, 0, 5), (0, 5, 5), (0, 10, 5)]
    corners += [(1 + i // _LOCAL_COLUMNS, i % _LOCAL_COLUMNS * 3, 3) for i in range(views.local_views)]
    panels = [figure.add_subplot(places[row, column : column + width]) for row, column, width in corners]

    affines = [np.eye(2, 3), *plan.view_from_reference[:, 0].astype(np.float64)]
    titles = [shown.reference_title, *(view_title(plan, view) for view in range(views.views))]
    lines, nodes = grid_lines(views.reference_px, step_px=step_px), grid_nodes(views.reference_px, step_px=step_px)
    for number, (panel, image) in enumerate(zip(panels, [shown.reference, *shown.views], strict=True)):
        side, view_from_reference, large = image.shape[0], affines[number], number < 3
        _show(panel, image)
        if number in (1, 2):
            _shade_masked(panel, plan.patch_masks[number - 1, 0], views)
        for line in lines:
            segment = map_line(line, view_from_reference, reference_px=views.reference_px, view_px=side)
            if segment is not None:
                _draw_line(panel, line, segment, share=line.at_px / views.reference_px)
        _draw_seeds(panel, plan.region_seed[0], view_from_reference, views)
        _label_nodes(panel, map_nodes(nodes, view_from_reference, view_px=side), size_pt=5 if large else 4.5)
        panel.set_title(titles[number], fontsize=7 if large else 6, pad=3, linespacing=1.1)
    figure.suptitle(shown.title, fontsize=7.5)
    figure.supxlabel(_LEGEND.format(step_px=step_px), fontsize=6)
    return figure


def view_title(plan: Plan, view: int) -> str:
    """Two lines: which view and its window in image pixels; what was done to it."""
    _, _, width, height = plan.crop_px[0, view].tolist()
    name = f"global {view + 1}" if view < 2 else f"local {view - 1}"
    brightness, contrast, saturation, hue = plan.color_factors[0, view].tolist()
    done = []
    if plan.flip[0, view]:
        done.append("flip")
    if (brightness, contrast, hue) != (1, 1, 0) or saturation not in (0, 1):
        done.append("jitter")
    if saturation == 0:
        done.append("grey")
    if plan.blur_sigma_px[0, view] > 0:
        done.append(f"blur σ {plan.blur_sigma_px[0, view]:.1f}")
    if plan.solarize[0, view]:
        done.append("solarise")
    return f"{name}: {width}×{height} px\n{', '.join(done) or 'as it is'}"


def _show(panel: Axes, image: NDArray[np.uint8]) -> None:
    """The image in continuous pixel coordinates: pixel centres lie at halves, as in `crisp.geometry`."""
    side = image.shape[0]
    panel.imshow(image, extent=(0, side, side, 0), interpolation="nearest")
    panel.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
    panel.spines[:].set_linewidth(0.4)


def _draw_line(panel: Axes, line: GridLine, segment: NDArray[np.float64], *, share: float) -> None:
    """A part [2, 2] of a grid line in view pixels, coloured by how far into the reference the line lies."""
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    panel.plot(
        *segment.T, color=colormaps[_RAMPS[line.axis]](share), linewidth=0.8, solid_capstyle="butt",
        gid=f"{line.axis}={line.at_px:g}",
        # Dark edges: on a bright sky as well as on dark wood the colour must be seen.
        path_effects=[withStroke(linewidth=1.5, foreground="#00000080")],
    )  # fmt: skip


def _draw_seeds(
    panel: Axes, seeds: NDArray[np.int64], view_from_reference: NDArray[np.float64], views: ViewsConfig
) -> None:
    from matplotlib.patches import Polygon
    from matplotlib.patheffects import withStroke

    for seed in seeds.tolist():
        quad = map_patch(seed, view_from_reference, grid=views.reference_grid, patch_px=views.patch_px)
        panel.add_patch(
            Polygon(
                quad,
                facecolor=f"{BLUE}60",
                edgecolor=BLUE,
                linewidth=1.2,
                joinstyle="miter",
                gid=f"seed={seed}",
                path_effects=[withStroke(linewidth=2.4, foreground="white")],
            )
        )


def _label_nodes(panel: Axes, nodes: dict[str, tuple[float, float]], *, size_pt: float) -> None:
    for name, (x, y) in nodes.items():
        panel.text(
            x, y, name,
            fontsize=size_pt, fontweight="bold", color="white", ha="center", va="center", clip_on=True,
            bbox={"boxstyle": "circle,pad=0.15", "facecolor": "#202020", "edgecolor": "white", "linewidth": 0.5},
        )  # fmt: skip


def _shade_masked(panel: Axes, mask: NDArray[np.bool_], views: ViewsConfig) -> None:
    """A pale veil over the patches [n] that the student doesn't see."""
    grid = mask.reshape(views.global_grid, views.global_grid)
    veil = np.full((*grid.shape, 4), 0.82)  # not white: it must be seen on a white background
    veil[..., 3] = 0.5 * grid
    panel.imshow(veil, extent=(0, views.global_px, views.global_px, 0), interpolation="nearest")


# --- the command line -----------------------------------------------------------------------------------------------


def save_views(figure: Figure, target: Path) -> Path:
    """Write the figure as PNG or PDF by its suffix, making the folder where needed; returns `target`.

    Raises:
        CrispError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format=_FORMATS[target.suffix.lower()], dpi=_DPI)
    except OSError as error:
        raise CrispError(f"{target}: cannot be written ({error.strerror}); choose another file with --out") from error
    return target


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(ViewsPictureConfig, args=args, prog="crisp viz views", description=__doc__)
    new_figure(1, 1)  # what is missing for the picture is said before anything is read
    for sample_id, shown in zip(config.sample, render_samples(config), strict=True):
        log.info("%s", save_views(draw_views(shown, grid_patches=config.grid_patches), config.target(sample_id)))


if __name__ == "__main__":
    main()
