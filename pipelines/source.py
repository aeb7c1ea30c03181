"""What one rank renders at a global step: the encoded images and the plan, as a pure function of the step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crisp.pipelines.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One rank's share of one step. B is the same for every step of a rank."""

    encoded: list[memoryview]
    """B encoded images"""
    plan: Plan
    label: NDArray[np.int64]
    """[B]"""
