"""Samples that cannot be shown: their neighbours, the log, and a stream in which nothing else changes."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from crisp.batch import Batch
from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.decode import Decoder
from crisp.pipelines.faults import FaultLog, Replacement, neighbours
from crisp.pipelines.loader import TrainLoader, build_train_loader
from crisp.shard_format import Manifest, fingerprint, parse_manifest
from crisp.shard_imagenet import ShardConfig, shard_imagenet

CPU = torch.device("cpu")
SAMPLES = 240
Renderer = str


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, NDArray[np.uint8]]) -> Path:
    """240 small crops, 20 to a shard."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "images").mkdir()
    pixels = photographs["coffee"]
    for i in range(SAMPLES):
        y, x = 7 * (i % 40), 11 * (i // 8)
        Image.fromarray(pixels[y : y + 60, x : x + 72]).save(folder / "images" / f"{i:03d}.jpg")
    shard_imagenet(ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), shard_samples=20, workers=1))
    return folder / "shards"


@pytest.fixture
def damaged(intact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(intact, tmp_path / "damaged")
    return tmp_path / "damaged"


def config_of(shards: Path, **data: object) -> TrainConfig:
    values = {"renderer": "cpu", "threads": 2, "parts": 4, "max_bad_share": 0.5, "shuffle_window_shards": 4} | data
    return TrainConfig(
        data=DataConfig(shards=str(shards), **values),  # type: ignore[arg-type]
        views=ViewsConfig(reference_px=32, global_px=32, local_px=16, local_views=1),
        optim=OptimConfig(global_batch=16),
    )


@pytest.fixture
def open_loader() -> Iterator[Callable[..., TrainLoader]]:
    opened: list[TrainLoader] = []

    def build(shards: Path, log: Path | None = None, *, rank: int = 0, world_size: int = 1, **data: object):
        config = config_of(shards, **data)
        opened.append(build_train_loader(config, rank=rank, world_size=world_size, device=CPU, faults_folder=log))
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()


def take(loader: TrainLoader, steps: int) -> list[Batch]:
    return list(islice(loader, steps))


def logged(folder: Path) -> list[Replacement]:
    return [
        Replacement(**json.loads(line)) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()
    ]


@dataclass
class Shards:
    """A folder of shards to damage."""

    folder: Path

    def __post_init__(self) -> None:
        self.index = np.load(self.folder / "index.npy")
        self.manifest: Manifest = parse_manifest((self.folder / "manifest.json").read_bytes(), "manifest")

    def tar(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].name

    def samples(self, shard: int) -> list[int]:
        return np.flatnonzero(self.index["shard"] == shard).tolist()

    def overwrite(self, sample: int, data: bytes, *, at: int = 0) -> None:
        row = self.index[sample]
        with self.tar(int(row["shard"])).open("r+b") as file:
            file.seek(int(row["offset"]) + at)
            file.write(data)

    def flip_a_bit(self, sample: int) -> None:
        row = self.index[sample]
        with self.tar(int(row["shard"])).open("rb") as file:
            file.seek(int(row["offset"]) + 600)
            byte = file.read(1)[0]
        self.overwrite(sample, bytes([byte ^ 1]), at=600)

    def make_undecodable(self, sample: int) -> None:
        """Bytes whose checksum is that of the index, with a good header, that no decoder takes."""
        import zlib

        row = self.index[sample]
        with self.tar(int(row["shard"])).open("rb") as file:
            file.seek(int(row["offset"]))
            data = bytearray(file.read(int(row["length"])))
        scan = data.index(b"\xff\xda")
        data[scan:] = b"\xff\xd9" + bytes(len(data) - scan - 2)  # the header, then the end of the image
        self.overwrite(sample, bytes(data))
        self.index["checksum"][sample] = zlib.crc32(data)

    def write_index(self) -> None:
        np.save(self.folder / "index.npy", self.index)
        manifest = replace(self.manifest, index_fingerprint=fingerprint(self.index))
        (self.folder / "manifest.json").write_text(json.dumps(manifest.to_json()))


def by_place(batches: list[Batch]) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """What is shown at each (step, place in the batch)."""
    shown = {}
    for step, batch in enumerate(batches):
        for b in range(len(batch)):
            shown[step, b] = {
                field.name: value[:, b] if value.dim() > 1 and len(value) in (1, 2, 3) and value.shape[1] == len(batch)
                else value[b]
                for field in fields(Batch)
                for value in [getattr(batch, field.name)]
            }  # fmt: skip
    return shown


def assert_good_stream_unchanged(whole: list[Batch], other: list[Batch], bad: set[int]) -> int:
    """Every good sample is where it was, with the same pixels; a bad one is replaced by a good one. How many were."""
    replaced = 0
    before, after = by_place(whole), by_place(other)
    assert before.keys() == after.keys()
    for place, shown in before.items():
        if int(shown["sample_id"]) in bad:
            replaced += 1
            assert int(after[place]["sample_id"]) not in bad
        else:
            for name, value in shown.items():
                assert torch.equal(value, after[place][name]), (place, name)
    return replaced


# --- neighbours -----------------------------------------------------------------------------------------------------


def test_neighbours_are_the_next_one_then_spread_over_the_shard_then_over_the_next_shards() -> None:
    sizes, first = np.array([3, 20, 1]), np.array([0, 3, 23])
    groups = list(neighbours(sizes, first, 21))
    assert groups == [[22, 4, 7, 9, 12, 14, 17, 19], [23], [1, 2, 0]]
    assert list(neighbours(sizes, first, 23)) == [[], [1, 2, 0], [4, 6, 9, 11, 14, 16, 19, 21]]


def test_neighbours_pass_over_empty_shards() -> None:
    assert list(neighbours(np.array([2, 0, 2]), np.array([0, 2, 2]), 2)) == [[3], [1, 0], []]


# --- the log --------------------------------------------------------------------------------------------------------


def a_replacement(**values: object) -> Replacement:
    row = {
        "step": 3, "epoch": 0, "asked_id": 5, "shown_id": 6, "failed_id": 5,
        "kind": "bytes", "shard": "shard-000000.tar", "key": "a", "reason": "x",
    }  # fmt: skip
    return Replacement(**(row | values))  # type: ignore[arg-type]


def open_log(folder: Path, name: str = "rank-00000.jsonl", share: float = 1.0) -> FaultLog:
    return FaultLog(folder, name=name, samples=1000, max_bad_share=share)


def test_the_log_is_read_again_by_whoever_opens_it(tmp_path: Path) -> None:
    first = open_log(tmp_path)
    first.add(a_replacement())
    first.add(a_replacement(failed_id=6, shown_id=7))
    second = open_log(tmp_path, "rank-00001.jsonl")
    for log in (first, second):
        assert [log.shown(0, 5), log.shown(1, 5), log.shown(0, 6)] == [7, 5, 6]
        assert log.failed(0, 5) == {5, 6}
    assert (first.replaced, second.replaced) == (2, 0)
    second.add(a_replacement(asked_id=8, failed_id=8, shown_id=9))
    assert first.shown(0, 8) == 8
    first.refresh()
    assert (first.shown(0, 8), first.replaced) == (9, 2)


def test_what_breaks_decoders_is_not_tried_again_but_storage_is(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for sample, kind in enumerate(("shard", "bytes", "decode", "render", "timeout")):
        log.add(a_replacement(asked_id=sample, failed_id=sample, kind=kind))
    assert [log.unusable(sample) for sample in range(6)] == [None, None, "decode", "render", "timeout", None]


def test_half_a_line_is_passed_over_and_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_log(tmp_path).add(a_replacement())
    path = tmp_path / "rank-00000.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "epo')  # the process was killed here
    log = open_log(tmp_path)
    log.add(a_replacement(asked_id=8, failed_id=8, shown_id=9))
    assert (log.shown(0, 5), log.shown(0, 8)) == (6, 9)
    again = open_log(tmp_path)
    assert (again.shown(0, 5), again.shown(0, 8)) == (6, 9)
    assert "not a line of a fault log" in caplog.text


def _add_many(folder: Path, first: int) -> None:
    log = open_log(folder)
    for sample in range(first, first + 50):
        log.add(a_replacement(asked_id=sample, failed_id=sample, shown_id=sample + 1))


def test_processes_that_write_the_same_file_lose_nothing(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_add_many, args=(tmp_path, 100 * i)) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    log = open_log(tmp_path)
    assert all(log.shown(0, 100 * i + j) == 100 * i + j + 1 for i in range(2) for j in range(50))


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    log = open_log(tmp_path, share=0.02)
    for sample in range(20):
        log.add(a_replacement(asked_id=sample, failed_id=sample))
        log.check()
    log.add(a_replacement(asked_id=20, failed_id=20))
    with pytest.raises(CrispError, match=r"21 of 1000 samples .* data\.max_bad_share=0\.02.*crisp shard verify"):
        log.check()


# --- the stream -----------------------------------------------------------------------------------------------------


def fifty_faults(folder: Path) -> dict[str, list[int]]:
    """Damage of every kind that lies in files, in samples of seven of the twelve shards, by kind."""
    shards = Shards(folder)
    missing, cut, other, single = shards.samples(0), shards.samples(1), shards.samples(2), shards.samples(5)
    undecodable = shards.samples(6)[3:8]
    for sample in undecodable:
        shards.make_undecodable(sample)
    flipped = [*single[::4], *shards.samples(7)[:3]]
    for sample in flipped:
        shards.flip_a_bit(sample)
    tar = shards.tar(1)
    keep = int(shards.index["offset"][cut[10]]) + 5
    os.truncate(tar, keep)
    size = shards.tar(2).stat().st_size
    shards.tar(2).write_bytes(np.random.default_rng(0).bytes(size))  # another file of the same length
    shards.tar(0).unlink()
    shards.write_index()
    return {
        "shard": missing,
        "bytes": [*cut[10:], *other, *flipped],
        "decode": undecodable,
    }


@pytest.mark.parametrize("renderer", ["cpu", "dali"])
def test_after_fifty_faults_of_mixed_kinds_the_good_samples_are_unchanged(
    intact: Path, damaged: Path, open_loader, tmp_path: Path, renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    if renderer == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    steps = 2 * (SAMPLES // 16)
    kinds = fifty_faults(damaged)
    bad = {sample for samples in kinds.values() for sample in samples}
    assert len(bad) >= 50
    whole = take(open_loader(intact, renderer=renderer), steps)
    with caplog.at_level(logging.WARNING):
        loader = open_loader(damaged, tmp_path / "log", renderer=renderer)
        survived = take(loader, steps)
    replaced = assert_good_stream_unchanged(whole, survived, bad)
    assert replaced >= 100  # two epochs; sixteen of drop_last and luck apart, each is asked for twice

    loader.close()  # or it looks ahead, and writes more lines
    rows = logged(tmp_path / "log")
    assert {row.failed_id for row in rows if row.step < steps} <= bad
    for kind, samples in kinds.items():
        assert {row.kind for row in rows if row.failed_id in samples} == {kind}
    assert {(row.shard, row.failed_id) for row in rows} <= {(f"shard-{sample // 20:06d}.tar", sample) for sample in bad}
    assert all(row.key == f"{row.failed_id:09d}" for row in rows if row.kind == "decode")
    assert loader.replaced == len(rows)
    if renderer == "cpu":  # DALI's processes write their own
        told = [record.getMessage() for record in caplog.records if "is shown in its place" in record.getMessage()]
        assert len(told) == len({row.failed_id for row in rows})

    # A resumed run repeats it from the log alone, although the shards are whole again; so does the other renderer.
    log = tmp_path / "log"
    for again in ("cpu", "dali") if renderer == "cpu" else ("cpu",):
        if again == "dali":
            pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        resumed = open_loader(intact, log, renderer=again)
        resumed.load_state_dict({"step": 7})
        for batch, expected in zip(take(resumed, 12), survived[7:], strict=False):
            assert torch.equal(batch.sample_id, expected.sample_id)
            assert torch.equal(batch.patch_masks, expected.patch_masks)
            if again == renderer:
                assert torch.equal(batch.global_views, expected.global_views)


def test_another_world_repeats_the_replacements(intact: Path, damaged: Path, open_loader, tmp_path: Path) -> None:
    fifty_faults(damaged)
    survived = take(open_loader(damaged, tmp_path / "log"), 10)
    ranks = [take(open_loader(intact, tmp_path / "log", rank=rank, world_size=3), 10) for rank in range(3)]
    for step, batch in enumerate(survived):
        ids = sorted(int(i) for share in ranks for i in share[step].sample_id)
        assert ids == sorted(batch.sample_id.tolist())


class Saboteur:
    """A decoder that fails at images of certain bytes, in the way of each."""

    def __init__(self, ways: dict[bytes, Callable[[], None]]) -> None:
        self.ways = ways
        self.decode_flat = Decoder.decode_flat

    def __call__(self, decoder: Decoder, data: memoryview):
        if (way := self.ways.get(bytes(data))) is not None:
            way()
        return self.decode_flat(decoder, data)


def _die() -> None:
    raise SystemExit("a thread that dies")


def _fail() -> None:
    raise RuntimeError("a bug")


def test_threads_that_hang_die_or_fail_are_survived(
    intact: Path, open_loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = take(open_loader(intact), 15)
    shards = Shards(intact)
    ways: dict[bytes, Callable[[], None]] = {}
    release = time.monotonic() + 6
    kinds: dict[int, str] = {}
    chosen = whole[2].sample_id[:2].tolist() + whole[3].sample_id[:2].tolist() + whole[9].sample_id[:2].tolist()
    for sample, (kind, way) in zip(
        chosen,
        [
            ("timeout", lambda: time.sleep(max(0.0, release - time.monotonic()))),
            ("render", _die),
            ("render", _fail),
            ("timeout", lambda: time.sleep(max(0.0, release - time.monotonic()))),
            ("render", _die),
            ("render", _die),
        ],
        strict=True,
    ):
        row = shards.index[sample]
        with shards.tar(int(row["shard"])).open("rb") as file:
            file.seek(int(row["offset"]))
            ways[file.read(int(row["length"]))] = way
        kinds[sample] = kind
    saboteur = Saboteur(ways)
    monkeypatch.setattr(Decoder, "decode_flat", lambda decoder, data: saboteur(decoder, data))
    survived = take(open_loader(intact, tmp_path / "log", sample_timeout_s=0.5), 15)
    # The threads that hung wake up now and must not write into batches that were handed out.
    time.sleep(max(0.0, release - time.monotonic()) + 0.2)
    assert assert_good_stream_unchanged(whole, survived, set(kinds)) == 6
    assert {row.failed_id: row.kind for row in logged(tmp_path / "log")} == kinds


def test_a_read_that_hangs_is_given_up(
    intact: Path, open_loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = take(open_loader(intact), 4)
    stuck = int(whole[1].sample_id[5])
    row = Shards(intact).index[stuck]
    preadv = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if (len(buffers[0]), offset) == (int(row["length"]), int(row["offset"])):
            time.sleep(3)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    survived = take(open_loader(intact, tmp_path / "log", sample_timeout_s=0.5), 4)
    assert assert_good_stream_unchanged(whole, survived, {stuck}) == 1
    assert [(row.failed_id, row.kind) for row in logged(tmp_path / "log")] == [(stuck, "timeout")]


def test_when_all_is_gone_the_run_stops(damaged: Path, open_loader) -> None:
    loader = open_loader(damaged, max_bad_share=1.0)
    batches = iter(loader)
    for tar in damaged.glob("*.tar"):
        tar.unlink()
    with pytest.raises(CrispError, match=r"none of its neighbours can.*crisp shard verify"):
        list(islice(batches, 40))


@pytest.mark.parametrize("renderer", ["cpu", "dali"])
def test_too_many_bad_samples_stop_the_stream(damaged: Path, open_loader, renderer: Renderer) -> None:
    if renderer == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    shards = Shards(damaged)
    for sample in range(0, SAMPLES, 4):
        shards.flip_a_bit(sample)
    with pytest.raises(CrispError, match=r"of 240 samples could not be shown.*data\.max_bad_share=0\.1"):
        take(open_loader(damaged, renderer=renderer, max_bad_share=0.1), 15)


def test_damaged_sizes_are_refused_at_the_start_or_told(
    damaged: Path, open_loader, caplog: pytest.LogCaptureFixture
) -> None:
    shards = Shards(damaged)
    shards.tar(3).unlink()
    with pytest.raises(CrispError, match=r"shard-000003\.tar: No such file.*crisp shard"):
        open_loader(damaged, max_bad_share=0.01)
    os.truncate(shards.tar(4), 100)
    with pytest.raises(CrispError, match="2 shards are damaged"):
        open_loader(damaged, max_bad_share=0.1)
    open_loader(damaged, max_bad_share=0.2)
    assert "shard-000003.tar" in caplog.text
    assert "100 bytes, the manifest says" in caplog.text


def test_a_tar_cut_short_under_the_reader_does_not_kill_it(damaged: Path, open_loader, tmp_path: Path) -> None:
    loader = open_loader(damaged, tmp_path / "log", max_bad_share=1.0)
    batches = iter(loader)
    next(batches)
    for tar in damaged.glob("*.tar"):
        os.truncate(tar, tar.stat().st_size // 2)
    for _ in range(10):
        next(batches)
    assert {row.kind for row in logged(tmp_path / "log")} == {"bytes"}


def test_a_graph_that_dies_for_no_reason_is_built_again(
    intact: Path, open_loader, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that reads ahead is killed, as by the system when memory runs out."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    whole = take(open_loader(intact, renderer="dali"), 30)
    before = {child.pid for child in multiprocessing.active_children()}
    loader = open_loader(intact, renderer="dali")
    batches = iter(loader)
    survived = [next(batches)]
    workers = [child for child in multiprocessing.active_children() if child.pid not in before]
    assert workers
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
    survived += list(islice(batches, 29))
    assert assert_good_stream_unchanged(whole, survived, set()) == 0
    assert "its graph is built again" in caplog.text
