"""RUN/region_quality.json, which `crisp eval region-quality` writes: a list of lines by data set and step.

A line holds `dataset`, `step`, the setting, and for each kind of region (`found`: discovered ones; `blob` and
`scattered`: random ones) its measures in percent.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crisp.runs import QUALITY_FILE

KINDS = {"found": "discovered", "blob": "random blob", "scattered": "random patches"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What the file holds."""

    lines: Sequence[dict[str, Any]]
    problem: str = ""
    """Why nothing of it can be shown"""

    @property
    def datasets(self) -> list[str]:
        """In the file's order."""
        return list(dict.fromkeys(str(line["dataset"]) for line in self.lines))

    def measures(self, dataset: str) -> list[str]:
        """Of the discovered regions on a data set."""
        lines = [line for line in self.lines if line["dataset"] == dataset]
        return list(dict.fromkeys(measure for line in lines for measure in line["found"]))

    def values(self, dataset: str, kind: str, measure: str) -> list[dict[str, Any]]:
        """`{"step": …, measure: …}` with a share in [0, 1], where it is defined."""
        return [
            {"step": line["step"], measure: line[kind][measure] / 100}
            for line in self.lines
            if line["dataset"] == dataset and measure in line.get(kind, {})
        ]


def gather_quality(run: Path) -> Quality | None:
    """Read the file; None where there is none."""
    path = run / QUALITY_FILE
    if not path.exists():
        return None
    try:
        lines = json.loads(path.read_text())
        whole = all(
            isinstance(line["step"], int)
            and all(isinstance(v, int | float) for kind in KINDS for v in line.get(kind, {}).values())
            and isinstance(line["found"], dict)
            and "dataset" in line
            for line in lines
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        return Quality(lines=[], problem=f"{QUALITY_FILE} cannot be read; remove it and score the checkpoints again.")
    return Quality(lines=lines)
