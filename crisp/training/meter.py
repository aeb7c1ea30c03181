"""What a run measures between two logged lines."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from crisp.batch import Batch
from crisp.distributed import sum_over_ranks
from crisp.pipelines.loader import TrainLoader
from crisp.schedules import StepSchedule
from crisp.training.collapse import named_values, target_entropies
from crisp.training.state import TrainState
from crisp.training.step import StepMetrics


class Meter:
    """Sums metrics on the device between two logged lines, and times them."""

    def __init__(self, state: TrainState, loader: TrainLoader) -> None:
        self._state, self._loader = state, loader
        self._last: StepMetrics | None = None
        self._reset()

    def _reset(self) -> None:
        self._steps, self._wait_s, self._began_s = 0, 0.0, time.perf_counter()
        self._sums = torch.zeros(9, device=self._state.world.device)

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time spent waiting for them counted."""
        while True:
            asked_s = time.perf_counter()
            batch = next(batches)
            self._wait_s += time.perf_counter() - asked_s
            yield batch

    def add(self, metrics: StepMetrics) -> None:
        """A step's metrics; nothing is read from the device."""
        terms = metrics.terms
        losses = torch.stack([torch.ones_like(terms.total), terms.total, terms.cls, terms.patch, terms.region])
        # A step may be skipped for its gradients alone: float16's, while the scaler looks for its scale.
        self._sums += torch.cat([torch.where(losses.isfinite().all(), losses, 0), metrics.regions])
        self._steps += 1
        self._last = metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no part of the steps' time."""
        began_s = time.perf_counter()
        yield
        self._began_s += time.perf_counter() - began_s

    def read(self, step: int, schedule: StepSchedule) -> dict[str, Any]:
        """Means since the last reading, over all ranks. Collective; waits for the device.

        Losses are means over the steps in which they were finite, NaN where there was none. The gradient's norm is that
        of the last step, over all tensors and before clipping.
        """
        assert self._last is not None, "no step since the last reading"
        loss_state = self._state.loss
        entropies = target_entropies(self._last, loss_state, temperature=schedule.teacher_temperature)
        of_host = self._sums.new_tensor([self._wait_s, self._loader.replaced])
        sums = sum_over_ranks(torch.cat([self._sums, of_host, entropies.flatten()])).tolist()
        elapsed_s = time.perf_counter() - self._began_s
        good = sums[0] / self._state.world.size
        loss, cls, patch, region = (value / good if good else math.nan for value in sums[1:5])
        regions, valid, patches_1, patches_2, wait_s, replaced = sums[5:11]
        pairs = list(zip(sums[11::2], sums[12::2], strict=True))
        wait_s /= self._state.world.size
        values = {
            "step": step,
            "epoch": (step - 1) // self._loader.steps_per_epoch,
            "loss": loss,
            "loss_cls": cls,
            "loss_patch": patch,
            "loss_region": region,
            "region_valid_frac": valid / max(regions, 1),
            "regions_valid": valid / self._steps,
            "region_patches_view1": patches_1 / max(regions, 1),
            "region_patches_view2": patches_2 / max(regions, 1),
            "gradient_norm": self._last.gradient_norms.norm().item(),
            "learning_rate": schedule.learning_rate,
            "weight_decay": schedule.weight_decay,
            "ema_momentum": schedule.ema_momentum,
            "teacher_temperature": schedule.teacher_temperature,
            "step_s": elapsed_s / self._steps,
            "images_per_s": self._steps * self._state.config.optim.global_batch / elapsed_s,
            "data_wait_s": wait_s / self._steps,
            "data_wait_share": wait_s / elapsed_s,
            "samples_replaced": int(replaced),
            **named_values(loss_state.kinds, pairs, loss_state.centers),
        }
        self._reset()
        return values
