"""Features of a frozen backbone for every image of a folder of shards, prepared as the k-NN protocol says."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms

from crisp.errors import CrispError
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.decode import Decoder
from crisp.pipelines.shards import ShardSet

Backbone = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] float32, normalised → features [B, D]"""


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    shards: ShardSet,
    *,
    sample_ids: NDArray[np.int64] | None = None,
    resize_px: int = 256,
    crop_px: int = 224,
    batch: int = 64,
    threads: int = 2,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Features and labels of N images, on the CPU, one view each.

    The shorter side is resized to `resize_px` (bicubic, antialiased, PIL's), the middle `crop_px` square is cut out
    and normalised by ImageNet's statistics. The next batch is decoded while the backbone works on this one.

    Args:
        backbone: a frozen model's features, in evaluation mode; called with batches on `device`.
        shards: the labelled images.
        sample_ids: those wanted, in this order; default: all, in shard order.
        resize_px: shorter side after the resize.
        crop_px: side of the square that the backbone sees.
        batch: images per call of the backbone; the last one may be smaller.
        threads: decoding threads.
        device: where the backbone is; the CPU if not given.

    Returns:
        [N, D] float32 features and [N] int64 labels.

    Raises:
        CrispError: no images, an image without a label, or a crop larger than the resized image.
    """
    if not 0 < crop_px <= resize_px:
        raise CrispError(f"crop_px={crop_px}: must lie between 1 and resize_px={resize_px}")
    sample_ids = np.arange(len(shards)) if sample_ids is None else sample_ids
    labels = torch.from_numpy(shards.index["label"][sample_ids].astype("int64"))
    if not len(labels):
        raise CrispError(f"{shards.folder}: holds no images; shard a folder that has some")
    if (labels < 0).any():
        raise CrispError(
            f"{shards.folder}: {int((labels < 0).sum())} of {len(labels)} images have no label; "
            f"shard a source with one folder per class"
        )
    device = device or torch.device("cpu")
    features = [
        backbone(images.to(device, non_blocking=True)).float().cpu()
        for images in _prepared_batches(
            shards, sample_ids.tolist(), resize_px=resize_px, crop_px=crop_px, batch=batch, threads=threads
        )
    ]
    return torch.cat(features), labels


def _prepared_batches(
    shards: ShardSet, sample_ids: list[int], *, resize_px: int, crop_px: int, batch: int, threads: int
) -> Iterator[Tensor]:
    """[B, 3, crop_px, crop_px] float32 of these images in order."""
    prepare = transforms.Compose(
        [
            transforms.Resize(resize_px, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(crop_px),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    own = threading.local()  # a decoder keeps its buffer, so each thread has one

    def load(sample_id: int) -> Tensor:
        if not hasattr(own, "decode"):
            own.decode = Decoder()
        image: Tensor = prepare(Image.fromarray(own.decode(shards.read(sample_id))))
        return image

    with ThreadPoolExecutor(threads) as pool:
        coming = pool.map(load, sample_ids[:batch])
        for start in range(0, len(sample_ids), batch):
            following = sample_ids[start + batch : start + 2 * batch]
            images, coming = coming, pool.map(load, following)
            yield torch.stack(list(images))
