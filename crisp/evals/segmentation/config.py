"""The choices of `crisp eval seg-knn` and `seg-linear`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crisp.errors import CrispError
from crisp.evals.config import EvalConfig
from crisp.evals.segmentation import protocol
from crisp.evals.segmentation.folder import FolderLayout
from crisp.evals.segmentation.protocol import Distance
from crisp.evals.segmentation.voc2012 import VocTrain

Dataset = Literal["auto", "ade20k", "voc2012", "cityscapes", "folder"]
Dtype = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationConfig(EvalConfig):
    """What both classifiers share."""

    dataset: Dataset = "auto"
    """Layout of --data: ADE20K SceneParsing, PASCAL VOC 2012, Cityscapes, or any folder of images and index masks;
    auto recognises the first three."""
    train_set: VocTrain = "trainaug"
    """Of VOC 2012: train (1,464 images), trainaug (10,582, with SBD), or capi, the list in CAPI's code, which holds
    images of VOC val."""
    sbd: Path | None = None
    """Masks of SBD: its benchmark_RELEASE folder or a SegmentationClassAug folder; default: looked for beside VOC."""
    folder: FolderLayout = field(default_factory=FolderLayout)
    """Of --dataset folder."""
    image_px: int | None = None
    """Side of the square images; default: 16 patches, as the protocol has it."""
    seed: int = protocol.SEED
    """Of the permutation of train whose first tenth is held out to choose hyper-parameters."""
    allow_empty_classes: bool = False
    """Score even if a class has no pixel in train."""

    def __post_init__(self) -> None:
        EvalConfig.__post_init__(self)
        if self.image_px is not None and self.image_px < 1:
            raise CrispError(f"image_px={self.image_px}: must be at least the model's patch")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegKnnConfig(SegmentationConfig):
    """Semantic segmentation by k-NN on frozen patch features (CAPI's protocol)."""

    ks: tuple[int, ...] = protocol.KS
    """Numbers of neighbours to choose from; one k and one distance are taken without a search."""
    distances: tuple[Distance, ...] = protocol.DISTANCES
    """Distances to choose from."""
    dtype: Dtype = "auto"
    """Of the search; auto: bf16 for ADE20K as CAPI has it, else fp32."""
    query_chunk: int = protocol.QUERY_CHUNK
    """Patches that look for their neighbours at a time."""
    key_chunk: int = protocol.KEY_CHUNK
    """Patches of the bank on the device at a time."""

    def __post_init__(self) -> None:
        SegmentationConfig.__post_init__(self)
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise CrispError(f"ks={self.ks}: give different numbers of neighbours, from 1 on")
        if not self.distances or len(set(self.distances)) < len(self.distances):
            raise CrispError(f"distances={self.distances}: give cosine, l2 or both")
        for name in ("query_chunk", "key_chunk"):
            if getattr(self, name) < 1:
                raise CrispError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegLinearConfig(SegmentationConfig):
    """Semantic segmentation by logistic regression on frozen patch features (CAPI's protocol)."""

    cs: tuple[float, ...] = protocol.CS
    """Inverse penalties C to choose from; a single one is taken without a search."""
    max_iter: int = protocol.MAX_ITER
    """Iterations of L-BFGS at most."""

    def __post_init__(self) -> None:
        SegmentationConfig.__post_init__(self)
        if not self.cs or min(self.cs) <= 0 or len(set(self.cs)) < len(self.cs):
            raise CrispError(f"cs={self.cs}: give different positive numbers")
        if self.max_iter < 1:
            raise CrispError(f"max_iter={self.max_iter}: must be at least 1")
