"""Losses and scores of runs against epochs, or ablations as tables and curves.

    crisp viz curves --runs runs/vits16 runs/ibot_vits16 --out curves.pdf
    crisp viz curves --runs runs/vits16 --keys loss_region region_valid_frac "seg-knn voc2012 mIoU" --out curves.pdf
    crisp viz curves --table threshold.json --out threshold.pdf

A panel for each key, a line for each run (paper, Figures 6 and 11). Keys are those of a run's metrics.jsonl, knn (its
accuracy by the way, in percent), and "TASK DATASET METRIC" of results that `crisp eval` wrote for its checkpoints into
RUN/evals, at any depth, or into folders named by --evals. A table is what `crisp.viz.ablation_table.read_table` reads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from crisp.errors import CrispError
from crisp.viz.ablation_table import draw_ablation, read_table
from crisp.viz.curve_data import KNN, Curve, read_curves
from crisp.viz.figure import COLOURS, PAGE_WIDTH_IN, check_out, new_figure, save_figure
from crisp.viz.losses import CURVES, running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_LOSSES = ("loss", "loss_cls", "loss_patch", "loss_region")
_TITLES = {key: f"{CURVES[key]} loss" for key in _LOSSES} | {KNN: "k-NN accuracy (%)"}
_STYLES: tuple[Literal["solid", "dashed", "dotted", "dashdot"], ...] = ("solid", "dashed", "dotted", "dashdot")
_COLUMNS = 3
_WINDOW = 0.05
"""Share of a run's lines that its curve averages over"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvesConfig:
    """What to draw: runs, or a table."""

    runs: tuple[Path, ...] = ()
    """Folders of runs, a line each."""
    keys: tuple[str, ...] = ()
    """Panels; default: the losses that are not 0, k-NN, and all that evaluations found."""
    evals: tuple[Path, ...] = ()
    """Folders with results of `crisp eval`, beside RUN/evals."""
    table: Path | None = None
    """An ablation's table (JSON), in place of runs."""
    out: Path
    """The picture, .png or .pdf."""
    names: tuple[str, ...] = ()
    """What the runs are called, one for each; default: their folders."""
    width_in: float = PAGE_WIDTH_IN
    """Width of the page in inches."""

    def __post_init__(self) -> None:
        if bool(self.runs) == (self.table is not None):
            raise CrispError("runs and table: give one of the two, as in --runs runs/vits16, or --table FILE")
        if self.table and (self.keys or self.evals or self.names):
            raise CrispError("table: stands alone; leave --keys, --evals and --names out")
        if self.names and len(self.names) != len(self.runs):
            raise CrispError(f"names: {len(self.names)} for {len(self.runs)} runs; give one for each, or none")
        for folder in self.evals:
            if not folder.is_dir():
                raise CrispError(f"evals={folder}: no such folder; give one that 'crisp eval' wrote results into")
        if not 1 <= self.width_in <= 100:
            raise CrispError(f"width_in={self.width_in:g}: must lie between 1 and 100 inches")
        check_out(self.out)


def draw_curves(
    runs: Mapping[str, Mapping[str, Curve]], keys: Sequence[str], *, width_in: float = PAGE_WIDTH_IN
) -> Figure:
    """A panel per key. What is logged often is drawn thin, and bold as a running mean; scores have a mark each.

    Args:
        runs: by name, each run's curves by key.
        keys: a run that lacks one has no line in its panel.
        width_in: of the page.

    Raises:
        CrispError: matplotlib is missing.
    """
    columns = 2 if len(keys) == 4 else min(_COLUMNS, len(keys))
    rows = -(-len(keys) // columns)
    figure = new_figure(width_in, 1.9 * rows + (0.25 if len(runs) > 1 else 0))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, key in zip(panels, keys, strict=False):
        for number, curves in enumerate(runs.values()):
            if key in curves:
                _draw_curve(panel, curves[key], COLOURS[number % len(COLOURS)], _STYLES[number % len(_STYLES)])
        panel.set_title(_title(key), fontsize=8, parse_math=False)
        panel.tick_params(labelsize=7)
        panel.grid(color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("epoch", fontsize=8)
    for panel in panels[len(keys) :]:
        panel.set_axis_off()
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], linestyle=_STYLES[i % len(_STYLES)], linewidth=1.5)
            for i in range(len(runs))
        ]
        legend = figure.legend(handles, list(runs), loc="outside upper center", ncols=4, fontsize=7.5, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw_curve(panel: Axes, curve: Curve, colour: str, style: str) -> None:
    if curve.logged and len(curve.values) > 40:
        panel.plot(curve.epochs, curve.values, color=colour, linewidth=0.5, alpha=0.35)
        smooth = running_mean(curve.values, 2 * round(len(curve.values) * _WINDOW / 2) + 1)  # odd: centred
        panel.plot(curve.epochs, smooth, color=colour, linestyle=style, linewidth=1.5)
    else:
        panel.plot(
            curve.epochs, curve.values, color=colour, linestyle=style, linewidth=1.3,
            marker="none" if curve.logged else "o", markersize=3,
        )  # fmt: skip


def _title(key: str) -> str:
    return _TITLES.get(key, key.replace("_", " "))


def default_keys(runs: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    """Losses that are not 0 throughout, k-NN, and what evaluations found."""
    everything = {key: curve for curves in runs.values() for key, curve in curves.items()}
    losses = [key for key in _LOSSES if any(key in curves and curves[key].values.any() for curves in runs.values())]
    return losses + [key for key, curve in everything.items() if not curve.logged]


def picture(config: CurvesConfig) -> Figure:
    """The figure of a config.

    Raises:
        CrispError: a run or table that cannot be read, or a key that no run has.
    """
    if config.table is not None:
        return draw_ablation(read_table(config.table), width_in=config.width_in)
    names = config.names or _names(config.runs)
    runs = {name: read_curves(run, config.evals) for name, run in zip(names, config.runs, strict=True)}
    known = sorted({key for curves in runs.values() for key in curves})
    for key in config.keys:
        if key not in known:
            raise CrispError(f"keys={key!r}: no run has it; there are {', '.join(known)}")
    return draw_curves(runs, config.keys or default_keys(runs), width_in=config.width_in)


def _names(runs: Sequence[Path]) -> list[str]:
    """Last parts of their folders, or all of them where two would be called the same."""
    last = [run.resolve().name for run in runs]
    return last if len(set(last)) == len(last) else [str(run) for run in runs]


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(CurvesConfig, args=args, prog="crisp viz curves", description=__doc__)
    log.info("%s", save_figure(picture(config), config.out))


if __name__ == "__main__":
    main()
