"""Regions discovered as in training: the settings of a run, its tokens, its views and seeds.

Axes: B images, N patches, D width.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from crisp.config import RegionConfig, TrainConfig, ViewsConfig, WarpMode
from crisp.errors import CrispError
from crisp.evals.region_quality.config import RegionQualityConfig, SeedPolicy
from crisp.models.frozen import FrozenBackbone
from crisp.models.published.ours import TrainedBackbone, is_run
from crisp.runs import CONFIG_FILE, read_run_config

log = logging.getLogger(__name__)

REFERENCE_PX = 224
"""Of weights that no run of ours made, to the multiple of their patch below"""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to discover regions."""

    threshold: float
    blocks: int
    seed_policy: SeedPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Discovery:
    """Everything that regions depend on beside weights and images."""

    settings: tuple[Setting, ...]
    """The first is the run's own, where the grid holds it"""
    warp_modes: tuple[WarpMode, ...]
    """Likewise"""
    region: RegionConfig
    """For `block_norm`, `min_coverage` and `min_patches`"""
    views: ViewsConfig
    """For the reference and the two global views, with the wanted number of seeds; without local views, which draw
    from addresses of their own"""

    def views_of(self, policy: SeedPolicy) -> ViewsConfig:
        """With a seed policy."""
        return replace(self.views, seed_policy=policy)


def run_of(weights: str) -> TrainConfig | None:
    """The config of the run that weights belong to; None if they are not those of a run."""
    path = Path(weights)
    if not is_run(path):
        return None
    return read_run_config(path if (path / CONFIG_FILE).is_file() else path.resolve().parent.parent)


def plan_discovery(config: RegionQualityConfig, backbone: FrozenBackbone) -> Discovery:
    """What to discover, as the run of the weights did, or the paper for other weights, and what the grid changes.

    Raises:
        CrispError: more blocks than the model has, or a reference that patches do not divide.
    """
    run = run_of(config.weights)
    patch_px = backbone.patch_px
    if run is None:
        side = REFERENCE_PX // patch_px * patch_px
        views = ViewsConfig(patch_px=patch_px, reference_px=side, global_px=side, local_px=patch_px, local_views=0)
        region = RegionConfig()
    else:
        views, region = replace(run.views, local_views=0), run.region
    policy = views.seed_policy
    if config.reference_px is not None:
        if config.reference_px < patch_px or config.reference_px % patch_px:
            raise CrispError(
                f"reference_px={config.reference_px}: must be a multiple of the model's patch, {patch_px} px"
            )
        views = replace(views, reference_px=config.reference_px)
    blocks = config.blocks or (min(region.blocks, backbone.depth),)
    if not config.blocks and region.blocks > backbone.depth:
        log.warning("the model has %d blocks: all of them are averaged, not %d", backbone.depth, region.blocks)
    if max(blocks) > backbone.depth:
        raise CrispError(f"blocks={blocks}: the model has {backbone.depth} blocks; average at most so many")
    own = Setting(region.threshold, min(region.blocks, backbone.depth), policy)
    settings = [
        Setting(threshold, count, seed_policy)
        for seed_policy in config.seed_policies or (policy,)
        for count in blocks
        for threshold in config.thresholds or (region.threshold,)
    ]
    modes = config.warp_modes or (region.warp_mode,)
    return Discovery(
        settings=tuple(sorted(settings, key=lambda setting: setting != own)),  # stable: the others stay in order
        warp_modes=tuple(sorted(modes, key=lambda mode: mode != region.warp_mode)),
        region=region,
        views=replace(views, seeds_per_image=config.seeds_per_image),
    )


@torch.no_grad()
def discovery_tokens(
    backbone: FrozenBackbone, images: Tensor, blocks: Sequence[int], *, block_norm: Literal["patch", "raw"]
) -> Mapping[int, Tensor]:
    """Patch tokens of the reference averaged over the last M blocks (paper, 3.1), for several M from one pass.

    Each block goes through the final norm, of our own models the patch norm, as `Network.discovery_tokens` does it.

    Args:
        backbone: of the model.
        images: [B, 3, H, W], normalised.
        blocks: values of M, each from 1 to the depth.
        block_norm: "raw" leaves the norm out, for our own models only.

    Returns:
        [B, N, D] by M.
    """
    most = max(blocks)
    if block_norm == "raw" and isinstance(backbone, TrainedBackbone):
        taken = [tokens[:, 1:] for tokens in backbone.vit.last_blocks(images, blocks=most)]
    else:
        taken = [tokens.patches for tokens in backbone(images, last=most)]
    return {count: torch.stack(taken[-count:]).mean(0) for count in blocks}
