"""Each part of the CPU renderer alone, on as many threads, in a turn's own process.

The parts are the fastest known: libjpeg-turbo into kept memory, and the renderer's own kernels called without the rest
(`crisp.pipelines.pixels`), with the windows, blurs and colours of real plans.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from crisp.benchmarks.peers.clock import Spec, busy_seconds, cpu_seconds, peak_mb
from crisp.config import ViewsConfig, train_config_from_json
from crisp.errors import CrispError
from crisp.pipelines.decode import READ_AHEAD, Decoder
from crisp.pipelines.pixels import Scratch, blur_views, finish_views, resize_views
from crisp.pipelines.plan import make_plan
from crisp.pipelines.shards import ShardSet
from crisp.shard_format import Codec

DECODE, RESIZE, BLUR, FINISH = "decode", "resize", "blur", "colour, solarise, normalise"

_IMAGES = 384  # held decoded: some 200 MB
_PLANS = 4  # of each image in one call: it comes from memory once and is then in the caches, as after decoding

Job = Callable[[], int]
"""Does a piece of a part's work; the samples that it was worth."""


def time_decoding(spec: Spec) -> dict[str, float | None]:
    """A turn of decoding alone; keys as those of `time_batches`."""
    encoded = [memoryview(data) for data, _, _ in _images(spec)]
    return _run(lambda first: _decode_job(encoded, first), spec) | {
        "first_batch_s": None,
        "peak_mb": peak_mb(),
        "processes": 1,
        "gpu_mb": 0.0,
    }


def time_parts(spec: Spec) -> dict[str, dict[str, float]]:
    """Fields of `Part` by part, one after another, each on all threads for half a turn's length."""
    views = train_config_from_json(spec["config"]).views
    images = list(_images(spec))
    draws = _draws(views, images)
    decode = Decoder()
    pixels = [_padded(decode(memoryview(data))) for data, _, _ in images]
    batch = _batch(views, spec["config"]["optim"]["global_batch"])
    sides = np.array([views.reference_px, *views.view_px])

    def scratch() -> Scratch:
        return Scratch(int(sides.max()), int(np.ceil(3 * views.blur_sigma_px[1])))

    def resize(first: int) -> Job:
        memory, turns = scratch(), _round(len(images), first)
        cubic = views.interpolation == "bicubic"

        def job() -> int:
            i = next(turns)
            _, height, width = images[i]
            columns = memory.columns(width)
            crop_px, flip = draws.crop_px[i], draws.flip[i]
            resize_views(pixels[i], height, width, cubic, crop_px, flip, sides, columns, memory.fixed)
            return _PLANS

        return job

    def blur(first: int) -> Job:
        memory, turns = scratch(), _round(len(images), first)

        def job() -> int:
            blur_views(draws.blur_sigma_px[next(turns)], sides, memory.fixed)
            return _PLANS

        return job

    def finish(first: int) -> Job:
        memory, turns = scratch(), _round(len(images), first)

        def job() -> int:
            i = next(turns)
            finish_views(draws.color_matrix[i], draws.solarize[i], i * _PLANS, *batch, False, memory.fixed)
            return _PLANS

        return job

    encoded = [memoryview(data) for data, _, _ in images]
    parts: dict[str, Callable[[int], Job]] = {
        DECODE: lambda first: _decode_job(encoded, first),
        RESIZE: resize,
        BLUR: blur,
        FINISH: finish,
    }
    half = {**spec, "seconds": spec["seconds"] / 2}
    measured = {}
    for name, make_job in parts.items():
        turn = _run(make_job, half)
        measured[name] = {key: turn[key] for key in ("samples_per_s", "cpu_ms_per_sample")}
    return measured


