"""The Ray engine on a local cluster of two nodes: the same bytes as the local engine."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from crisp.errors import CrispError
from crisp.shard_imagenet import ShardConfig, Sharded, shard_imagenet

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of two nodes of one core each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(60):
        path = folder / f"n{i % 4:08d}" / f"{i}.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((300 + i % 7, 280), 40 + i % 50).convert("RGB").save(path, "JPEG", quality=90)
    (folder / "n00000001" / "cut.JPEG").write_bytes(path.read_bytes()[:-20])
    return folder


def _shard(source: Path, out: Path, **options: Any) -> Sharded:
    (sharded,) = shard_imagenet(ShardConfig(source=str(source), out=str(out), shard_bytes=200_000, **options))
    return sharded


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_nodes_make_the_same_bytes(cluster: str, images: Path, tmp_path: Path) -> None:
    _shard(images, tmp_path / "local", workers=1)
    sharded = _shard(images, tmp_path / "ray", engine="ray", ray_address=cluster)
    assert sharded.manifest is not None
    assert len(sharded.manifest.shards) > 6
    assert _contents(tmp_path / "ray") == _contents(tmp_path / "local")
    assert 0 < sharded.peak_rss_bytes < 300e6


def test_an_error_on_a_node_is_one_line_and_the_run_goes_on_later(cluster: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"cut.JPEG: damaged or unusual JPEG: Premature end.*; mend or remove it"):
        _shard(images, tmp_path / "ray", engine="ray", ray_address=cluster, strict=True)
    _shard(images, tmp_path / "ray", engine="ray", ray_address=cluster, partition="0/2")
    _shard(images, tmp_path / "ray", engine="ray", ray_address=cluster, partition="1/2")
    _shard(images, tmp_path / "local", workers=1)
    assert _contents(tmp_path / "ray") == _contents(tmp_path / "local")


def test_no_cluster(images: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(CrispError, match=r"ray_address='127.0.0.1:\d+': no Ray cluster there"):
        _shard(images, tmp_path / "out", engine="ray", ray_address=address)
