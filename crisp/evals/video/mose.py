"""MOSE as its archives unpack: train/ and valid/, each with JPEGImages and Annotations by video.

Ding et al., "MOSE: A New Dataset for Video Object Segmentation in Complex Scenes", ICCV 2023. Of valid only the first
masks are public, and only their objects count; a tenth of train is held out for scores, under the same rule.
"""

from pathlib import Path

from crisp.evals.video.sequences import (
    VideoData,
    VideoSequence,
    hold_out,
    list_folders,
    list_frames,
    list_masks,
    refuse_split,
    require_every_mask,
    require_first_mask,
)

SPLITS = ("valid", "test", "train", "holdout")
_HIDDEN = ("valid", "test")


def read_mose(root: Path, split: str) -> VideoData:
    """A split of MOSE; `holdout` is a fixed tenth of train's videos.

    Raises:
        CrispError: an unknown split, or a missing folder, frame or mask.
    """
    if split not in SPLITS:
        raise refuse_split("mose", split, SPLITS)
    hidden = split in _HIDDEN
    folder = root / (split if hidden else "train")
    names = list_folders(folder / "JPEGImages")
    names = hold_out(names) if split == "holdout" else names
    return VideoData(
        dataset="mose",
        split=split,
        root=root,
        sequences=tuple(_sequence(folder, name, hidden=hidden) for name in names),
        archive_root="" if hidden else None,
    )


def is_mose(root: Path, split: str = "valid") -> bool:
    """Whether a folder holds this split of MOSE, which is YouTube-VOS's layout without a meta.json."""
    folder = root / (split if split in _HIDDEN else "train")
    return (
        all((folder / name).is_dir() for name in ("JPEGImages", "Annotations")) and not (folder / "meta.json").exists()
    )


def _sequence(folder: Path, name: str, *, hidden: bool) -> VideoSequence:
    frames = list_frames(folder / "JPEGImages" / name)
    annotations = folder / "Annotations" / name
    masks = list_masks(annotations, frames)
    return VideoSequence(
        name=name,
        frames=frames,
        starts={0: require_first_mask(masks, frames, annotations)},
        truths={} if hidden else require_every_mask(masks, frames, annotations),
        written=tuple(range(len(frames))),
    )
