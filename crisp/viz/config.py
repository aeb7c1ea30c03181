"""The choices of every picture that shows what models make of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crisp.errors import CrispError
from crisp.viz.figure import PAGE_WIDTH_IN, check_out
from crisp.viz.inputs import Shape, check_size


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureConfig:
    """Which models, which images, and where the picture goes.

    A picture's own config derives from this one and calls `PictureConfig.__post_init__(self)` (`super()` does not work
    in a class with slots that a decorator makes).
    """

    weights: tuple[str, ...]
    """A column each: folder of a run or of one of its checkpoints; timm:NAME; timm:NAME@FILE; SYSTEM:FILE; or FILE."""
    images: tuple[str, ...]
    """Image files, folders with images at any depth, or folders (or URLs) written by `crisp shard`."""
    out: Path
    """The picture, .png or .pdf."""
    names: tuple[str, ...] = ()
    """What the columns are called, one for each of the weights; default: what was loaded."""
    sample: tuple[int, ...] = ()
    """Numbers of the images to draw, from 0, in the order of --images; default: --count of them."""
    count: int = 4
    """How many are drawn where --sample names none."""
    width_in: float = PAGE_WIDTH_IN
    """Width of the page in inches, at most."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("weights", "images"):
            if not getattr(self, name) or not all(getattr(self, name)):
                raise CrispError(f"{name}: none given; name some, as in --{name} A B")
        if self.names and len(self.names) != len(self.weights):
            raise CrispError(f"names: {len(self.names)} for {len(self.weights)} weights; give one for each, or none")
        if self.count < 1:
            raise CrispError(f"count={self.count}: must be 1 or more")
        if not 1 <= self.width_in <= 100:
            raise CrispError(f"width_in={self.width_in:g}: must lie between 1 and 100 inches")
        check_out(self.out)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapedPictureConfig(PictureConfig):
    """Of the pictures that show each image in a shape of the user's choice."""

    size_px: int = 448
    """Side of the square that the models see (crop, squash), or the longer side (whole); up to 1120."""
    shape: Shape = "crop"
    """crop: the middle square; squash: the whole image made square; whole: the whole image, its aspect kept."""

    def __post_init__(self) -> None:
        PictureConfig.__post_init__(self)
        check_size(self.size_px, 1, who="any model")
