"""What an image's patches have in common and where they differ: their first principal components as colours.

    crisp viz pca --weights runs/vits16 timm:vit_small_patch16_224.dino --images photos/ --out pca.pdf

Each image has its own components, of the last block's patches through the final norm (paper, Figures 4, 9, 10):
whitened, signed so that the skew is positive, clipped at 2.3 standard deviations. Colours of two images, or of two
models, are not related. Position embeddings are resized for other sizes than the model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import tyro

from crisp.errors import CrispError
from crisp.models.frozen import FrozenModel
from crisp.viz.components import Array, composite, one_by_one, principal_components
from crisp.viz.config import ShapedPictureConfig
from crisp.viz.figure import PAGE_WIDTH_IN, save_figure
from crisp.viz.models import normalised, patch_tokens
from crisp.viz.seen import load_seen
from crisp.viz.sheet import Group, Image, mosaic, mosaic_shape, mosaic_units, new_sheet, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

ONE_BY_ONE = 6
_COLUMN_IN = 1.9


@dataclass(frozen=True, kw_only=True, slots=True)
class PcaConfig(ShapedPictureConfig):
    """What to draw."""

    one_by_one: bool = False
    """Beside the colours of the first three, draw the first six one by one (blue below, red above their mean)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentMap:
    """What a model makes of an image."""

    components: Array
    """[n, c]"""
    grid: tuple[int, int]
    """Rows and columns of patches, n in all"""


def draw_pca(
    images: Sequence[Image],
    maps: Sequence[Sequence[ComponentMap]],
    names: Sequence[str],
    *,
    one_by_one_too: bool = False,
    width_in: float = PAGE_WIDTH_IN,
) -> Figure:
    """A row per image: the image, then each model's first three components as colours, and all of them one by one.

    Args:
        images: [H, W, 3] uint8 each.
        maps: by image, then by model.
        names: of the models.
        one_by_one_too: draw every component, too: beside each other if there is one model, else in a block.
        width_in: of the page.

    Raises:
        CrispError: see `new_sheet`.
    """
    count = maps[0][0].components.shape[1]
    shape = mosaic_shape(count, in_a_row=len(names) == 1)
    units: tuple[float, ...] = (1.0,)
    labels: tuple[str, ...] = ("components 1 to 3",)
    if one_by_one_too:
        units, labels = (1.0, mosaic_units(shape)), ("1 to 3", f"1 to {count}, one by one")
    groups = [Group(head="", labels=("image",))]
    groups += [Group(head=name, units=units, labels=labels) for name in names]
    sheet = new_sheet(groups, [image.shape[0] / image.shape[1] for image in images], width_in=width_in)
    for image, of_image, panels in zip(images, maps, sheet.panels, strict=True):
        show(panels[0][0], image, smooth=True)
        for found, (colours, *separate) in zip(of_image, panels[1:], strict=True):
            show(colours, composite(found.components, found.grid))
            for panel in separate:
                show(panel, mosaic(one_by_one(found.components, found.grid), shape))
    return sheet.figure


def draw_pca_pairs(images: Sequence[Image], maps: Sequence[ComponentMap]) -> Figure:
    """A column per image: the image, and below it one model's first three components as colours.

    Args:
        images: [H, W, 3] uint8 each, all of one size.
        maps: by image.
    """
    aspect = images[0].shape[0] / images[0].shape[1]
    sheet = new_sheet([Group(head="") for _ in images], [aspect, aspect], width_in=_COLUMN_IN * len(images))
    for image, found, (above,), (below,) in zip(images, maps, *sheet.panels, strict=True):
        show(above, image, smooth=True)
        show(below, composite(found.components, found.grid))
    return sheet.figure


def component_map(model: FrozenModel, image: Image, *, count: int, device: torch.device) -> ComponentMap:
    """Of one image [H, W, 3] as the model sees it."""
    patch_px = model.backbone.patch_px
    tokens = patch_tokens(model.backbone, normalised(image, model.backbone, device))
    height, width = image.shape[:2]
    return ComponentMap(components=principal_components(tokens, count), grid=(height // patch_px, width // patch_px))


def picture(config: PcaConfig) -> Figure:
    """The figure of a config.

    Raises:
        CrispError: images or weights that cannot be used, or a size that does not fit a model's patches.
    """
    seen = load_seen(config)
    count = ONE_BY_ONE if config.one_by_one else 3
    maps = []
    for name, views in zip(seen.names, seen.views, strict=True):
        try:
            maps.append(
                [component_map(m, v, count=count, device=seen.device) for m, v in zip(seen.models, views, strict=True)]
            )
        except CrispError as error:
            raise CrispError(f"{name}: {error}") from error
    return draw_pca(
        [views[0] for views in seen.views], maps, [model.name for model in seen.models],
        one_by_one_too=config.one_by_one, width_in=config.width_in,
    )  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(PcaConfig, args=args, prog="crisp viz pca", description=__doc__)
    log.info("%s", save_figure(picture(config), config.out))


if __name__ == "__main__":
    main()
