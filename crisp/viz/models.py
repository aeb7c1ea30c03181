"""Trained models for a picture: loaded, named, and asked for what one image gives.

Axes: n patches, D width, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.errors import CrispError
from crisp.models.frozen import FrozenBackbone, FrozenModel
from crisp.models.published import load_frozen
from crisp.runs import CHECKPOINTS

Array = NDArray[np.float32]


def load_models(weights: Sequence[str], names: Sequence[str], device: torch.device) -> list[FrozenModel]:
    """The models in order, under the names given, or their own; two of one name are told apart by their sources.

    Raises:
        CrispError: as `load_frozen`.
    """
    models = [load_frozen(source, device=device) for source in weights]
    if names:
        return [replace(model, name=name) for model, name in zip(models, names, strict=True)]
    own = [model.name for model in models]
    return [
        replace(model, name=f"{model.name} ({_short(model.source)})") if own.count(model.name) > 1 else model
        for model in models
    ]


def _short(source: str) -> str:
    """The file of a source, or the run of a checkpoint."""
    path = Path(source)
    return path.parent.parent.name if path.parent.name == CHECKPOINTS else path.name


def normalised(pixels: NDArray[np.uint8], backbone: FrozenBackbone, device: torch.device) -> Tensor:
    """One image [H, W, 3] uint8 as the model wants it: [1, 3, H, W] float32."""
    images = torch.tensor(pixels, device=device).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (backbone.mean, backbone.std))
    return (images - mean) / std


@torch.no_grad()
def patch_tokens(backbone: FrozenBackbone, images: Tensor) -> Array:
    """Tokens [n, D] of one image [1, 3, H, W]: the last block's, through the final norm."""
    return finite(backbone(images)[-1].patches[0])


@torch.no_grad()
def cls_attention(backbone: FrozenBackbone, images: Tensor) -> Array:
    """Attention [h, rows, columns] of [CLS] to the patches of one image [1, 3, H, W] in the last block.

    Raises:
        CrispError: the model has no [CLS]; `check_cls` says so before any work.
    """
    rows, columns = (side // backbone.patch_px for side in images.shape[-2:])
    return finite(backbone.cls_attention(images)[0]).reshape(-1, rows, columns)


@torch.no_grad()
def check_cls(model: FrozenModel, device: torch.device, *, remedy: str) -> None:
    """That a model has a [CLS] token, by one small pass.

    Raises:
        CrispError: it has none; the message ends with `remedy`.
    """
    patch_px = model.backbone.patch_px
    if model.backbone(torch.zeros(1, 3, patch_px, patch_px, device=device))[-1].cls is None:
        raise CrispError(f"{model.source}: {model.name} has no [CLS] token whose attention could be taken; {remedy}")


def finite(values: Tensor) -> Array:
    """On the host, float32.

    Raises:
        CrispError: NaN or infinity among them.
    """
    if not values.isfinite().all():
        raise CrispError("the model's outputs are not finite, so it has diverged; take an earlier checkpoint")
    return values.float().cpu().numpy()
