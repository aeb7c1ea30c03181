"""Images of a data set as batches: read, decoded and prepared by threads, normalised on the device.

Preparation is PIL's, as in the published evaluation codes: another resize would move the scores.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms

from crisp.errors import CrispError
from crisp.pipelines.decode import Decoder
from crisp.pipelines.shards import ShardSet

Prepare = Callable[[Image.Image, int], Image.Image]
"""An RGB image and its number → what the backbone sees of it, of one size for all"""


class ImageSource(Protocol):
    """Encoded images by number; read from many threads."""

    def __len__(self) -> int: ...

    def read(self, image: int) -> memoryview:
        """The file's bytes; what it raises names the file and the remedy."""
        ...

    def where(self, image: int) -> str:
        """For messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes with the images or their order: part of the key of caches."""
        ...


class FileImages:
    """Image files of a folder.

    Args:
        root: the folder.
        names: paths below it, in the order of the images' numbers.

    Raises:
        CrispError: a file that does not exist or is empty; the first one is named.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = root, list(names)
        # Sizes are asked for in parallel: a million of them, one by one on a network disk, takes an hour.
        pieces = [self.names[start : start + 1024] for start in range(0, len(self.names), 1024)]
        with ThreadPoolExecutor(32) as pool:
            sizes = [size for piece in pool.map(self._sizes, pieces) for size in piece]
        if bad := [name for name, size in zip(self.names, sizes, strict=True) if size <= 0]:
            what = "empty" if (root / bad[0]).is_file() else "no such file"
            raise CrispError(
                f"{root / bad[0]}: {what}, and so {len(bad)} of {len(names)} images; unpack the images again"
            )
        digest = hashlib.sha256()
        for name, size in zip(self.names, sizes, strict=True):
            digest.update(f"{name}\0{size}\n".encode())
        self._fingerprint = digest.hexdigest()

    def _sizes(self, names: Sequence[str]) -> list[int]:
        """Bytes of each file; −1 where there is none."""
        sizes = []
        for name in names:
            try:
                sizes.append(os.stat(f"{self.root}/{name}").st_size)
            except OSError:
                sizes.append(-1)
        return sizes

    def __len__(self) -> int:
        return len(self.names)

    def read(self, image: int) -> memoryview:
        """The file's bytes."""
        try:
            return memoryview((self.root / self.names[image]).read_bytes())
        except OSError as error:
            raise CrispError(f"{self.where(image)}: {error.strerror}; unpack the image again") from error

    def where(self, image: int) -> str:
        """The path."""
        return str(self.root / self.names[image])

    @property
    def fingerprint(self) -> str:
        """Of names and sizes in order; a changed file of the same size is not noticed."""
        return self._fingerprint


class ShardImages:
    """Images of a folder of shards; the number is the sample's id."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, image: int) -> memoryview:
        """The file's bytes."""
        return self.shards.read(image)

    def where(self, image: int) -> str:
        """Folder and sample."""
        return f"{self.shards.folder} sample {image}"

    @property
    def fingerprint(self) -> str:
        """Of the index, which holds a checksum of each image."""
        return self.shards.manifest.index_fingerprint


@dataclass(frozen=True, slots=True)
class CentreCrop:
    """The shorter side to `resize_px` (bicubic), then the middle square of `crop_px`.

    Raises:
        CrispError: a crop larger than the resized image.
    """

    resize_px: int
    crop_px: int

    def __post_init__(self) -> None:
        if not 0 < self.crop_px <= self.resize_px:
            raise CrispError(f"crop_px={self.crop_px}: must lie between 1 and resize_px={self.resize_px}")

    def __call__(self, image: Image.Image, _: int) -> Image.Image:
        """The prepared image."""
        resize = transforms.Resize(self.resize_px, transforms.InterpolationMode.BICUBIC)
        cropped: Image.Image = transforms.CenterCrop(self.crop_px)(resize(image))
        return cropped


@dataclass(frozen=True, slots=True)
class WholeImage:
    """The whole image as a square of `side_px`, each axis resized on its own (bicubic)."""

    side_px: int

    def __call__(self, image: Image.Image, _: int) -> Image.Image:
        """The prepared image."""
        return image.resize((self.side_px, self.side_px), Image.Resampling.BICUBIC)


def prepared_batches(
    source: ImageSource, batches: Iterator[NDArray[np.int64]], prepare: Prepare, *, threads: int
) -> Iterator[Tensor]:
    """Batches of images, of which the next is prepared while the caller works on this one.

    Args:
        source: of the images.
        batches: numbers [B] of each batch's images; B may differ, and be 0.
        prepare: called by any thread.
        threads: decoding threads.

    Yields:
        [B, H, W, 3] uint8 on the CPU.

    Raises:
        CrispError: an image that cannot be read or decoded, by its name.
    """
    own = threading.local()  # a decoder keeps its buffer, so each thread has one

    def load(image: int) -> Tensor:
        if not hasattr(own, "decode"):
            own.decode = Decoder()
        encoded = source.read(image)
        try:
            pixels = own.decode(encoded)
        except CrispError as error:
            raise CrispError(f"{source.where(image)}: {error}; restore the file") from error
        return torch.from_numpy(np.array(prepare(Image.fromarray(pixels), image)))

    pool = ThreadPoolExecutor(threads)
    try:
        coming: list[Future[Tensor]] | None = None
        for numbers in batches:
            following = [pool.submit(load, image) for image in numbers.tolist()]
            if coming is not None:
                yield _stacked(coming)
            coming = following
        if coming is not None:
            yield _stacked(coming)
    finally:
        pool.shutdown(cancel_futures=True)


def _stacked(images: list[Future[Tensor]]) -> Tensor:
    return torch.stack([image.result() for image in images]) if images else torch.empty(0, 1, 1, 3, dtype=torch.uint8)


def normalised(images: Tensor, *, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """[B, H, W, 3] uint8 → [B, 3, H, W] float32 on the device: (pixel / 255 − mean) / std of each channel.

    The copy is of bytes, a quarter of what floats would be.
    """
    if device.type == "cuda":
        images = images.pin_memory()
    pixels = images.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float().div_(255)
    shift, scale = (torch.tensor(list(values), device=device).view(3, 1, 1) for values in (mean, std))
    return pixels.sub_(shift).div_(scale)
