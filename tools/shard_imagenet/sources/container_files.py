"""Tars and Parquet files in a source: which there are, and to which split they belong."""

import logging
import os
import re

from crisp.errors import CrispError
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.sources.folders import split_folders
from crisp.storage import Location

log = logging.getLogger(__name__)

_SPLIT = re.compile(r"(?<![^-_.])(train|val|validation|test)(?![a-zA-Z])")


def has_files(folder: Location, *suffixes: str) -> bool:
    """Files with one of these suffixes lie right in the folder, and no folders beside them."""
    children = [child for child in folder.children() if not child.name.startswith(".")]
    return not any(child.is_folder for child in children) and any(child.name.endswith(suffixes) for child in children)


def split_roots(source: Location, suffix: str) -> dict[str, Location]:
    """The folders train and val by split, if such files are in one of them; else empty."""
    roots = {split: source / name for split, name in split_folders(source).items()}
    return roots if any(has_files(root, suffix) for root in roots.values()) else {}


def container_files(folder: Location, cfg: ShardConfig, suffix: str) -> list[str]:
    """Names of the files with this suffix right in the folder, sorted; hidden ones are left out.

    Raises:
        CrispError: one of them is a broken link, no regular file, or, without `cfg.follow_links`, a link out of the
            source.
        OSError: the folder cannot be listed.
    """
    names = []
    for found in folder.children():
        if found.name.startswith(".") or found.is_folder or not found.name.endswith(suffix):
            continue
        path = folder / found.name
        if not found.is_file:  # one file fewer would be hundreds of images fewer
            reason = "broken link" if found.is_link else "not a regular file"
            raise CrispError(f"{path}: {reason}; mend or remove it")
        if found.is_link and not cfg.follow_links and _leads_out(path, Location.of(cfg.source)):
            raise CrispError(f"{path}: a link out of the source; --follow-links takes it")
        names.append(found.name)
    return names


def by_split(files: list[Location]) -> dict[str, list[Location]]:
    """Files by the split in their names, such as train-0000 or imagenet-validation-00; all under '' if none has one.
    Those of test are left out.

    Raises:
        CrispError: only some have one.
    """
    found: dict[str, list[Location]] = {}
    for file in files:
        match = _SPLIT.search(file.name)
        split = {"validation": "val"}.get(match[1], match[1]) if match else ""
        found.setdefault(split, []).append(file)
    if test := found.pop("test", []):
        log.info("%s: left out, as are %d files of test in all", test[0], len(test))
    if "" in found and len(found) > 1:
        raise CrispError(
            f"{found[''][0]}: no train or val in its name, as others there have; give a folder with files of one kind"
        )
    return found


def _leads_out(path: Location, source: Location) -> bool:
    root = os.path.realpath(str(source))
    return os.path.commonpath([root, os.path.realpath(str(path))]) != root
