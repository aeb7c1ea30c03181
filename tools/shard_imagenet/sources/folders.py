"""Folders of images: one folder per class, or all files in one, with or without a CSV of labels.

Folders train and val (or validation) in a source that has no other folders but test are splits.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp.errors import CrispError
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import ClassIds, Listing, ListingWriter
from crisp.shard_imagenet.sources.labels_csv import CsvLabels
from crisp.shard_imagenet.sources.wanted import final_classes, label_names, wanted_splits
from crisp.storage import Found, Location

_SPLITS = {"train": "train", "val": "val", "validation": "val"}


def recognise(source: Location) -> bool:
    """Any folder may be one of images."""
    return True


def list_splits(source: Location, cfg: ShardConfig, folder: Path) -> list[Listing]:
    """List class folders (labels by sorted name, files at any depth below) or flat folders.

    Raises:
        CrispError: not a folder; class folders in one split and integer labels in the other.
        OSError: a folder cannot be listed.
    """
    if not source.is_folder():
        raise CrispError(
            f"{source}: a file that is neither ImageNet's tar, a WebDataset shard nor Parquet; "
            f"give a folder of images or of class folders"
        )
    names = split_folders(source)
    if names:
        roots = {split: source / names[split] for split in wanted_splits(cfg, names)}
    elif cfg.split != "auto":
        wanted_splits(cfg, ())
    else:
        roots = {"": source}
    labels = None if cfg.labels is None else CsvLabels(cfg.labels)
    return list_roots(roots, cfg, folder, layout="class folders", labels=labels)


def split_folders(source: Location) -> dict[str, str]:
    """Folder names by split, if the source's folders are splits and nothing else."""
    folders = [found.name for found in source.children() if found.is_folder and not found.name.startswith(".")]
    names = {_SPLITS[name]: name for name in folders if name in _SPLITS}
    return names if names and not set(folders) - {*names.values(), "test"} else {}


def list_roots(
    roots: dict[str, Location],
    cfg: ShardConfig,
    folder: Path,
    *,
    layout: str,
    labels: CsvLabels | None,
    known: Sequence[str] = (),
) -> list[Listing]:
    """Listings of the folders of each split, with one list of classes for all.

    Args:
        roots: folder by split.
        cfg: classes, links.
        folder: for the tables.
        layout: name of the layout, where the folders hold class folders.
        labels: of the files in flat folders.
        known: classes that there are in any case.

    Raises:
        CrispError, OSError: as `list_splits`.
    """
    ids = ClassIds(known)
    listed = [_list_root(root, cfg, ListingWriter(folder, split=split), ids, labels) for split, root in roots.items()]
    if labels is not None:
        if not any(flat for _, flat in listed):
            raise CrispError(
                f"labels={labels.where}: {cfg.source} has class folders, which are the labels; leave --labels out"
            )
        writer = next(writer for writer, flat in reversed(listed) if flat)
        for name in labels.unused:
            writer.reject(name, f"no such file: named in {Location(labels.where).name}")
    names, label_of = final_classes(cfg, ids)
    if labels is not None and labels.integers:
        if ids.sorted()[0]:
            raise CrispError(
                f"{labels.where}: its labels are numbers, but {cfg.source} has class folders too; "
                f"write class names there"
            )
        names = label_names(cfg, (), labels.largest)
    listings = []
    for writer, flat in listed:
        numbers = flat and labels is not None and labels.integers
        listings.append(
            writer.finish(
                layout=("flat folder" if labels is None else "flat folder with labels") if flat else layout,
                classes=names,
                by_class=not flat,
                label_of=None if numbers or (flat and labels is None) else label_of,
            )
        )
    return listings


def _list_root(
    root: Location, cfg: ShardConfig, writer: ListingWriter, ids: ClassIds, labels: CsvLabels | None
) -> tuple[ListingWriter, bool]:
    """Add everything below a folder; the writer, and whether the folder is flat."""
    walk = _Walk(root, writer, follow_links=cfg.follow_links)
    top = root.children()
    container = writer.add_container("folder", root)
    classes = [found for found in top if found.is_folder and not found.name.startswith(".")]
    for found in top:
        if found.is_folder and found.name.startswith("."):
            writer.reject(found.name, "hidden folder")
        elif not found.is_folder and classes:
            writer.reject(found.name, "beside the class folders")
        elif not found.is_folder:
            for name, size in walk.file(found, found.name):
                label = _flat_label(name, writer, ids, labels)
                if label is not None:
                    writer.add(name, label=label, container=container, size=size)
    for found in classes:
        files = walk.folder(found, found.name, above=(os.path.realpath(str(root)),))
        if not found.is_link:  # an empty folder is a class, a link that is refused is none
            ids.add(found.name)
        for name, size in files:
            writer.add(name, label=ids.add(found.name), container=container, size=size)
    return writer, not classes


def _flat_label(name: str, writer: ListingWriter, ids: ClassIds, labels: CsvLabels | None) -> int | None:
    """−1 where labels are not wanted; None, and a rejection, where there should be one."""
    if labels is None:
        return -1
    label = labels.take(name)
    if label is None:
        if name != Location(labels.where).name:  # the CSV may lie among the images
            writer.reject(name, f"no label: not in {Location(labels.where).name}")
        return None
    return int(label) if labels.integers else ids.add(label)


@dataclass(frozen=True, slots=True)
class _Walk:
    """Files below a folder, in the order of sorted names. Only local folders have links."""

    root: Location
    writer: ListingWriter
    follow_links: bool

    def folder(self, found: Found, path: str, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        """Path and size of each file below; `above` holds the real paths of the folders that led here by a link."""
        if found.is_link:
            real = self._target(path)
            if any(real == folder or folder.startswith(real + os.sep) for folder in (*above, self._real(path))):
                self.writer.reject(path, "refused: link loop")
                return
            if not self._may_follow(real, path):
                return
            above = (*above, real)
        for child in (self.root / path).children():
            inner = f"{path}/{child.name}"
            if child.is_folder and child.name.startswith("."):
                self.writer.reject(inner, "hidden folder")
            elif child.is_folder:
                yield from self.folder(child, inner, above)
            else:
                yield from self.file(child, inner)

    def file(self, found: Found, path: str) -> Iterator[tuple[str, int]]:
        """The file, unless it is a pipe, a device, or a link that must not be followed."""
        if found.is_link and not found.is_file:
            self.writer.reject(path, "refused: link loop" if _circular(str(self.root / path)) else "broken link")
        elif not found.is_file:  # whoever opened a pipe would wait for ever
            self.writer.reject(path, "not a regular file")
        elif not found.is_link or self._may_follow(self._target(path), path):
            yield path, found.size

    def _may_follow(self, real: str, path: str) -> bool:
        root = os.path.realpath(str(self.root))
        if real != root and not real.startswith(root + os.sep):
            if not self.follow_links:
                self.writer.reject(path, "refused: link out of the source (--follow-links takes it)")
            return self.follow_links
        # What is hidden is not listed by itself; anything else would be in the shards twice.
        if not any(part.startswith(".") for part in os.path.relpath(real, root).split(os.sep)):
            self.writer.reject(path, "link within the source: what it leads to is listed by itself")
            return False
        return True

    def _target(self, path: str) -> str:
        return os.path.realpath(str(self.root / path))

    def _real(self, path: str) -> str:
        """The folder that the link lies in."""
        return os.path.realpath(str((self.root / path).url.rpartition("/")[0]))


def _circular(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False
