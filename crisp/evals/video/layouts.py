"""The data sets by name, and where in a folder each of them is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crisp.evals.video import davis, frame_folder, mose, youtube_vos
from crisp.evals.video.sequences import VideoData

Dataset = Literal["davis2017", "davis2016", "youtube-vos", "mose", "folder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a data set is read."""

    read: Callable[[Path, str], VideoData]
    splits: tuple[str, ...]
    default_split: str


LAYOUTS: dict[Dataset, Layout] = {
    "davis2017": Layout(read=davis.read_davis2017, splits=davis.SPLITS_2017, default_split="val"),
    "davis2016": Layout(read=davis.read_davis2016, splits=davis.SPLITS_2016, default_split="val"),
    "youtube-vos": Layout(read=youtube_vos.read_youtube_vos, splits=youtube_vos.SPLITS, default_split="valid"),
    "mose": Layout(read=mose.read_mose, splits=mose.SPLITS, default_split="valid"),
    "folder": Layout(read=frame_folder.read_frame_folder, splits=frame_folder.SPLITS, default_split="all"),
}


def find_davis2017(root: Path) -> Path | None:
    """The folder under `root` (itself, or up to two below it) that is DAVIS-2017 with its validation split."""
    return _find(root, davis.is_davis2017)


def find_davis2016(root: Path) -> Path | None:
    """The folder under `root` that is DAVIS-2016 with its validation split; DAVIS-2017's archive holds it, too."""
    return _find(root, davis.is_davis2016)


def find_youtube_vos(root: Path, split: str = "valid") -> Path | None:
    """The folder under `root` that holds this split of YouTube-VOS."""
    return _find(root, lambda folder: youtube_vos.is_youtube_vos(folder, split))


def find_mose(root: Path, split: str = "valid") -> Path | None:
    """The folder under `root` that holds this split of MOSE."""
    return _find(root, lambda folder: mose.is_mose(folder, split))


def _find(root: Path, is_there: Callable[[Path], bool]) -> Path | None:
    waiting = [root] if root.is_dir() else []
    for depth in range(3):
        for folder in waiting:
            if is_there(folder):
                return folder
        if depth < 2:
            waiting = sorted(path for folder in waiting for path in folder.iterdir() if path.is_dir())
    return None
