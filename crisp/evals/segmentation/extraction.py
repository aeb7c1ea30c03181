"""Patch features of a frozen backbone for every image of a split, kept on disk."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.config import EvalConfig
from crisp.evals.running import autocast
from crisp.evals.segmentation.data import Split
from crisp.evals.segmentation.patches import prepare_image
from crisp.evals.segmentation.precision import exact_products
from crisp.evals.store import FeatureStore, Field
from crisp.models.frozen import FrozenBackbone, FrozenModel

_BATCHES_PER_CHUNK = 4


def extract_patches(
    model: FrozenModel,
    split: Split,
    config: EvalConfig,
    *,
    side_px: int,
    store: FeatureStore,
    world: World,
    title: str,
) -> NDArray[np.float32]:
    """The last block's patches through the final norm, as a read-only memory map [N, n, D] float32.

    Pixels are normalised as the backbone was trained. Collective: ranks share the images.

    Raises:
        CrispError: an image that cannot be read, or what `FeatureStore.arrays` raises.
    """
    backbone = model.backbone
    n = (side_px // backbone.patch_px) ** 2

    def compute(items: range) -> Mapping[str, NDArray[Any]]:
        features = np.empty((len(items), n, backbone.dim), np.float32)
        done = 0
        for images in _batches(split, items, side_px, config):
            patches = _forward(backbone, images, config, world.device)
            features[done : done + len(images)] = patches.cpu().numpy()
            done += len(images)
        return {"features": features}

    return store.arrays(
        {
            "what": "final-norm patches of the last block",
            "weights": model.fingerprint,
            "data": split.fingerprint,
            "side_px": side_px,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "precision": config.precision,
        },
        len(split),
        {"features": Field((n, backbone.dim), "float32")},
        compute,
        chunk=_BATCHES_PER_CHUNK * config.batch,
        world=world,
        title=title,
    )["features"]


def _batches(split: Split, items: range, side_px: int, config: EvalConfig) -> Iterator[Tensor]:
    """[B, side, side, 3] uint8 in order; the next batch is decoded while the backbone works on this one."""

    def load(item: int) -> Tensor:
        return torch.from_numpy(prepare_image(split.pairs[item].image, side_px).copy())

    with ThreadPoolExecutor(config.threads) as pool:
        coming = pool.map(load, items[: config.batch])
        for start in range(0, len(items), config.batch):
            images, coming = coming, pool.map(load, items[start + config.batch : start + 2 * config.batch])
            yield torch.stack(list(images))


@torch.no_grad()
def _forward(backbone: FrozenBackbone, images: Tensor, config: EvalConfig, device: torch.device) -> Tensor:
    """[B, side, side, 3] uint8 → [B, n, D] float32."""
    pixels = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    with forward_precision(config, device):
        return backbone((pixels - mean) / std, last=1)[-1].patches.float()


@contextmanager
def forward_precision(config: EvalConfig, device: torch.device) -> Iterator[None]:
    """Autocast as chosen; float32 means just that: PyTorch's default lets the patch embedding be computed in TF32."""
    tf32 = torch.backends.cudnn.allow_tf32
    exact = config.precision == "float32"
    torch.backends.cudnn.allow_tf32 = tf32 and not exact
    try:
        with exact_products(device) if exact else autocast(config, device):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def pick_side(backbone: FrozenBackbone, wanted_px: int | None, default: Callable[[int], int]) -> int:
    """Side of the square images in pixels.

    Raises:
        CrispError: not a multiple of the patch's side.
    """
    side_px = default(backbone.patch_px) if wanted_px is None else wanted_px
    if side_px < backbone.patch_px or side_px % backbone.patch_px:
        raise CrispError(f"image_px={side_px}: must be a multiple of the model's patch, {backbone.patch_px} px")
    return side_px
