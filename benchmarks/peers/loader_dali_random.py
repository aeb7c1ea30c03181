"""DALI as its users write it: its own reader of the tars, its own shuffling and its own random numbers.

All outputs of the recipe, on the CPU or on the GPU. Beside ours (`crisp.pipelines.dali_graph`) it shows what it costs
to be told every draw. What it cannot do is why ours is told: resume at a step, or make the same sample elsewhere.
Colour is one color_twist as in our plans; contrast pivots at the middle grey and hue turns in YIQ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crisp.benchmarks.peers.clock import Opener, Spec, Views
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.dali_graph import fn, math, pipeline_def, types
from crisp.shard_format import Codec, open_shards

_INTERPOLATION = {"bicubic": "INTERP_CUBIC", "bilinear": "INTERP_LINEAR"}
_SHUFFLED = 1000  # samples among which the reader draws


def dali_random(spec: Spec) -> Opener:
    """The whole recipe."""

    @contextmanager
    def open_graph() -> Iterator[Iterator[Views]]:
        graph = _recipe(spec["config"]["views"], *_tars(spec), **_options(spec))
        yield (_as_views(images) for images in _runs(graph, spec))

    return open_graph


def dali_decode(spec: Spec) -> Opener:
    """Reader and decoder alone: on a GPU, the ceiling of every loader that decodes there."""

    @contextmanager
    def open_graph() -> Iterator[Iterator[Any]]:
        yield _runs(_decode_alone(*_tars(spec), **_options(spec)), spec)

    return open_graph


def _tars(spec: Spec) -> tuple[list[str], list[str], str]:
    """Tars, DALI's indices of them, and where images are to be decoded."""
    shards = Path(spec["config"]["data"]["shards"])
    manifest, _ = open_shards(shards)
    tars = [shards / shard.name for shard in manifest.shards]
    return [str(tar) for tar in tars], [str(tar.with_suffix(".idx")) for tar in tars], spec["device"]


def _options(spec: Spec) -> dict[str, Any]:
    data = spec["config"]["data"]
    return {
        "batch_size": spec["config"]["optim"]["global_batch"],
        "num_threads": data["threads"],
        "device_id": 0 if spec["device"] == "gpu" else None,
        "prefetch_queue_depth": data["prefetch_batches"],
        "seed": 0,
    }


def _runs(graph: Any, spec: Spec) -> Iterator[list[Any]]:
    stream = torch.cuda.current_stream() if spec["device"] == "gpu" else None
    graph.build()
    while True:
        yield list(graph.run(stream))


def _as_views(outputs: list[Any]) -> Views:
    reference, *views = (torch.from_dlpack(output.as_tensor()) for output in outputs)
    return reference, views[:2], views[2:]


def _read_and_decode(tars: list[str], indices: list[str], device: str) -> Any:
    encoded = fn.readers.webdataset(
        paths=tars,
        index_paths=indices,
        ext=[";".join(codec.extension for codec in Codec)],
        random_shuffle=True,
        initial_fill=_SHUFFLED,
        name="reader",
    )
    return fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu", adjust_orientation=False)


@pipeline_def
def _decode_alone(tars: list[str], indices: list[str], device: str) -> Any:
    return _read_and_decode(tars, indices, device)


@pipeline_def(enable_conditionals=True)
def _recipe(views: dict[str, Any], tars: list[str], indices: list[str], device: str) -> Any:
    image = _read_and_decode(tars, indices, device)
    filtered = {"interp_type": getattr(types, _INTERPOLATION[views["interpolation"]]), "antialias": True}
    sides = [views["global_px"]] * 2 + [views["local_px"]] * views["local_views"]
    rendered = []
    for number, side_px in enumerate(sides):
        view = fn.random_resized_crop(
            image,
            size=[side_px, side_px],
            random_area=views["global_scale"] if number < 2 else views["local_scale"],
            random_aspect_ratio=views["aspect"],
            **filtered,
        )
        rendered.append(_augment(view, views, min(number, 2)))
    reference = fn.resize(image, size=[views["reference_px"]] * 2, **filtered)
    return (_normalize(reference, False), *rendered)


def _augment(view: Any, views: dict[str, Any], kind: int) -> Any:
    brightness, contrast, saturation, hue = views["jitter"]
    if fn.random.coin_flip(probability=views["jitter_probability"], dtype=types.BOOL):
        view = fn.color_twist(
            view,
            brightness=fn.random.uniform(range=[1 - brightness, 1 + brightness]),
            contrast=fn.random.uniform(range=[1 - contrast, 1 + contrast]),
            saturation=fn.random.uniform(range=[1 - saturation, 1 + saturation]),
            hue=fn.random.uniform(range=[-360 * hue, 360 * hue]),
        )
    if fn.random.coin_flip(probability=views["grayscale_probability"], dtype=types.BOOL):
        view = fn.hsv(view, saturation=0.0)
    if fn.random.coin_flip(probability=views["blur_probability"][kind], dtype=types.BOOL):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=views["blur_sigma_px"]))
    if views["solarize_probability"][kind] > 0 and fn.random.coin_flip(
        probability=views["solarize_probability"][kind], dtype=types.BOOL
    ):
        view = math.min(view, types.Constant(np.uint8(255)) - view)  # 255 − v from 128 up
    return _normalize(view, fn.random.coin_flip(probability=views["flip_probability"]))


def _normalize(image: Any, mirror: Any) -> Any:
    return fn.crop_mirror_normalize(
        image,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * mean for mean in IMAGENET_MEAN],
        std=[255 * std for std in IMAGENET_STD],
    )
