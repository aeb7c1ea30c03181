"""Sparse correspondence: the patches that the model attends to most, and where another image matches them best.

    crisp viz correspondence --weights runs/vits16 --images cat1.jpg cat2.jpg --out pairs.pdf
    crisp viz correspondence --between views --weights runs/vits16 --images photos/ --out views.pdf --measured 500

Between images, each two that follow each other are a pair: give two of one class (paper, Figures 3 and 8). Between
views it is two augmented views of each image, crops of 40 to 100 % with flips and colour jitter (Figure 7); the right
match is known there, and the accuracy is printed: the share of the patches in the overlap whose match is the true
nearest patch. As in iBOT: 224 px, the whole image made square, patches of the last block through the final norm, dot
products.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from crisp.config import ViewsConfig
from crisp.distributed import pick_device
from crisp.errors import CrispError
from crisp.geometry import compose, invert
from crisp.models.frozen import FrozenModel
from crisp.models.published import load_frozen
from crisp.viz.augmented import check_seed, render_views, renormalised
from crisp.viz.config import PictureConfig
from crisp.viz.figure import COLOURS, PAGE_WIDTH_IN, save_figure
from crisp.viz.inputs import Images, check_size, prepare
from crisp.viz.matching import (
    Ints,
    Truth,
    best_matches,
    match_accuracy,
    most_attended,
    nearest_resize,
    true_matches,
)
from crisp.viz.models import check_cls, cls_attention, load_models, normalised, patch_tokens
from crisp.viz.region_figure import denormalise
from crisp.viz.sheet import Group, Image, caption, new_sheet, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_RIGHT, _WRONG = "#0072b2", "#e69f00"
_BETWEEN = 0.06  # white between the two images, in their side
_BATCH = 32  # images whose views are held at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrespondenceConfig(PictureConfig):
    """What to draw."""

    between: Literal["images", "views"] = "images"
    """images: pairs of images that follow each other; views: two augmented views of each image."""
    top: int = 12
    """Patches whose match is drawn: those that [CLS] attends to most, on the mean over heads."""
    attention_weights: str | None = None
    """Take the attention of this model instead of each model's own; iBOT takes dino:dino_vitbase8_pretrain.pth."""
    size_px: int = 224
    """Side of the images and views."""
    seed: int = 0
    """Of the views' crops and colours."""
    measured: int = 0
    """Images of which the accuracy between views is measured, if that is more than are drawn."""

    def __post_init__(self) -> None:
        PictureConfig.__post_init__(self)
        check_size(self.size_px, 1, who="any model")
        check_seed(self.seed)
        if self.top < 1:
            raise CrispError(f"top={self.top}: must be 1 or more")
        if self.measured < 0:
            raise CrispError(f"measured={self.measured}: must be 0 or more")
        if self.measured and self.between == "images":
            raise CrispError(
                f"measured={self.measured}: between images the right match is unknown; take --between views"
            )
        if self.between == "images" and len(self.sample) % 2:
            raise CrispError(f"sample: {len(self.sample)} images are no pairs; name an even number")


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What a model finds between two images."""

    patches: Ints
    """[k] of the first image, the most attended first"""
    matches: Ints
    """[k] patches of the second image"""
    grid: int
    """Patches along a side of either"""
    right: tuple[bool, ...] | None = None
    """[k] where the truth is known"""
    accuracy: float | None = None
    """Over all patches of the overlap"""


def find_match(
    model: FrozenModel, attending: FrozenModel, images: tuple[Tensor, Tensor], attended: Tensor, *, top: int,
    truth: Truth | None = None,
) -> Match:  # fmt: skip
    """Matches of the most attended patches.

    Args:
        model: whose features are matched.
        attending: whose attention chooses.
        images: [1, 3, H, H] twice, as the model wants them.
        attended: the first of them as the attending model wants it.
        top: how many.
        truth: where the two are views of one image.
    """
    grid = images[0].shape[-1] // model.backbone.patch_px
    first, second = (patch_tokens(model.backbone, image) for image in images)
    found = best_matches(first, second)
    attention = nearest_resize(cls_attention(attending.backbone, attended), grid)
    overlap = truth.overlap if truth else None
    patches = most_attended(attention.reshape(len(attention), -1), top, among=overlap)
    return Match(
        patches=patches,
        matches=found[patches],
        grid=grid,
        right=tuple((found == truth.nearest)[patches].tolist()) if truth else None,
        accuracy=match_accuracy(found, truth) if truth else None,
    )


# --- the picture -----------------------------------------------------------------------------------------------------


def draw_correspondence(
    pairs: Sequence[tuple[Image, Image]],
    matches: Sequence[Sequence[Match]],
    names: Sequence[str],
    *,
    width_in: float = PAGE_WIDTH_IN,
) -> Figure:
    """A row per pair, a column per model: both images, and lines from each patch to its match.

    Where the truth is known, right matches are blue and drawn through, wrong ones orange and dashed.

    Args:
        pairs: [H, H, 3] uint8 twice, each.
        matches: by pair, then by model.
        names: of the models.
        width_in: of the page.
    """
    known = matches[0][0].right is not None
    sheet = new_sheet(
        [Group(head=name, units=(2 + _BETWEEN,)) for name in names],
        [1.0] * len(pairs),
        width_in=width_in,
        captions=known,
    )
    for pair, of_pair, panels in zip(pairs, matches, sheet.panels, strict=True):
        for match, (panel,) in zip(of_pair, panels, strict=True):
            _draw_match(panel, pair, match)
    return sheet.figure


def _draw_match(panel: Axes, pair: tuple[Image, Image], match: Match) -> None:
    from matplotlib.patheffects import withStroke

    side = pair[0].shape[0]
    between = round(_BETWEEN * side)
    show(panel, np.hstack([pair[0], np.full((side, between, 3), 255, np.uint8), pair[1]]), smooth=True)
    patch_px = side / match.grid
    for number, (start, end) in enumerate(zip(match.patches.tolist(), match.matches.tolist(), strict=True)):
        (y0, x0), (y1, x1) = ((np.array(divmod(patch, match.grid)) + 0.5) * patch_px for patch in (start, end))
        colour, style = COLOURS[number % 6], "solid"
        if match.right is not None:
            colour, style = (_RIGHT, "solid") if match.right[number] else (_WRONG, "dashed")
        panel.plot(
            [x0, x1 + side + between], [y0, y1], color=colour, linestyle=style, linewidth=0.9, marker="o",
            markersize=2.6, markeredgewidth=0, path_effects=[withStroke(linewidth=1.8, foreground="#ffffffc0")],
        )  # fmt: skip
    if match.right is not None:
        text = "no overlap" if match.accuracy is None else f"{match.accuracy:.0%} of the overlap right"
        caption(panel, text)


# --- the command line ------------------------------------------------------------------------------------------------


def picture(config: CorrespondenceConfig) -> Figure:
    """The figure of a config; the accuracy between views is logged, for each model over all images.

    Raises:
        CrispError: images or weights that cannot be used, a size that does not fit a model's patches, or a model
            without a [CLS] token that shall attend.
    """
    images = Images(config.images)
    device = pick_device(config.device, 0)
    numbers = _numbers(config, images)
    models = load_models(config.weights, config.names, device)
    fixed = load_frozen(config.attention_weights, device=device) if config.attention_weights else None
    for model in [*models, *([fixed] if fixed else [])]:
        check_size(config.size_px, model.backbone.patch_px, who=model.name)
    for model in [fixed] if fixed else models:
        check_cls(model, device, remedy="give another model's attention with --attention-weights")
    if config.between == "images":
        pairs, matches = _between_images(config, images, numbers, models, fixed, device)
    else:
        pairs, matches = _between_views(config, images, numbers, models, fixed, device)
    return draw_correspondence(pairs, matches, [model.name for model in models], width_in=config.width_in)


def _numbers(config: CorrespondenceConfig, images: Images) -> list[int]:
    if config.between == "images":
        numbers = images.chosen(config.sample, 2 * config.count, spread=False)
        numbers = numbers[: len(numbers) // 2 * 2]
        if not numbers:
            raise CrispError(f"images: {len(images)} given, which is no pair; give two or more, or --between views")
        return numbers
    return images.chosen(config.sample, max(config.count, config.measured), spread=True)


def _between_images(
    config: CorrespondenceConfig, images: Images, numbers: list[int], models: list[FrozenModel],
    fixed: FrozenModel | None, device: torch.device,
) -> tuple[list[tuple[Image, Image]], list[list[Match]]]:  # fmt: skip
    squares = [prepare(images.decode(n), size_px=config.size_px, patch_px=1, shape="squash") for n in numbers]
    pairs, matches = list(zip(squares[::2], squares[1::2], strict=True)), []
    for (first, second), one, other in zip(pairs, numbers[::2], numbers[1::2], strict=True):
        log.info("%s – %s", images.name(one), images.name(other))
        of_pair = []
        for model in models:
            attending = fixed or model
            both = (normalised(first, model.backbone, device), normalised(second, model.backbone, device))
            of_pair.append(
                find_match(model, attending, both, normalised(first, attending.backbone, device), top=config.top)
            )
        matches.append(of_pair)
    return pairs, matches


def _between_views(
    config: CorrespondenceConfig, images: Images, numbers: list[int], models: list[FrozenModel],
    fixed: FrozenModel | None, device: torch.device,
) -> tuple[list[tuple[Image, Image]], list[list[Match]]]:  # fmt: skip
    views = ViewsConfig(
        patch_px=1, reference_px=config.size_px, global_px=config.size_px, local_views=0, global_scale=(0.4, 1.0),
        blur_probability=(0, 0, 0), solarize_probability=(0, 0, 0), mask_probability=0,
    )  # fmt: skip
    drawn = len(config.sample) or config.count
    pairs: list[tuple[Image, Image]] = []
    matches: list[list[Match]] = []
    for start in range(0, len(numbers), _BATCH):
        batch = render_views(images, numbers[start : start + _BATCH], views, seed=config.seed, epoch=0)
        second_from_first = compose(batch.view_from_reference[1].numpy(), invert(batch.view_from_reference[0].numpy()))
        for b in range(len(batch)):
            if len(pairs) < drawn:
                log.info("%s", images.name(numbers[start + b]))
                first, second = denormalise(batch.global_views[:, b])
                pairs.append((first, second))
            of_image = []
            for model in models:
                attending, patch_px = fixed or model, model.backbone.patch_px
                truth = true_matches(second_from_first[b], grid=config.size_px // patch_px, patch_px=patch_px)
                one, two = renormalised(batch.global_views[:, b], model.backbone, device).split(1)
                seen = renormalised(batch.global_views[:1, b], attending.backbone, device)
                of_image.append(find_match(model, attending, (one, two), seen, top=config.top, truth=truth))
            matches.append(of_image)
    for column, model in enumerate(models):
        shares = [match[column].accuracy for match in matches]
        known = [share for share in shares if share is not None]
        log.info(
            "%s: %.1f %% of the overlap's patches matched right (mean of %d images%s)",
            model.name, 100 * float(np.mean(known)) if known else float("nan"), len(known),
            f"; {len(shares) - len(known)} without overlap left out" if len(known) < len(shares) else "",
        )  # fmt: skip
    return pairs, matches[:drawn]


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(CorrespondenceConfig, args=args, prog="crisp viz correspondence", description=__doc__)
    log.info("%s", save_figure(picture(config), config.out))


if __name__ == "__main__":
    main()
