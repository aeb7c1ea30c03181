"""iBOT's recipe as it is usually written, with PIL images and with uint8 tensors; torch and torchvision alone.

They make what our renderers make (the reference, two global and the local views, normalised float32) and nothing
else: no patch masks, no region seeds and no affines, which ours do make. Where the recipes differ:

- colour: torchvision pivots contrast at the image's mean, turns hue in HSV and applies the four changes in random
  order; ours is one YIQ matrix. Their order is colour, then blur; ours the other way round.
- blur: PIL's GaussianBlur is three box blurs; on tensors it is a Gaussian cut off at 9 pixels, as in DINOv2's recipe;
  ours is the Gaussian itself, up to 3σ.
"""

import random
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BLUR_PX = 9
"""Window of the blur on tensors"""

Rendered = tuple[Tensor, list[Tensor], list[Tensor]]
"""Reference, global views, local views: [3, side, side] float32 each"""


class PilRecipe:
    """A PIL image → `Rendered`. `views`: the fields of `ViewsConfig`."""

    def __init__(self, views: Mapping[str, Any]) -> None:
        interpolation = T.InterpolationMode[views["interpolation"].upper()]
        to_tensor = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]

        def augment(side_px: int, scale: tuple[float, float], kind: int) -> T.Compose:
            """`kind`: 0 and 1 for the global views, 2 for the local ones."""
            return T.Compose(
                [
                    T.RandomResizedCrop(side_px, scale=scale, ratio=views["aspect"], interpolation=interpolation),
                    T.RandomHorizontalFlip(views["flip_probability"]),
                    T.RandomApply([T.ColorJitter(*views["jitter"])], views["jitter_probability"]),
                    T.RandomGrayscale(views["grayscale_probability"]),
                    T.RandomApply([_PilBlur(*views["blur_sigma_px"])], views["blur_probability"][kind]),
                    T.RandomApply([T.Lambda(ImageOps.solarize)], views["solarize_probability"][kind]),
                    *to_tensor,
                ]
            )

        self._reference = T.Compose([T.Resize((views["reference_px"],) * 2, interpolation), *to_tensor])
        self._globals = [augment(views["global_px"], views["global_scale"], kind) for kind in range(2)]
        self._local = augment(views["local_px"], views["local_scale"], 2)
        self._local_views = views["local_views"]

    def __call__(self, image: Image.Image) -> Rendered:
        """See the class."""
        return (
            self._reference(image),
            [transform(image) for transform in self._globals],
            [self._local(image) for _ in range(self._local_views)],
        )


class _PilBlur:
    def __init__(self, low_sigma_px: float, high_sigma_px: float) -> None:
        self._sigma_px = low_sigma_px, high_sigma_px

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self._sigma_px)))


class TensorRecipe:
    """An image [3, h, w] uint8 → `Rendered`, with torchvision's v2. `views`: the fields of `ViewsConfig`."""

    def __init__(self, views: Mapping[str, Any]) -> None:
        filtered = {"interpolation": v2.InterpolationMode[views["interpolation"].upper()], "antialias": True}
        to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        blur = v2.GaussianBlur(BLUR_PX, tuple(views["blur_sigma_px"]))

        def augment(side_px: int, scale: tuple[float, float], kind: int) -> v2.Compose:
            return v2.Compose(
                [
                    v2.RandomResizedCrop(side_px, scale=scale, ratio=views["aspect"], **filtered),
                    v2.RandomHorizontalFlip(views["flip_probability"]),
                    v2.RandomApply([v2.ColorJitter(*views["jitter"])], views["jitter_probability"]),
                    v2.RandomGrayscale(views["grayscale_probability"]),
                    v2.RandomApply([blur], views["blur_probability"][kind]),
                    v2.RandomSolarize(128, views["solarize_probability"][kind]),
                    *to_float,
                ]
            )

        self._reference = v2.Compose([v2.Resize([views["reference_px"]] * 2, **filtered), *to_float])
        self._globals = [augment(views["global_px"], views["global_scale"], kind) for kind in range(2)]
        self._local = augment(views["local_px"], views["local_scale"], 2)
        self._local_views = views["local_views"]

    def __call__(self, image: Tensor) -> Rendered:
        """See the class."""
        return (
            self._reference(image),
            [transform(image) for transform in self._globals],
            [self._local(image) for _ in range(self._local_views)],
        )
