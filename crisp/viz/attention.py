"""Where the [CLS] token looks: its attention to the patches in the last block, the mean over heads and each head.

    crisp viz attention --weights runs/vits16 timm:vit_small_patch16_224.dino --images photos/ --out attention.pdf

Every map is scaled by its own largest value, dark to bright. Position embeddings are resized for other sizes than the
model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tyro

from crisp.viz.config import ShapedPictureConfig
from crisp.viz.figure import PAGE_WIDTH_IN, save_figure
from crisp.viz.models import Array, check_cls, cls_attention, normalised
from crisp.viz.seen import load_seen
from crisp.viz.sheet import Group, Image, coloured, mosaic, mosaic_shape, mosaic_units, new_sheet, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_MAP = "inferno"


def scaled(attention: Array) -> Array:
    """A map with its largest value at 1; all 0 if there is none."""
    largest = float(attention.max())
    return attention / largest if largest > 0 else attention


def draw_attention(
    images: Sequence[Image],
    attention: Sequence[Sequence[Array]],
    names: Sequence[str],
    *,
    width_in: float = PAGE_WIDTH_IN,
) -> Figure:
    """A row per image: the image, then each model's mean over heads, and its heads.

    Args:
        images: [H, W, 3] uint8 each.
        attention: by image, then by model, [h, rows, columns] each.
        names: of the models.
        width_in: of the page.
    """
    shapes = [mosaic_shape(len(maps), in_a_row=len(names) == 1) for maps in attention[0]]
    groups = [Group(head="", labels=("image",))]
    for name, shape, maps in zip(names, shapes, attention[0], strict=True):
        labels = ("mean", f"heads 1 to {len(maps)}")
        groups.append(Group(head=name, units=(1.0, mosaic_units(shape)), labels=labels))
    sheet = new_sheet(groups, [image.shape[0] / image.shape[1] for image in images], width_in=width_in)
    for image, of_image, panels in zip(images, attention, sheet.panels, strict=True):
        show(panels[0][0], image, smooth=True)
        for maps, shape, (mean, heads) in zip(of_image, shapes, panels[1:], strict=True):
            show(mean, coloured(scaled(maps.mean(axis=0)), _MAP))
            show(heads, mosaic([coloured(scaled(head), _MAP) for head in maps], shape))
    return sheet.figure


def picture(config: ShapedPictureConfig) -> Figure:
    """The figure of a config.

    Raises:
        CrispError: images or weights that cannot be used, a size that does not fit a model's patches, or a model
            without a [CLS] token.
    """
    seen = load_seen(config)
    for model in seen.models:
        check_cls(model, seen.device, remedy="leave it out")
    attention = [
        [
            cls_attention(model.backbone, normalised(view, model.backbone, seen.device))
            for model, view in zip(seen.models, views, strict=True)
        ]
        for views in seen.views
    ]
    names = [model.name for model in seen.models]
    return draw_attention([views[0] for views in seen.views], attention, names, width_in=config.width_in)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(ShapedPictureConfig, args=args, prog="crisp viz attention", description=__doc__)
    log.info("%s", save_figure(picture(config), config.out))


if __name__ == "__main__":
    main()
