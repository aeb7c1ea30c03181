"""Multinomial logistic regression by L-BFGS with scikit-learn's objective, on the device and over several ranks.

    mean cross-entropy + |weight|² / (2 · C · n)

The bias is not penalised. Rows are taken in chunks, so that what is held beside the features is small; the sums of the
loss and of its gradient are in float64.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.distributed import sum_over_ranks
from crisp.errors import CrispError
from crisp.evals.segmentation.lbfgs import minimise
from crisp.evals.segmentation.neighbours import rows
from crisp.evals.segmentation.precision import exact_products

log = logging.getLogger(__name__)

C_GRID: tuple[float, ...] = tuple((10 ** np.linspace(-6, 5, 8)).tolist())
"""CAPI's grid"""
MAX_ITER = 1000
TOL = 1e-12
HISTORY = 5
LINE_SEARCH = 50
CHUNK_LOGITS = 2**21
"""Logits held at once: 8 MB in float32"""
DEPENDENT = 1e-9
"""Share of the largest curvature below which a direction is scaled no further: features that depend on each other"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogisticModel:
    """A fitted classifier: the class of a feature is the one with the largest weight · feature + bias."""

    weight: Tensor
    """[C, D] float64; 0 for a class without examples"""
    bias: Tensor
    """[C] float64; −∞ for a class without examples, so that it is never predicted"""
    loss: float
    """The objective, penalty included"""
    iterations: int

    @torch.no_grad()
    def predict(self, features: Tensor | NDArray[np.floating]) -> Tensor:
        """Class [n] int64 of features [n, D], the first of equally likely ones; computed where the model is.

        The result is on the CPU.
        """
        device = self.weight.device
        predicted = []
        with exact_products(device):
            for start in range(0, len(features), step := _chunk_rows(len(self.bias))):
                part = rows(features, start, start + step).to(device)
                logits = torch.addmm(self.bias.to(part.dtype), part, self.weight.to(part.dtype).T)
                predicted.append(logits.argmax(dim=1).cpu())
        return torch.cat(predicted) if predicted else torch.empty(0, dtype=torch.int64)


@torch.no_grad()
def fit_logistic(
    features: Tensor | NDArray[np.floating],
    targets: Tensor,
    *,
    classes: int,
    c: float,
    max_iter: int = MAX_ITER,
    tol: float = TOL,
    history: int = HISTORY,
    line_search: int = LINE_SEARCH,
    start: LogisticModel | None = None,
    device: torch.device | None = None,
) -> LogisticModel:
    """Fit a classifier to n features.

    As scikit-learn does, only classes that occur are fitted, and if there are two of them, they share one weight vector
    (that of the smaller label is 0). With one class, nothing is fitted. Under torchrun every rank gives its own rows,
    possibly none, and gets the same model.

    Args:
        features: [n, D] float32 (float64: all in float64), finite, or an array such as a memory map. Each of some
            thousand evaluations reads them: have them on the device if they fit.
        targets: [n] int64 in [0, classes).
        classes: number of classes C.
        c: inverse strength of the penalty.
        max_iter: iterations at most.
        tol: of the largest component of the gradient.
        history: pairs that stand for the second derivative.
        line_search: evaluations per iteration at most.
        start: a model to start from; zero if not given. For the same set of classes.
        device: where to compute; that of the features if not given.

    Raises:
        CrispError: no rows, a target out of range, features that are not finite, numbers that do not fit each other.
    """
    if not (c > 0 and math.isfinite(c)):
        raise CrispError(f"c={c}: the inverse strength of the penalty must be positive")
    if features.ndim != 2 or len(features) != len(targets):
        raise CrispError(
            f"features of shape {tuple(features.shape)} with {len(targets)} targets: give one row for each target"
        )
    if device is None:
        device = features.device if isinstance(features, Tensor) else torch.device("cpu")
    dtype = torch.float64 if features.dtype in (torch.float64, np.float64) else torch.float32
    counts = _count(features, targets, classes, device)
    present = counts.nonzero()[:, 0]
    width = features.shape[1]
    weight = torch.zeros(classes, width, dtype=torch.float64, device=device)
    bias = torch.full((classes,), -torch.inf, dtype=torch.float64, device=device)
    bias[present] = 0.0
    if len(present) == 1:
        return LogisticModel(weight=weight, bias=bias, loss=0.0, iterations=0)

    free = present[1:] if len(present) == 2 else present
    position = torch.zeros(classes, dtype=torch.int64, device=device)
    position[present] = torch.arange(len(present), device=device)
    objective = _Objective(
        features, position[targets.to(device)], rows_in_all=int(counts.sum()), classes=len(present), c=c, dtype=dtype
    )
    begin = torch.zeros(len(free), width + 1, dtype=torch.float64, device=device)
    if start is not None:
        if start.weight.shape != weight.shape or not torch.equal(start.bias.isfinite().to(device), bias.isfinite()):
            raise CrispError("start: a model of other classes or another width; start from zero")
        given = torch.cat([start.weight, start.bias[:, None]], dim=1).to(device)
        begin = given[free] - (given[present[:1]] if len(present) == 2 else 0)
    with exact_products(device):
        scale = objective.scale()
        found = minimise(
            lambda point: objective.scaled(point, scale), torch.linalg.solve(scale, begin, left=False).flatten(),
            max_iter=max_iter, tol=tol, history=history, line_search=line_search,
            noise=torch.finfo(dtype).eps,
        )  # fmt: skip
    fitted = found.point.view(len(free), width + 1) @ scale
    weight[free], bias[free] = fitted[:, :-1], fitted[:, -1]
    log.info(
        "logistic regression, C=%g: loss %.6f after %d iterations (%s)", c, found.value, found.iterations, found.reason
    )
    return LogisticModel(weight=weight, bias=bias, loss=found.value, iterations=found.iterations)


class _Objective:
    """The loss of all ranks' rows as a function of F weight vectors; F = 1 for two classes, else their number."""

    def __init__(
        self,
        features: Tensor | NDArray[np.floating],
        targets: Tensor,
        *,
        rows_in_all: int,
        classes: int,
        c: float,
        dtype: torch.dtype,
    ) -> None:
        self._features, self._targets, self._dtype = features, targets, dtype
        self._rows_in_all, self._classes, self._c = rows_in_all, classes, c
        self._width = features.shape[1]

        self._free = 1 if classes == 2 else classes
        self._device = targets.device

    def scale(self) -> Tensor:
        """[D+1, D+1] such that parameters = point @ scale have about the same curvature in all directions at zero.

        The second derivative at zero is, per class, that of the features' second moments, plus the penalty. Steps along
        its axes need tens of iterations where steps along the features' own, which depend on each other, need hundreds
        or thousands: with those, neither this search nor scikit-learn's is at the minimum after 1000.
        """
        moments = torch.zeros(self._width + 1, self._width + 1, dtype=torch.float64, device=self._device)
        for part, _ in self._chunks():
            part = torch.cat([part, part.new_ones(len(part), 1)], dim=1)
            moments += part.T @ part
        curvature = sum_over_ranks(moments) / (self._rows_in_all * self._classes)
        curvature[:-1].diagonal().add_(1 / (self._c * self._rows_in_all))
        values, axes = torch.linalg.eigh(curvature)
        return axes.T / values.clamp_min(float(values[-1]) * DEPENDENT).sqrt()[:, None]

    def scaled(self, point: Tensor, scale: Tensor) -> tuple[float, Tensor]:
        """Value and gradient at a point in the coordinates of `scale`, flat as `minimise` has them."""
        value, gradient = self(point.view(self._free, -1) @ scale)
        return value, (gradient @ scale.T).flatten()

    def __call__(self, parameters: Tensor) -> tuple[float, Tensor]:
        """Value, and gradient [F, D+1], at weights and biases [F, D+1] float64."""
        weight, bias = parameters[:, :-1].to(self._dtype), parameters[:, -1].to(self._dtype)
        sums = torch.zeros(1 + parameters.numel(), dtype=torch.float64, device=self._device)
        gradient = sums[1:].view_as(parameters)
        for part, targets in self._chunks():
            logits = torch.addmm(bias, part, weight.T)
            if self._free == 1:
                logits = torch.cat([torch.zeros_like(logits), logits], dim=1)  # [r, 2]
            log_chances = logits.log_softmax(dim=1)
            sums[0] -= log_chances.gather(1, targets).sum(dtype=torch.float64)
            slope = log_chances.exp_()  # d loss / d logits
            slope.scatter_add_(1, targets, slope.new_full((1, 1), -1.0).expand(len(targets), 1))
            slope = slope[:, -self._free :]
            gradient[:, :-1] += slope.T @ part
            gradient[:, -1] += slope.sum(dim=0, dtype=torch.float64)
        sums = sum_over_ranks(sums) / self._rows_in_all
        strength = 1 / (self._c * self._rows_in_all)
        gradient = sums[1:].view_as(parameters)
        gradient[:, :-1] += strength * parameters[:, :-1]
        return float(sums[0] + strength / 2 * parameters[:, :-1].square().sum()), gradient

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [r, D] and targets [r, 1] of some rows."""
        for start in range(0, len(self._targets), step := _chunk_rows(self._classes)):
            part = rows(self._features, start, start + step).to(self._device, self._dtype, non_blocking=True)
            yield part, self._targets[start : start + step, None]


def _chunk_rows(classes: int) -> int:
    return max(1, CHUNK_LOGITS // classes)


def _count(features: Tensor | NDArray[np.floating], targets: Tensor, classes: int, device: torch.device) -> Tensor:
    """[C] examples of each class over all ranks; mistakes of any rank are raised on all."""
    outside = (targets < 0) | (targets >= classes)
    odd = 0
    for start in range(0, len(features), step := _chunk_rows(1)):
        odd += int((~rows(features, start, start + step).isfinite().all(dim=1)).sum())
    found = targets[~outside].bincount(minlength=classes).to(device)
    wrong = torch.tensor([int(outside.sum()), odd], device=device)
    totals = sum_over_ranks(torch.cat([wrong, found]))
    if totals[0]:
        raise CrispError(
            f"{int(totals[0])} targets lie outside 0 to {classes - 1}; drop rows with ignored labels first"
        )
    if totals[1]:
        raise CrispError(
            f"{int(totals[1])} features are not finite, so the backbone has diverged; evaluate an earlier checkpoint"
        )
    if not totals[2:].any():
        raise CrispError("no rows: there is nothing to fit; give a training set with labels that are not ignored")
    return totals[2:]
