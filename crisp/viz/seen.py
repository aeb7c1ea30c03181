"""The images of a picture, as each of its models sees them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from crisp.distributed import pick_device
from crisp.models.frozen import FrozenModel
from crisp.viz.config import ShapedPictureConfig
from crisp.viz.inputs import Images, check_size, prepare
from crisp.viz.models import load_models
from crisp.viz.sheet import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What is drawn of S images and M models."""

    models: list[FrozenModel]
    """M"""
    device: torch.device
    names: list[str]
    """S, for messages"""
    views: list[list[Image]]
    """By image, then by model: [H, W, 3] uint8, cut to the model's patches"""


def load_seen(config: ShapedPictureConfig) -> Seen:
    """Images and models of a config; all that can be wrong with them is said before a model runs.

    Raises:
        CrispError: images or weights that cannot be used, or a size that does not fit a model's patches.
    """
    images = Images(config.images)
    numbers = images.chosen(config.sample, config.count, spread=True)
    pixels = [images.decode(number) for number in numbers]
    device = pick_device(config.device, 0)
    models = load_models(config.weights, config.names, device)
    for model in models:
        check_size(config.size_px, 1 if config.shape == "whole" else model.backbone.patch_px, who=model.name)
    names = [images.name(number) for number in numbers]
    for name in names:
        log.info("%s", name)
    views = [
        [prepare(p, size_px=config.size_px, patch_px=m.backbone.patch_px, shape=config.shape) for m in models]
        for p in pixels
    ]
    return Seen(models=models, device=device, names=names, views=views)
