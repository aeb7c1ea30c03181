"""A run that is continued elsewhere: on other ranks, threads or machines, with the other renderer."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from crisp.batch import Batch
from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.pipelines.faults import FaultLog
from crisp.pipelines.loader import TrainLoader, build_train_loader
from crisp.pipelines.shards import ShardSet
from crisp.pipelines.source import TrainSource
from crisp.shard_imagenet import ShardConfig, shard_imagenet

CPU = torch.device("cpu")
GLOBAL_BATCH = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, NDArray[np.uint8]]) -> TrainConfig:
    """203 images of many sizes in shards of 2 to 12 samples: 12 full batches per epoch, 11 samples are left out."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "images").mkdir()
    pixels = photographs["coffee"]
    for i in range(203):
        y, x = 5 * (i % 40), 11 * (i // 7)
        size = 24 + 13 * (i % 11)
        Image.fromarray(pixels[y : y + size, x : x + size + 8]).save(folder / "images" / f"{i:03d}.png")
    shard_imagenet(
        ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), shard_bytes=200_000, workers=1)
    )
    return TrainConfig(
        data=DataConfig(shards=str(folder / "shards"), renderer="cpu", threads=1, parts=8, shuffle_window_shards=2),
        views=ViewsConfig(reference_px=32, global_px=32, local_px=16, local_views=2),
        optim=OptimConfig(global_batch=GLOBAL_BATCH),
    )


@pytest.fixture
def open_loader(config: TrainConfig) -> Iterator:
    opened: list[TrainLoader] = []

    def build(rank: int = 0, world_size: int = 1, nodes: int = 1, **data: object) -> TrainLoader:
        changed = replace(config, data=replace(config.data, **data))
        opened.append(build_train_loader(changed, rank=rank, world_size=world_size, nodes=nodes, device=CPU))
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()


def test_the_shards_are_uneven(config: TrainConfig) -> None:
    assert config.data.shards is not None
    samples = [shard.samples for shard in ShardSet(Path(config.data.shards)).manifest.shards]
    assert len(samples) >= 16
    assert max(samples) >= 2 * min(samples)


def assert_part_of(share: Batch, whole: Batch) -> list[int]:
    """A rank's batch shows what the global batch shows of these samples; their places in it."""
    place = {int(sample): i for i, sample in enumerate(whole.sample_id)}
    where = [place[int(sample)] for sample in share.sample_id]
    assert torch.equal(share.reference, whole.reference[where])
    assert torch.equal(share.global_views, whole.global_views[:, where])
    assert torch.equal(share.local_views, whole.local_views[:, where])
    assert torch.equal(share.view_from_reference, whole.view_from_reference[:, where])
    assert torch.equal(share.patch_masks, whole.patch_masks[:, where])
    assert torch.equal(share.region_seed, whole.region_seed[where])
    assert torch.equal(share.label, whole.label[where])
    return where


@pytest.mark.parametrize(("world_size", "nodes"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (8, 1)])
def test_continued_in_any_world_in_the_middle_of_an_epoch(open_loader, world_size: int, nodes: int) -> None:
    """Two ranks begin; others, with other threads, go on from their state, across the end of the epoch."""
    whole = list(islice(open_loader(), 15))
    first = [open_loader(rank, 2) for rank in range(2)]
    for step, (one, other) in enumerate(zip(*(islice(loader, 7) for loader in first), strict=True)):
        assert sorted(assert_part_of(one, whole[step]) + assert_part_of(other, whole[step])) == list(range(16))
    state = first[0].state_dict()
    assert state == first[1].state_dict() == {"step": 7}

    ranks = [
        open_loader(rank, world_size, nodes, threads=2, read_threads=3, prefetch_batches=3)
        for rank in range(world_size)
    ]
    for loader in ranks:
        loader.load_state_dict(state)
    for step, shares in enumerate(zip(*(islice(loader, 8) for loader in ranks), strict=True), start=7):
        places = [place for share in shares for place in assert_part_of(share, whole[step])]
        assert sorted(places) == list(range(16))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_continued_with_the_other_renderer(open_loader) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    whole = list(islice(open_loader(), 9))
    other = open_loader(renderer="dali")
    other.load_state_dict({"step": 5})
    for expected, batch in zip(whole[5:], islice(other, 4), strict=True):
        assert torch.equal(batch.sample_id, expected.sample_id)
        assert torch.equal(batch.patch_masks, expected.patch_masks)
        assert torch.equal(batch.region_seed, expected.region_seed)
        torch.testing.assert_close(batch.view_from_reference, expected.view_from_reference)


def test_an_epoch_shows_no_sample_twice_and_leaves_out_less_than_a_batch(open_loader) -> None:
    loader = open_loader()
    assert loader.steps_per_epoch == 203 // GLOBAL_BATCH
    batches = iter(loader)
    left_out = []
    for _ in range(3):
        seen = [int(i) for batch in islice(batches, loader.steps_per_epoch) for i in batch.sample_id]
        assert len(set(seen)) == len(seen) == 192
        left_out.append(frozenset(range(203)) - frozenset(seen))
    assert len(set(left_out)) == 3  # other ones in each epoch


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_a_node_reads_only_its_own_shards(config: TrainConfig, tmp_path: Path, nodes: int) -> None:
    """Bytes of the tars that a node opens in an epoch: its share, and at most a shard at each end of its parts."""
    assert config.data.shards is not None
    opened_bytes, opened = [], []
    for node in range(nodes):
        shards = ShardSet(Path(config.data.shards))
        for rank in (2 * node, 2 * node + 1):
            faults = FaultLog(tmp_path, name="none.jsonl", samples=len(shards), max_bad_share=1.0)
            source = TrainSource(config, shards, faults, rank=rank, world_size=2 * nodes, nodes=nodes)
            for step in range(source.layout.steps_per_epoch):
                source(step)
            source.close()
        opened.append(shards.opened)
        opened_bytes.append(sum(shards.manifest.shards[shard].bytes for shard in shards.opened))
    everything = ShardSet(Path(config.data.shards)).manifest.shards
    parts = config.data.parts
    largest = max(shard.bytes for shard in everything)
    assert set().union(*opened) == set(range(len(everything)))
    assert (
        sum(map(len, opened)) <= len(everything) + parts
    )  # only a shard that straddles two parts is read by two nodes
    for node_bytes in opened_bytes:
        assert node_bytes <= sum(shard.bytes for shard in everything) / nodes + 2 * largest * (parts / nodes)
