"""Augmented views of images from anywhere, by the plan and the renderer that training uses."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.config import ViewsConfig
from crisp.errors import CrispError
from crisp.models.frozen import FrozenBackbone
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.plan import make_plan
from crisp.pipelines.source import Work
from crisp.viz.inputs import Images


def render_views(images: Images, numbers: Sequence[int], views: ViewsConfig, *, seed: int, epoch: int) -> Batch:
    """Reference and views of some images. An image's number is its sample id: shards show what a run shows.

    Raises:
        CrispError: an image that cannot be read or decoded.
    """
    sizes = [images.decode(number).shape[:2] for number in numbers]  # also says which image is damaged
    height, width = np.array(sizes).T
    plan = make_plan(views, seed=seed, epoch=epoch, sample_id=np.array(numbers), height_px=height, width_px=width)
    work = Work(
        encoded=[images.read(number) for number in numbers], plan=plan, label=np.full(len(numbers), -1, np.int64)
    )
    with contextlib.closing(CpuRenderer(views, threads=2)) as renderer:
        return renderer.render(work)


def renormalised(images: Tensor, backbone: FrozenBackbone, device: torch.device) -> Tensor:
    """Images [..., 3, H, W] normalised by ImageNet's statistics → by those of a model."""
    images = images.to(device, non_blocking=True)
    if (backbone.mean, backbone.std) == (tuple(IMAGENET_MEAN), tuple(IMAGENET_STD)):
        return images
    mean, std, own_mean, own_std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (IMAGENET_MEAN, IMAGENET_STD, backbone.mean, backbone.std)
    )
    return (images * std + mean - own_mean) / own_std


def check_seed(seed: int, epoch: int = 0) -> None:
    """That plans can be drawn from them.

    Raises:
        CrispError: a negative one.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise CrispError(f"{name}={value}: must be 0 or more")
