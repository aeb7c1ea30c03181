"""The evaluations that `crisp eval all` knows, each with its protocol's own choices."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crisp.distributed import World
from crisp.evals.classification.command_knn import KnnConfig, evaluate_knn
from crisp.evals.classification.command_linear import LinearConfig, evaluate_linear
from crisp.evals.classification.data import find_imagenet
from crisp.evals.config import EvalConfig
from crisp.evals.multilabel.coco import find_coco2014, find_coco2017
from crisp.evals.multilabel.command import Dataset as MultilabelDataset
from crisp.evals.multilabel.command import MultilabelConfig, evaluate_multilabel
from crisp.evals.multilabel.visual_genome import find_visual_genome
from crisp.evals.multilabel.voc import find_voc2012_multilabel
from crisp.evals.results import Result
from crisp.evals.segmentation.ade20k import find_ade20k
from crisp.evals.segmentation.cityscapes import find_cityscapes
from crisp.evals.segmentation.command_knn import evaluate_knn as evaluate_seg_knn
from crisp.evals.segmentation.command_linear import evaluate_linear as evaluate_seg_linear
from crisp.evals.segmentation.config import Dataset as SegmentationDataset
from crisp.evals.segmentation.config import SegKnnConfig, SegLinearConfig
from crisp.evals.segmentation.voc2012 import find_sbd, find_voc2012
from crisp.evals.suite import Evaluation
from crisp.evals.video.command import evaluate_video
from crisp.evals.video.config import VideoConfig
from crisp.evals.video.layouts import (
    Dataset as VideoDataset,
)
from crisp.evals.video.layouts import (
    find_davis2016,
    find_davis2017,
    find_mose,
    find_youtube_vos,
)
from crisp.models.frozen import FrozenModel

Find = Callable[[Path], Path | None]

VIDEO_BATCH = 8
"""Frames are larger than the other evaluations' images"""
LIST_FOLDERS = (".", "imagenet_subsets")
"""SimCLR's lists lie in a folder of this name in its repository"""


def _common(config: EvalConfig, found: Path) -> dict[str, Any]:
    return {
        "weights": config.weights,
        "data": found,
        "out": config.out,
        "cache": config.cache,
        "batch": config.batch,
        "device": config.device,
        "threads": config.threads,
        "precision": config.precision,
    }


def _one(evaluate: Callable[[Any, FrozenModel, World], Result]) -> Callable[[Any, FrozenModel, World], list[Result]]:
    return lambda config, model, world: [evaluate(config, model, world)]


# --- segmentation ----------------------------------------------------------------------------------------------------


def _segmentation(dataset: SegmentationDataset, find: Find, wanted: str) -> list[Evaluation[Any]]:
    def choices(config: EvalConfig, found: Path) -> dict[str, Any]:
        if dataset != "voc2012":
            return {**_common(config, found), "dataset": dataset}
        sbd = find_sbd(found)
        train_set = "train" if sbd is None else "trainaug"
        return {**_common(config, found), "dataset": dataset, "sbd": sbd, "train_set": train_set}

    def note(config: SegKnnConfig | SegLinearConfig) -> str:
        if dataset == "voc2012" and config.train_set == "train":
            return "VOC 2012: fitted on the 1,464 images of train alone; SBD, for the 10,582 of trainaug, is not there."
        return ""

    return [
        Evaluation(
            task="seg-knn", dataset=dataset, find=find, wanted=wanted, note=note, run=_one(evaluate_seg_knn),
            configure=lambda config, found: SegKnnConfig(**choices(config, found)),
        ),
        Evaluation(
            task="seg-linear", dataset=dataset, find=find, wanted=wanted, note=note, run=_one(evaluate_seg_linear),
            configure=lambda config, found: SegLinearConfig(**choices(config, found)),
        ),
    ]  # fmt: skip


# --- video -----------------------------------------------------------------------------------------------------------


