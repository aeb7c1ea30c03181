"""The results as bars, with the ceilings as lines."""

from pathlib import Path

from crisp.benchmarks.loader import Measured
from crisp.benchmarks.loader_backends import BACKENDS
from crisp.viz.figure import new_figure, save_png

_OURS, _OTHERS = "#0072b2", "#9a9a9a"
_LINES = ("#d55e00", "#009e73", "#444444")
_FAR = 2.5  # a ceiling beyond this multiple of all bars is written down, not drawn


def draw_results(measured: Measured, target: Path, *, about: str) -> Path:
    """Write a PNG: a bar for each loader, from the slowest to the fastest turn a whisker, a line for each ceiling.

    Args:
        measured: the run.
        target: where the PNG goes.
        about: the machine, below the picture.

    Returns:
        `target`.

    Raises:
        CrispError: matplotlib is missing.
    """
    bars = [result for result in measured.results if not BACKENDS[result.backend].ceiling]
    ceilings = {r.backend: r.samples_per_s for r in measured.results if BACKENDS[r.backend].ceiling}
    if measured.ceiling is not None:
        ceilings["sum of cpu's parts"] = measured.ceiling.samples_per_s
    figure = new_figure(9.2, 1.5 + 0.42 * max(2, len(bars)))
    panel = figure.subplots()
    labels = [r.backend if r.device == "cpu" else f"{r.backend} (GPU)" for r in bars]
    places = list(range(len(bars)))
    panel.barh(
        places,
        [r.samples_per_s for r in bars],
        color=[_OURS if r.backend in ("cpu", "dali") else _OTHERS for r in bars],
        height=0.68,
        xerr=[[r.samples_per_s - r.slowest for r in bars], [r.fastest - r.samples_per_s for r in bars]],
        error_kw={"ecolor": "#222222", "elinewidth": 1, "capsize": 3},
    )
    panel.set_yticks(places, labels)
    panel.invert_yaxis()
    widest = max((r.fastest for r in bars), default=max(ceilings.values(), default=1.0))
    shown = {name: rate for name, rate in ceilings.items() if rate <= _FAR * widest}
    right = max([widest, *shown.values()]) * 1.12
    for place, result in zip(places, bars, strict=True):
        times = "" if result.times_pil is None else f"   {result.times_pil:.1f}×"
        panel.text(
            result.fastest + right * 0.012,
            place,
            f"{result.samples_per_s:.0f}{times}",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
        )
    for (name, rate), colour in zip(shown.items(), _LINES, strict=False):
        panel.axvline(rate, color=colour, linestyle="--", linewidth=1.2, label=f"{name}: {rate:.0f}")
    for name, rate in ceilings.items():
        if name not in shown:
            panel.plot([], [], " ", label=f"{name}: {rate:.0f} (off the scale)")
    if ceilings:
        panel.legend(loc="lower right", fontsize=8, title="ceilings", title_fontsize=8, alignment="left")
    panel.set_xlim(0, right)
    panel.set_xlabel("samples per second (reference, 2 global and the local views); × the faster PIL loader")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="0.92")
    panel.set_axisbelow(True)
    threads = max((r.threads for r in measured.results), default=1)
    figure.suptitle(f"Loaders on {threads} threads or worker processes", fontsize=11)
    figure.supxlabel(about, fontsize=6, color="0.4")
    return save_png(figure, target)
