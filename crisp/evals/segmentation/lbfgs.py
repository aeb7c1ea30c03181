"""L-BFGS with a strong Wolfe line search, for a smooth function whose gradient is given.

Nocedal and Wright, Numerical Optimization, algorithms 7.4, 7.5, 3.5 and 3.6; the acceptance at the limit of precision
is Hager and Zhang's (2005, "approximate Wolfe"). `torch.optim.LBFGS` has the same method, but a line search of 25
evaluations that cannot be changed, and it compares values that differ by less than their error: here the vectors are
float64 even where the function is computed in float32, and below that error the gradient decides.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[float, Tensor]]
"""[P] float64 → value, gradient [P] float64"""

ARMIJO = 1e-4
CURVATURE = 0.9
FLAT = 64 * 2.0**-52
"""Decrease, relative to max(1, |value|), that no longer counts: SciPy's factor as scikit-learn sets it"""
PATIENCE = 5
"""Iterations without a decrease that counts, after which the value is flat"""
WIDEST = 10.0
"""The farthest that a step is stretched at once"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Minimum:
    """Where the search ended, and why."""

    point: Tensor
    """[P] float64"""
    value: float
    iterations: int
    reason: Literal["gradient", "flat", "iterations"]
    """No component of the gradient exceeds the tolerance; the value can no longer be lowered; the limit was reached"""


@dataclass(frozen=True, slots=True)
class _Trial:
    """A point on the line: how far, the value there, the gradient, and the gradient along the line."""

    step: float
    value: float
    gradient: Tensor
    slope: float


def minimise(
    function: Function,
    start: Tensor,
    *,
    max_iter: int,
    tol: float,
    history: int,
    line_search: int,
    noise: float = 0.0,
) -> Minimum:
    """The minimum of a function, or the best of `max_iter` iterations. Deterministic if the function is.

    Args:
        function: value and gradient at a point.
        start: [P] float64.
        max_iter: iterations at most.
        tol: of the largest component of the gradient.
        history: pairs of steps and changes of the gradient that stand for the second derivative.
        line_search: evaluations per iteration at most.
        noise: relative error of the function's values; differences below it are decided by the gradient.
    """
    point = start
    value, gradient = function(point)
    best_value, best_point, since_best = value, point, 0
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=history)  # step, change of gradient, their product
    for iteration in range(max_iter):
        if float(gradient.abs().max()) <= tol:
            return Minimum(point=point, value=value, iterations=iteration, reason="gradient")
        trial = None
        if pairs:
            direction = _direction(gradient, pairs)
            trial = _along(function, point, direction, value, gradient, 1.0, line_search, noise)
            if trial is None:
                pairs.clear()  # what they say of the curvature is wrong here
        if trial is None:
            direction = -gradient
            first = 1.0 / float(torch.linalg.vector_norm(gradient))
            trial = _along(function, point, direction, value, gradient, first, line_search, noise)
        if trial is None:
            return Minimum(point=best_point, value=best_value, iterations=iteration, reason="flat")
        step, change = direction * trial.step, trial.gradient - gradient
        product = float(step @ change)
        if product > 2.0**-52 * float(change @ change):
            pairs.append((step, change, product))
        point, value, gradient = point + step, trial.value, trial.gradient
        since_best += 1
        if value < best_value - FLAT * max(1.0, abs(best_value)):
            since_best = 0
        if value < best_value:
            best_value, best_point = value, point
        if since_best >= PATIENCE:
            return Minimum(point=best_point, value=best_value, iterations=iteration + 1, reason="flat")
    return Minimum(point=best_point, value=best_value, iterations=max_iter, reason="iterations")


def _direction(gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Minus the inverse second derivative that the pairs stand for, times the gradient."""
    direction, weights = -gradient, []
    for step, change, product in reversed(pairs):
        weights.append(float(step @ direction) / product)
        direction = direction - weights[-1] * change
    _, change, product = pairs[-1]
    direction = direction * (product / float(change @ change))
    for (step, change, product), weight in zip(pairs, reversed(weights), strict=True):
        direction = direction + (weight - float(change @ direction) / product) * step
    return direction


def _along(
    function: Function,
    point: Tensor,
    direction: Tensor,
    value: float,
    gradient: Tensor,
    first: float,
    limit: int,
    noise: float,
) -> _Trial | None:
    """A step along the direction that lowers the value enough, or None.

    `low` is the lowest trial so far that lowers it at all; a minimum lies between it and `high`, once there is one.
    """
    start = _Trial(0.0, value, gradient, float(gradient @ direction))
    if not start.slope < 0:
        return None
    low, high, step = start, None, first
    for _ in range(limit):
        there, slope_vector = function(point + direction * step)
        trial = _Trial(step, there, slope_vector, float(slope_vector @ direction))
        if _accepted(trial, start, noise):
            return trial
        enough = trial.value <= start.value + ARMIJO * step * start.slope
        if not enough or trial.value >= low.value:  # not finite values end here, too
            high = trial
        elif high is None:
            low, high = (trial, low) if trial.slope >= 0 else (trial, None)
        else:
            if trial.slope * (high.step - low.step) >= 0:
                high = low
            low = trial
        step = _stretched(low) if high is None else _between(low, high)
        if high is not None and step in (low.step, high.step):
            break  # no number lies between them
    return low if low.value < start.value else None


def _accepted(trial: _Trial, start: _Trial, noise: float) -> bool:
    if not (math.isfinite(trial.value) and math.isfinite(trial.slope)):
        return False
    if trial.value <= start.value + ARMIJO * trial.step * start.slope:
        return abs(trial.slope) <= CURVATURE * -start.slope
    # Values differ by less than their error: the gradient, which is more precise there, must have fallen well.
    as_low = trial.value <= start.value + noise * abs(start.value)
    return as_low and CURVATURE * start.slope <= trial.slope <= (2 * ARMIJO - 1) * start.slope


def _stretched(low: _Trial) -> float:
    return low.step * WIDEST if low.step > 0 else WIDEST


def _between(low: _Trial, high: _Trial) -> float:
    """The minimum of the cubic through both, kept off the ends; the middle where there is none."""
    width = high.step - low.step
    middle = low.step + width / 2
    if middle in (low.step, high.step):
        return middle
    if not (math.isfinite(high.value) and math.isfinite(high.slope)):
        return low.step + width / 10
    a = low.slope + high.slope - 3 * (high.value - low.value) / width
    inside = a * a - low.slope * high.slope
    if inside < 0:
        return middle
    root = math.copysign(math.sqrt(inside), width)
    below = high.slope - low.slope + 2 * root
    if below == 0:
        return middle
    step = high.step - width * (high.slope + root - a) / below
    nearest, farthest = sorted((low.step + 0.1 * width, low.step + 0.9 * width))
    return min(max(step, nearest), farthest) if math.isfinite(step) else middle
