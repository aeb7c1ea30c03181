"""ImageNet's own archives, read where they are: the train tar, which holds a tar per class, and the flat val tar.

A folder of the class tars, as the train tar unpacks to, will do as well. Numbers and names of the images are the same
as those of the class folders that the tars would unpack to.
"""

import logging
import re
from pathlib import Path

from crisp.errors import CrispError
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import ClassIds, Listing, ListingWriter
from crisp.shard_imagenet.sources.container_files import container_files
from crisp.shard_imagenet.sources.devkit import ValLabels, read_val_labels
from crisp.shard_imagenet.sources.tar_members import Member, first_member, last_of_each, walk_tar
from crisp.shard_imagenet.sources.wanted import final_classes, wanted_splits
from crisp.storage import Location

log = logging.getLogger(__name__)

_PREFIX = "ILSVRC2012_img_"
CLASS_TAR = re.compile(r"n\d{8}\.tar")


def recognise(source: Location) -> bool:
    """A tar with ImageNet's name or class tars in it, or a folder with such tars or class tars."""
    if source.is_folder():
        return any(_is_named(child.name) for child in source.children() if not child.is_folder)
    if not source.name.endswith(".tar"):
        return False
    try:
        return _is_named(source.name) or CLASS_TAR.fullmatch(first_member(source)) is not None
    except CrispError:  # whoever lists it says what is wrong
        return False


def list_splits(source: Location, cfg: ShardConfig, folder: Path) -> list[Listing]:
    """List the images in the tars: label by class tar in train, by `cfg.labels` or what lies beside the tar in val.

    Raises:
        CrispError: no such tar, one that is damaged, no labels for val, labels for another number of images.
        OSError: a tar cannot be read.
    """
    tars = _tars(source, cfg)
    wanted = wanted_splits(cfg, tars)
    labels = None
    if where := cfg.labels or ("val" in tars and _labels_beside(source)):
        # Also if only train is wanted, so that class ids are those that val gets in another run.
        log.info("%s: labels of val", where)
        labels = read_val_labels(where)
    ids = ClassIds(labels.classes if labels else ())
    writers = {}
    for split in wanted:
        writers[split] = writer = ListingWriter(folder, split=split)
        if split == "val":
            _add_val(tars["val"][0], writer, ids, labels)
        else:
            for tar in tars["train"]:
                _add_train(tar, writer, ids)
    classes, label_of = final_classes(cfg, ids)
    return [
        writer.finish(layout="ImageNet's tars", classes=classes, by_class=split == "train", label_of=label_of)
        for split, writer in writers.items()
    ]


def _is_named(name: str) -> bool:
    return name.endswith(".tar") and (name.startswith(_PREFIX) or CLASS_TAR.fullmatch(name) is not None)


def _tars(source: Location, cfg: ShardConfig) -> dict[str, list[Location]]:
    """Tars by split: several for train if they are class tars."""
    if not source.is_folder():
        if source.name.startswith(_PREFIX + "test"):
            raise CrispError(f"{source}: test images have no labels; give the tar of train or val")
        return {_split(source): [source]}
    names = container_files(source, cfg, ".tar")
    class_tars = [name for name in names if CLASS_TAR.fullmatch(name)]
    official = [name for name in names if name.startswith(_PREFIX)]
    found: dict[str, list[Location]] = {}
    for name in official or [name for name in names if name not in class_tars]:
        tar = source / name
        if name.startswith(_PREFIX + "test") or name.endswith("_t3.tar"):  # task 3 has a subset of train
            log.info("%s: left out", tar)
            continue
        split = _split(tar)
        if split in found:
            raise CrispError(f"{source}: {name} and {found[split][0].name} are both of {split}; give one as SOURCE")
        found[split] = [tar]
    if class_tars and "train" not in found:
        found["train"] = [source / name for name in class_tars]
    if not found:
        raise CrispError(f"{source}: no ImageNet tar in it; give the folder of {_PREFIX}train.tar and {_PREFIX}val.tar")
    return found


def _split(tar: Location) -> str:
    return "train" if CLASS_TAR.fullmatch(tar.name) or first_member(tar).endswith(".tar") else "val"


def _labels_beside(source: Location) -> str | None:
    """Path of a text file with val's labels in the folder of the tars, or of the devkit."""
    if not source.is_folder():
        if source.protocol.startswith("http"):  # not every server lists folders
            return None
        source = Location(source.url.rpartition("/")[0] or ("/" if source.url.startswith("/") else "."))
    names = [child.name for child in source.children() if child.is_file]
    for end in ("synset_labels.txt", "devkit_t12.tar.gz"):
        for name in names:
            if name.endswith(end):
                return str(source / name)
    return None


def _add_train(tar: Location, writer: ListingWriter, ids: ClassIds) -> None:
    """Add a tar of class tars, or a class tar."""
    container = writer.add_container("tar", tar)
    size = tar.size() or 0
    with tar.open() as file:
        if CLASS_TAR.fullmatch(tar.name):
            class_tars = {tar.name: Member(tar.name, 0, size)}
        else:
            class_tars = last_of_each(walk_tar(file, str(tar), writer.reject, size=size), writer.reject)
        for name in sorted(class_tars):
            if not name.endswith(".tar"):
                writer.reject(name, "beside the class tars")
                continue
            class_tar, path = class_tars[name], name.removesuffix(".tar")
            label = ids.add(path.rpartition("/")[2])

            def reject(member: str, reason: str, path: str = path) -> None:
                writer.reject(f"{path}/{member}", reason)

            where = str(tar) if name == tar.name else f"{tar}, {name}"
            walk = walk_tar(file, where, reject, start=class_tar.offset, size=class_tar.size)
            images = last_of_each(walk, reject)
            for image in sorted(images):
                _, offset, image_size = images[image]
                writer.add(f"{path}/{image}", label=label, container=container, offset=offset, size=image_size)


def _add_val(tar: Location, writer: ListingWriter, ids: ClassIds, labels: ValLabels | None) -> None:
    if labels is None:
        raise CrispError(
            f"{tar}: holds no labels; give --labels ILSVRC2012_devkit_t12.tar.gz, or a text file with one WordNet id "
            f"per image"
        )
    container = writer.add_container("tar", tar)
    with tar.open() as file:
        images = last_of_each(walk_tar(file, str(tar), writer.reject, size=tar.size() or 0), writer.reject)
    if len(images) != len(labels.wordnet_ids):
        raise CrispError(
            f"{labels.where}: labels of {len(labels.wordnet_ids)} images, but {tar} has {len(images)}; "
            f"give those of this tar"
        )
    for name, wordnet_id in zip(sorted(images), labels.wordnet_ids, strict=True):
        _, offset, size = images[name]
        writer.add(name, label=ids.add(wordnet_id), container=container, offset=offset, size=size)
