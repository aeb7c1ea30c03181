"""Curves that are short enough for a page and still show what is extreme."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_POINTS = 2000
"""Of a curve on the page"""
_PER_BUCKET = 5
_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over steps, equally many; None where a value was not finite."""

    steps: Sequence[int | float]
    values: Sequence[float | None]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if value is not None]


def curve_of(lines: Iterable[Mapping[str, Any]], key: str) -> Curve:
    """One value of lines like those of metrics.jsonl; lines without it are passed over."""
    steps: list[int | float] = []
    values: list[float | None] = []
    for line in lines:
        value = line.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            steps.append(line["step"])
            values.append(float(value) if math.isfinite(value) else None)
    return Curve(steps, values)


def thin(curve: Curve, limit: int = MOST_POINTS) -> Curve:
    """At most `limit` points: of each stretch the first, the last, the lowest, the highest, and one that is no number.

    What is left out lies between points that are shown, so no spike and no gap is lost.
    """
    if len(curve) <= limit:
        return curve
    buckets = max(1, limit // _PER_BUCKET)
    kept: list[int] = []
    for number in range(buckets):
        places = range(number * len(curve) // buckets, (number + 1) * len(curve) // buckets)
        numbers = [(value, i) for i in places if (value := curve.values[i]) is not None]
        chosen = {places[0], places[-1]}
        if numbers:
            chosen |= {min(numbers)[1], max(numbers)[1]}
        chosen |= set([i for i in places if curve.values[i] is None][:1])
        kept += sorted(chosen)
    return Curve([curve.steps[i] for i in kept], [curve.values[i] for i in kept])


def rounded(value: float | None) -> float | None:
    """Five significant digits: what a chart can tell apart."""
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def total_of_restarting(values: Iterable[float | None]) -> int:
    """Sum of a counter that begins again at 0 with each process, from its readings in order."""
    total, before = 0, 0
    for value in values:
        if value is None:
            continue
        total += int(value) - (before if value >= before else 0)
        before = int(value)
    return total


def running_mean(curve: Curve, window: int) -> Curve:
    """Mean of the `window` values around each, of the numbers among them; None where there is none."""
    sums, counts = [0.0], [0]
    for value in curve.values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    before, last = (window - 1) // 2, len(curve)
    means: list[float | None] = []
    for i in range(last):
        low, high = max(0, i - before), min(last, i - before + window)
        count = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / count if count else None)
    return Curve(curve.steps, means)
