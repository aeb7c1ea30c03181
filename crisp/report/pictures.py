"""The pictures that a run drew of itself, as data URIs within a budget.

RUN/pictures/index.json lists them: step, epoch, and the file of each kind.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from crisp.report.blocks import Picture
from crisp.runs import PICTURES, PICTURES_INDEX

WIDTHS_PX = (1600, 1200, 900, 640)
"""That pictures are made narrower to, the widest with which enough of them have room"""
ENOUGH = 12
"""Moments that are worth narrower pictures"""
_QUALITY = 82
_NOT_A_KIND = {"step", "epoch"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What was drawn after a step."""

    step: int
    epoch: float | None
    files: dict[str, Path]
    """By kind: regions, pca"""


def gather_moments(run: Path) -> tuple[list[Moment], str]:
    """The moments by step whose files can be opened, and a sentence on what cannot; empty where all is well."""
    folder = run / PICTURES
    path = folder / PICTURES_INDEX
    if not path.exists():
        return [], ""
    try:
        entries = json.loads(path.read_text())
        moments = [_moment(entry, folder) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return [], f"{PICTURES}/{PICTURES_INDEX} cannot be read, so its pictures are not shown."
    lost = [file for moment in moments for file in moment.files.values() if not _opens(file, folder)]
    whole = [
        Moment(step=m.step, epoch=m.epoch, files=files)
        for m in moments
        if (files := {kind: file for kind, file in m.files.items() if file not in lost})
    ]
    problem = f"{len(lost)} picture(s) that {PICTURES}/{PICTURES_INDEX} names are missing or damaged." if lost else ""
    return sorted(whole, key=lambda moment: moment.step), problem


def _moment(entry: dict[str, object], folder: Path) -> Moment:
    epoch = entry.get("epoch")
    return Moment(
        step=int(entry["step"]),  # type: ignore[call-overload]
        epoch=float(epoch) if isinstance(epoch, int | float) else None,
        files={kind: folder / str(file) for kind, file in entry.items() if kind not in _NOT_A_KIND},
    )


def _opens(file: Path, folder: Path) -> bool:
    """Whether a file is an image below the folder: an index from elsewhere must not name others."""
    if not file.resolve().is_relative_to(folder.resolve()):
        return False
    try:
        with Image.open(file) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises at a damaged file
        return False
    return True


def encode(moments: Sequence[Moment], kind: str, *, budget: int) -> list[Picture]:
    """Pictures of one kind as WebP, in `budget` characters: narrower ones, and fewer of them, where there are many.

    The last one is always there, and the first where two have room; those between are evenly spread.
    """
    of_kind = [moment for moment in moments if kind in moment.files]
    if not of_kind:
        return []
    for width_px in WIDTHS_PX:
        one = len(_picture(of_kind[-1], kind, width_px).data_uri)
        count = min(len(of_kind), budget // one)
        if count >= min(len(of_kind), ENOUGH):
            break
    pictures = [_picture(of_kind[i], kind, width_px) for i in spread(len(of_kind), max(1, count))]
    while len(pictures) > 1 and sum(len(picture.data_uri) for picture in pictures) > budget:
        pictures = [pictures[i] for i in spread(len(pictures), len(pictures) - 1)]
    return pictures


def spread(count: int, chosen: int) -> list[int]:
    """`chosen` of `count` places, evenly spread, the last one and (of two or more) the first among them."""
    if chosen <= 1:
        return [count - 1]
    return (
        sorted({round(i * (count - 1) / (chosen - 1)) for i in range(min(chosen, count))})
        if chosen < count
        else [*range(count)]
    )


def _picture(moment: Moment, kind: str, width_px: int) -> Picture:
    with Image.open(moment.files[kind]) as opened:
        image = opened.convert("RGB")
    if image.width > width_px:
        image = image.resize((width_px, max(1, round(image.height * width_px / image.width))), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY, method=4)
    return Picture(
        caption=said(moment),
        step=moment.step,
        data_uri="data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(),
        width_px=image.width,
        height_px=image.height,
    )


def said(moment: Moment) -> str:
    """`step 186, epoch 6`."""
    return f"step {moment.step}" + ("" if moment.epoch is None else f", epoch {moment.epoch:g}")
