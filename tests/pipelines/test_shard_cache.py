"""Shards from a URL: downloaded once, checked, shared, bounded; over real HTTP and S3 servers with faults injected."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crisp import storage
from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines import shard_cache
from crisp.pipelines.loader import build_train_loader
from crisp.pipelines.order import EpochLayout, coming_shards, global_batch_samples, rank_slots
from crisp.pipelines.shard_cache import ShardCache
from crisp.pipelines.shard_prefetch import ShardPrefetcher
from crisp.pipelines.shards import ShardSet
from crisp.shard_format import Manifest
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.storage import Location
from tests.faulty_http import Fault, Faults, faulty_files

SHARDS, EACH = 60, 4
LARGE = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images in 60 shards, all tars of nearly the same size (about 20 kB)."""
    folder = tmp_path_factory.mktemp("remote")
    (folder / "images").mkdir()
    for i in range(SHARDS * EACH):
        image = Image.effect_noise((48, 40), 30 + i % 50).convert("RGB")
        image.save(folder / "images" / f"{i:03d}.jpg", quality=90)
    shard_imagenet(
        ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), shard_samples=EACH, workers=1)
    )
    return folder / "shards"


@pytest.fixture
def served(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Served"]:
    """A copy of the folder behind an HTTP server that fails as it is told."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    storage._file_system.cache_clear()
    shutil.copytree(folder, tmp_path / "served")
    faults = Faults(lambda number, method: None)
    with faulty_files(tmp_path / "served", faults) as url:
        yield Served(tmp_path / "served", url, faults, tmp_path / "cache")
    storage._file_system.cache_clear()


class Served:
    def __init__(self, folder: Path, url: str, faults: Faults, cache: Path) -> None:
        self.folder, self.url, self.faults, self.cache_folder = folder, url, faults, cache
        self.tars = sorted(folder.glob("*.tar"))
        self.bytes = sum(tar.stat().st_size for tar in self.tars)

    def cache(self, limit_bytes: int = LARGE) -> ShardCache:
        return ShardCache(self.url, folder=self.cache_folder, limit_bytes=limit_bytes)


def held(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.metadata.glob("*.tar"))


def test_it_brings_the_metadata_then_tars_as_they_are_asked_for(served: Served) -> None:
    cache = served.cache()
    shards = ShardSet(cache=cache)
    assert held(cache) == []
    local = ShardSet(served.folder)
    assert len(shards) == len(local) == SHARDS * EACH
    for sample in (0, 3, 200):
        assert bytes(shards.read(sample)) == bytes(local.read(sample))
    assert held(cache) == ["shard-000000.tar", "shard-000050.tar"]
    assert cache.bytes_fetched == sum(served.tars[i].stat().st_size for i in (0, 50))
    requests = served.faults.requests
    again = ShardSet(cache=served.cache())  # the next run: the manifest alone is asked for
    assert bytes(again.read(1)) == bytes(local.read(1))
    assert served.faults.requests - requests <= 2


def test_an_unknown_folder_is_refused(served: Served) -> None:
    with pytest.raises(CrispError, match=r"no manifest\.json; name a folder of shards"):
        ShardCache(served.url + "/nowhere", folder=served.cache_folder, limit_bytes=LARGE)


def test_a_folder_that_has_changed_gets_another_cache(served: Served) -> None:
    first = served.cache()
    (served.folder / "manifest.json").write_bytes((served.folder / "manifest.json").read_bytes().replace(b" ", b"  "))
    assert served.cache().metadata != first.metadata


def test_threads_that_want_the_same_tar_download_it_once(served: Served) -> None:
    cache = served.cache()
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(cache.fetch, [7] * 8 + [8] * 8))
    assert len(set(paths)) == 2
    assert cache.bytes_fetched == sum(served.tars[i].stat().st_size for i in (7, 8))


def _fetch_all(cache: ShardCache, count: "multiprocessing.Queue[int]") -> None:
    for shard in range(20):
        cache.fetch(shard)
    count.put(cache.bytes_fetched)


def test_processes_that_want_the_same_tars_download_them_once(served: Served) -> None:
    spawn = multiprocessing.get_context("spawn")
    cache, count = served.cache(), spawn.Queue()
    processes = [spawn.Process(target=_fetch_all, args=(cache, count)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sum(count.get(timeout=10) for _ in processes) == sum(tar.stat().st_size for tar in served.tars[:20])
    assert len(held(cache)) == 20


def _fetch_and_hang(cache: ShardCache) -> None:
    """Stops in the middle of a download."""
    read = Location.read

    def stuck(location: Location, offset: int = 0, size: int | None = None) -> bytes:
        if offset:
            time.sleep(60)
        return read(location, offset, size)

    Location.read = stuck  # type: ignore[method-assign]
    shard_cache._BLOCK_BYTES = 4096
    cache.fetch(5)


def test_what_a_killed_process_left_is_taken_over(served: Served) -> None:
    cache = served.cache()
    process = multiprocessing.get_context("spawn").Process(target=_fetch_and_hang, args=(cache,))
    process.start()
    partial = cache.metadata / "shard-000005.tar.partial"
    while not (partial.exists() and partial.stat().st_size):
        time.sleep(0.01)
    waiting = threading.Thread(target=cache.fetch, args=(5,))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()  # it waits for whoever has begun
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiting.join(20)
    assert (cache.metadata / "shard-000005.tar").read_bytes() == served.tars[5].read_bytes()
    assert not partial.exists()


def test_the_longest_unused_go_first_and_the_limit_holds(served: Served) -> None:
    largest = max(tar.stat().st_size for tar in served.tars)
    cache = served.cache(limit_bytes=3 * largest)
    for shard in (0, 1, 2):
        cache.fetch(shard)
        time.sleep(0.02)
    cache.fetch(0)  # asked for again
    time.sleep(0.02)
    cache.fetch(3)
    assert held(cache) == ["shard-000000.tar", "shard-000002.tar", "shard-000003.tar"]
    for shard in range(20):
        cache.fetch(shard)
        assert sum(path.stat().st_size for path in cache.metadata.glob("*.tar*")) <= 3 * largest


def test_another_process_s_leftovers_do_not_fill_the_cache(served: Served) -> None:
    largest = max(tar.stat().st_size for tar in served.tars)
    cache = served.cache(limit_bytes=2 * largest)
    left = cache.metadata / "shard-000009.tar.partial"
    left.write_bytes(bytes(2 * largest))  # of a process that was killed
    cache.fetch(0)
    assert not left.exists()


def test_a_cache_that_is_too_small_is_said(served: Served) -> None:
    with pytest.raises(CrispError, match=r"data\.cache_gb=1e-06: too small for shard-000000.tar .*--data\.cache-gb"):
        served.cache(limit_bytes=1000).fetch(0)


def test_a_reader_goes_on_when_its_tar_has_to_go(served: Served) -> None:
    largest = max(tar.stat().st_size for tar in served.tars)
    shards, local = ShardSet(cache=served.cache(limit_bytes=2 * largest)), ShardSet(served.folder)
    for sample in np.random.default_rng(0).integers(0, SHARDS * EACH, 60):
        assert bytes(shards.read(int(sample))) == bytes(local.read(int(sample)))


def test_a_full_disk_is_said_and_leaves_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = served.cache()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CrispError, match=r"no space left; make room, lower --data\.cache-gb"):
        cache.fetch(0)
    assert list(cache.metadata.glob("*.tar*")) == []


def test_a_wrong_checksum_is_tried_once_more_then_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = served.tars[2].read_bytes()
    served.tars[2].write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    cache = served.cache()
    with pytest.raises(OSError, match="its checksum is not the manifest's"):
        cache.fetch(2)
    assert cache.bytes_fetched == 2 * len(whole)
    requests = served.faults.requests
    with pytest.raises(OSError, match="its checksum is not the manifest's"):
        cache.fetch(2)  # told at once
    assert served.faults.requests == requests
    assert held(cache) == []

    served.tars[2].write_bytes(whole)
    monkeypatch.setattr(shard_cache, "_REFUSED_S", 0)
    assert cache.fetch(2).read_bytes() == whole
    assert "once more" in caplog.text


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_whoever_waited_for_a_download_that_failed_does_not_try_again(served: Served, damage: str) -> None:
    """Not in this process and not in another; a run that is started anew does."""
    whole = served.tars[2].read_bytes()
    served.tars[2].unlink()
    if damage == "flipped":
        served.tars[2].write_bytes(whole[:-1] + b"x")
    caches = [served.cache(), served.cache()]  # as two processes: they share the folder alone
    requests = served.faults.requests

    def fetch(turn: int) -> None:
        with pytest.raises(OSError, match=r"shard-000002\.tar"):
            caches[turn % 2].fetch(2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch, range(8)))
    assert served.faults.requests - requests == (1 if damage == "missing" else 2)
    served.tars[2].write_bytes(whole)
    assert served.cache().fetch(2).read_bytes() == whole


@pytest.mark.parametrize("name", ["../../outside.tar", "/outside.tar", "..", "shard.idx"])
def test_a_manifest_cannot_name_files_outside_the_cache(served: Served, name: str) -> None:
    path = served.folder / "manifest.json"
    manifest = Manifest.from_json(json.loads(path.read_bytes()))
    shards = (manifest.shards[0]._replace(name=name), *manifest.shards[1:])
    path.write_text(json.dumps(replace(manifest, shards=shards).to_json()))
    with pytest.raises(CrispError, match="is no name of a tar"):
        served.cache()


def test_an_index_that_arrives_damaged_is_not_kept(served: Served) -> None:
    path = served.folder / "index.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes(40))
    with pytest.raises(CrispError, match=r"http.*index\.npy: what arrived is not the index"):
        served.cache()
    path.write_bytes(whole)
    cache = served.cache()
    (cache.metadata / "index.npy").write_bytes(whole[:-40] + bytes(40))  # and one that is damaged here is mended
    assert len(ShardSet(cache=served.cache())) == SHARDS * EACH


def test_a_copy_that_was_cut_here_is_brought_again(served: Served) -> None:
    cache = served.cache()
    os.truncate(cache.fetch(4), 100)
    assert cache.fetch(4).read_bytes() == served.tars[4].read_bytes()


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_trouble_with_the_own_disk_is_no_shard_s_fault(
    served: Served, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = served.cache()

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CrispError, match=r"--data\.cache"):
        cache.fetch(0)
    assert list(cache.metadata.glob("*.tar*")) == []


def test_the_limit_holds_at_every_moment(served: Served) -> None:
    """Added up under the lock of the whole cache, while four threads bring tars."""
    limit = 2 * max(tar.stat().st_size for tar in served.tars)
    cache = served.cache(limit_bytes=limit)
    largest, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not stop.wait(0.0005):
            sizes = {}
            with shard_cache._locked(cache._top / ".lock", keep=True):
                for entry in os.scandir(cache.metadata):
                    if ".tar" in entry.name:
                        try:
                            sizes[entry.name.partition(".tar")[0]] = entry.stat().st_size
                        except FileNotFoundError:
                            continue
            largest = max(largest, sum(sizes.values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(cache.fetch, range(30)))
    stop.set()
    watcher.join()
    assert 0 < largest <= limit


def test_tars_that_are_used_in_quick_succession_keep_their_order(served: Served) -> None:
    cache = served.cache()
    for shard in range(8):
        cache.fetch(shard)
    for shard in reversed(range(8)):
        cache.touch(shard)
    times = [(cache.metadata / f"shard-{shard:06d}.tar").stat().st_mtime_ns for shard in range(8)]
    assert times == sorted(set(times), reverse=True)


def test_a_partial_that_somebody_holds_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.partial"
    with shard_cache._locked(path):
        assert not shard_cache._removed_if_abandoned(path)
        assert path.exists()
    assert shard_cache._removed_if_abandoned(path)
    assert not path.exists()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_tar_that_is_not_there_or_cut(served: Served, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    if damage == "missing":
        served.tars[3].unlink()
    else:
        os.truncate(served.tars[3], 3000)
    cache = served.cache()
    with pytest.raises(OSError, match="shard-000003"):
        cache.fetch(3)
    assert list(cache.metadata.glob("*.tar*")) == []


def _every(nth: int, *kinds: Fault) -> Callable[[int, str], Fault | None]:
    return lambda number, method: kinds[number // nth % len(kinds)] if number % nth == 0 else None


def config_of(url: str, cache: Path, cache_bytes: int = LARGE, **data: object) -> TrainConfig:
    values = {
        "renderer": "cpu", "threads": 1, "parts": 2, "shuffle_window_shards": 6, "cache": cache,
        "cache_gb": cache_bytes / 1e9,
    } | data  # fmt: skip
    return TrainConfig(
        data=DataConfig(shards=url, **values),  # type: ignore[arg-type]
        views=ViewsConfig(reference_px=32, global_px=32, local_px=16, local_views=1),
        optim=OptimConfig(global_batch=8),
    )


@pytest.mark.parametrize("share", [2.0, 0.6])
def test_an_epoch_through_a_faulty_server_fetches_each_byte_once(served: Served, share: float) -> None:
    """With a cache that holds everything, and with one that holds .6 of it; two epochs where everything fits."""
    served.faults.choose = _every(9, "500", "refuse", "500", "500", "cut")
    config = config_of(served.url, served.cache_folder, int(share * served.bytes))
    local = build_train_loader(
        replace(config, data=replace(config.data, shards=str(served.folder))),
        rank=0, world_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    loader = build_train_loader(config, rank=0, world_size=1, device=torch.device("cpu"))
    cache = loader._source.shards.cache
    assert cache is not None
    steps = loader.steps_per_epoch * (2 if share > 1 else 1)
    for expected, batch in zip(islice(local, steps), loader, strict=False):
        assert torch.equal(batch.sample_id, expected.sample_id)
        assert torch.equal(batch.global_views, expected.global_views)
    loader.close()
    local.close()
    assert served.faults.injected.keys() == {"500", "refuse", "cut"}
    # The epoch after this one begins to be prefetched; a shard that straddles the two parts may come twice.
    following = coming_shards(loader._source.layout, steps, loader._source.slots)
    extra = sum(cache.shard_bytes(shard) for shard in following.current) if share < 1 else 0
    metadata = sum((served.folder / name).stat().st_size for name in ("manifest.json", "index.npy"))
    assert cache.bytes_fetched <= 1.02 * served.bytes + extra
    assert served.faults.sent_bytes <= 1.02 * served.bytes + metadata + extra


def test_a_shard_that_a_server_has_lost_is_replaced(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    served.tars[10].unlink()
    config = config_of(served.url, served.cache_folder, max_bad_share=0.5)
    loader = build_train_loader(config, rank=0, world_size=1, device=torch.device("cpu"))
    ids = [int(i) for batch in islice(loader, loader.steps_per_epoch) for i in batch.sample_id]
    loader.close()
    assert not set(ids) & set(range(10 * EACH, 11 * EACH))
    assert loader._source.faults.replaced == EACH


def test_dali_s_processes_share_the_cache(served: Served) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config = config_of(served.url, served.cache_folder, renderer="dali")
    loader = build_train_loader(config, rank=0, world_size=1, device=torch.device("cpu"))
    ids = [int(i) for batch in islice(loader, loader.steps_per_epoch) for i in batch.sample_id]
    loader.close()
    assert len(set(ids)) == len(ids) == SHARDS * EACH


def test_from_a_store(folder: Path, store: Faults, tmp_path: Path) -> None:
    for path in folder.iterdir():
        with Location.of(f"s3://data/shards/{path.name}").whole_file() as file:
            file.write(path.read_bytes())
    store.choose = _every(9, "500", "cut", "refuse", "500")
    cache = ShardCache("s3://data/shards", folder=tmp_path / "cache", limit_bytes=LARGE)
    shards, local = ShardSet(cache=cache), ShardSet(folder)
    for sample in range(0, SHARDS * EACH, 7):
        assert bytes(shards.read(sample)) == bytes(local.read(sample))
    assert store.injected.total() > 3


# --- prefetch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("window_shards", [1, 3, 100])
@pytest.mark.parametrize("sizes", [[7] * 30, [1, 40, 3, 0, 9, 22, 5, 5, 60, 2, 2, 2], [50]])
def test_coming_shards_hold_whatever_is_read(sizes: list[int], window_shards: int, parts: int) -> None:
    layout = EpochLayout(shard_samples=sizes, global_batch=8, parts=parts, window_shards=window_shards, seed=3)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for world in (1, 2):
        slots = rank_slots(8, rank=world - 1, world_size=world)
        steps = layout.steps_per_epoch
        coming = [coming_shards(layout, step, slots) for step in range(2 * steps)]
        for step in range(2 * steps):
            read = set(shard_of[global_batch_samples(layout, step // steps, step % steps, slots)])
            assert read <= set(coming[step].current)
            assert not set(coming[step].current) & set(coming[step].following)
            assert all(sizes[shard] for shard in coming[step].current + coming[step].following)
            if (
                step and layout.window_samples >= 2 * layout.global_batch // parts
            ):  # nothing is read that was not announced by the window before
                assert set(coming[step].current) <= set(coming[step - 1].current + coming[step - 1].following)


def test_the_prefetcher_brings_what_is_next_and_no_more_than_fits(served: Served) -> None:
    layout = EpochLayout(shard_samples=[EACH] * SHARDS, global_batch=8, parts=2, window_shards=5, seed=0)
    slots = rank_slots(8, rank=0, world_size=1)
    coming = coming_shards(layout, 0, slots)
    largest = max(tar.stat().st_size for tar in served.tars)
    cache = served.cache(limit_bytes=largest * (len(coming.current) + 2))
    prefetcher = ShardPrefetcher(cache, layout, slots)
    prefetcher.advance(0)
    wanted = {f"shard-{shard:06d}.tar" for shard in (*coming.current, *coming.following[:2])}
    deadline = time.monotonic() + 20
    while set(held(cache)) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert set(held(cache)) == wanted
    prefetcher.close()


def test_a_cache_that_is_smaller_than_the_windows_is_told_once(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    layout = EpochLayout(shard_samples=[EACH] * SHARDS, global_batch=8, parts=2, window_shards=5, seed=0)
    prefetcher = ShardPrefetcher(served.cache(limit_bytes=100_000), layout, rank_slots(8, rank=0, world_size=1))
    for step in range(layout.steps_per_epoch):
        prefetcher.advance(step)
        time.sleep(0.01)
    deadline = time.monotonic() + 20
    while "data.cache_gb" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    prefetcher.close()
    assert caplog.text.count("raise --data.cache-gb, or start a run with a smaller --data.shuffle-window-shards") == 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_that_share_a_tight_cache_do_not_push_out_what_they_need(served: Served, ranks: int) -> None:
    """Of the data, .45 fit: all current windows 2.25 times. Each of the four parts' ends cuts a shard, read twice."""
    layout = EpochLayout(shard_samples=[EACH] * SHARDS, global_batch=8, parts=4, window_shards=3, seed=0)
    caches = [served.cache(limit_bytes=int(0.45 * served.bytes)) for _ in range(ranks)]
    slots = [rank_slots(8, rank=rank, world_size=ranks) for rank in range(ranks)]
    prefetchers = [ShardPrefetcher(cache, layout, own, ranks=ranks) for cache, own in zip(caches, slots, strict=True)]
    for step in range(layout.steps_per_epoch):
        for prefetcher in prefetchers:
            prefetcher.advance(step)
        time.sleep(0.03)
        for cache, own in zip(caches, slots, strict=True):
            for shard in np.unique(global_batch_samples(layout, 0, step, own) // EACH):
                cache.fetch(int(shard))
    for prefetcher in prefetchers:
        prefetcher.close()
    following = coming_shards(layout, layout.steps_per_epoch, np.arange(8)).current  # the next epoch's: under way
    assert sum(cache.bytes_fetched for cache in caches) <= (1 + (4 + len(following)) / SHARDS) * 1.01 * served.bytes


def test_a_server_without_byte_ranges_is_said(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Python's own http.server: it sends the whole file whatever is asked for."""
    import functools
    import http.server

    monkeypatch.setattr(shard_cache, "_BLOCK_BYTES", 4096)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served.folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        cache = ShardCache(f"http://127.0.0.1:{server.server_port}", folder=tmp_path / "c", limit_bytes=LARGE)
        with pytest.raises(CrispError, match=r"it does not answer byte ranges \(Python's http\.server, for one\)"):
            cache.fetch(0)
    finally:
        server.shutdown()
        server.server_close()
