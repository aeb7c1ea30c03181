"""What every layout becomes: sequences of frames with the masks they start from, and the true masks where known."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crisp.errors import CrispError
from crisp.evals.video.protocol import HOLD_OUT_ONE_IN, HOLD_OUT_SEED

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")

ArchiveRoot = Literal["", "Annotations/"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSequence:
    """One video. Frames are counted from 0 in the order of their names."""

    name: str
    frames: tuple[Path, ...]
    starts: Mapping[int, Path]
    """Frame → index mask with the objects that are given there; ids that were given before are ignored in it"""
    truths: Mapping[int, Path]
    """Frame → true index mask, of every frame; empty where the truth is hidden"""
    written: tuple[int, ...]
    """Frames whose masks are written"""
    named_objects: frozenset[int] = frozenset()
    """Those that the data set's own list names, if it has one"""

    def mask_name(self, frame: int) -> str:
        """A frame's mask has the frame's name."""
        return f"{self.frames[frame].stem}.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoData:
    """A split of a data set, listed but not yet checked (`crisp.evals.video.checks`)."""

    dataset: str
    split: str
    root: Path
    sequences: tuple[VideoSequence, ...]
    single_object: bool = False
    """Whatever is not 0 in a mask is object 1 (DAVIS-2016), 255 too"""
    contiguous_ids: bool = False
    """Objects are 1 to the largest id of the first mask, also those that the mask lacks (DAVIS-2017's definition)"""
    archive_root: ArchiveRoot | None = None
    """Folder of the videos in the archive that the data set's server wants; None: there is no server for this split"""

    @property
    def scored(self) -> bool:
        """Whether the truth is here."""
        return all(sequence.truths for sequence in self.sequences)


def list_frames(folder: Path) -> tuple[Path, ...]:
    """The frames of a folder, sorted by name.

    Raises:
        CrispError: no such folder, no frames in it, or two frames whose masks would have the same name.
    """
    if not folder.is_dir():
        raise CrispError(f"{folder}: no such folder of frames; unpack the data set's frames there")
    frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES)
    if not frames:
        raise CrispError(f"{folder}: holds no frames ({', '.join(FRAME_SUFFIXES)}); unpack the data set's frames there")
    seen: dict[str, Path] = {}
    for path in frames:
        if path.stem in seen:
            raise CrispError(f"{path}: {seen[path.stem].name} has the same name; remove one of the two")
        seen[path.stem] = path
    return tuple(frames)


def list_masks(folder: Path, frames: Sequence[Path]) -> dict[int, Path]:
    """Frame → mask of the same name, for the masks that a folder holds.

    Raises:
        CrispError: no such folder, or a mask without a frame.
    """
    if not folder.is_dir():
        raise CrispError(f"{folder}: no such folder of masks; unpack the data set's annotations there")
    number = {path.stem: frame for frame, path in enumerate(frames)}
    masks = {}
    for path in sorted(folder.glob("*.png")):
        if path.stem not in number:
            raise CrispError(
                f"{path}: no frame {path.stem} in {frames[0].parent}; unpack the frames again, or remove the mask"
            )
        masks[number[path.stem]] = path
    return masks


def require_every_mask(masks: Mapping[int, Path], frames: Sequence[Path], folder: Path) -> dict[int, Path]:
    """The masks again, if every frame has one.

    Raises:
        CrispError: a frame without a mask.
    """
    for frame, path in enumerate(frames):
        if frame not in masks:
            raise CrispError(f"{folder / path.stem}.png: this true mask is missing; unpack the annotations again")
    return dict(masks)


def require_first_mask(masks: Mapping[int, Path], frames: Sequence[Path], folder: Path) -> Path:
    """The mask of the first frame.

    Raises:
        CrispError: it is missing.
    """
    if 0 not in masks:
        raise CrispError(
            f"{folder / frames[0].stem}.png: the first frame's mask is missing; unpack the annotations again"
        )
    return masks[0]


def list_names(file: Path) -> tuple[str, ...]:
    """The lines of a list of sequences.

    Raises:
        CrispError: no such file, or no lines.
    """
    if not file.is_file():
        raise CrispError(f"{file}: no such list of sequences; unpack the data set's ImageSets, or give --split all")
    names = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    if not names:
        raise CrispError(f"{file}: an empty list of sequences; unpack the data set's ImageSets again")
    return names


def list_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted.

    Raises:
        CrispError: no such folder, or none in it.
    """
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()
    if not names:
        raise CrispError(f"{folder}: no folders of videos there; unpack the data set's archive there")
    return names


def hold_out(names: Iterable[str]) -> tuple[str, ...]:
    """One in ten of the names, sorted: those that come first in an order drawn once for all.

    The order is that of SHA-256 of seed and name, so that it is the same with every release of every library.
    """
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{HOLD_OUT_SEED}:{name}".encode()).digest())
    return tuple(sorted(drawn[: max(1, len(drawn) // HOLD_OUT_ONE_IN)]))


def refuse_split(dataset: str, split: str, known: Iterable[str]) -> CrispError:
    """The error for a split that a data set does not have."""
    return CrispError(f"split {split!r}: {dataset} has no such split; choose one of {', '.join(known)}")