def _video(dataset: VideoDataset, split: str, find: Find, wanted: str) -> Evaluation[Any]:
    def configure(config: EvalConfig, found: Path) -> VideoConfig:
        own = {**_common(config, found), "batch": min(config.batch, VIDEO_BATCH)}
        return VideoConfig(**own, dataset=dataset, split=split)

    def note(config: VideoConfig) -> str:
        if split != "holdout":
            return ""
        return (
            f"{dataset}: on a held-out tenth of train's videos; the paper's are of validation, whose truth is hidden."
        )

    name = dataset if split in ("val", "holdout") else f"{dataset}-{split}"
    return Evaluation(
        task="video", dataset=name, find=find, wanted=wanted, configure=configure, run=_one(evaluate_video), note=note
    )  # fmt: skip


def _find_davis2016_alone(root: Path) -> Path | None:
    """DAVIS-2017's archive holds the lists of 2016, too; whoever has it wants the objects apart."""
    return None if find_davis2017(root) is not None else find_davis2016(root)


# --- classification --------------------------------------------------------------------------------------------------


def _find_list(places: Sequence[Path], name: str) -> Path | None:
    return next((path for place in places for sub in LIST_FOLDERS if (path := place / sub / name).is_file()), None)


def _configure_knn(config: EvalConfig, found: Path) -> KnnConfig:
    places = (config.data, found, found.parent)
    return KnnConfig(
        **_common(config, found),
        list_1pct=_find_list(places, "1percent.txt"),
        list_10pct=_find_list(places, "10percent.txt"),
    )


def _note_knn(config: KnnConfig) -> str:
    lists = {"1percent.txt": config.list_1pct, "10percent.txt": config.list_10pct}
    if missing := [name for name, path in lists.items() if path is None]:
        return f"ImageNet k-NN: SimCLR's {' and '.join(missing)} not there, so not scored with such a part of train."
    return ""


# --- multi-label -----------------------------------------------------------------------------------------------------


def _multilabel(dataset: MultilabelDataset, name: str, find: Find, wanted: str) -> Evaluation[Any]:
    return Evaluation(
        task="multilabel", dataset=name, find=find, wanted=wanted, run=_one(evaluate_multilabel),
        configure=lambda config, found: MultilabelConfig(**_common(config, found), dataset=dataset),
    )  # fmt: skip


_IMAGENET = "train and val of ImageNet, as class folders or shards"

EVALUATIONS: tuple[Evaluation[Any], ...] = (
    Evaluation(
        task="knn", dataset="imagenet", find=find_imagenet, wanted=_IMAGENET, configure=_configure_knn,
        run=evaluate_knn, note=_note_knn,
    ),
    *_segmentation("voc2012", find_voc2012, "VOC2012 with ImageSets/Segmentation"),
    *_segmentation("cityscapes", find_cityscapes, "leftImg8bit/train and gtFine/train"),
    *_segmentation("ade20k", find_ade20k, "images/training and annotations/training"),
    _multilabel("voc2012", "voc2012", find_voc2012_multilabel, "VOC2012 with Annotations and ImageSets/Main"),
    _multilabel("coco2014", "coco", find_coco2014, "annotations/instances_train2014.json"),
    _multilabel("coco2017", "coco2017", find_coco2017, "annotations/instances_train2017.json"),
    _multilabel("vg", "vg", find_visual_genome, "objects.json and VG_100K"),
    _video("davis2017", "val", find_davis2017, "ImageSets/2017/val.txt"),
    _video("davis2016", "val", _find_davis2016_alone, "DAVIS-2016 by itself"),
    _video("youtube-vos", "holdout", lambda root: find_youtube_vos(root, "holdout"), "train/meta.json of YouTube-VOS"),
    _video("youtube-vos", "valid", find_youtube_vos, "valid/meta.json of YouTube-VOS"),
    _video("mose", "holdout", lambda root: find_mose(root, "holdout"), "train/Annotations of MOSE"),
    _video("mose", "valid", find_mose, "valid/Annotations of MOSE"),
    Evaluation(
        task="linear", dataset="imagenet", find=find_imagenet, wanted=_IMAGENET, run=_one(evaluate_linear),
        configure=lambda config, found: LinearConfig(**_common(config, found)),
    ),
)  # fmt: skip
"""For each task in the order in which they run"""
