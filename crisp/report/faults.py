"""What went wrong in a run and did not end it: samples replaced, reports of steps that were not finite."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crisp.pipelines.faults import Replacement
from crisp.runs import FAULTS
from crisp.training.skipped import REPORT_FILE


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """As the run's folder tells them."""

    replaced: Sequence[Replacement]
    """By step"""
    unreadable_lines: int
    """Of the fault logs: a process that was killed may leave half of one"""
    not_finite: Sequence[dict[str, Any]]
    """Reports of ranks that stopped for gradients that were not finite"""

    @property
    def bad_samples(self) -> int:
        """Distinct samples that could not be shown."""
        return len({row.failed_id for row in self.replaced})

    @property
    def kinds(self) -> Counter[str]:
        """Replacements by what failed."""
        return Counter(row.kind for row in self.replaced)


def gather_faults(run: Path) -> Faults:
    """Read RUN/faults and RUN/rank-*-not-finite.json; nothing where there is nothing."""
    replaced: list[Replacement] = []
    unreadable = 0
    for path in sorted((run / FAULTS).glob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                replaced.append(Replacement(**json.loads(line)))
            except (ValueError, TypeError):
                unreadable += 1
    reports = []
    for path in sorted(run.glob(f"rank-*-{REPORT_FILE}")):
        try:
            report = json.loads(path.read_text())
        except (OSError, ValueError):
            unreadable += 1
            continue
        reports.append({"rank": path.name.split("-")[1], **report})
    replaced.sort(key=lambda row: row.step)
    return Faults(replaced=replaced, unreadable_lines=unreadable, not_finite=reports)
