"""Thinning keeps what is extreme; counters that begin again are added up."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crisp.report.curves import Curve, curve_of, rounded, running_mean, thin, total_of_restarting

VALUES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=300)


@given(VALUES, st.integers(5, 100))
def test_a_thinned_curve_is_short_and_keeps_its_ends_and_extremes(values: list[float | None], limit: int) -> None:
    curve = Curve(list(range(len(values))), values)
    thinned = thin(curve, limit)
    assert len(thinned) <= max(limit, 1)
    assert [values[int(step)] for step in thinned.steps] == list(thinned.values), "a point that was not there"
    assert list(thinned.steps) == sorted(set(thinned.steps))
    assert (thinned.steps[0], thinned.steps[-1]) == (0, len(values) - 1)
    if numbers := curve.finite:
        assert min(thinned.finite) == min(numbers)
        assert max(thinned.finite) == max(numbers)
    assert (None in thinned.values) == (None in values), "gaps stay"


def test_one_spike_in_a_million_steps_stays() -> None:
    values: list[float | None] = [1.0] * 1_000_000
    values[654_321] = 99.0
    thinned = thin(Curve(range(1_000_000), values), 2000)
    assert len(thinned) <= 2000
    assert thinned.values[list(thinned.steps).index(654_321)] == 99.0


def test_what_is_no_number_becomes_a_gap() -> None:
    lines = [{"step": 1, "loss": 3}, {"step": 2, "loss": math.nan}, {"step": 3}, {"step": 4, "loss": math.inf}]
    assert curve_of(lines, "loss") == Curve([1, 2, 4], [3.0, None, None])


def test_running_mean_is_that_of_its_window() -> None:
    curve = Curve([1, 2, 3, 4, 5], [1.0, None, 3.0, 5.0, None])
    assert running_mean(curve, 3).values == [1.0, 2.0, 4.0, 4.0, 5.0]
    assert running_mean(Curve([1, 2, 3], [None, None, 6.0]), 1).values == [None, None, 6.0]


@pytest.mark.parametrize(
    ("readings", "total"), [([], 0), ([0, 2, 2, 5], 5), ([3, 1, 4], 7), ([2, None, 2], 2), ([4, 0, 0, 4], 8)]
)
def test_counter_that_restarts(readings: list[float | None], total: int) -> None:
    assert total_of_restarting(readings) == total


def test_rounded() -> None:
    assert rounded(123456.7) == 123460
    assert rounded(1.23456789e-8) == 1.2346e-8
    assert rounded(None) is None
