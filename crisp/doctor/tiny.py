"""The run that checks train: a recipe so small that its steps take milliseconds, with every part of the method on."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.benchmarks.step_contenders import synthetic_batch
from crisp.config import ModelConfig, Precision, RegionConfig, TrainConfig
from crisp.distributed import World
from crisp.doctor.config import Device
from crisp.recipes import recipe_named
from crisp.schedules import StepSchedule, schedule_at
from crisp.training.moments import named_moments
from crisp.training.state import TrainState, build_state
from crisp.training.step import StepMetrics, train_step

STEPS_PER_EPOCH = 2


def tiny_config(*, precision: Precision = "fp32", device: Device = "cpu") -> TrainConfig:
    """Batch 8 of 64 px views, a ViT of two blocks; stochastic depth, masks, local views and regions are on."""
    base = recipe_named("demo")
    return replace(
        base,
        device=device,
        precision=precision,
        log_every=1,
        checkpoint_every=2,
        keep_checkpoints=10,
        rank_timeout_s=60.0,
        data=replace(base.data, threads=1, renderer="cpu"),
        views=replace(base.views, reference_px=64, global_px=64, local_px=32, local_views=2),
        model=ModelConfig(
            arch="vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3, drop_path=0.2,
            head_hidden=32, head_bottleneck=16, prototypes=64,
        ),
        region=RegionConfig(blocks=2, threshold=0.3, min_patches=1),
        optim=replace(base.optim, epochs=2, global_batch=8, micro_batch=0, warmup_epochs=1),
    )  # fmt: skip


def run_config(shards: Path, out: Path, *, device: Device = "cpu") -> TrainConfig:
    """`tiny_config` on shards."""
    config = tiny_config(device=device)
    return replace(config, out=out, data=replace(config.data, shards=str(shards)))


class TinyRun:
    """Steps of a run on synthetic batches, no loader and no files.

    Args:
        config: of `tiny_config`.
        device: where it trains. The batches, the weights and every draw are the same on all.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.state: TrainState = build_state(config, World(rank=0, size=1, local_rank=0, nodes=1, device=device))
        self._step = 0

    def next_batch(self) -> tuple[Batch, StepSchedule]:
        """What the next step takes; each has a batch of its own, and none is in the epoch of the frozen last layer."""
        batch = synthetic_batch(replace(self.config, seed=self._step), self.device)
        schedule = schedule_at(self.config, step=self._step + STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH)
        self._step += 1
        return batch, schedule

    def step(self) -> StepMetrics:
        """One step."""
        return train_step(self.state, *self.next_batch())

    def take(self, steps: int) -> list[float]:
        """The total losses of some steps."""
        return [float(self.step().terms.total) for _ in range(steps)]

    def weights(self) -> Tensor:
        """All of student and teacher, one after the other, on the CPU."""
        networks = self.state.networks
        tensors = [*networks.student.state_dict().values(), *networks.teacher.state_dict().values()]
        return torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name: networks, centres, the optimiser's moments."""
        state = self.state
        modules = {"student": state.networks.student, "teacher": state.networks.teacher, "loss": state.loss}
        found = {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}
        moments = named_moments(state.optimizer, state.networks.student)
        return found | {f"optimizer.{name}": tensor for name, tensor in moments.items()}
