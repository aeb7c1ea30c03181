"""Who takes training steps in `crisp bench step`, each with everything that a step of its own needs.

A contender is built from a run's config and a batch that is already on the device; calling it takes one step on that
batch, as often as it is called. A new one is a function here and a line in `CONTENDERS`.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from crisp.batch import Batch
from crisp.benchmarks.ibot_published import PublishedIbot
from crisp.config import TrainConfig
from crisp.distributed import World
from crisp.pipelines.loader import build_train_loader
from crisp.pipelines.plan import make_plan
from crisp.schedules import StepSchedule, schedule_at
from crisp.training.state import build_state
from crisp.training.step import autocast, train_step

IMAGE_PX = (375, 500)
"""Height and width of the median ImageNet photograph: crops, and so affines, of a synthetic batch are those of it"""

STEPS_PER_EPOCH = 1000
"""For the schedules alone, which change no step's cost once the last layers are free"""

Step = Callable[[], None]
Builder = Callable[[TrainConfig, Batch], Step]


def crisp(config: TrainConfig, batch: Batch) -> Step:
    """The recipe as `crisp train` runs it, on one rank."""
    world = World(rank=0, size=1, local_rank=0, nodes=1, device=batch.reference.device)
    state, schedules = build_state(config, world), _schedules(config)

    def step() -> None:
        train_step(state, batch, next(schedules))

    return step


def ibot_published(config: TrainConfig, batch: Batch) -> Step:
    """iBOT's published way of taking its step: see `crisp.benchmarks.ibot_published`."""
    device = batch.reference.device
    ibot, schedules = PublishedIbot(config, device), _schedules(config)

    def step() -> None:
        ibot.step(batch, next(schedules), autocast(config.precision, device))

    return step


def _schedules(config: TrainConfig) -> Iterator[StepSchedule]:
    """One after the other, beginning after the first epoch, in which the gradient of the last layers is dropped."""
    first_step = config.optim.freeze_last_layer_epochs * STEPS_PER_EPOCH
    last_step = config.optim.epochs * STEPS_PER_EPOCH - 1
    for step in itertools.count(first_step):
        yield schedule_at(config, step=min(step, last_step), steps_per_epoch=STEPS_PER_EPOCH)


def ibot(config: TrainConfig, batch: Batch) -> Step:
    """The same recipe without regions: iBOT's losses in our code. The reference is not looked at."""
    return crisp(replace(config, region=replace(config.region, enabled=False)), batch)


CONTENDERS: dict[str, Builder] = {"crisp": crisp, "ibot": ibot, "ibot-published": ibot_published}


def make_batch(config: TrainConfig, device: torch.device) -> Batch:
    """The first batch of the run's shards, or a synthetic one where it names none; on the device.

    Raises:
        CrispError: as `build_train_loader`.
    """
    if config.data.shards is None:
        return synthetic_batch(config, device)
    loader = build_train_loader(config, rank=0, world_size=1, device=device)
    with contextlib.closing(loader):
        return next(iter(loader))


def synthetic_batch(config: TrainConfig, device: torch.device) -> Batch:
    """Images of noise in the shapes of a run's batch; crops, masks and seeds as its first samples have them."""
    views, samples = config.views, config.optim.global_batch
    plan = make_plan(
        views,
        seed=config.seed,
        epoch=0,
        sample_id=np.arange(samples),
        height_px=np.full(samples, IMAGE_PX[0]),
        width_px=np.full(samples, IMAGE_PX[1]),
    )
    generator = torch.Generator().manual_seed(config.seed)
    dtype = {"float32": torch.float32, "float16": torch.float16}[config.data.pixels]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    batch = Batch(
        reference=noise(samples, 3, views.reference_px, views.reference_px),
        global_views=noise(2, samples, 3, views.global_px, views.global_px),
        local_views=noise(views.local_views, samples, 3, views.local_px, views.local_px),
        view_from_reference=torch.from_numpy(plan.view_from_reference),
        patch_masks=torch.from_numpy(plan.patch_masks),
        region_seed=torch.from_numpy(plan.region_seed),
        label=torch.full((samples,), -1),
        sample_id=torch.from_numpy(plan.sample_id),
    )
    return batch.to(device)
