"""Networks, loss and optimiser of a run: everything that a step reads and changes."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from crisp.config import TrainConfig
from crisp.distributed import World
from crisp.losses import CrispLoss
from crisp.models.initialise import InitReport, initialise
from crisp.models.student_teacher import StudentTeacher, build_student_teacher
from crisp.ops.cross_entropy import check_fused
from crisp.optim import build_optimizer
from crisp.pipelines.order import rank_slots
from crisp.training.parallel import replicate_student, shard_networks


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step reads and changes."""

    config: TrainConfig
    world: World
    networks: StudentTeacher
    student: nn.Module
    """`networks.student`: wrapped by DistributedDataParallel, itself sharded in place by FSDP, or alone as it is"""
    loss: CrispLoss
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    slots: NDArray[np.int64]
    """[B] places of this rank's images in the global batch"""
    init: InitReport | None = None
    """What was loaded from `config.init.weights`, if this run starts from them"""


def build_state(config: TrainConfig, world: World, *, from_checkpoint: bool = False) -> TrainState:
    """Networks, loss and optimiser of a fresh run; weights depend on `config.seed` and `config.init` alone.

    Args:
        config: the run's.
        world: this rank's.
        from_checkpoint: a checkpoint will replace the weights, so `config.init` is not read (and may be gone).

    Raises:
        CrispError: a model that does not exist or does not fit, initial weights that cannot be used, or kernels that
            cannot run here.
    """
    if config.loss.fused:
        check_fused(world.device)
    torch.manual_seed(config.seed)
    networks = build_student_teacher(config, world.device)
    # Each rank reads them: DistributedDataParallel would send round the student's alone, and FSDP keeps what it finds.
    init = initialise(networks, config.init) if config.init.weights and not from_checkpoint else None
    student: nn.Module = networks.student
    if world.size > 1 and config.parallel == "fsdp":
        shard_networks(networks, world)
    elif world.size > 1:
        student = replicate_student(networks, config, world)
    return TrainState(
        config=config,
        world=world,
        networks=networks,
        student=student,
        loss=CrispLoss(
            config.loss,
            views=config.views.views,
            prototypes=config.model.prototypes,
            region=config.region.enabled,
        ).to(world.device),
        optimizer=build_optimizer(networks.student, config.optim),
        slots=rank_slots(config.optim.global_batch, rank=world.rank, world_size=world.size, nodes=world.nodes),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16"),
        init=init,
    )
