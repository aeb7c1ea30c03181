"""What can be checked of a listed split before the long work: every header of a frame, and every mask as a whole."""

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from crisp.errors import CrispError
from crisp.evals.video.frames import frame_size
from crisp.evals.video.masks import object_ids, read_mask
from crisp.evals.video.protocol import FRAMES_LEFT_OUT_AT_EACH_END
from crisp.evals.video.sequences import VideoData, VideoSequence

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceFacts:
    """What a sequence's files were found to hold."""

    height_px: int
    width_px: int
    objects: Mapping[int, int]
    """Object → the frame where it is given; these are scored where the truth is known"""
    digest: str
    """Of all that the predicted masks depend on: names and sizes in bytes of the frames, the masks to start from"""


def check_data(data: VideoData, *, threads: int) -> dict[str, SequenceFacts]:
    """Facts by the sequence's name.

    Raises:
        CrispError: the first fault in the order of the sequences: a name that comes twice, frames of several sizes, a
            mask of another size than its frame, no object in the first mask, or too few frames to be scored.
    """
    names = [sequence.name for sequence in data.sequences]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CrispError(f"{data.root}: sequence {twice} is listed twice; remove one line from the list")
    with ThreadPoolExecutor(threads) as pool:
        facts = list(pool.map(lambda sequence: _check_sequence(sequence, data), data.sequences))
    log.info(
        "%s %s: %d sequences, %d frames, %d objects",
        data.dataset, data.split, len(names), sum(len(s.frames) for s in data.sequences),
        sum(len(f.objects) for f in facts),
    )  # fmt: skip
    return dict(zip(names, facts, strict=True))


def _check_sequence(sequence: VideoSequence, data: VideoData) -> SequenceFacts:
    size = frame_size(sequence.frames[0])
    for path in sequence.frames[1:]:
        if (other := frame_size(path)) != size:
            raise CrispError(
                f"{path}: {_size(other)}, but {sequence.frames[0].name} is {_size(size)}; "
                f"all frames of a sequence must have one size"
            )
    left_out = 2 * FRAMES_LEFT_OUT_AT_EACH_END
    if sequence.truths and len(sequence.frames) <= left_out:
        raise CrispError(
            f"{sequence.frames[0].parent}: {len(sequence.frames)} frames; first and last are not scored, so give at "
            f"least {left_out + 1}"
        )
    objects: dict[int, int] = {}
    for frame in sorted(sequence.starts):
        for index in _ids(sequence.starts[frame], size, data):
            objects.setdefault(index, frame)
        if not objects:
            raise CrispError(f"{sequence.starts[frame]}: no object in this first mask; give one with an id above 0")
    if sequence.named_objects and (odd := sequence.named_objects ^ objects.keys()):
        log.warning(
            "%s: objects %s are in meta.json or in the masks to start from, but not in both: is the archive whole?",
            sequence.name, ", ".join(map(str, sorted(odd))),
        )  # fmt: skip
    strangers = {index for path in sequence.truths.values() for index in _ids(path, size, data) if index not in objects}
    if data.contiguous_ids:
        objects = dict.fromkeys(range(1, max(objects) + 1), 0)
    if strangers := strangers - objects.keys():
        log.warning(
            "%s: objects %s are not in the mask to start from: they count as background",
            sequence.name, ", ".join(map(str, sorted(strangers))),
        )  # fmt: skip
    return SequenceFacts(height_px=size[0], width_px=size[1], objects=objects, digest=_digest(sequence, data))


def _ids(path: Path, size: tuple[int, int], data: VideoData) -> tuple[int, ...]:
    mask = read_mask(path, single_object=data.single_object)
    if mask.shape != size:
        raise CrispError(f"{path}: {_size(mask.shape)}, but its frame is {_size(size)}; unpack both again")
    return object_ids(mask)


def _size(size: tuple[int, ...]) -> str:
    return f"{size[1]}×{size[0]} px"


def _digest(sequence: VideoSequence, data: VideoData) -> str:
    digest = hashlib.sha256()
    for path in sequence.frames:
        digest.update(f"{path.name}\0{path.stat().st_size}\n".encode())
    for frame, path in sorted(sequence.starts.items()):
        digest.update(f"{frame}\0{data.single_object}\n".encode() + path.read_bytes())
    digest.update(repr(sequence.written).encode())
    return digest.hexdigest()
