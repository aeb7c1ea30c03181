"""Entropies of targets made by hand, and when a warning is given."""

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from crisp.config import LossConfig
from crisp.losses import CrispLoss, LossTerms
from crisp.models.student_teacher import TeacherProjections
from crisp.recipes import demo
from crisp.training.collapse import LINES, ROWS, CollapseWatch, named_values, target_entropies
from crisp.training.step import StepMetrics

P, D, B, K = 32, 8, 5, 3


def metrics_of(gain: float, valid: torch.Tensor) -> StepMetrics:
    """A step whose logits grow with `gain`."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(P, D, generator=generator) * gain
    region = torch.randn(2, B, K, D, generator=generator)
    region[:, ~valid] = torch.nan
    zero = torch.zeros(())
    return StepMetrics(
        terms=LossTerms(cls=zero, patch=zero, region=zero, total=zero),
        regions=torch.zeros(4),
        skipped=torch.tensor(False),
        gradient_norms=torch.ones(1),
        teacher=TeacherProjections(
            cls=torch.randn(2, B, D, generator=generator),
            patch=torch.randn(ROWS + 50, D, generator=generator),
            region=region,
            prototypes={"cls": prototypes, "patch": prototypes, "region": prototypes},
            patch_sum=torch.zeros(D),
            patch_count=0,
        ),
        valid=valid,
    )


def test_entropies_are_those_of_the_targets() -> None:
    valid = torch.zeros(B, K, dtype=torch.bool)
    valid[1, 2] = valid[4, 0] = True
    metrics, loss = metrics_of(1.0, valid), CrispLoss(LossConfig(), views=4, prototypes=P, region=True)
    loss.centers.copy_(torch.randn(3, P, generator=torch.Generator().manual_seed(1)))
    sums = target_entropies(metrics, loss, temperature=0.5)
    assert sums[:, 1].tolist() == [2 * B, ROWS, 2 * 2]
    assert metrics.teacher is not None
    rows = metrics.teacher.cls.flatten(0, 1) @ metrics.teacher.prototypes["cls"].T
    targets = torch.distributions.Categorical(logits=(rows - loss.centers[0]) / 0.5)
    values = named_values(loss.kinds, sums.tolist(), loss.centers)
    assert values["teacher_entropy_cls"] == pytest.approx(float(targets.entropy().mean()) / math.log(P), rel=1e-5)
    assert values["center_norm_region"] == pytest.approx(float(loss.centers[2].norm()))
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize(("gain", "expected"), [(0.0, 1.0), (1e4, 0.0)])
def test_the_two_collapses_are_at_the_ends_of_the_scale(gain: float, expected: float) -> None:
    metrics = metrics_of(gain, torch.zeros(B, K, dtype=torch.bool))
    loss = CrispLoss(LossConfig(), views=4, prototypes=P, region=True)
    values = named_values(loss.kinds, target_entropies(metrics, loss, temperature=0.04).tolist(), loss.centers)
    assert values["teacher_entropy_cls"] == pytest.approx(expected, abs=1e-3)
    assert "teacher_entropy_region" not in values, "nothing was counted"


def feed(watch: CollapseWatch, lines: int, **values: Any) -> None:
    healthy = {"teacher_temperature": 0.04, "teacher_entropy_cls": 0.5, "region_valid_frac": 0.4, "step": 1}
    for _ in range(lines):
        watch.look(healthy | values)


def test_one_warning_per_episode(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        watch = CollapseWatch(demo())
        feed(watch, LINES - 1, teacher_entropy_cls=0.995)
        feed(watch, 1)
        assert not caplog.records, "not all in a row"
        for _ in range(2):
            feed(watch, 3 * LINES, teacher_entropy_cls=0.995)
            feed(watch, LINES)
    assert len(caplog.records) == 2
    assert "teacher_entropy_cls=0.995" in caplog.text
    assert "all but uniform" in caplog.text
    assert "--loss.teacher-temperature" in caplog.text


@pytest.mark.parametrize(
    ("values", "words"),
    [({"teacher_entropy_cls": 0.001}, "one prototype"), ({"region_valid_frac": 0.02}, "--region.threshold")],
)
def test_each_sign_has_its_advice(values: dict[str, float], words: str, caplog: pytest.LogCaptureFixture) -> None:
    feed(CollapseWatch(demo()), LINES, **values)
    (record,) = caplog.records
    assert words in record.getMessage()


def test_uniform_targets_mean_nothing_before_the_temperature_has_warmed_up(caplog: pytest.LogCaptureFixture) -> None:
    config = replace(demo(), loss=LossConfig(teacher_temperature=(0.04, 0.07)))
    feed(CollapseWatch(config), 3 * LINES, teacher_entropy_cls=1.0)
    assert not caplog.records
