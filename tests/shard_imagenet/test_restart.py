"""The output is the same whoever makes it and however often it is stopped: processes, kills, partitions, merges."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from crisp.errors import CrispError
from crisp.shard_format import MANIFEST_FILE
from crisp.shard_imagenet import ShardConfig, Sharded, shard_imagenet
from crisp.shard_imagenet.command import MergeConfig, merge
from crisp.shard_imagenet.folder import locked
from crisp.storage import Location

OPTIONS: dict[str, Any] = {"shard_bytes": 30_000, "seed": 5}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 JPEGs in six classes, some of them damaged, for some dozen shards."""
    folder = tmp_path_factory.mktemp("many")
    rng = random.Random(0)
    for i in range(120):
        path = folder / f"n{i % 6:08d}" / f"{i}.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((60 + i % 7, 50), 40 + i % 50).convert("RGB").save(path, "JPEG", quality=90)
        if rng.random() < 0.1:
            path.write_bytes(path.read_bytes()[:-20])
    return folder


@pytest.fixture(scope="module")
def undisturbed(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    _shard(many, out, workers=1)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _shard(source: Path, out: Path, **options: Any) -> Sharded:
    (sharded,) = shard_imagenet(ShardConfig(source=str(source), out=str(out), **{**OPTIONS, **options}))
    return sharded


@pytest.mark.usefixtures("own_fork_server")
@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_the_processes(
    workers: int, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    sharded = _shard(many, tmp_path / "out", workers=workers)
    assert contents(tmp_path / "out") == undisturbed
    assert 0 < sharded.peak_rss_bytes < 300e6


def test_workers_beyond_the_shards_become_threads(many: Path, tmp_path: Path) -> None:
    for workers in (1, 7):  # seven for two shards: two processes of three threads
        _shard(many, tmp_path / str(workers), workers=workers, shard_bytes=400_000)
    assert contents(tmp_path / "1") == contents(tmp_path / "7")
    assert len(list((tmp_path / "7").glob("*.tar"))) == 2


def _start(source: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    arguments = ["shard", str(source), str(out), "--shard-bytes", "30000", "--seed", "5", "--workers", str(workers)]
    return subprocess.Popen(
        [sys.executable, "-m", "crisp", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again(workers: int, many: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rng = random.Random(workers)
    stopped_with: set[int] = set()
    finished: dict[str, int] = {}
    for _ in range(60):
        process = _start(many, out, workers)
        before = len(list(out.glob("*.tar")))
        # As soon as some more shards are there, and then at any moment.
        while process.poll() is None and len(list(out.glob("*.tar"))) < before + 1:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        process.kill()
        process.communicate()
        tars = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
        assert finished.items() <= tars.items()  # a finished shard is never made again
        finished = tars
        for name in tars:
            assert (out / name).read_bytes() == undisturbed[name]  # whole, or not under its name
        stopped_with.add(len(tars))
        if process.returncode == 0:
            break
    assert process.returncode == 0
    assert contents(out) == undisturbed
    assert len(stopped_with) > 3


@pytest.mark.slow
def test_workers_die_with_a_killed_main_process(many: Path, tmp_path: Path) -> None:
    process = _start(many, tmp_path / "out", 2)
    while len(list((tmp_path / "out").glob("*.tar"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    workers = _workers(process)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in workers)


def _workers(process: subprocess.Popen[bytes]) -> list[str]:
    """Process ids: the fork server's children."""
    return [worker for child in _children(process.pid) for worker in _children(child)]


def _children(pid: int | str) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it ends while it is looked at
        return False


@pytest.mark.slow
def test_interrupted_and_a_worker_that_is_killed(many: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number, (code, message) in enumerate(((130, "interrupted"), (1, "a worker process died"))):
        process = _start(many, out, 2)
        while len(list(out.glob("*.tar"))) < 2 + 4 * number:
            assert process.poll() is None
            time.sleep(0.002)
        if code == 130:
            process.send_signal(signal.SIGINT)
        else:
            os.kill(int(_workers(process)[0]), signal.SIGKILL)
        _, stderr = process.communicate(timeout=30)
        lines = stderr.decode().splitlines()
        assert (process.returncode, lines[-1].startswith(f"crisp shard: {message}")) == (code, True), lines
        assert not any("Traceback" in line for line in lines)
        assert not list(out.glob("*.partial")) or code == 1  # a killed process cannot clean up; its shard is made again
    _shard(many, out)
    assert contents(out) == undisturbed


def test_partitions_in_any_order(many: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for i in (2, 0, 3):
        assert _shard(many, tmp_path / "out", partition=f"{i}/4", workers=1).manifest is None
    with pytest.raises(CrispError, match=r"\d+ of \d+ shards are not made yet \(the first is shard-000001\)"):
        merge(MergeConfig(out=str(tmp_path / "out")))
    assert _shard(many, tmp_path / "out", partition="1/4", workers=1).manifest is not None  # the last one merges
    assert contents(tmp_path / "out") == undisturbed


def test_partitions_of_machines_that_share_nothing(many: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for i in range(3):
        _shard(many, tmp_path / str(i), partition=f"{i}/3", workers=1)
    for i in range(3):
        subprocess.run(["cp", "-r", f"{tmp_path}/{i}/.", str(tmp_path / "out")], check=True)
    merge(MergeConfig(out=str(tmp_path / "out")))
    assert contents(tmp_path / "out") == undisturbed
    merge(MergeConfig(out=str(tmp_path / "out")))  # once more does no harm
    with pytest.raises(CrispError, match="nowhere: neither shards nor begun shards"):
        merge(MergeConfig(out=str(tmp_path / "nowhere")))


def test_a_run_may_go_on_in_partitions(many: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    _shard(many, tmp_path / "out", partition="0/3", workers=1)
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert len(inodes) > 3
    _shard(many, tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == undisturbed
    assert inodes.items() <= {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}.items()


def test_two_runs_at_once_are_refused(many: Path, tmp_path: Path) -> None:
    _shard(many, tmp_path / "out", partition="0/2", workers=1)
    with (
        locked(Location.of(tmp_path / "out"), (1, 2)),
        pytest.raises(CrispError, match="another run is writing partition 1/2 of it; wait for it"),
    ):
        _shard(many, tmp_path / "out", partition="1/2", workers=1)


@pytest.mark.parametrize("lost", ["shard-000003.tar", "shard-000003.idx"])
def test_a_lost_shard_of_a_complete_folder_is_made_again(
    lost: str, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _shard(many, out, workers=1)
    (out / lost).unlink()
    inodes = {path.name: path.stat().st_ino for path in out.glob("*.tar") if "000003" not in path.name}
    _shard(many, out, workers=1)
    assert contents(out) == undisturbed
    assert inodes.items() <= {path.name: path.stat().st_ino for path in out.glob("*.tar")}.items()


def test_a_lost_shard_of_a_source_that_changed_unnoticed(
    class_folders: Path, tmp_path: Path, to_bytes: Callable[..., bytes]
) -> None:
    out = tmp_path / "out"
    options = {"shard_bytes": 12_000, "workers": 1}
    _shard(class_folders, out, **options)
    for path in class_folders.glob("*/*"):  # the same size, another time in an unused field of the header
        data = bytearray(path.read_bytes())
        data[data.index(b"JFIF\0") + 9] ^= 1  # the density
        path.write_bytes(data)
    (out / "shard-000001.tar").unlink()
    with pytest.raises(CrispError, match=r"shard-000001.tar: made again, it is not what it was"):
        _shard(class_folders, out, **options)
    assert not (out / "shard-000001.tar").exists()
    assert (out / MANIFEST_FILE).exists()
