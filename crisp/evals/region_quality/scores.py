"""From the measures of all regions to scores.

Axes: N images, K regions of each, G settings, W warp modes, 3 kinds of regions, 7 measures.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from crisp.evals.region_quality.discovery import Discovery
from crisp.evals.region_quality.measures import MEASURES, UNDEFINED
from crisp.evals.results import Score

KINDS = ("found", "blob", "scattered")
"""Discovered regions; random ones of the same seeds and sizes, connected and not"""
GAINS = ("purity", "overlap")
"""Measures whose gain over connected random regions is a score of its own, `purity-gain`"""
VALID = "valid"
"""The share of regions that both views show, beside `MEASURES`"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Measures of all regions of N images."""

    measures: NDArray[np.float32]
    """[N, 3, G, K, 7], see `measure`"""
    valid: NDArray[np.uint8]
    """[N, 3, G, W, K]: 1 where both views show at least t patches"""


def scores_of(outcome: Outcome, discovery: Discovery) -> Iterator[Score]:
    """Means over all regions for which a measure is defined, in percent; discovered regions first."""
    for kind, regions in enumerate(KINDS):
        for g, setting in enumerate(discovery.settings):
            told = {"regions": regions, **asdict(setting)}
            for m, name in enumerate(MEASURES):
                values = outcome.measures[:, kind, g, :, m].astype(np.float64)
                defined = values != UNDEFINED
                if defined.any():
                    yield Score(metric=name, value=100 * float(values[defined].mean()), settings=told)
            for w, mode in enumerate(discovery.warp_modes):
                share = float(outcome.valid[:, kind, g, w].mean(dtype=np.float64))
                yield Score(metric=VALID, value=100 * share, settings={**told, "warp_mode": mode})
    for g, setting in enumerate(discovery.settings):
        for name in GAINS:
            found, blob = (outcome.measures[:, kind, g, :, MEASURES.index(name)] for kind in (0, 1))
            gain, error = mean_gain(found.astype(np.float64), blob.astype(np.float64))
            if gain is not None:
                told = {"regions": "found", "against": "blob", **asdict(setting)}
                yield Score(
                    metric=f"{name}-gain", value=100 * gain, std=None if error is None else 100 * error, settings=told
                )


def mean_gain(found: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Mean over images of their mean difference, and its standard error: regions of one image are not independent.

    Args:
        found: [N, K] a measure, or `UNDEFINED`, in both at the same places.
        other: [N, K].

    Returns:
        None for what cannot be told: the mean without a single image, the error with one.
    """
    defined = found != UNDEFINED
    counts = defined.sum(1)
    sums = np.where(defined, found - other, 0).sum(1)
    gains = sums[counts > 0] / counts[counts > 0]
    if not len(gains):
        return None, None
    error = float(gains.std(ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else None
    return float(gains.mean()), error
