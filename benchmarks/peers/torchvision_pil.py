"""iBOT's recipe as it is usually written: PIL images, torchvision transforms, DataLoader workers, WebDataset shards.

It makes what our renderers make (the reference, two global and the local views, normalised float32) and nothing
else: no patch masks, no region seeds and no affines, which ours do make. Where the two recipes differ:

- colour: torchvision pivots contrast at the image's mean, turns hue in HSV and applies the four changes in random
  order; ours is one YIQ matrix. iBOT's order is colour, then blur; ours the other way round.
- blur: PIL's GaussianBlur is three box blurs; ours is the Gaussian itself.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as T

from crisp.config import ViewsConfig
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.shard_format import Codec, open_shards

_EXTENSIONS = ";".join(codec.extension for codec in Codec)


class _GaussianBlur:
    def __init__(self, sigma_px: tuple[float, float]) -> None:
        self._sigma_px = sigma_px

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self._sigma_px)))


class Recipe:
    """A PIL image → (reference, global views, local views), each [3, side, side] float32."""

    def __init__(self, views: ViewsConfig) -> None:
        interpolation = T.InterpolationMode[views.interpolation.upper()]
        to_tensor = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]

        def augment(side_px: int, scale: tuple[float, float], kind: int) -> T.Compose:
            """`kind`: 0 and 1 for the global views, 2 for the local ones."""
            return T.Compose(
                [
                    T.RandomResizedCrop(side_px, scale=scale, ratio=views.aspect, interpolation=interpolation),
                    T.RandomHorizontalFlip(views.flip_probability),
                    T.RandomApply([T.ColorJitter(*views.jitter)], views.jitter_probability),
                    T.RandomGrayscale(views.grayscale_probability),
                    T.RandomApply([_GaussianBlur(views.blur_sigma_px)], views.blur_probability[kind]),
                    T.RandomApply([T.Lambda(ImageOps.solarize)], views.solarize_probability[kind]),
                    *to_tensor,
                ]
            )

        self._reference = T.Compose([T.Resize((views.reference_px,) * 2, interpolation), *to_tensor])
        self._globals = [augment(views.global_px, views.global_scale, kind) for kind in range(2)]
        self._local = augment(views.local_px, views.local_scale, 2)
        self._local_views = views.local_views

    def __call__(self, image: Image.Image) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """See the class."""
        return (
            self._reference(image),
            [transform(image) for transform in self._globals],
            [self._local(image) for _ in range(self._local_views)],
        )


@contextmanager
def open_torchvision_pil(shards: Path, views: ViewsConfig, *, batch: int, workers: int) -> Iterator[Iterator[Any]]:
    """Endless batches ((reference [B, …], global views, local views), key), read from the tars by webdataset."""
    manifest, _ = open_shards(shards)
    tars = [str(shards / shard.name) for shard in manifest.shards]
    samples = (
        wds.WebDataset(tars, resampled=True, shardshuffle=False)
        .shuffle(min(1000, manifest.samples))
        .decode("pilrgb")
        .to_tuple(_EXTENSIONS, "__key__")  # a flat folder has no labels
        .map_tuple(Recipe(views))
    )
    batches = iter(DataLoader(samples, batch_size=batch, num_workers=workers))
    try:
        yield batches
    finally:
        del batches  # ends the workers
