"""Schedules against iBOT's arrays, built whole."""

import numpy as np
import pytest

from crisp.config import LossConfig, OptimConfig, TrainConfig
from crisp.schedules import schedule_at


def ibot_cosine(base: float, final: float, epochs: int, per_epoch: int, warmup_epochs: int = 0) -> np.ndarray:
    """The whole schedule as an array: linear warm-up from 0, then half a cosine."""
    warmup = np.linspace(0, base, warmup_epochs * per_epoch)
    steps = np.arange(epochs * per_epoch - warmup_epochs * per_epoch)
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))])


def test_every_step_equals_the_arrays() -> None:
    per_epoch, epochs = 7, 20
    config = TrainConfig(
        optim=OptimConfig(epochs=epochs, global_batch=64, base_lr=1e-3, min_lr=1e-6, warmup_epochs=3),
        loss=LossConfig(teacher_temperature_warmup_epochs=5),
    )
    rows = [schedule_at(config, step=step, steps_per_epoch=per_epoch) for step in range(per_epoch * epochs)]
    peak = 1e-3 * 64 / 256
    np.testing.assert_allclose(
        [r.learning_rate for r in rows], ibot_cosine(peak, 1e-6, epochs, per_epoch, 3), rtol=1e-12
    )
    np.testing.assert_allclose([r.weight_decay for r in rows], ibot_cosine(0.04, 0.4, epochs, per_epoch), rtol=1e-12)
    np.testing.assert_allclose([r.ema_momentum for r in rows], ibot_cosine(0.996, 1.0, epochs, per_epoch), rtol=1e-12)
    temperatures = np.concatenate([np.linspace(0.04, 0.07, 5), np.full(epochs - 5, 0.07)])
    np.testing.assert_allclose([r.teacher_temperature for r in rows], temperatures.repeat(per_epoch), rtol=1e-12)
    assert [r.last_layer_frozen for r in rows] == [True] * per_epoch + [False] * per_epoch * (epochs - 1)


def test_rate_starts_at_zero_and_peaks_at_the_last_warmup_step() -> None:
    config = TrainConfig(optim=OptimConfig(epochs=20, warmup_epochs=2))
    assert schedule_at(config, step=0, steps_per_epoch=10).learning_rate == 0
    assert schedule_at(config, step=19, steps_per_epoch=10).learning_rate == pytest.approx(5e-4)


@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_short_temperature_warmup_is_at_its_end_at_once(warmup_epochs: int) -> None:
    config = TrainConfig(loss=LossConfig(teacher_temperature_warmup_epochs=warmup_epochs))
    assert schedule_at(config, step=0, steps_per_epoch=10).teacher_temperature == 0.07
