"""Steps that were skipped because a gradient was not finite: counted on the device, reported when they do not end.

The optimiser looks at the flag on the device (`crisp.optim.take_step`), and so does this: the host reads the counts
where it reads the metrics, and until then nothing waits. The facts of the last skipped step are kept for the report.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.distributed import sum_over_ranks
from crisp.errors import CrispError
from crisp.training.state import TrainState
from crisp.training.step import StepMetrics

log = logging.getLogger(__name__)

REPORT_FILE = "not-finite.json"
_WORST = 20


class SkippedSteps:
    """Of this run since the process began. The flag is the same on all ranks, and so is what follows from it.

    Args:
        state: the run's.
        run: its folder, for the report.
    """

    def __init__(self, state: TrainState, run: Path) -> None:
        self._state, self._run = state, run
        device = state.world.device
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # all, in a row, the most in a row
        self._told = 0
        self._facts: dict[str, Tensor] = {}

    def add(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        """Take note of a step (counted from 0). Nothing is read from the device."""
        total, streak, longest = self._counts.unbind()
        streak = (streak + 1) * metrics.skipped
        self._counts = torch.stack([total + metrics.skipped, streak, torch.maximum(longest, streak)])
        terms = metrics.terms
        facts = {
            "step": torch.full((), step, device=streak.device),
            "loss_terms": torch.stack([terms.cls, terms.patch, terms.region]),
            "sample_ids": batch.sample_id,
            "gradient_norms": metrics.gradient_norms,
        }
        # A frozen last layer has a gradient, too, when norms are taken: shapes never change.
        before = self._facts or facts
        self._facts = {name: torch.where(metrics.skipped, value, before[name]) for name, value in facts.items()}

    def look(self) -> dict[str, int]:
        """The count for the metrics; call it on all ranks, where the host waits for the device anyway.

        Raises:
            CrispError: `max_skipped_steps` in a row.
        """
        total, _, longest = self._counts.tolist()
        if longest >= self._state.config.max_skipped_steps:
            self._stop(longest)
        if total > self._told and self._state.world.is_main:
            more = total - self._told
            log.warning("%d step(s) skipped since the last line, %d in all: a gradient was not finite", more, total)
        self._told = total
        return {"steps_skipped": total}

    def _stop(self, longest: int) -> None:
        facts: dict[str, Any] = {name: value.tolist() for name, value in self._facts.items() if name != "loss_terms"}
        terms = sum_over_ranks(self._facts["loss_terms"].clone()).tolist()
        names = [name for name, p in self._state.networks.student.named_parameters() if p.requires_grad]
        norms = dict(zip(names, facts.pop("gradient_norms"), strict=True))
        bad = [name for name, norm in norms.items() if not torch.tensor(norm).isfinite()]
        report: dict[str, Any] = {
            "step": facts["step"] + 1,
            "skipped_in_a_row": longest,
            "loss": dict(zip(("cls", "patch", "region"), map(str, terms), strict=True)),
            "sample_ids_of_rank": {self._state.world.rank: facts["sample_ids"]},
            "gradients_not_finite": bad,
            "largest_finite_norms": dict(
                sorted(((n, v) for n, v in norms.items() if n not in bad), key=lambda pair: -pair[1])[:_WORST]
            ),
        }
        path = self._run / f"rank-{self._state.world.rank:05d}-{REPORT_FILE}"
        try:
            path.write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            log.error("%s: the report could not be written (%s): %s", path, error.strerror, report)
        raise CrispError(
            f"step {report['step']}: {longest} steps in a row had gradients that are not finite ({len(bad)} tensors, "
            f"loss terms {', '.join(f'{k} {v}' for k, v in report['loss'].items())}); {path} has sample ids and norms; "
            f"go on from the last checkpoint, or start a new run with a lower --optim.base-lr or --precision fp32"
        )
