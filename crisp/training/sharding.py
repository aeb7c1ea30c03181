"""Student and teacher sharded alike over all ranks (FSDP2), for models that are too large to be held whole by each."""

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from crisp.distributed import World
from crisp.models.student_teacher import StudentTeacher

# The ways into the teacher that are not called `forward`; anything else that runs its modules has to be named here, or
# it finds shards in place of weights.
TEACHER_FORWARDS = ("teach", "discovery_tokens")


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
