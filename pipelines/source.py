"""What one rank renders at a global step: the encoded images and the plan, as a pure function of the step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crisp.config import TrainConfig
from crisp.pipelines.order import EpochLayout, epoch_and_step, global_batch_samples, rank_slots
from crisp.pipelines.plan import Plan, make_plan
from crisp.pipelines.shards import ShardSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One rank's share of one step. B is the same for every step of a rank."""

    encoded: list[memoryview]
    """B encoded images"""
    plan: Plan
    label: NDArray[np.int64]
    """[B]"""


class TrainSource:
    """Called with a global step, gives this rank's `Work`. It can be pickled to another process.

    Raises:
        CrispError: a batch larger than the data, or smaller than the world.
    """

    def __init__(self, config: TrainConfig, shards: ShardSet, *, rank: int, world_size: int, nodes: int) -> None:
        self.shards = shards
        self.layout = EpochLayout(
            shard_samples=[shard.samples for shard in shards.manifest.shards],
            global_batch=config.optim.global_batch,
            parts=config.data.parts,
            window_shards=config.data.shuffle_window_shards,
            seed=config.seed,
        )
        self._views, self._seed = config.views, config.seed
        self._slots = rank_slots(config.optim.global_batch, rank=rank, world_size=world_size, nodes=nodes)

    @property
    def batch_size(self) -> int:
        """B, this rank's images per step."""
        return len(self._slots)

    def __call__(self, step: int) -> Work:
        """The work of a global step, counted from 0 since the run began."""
        epoch, step_in_epoch = epoch_and_step(self.layout, step)
        sample_id = global_batch_samples(self.layout, epoch, step_in_epoch, self._slots)
        rows = self.shards.index[sample_id]
        plan = make_plan(
            self._views,
            seed=self._seed,
            epoch=epoch,
            sample_id=sample_id,
            height_px=rows["height"],
            width_px=rows["width"],
        )
        return Work(
            encoded=[self.shards.read(int(i)) for i in sample_id],
            plan=plan,
            label=rows["label"].astype(np.int64),
        )
