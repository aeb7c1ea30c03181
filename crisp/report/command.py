"""`crisp report`: read runs, write a page."""

from pathlib import Path

from crisp.errors import CrispError
from crisp.evals.results import write_whole
from crisp.report.config import ReportConfig
from crisp.report.curves import MOST_POINTS
from crisp.report.evaluations import gather_results
from crisp.report.gather import gather_runs
from crisp.report.page import render, sections_of
from crisp.report.sections.series import points_per_curve


def main(config: ReportConfig) -> Path:
    """Write the page and say where it is.

    Returns:
        The page.

    Raises:
        CrispError: what is no run or no folder, a damaged file, or a page that cannot be written.
    """
    out = _page_path(config)
    runs = gather_runs(config.runs)
    found, others = gather_results(config.runs, config.evals)
    sections = sections_of(runs, found, others)
    names = [run.name for run in runs]
    write_whole(out, render(sections, names, points=points_per_curve(len(runs), MOST_POINTS)))
    of = names[0] if len(names) == 1 else f"{len(names)} runs"
    print(f"report of {of[:40]}: {len(sections)} sections, {out.stat().st_size / 1e6:.1f} MB\n{out}")
    return out


def _page_path(config: ReportConfig) -> Path:
    if config.out is not None:
        if config.out.is_dir():
            raise CrispError(f"out={config.out}: a folder; name a file, as in --out {config.out / 'report.html'}")
        return config.out
    return config.runs[0] / "report.html" if len(config.runs) == 1 else Path("report.html")
