"""Every value that changes while a run goes on, as a pure function of the step."""

import math
from dataclasses import dataclass

from crisp.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSchedule:
    """The scheduled values of one optimiser step."""

    step: int
    """Global, from 0"""
    learning_rate: float
    weight_decay: float
    ema_momentum: float
    teacher_temperature: float
    last_layer_frozen: bool


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """`start` at step 0, towards `end` at step `steps` (which the run does not reach)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def learning_rate_at(step: int, *, peak: float, end: float, warmup_steps: int, steps: int) -> float:
    """Linear from 0 at step 0 to `peak` at the last warm-up step, then cosine to `end`."""
    if step < warmup_steps:
        return peak * step / max(warmup_steps - 1, 1)
    return cosine(peak, end, step - warmup_steps, max(steps - warmup_steps, 1))


def teacher_temperature_at(epoch: int, *, start: float, end: float, warmup_epochs: int) -> float:
    """Linear over the warm-up and reaching `end` in its last epoch; constant within an epoch."""
    if epoch >= warmup_epochs - 1:
        return end
    return start + (end - start) * epoch / (warmup_epochs - 1)


def schedule_at(config: TrainConfig, *, step: int, steps_per_epoch: int) -> StepSchedule:
    """All schedules of a run at a global step (0-based)."""
    optim, loss = config.optim, config.loss
    steps = optim.epochs * steps_per_epoch
    epoch = step // steps_per_epoch
    return StepSchedule(
        step=step,
        learning_rate=learning_rate_at(
            step,
            peak=optim.base_lr * optim.global_batch / 256,
            end=optim.min_lr,
            warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
            steps=steps,
        ),
        weight_decay=cosine(*optim.weight_decay, step, steps),
        ema_momentum=cosine(*optim.ema_momentum, step, steps),
        teacher_temperature=teacher_temperature_at(
            epoch,
            start=loss.teacher_temperature[0],
            end=loss.teacher_temperature[1],
            warmup_epochs=loss.teacher_temperature_warmup_epochs,
        ),
        last_layer_frozen=epoch < optim.freeze_last_layer_epochs,
    )