def _run(make_job: Callable[[int], Job], spec: Spec) -> dict[str, Any]:
    """Jobs on all threads at once; keys as those of `time_batches`, as far as there are no batches."""
    threads = spec["config"]["data"]["threads"]
    start = threading.Barrier(threads + 1)

    def prepare(thread: int) -> Job:
        job = make_job(thread * _IMAGES // threads)
        job()  # compiles, and touches the memory
        return job

    def work(job: Job) -> tuple[int, float]:
        start.wait()
        done, began_s = 0, time.perf_counter()
        while not done or time.perf_counter() - began_s < spec["seconds"]:
            done += job()
        return done, done / (time.perf_counter() - began_s)

    with ThreadPoolExecutor(threads) as pool:
        jobs = list(pool.map(prepare, range(threads)))
        running = [pool.submit(work, job) for job in jobs]
        cpu_began_s, busy_began_s = cpu_seconds(), busy_seconds()
        start.wait()
        began_s = time.perf_counter()
        done, rates = zip(*(job.result() for job in running), strict=True)
        elapsed_s, cpu_s = time.perf_counter() - began_s, cpu_seconds() - cpu_began_s
        others_s = busy_seconds() - busy_began_s - cpu_s
    return {
        "samples_per_s": sum(rates),
        "cpu_ms_per_sample": cpu_s / sum(done) * 1e3,
        "cores_busy": cpu_s / elapsed_s,
        "cores_of_others": max(0.0, others_s / elapsed_s),
    }


def _decode_job(encoded: list[memoryview], first: int) -> Job:
    """Bare libjpeg-turbo into memory that is kept."""
    sizes = [3 * height * width for height, width, *_ in map(simplejpeg.decode_jpeg_header, encoded)]
    memory, turns = np.empty(max(sizes), np.uint8), _round(len(encoded), first)

    def job() -> int:
        i = next(turns)
        simplejpeg.decode_jpeg(encoded[i], "RGB", buffer=memory[: sizes[i]])
        return 1

    return job


def _round(length: int, first: int) -> Iterator[int]:
    """0 … length − 1 again and again, from `first` on."""
    return itertools.cycle(np.roll(np.arange(length), -first).tolist())


def _images(spec: Spec) -> Iterator[tuple[bytes, int, int]]:
    """Bytes, height and width of images spread over the shards, in a mixed order: what libjpeg-turbo decodes."""
    shards = ShardSet(Path(spec["config"]["data"]["shards"]), verify=False)
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(_IMAGES, len(shards))).astype(np.int64))
    found = 0
    for sample_id in np.random.default_rng(0).permutation(chosen):
        row = shards.index[sample_id]
        if int(row["codec"]) != Codec.JPEG:
            continue
        data = bytes(shards.read(int(sample_id)))
        if simplejpeg.decode_jpeg_header(data)[2] in ("Gray", "RGB", "YCbCr"):
            found += 1
            yield data, int(row["height"]), int(row["width"])
    if not found:
        raise CrispError(f"{shards.folder}: no ordinary JPEG among {len(chosen)} images; the ceilings are of JPEGs")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draws:
    """Of N images, `_PLANS` plans each: [N, P, V, …]."""

    crop_px: NDArray[np.int32]
    flip: NDArray[np.bool_]
    blur_sigma_px: NDArray[np.float32]
    color_matrix: NDArray[np.float32]
    solarize: NDArray[np.bool_]


def _draws(views: ViewsConfig, images: list[tuple[bytes, int, int]]) -> _Draws:
    _, height_px, width_px = zip(*images, strict=True)
    plans = [
        make_plan(views, seed=0, epoch=epoch, sample_id=np.arange(len(images)), height_px=height_px, width_px=width_px)
        for epoch in range(_PLANS)
    ]

    def stack(name: str) -> Any:
        return np.ascontiguousarray(np.stack([getattr(plan, name) for plan in plans], axis=1))

    return _Draws(**{name: stack(name) for name in _Draws.__dataclass_fields__})


def _padded(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[h, w, 3] → as the kernels take it: [h · w · 3 + READ_AHEAD]."""
    return np.concatenate([pixels.ravel(), np.zeros(READ_AHEAD, np.uint8)])


def _batch(views: ViewsConfig, batch: int) -> tuple[NDArray[np.uint32], ...]:
    """Float32 images of a batch as the kernels take them; every page touched, as in memory that is used again."""
    shapes = (
        (batch, 3, views.reference_px, views.reference_px),
        (2, batch, 3, views.global_px, views.global_px),
        (views.local_views, batch, 3, views.local_px, views.local_px),
    )
    return tuple(np.ones(shape, np.uint32) for shape in shapes)
