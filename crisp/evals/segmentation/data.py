"""A segmentation data set as every layout describes it: two splits of (image, mask) files, and what its ids mean."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError

log = logging.getLogger(__name__)

IDS = 256
"""Masks hold one byte per pixel"""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Pair:
    """One image and its mask."""

    name: str
    """What files are sorted by: the image's path below its split's folder, without its ending"""
    image: Path
    mask: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Pairs sorted by name."""

    name: str
    """As the archive calls it: `training`, `trainaug`"""
    pairs: tuple[Pair, ...]
    official: int | None = None
    """Images that the published split has"""
    fingerprint: str = ""
    """Hex digest of the files' names and sizes: the key of caches. Set by `checked`"""

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What the ids of the mask files mean."""

    table: NDArray[np.uint8] = field(default_factory=lambda: np.arange(IDS, dtype=np.uint8))
    """[256] uint8: from the file's id to the label that is scored"""
    known: tuple[int, ...] = tuple(range(IDS))
    """Ids that a file may hold"""
    ignored: tuple[int, ...]
    """Labels whose pixels are not scored"""
    classes: tuple[int, ...] | None = None
    """Labels that train must hold; None: those that the masks hold"""
    names: tuple[str, ...] | None = None
    """Of `classes`, in their order"""

    def title(self, label: int) -> str:
        """`7`, or `7 (traffic sign)` where names are known."""
        if self.classes is None or self.names is None or label not in self.classes:
            return str(label)
        return f"{label} ({self.names[self.classes.index(label)]})"


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationData:
    """A data set that was found and whose files are there."""

    name: str
    """As the paper's tables call it"""
    slug: str
    """As `crisp.evals.paper` calls it; for file names"""
    root: Path
    train: Split
    val: Split
    labels: Labels
    note: str = ""
    """What a reader of the scores must know about the splits"""


def checked(data: SegmentationData) -> SegmentationData:
    """The same with fingerprints, after every file was looked for.

    Raises:
        CrispError: a split without images, a file that is missing or empty, or one name twice.
    """
    splits = []
    for split in (data.train, data.val):
        if not split.pairs:
            raise CrispError(f"{data.root}: {data.name} {split.name} holds no image; unpack the whole archive")
        if split.official is not None and len(split) != split.official:
            log.warning(
                "%s %s: %d images, the published split has %d: the scores are not comparable",
                data.name, split.name, len(split), split.official,
            )  # fmt: skip
        splits.append(fingerprinted(split, data.name))
    train, val = splits
    shared = {pair.image.resolve() for pair in train.pairs} & {pair.image.resolve() for pair in val.pairs}
    if shared and not data.note:
        raise CrispError(
            f"{min(shared)}: is in {train.name} and in {val.name} ({len(shared)} in all); give splits that differ"
        )
    return SegmentationData(
        name=data.name, slug=data.slug, root=data.root, train=train, val=val, labels=data.labels, note=data.note
    )


def fingerprinted(split: Split, title: str) -> Split:
    """The same, sorted and with its fingerprint, after every file was looked for; `title` is the data set's.

    Raises:
        CrispError: a file that is missing or empty.
    """
    pairs = tuple(sorted(split.pairs))
    files = [path for pair in pairs for path in (pair.image, pair.mask)]
    with ThreadPoolExecutor(16) as pool:  # on a network file system each look takes a while
        sizes = list(pool.map(_size, files))
    missing = [path for path, size in zip(files, sizes, strict=True) if size is None]
    empty = [path for path, size in zip(files, sizes, strict=True) if size == 0]
    for faulty, what in ((missing, "missing"), (empty, "empty")):
        if faulty:
            raise CrispError(
                f"{faulty[0]}: is {what} ({len(faulty)} of the {len(files)} files of {title} {split.name} are); "
                f"unpack the whole archive"
            )
    digest = hashlib.sha256()
    for pair, image_size, mask_size in zip(pairs, sizes[::2], sizes[1::2], strict=True):
        digest.update(f"{pair.name}\n{pair.image.name} {image_size}\n{pair.mask.name} {mask_size}\n".encode())
    return Split(name=split.name, pairs=pairs, official=split.official, fingerprint=digest.hexdigest())


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CrispError(
            f"{path}: cannot be looked at ({error.strerror}); check the disk and its permissions"
        ) from error


def read_list(path: Path) -> list[str]:
    """The names in a split's list file, one per line.

    Raises:
        CrispError: no such file, or a name twice.
    """
    try:
        names = path.read_text().split()
    except FileNotFoundError:
        raise CrispError(f"{path}: there is no such list; unpack the whole archive") from None
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise CrispError(f"{path}: names {twice} twice; take the list from the archive again")
    return names


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files right in a folder with one of these endings, whatever their case, sorted by name; hidden ones left out.

    Raises:
        CrispError: no such folder.
    """
    if not folder.is_dir():
        raise CrispError(f"{folder}: there is no such folder; give the folder that the archive unpacks to")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))


def first_that(holds: Callable[[Path], bool], folders: Iterable[Path]) -> Path | None:
    """The first folder for which this holds."""
    return next((folder for folder in folders if holds(folder)), None)


def places(root: Path, *below: str) -> list[Path]:
    """The folder itself and those right in it, each with the sub-folders that an archive may unpack to."""
    try:
        inside = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for folder in (root, *inside) for name in (".", *below)]
