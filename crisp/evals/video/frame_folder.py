"""Any folder with `images/` and `masks/`: frames and index masks of one video, or a folder of each per video.

With a mask for every frame they are the truth, and the first one is the start. With fewer, each is a start.
"""

from pathlib import Path

from crisp.errors import CrispError
from crisp.evals.video.sequences import VideoData, VideoSequence, list_frames, list_masks, refuse_split

SPLITS = ("all",)


def read_frame_folder(root: Path, split: str) -> VideoData:
    """The videos of a folder.

    Raises:
        CrispError: an unknown split, no frames, no masks, or truth for some videos only.
    """
    if split not in SPLITS:
        raise refuse_split("folder", split, SPLITS)
    images = root / "images"
    if not images.is_dir():
        raise CrispError(f"{images}: no such folder; frames go into images/, index masks of the same names into masks/")
    names = sorted(path.name for path in images.iterdir() if path.is_dir())
    if names:
        sequences = tuple(_sequence(name, images / name, root / "masks" / name) for name in names)
    else:
        sequences = (_sequence(root.resolve().name, images, root / "masks"),)
    known = {bool(sequence.truths): sequence.name for sequence in sequences}
    if len(known) == 2:
        raise CrispError(
            f"{root}: {known[True]} has a mask for every frame and {known[False]} has not; keep videos to be scored "
            f"in a folder of their own"
        )
    return VideoData(dataset="folder", split=split, root=root, sequences=sequences)


def _sequence(name: str, images: Path, folder: Path) -> VideoSequence:
    frames = list_frames(images)
    masks = list_masks(folder, frames)
    if not masks:
        raise CrispError(f"{folder}: holds no mask to start from; put an index mask named as its frame there")
    known = len(masks) == len(frames) and len(frames) > 1
    return VideoSequence(
        name=name,
        frames=frames,
        starts={0: masks[0]} if known else masks,
        truths=masks if known else {},
        written=tuple(range(len(frames))),
    )
