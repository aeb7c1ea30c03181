"""A median, and how sure one can be of it without assuming anything of the distribution."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A median and two of the values that enclose the true one."""

    median: float
    low: float
    high: float
    confidence: float
    """Chance that the interval holds the true median, if the values are independent"""

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}–{self.high:.3g})"


def median_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The k-th smallest and the k-th largest value, for the largest k that is sure enough.

    A value lies below the true median as often as above: the interval misses it when fewer than k values lie on one of
    the sides, which is a matter of coin flips. Fewer than 6 values never reach 95 %: then it goes from the least to the
    greatest, and says how sure that is.

    Args:
        values: measured; one or more.
        confidence: wanted, between 0 and 1.
    """
    ordered, n = sorted(values), len(values)
    k = 1
    while 2 * (k + 1) <= n and _coverage(n, k + 1) >= confidence:
        k += 1
    return Interval(
        median=statistics.median(ordered), low=ordered[k - 1], high=ordered[n - k], confidence=_coverage(n, k)
    )


def _coverage(n: int, k: int) -> float:
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
