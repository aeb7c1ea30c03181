"""Features of a frozen backbone, one vector per image: of a folder of shards, or of any images through the store."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.images import CentreCrop, ImageSource, Prepare, ShardImages, WholeImage, normalised, prepared_batches
from crisp.evals.store import FeatureStore, Field
from crisp.models.frozen import BlockTokens, FrozenBackbone, FrozenModel
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.shards import ShardSet

Backbone = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] float32, normalised → features [B, D]"""

Tokens = Literal["cls", "cls-last-4", "cls-mean", "mean"]
"""What becomes an image's feature, of tokens after the final norm:

cls: the last block's [CLS] (D wide).
cls-last-4: the last 4 blocks' [CLS] side by side, the last one at the end (4·D).
cls-mean: the last block's [CLS], then the mean of its patches (2·D).
mean: the mean of the last block's patches (D).
"""

LAST_BLOCKS = 4
"""Of `cls-last-4`"""
STORE_CHUNK = 2048
"""Images whose features an interruption loses at most"""


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
    prepare = CentreCrop(resize_px, crop_px)
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
        backbone(normalised(images, mean=IMAGENET_MEAN, std=IMAGENET_STD, device=device)).float().cpu()
        for images in prepared_batches(ShardImages(shards), in_batches(sample_ids, batch), prepare, threads=threads)
    ]
    return torch.cat(features), labels


def in_batches(numbers: NDArray[np.int64], batch: int) -> Iterator[NDArray[np.int64]]:
    """[N] in pieces of `batch`; the last one may be smaller."""
    return (numbers[start : start + batch] for start in range(0, len(numbers), batch))


def pooled(blocks: Sequence[BlockTokens], tokens: Tokens) -> Tensor:
    """The feature [B, F] of B images.

    Args:
        blocks: of the last blocks, at least `blocks_for(tokens)`.
        tokens: which.

    Raises:
        CrispError: the model has no [CLS] token, and it is wanted.
    """
    last = blocks[-1]
    if tokens == "mean":
        return last.patches.mean(1)
    classes = [block.cls for block in blocks[-blocks_for(tokens) :] if block.cls is not None]
    if len(classes) != blocks_for(tokens):
        raise CrispError(f"tokens={tokens}: the model has no [CLS] token; take --tokens mean")
    return torch.cat([*classes, last.patches.mean(1)] if tokens == "cls-mean" else classes, dim=1)


def blocks_for(tokens: Tokens) -> int:
    """How many of the last blocks a feature is made of."""
    return LAST_BLOCKS if tokens == "cls-last-4" else 1


class FrozenFeatures:
    """A frozen model as a function from prepared images to features, on a device.

    Args:
        model: its backbone is moved to the device.
        tokens: what becomes the feature.
        side_px: of the square images; asked for one with a blank image, so that what cannot work fails at once.
        device: where it works.
        precision: of the forward pass, by torch's name; features are float32 in any case.

    Raises:
        CrispError: no [CLS] token where one is wanted, fewer blocks than wanted, or a side that is no multiple of the
            patch.
    """

    def __init__(
        self, model: FrozenModel, tokens: Tokens, *, side_px: int, device: torch.device, precision: str = "float32"
    ) -> None:
        self.model, self.tokens, self.device, self.precision = model, tokens, device, precision
        self.backbone: FrozenBackbone = model.backbone.to(device).eval()
        if side_px % self.backbone.patch_px:
            raise CrispError(f"{model.name}: its patches of {self.backbone.patch_px} px do not divide {side_px} px")
        if blocks_for(tokens) > self.backbone.depth:
            raise CrispError(f"tokens={tokens}: {model.name} has {self.backbone.depth} blocks; take another --tokens")
        self.width = self(torch.zeros(1, side_px, side_px, 3, dtype=torch.uint8)).shape[1]
        """F, of a feature"""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[B, side, side, 3] uint8 → [B, F] float32 on the device."""
        pixels = normalised(images, mean=self.backbone.mean, std=self.backbone.std, device=self.device)
        dtype = getattr(torch, self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            blocks = self.backbone(pixels, last=blocks_for(self.tokens))
        # Averaged in float32: bfloat16 would lose the sum of 196 patches.
        return pooled([_as_float(block) for block in blocks], self.tokens)

    def stored(
        self,
        store: FeatureStore,
        images: ImageSource,
        prepare: CentreCrop | WholeImage,
        *,
        batch: int,
        threads: int,
        world: World,
        title: str,
        numbers: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Features of images, computed once and kept on disk. Collective.

        Args:
            store: where they are kept.
            images: the source.
            prepare: how an image is prepared: part of the key, with the images, the weights and the precision.
            batch: images per call of the backbone.
            threads: decoding threads.
            world: this rank's; the ranks share the work.
            title: for the progress bar.
            numbers: of those wanted, in this order; default: all.

        Returns:
            [N, F] float32, a read-only memory map.
        """
        numbers = np.arange(len(images)) if numbers is None else numbers
        key = {
            "weights": self.model.fingerprint,
            "images": images.fingerprint,
            "numbers": hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest(),
            "prepare": repr(prepare),
            "tokens": self.tokens,
            "precision": self.precision,
        }

        def compute(items: range) -> Mapping[str, NDArray[Any]]:
            return {"features": self._of(images, numbers[items.start : items.stop], prepare, batch, threads)}

        arrays = store.arrays(
            key, len(numbers), {"features": Field((self.width,))}, compute, chunk=STORE_CHUNK, world=world, title=title
        )
        features: NDArray[np.float32] = arrays["features"]
        return features

    def _of(
        self, images: ImageSource, numbers: NDArray[np.int64], prepare: Prepare, batch: int, threads: int
    ) -> NDArray[np.float32]:
        batches = prepared_batches(images, in_batches(numbers, batch), prepare, threads=threads)
        return np.concatenate([self(prepared).cpu().numpy() for prepared in batches])


def _as_float(block: BlockTokens) -> BlockTokens:
    return BlockTokens(cls=None if block.cls is None else block.cls.float(), patches=block.patches.float())


def has_cls(model: FrozenModel) -> bool:
    """Whether its blocks put out a [CLS] token; found out with a blank image."""
    backbone = model.backbone.eval()
    side_px = 2 * backbone.patch_px
    first = next(iter(backbone.parameters()))
    with torch.no_grad():
        blocks = backbone(torch.zeros(1, 3, side_px, side_px, device=first.device, dtype=first.dtype), last=1)
    return blocks[-1].cls is not None
