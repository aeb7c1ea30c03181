"""Charts of logged values: a line for each run, thinned to what the page has room for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from crisp.report.blocks import Block, Chart, Note, Series
from crisp.report.curves import curve_of, running_mean, thin
from crisp.report.gather import RunRecord

CURVE_CHARACTERS = 2_500_000
"""That all curves of a page may take together"""
_CHARACTERS_PER_POINT = 18
_CURVES_PER_RUN = 45  # about; a page with quality on several data sets has more
MEAN_SHARE = 0.1
"""Of a run's logged lines, that a running mean spans"""


def points_per_curve(runs: int, most: int) -> int:
    """So many points each curve may have on a page of several runs."""
    return min(most, CURVE_CHARACTERS // (_CHARACTERS_PER_POINT * _CURVES_PER_RUN * runs))


def chart(
    runs: Sequence[RunRecord],
    title: str,
    keys: Mapping[str, str],
    *,
    limit: int,
    smooth: bool = False,
    percent: bool = False,
    logarithmic: bool = False,
) -> list[Block]:
    """A chart of some values of metrics.jsonl, or a sentence where no run has any.

    Args:
        runs: in the order of their colours.
        title: of the chart.
        keys: value in a line → what it is called; a run's lines differ in their dashes.
        limit: points per curve.
        smooth: draw a running mean over the values.
        percent: the values are shares in [0, 1].
        logarithmic: of the vertical axis.
    """
    series: list[Series] = []
    for number, run in enumerate(runs):
        for dash, (key, name) in enumerate(keys.items()):
            label = ", ".join(filter(None, (run.name if len(runs) > 1 else "", name))) or run.name
            curve = curve_of(run.metrics, key)
            if not curve.finite:
                continue
            window = max(1, round(len(curve) * MEAN_SHARE))
            smoothed = smooth and window > 1
            if smoothed:
                mean = thin(running_mean(curve, window), limit)
                series.append(Series(label=label, run=number, curve=mean, dash=dash))
            shown = f"{label}, as logged" if smoothed else label
            series.append(Series(label=shown, run=number, curve=thin(curve, limit), dash=dash, faint=smoothed))
    if not series:
        return [Note(text=f"{title}: not logged by {'this run' if len(runs) == 1 else 'these runs'}.")]
    note = f"bold: mean over {MEAN_SHARE:.0%} of the run's lines; thin: as logged"
    faint = any(one.faint for one in series)
    return [
        Chart(title=title, series=series, percent=percent, logarithmic=logarithmic, legend_note=note if faint else "")
    ]


def chart_of_lines(
    title: str, lines: Iterable[tuple[int, int, str, Sequence[Mapping[str, Any]]]], key: str, *, limit: int
) -> list[Block]:
    """A chart of shares from other files than metrics.jsonl: (run, dash, label, lines)."""
    series = [
        Series(label=label, run=run, dash=dash, curve=thin(curve, limit))
        for run, dash, label, values in lines
        if (curve := curve_of(values, key)).finite
    ]
    return [Chart(title=title, series=series, percent=True)] if series else []


def nothing_logged(runs: Sequence[RunRecord]) -> list[Block]:
    """A sentence for each run that has not logged a line."""
    return [Note(text=f"{run.name} has logged no line yet.") for run in runs if not run.metrics]
