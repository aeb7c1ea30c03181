"""Tiny data sets in the layouts of the official archives: a bright and a dark square on a noisy ground."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crisp.evals.video.masks import write_mask

HEIGHT_PX, WIDTH_PX = 48, 64


def frame_and_mask(step: int, objects: Sequence[int] = (1, 2)) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Squares move to the right by a pixel a frame."""
    pixels = np.random.default_rng(0).integers(90, 130, (HEIGHT_PX, WIDTH_PX, 3)).astype(np.uint8)
    mask = np.zeros((HEIGHT_PX, WIDTH_PX), dtype=np.uint8)
    for index in objects:
        place = slice(4 + 20 * (index - 1), 18 + 20 * (index - 1)), slice(8 + step, 26 + step)
        pixels[place] = (250, 240, 60) if index % 2 else (20, 30, 90)
        mask[place] = index
    return Image.fromarray(pixels), mask


def write_video(
    frames: Path, masks: Path, names: Sequence[str], *, objects: Mapping[int, Sequence[int]], masks_of: Sequence[int]
) -> None:
    """Frames by name; `objects` from a frame on; masks for some frames only."""
    frames.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    shown: Sequence[int] = ()
    for step, name in enumerate(names):
        shown = objects.get(step, shown)
        image, mask = frame_and_mask(step, shown)
        image.save(frames / f"{name}.jpg", quality=95)
        if step in masks_of:
            write_mask(mask, masks / f"{name}.png")


def five(start: int = 0, by: int = 1) -> list[str]:
    return [f"{start + by * step:05}" for step in range(5)]


def davis2017(root: Path, names: Sequence[str] = ("bear", "camel")) -> Path:
    for name in names:
        write_video(
            root / "JPEGImages/480p" / name, root / "Annotations/480p" / name, five(),
            objects={0: (1, 2)}, masks_of=range(5),
        )  # fmt: skip
    write_video(
        root / "JPEGImages/480p/hidden", root / "Annotations/480p/hidden", five(), objects={0: (1, 2)}, masks_of=[0]
    )
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "ImageSets/2017/train.txt").write_text(f"{names[0]}\n")
    (root / "ImageSets/2017/test-dev.txt").write_text("hidden\n")
    return root


def davis2016(root: Path) -> Path:
    """Black and white masks, lists of pairs of paths."""
    lines = []
    for name in ("bear", "camel"):
        images, masks = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
        write_video(images, masks, five(), objects={0: (1,)}, masks_of=[])
        for step, frame in enumerate(five()):
            Image.fromarray(frame_and_mask(step, (1,))[1] * 255).save(masks / f"{frame}.png")
            lines.append(f"/JPEGImages/480p/{name}/{frame}.jpg /Annotations/480p/{name}/{frame}.png\n")
    (root / "ImageSets/480p").mkdir(parents=True)
    (root / "ImageSets/480p/val.txt").write_text("".join(lines))
    return root


def youtube_vos(root: Path) -> Path:
    """In valid, video b's object 2 comes in its third frame, and its last frame is not asked for."""
    whole, later = {0: (1, 2)}, {0: (1,), 2: (1, 2)}
    meta = {"a": {"1": five(0, 5), "2": five(0, 5)}, "b": {"1": five(0, 5)[:4], "2": five(0, 5)[2:4]}}
    for split in ("train", "valid"):
        for video, objects in (("a", whole), ("b", later)):
            given = [0] if video == "a" else [0, 2]
            write_video(
                root / split / "JPEGImages" / video, root / split / "Annotations" / video, five(0, 5),
                objects=objects, masks_of=range(5) if split == "train" else given,
            )  # fmt: skip
        videos = {
            video: {"objects": {index: {"category": "cat", "frames": frames} for index, frames in entries.items()}}
            for video, entries in meta.items()
        }
        (root / split / "meta.json").write_text(json.dumps({"videos": videos}))
    # what valid gives later is the new object alone
    path = root / "valid/Annotations/b/00010.png"
    mask = np.array(Image.open(path))
    write_mask(np.where(mask == 2, mask, 0).astype(np.uint8), path)
    return root


def mose(root: Path) -> Path:
    """Ids need not follow each other; in train an object that comes later has a true mask, but does not count."""
    for split, videos in (("train", [f"{n:08}" for n in range(12)]), ("valid", ["0a0b", "1c1d"])):
        for video in videos:
            write_video(
                root / split / "JPEGImages" / video, root / split / "Annotations" / video, five(),
                objects={0: (2,), 3: (1, 2)}, masks_of=range(5) if split == "train" else [0],
            )  # fmt: skip
    return root


def frame_folder(root: Path, *, masks_of: Sequence[int] = (0,)) -> Path:
    write_video(root / "images", root / "masks", five(), objects={0: (1, 2)}, masks_of=masks_of)
    return root
