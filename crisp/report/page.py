"""Sections as one HTML page that loads nothing: style, script, data and pictures are inside.

The template escapes all text. As a second lock, a content security policy lets no script run but the page's own, by its
digest, and lets nothing be fetched.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import BaseLoader, Environment, StrictUndefined
from markupsafe import Markup

from crisp import __version__
from crisp.report.blocks import Chart, Section
from crisp.report.curves import MOST_POINTS, rounded
from crisp.report.evaluations import Found
from crisp.report.gather import RunRecord
from crisp.report.sections.circumstances import faults, machine
from crisp.report.sections.configuration import configuration
from crisp.report.sections.looks import pictures, quality
from crisp.report.sections.overview import overview
from crisp.report.sections.scores import scores
from crisp.report.sections.series import points_per_curve
from crisp.report.sections.training import health, knn, losses, regions, schedules, speed


def sections_of(runs: Sequence[RunRecord], found: Sequence[Found], others: Sequence[str]) -> list[Section]:
    """All sections, in the page's order.

    Args:
        runs: in the order of their colours.
        found: results of evaluations.
        others: JSON files beside them that are none.
    """
    limit = points_per_curve(len(runs), MOST_POINTS)
    return [
        overview(runs),
        configuration(runs),
        losses(runs, limit),
        knn(runs, limit),
        pictures(runs),
        regions(runs, limit),
        quality(runs, limit),
        scores(runs, found, others),
        speed(runs, limit),
        schedules(runs, limit),
        health(runs, limit),
        machine(runs),
        faults(runs),
    ]


def render(sections: Sequence[Section], names: Sequence[str], *, points: int) -> str:
    """The page.

    Args:
        sections: of `sections_of`.
        names: of the runs.
        points: that a curve has at most, which the page says.
    """
    assets = files("crisp.report").joinpath("assets")
    style, script, template = (assets.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html"))
    environment = Environment(loader=BaseLoader(), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["chart_data"] = chart_data
    page = environment.from_string(template).render(
        title=f"{', '.join(names)} – CRISP",
        names=names,
        sections=sections,
        points=points,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.encode("utf-8", "replace").decode()  # file names may hold what is no text


def chart_data(chart: Chart) -> dict[str, Any]:
    """What the script draws from."""
    return {
        "title": chart.title,
        "x": chart.x_label,
        "percent": chart.percent,
        "log": chart.logarithmic,
        "note": chart.legend_note,
        "series": [
            {
                "label": series.label,
                "run": series.run,
                "dash": series.dash,
                "faint": series.faint,
                "x": list(series.curve.steps),
                "y": [rounded(value) for value in series.curve.values],
            }
            for series in chart.series
        ],
    }
