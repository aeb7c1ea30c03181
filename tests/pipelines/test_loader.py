"""TrainLoader: resumable by one integer, the same images in every world, the choice of renderer."""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from crisp.batch import Batch
from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.pipelines.loader import TrainLoader, build_train_loader, choose_renderer
from crisp.shard_imagenet import ShardConfig, shard_imagenet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, NDArray[np.uint8]]) -> TrainConfig:
    """Twenty crops in several shards, global batch 8: two steps per epoch, four samples left out of each."""
    folder = tmp_path_factory.mktemp("loader")
    (folder / "images").mkdir()
    pixels = photographs["coffee"]
    for i in range(20):
        Image.fromarray(pixels[i * 9 : i * 9 + 100, i * 10 : i * 10 + 130]).save(folder / "images" / f"{i:02d}.jpg")
    shard_imagenet(
        ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), shard_bytes=40_000, workers=1)
    )
    return TrainConfig(
        data=DataConfig(shards=str(folder / "shards"), renderer="cpu", threads=1, parts=4),
        views=ViewsConfig(reference_px=64, global_px=64, local_px=32, local_views=2),
        optim=OptimConfig(global_batch=8),
    )


@pytest.fixture
def open_loader(config: TrainConfig) -> Iterator:
    opened: list[TrainLoader] = []

    def build(rank: int = 0, world_size: int = 1, **data: object) -> TrainLoader:
        changed = replace(config, data=replace(config.data, **data))
        opened.append(build_train_loader(changed, rank=rank, world_size=world_size, device=CPU))
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()


def copies(batches: Iterator[Batch], count: int) -> list[Batch]:
    """The renderer uses a batch's memory again once nobody holds it; these are held."""
    return list(islice(batches, count))


def assert_same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_resumed_at_any_step_it_yields_the_same_batches(open_loader) -> None:
    whole = copies(iter(open_loader()), 5)
    for step in range(5):
        loader = open_loader()
        loader.load_state_dict({"step": step})
        assert_same(next(iter(loader)), whole[step])


def test_state_counts_what_was_consumed_not_what_was_rendered_ahead(open_loader) -> None:
    loader = open_loader(prefetch_batches=3)
    batches = iter(loader)
    assert loader.state_dict() == {"step": 0}
    next(batches)
    next(batches)
    assert loader.state_dict() == {"step": 2}
    third = next(iter(loader))
    resumed = open_loader()
    resumed.load_state_dict({"step": 2})
    assert_same(third, next(iter(resumed)))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_every_world_sees_the_same_samples_views_and_masks(open_loader, world_size: int) -> None:
    whole = copies(iter(open_loader()), 3)
    ranks = [copies(iter(open_loader(rank=rank, world_size=world_size)), 3) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        place = {int(sample): i for i, sample in enumerate(batch.sample_id)}
        seen = []
        for share in (batches[step] for batches in ranks):
            where = torch.tensor([place[int(sample)] for sample in share.sample_id])
            seen += where.tolist()
            assert torch.equal(share.reference, batch.reference[where])
            assert torch.equal(share.global_views, batch.global_views[:, where])
            assert torch.equal(share.patch_masks, batch.patch_masks[:, where])
            assert torch.equal(share.region_seed, batch.region_seed[where])
            assert torch.equal(share.view_from_reference, batch.view_from_reference[:, where])
        assert sorted(seen) == list(range(8))


def test_an_older_iterator_ends_when_a_new_one_begins(open_loader) -> None:
    loader = open_loader()
    older = iter(loader)
    next(older)
    next(iter(loader))
    assert list(islice(older, 10)) == []


def test_dali_is_taken_where_there_is_a_gpu() -> None:
    cuda = torch.device("cuda")
    assert [choose_renderer("auto", device) for device in (CPU, cuda)] == ["cpu", "dali"]
    assert [choose_renderer(name, CPU) for name in ("cpu", "dali")] == ["cpu", "dali"]


def test_the_other_renderer_yields_the_same_step(open_loader) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    ours, theirs = open_loader(), open_loader(renderer="dali")
    assert theirs.renderer == "dali-cpu"
    for one, other in zip(copies(iter(ours), 2), copies(iter(theirs), 2), strict=True):
        assert torch.equal(one.sample_id, other.sample_id)
        assert torch.equal(one.patch_masks, other.patch_masks)
        assert torch.equal(one.region_seed, other.region_seed)
        torch.testing.assert_close(one.view_from_reference, other.view_from_reference)
        assert (one.global_views - other.global_views).abs().mean() < 0.05  # of a standard deviation
