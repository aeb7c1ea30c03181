"""Images for a picture, from files, folders or shards, and what a model sees of them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crisp.config import DataConfig, TrainConfig
from crisp.errors import CrispError
from crisp.pipelines.decode import Decoder
from crisp.pipelines.loader import open_shard_set
from crisp.shard_format import MANIFEST_FILE
from crisp.storage import Location

LARGEST_PX = 1120
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
"""Of the files of a folder that are taken; a file that is named itself may have any"""

Shape = Literal["crop", "squash", "whole"]


class _Source(Protocol):
    def __len__(self) -> int: ...
    def name(self, number: int) -> str: ...
    def read(self, number: int) -> memoryview: ...


class _Files:
    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, number: int) -> str:
        return str(self._paths[number])

    def read(self, number: int) -> memoryview:
        try:
            return memoryview(self._paths[number].read_bytes())
        except OSError as error:
            raise CrispError(f"{self._paths[number]}: {error.strerror}; give images that can be read") from error


class _Shards:
    def __init__(self, shards: str) -> None:
        self._text = shards
        self._shards = open_shard_set(TrainConfig(data=DataConfig(shards=shards)))

    def __len__(self) -> int:
        return len(self._shards)

    def name(self, number: int) -> str:
        return f"{self._text}: sample {number}"

    def read(self, number: int) -> memoryview:
        return self._shards.read(number)


class Images:
    """Images in the order in which their sources are named: a folder's by path, a shard set's by sample id.

    Args:
        sources: image files, folders with images at any depth, or folders (or URLs) written by `crisp shard`.

    Raises:
        CrispError: a source that is none of these, or a folder without images.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = [_open(source) for source in sources]
        self._ends = list(itertools.accumulate(len(source) for source in self._sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, number: int) -> str:
        """For messages."""
        source, inside = self._find(number)
        return source.name(inside)

    def read(self, number: int) -> memoryview:
        """The encoded image."""
        source, inside = self._find(number)
        return source.read(inside)

    def decode(self, number: int) -> NDArray[np.uint8]:
        """Its pixels [h, w, 3].

        Raises:
            CrispError: it cannot be read or decoded.
        """
        try:
            return Decoder()(self.read(number))
        except CrispError as error:
            raise CrispError(f"{self.name(number)}: {error}; leave it out, or get it again") from error

    def chosen(self, asked: Sequence[int], count: int, *, spread: bool) -> list[int]:
        """Numbers of the images to draw.

        Args:
            asked: by the user; empty: `count` of them are taken.
            count: that many, or all if there are fewer.
            spread: evenly from the first to the last; otherwise the first ones.

        Raises:
            CrispError: a number that there is not.
        """
        for number in asked:
            if not 0 <= number < len(self):
                raise CrispError(f"sample={number}: there are {len(self)} images; name one from 0 to {len(self) - 1}")
        if asked:
            return list(asked)
        count = min(count, len(self))
        if not spread:
            return list(range(count))
        return np.linspace(0, len(self) - 1, count).round().astype(int).tolist()

    def _find(self, number: int) -> tuple[_Source, int]:
        which = bisect.bisect_right(self._ends, number)
        return self._sources[which], number - (self._ends[which - 1] if which else 0)


def _open(source: str) -> _Source:
    local = Location.of(source).local
    if local is None or (local / MANIFEST_FILE).is_file():
        return _Shards(source)
    if local.is_file():
        return _Files([local])
    if not local.is_dir():
        raise CrispError(f"images={source}: no such file or folder; give images, a folder of them, or shards")
    found = sorted(_walk(local))
    if not found:
        raise CrispError(f"images={source}: no images ({', '.join(sorted(SUFFIXES))}) and no shards in this folder")
    return _Files(found)


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def check_size(size_px: int, patch_px: int, *, who: str) -> None:
    """That a square image of that side can be cut into patches.

    Raises:
        CrispError: it cannot, or it is larger than `LARGEST_PX`.
    """
    if not 1 <= size_px <= LARGEST_PX:
        raise CrispError(f"size_px={size_px}: must lie between one patch and {LARGEST_PX}")
    if size_px % patch_px:
        below = size_px // patch_px * patch_px
        options = [side for side in (below, below + patch_px) if patch_px <= side <= LARGEST_PX]
        raise CrispError(
            f"size_px={size_px}: no multiple of the {patch_px} px patches of {who}; take "
            f"{' or '.join(map(str, options))} (multiples of 112 fit patches of 14 and 16)"
        )


def prepare(pixels: NDArray[np.uint8], *, size_px: int, patch_px: int, shape: Shape) -> NDArray[np.uint8]:
    """What a model sees of an image [h, w, 3]: uint8 [H, W, 3], PIL's bicubic.

    Args:
        pixels: the image.
        size_px: of the square (crop, squash), or of the longer side (whole).
        patch_px: sides of a whole image become multiples of it.
        shape: the middle square of the image with its shorter side at `size_px`; the whole image made square, each
            axis on its own; or the whole image with its aspect kept to a patch.
    """
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    bicubic = Image.Resampling.BICUBIC
    if shape == "squash":
        return np.asarray(image.resize((size_px, size_px), bicubic))
    if shape == "whole":
        scale = size_px / max(height, width)
        most = size_px // patch_px  # a longer side that is no multiple of the patch is rounded down
        w, h = (min(most, max(1, round(side * scale / patch_px))) * patch_px for side in (width, height))
        return np.asarray(image.resize((w, h), bicubic))
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return np.asarray(image.resize((size_px, size_px), bicubic, box=(left, top, left + side, top + side)))
