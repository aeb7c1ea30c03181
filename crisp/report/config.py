"""What `crisp report` is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Which runs, and where the page goes."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN [RUN…]")]]
    """Folders of runs; several are shown side by side."""
    out: Path | None = None
    """The page; default RUN/report.html of one run, report.html here for several."""
    evals: tuple[Path, ...] = ()
    """Further folders of `crisp eval`'s results; those in RUN/evals are found by themselves."""
