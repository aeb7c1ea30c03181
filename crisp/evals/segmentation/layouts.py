"""Which layout a folder has."""

from collections.abc import Callable
from pathlib import Path

from crisp.errors import CrispError
from crisp.evals.segmentation.ade20k import find_ade20k, open_ade20k
from crisp.evals.segmentation.cityscapes import find_cityscapes, open_cityscapes
from crisp.evals.segmentation.config import Dataset, SegmentationConfig
from crisp.evals.segmentation.data import SegmentationData
from crisp.evals.segmentation.folder import open_folder
from crisp.evals.segmentation.voc2012 import find_voc2012, open_voc2012

FINDERS: dict[Dataset, Callable[[Path], Path | None]] = {
    "ade20k": find_ade20k,
    "voc2012": find_voc2012,
    "cityscapes": find_cityscapes,
}


def open_data(config: SegmentationConfig) -> SegmentationData:
    """The data set that the config names, every file looked for.

    Raises:
        CrispError: no layout, or several, are recognised, or a file is missing.
    """
    match _recognised(config):
        case "ade20k":
            return open_ade20k(config.data)
        case "voc2012":
            return open_voc2012(config.data, config.train_set, config.sbd)
        case "cityscapes":
            return open_cityscapes(config.data)
        case _:
            return open_folder(config.data, config.folder)


def _recognised(config: SegmentationConfig) -> Dataset:
    if config.dataset != "auto":
        return config.dataset
    if not config.data.is_dir():
        raise CrispError(f"{config.data}: there is no such folder; give the folder that the archive unpacks to")
    found = [name for name, find in FINDERS.items() if find(config.data)]
    if len(found) != 1:
        what = f"holds {' and '.join(found)}" if found else f"no layout of {', '.join(FINDERS)}"
        raise CrispError(f"{config.data}: {what}; name one with --dataset (folder: any images and index masks)")
    return found[0]
