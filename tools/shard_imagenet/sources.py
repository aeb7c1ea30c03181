"""Which files a source holds, in a fixed order, with their labels. Names and sizes only: nothing is opened here."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crisp.errors import CrispError


class SourceFile(NamedTuple):
    """One file that may become a sample. A tuple, since a source can hold millions."""

    number: int
    """Position in the source; the sample's key, so a key does not depend on what happens to other files"""
    path: str
    """Below the source, with '/'"""
    label: int
    """−1: none"""
    size: int
    """Bytes when it was listed"""


class Rejection(NamedTuple):
    """Something in the source that does not become a sample."""

    source: str
    """Path below the source, with '/'"""
    reason: str
    """'kind' or 'kind: detail'; rejections are counted by kind"""

    @property
    def kind(self) -> str:
        """The reason without its detail."""
        return self.reason.partition(":")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Everything below a folder: each thing is in `files` or in `rejections`."""

    files: list[SourceFile]
    classes: tuple[str, ...]
    """Folder names by label; empty for a flat folder"""
    rejections: list[Rejection]


class _Found(NamedTuple):
    path: str
    size: int


def list_source(folder: Path) -> Source:
    """List class folders (labels by sorted name, files at any depth below) or a flat folder (label −1).

    Links to files are followed, and so are links to class folders; deeper links to folders are not, so that no
    loop is possible. Hidden folders are no classes.

    Raises:
        CrispError: no such folder, or no file in it.
        OSError: a folder cannot be listed.
    """
    if not folder.exists():
        raise CrispError(f"{folder}: no such folder; give a folder of images or of class folders")
    if not folder.is_dir():
        raise CrispError(f"{folder}: a file, not a folder; give a folder of images or of class folders")
    rejections: list[Rejection] = []
    top = _sorted_entries(folder)
    classes = tuple(entry.name for entry in top if entry.is_dir() and not entry.name.startswith("."))
    files: list[SourceFile] = []
    for entry in top:
        if entry.is_dir() and entry.name.startswith("."):
            rejections.append(Rejection(entry.name, "hidden folder"))
        elif not entry.is_dir() and classes:
            rejections.append(Rejection(entry.name, "beside the class folders"))
        elif not entry.is_dir():
            files += _numbered(_file(entry, entry.name, rejections), -1, len(files))
    for label, name in enumerate(classes):
        files += _numbered(_walk(folder / name, name, rejections), label, len(files))
    if not files:
        raise CrispError(f"{folder}: no file in it; give a folder of images or of class folders")
    return Source(files=files, classes=classes, rejections=rejections)


def _sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _numbered(found: Iterator[_Found], label: int, first: int) -> Iterator[SourceFile]:
    return (SourceFile(first + i, path, label, size) for i, (path, size) in enumerate(found))


def _walk(folder: Path, prefix: str, rejections: list[Rejection]) -> Iterator[_Found]:
    for entry in _sorted_entries(folder):
        path = f"{prefix}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            if entry.name.startswith("."):
                rejections.append(Rejection(path, "hidden folder"))
            else:
                yield from _walk(folder / entry.name, path, rejections)
        elif entry.is_dir():
            rejections.append(Rejection(path, "link to a folder"))
        else:
            yield from _file(entry, path, rejections)


def _file(entry: os.DirEntry[str], path: str, rejections: list[Rejection]) -> Iterator[_Found]:
    if entry.is_file():
        yield _Found(path, entry.stat().st_size)
    else:  # a broken link, or a pipe or device, which would block whoever opens it
        rejections.append(Rejection(path, "not a regular file"))
