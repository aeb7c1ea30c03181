"""Decoding and nothing else, in W processes: what a writer that decodes every image cannot be faster than.

A file is read and decoded, its pixels are dropped. The processes take 16 files at a time, so none waits for another;
the clock starts when all of them have imported what they need and decoded one image.
"""

import functools
import io
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from crisp.shard_format import Codec
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.examine import check

Decode = Callable[[bytes], object]

_DEAL = 16
_READY_S = 300  # importing torch on a busy machine


def _simplejpeg() -> Decode:
    import simplejpeg

    return functools.partial(simplejpeg.decode_jpeg, colorspace="RGB")


def _simplejpeg_kept() -> Decode:
    """Into memory that is used again: no page faults."""
    import simplejpeg

    memory = np.empty(0, np.uint8)

    def decode(data: bytes) -> object:
        nonlocal memory
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if len(memory) < 3 * height * width:
            memory = np.empty(3 * height * width, np.uint8)
        return simplejpeg.decode_jpeg(data, "RGB", buffer=memory)

    return decode


def _cv2() -> Decode:
    import cv2

    cv2.setNumThreads(1)
    return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def _torchvision() -> Decode:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    torch.set_num_threads(1)
    return lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def _pillow() -> Decode:
    from PIL import Image

    return lambda data: Image.open(io.BytesIO(data)).convert("RGB")


def _strict_check() -> Decode:
    """What `crisp shard` does to see that an image is whole: grey, at an eighth of the size."""
    max_pixels = ShardConfig(source="", out="").max_pixels
    return lambda data: check(data, Codec.JPEG, max_pixels=max_pixels)


STRICT_CHECK = "strict check"
# The module it needs, and what makes the function, in the process that will use it.
DECODERS: dict[str, tuple[str, Callable[[], Decode]]] = {
    "simplejpeg": ("simplejpeg", _simplejpeg),
    "simplejpeg, kept": ("simplejpeg", _simplejpeg_kept),
    "cv2": ("cv2", _cv2),
    "torchvision": ("torchvision", _torchvision),
    "PIL": ("PIL", _pillow),
    STRICT_CHECK: ("simplejpeg", _strict_check),
}


def decode_all(decoder: str, files: list[str], workers: int) -> tuple[float, float]:
    """Seconds in which some processes decode all files, and the sum of their processor time.

    Args:
        decoder: a name in `DECODERS`.
        files: JPEGs.
        workers: processes.
    """
    context = multiprocessing.get_context("spawn")
    shared = context.Barrier(workers), context.Value("Q", 0)
    with ProcessPoolExecutor(workers, context, _share, shared) as pool:
        spans = [task.result() for task in [pool.submit(_decode_some, decoder, files) for _ in range(workers)]]
    starts, ends, cpu_s = zip(*spans, strict=True)
    return max(ends) - min(starts), sum(cpu_s)


# --- in a process ---------------------------------------------------------------------------------------------------

_shared: tuple[Any, Any]


def _share(barrier: Any, next_file: Any) -> None:
    global _shared
    _shared = barrier, next_file


def _decode_some(decoder: str, files: list[str]) -> tuple[float, float, float]:
    """Take some files at a time, while there are any; start and end on the system's clock, and processor time."""
    barrier, next_file = _shared
    decode = DECODERS[decoder][1]()
    decode(_read(files[0]))
    barrier.wait(timeout=_READY_S)
    start_s, cpu_start_s = time.monotonic(), time.process_time()
    while True:
        with next_file.get_lock():
            first = next_file.value
            next_file.value += _DEAL
        if first >= len(files):
            return start_s, time.monotonic(), time.process_time() - cpu_start_s
        for file in files[first : first + _DEAL]:
            decode(_read(file))


def _read(file: str) -> bytes:
    with open(file, "rb", buffering=0) as stream:
        return stream.readall()
