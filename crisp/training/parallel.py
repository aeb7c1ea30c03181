"""How several ranks hold the networks: each a whole copy (DDP), or a shard of student and teacher alike (FSDP2)."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from crisp.config import TrainConfig
from crisp.distributed import World
from crisp.models.student_teacher import StudentTeacher

# The ways into the teacher that are not called `forward`; anything else that runs its modules has to be named here, or
# it finds shards in place of weights.
TEACHER_FORWARDS = ("teach", "discovery_tokens", "patch_tokens", "features")


def replicate_student(networks: StudentTeacher, config: TrainConfig, world: World) -> DistributedDataParallel:
    """The student, wrapped so that its gradients are averaged over all ranks. Collective.

    Its buckets are laid out for good here. DistributedDataParallel lays them anew after its first backward pass, in
    the order in which gradients came, and a sum over more than two ranks depends, in its last bits, on where in a
    bucket an element lies: the first step of a resumed run would add otherwise than the same step of an undisturbed
    one. So one image of zeros passes through, and its gradients are dropped.
    """
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    student = DistributedDataParallel(networks.student, device_ids=device_ids, gradient_as_bucket_view=True)
    views, device = config.views, world.device
    patches = views.global_grid**2
    projections = student(
        torch.zeros(2, 1, 3, views.global_px, views.global_px, device=device),
        patch_masks=torch.zeros(2, 1, patches, dtype=torch.bool, device=device),
        masked=torch.zeros(0, dtype=torch.int64, device=device),
        view_regions=torch.zeros(2, 1, 1, patches, dtype=torch.bool, device=device) if config.region.enabled else None,
    )
    outputs = [projections.cls, projections.patch, projections.region, *projections.prototypes.values()]
    torch.stack([output.sum() for output in outputs if output is not None]).sum().backward()
    student.zero_grad(set_to_none=True)
    return student


def shard_networks(networks: StudentTeacher, world: World) -> None:
    """Shard every parameter along its first axis over all ranks, in place; call it before an optimiser is built.

    Parameters keep their names and become DTensors. Each rank must hold the same whole weights: it keeps its shard of
    them, so a seed starts the same run as it does under DistributedDataParallel. A block is gathered when it runs, and
    everything else (embeddings, norms, concept block, heads) around the whole pass, so a block of each network and
    the rest are what a rank holds whole at a time, beside its shards.

    No mixed precision policy is set. Autocast casts per operation, as it does without sharding, and losses and weights
    stay those of the other worlds up to rounding; a policy would also run norms and the l2-normalisations of the heads
    in bfloat16. The price is that float32 weights are gathered, twice the bytes.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for network in (networks.student, networks.teacher):
        for block in network.backbone.blocks:
            # Gathered again in the backward pass: blocks are most of the weights, and the next block's are gathered
            # while one computes.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The student's backward pass begins where its forward pass ends, with the heads: nothing is gained by letting go.
    fully_shard(networks.student, mesh=mesh, reshard_after_forward=False)
    # The teacher has no backward pass that would let go, and what stayed gathered would miss the moving average.
    fully_shard(networks.teacher, mesh=mesh, reshard_after_forward=True)
    for method in TEACHER_FORWARDS:
        register_fsdp_forward_method(networks.teacher, method)
