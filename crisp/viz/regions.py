"""Regions that models find: the reference with its seed (blue) and region (red), and where both views show it.

    crisp viz regions --weights runs/vits16 --images /data/shards/val --out regions.pdf
    crisp viz regions --weights RUN/checkpoints/step-{00001000,00100000} --images photos/ --out evolution.pdf

With one model a column per image and rows for reference and views (paper, Figures 5, 12, 13), with several a row per
image and columns for each model. All see the same crops and seeds. Views, blocks and threshold are those of the run
that the weights are of; of other weights, and where an option says otherwise, those of the method. A run whose config
sets pictures.every_epochs draws its own in RUN/pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro

from crisp.batch import Batch
from crisp.config import RegionConfig, TrainConfig, ViewsConfig
from crisp.distributed import pick_device
from crisp.errors import CrispError
from crisp.models.frozen import FrozenModel
from crisp.models.published.ours import TrainedBackbone, is_run
from crisp.ops.regions import discover_and_warp
from crisp.regions import visible_in_both
from crisp.runs import CHECKPOINTS, read_run_config
from crisp.viz.augmented import check_seed, render_views, renormalised
from crisp.viz.config import PictureConfig
from crisp.viz.figure import save_figure
from crisp.viz.inputs import Images, check_size
from crisp.viz.models import load_models
from crisp.viz.region_figure import RegionPictures, denormalise, region_columns, region_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionsConfig(PictureConfig):
    """What to draw."""

    threshold: float | None = None
    """β: cosine similarity to the seed; default: the run's, or .75."""
    blocks: int | None = None
    """M: last blocks averaged; default: the run's, or 4 (all, of a model with fewer)."""
    size_px: int | None = None
    """Side of reference and views, up to 1120; default: those of the first run among the weights, or 224."""
    seed: int = 0
    """Of crops and region seeds: with a run's own, on its shards, what it saw is drawn."""
    epoch: int = 0
    """Likewise: each has other crops and region seeds."""

    def __post_init__(self) -> None:
        PictureConfig.__post_init__(self)
        check_seed(self.seed, self.epoch)
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise CrispError(f"threshold={self.threshold}: a cosine lies in [-1, 1]")
        if self.blocks is not None and self.blocks < 1:
            raise CrispError(f"blocks={self.blocks}: must be 1 or more")
        if self.size_px is not None:
            check_size(self.size_px, 1, who="any model")


@torch.no_grad()
def region_pictures(
    model: FrozenModel, batch: Batch, *, views: ViewsConfig, region: RegionConfig, device: torch.device
) -> RegionPictures:
    """What one model makes of a batch: discovery and warping as in training, of each image's first seed.

    Args:
        model: ours goes through its run's own choice of norm, another through its final norm.
        batch: on the host.
        views: that it was rendered by.
        region: blocks, threshold, warp mode, t.
        device: where the model is.
    """
    reference = renormalised(batch.reference, model.backbone, device)
    # One at a time: a large reference's tokens of several blocks take memory, and there are few.
    tokens = torch.cat([_discovery_tokens(model, image[None], region) for image in reference])
    warped = discover_and_warp(
        tokens, batch.region_seed[:, :1].to(device), batch.view_from_reference[:2].to(device),
        threshold=region.threshold, reference_grid=views.reference_grid, view_grid=views.global_grid,
        patch_px=views.patch_px, mode=region.warp_mode, min_coverage=region.min_coverage,
    )  # fmt: skip
    valid = visible_in_both(warped.view_regions, min_patches=region.min_patches)
    return RegionPictures(
        reference=denormalise(batch.reference),
        global_views=denormalise(batch.global_views),
        region=warped.regions[:, 0].cpu().numpy(),
        view_regions=warped.view_regions[:, :, 0].cpu().numpy(),
        seed=batch.region_seed[:, 0].numpy(),
        valid=valid[:, 0].cpu().numpy(),
        patch_px=views.patch_px,
    )


def _discovery_tokens(model: FrozenModel, images: torch.Tensor, region: RegionConfig) -> torch.Tensor:
    """[1, 3, H, W] → [1, N, D]."""
    backbone = model.backbone
    if isinstance(backbone, TrainedBackbone):
        return backbone.vit.forward_last_blocks(images, blocks=region.blocks, norm=region.block_norm)
    return torch.stack([tokens.patches for tokens in backbone(images, last=region.blocks)]).mean(0)


# --- the command line ------------------------------------------------------------------------------------------------


def _run_config(source: str) -> TrainConfig | None:
    """Of the run that weights are of; None: they are another's."""
    path = Path(source)
    if not is_run(path):
        return None
    folder = path.resolve()
    return read_run_config(folder.parent.parent if folder.parent.name == CHECKPOINTS else folder)


def _views(config: RegionsConfig, runs: Sequence[TrainConfig | None], models: Sequence[FrozenModel]) -> ViewsConfig:
    """One for all models, so that they see the same."""
    patch_px = models[0].backbone.patch_px
    for model in models:
        if model.backbone.patch_px != patch_px:
            raise CrispError(
                f"{model.source}: patches of {model.backbone.patch_px} px, {models[0].source} has {patch_px}; "
                f"regions are compared on one grid, draw them apart"
            )
    views = next((run.views for run in runs if run), ViewsConfig(patch_px=1))
    views = replace(views, patch_px=1, local_views=0, mask_probability=0.0, seeds_per_image=1)
    if config.size_px is not None:
        views = replace(views, reference_px=config.size_px, global_px=config.size_px)
    for side in (views.reference_px, views.global_px):
        check_size(side, patch_px, who=models[0].name)
    return replace(views, patch_px=patch_px, local_px=patch_px)


def _region(config: RegionsConfig, run: TrainConfig | None, model: FrozenModel) -> RegionConfig:
    depth = model.backbone.depth
    region = run.region if run else RegionConfig(blocks=min(4, depth))
    threshold = region.threshold if config.threshold is None else config.threshold
    blocks = config.blocks or min(region.blocks, depth)
    if blocks > depth:
        raise CrispError(f"blocks={blocks}: {model.name} has {depth} blocks; take at most that many")
    log.info("%s: threshold %g, mean of the last %d blocks", model.name, threshold, blocks)
    return replace(region, threshold=threshold, blocks=blocks)


def picture(config: RegionsConfig) -> Figure:
    """The figure of a config.

    Raises:
        CrispError: images or weights that cannot be used, or sizes and blocks that the models do not have.
    """
    images = Images(config.images)
    numbers = images.chosen(config.sample, config.count, spread=True)
    for number in numbers:
        images.decode(number)
    runs = [_run_config(source) for source in config.weights]
    device = pick_device(config.device, 0)
    models = load_models(config.weights, config.names, device)
    views = _views(config, runs, models)
    regions = [_region(config, run, model) for run, model in zip(runs, models, strict=True)]
    batch = render_views(images, numbers, views, seed=config.seed, epoch=config.epoch)
    for number in numbers:
        log.info("%s", images.name(number))
    found = [
        region_pictures(model, batch, views=views, region=region, device=device)
        for model, region in zip(models, regions, strict=True)
    ]
    names = [model.name for model in models]
    if len(found) == 1:
        return region_rows(found[0], title=names[0], width_in=config.width_in)
    return region_columns(found, names, width_in=config.width_in)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(RegionsConfig, args=args, prog="crisp viz regions", description=__doc__)
    log.info("%s", save_figure(picture(config), config.out))


if __name__ == "__main__":
    main()
