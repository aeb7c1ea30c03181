"""The choices of `crisp eval video`."""

from dataclasses import dataclass
from typing import Literal

from crisp.errors import CrispError
from crisp.evals.config import EvalConfig
from crisp.evals.video.frames import Size
from crisp.evals.video.layouts import LAYOUTS, Dataset
from crisp.evals.video.protocol import LAST_BLOCKS


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig(EvalConfig):
    """Video object segmentation by label propagation, scored by J and F, or packed for the data set's server.

    Masks are written beside the results, and those of finished sequences are not computed again. Splits: davis2017
    train, val, test-dev, test-challenge; davis2016 train, val, trainval; youtube-vos and mose valid and test (an
    archive: their truth is hidden), holdout (scored: a tenth of train) and train. The folders of a data set as its
    archives unpack; 'all' takes every video of DAVIS without a list. A folder of images/ and masks/ is the data
    set 'folder'.
    """

    dataset: Dataset = "davis2017"
    """Layout of the data folder."""
    split: str = ""
    """Default: val, valid, or all of a folder."""
    size: Size | Literal["both"] = "480p"
    """480p keeps the aspect, with the long side a multiple of 64; 480x480 does not. The paper names both."""
    layers: int = LAST_BLOCKS
    """Features are the mean of so many last blocks (DINO's own evaluation: 1)."""
    normalisation: Literal["model", "dino"] = "model"
    """Of the pixels: as the model was trained, or DINO's for its evaluation (a std of .228 in red)."""
    batch: int = 8
    """Frames per forward pass on each device."""

    def __post_init__(self) -> None:
        EvalConfig.__post_init__(self)
        if self.layers < 1:
            raise CrispError(f"layers={self.layers}: must be at least 1")
        splits = LAYOUTS[self.dataset].splits
        if self.split and self.split not in splits:
            raise CrispError(f"split={self.split}: {self.dataset} has no such split; choose one of {', '.join(splits)}")

    @property
    def split_or_default(self) -> str:
        """The split that is meant."""
        return self.split or LAYOUTS[self.dataset].default_split

    @property
    def sizes(self) -> tuple[Size, ...]:
        """One or both."""
        return ("480p", "480x480") if self.size == "both" else (self.size,)
