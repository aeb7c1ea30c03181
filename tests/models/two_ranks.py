"""One rank of `test_two_ranks.py`: part of a batch through DistributedDataParallel, gradients and centres to a file.

python two_ranks.py RANK WORLD FOLDER
"""

import contextlib
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crisp.config import LossConfig, ModelConfig, RegionConfig, ViewsConfig
from crisp.losses import CrispLoss, TeacherStatistics, Temperatures
from crisp.models.student_teacher import StudentTeacher, masked_positions

IMAGES, K, PATCHES = 5, 2, 16
FIRST_RANK_IMAGES = 3
MODEL = ModelConfig(
    arch="vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2,
    drop_path=0.0, head_hidden=48, head_bottleneck=16, prototypes=64, head_mlp="separate",
)  # fmt: skip
VIEWS = ViewsConfig(reference_px=64, global_px=64, local_px=32, local_views=2)
REGION = RegionConfig(blocks=2)


def make_batch() -> dict[str, Tensor]:
    """All five images, images second. The last two have neither a masked patch nor a visible region."""
    generator = torch.Generator().manual_seed(4)
    masks = torch.rand(2, IMAGES, PATCHES, generator=generator) < 0.4
    regions = torch.rand(2, IMAGES, K, PATCHES, generator=generator) < 0.5
    masks[:, FIRST_RANK_IMAGES:] = False
    regions[0, FIRST_RANK_IMAGES:] = False
    return {
        "global_views": torch.randn(2, IMAGES, 3, 64, 64, generator=generator, dtype=torch.float64),
        "local_views": torch.randn(2, IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64),
        "patch_masks": masks,
        "view_regions": regions,
    }


def step(chosen: slice, world: int) -> dict[str, Tensor]:
    """Loss, gradients and centres after one backward pass on some of the images."""
    torch.manual_seed(0)
    pair = StudentTeacher(MODEL, REGION, VIEWS).double()
    loss = CrispLoss(LossConfig(), views=VIEWS.views, prototypes=MODEL.prototypes, region=True).double()
    student: nn.Module = DistributedDataParallel(pair.student) if world > 1 else pair.student
    batch = {name: value[:, chosen] for name, value in make_batch().items()}
    masked = masked_positions(batch["patch_masks"])
    valid = batch["view_regions"].sum(-1).amin(0) >= REGION.min_patches

    teacher = pair.teacher.teach(batch["global_views"], masked=masked, view_regions=batch["view_regions"])
    statistics = TeacherStatistics.of_step([TeacherStatistics.of(teacher, valid)])
    at = Temperatures(0.1, 0.04)
    # As `train_step` does: the gradients of local views stay here until those of the global views are exchanged.
    quiet = student.no_sync() if isinstance(student, DistributedDataParallel) else contextlib.nullcontext()
    with quiet:
        local = loss.of_local_views(student(batch["local_views"]), teacher, statistics=statistics, temperatures=at)
        (local.total * world).backward()
    of_global = loss.of_global_views(
        student(
            batch["global_views"],
            patch_masks=batch["patch_masks"],
            masked=masked,
            view_regions=batch["view_regions"],
        ),
        teacher,
        patch_masks=batch["patch_masks"],
        masked=masked,
        valid=valid,
        statistics=statistics,
        temperatures=at,
    )
    (of_global.total * world).backward()
    terms = local + of_global
    loss.update_centers(statistics, teacher.prototypes)

    result = {f"gradient {name}": p.grad for name, p in pair.student.named_parameters() if p.grad is not None}
    return result | {
        "share cls": terms.cls,
        "share patch": terms.patch,
        "share region": terms.region,
        "centers": loss.centers,
        "regions": statistics.regions,
    }


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    chosen = slice(0, FIRST_RANK_IMAGES) if rank == 0 else slice(FIRST_RANK_IMAGES, IMAGES)
    torch.save(step(chosen, world), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
