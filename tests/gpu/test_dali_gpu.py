"""The GPU's DALI graph against the same graph on the CPU, which tests/pipelines/test_dali.py holds to the geometry."""

import dataclasses
import functools
import io
import operator
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.batch import Batch
from crisp.config import DaliConfig, ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.constants import IMAGENET_STD
from crisp.pipelines.plan import make_plan
from crisp.pipelines.source import Work

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'crisp-ssl[cuda13]'")

from crisp.pipelines.dali import DaliRenderer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PIXELS = ("reference", "global_views", "local_views")


def encoded(file_format: str, **options: Any) -> list[bytes]:
    images = []
    for name in ("astronaut.png", "chelsea.png", "coffee.png"):
        buffer = io.BytesIO()
        data = (files("skimage.data") / name).read_bytes()
        Image.open(io.BytesIO(data)).convert("RGB").save(buffer, file_format, **options)
        images.append(buffer.getvalue())
    return images


def drawn(images: list[bytes], views: ViewsConfig, epoch: int = 0) -> Work:
    sizes = np.array([Image.open(io.BytesIO(data)).size for data in images])
    plan = make_plan(
        views,
        seed=5,
        epoch=epoch,
        sample_id=np.arange(len(images)),
        height_px=sizes[:, 1],
        width_px=sizes[:, 0],
    )
    return Work(encoded=images, plan=plan, label=np.arange(len(images)))  # type: ignore[arg-type]


def renderer(device: Any, views: ViewsConfig, steps: list[Work], **options: Any) -> DaliRenderer:
    return DaliRenderer(
        views,
        source=functools.partial(operator.getitem, steps),
        **{
            "batch_size": len(steps[0].encoded),
            "device": device,
            "device_id": None,
            "threads": 2,
            "prefetch_batches": 1,
            "options": DaliConfig(workers=0),
            **options,
        },
    )


def on(device: Any, views: ViewsConfig, work: Work, **options: Any) -> Batch:
    return next(renderer(device, views, [work], **options).batches(0))


def apart(gpu: Batch, cpu: Batch, name: str) -> float:
    """Mean absolute difference in levels of 255."""
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    return float(((getattr(gpu, name).float().cpu() - getattr(cpu, name).float()) * std * 255).abs().mean())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("local_views", [0, 10])
def test_pixels_are_the_cpu_graphs(interpolation: Any, local_views: int) -> None:
    views = ViewsConfig(interpolation=interpolation, local_views=local_views)
    # PNG is decoded by the same library on both; what differs is rendering
    work = drawn(encoded("PNG"), views)
    gpu, cpu = on("gpu", views, work), on("cpu", views, work)
    for name in PIXELS[: 3 if local_views else 2]:
        assert apart(gpu, cpu, name) < 0.3, name
    for field in dataclasses.fields(Batch):
        tensor, expected = getattr(gpu, field.name), getattr(cpu, field.name)
        assert tensor.is_cuda == (field.name != "patch_masks"), field.name
        assert tensor.shape == expected.shape, field.name
        assert tensor.is_contiguous(), field.name
        if field.name not in PIXELS:
            assert torch.equal(tensor.cpu(), expected), field.name


@pytest.mark.parametrize("options", [{"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}, {"progressive": True}])
def test_jpegs_decode_as_on_the_cpu(options: dict[str, Any]) -> None:
    views = ViewsConfig(local_views=2)
    work = drawn(encoded("JPEG", quality=92, **options), views)
    gpu, cpu = on("gpu", views, work), on("cpu", views, work)
    for name in PIXELS:
        assert apart(gpu, cpu, name) < 1, name


def test_half_precision() -> None:
    views = ViewsConfig(local_views=2)
    work = drawn(encoded("PNG"), views)
    gpu, cpu = on("gpu", views, work, dtype=torch.float16), on("cpu", views, work)
    for name in PIXELS:
        assert getattr(gpu, name).dtype == torch.float16
        assert apart(gpu, cpu, name) < 0.35, name


def test_batches_are_whole_while_the_gpu_is_busy() -> None:
    """Buffers change hands without a host sync: what was read late must be what was rendered."""
    views = ViewsConfig(local_views=2)
    images = encoded("PNG")
    steps = [drawn(images, views, epoch) for epoch in range(12)]
    load = torch.randn(4096, 4096, device="cuda")
    late = []
    for batch, _ in zip(renderer("gpu", views, steps, prefetch_batches=3).batches(0), range(8), strict=False):
        for _ in range(8):
            load = load @ load / 64
        late.append({name: getattr(batch, name) * 1 for name in PIXELS})
    for step, found in enumerate(late):
        expected = on("cpu", views, steps[step])
        for name in PIXELS:
            std = torch.tensor(IMAGENET_STD)[:, None, None] * 255
            difference = ((found[name].cpu() - getattr(expected, name)) * std).abs().mean()
            assert difference < 0.3, f"step {step}, {name}"


def test_starting_at_a_step_gives_its_batch() -> None:
    views = ViewsConfig(local_views=2)
    images = encoded("JPEG", quality=92)
    steps = [drawn(images, views, epoch) for epoch in range(5)]
    counted = [b for b, _ in zip(renderer("gpu", views, steps).batches(0), range(3), strict=False)][2]
    started = next(renderer("gpu", views, steps).batches(2))
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(counted, field.name), getattr(started, field.name)), field.name


def test_a_gpu_that_is_not_there_is_refused() -> None:
    views = ViewsConfig(local_views=0)
    with pytest.raises(CrispError, match="take one of 0 to"):
        renderer("gpu", views, [drawn(encoded("PNG"), views)], device_id=torch.cuda.device_count())
