"""What every layout needs: which splits are wanted, and which classes there are."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import ClassIds
from crisp.storage import Location

MAX_LABEL = 9_999_999
"""A larger one is a mistake, and names for all below it would fill the memory"""


def wanted_splits(cfg: ShardConfig, there: Iterable[str]) -> list[str]:
    """The splits to take of those there are, 'train' before 'val'.

    Raises:
        CrispError: the one that `cfg.split` names is not there.
    """
    found: list[str] = [split for split in ("train", "val") if split in set(there)]
    if cfg.split == "auto":
        return found
    if cfg.split not in found:
        raise CrispError(
            f"split={cfg.split!r}: {cfg.source} has {' and '.join(found) or 'no split'}; "
            f"leave --split out to take all of it"
        )
    return [cfg.split]


def final_classes(cfg: ShardConfig, found: ClassIds) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Class names by label, and the label of each number that `found` gave out.

    The names are those found, sorted, or those of the file `cfg.classes`, sorted.

    Raises:
        CrispError: a class was found that the file lacks.
    """
    names, label_of = found.sorted()
    if cfg.classes is None:
        return names, label_of
    given = given_classes(cfg)
    place = {name: i for i, name in enumerate(given)}
    missing = [name for name in names if name not in place]
    if missing:
        raise CrispError(
            f"{cfg.classes}: lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}, "
            f"which {cfg.source} holds; add what is missing, one class id per line"
        )
    return given, np.array([place[names[i]] if i >= 0 else -1 for i in label_of], np.int32)


def given_classes(cfg: ShardConfig) -> tuple[str, ...]:
    """The class ids of the file `cfg.classes`, sorted; empty if there is none.

    Raises:
        CrispError: no such file, or one without a line.
    """
    return tuple(sorted(set(_class_lines(cfg))))


def label_names(cfg: ShardConfig, known: tuple[str, ...], largest: int) -> tuple[str, ...]:
    """Class names for labels that are whole numbers, counted from 0; empty if no file has a label.

    Args:
        cfg: the lines of its `classes` come first.
        known: names from the source, if it has any; else they are '0', '1', ….
        largest: label; −1: none.

    Raises:
        CrispError: there are names, but none for the largest label.
    """
    if largest < 0:
        return ()
    names = tuple(_class_lines(cfg)) or known or numbered_classes(largest)
    if largest >= len(names):
        where = cfg.source if cfg.classes is None else cfg.classes
        raise CrispError(
            f"{where}: label {largest}, but {len(names)} class names; labels count from 0: give --classes, one per line"
        )
    return names


def _class_lines(cfg: ShardConfig) -> list[str]:
    """The lines of the file `cfg.classes` as they are; none if there is no such file."""
    if cfg.classes is None:
        return []
    lines = list(filter(None, map(str.strip, read_text(cfg.classes, "--classes").splitlines())))
    if not lines:
        raise CrispError(f"{cfg.classes}: no line in it; write one class id per line")
    return lines


def read_text(where: str, option: str) -> str:
    """A text file that an option names.

    Raises:
        CrispError: it is not there, or no UTF-8 text.
    """
    try:
        return Location.of(where).read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CrispError(f"{where}: {reason}; {option} names a text file") from error


def unsafe(name: str) -> str | None:
    """Why the name of an archive's member is refused; None if it stays within the archive."""
    if name.startswith("/"):
        return "refused: absolute name"
    if ".." in name.split("/"):
        return "refused: name leads out of the archive"
    return None


def numbered_classes(largest: int) -> tuple[str, ...]:
    """Names '0', '1', … for integer labels that come without names."""
    return tuple(str(i) for i in range(largest + 1))
