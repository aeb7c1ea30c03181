"""YouTube-VOS as its archives unpack: train/ and valid/, each with JPEGImages, Annotations and meta.json.

Xu et al., "YouTube-VOS: A Large-Scale Video Object Segmentation Benchmark", 2018. An object may first appear mid-video:
in `valid/Annotations` every PNG is a start. The validation truth is hidden; a tenth of train is held out for scores.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from crisp.errors import CrispError
from crisp.evals.video.masks import object_ids, read_mask
from crisp.evals.video.sequences import (
    VideoData,
    VideoSequence,
    hold_out,
    list_frames,
    list_masks,
    refuse_split,
    require_every_mask,
)

SPLITS = ("valid", "test", "train", "holdout")
_HIDDEN = ("valid", "test")


def read_youtube_vos(root: Path, split: str) -> VideoData:
    """A split of YouTube-VOS; `holdout` is a fixed tenth of train's videos.

    Raises:
        CrispError: an unknown split, a damaged meta.json, or a missing folder, frame or mask.
    """
    if split not in SPLITS:
        raise refuse_split("youtube-vos", split, SPLITS)
    hidden = split in _HIDDEN
    folder = root / (split if hidden else "train")
    videos = _read_meta(folder / "meta.json")
    names = hold_out(videos) if split == "holdout" else tuple(sorted(videos))
    with ThreadPoolExecutor() as pool:  # of known sequences every mask is read
        if hidden:
            sequences = tuple(pool.map(lambda name: _hidden_sequence(folder, name, videos[name]), names))
        else:
            sequences = tuple(pool.map(lambda name: _known_sequence(folder, name, videos[name]), names))
    return VideoData(
        dataset="youtube-vos",
        split=split,
        root=root,
        sequences=sequences,
        archive_root="Annotations/" if hidden else None,
    )


def is_youtube_vos(root: Path, split: str = "valid") -> bool:
    """Whether a folder holds this split of YouTube-VOS."""
    folder = root / (split if split in _HIDDEN else "train")
    return (folder / "meta.json").is_file() and (folder / "JPEGImages").is_dir()


def _read_meta(file: Path) -> Mapping[str, Mapping[int, set[str]]]:
    """Video → object → names of the frames that it is asked for in."""
    try:
        content: Any = json.loads(file.read_text())
        videos = {
            str(name): {
                int(index): {str(frame) for frame in item["frames"]} for index, item in video["objects"].items()
            }
            for name, video in content["videos"].items()
        }
    except FileNotFoundError as error:
        raise CrispError(f"{file}: no such file; YouTube-VOS's archive holds it, unpack it again") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CrispError(
            f"{file}: not YouTube-VOS's list of videos, objects and frames ({type(error).__name__}: {error}); "
            f"unpack the archive again"
        ) from error
    if not videos:
        raise CrispError(f"{file}: lists no videos; unpack the archive again")
    return videos


def _hidden_sequence(folder: Path, name: str, objects: Mapping[int, set[str]]) -> VideoSequence:
    asked = set().union(*objects.values())
    frames = list_frames(folder / "JPEGImages" / name)
    number = {path.stem: frame for frame, path in enumerate(frames)}
    if missing := sorted(asked - set(number)):
        raise CrispError(
            f"{folder / 'JPEGImages' / name / missing[0]}.jpg: meta.json asks for this frame and it is missing; "
            f"unpack the frames again"
        )
    masks = list_masks(folder / "Annotations" / name, frames)
    if not masks:
        raise CrispError(f"{folder / 'Annotations' / name}: holds no mask to start from; unpack the annotations again")
    return VideoSequence(
        name=name,
        frames=frames,
        starts=masks,
        truths={},
        written=tuple(sorted(number[stem] for stem in asked)),
        named_objects=frozenset(objects),
    )


def _known_sequence(folder: Path, name: str, objects: Mapping[int, set[str]]) -> VideoSequence:
    """The true mask of a frame where an object is first seen is what valid/Annotations would give for it."""
    frames = list_frames(folder / "JPEGImages" / name)
    annotations = folder / "Annotations" / name
    truths = require_every_mask(list_masks(annotations, frames), frames, annotations)
    starts, seen = {}, set[int]()
    for frame, path in truths.items():
        if new := set(object_ids(read_mask(path))) - seen:
            starts[frame] = path
            seen |= new
    return VideoSequence(
        name=name,
        frames=frames,
        starts=starts,
        truths=truths,
        written=tuple(range(len(frames))),
        named_objects=frozenset(objects),
    )
