"""WebDataset shards: a tar, a folder of tars, or folders train and val of them.

Members with one key, the path up to the first dot of the name, are a sample. Of its members the image and the label
(`cls`, a whole number) are taken. crisp's own shards come with class names, and each image keeps its name.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from crisp.errors import CrispError
from crisp.shard_format import MANIFEST_FILE
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import Listing, ListingWriter
from crisp.shard_imagenet.sources.container_files import by_split, container_files, has_files, split_roots
from crisp.shard_imagenet.sources.imagenet_tars import CLASS_TAR
from crisp.shard_imagenet.sources.tar_members import REPLACED, Member, compressed, walk_tar
from crisp.shard_imagenet.sources.wanted import MAX_LABEL, label_names, wanted_splits
from crisp.storage import Location

log = logging.getLogger(__name__)

_IMAGES = {"jpg", "jpeg", "png", "webp"}
_COMPRESSED = (".tar.gz", ".tgz")
_TEXT_MAX = 1024 * 1024  # of a member that is read while listing; larger ones hold no label and no name


def recognise(source: Location) -> bool:
    """A tar; a folder of tars without folders beside; or such folders train and val."""
    if not source.is_folder():
        return source.name.endswith((".tar", *_COMPRESSED))
    return has_files(source, ".tar", *_COMPRESSED) or bool(split_roots(source, ".tar"))


def list_splits(source: Location, cfg: ShardConfig, folder: Path) -> list[Listing]:
    """List the samples of the shards in order of the shards' names.

    Memory: about a kilobyte per sample of one shard.

    Raises:
        CrispError: no shard, one that is compressed or damaged or holds tars; class names that differ between train
            and val; a label without a name.
        OSError: a shard cannot be read.
    """
    if cfg.labels is not None:
        raise CrispError(f"labels={cfg.labels}: the labels of WebDataset shards lie in them; leave --labels out")
    shards = _shards(source, cfg)
    if cfg.split != "auto":
        shards = {split: shards[split] for split in wanted_splits(cfg, shards)}
    names: tuple[str, ...] = ()
    named_by: Location | None = None
    writers, largest = {}, -1
    for split, tars in sorted(shards.items()):
        if not tars:
            raise CrispError(f"{source}: no shard of {split or 'train or val'} in it; give a folder of .tar files")
        writers[split] = writer = ListingWriter(folder, split=split)
        manifest = Location(tars[0].url.rpartition("/")[0] or ".") / MANIFEST_FILE
        classes = _own_classes(manifest)
        if classes is not None and named_by is not None and classes != names:
            raise CrispError(
                f"{manifest}: other classes than {named_by}; shard both from one source, or take one --split"
            )
        if classes is not None:
            names, named_by = classes, manifest
        for tar in tars:
            largest = max(largest, _add_shard(tar, writer, is_own=classes is not None))
    names = label_names(cfg, names, largest)
    return [writer.finish(layout="WebDataset shards", classes=names, by_class=False) for writer in writers.values()]


def _shards(source: Location, cfg: ShardConfig) -> dict[str, list[Location]]:
    """Tars by split."""
    if not source.is_folder():
        if source.name.endswith(_COMPRESSED):
            raise compressed(str(source))
        return {"": [source]}
    roots = split_roots(source, ".tar") or {"": source}
    shards = {}
    for split, root in roots.items():
        for child in root.children():
            if child.name.endswith(_COMPRESSED):
                raise compressed(str(root / child.name))
        names = container_files(root, cfg, ".tar")
        if names and all(map(CLASS_TAR.fullmatch, names)):  # as shards, they would have no labels
            raise CrispError(f"{root}: holds ImageNet's class tars; give this folder as SOURCE")
        shards[split] = [root / name for name in names]
    if "" in shards:
        shards = by_split(shards[""]) or {"": []}
    return shards


def _own_classes(manifest: Location) -> tuple[str, ...] | None:
    """Class names from the manifest of crisp's own shards; None for shards of others."""
    if not manifest.size():
        return None
    try:
        classes = json.loads(manifest.read())["classes"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, classes)) if isinstance(classes, list) else None


class _Sample(NamedTuple):
    images: dict[str, Member]
    """By name"""
    texts: dict[str, bytes]
    """By extension: cls and json"""
    others: set[str]
    """Extensions"""


def _add_shard(tar: Location, writer: ListingWriter, *, is_own: bool) -> int:
    """Add the samples of a shard; the largest label."""
    container = writer.add_container("tar", tar)
    largest = -1
    with tar.open() as file:
        samples = _samples(file, tar, writer, is_own=is_own)
    for key, sample in samples.items():
        extensions = sorted([*sample.texts, *sample.others])
        if not sample.images:
            writer.reject(f"{tar.name}/{key}", f"no image: members {', '.join(extensions)}")
            continue
        image, *more = sample.images.values()
        for second in more:
            writer.reject(f"{tar.name}/{second.name}", f"second image of a sample: {image.name} is the first")
        text = sample.texts.get("cls", b"-1").strip()
        if text != b"-1" and not (text.isdigit() and len(text) < 10 and int(text) <= MAX_LABEL):
            writer.reject(
                f"{tar.name}/{image.name}", f"label is not a whole number: {text[:20].decode(errors='replace')}"
            )
            continue
        name = _source_name(sample.texts.get("json", b"")) if is_own else None
        writer.add(
            name or f"{tar.name}/{image.name}",
            label=int(text),
            container=container,
            offset=image.offset,
            size=image.size,
        )
        largest = max(largest, int(text))
    return largest


def _samples(file: IO[bytes], tar: Location, writer: ListingWriter, *, is_own: bool) -> dict[str, _Sample]:
    """Samples of a shard by key, in order. Texts are read on the way: later, a remote shard would be read twice."""
    samples: dict[str, _Sample] = {}
    for member, key, extension in _keyed(file, tar, writer):
        sample = samples.setdefault(key, _Sample({}, {}, set()))
        lower = extension.lower()
        if lower in _IMAGES:
            if member.name in sample.images:
                writer.reject(f"{tar.name}/{member.name}", REPLACED)
            sample.images[member.name] = member
        elif (lower == "cls" or (lower == "json" and is_own)) and member.size <= _TEXT_MAX:
            if lower in sample.texts:
                writer.reject(f"{tar.name}/{member.name}", REPLACED)
            file.seek(member.offset)
            sample.texts[lower] = file.read(member.size)
        else:
            sample.others.add(extension)
    return samples


def _keyed(file: IO[bytes], tar: Location, writer: ListingWriter) -> Iterator[tuple[Member, str, str]]:
    """Members with key and extension."""

    def reject(name: str, reason: str) -> None:
        writer.reject(f"{tar.name}/{name}", reason)

    for member in walk_tar(file, str(tar), reject, size=tar.size() or 0):
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if extension.lower() == "tar":
            raise CrispError(f"{tar}: holds tars ({member.name}); if it is ImageNet's, say --layout imagenet-tars")
        if not stem or not extension:  # WebDataset skips it as well
            reject(member.name, "no key or no extension")
        else:
            yield member, f"{folder}{slash}{stem}", extension


def _source_name(text: bytes) -> str | None:
    """What crisp wrote about a sample says which file it was."""
    try:
        about: Any = json.loads(text)
        name = about["source"]
        name.encode(errors="surrogateescape")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return str(name) or None
