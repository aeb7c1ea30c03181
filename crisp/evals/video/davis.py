"""DAVIS-2017 and DAVIS-2016 as their archives unpack: JPEGImages/480p, Annotations/480p, ImageSets.

Pont-Tuset et al., "The 2017 DAVIS Challenge on Video Object Segmentation", 2017; Perazzi et al., CVPR 2016.
"""

from pathlib import Path

from crisp.errors import CrispError
from crisp.evals.video.sequences import (
    VideoData,
    VideoSequence,
    list_folders,
    list_frames,
    list_masks,
    list_names,
    refuse_split,
    require_every_mask,
    require_first_mask,
)

RESOLUTION = "480p"
SPLITS_2017 = ("train", "val", "test-dev", "test-challenge", "all")
SPLITS_2016 = ("train", "val", "trainval", "all")
_HIDDEN = ("test-dev", "test-challenge")


def read_davis2017(root: Path, split: str) -> VideoData:
    """A split of DAVIS-2017; of test-dev and test-challenge only the first masks are public.

    Raises:
        CrispError: an unknown split, or a missing folder, list, frame or mask.
    """
    if split not in SPLITS_2017:
        raise refuse_split("davis2017", split, SPLITS_2017)
    hidden = split in _HIDDEN
    names = _all_names(root) if split == "all" else list_names(root / "ImageSets" / "2017" / f"{split}.txt")
    return VideoData(
        dataset="davis2017",
        split=split,
        root=root,
        sequences=tuple(_sequence(root, name, hidden=hidden) for name in names),
        contiguous_ids=True,
        archive_root="" if hidden else None,
    )


def read_davis2016(root: Path, split: str) -> VideoData:
    """A split of DAVIS-2016; also from the archive of DAVIS-2017, whose objects are then one.

    Lists are pairs of paths (`ImageSets/480p/val.txt`, the archive of 2016) or names of sequences
    (`ImageSets/2016/val.txt`, that of 2017).

    Raises:
        CrispError: an unknown split, or a missing folder, list, frame or mask.
    """
    if split not in SPLITS_2016:
        raise refuse_split("davis2016", split, SPLITS_2016)
    if split == "all":
        names = _all_names(root)
    else:
        pairs = root / "ImageSets" / RESOLUTION / f"{split}.txt"
        names = _names_of_pairs(pairs) if pairs.is_file() else list_names(root / "ImageSets" / "2016" / f"{split}.txt")
    return VideoData(
        dataset="davis2016",
        split=split,
        root=root,
        sequences=tuple(_sequence(root, name, hidden=False) for name in names),
        single_object=True,
        contiguous_ids=True,
    )


def is_davis2017(root: Path) -> bool:
    """Whether a folder is DAVIS-2017 with its validation split."""
    return (root / "ImageSets" / "2017" / "val.txt").is_file() and (root / "JPEGImages" / RESOLUTION).is_dir()


def is_davis2016(root: Path) -> bool:
    """Whether a folder is DAVIS-2016 with its validation split."""
    lists = (root / "ImageSets" / folder / "val.txt" for folder in (RESOLUTION, "2016"))
    return any(path.is_file() for path in lists) and (root / "JPEGImages" / RESOLUTION).is_dir()


def _all_names(root: Path) -> tuple[str, ...]:
    return list_folders(root / "JPEGImages" / RESOLUTION)


def _names_of_pairs(file: Path) -> tuple[str, ...]:
    """Sequences of a list with a frame's path, `/JPEGImages/480p/NAME/00000.jpg`, first in every line."""
    names: dict[str, None] = {}
    for line in list_names(file):
        parts = line.split()[0].strip("/").split("/")
        if len(parts) != 4:
            raise CrispError(f"{file}: {line!r} is no line of DAVIS-2016's lists; unpack its ImageSets again")
        names[parts[2]] = None
    return tuple(names)


def _sequence(root: Path, name: str, *, hidden: bool) -> VideoSequence:
    frames = list_frames(root / "JPEGImages" / RESOLUTION / name)
    folder = root / "Annotations" / RESOLUTION / name
    masks = list_masks(folder, frames)
    return VideoSequence(
        name=name,
        frames=frames,
        starts={0: require_first_mask(masks, frames, folder)},
        truths={} if hidden else require_every_mask(masks, frames, folder),
        written=tuple(range(len(frames))),
    )
