"""What a source holds, whatever its layout: `list_source` finds the layout and lists its splits.

Each layout is a module with two functions. `recognise(source)` says whether a source has this layout, by looking at
names alone. `list_splits(source, cfg, folder)` lists the splits that `cfg` wants, 'train' before 'val'.
"""

import dataclasses
import logging
from pathlib import Path
from types import ModuleType

from crisp.errors import CrispError
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import Listing
from crisp.shard_imagenet.sources import folders, imagenet_tars, kaggle, parquet, webdataset
from crisp.storage import Location

log = logging.getLogger(__name__)

# In the order in which they are tried: the first that recognises a source takes it, and folders take any.
LAYOUTS: dict[str, ModuleType] = {
    "imagenet-tars": imagenet_tars,
    "kaggle": kaggle,
    "webdataset": webdataset,
    "parquet": parquet,
    "folders": folders,
}


def list_source(cfg: ShardConfig, folder: Path) -> list[Listing]:
    """List the splits of `cfg.source`; a single one has the name ''.

    Args:
        cfg: which source, and how to take it.
        folder: a local folder for the tables; once they are listed, it may be removed.

    Raises:
        CrispError: no such source, nothing in it, the wanted split is not there, labels that do not fit.
        OSError: it cannot be read.
    """
    source = Location.of(cfg.source)
    if source.size() is None and not source.is_folder():
        raise CrispError(
            f"{source}: no such file or folder; give a folder of images, or what 'crisp shard --help' names"
        )
    layout: str = cfg.layout
    if layout == "auto":
        layout = next(name for name, module in LAYOUTS.items() if module.recognise(source))
    listings = LAYOUTS[layout].list_splits(source, cfg, folder)
    for listing in listings:
        if not len(listing):
            named = f"{source} ({listing.split})" if listing.split else str(source)
            raise CrispError(f"{named}: no file in it; give a folder of images or of class folders")
        log.info(
            "%s%s: %s, %s files, %s",
            source,
            f" ({listing.split})" if listing.split else "",
            listing.layout,
            f"{len(listing):,}",
            f"{len(listing.classes):,} classes" if listing.classes else "no labels",
        )
    if len(listings) == 1:
        return [dataclasses.replace(listings[0], split="")]
    return listings
