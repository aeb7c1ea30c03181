"""The choices of `crisp eval region-quality`."""

from dataclasses import dataclass
from typing import Literal

from crisp.config import WarpMode
from crisp.errors import CrispError
from crisp.evals.config import EvalConfig

Dataset = Literal["auto", "ade20k", "voc2012", "cityscapes", "folder"]
SeedPolicy = Literal["uniform", "visible"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionQualityConfig(EvalConfig):
    """Regions as training discovers them, held against true segments and against random regions.

    Grids: each of --thresholds, --blocks, --seed-policies and --warp-modes takes several values, and all combinations
    are scored. What is not given is as in the run that --weights names, or as in the paper for other weights.
    """

    dataset: Dataset = "auto"
    """Layout of --data. auto recognises ADE20K, VOC 2012 and Cityscapes, whose validation split is taken; anything else
    is a folder."""
    images: str = "images"
    """Of a folder: where its images lie, folders in it included."""
    masks: str = "annotations"
    """Of a folder: where the masks lie, each with its image's path and the ending .png: one byte per pixel, an id."""
    ignored: tuple[int, ...] = (255,)
    """Of a folder: ids that belong to no segment; none where every id is one."""
    max_images: int | None = None
    """Take at most so many images, drawn with --seed."""
    thresholds: tuple[float, ...] = ()
    """β."""
    blocks: tuple[int, ...] = ()
    """M, last blocks averaged."""
    seed_policies: tuple[SeedPolicy, ...] = ()
    """Where seeds are drawn: anywhere, or in what both views show."""
    warp_modes: tuple[WarpMode, ...] = ()
    """How regions are followed into the views; the share of valid regions alone depends on it."""
    seeds_per_image: int = 8
    """Regions of each image."""
    seed: int = 0
    """Of the drawn views, seeds and random regions."""
    reference_px: int | None = None
    """Side of the reference image."""
    boundary_px: int | None = None
    """How far a boundary may be off, in pixels of the reference along either axis; default: half a patch, what the
    boundary of the best region of whole patches is off."""
    all_checkpoints: bool = False
    """Score every checkpoint of the run that --weights names, and write RUN/region_quality.json."""

    def __post_init__(self) -> None:
        EvalConfig.__post_init__(self)
        for name in ("thresholds", "blocks", "seed_policies", "warp_modes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise CrispError(f"{name}={values}: a value stands there twice")
        for threshold in self.thresholds:
            if not -1 <= threshold <= 1:
                raise CrispError(f"thresholds={self.thresholds}: {threshold} is no cosine; give values in [-1, 1]")
        for name, least in (("seeds_per_image", 1), ("seed", 0), ("max_images", 1), ("boundary_px", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CrispError(f"{name}={value}: must be {least} or more")
        if any(count < 1 for count in self.blocks):
            raise CrispError(f"blocks={self.blocks}: must be 1 or more")
        if wrong := [label for label in self.ignored if not 0 <= label <= 255]:
            raise CrispError(f"ignored={wrong[0]}: ids lie in 0 to 255")
