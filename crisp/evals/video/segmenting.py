"""A sequence's predicted masks on disk, whole or absent; those that are there already are not computed again."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.errors import CrispError
from crisp.evals.video.checks import SequenceFacts
from crisp.evals.video.frames import Size, prepared_size, read_frame
from crisp.evals.video.masks import read_mask, write_mask
from crisp.evals.video.propagation import SoftMask, new_objects, propagate, read_out
from crisp.evals.video.sequences import VideoSequence
from crisp.models.frozen import FrozenBackbone


@dataclass(frozen=True, kw_only=True, slots=True)
class Extractor:
    """A backbone and how it is given frames."""

    backbone: FrozenBackbone
    device: torch.device
    size: Size
    layers: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch: int
    threads: int
    autocast: Callable[[], AbstractContextManager[object]]

    @torch.no_grad()
    def features(self, frames: Sequence[Path], height_px: int, width_px: int) -> Iterator[Tensor]:
        """Features [h, w, D] float32 of each frame: the mean of the last blocks, each through the final norm.

        The next batch of frames is decoded while the backbone works on this one.
        """
        patch_px = self.backbone.patch_px
        height, width = prepared_size(height_px, width_px, size=self.size, patch_px=patch_px)

        def load(path: Path) -> Tensor:
            return read_frame(path, height, width, mean=self.mean, std=self.std)

        with ThreadPoolExecutor(self.threads) as pool:
            coming = pool.map(load, frames[: self.batch])
            for start in range(0, len(frames), self.batch):
                following = frames[start + self.batch : start + 2 * self.batch]
                images, coming = torch.stack(list(coming)), pool.map(load, following)
                with self.autocast():
                    blocks = self.backbone(images.to(self.device, non_blocking=True), last=self.layers)
                mean = torch.stack([block.patches.float() for block in blocks]).mean(0)  # [B, n, D]
                yield from mean.unflatten(1, (height // patch_px, width // patch_px))


@torch.no_grad()
def segment(
    sequence: VideoSequence, facts: SequenceFacts, extractor: Extractor, *, single_object: bool
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Masks of a sequence.

    Yields:
        Frame and its ids [H, W] at the original size, in order. Before the first start all is background; objects that
        are given in a frame are in its mask as they were given.
    """
    size = {"height_px": facts.height_px, "width_px": facts.width_px}
    starts = {frame: read_mask(path, single_object=single_object) for frame, path in sequence.starts.items()}
    first = min(starts)
    for frame in range(first):
        yield frame, np.zeros((facts.height_px, facts.width_px), dtype=np.uint8)
    features = extractor.features(sequence.frames[first:], **size)
    known: list[SoftMask] = []
    for frame, soft in enumerate(propagate(features, {f - first: mask for f, mask in starts.items()}), start=first):
        # of objects that are given here the original mask tells more than the patch grid
        mask = read_out(soft[: len(known)], patch_px=extractor.backbone.patch_px, **size)
        if len(soft) > len(known):
            mask = np.where(np.isin(starts[frame], new_objects(starts[frame], known)), starts[frame], mask)
        known = soft
        yield frame, mask


def segment_to_disk(
    sequence: VideoSequence, facts: SequenceFacts, extractor: Extractor, folder: Path, *, single_object: bool
) -> bool:
    """Write a sequence's masks to `folder`/masks/NAME, unless they are there.

    Returns:
        Whether they had to be computed.

    Raises:
        CrispError: a frame cannot be decoded, or the masks cannot be written.
    """
    target, record = folder / "masks" / sequence.name, folder / "done" / f"{sequence.name}.json"
    content = json.dumps({"sequence": facts.digest}, indent=2) + "\n"
    if _is_done(sequence, target, record, content):
        return False
    partial = target.with_name(f".partial-{sequence.name}")
    try:
        record.unlink(missing_ok=True)
        for left in (partial, target):
            if left.exists():
                shutil.rmtree(left)
        partial.mkdir(parents=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        written = set(sequence.written)
        for frame, mask in segment(sequence, facts, extractor, single_object=single_object):
            if frame in written:
                write_mask(mask, partial / sequence.mask_name(frame))
        partial.rename(target)
        record.write_text(content)
    except OSError as error:
        raise CrispError(f"{target}: cannot be written ({error.strerror or error}); choose another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _is_done(sequence: VideoSequence, target: Path, record: Path, content: str) -> bool:
    if not record.is_file() or record.read_text() != content:
        return False
    return all((target / sequence.mask_name(frame)).is_file() for frame in sequence.written)
