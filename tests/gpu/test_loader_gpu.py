"""The CPU renderer's batches on a GPU: copied on a stream of their own, whole when the step reads them."""

import dataclasses
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from crisp.batch import Batch
from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.pipelines.buffers import BufferPool
from crisp.pipelines.loader import TrainLoader, build_train_loader
from crisp.shard_imagenet import ShardConfig, shard_imagenet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu-loader")
    (folder / "images").mkdir()
    with Image.open(str(files("skimage.data") / "coffee.png")) as image:
        for i in range(64):
            crop = image.convert("RGB").crop((4 * i, 2 * i, 4 * i + 160, 2 * i + 120))
            crop.save(folder / "images" / f"{i:02d}.jpg")
    shard_imagenet(ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), shard_samples=16, workers=1))
    return folder / "shards"


@pytest.fixture
def open_loader(shards: Path) -> Iterator[Any]:
    opened: list[TrainLoader] = []

    def build(device: str, **data: Any) -> TrainLoader:
        config = TrainConfig(
            data=DataConfig(shards=str(shards), **{"renderer": "cpu", "threads": 2, "parts": 4} | data),
            views=ViewsConfig(local_views=4),
            optim=OptimConfig(global_batch=16),
        )
        opened.append(build_train_loader(config, rank=0, world_size=1, device=torch.device(device)))
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()


def test_pooled_memory_is_page_locked() -> None:
    pool = BufferPool(pin_memory=True)
    tensor = pool.take((2, 3), torch.float32)
    assert tensor.is_pinned()
    assert tensor.pin_memory().data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("pixels", ["float32", "float16"])
def test_batches_are_the_hosts(open_loader: Any, pixels: str) -> None:
    """While the GPU is so busy that copies and steps overlap, and memory changes hands without a host sync."""
    host = list(islice(open_loader("cpu", pixels=pixels), 12))
    load = torch.randn(4096, 4096, device="cuda")
    late: list[Batch] = []
    for batch in islice(open_loader("cuda:0", pixels=pixels, prefetch_batches=3), 12):
        for _ in range(8):
            load = load @ load / 64
        late.append(Batch(**{field.name: getattr(batch, field.name).clone() for field in dataclasses.fields(Batch)}))
    for expected, found in zip(host, late, strict=True):
        for field in dataclasses.fields(Batch):
            tensor = getattr(found, field.name)
            assert tensor.is_cuda == (field.name != "patch_masks"), field.name
            assert torch.equal(tensor.cpu(), getattr(expected, field.name)), field.name
