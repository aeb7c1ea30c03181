"""Signs of a collapse, from the last step before a logged line: the teacher's targets, the centres, the regions.

A collapsed teacher gives every image the same target. Centring and sharpening each prevent one form of it: without
sharpening targets become uniform, without centring one prototype takes all. Measured on a few rows and only where a
line is logged, it costs a step nothing.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crisp.config import TrainConfig
from crisp.losses import CrispLoss
from crisp.models.heads import Kind
from crisp.training.step import StepMetrics

log = logging.getLogger(__name__)

ROWS = 256
"""Targets per kind and rank: the standard error of a mean of entropies that spread over 1 nat is then .06 nats"""
UNIFORM = 0.99
"""Share of log P from which targets tell nothing: at 8192 prototypes the logits' spread is below .42 temperatures"""
ONE_PROTOTYPE = 0.02
"""Share of log P below which a target is one prototype: .18 nats at 8192 prototypes, a perplexity of 1.2"""
FEW_REGIONS = 0.1
"""Valid share of regions: uniform seeds are seen by both views 40 % of the time; with a quarter of that, regions are
empty or too small rather than out of sight"""
LINES = 5
"""Successive logged lines that must agree before a warning is given, or an episode is over"""


@torch.no_grad()
def target_entropies(metrics: StepMetrics, loss: CrispLoss, *, temperature: float) -> Tensor:
    """[kinds, 2] float32: summed entropy of this rank's targets over log P, and how many were summed.

    Uses the centres as they are now, one step after those that the targets were made with.

    Args:
        metrics: of a step, with the teacher's projections.
        loss: for its kinds and centres.
        temperature: the teacher's.
    """
    teacher = metrics.teacher
    sums = torch.zeros(len(loss.kinds), 2, device=loss.centers.device)
    if teacher is None:
        return sums
    for i, kind in enumerate(loss.kinds):
        rows = _rows(kind, metrics)[:ROWS]
        with torch.autocast(rows.device.type, enabled=False):
            logits = rows.float() @ teacher.prototypes[kind].float().T - loss.centers[i]  # [rows, P]
        targets = (logits / temperature).log_softmax(-1)
        entropies = -(targets.exp() * targets).sum(-1)
        sums[i, 0] = entropies.sum() / math.log(loss.centers.shape[1])
        sums[i, 1] = len(rows)
    return sums


def _rows(kind: Kind, metrics: StepMetrics) -> Tensor:
    """The teacher's bottlenecks of a kind, [rows, d]; of regions only the valid ones."""
    teacher = metrics.teacher
    if kind == "cls":
        return teacher.cls.flatten(0, 1)
    if kind == "patch":
        assert teacher.patch is not None
        return teacher.patch
    assert teacher.region is not None
    assert metrics.valid is not None
    return teacher.region[:, metrics.valid].flatten(0, 1)


def named_values(kinds: Sequence[Kind], sums: Sequence[Sequence[float]], centers: Tensor) -> dict[str, float]:
    """What a logged line holds: `teacher_entropy_KIND` (mean over log P) and `center_norm_KIND`.

    An entropy is left out where nothing was counted.

    Args:
        kinds: of the loss.
        sums: [kinds, 2] of `target_entropies`, summed over ranks.
        centers: [kinds, P]
    """
    values = {}
    for kind, (total, count), norm in zip(kinds, sums, centers.norm(dim=1).tolist(), strict=True):
        if count:
            values[f"teacher_entropy_{kind}"] = total / count
        values[f"center_norm_{kind}"] = norm
    return values


@dataclass(frozen=True, slots=True)
class _Sign:
    key: str
    """Of the logged value"""
    below: bool
    """Bad are values below the bound, or those from it on"""
    bound: float
    advice: str
    after_warmup: bool = False
    """Says something only once the teacher's temperature has reached its end"""

    def is_bad(self, value: float) -> bool:
        return value < self.bound if self.below else value >= self.bound


class CollapseWatch:
    """Warns once per episode: begun when `LINES` logged lines in a row show a sign, over when as many don't.

    Args:
        config: of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._temperature = config.loss.teacher_temperature[1]
        self._signs = _signs(config)
        self._seen: dict[tuple[str, bool], deque[bool]] = {
            (sign.key, sign.below): deque(maxlen=LINES) for sign in self._signs
        }
        self._under_way: set[tuple[str, bool]] = set()

    def look(self, values: dict[str, Any]) -> None:
        """At the values of a logged line."""
        warmed_up = math.isclose(values["teacher_temperature"], self._temperature)
        for sign in self._signs:
            if sign.key not in values or (sign.after_warmup and not warmed_up):
                continue
            episode = sign.key, sign.below
            seen = self._seen[episode]
            seen.append(sign.is_bad(values[sign.key]))
            if len(seen) < LINES:
                continue
            side = f"{'below' if sign.below else 'at or above'} {sign.bound:g} for {LINES} logged lines"
            if all(seen) and episode not in self._under_way:
                self._under_way.add(episode)
                log.warning("step %d: %s=%.3f, %s: %s", values["step"], sign.key, values[sign.key], side, sign.advice)
            elif not any(seen) and episode in self._under_way:
                self._under_way.remove(episode)
                log.info("step %d: %s=%.3f, no longer %s", values["step"], sign.key, values[sign.key], side)


def _signs(config: TrainConfig) -> list[_Sign]:
    kinds = ("cls", "patch", "region") if config.region.enabled else ("cls", "patch")
    signs = []
    for kind in kinds:
        key = f"teacher_entropy_{kind}"
        signs.append(
            _Sign(
                key,
                False,
                UNIFORM,
                "the teacher's targets are all but uniform, so nothing is learned from them; start a new run with a "
                f"lower --loss.teacher-temperature (now {config.loss.teacher_temperature}) or a lower --optim.base-lr",
                after_warmup=True,
            )
        )
        signs.append(
            _Sign(
                key,
                True,
                ONE_PROTOTYPE,
                "each of the teacher's targets is one prototype; start a new run with a higher "
                f"--loss.teacher-temperature (now {config.loss.teacher_temperature}), a faster "
                "centre (--loss.center-momentum) or a lower --optim.base-lr",
            )
        )
    if config.region.enabled:
        signs.append(
            _Sign(
                "region_valid_frac",
                True,
                FEW_REGIONS,
                "few regions are seen by both views, so the region loss rests on few images; start a "
                f"new run with a lower --region.threshold (now {config.region.threshold:g}), more "
                "--views.seeds-per-image, or --views.seed-policy visible",
            )
        )
    return signs
