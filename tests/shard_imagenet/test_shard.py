import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
import webdataset
from PIL import Image
from rich.console import Console

from crisp.errors import CrispError
from crisp.shard_format import INDEX_DTYPE, Codec, Manifest, open_shards
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.shard_imagenet.command import main
from crisp.shard_imagenet.config import MAX_PIXELS
from crisp.shard_imagenet.shard import Progress

Photo = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def _shard(source: Path, out: Path, **options: Any) -> Manifest:
    """In the source's order, and without processes of its own, unless the options say otherwise."""
    options = {"shuffle": "no", "workers": 1, **options}
    (sharded,) = shard_imagenet(ShardConfig(source=str(source), out=str(out), **options))
    assert sharded.manifest is not None
    return sharded.manifest


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _rejected(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {line["source"]: line["reason"] for line in lines}


@pytest.fixture
def mixed(class_folders: Path, make_photo: Photo, to_bytes: Encode) -> Path:
    """`class_folders` with PNG, WebP, and files that cannot be taken."""
    (class_folders / "n01/png.JPEG").write_bytes(to_bytes(make_photo(50), "PNG"))
    (class_folders / "n01/webp.JPEG").write_bytes(to_bytes(make_photo(51), "WEBP"))
    (class_folders / "n01/cut.JPEG").write_bytes(to_bytes(make_photo(52))[:-100])
    (class_folders / "n01/empty.JPEG").write_bytes(b"")
    (class_folders / "a b/notes.txt").write_bytes(b"hello, world")
    (class_folders / "list.csv").write_bytes(b"a,b")
    return class_folders


def test_folder_and_manifest(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    manifest = _shard(mixed, out, shard_bytes=12_000)
    names = [Path(shard.name).stem for shard in manifest.shards]
    assert len(names) > 2
    assert sorted(_bytes(out)) == sorted(
        ["index.npy", "manifest.json", "rejected.jsonl", *(f"{n}.tar" for n in names), *(f"{n}.idx" for n in names)]
    )
    assert manifest.classes == ("a b", "n01", "élan")
    assert (manifest.samples, manifest.rejected) == (14, 4)
    assert sum(shard.samples for shard in manifest.shards) == 14
    assert open_shards(out)[0] == manifest
    assert _rejected(out) == {
        "a b/notes.txt": "not JPEG, PNG or WebP: it begins with b'hello, world'",
        "list.csv": "beside the class folders",
        "n01/cut.JPEG": "damaged or unusual JPEG: Premature end of JPEG file",
        "n01/empty.JPEG": "empty",
    }


def test_index_leads_to_the_original_bytes(mixed: Path, tmp_path: Path) -> None:
    manifest = _shard(mixed, tmp_path / "out", shard_bytes=12_000)
    _, index = open_shards(tmp_path / "out")
    assert index.dtype == INDEX_DTYPE
    seen = set()
    for row in index:
        tar_path = tmp_path / "out" / manifest.shards[row["shard"]].name
        data = tar_path.read_bytes()[row["offset"] : row["offset"] + row["length"]]
        with tarfile.open(tar_path) as tar:
            (member,) = (m for m in tar if m.offset_data == row["offset"])
            key, extension = member.name.split(".")
            about = json.load(tar.extractfile(f"{key}.json"))
            label = int(tar.extractfile(f"{key}.cls").read())
        assert data == (mixed / about["source"]).read_bytes()
        assert extension == Codec(row["codec"]).extension
        assert (about["height"], about["width"]) == (row["height"], row["width"]) == (40, 60)
        assert manifest.classes[label] == about["source"].split("/")[0]
        assert label == row["label"]
        seen.add(about["source"])
    assert len(seen) == len(index) == 14


def test_bytes_do_not_depend_on_the_workers(mixed: Path, tmp_path: Path) -> None:
    outputs = []
    for workers in (1, 2, 3):
        _shard(mixed, tmp_path / str(workers), workers=workers, shard_bytes=12_000)
        outputs.append(_bytes(tmp_path / str(workers)))
    assert outputs[0] == outputs[1] == outputs[2]


def test_members_have_fixed_times_and_owners(class_folders: Path, tmp_path: Path) -> None:
    _shard(class_folders, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "crisp", "crisp", 0o444)}
    assert [m.name for m in members[:4]] == ["000000000.jpg", "000000000.cls", "000000000.json", "000000001.jpg"]


def test_plain_webdataset_reads_them(class_folders: Path, tmp_path: Path) -> None:
    manifest = _shard(class_folders, tmp_path / "out", shard_bytes=12_000)
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls", "json"))
    assert len(read) == 12
    _, index = open_shards(tmp_path / "out")
    for (image, label, about), row in zip(read, index, strict=True):
        assert label == row["label"] == manifest.classes.index(about["source"].split("/")[0])
        expected = Image.open(class_folders / about["source"]).convert("RGB")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_a_flat_folder_has_no_cls(tmp_path: Path, make_photo: Photo, to_bytes: Encode) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(3):
        (tmp_path / "flat" / f"{i}.jpg").write_bytes(to_bytes(make_photo(i)))
    manifest = _shard(tmp_path / "flat", tmp_path / "out")
    (sample, *_) = webdataset.WebDataset(str(tmp_path / "out/shard-000000.tar"), shardshuffle=False)
    assert {key for key in sample if not key.startswith("__")} == {"jpg", "json"}
    assert manifest.classes == ()
    assert open_shards(tmp_path / "out")[1]["label"].tolist() == [-1, -1, -1]


def test_dali_reads_them_through_our_index(class_folders: Path, tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    out = tmp_path / "out"
    manifest = _shard(class_folders, out, shard_bytes=12_000)

    @pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def read() -> object:
        return tuple(
            fn.readers.webdataset(
                paths=[str(out / shard.name) for shard in manifest.shards],
                index_paths=[str((out / shard.name).with_suffix(".idx")) for shard in manifest.shards],
                ext=["jpg", "cls", "json"],
            )
        )

    pipeline = read()
    pipeline.build()
    images, labels, abouts = (output.as_cpu() for output in pipeline.run())
    _, index = open_shards(out)
    for i, row in enumerate(index):
        about = json.loads(bytes(abouts.at(i)))
        assert bytes(images.at(i)) == (class_folders / about["source"]).read_bytes()
        assert int(bytes(labels.at(i))) == row["label"]


def test_dali_would_write_the_same_index(mixed: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    manifest = _shard(mixed, tmp_path / "out", shard_bytes=12_000)
    for shard in manifest.shards:
        theirs = tmp_path / "theirs.idx"
        with wds2idx.IndexCreator(str(tmp_path / "out" / shard.name), str(theirs), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "out" / shard.name).with_suffix(".idx").read_text() == theirs.read_text()


def test_a_shard_of_nothing_but_rejected_files_is_left_out(tmp_path: Path, make_photo: Photo, to_bytes: Encode) -> None:
    source = tmp_path / "source"
    source.mkdir()
    good = to_bytes(make_photo(0))
    for name, data in (("1.jpg", good), ("2.jpg", good[:-10]), ("3.jpg", good)):
        (source / name).write_bytes(data)
    manifest = _shard(source, tmp_path / "out", shard_bytes=1)
    # What a shard is called depends on the plan alone, so that it can be made before the others are known.
    assert [shard.name for shard in manifest.shards] == ["shard-000000.tar", "shard-000002.tar"]
    index = open_shards(tmp_path / "out")[1]
    assert index["shard"].tolist() == [0, 1]
    with tarfile.open(tmp_path / "out" / "shard-000002.tar") as tar:
        assert tar.getnames()[0] == "000000002.jpg"  # the key is the place in the source, whatever came before
    before = _bytes(tmp_path / "out")
    assert _shard(source, tmp_path / "out", shard_bytes=1) == manifest
    assert _bytes(tmp_path / "out") == before


def test_shards_stay_within_their_size(class_folders: Path, tmp_path: Path) -> None:
    manifest = _shard(class_folders, tmp_path / "out", shard_bytes=15_000)
    end_of_tar = 10_240  # tar pads to records of this size
    assert all(shard.bytes < 15_000 + end_of_tar for shard in manifest.shards)
    assert len(manifest.shards) < 12


def test_strict_stops_and_finished_shards_are_kept(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"list.csv: beside the class folders; mend or remove it"):
        _shard(mixed, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    (mixed / "list.csv").unlink()
    (mixed / "a b/notes.txt").unlink()
    with pytest.raises(CrispError, match=r"n01/cut.JPEG: damaged or unusual JPEG: Premature end.*; mend or remove it"):
        _shard(mixed, tmp_path / "out", strict=True, shard_bytes=12_000)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert not list((tmp_path / "out").rglob("*.partial"))
    # Without --strict, the same folder goes on.
    assert _shard(mixed, tmp_path / "out", shard_bytes=12_000) == _shard(mixed, tmp_path / "whole", shard_bytes=12_000)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_nothing_taken(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.txt").write_text("hello")
    with pytest.raises(CrispError, match=r"none of the 1 files could be taken \(a.txt: not JPEG"):
        _shard(tmp_path / "source", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [".incomplete"]


def test_an_output_in_use_is_never_touched(class_folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = _shard(class_folders, out)
    before = _bytes(out)
    assert _shard(class_folders, out) == manifest  # the same again: nothing to do
    with pytest.raises(CrispError, match=r"out: holds shards that were made from something else \(max_pixels was"):
        _shard(class_folders, out, max_pixels=1000)
    (class_folders / "n01" / "more.JPEG").write_bytes(b"x")
    with pytest.raises(
        CrispError, match=r"made from something else \(files was 12, is 13, source was .*choose another"
    ):
        _shard(class_folders, out)
    (class_folders / "n01" / "more.JPEG").unlink()
    assert _bytes(out) == before
    (out / "manifest.json").unlink()
    with pytest.raises(CrispError, match=r"not empty \(index.npy\), and no manifest.json in it; choose another folder"):
        _shard(class_folders, out)
    before.pop("manifest.json")
    assert _bytes(out) == before


def test_an_output_inside_the_source_is_refused(class_folders: Path) -> None:
    for out in (class_folders, class_folders / "shards"):
        with pytest.raises(CrispError, match="lies in the source"):
            _shard(class_folders, out)
    assert not (class_folders / "shards").exists()


def test_an_output_that_cannot_be_made(class_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CrispError, match=r"file/out: Not a directory; mend that"):
        _shard(class_folders, tmp_path / "file" / "out")


def test_a_disk_that_fills_up_leaves_nothing_half_written(class_folders: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
        with pytest.raises(CrispError, match=r"shard-000000.tar: File too large; mend that and start again"):
            _shard(class_folders, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "out") == [".incomplete"]
    _shard(class_folders, tmp_path / "out")
    _shard(class_folders, tmp_path / "whole")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_a_file_that_cannot_be_read_stops_the_run(class_folders: Path, tmp_path: Path) -> None:
    # What cannot be read now may be readable later: it is no verdict on the image. (root may read anything, so the
    # file turns into a folder behind the listing's back.)
    victim = class_folders / "n01" / "Bild 1 ß.x.JPEG"
    data = victim.read_bytes()
    options = {"shuffle": "no", "workers": 1, "shard_bytes": 12_000}
    cfg = ShardConfig(source=str(class_folders), out=str(tmp_path / "out"), **options)

    def vanish(progress: Progress) -> None:
        if victim.is_file():
            victim.unlink()
            victim.mkdir()

    with pytest.raises(
        CrispError, match=r"Bild 1 ß.x.JPEG: Is a directory; mend that and start again, finished shards"
    ):
        shard_imagenet(cfg, on_progress=vanish)
    victim.rmdir()
    victim.write_bytes(data)
    assert not list((tmp_path / "out").rglob("*.partial"))
    _shard(class_folders, tmp_path / "out", **options)
    _shard(class_folders, tmp_path / "whole", **options)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_a_source_that_vanishes_and_one_that_changes(class_folders: Path, tmp_path: Path) -> None:
    cfg = ShardConfig(source=str(class_folders), out=str(tmp_path / "out"), workers=1)
    gone = tmp_path / "gone"

    def vanish(progress: Progress) -> None:
        if class_folders.exists():
            class_folders.rename(gone)

    with pytest.raises(CrispError, match="No such file or directory; mend that and start again"):
        shard_imagenet(cfg, on_progress=vanish)
    gone.rename(class_folders)

    def grow(progress: Progress) -> None:
        for path in class_folders.glob("*/*"):
            path.write_bytes(path.read_bytes() + b"x")

    with pytest.raises(CrispError, match="when it was listed: it was changed; mend that"):
        shard_imagenet(cfg, on_progress=grow)
    assert os.listdir(tmp_path / "out") == [".incomplete"]


def test_bad_numbers_are_refused() -> None:
    for option in ("shard_bytes", "max_pixels", "shard_samples", "short_side"):
        with pytest.raises(CrispError, match=f"{option}=0: must be 1 or more"):
            ShardConfig(source="a", out="b", **{option: 0})
    for option, value in (("workers", -1), ("seed", -1), ("quality", 0), ("quality", 101)):
        with pytest.raises(CrispError, match=f"{option}={value}: must be "):
            ShardConfig(source="a", out="b", **{option: value})
    with pytest.raises(CrispError, match="max_pixels=178956971: must be 178956970 or less"):
        ShardConfig(source="a", out="b", max_pixels=178_956_971)
    assert 2 * Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    for partition in ("", "1", "2/2", "a/b", "-1/2", "0/0"):
        with pytest.raises(CrispError, match="must be i/n with i from 0 to n-1"):
            ShardConfig(source="a", out="b", partition=partition)


def test_command_line_takes_source_and_out_by_position() -> None:
    assert tyro.cli(ShardConfig, args=["a", "b", "--workers", "2"]) == ShardConfig(source="a", out="b", workers=2)


def test_progress_counts_every_file(mixed: Path, tmp_path: Path) -> None:
    calls: list[Progress] = []
    cfg = ShardConfig(source=str(mixed), out=str(tmp_path / "out"), shard_bytes=12_000, workers=1)
    shard_imagenet(cfg, on_progress=calls.append)
    assert [call.files for call in calls] == [*range(1, 18), 17]  # all but list.csv, which was not opened
    assert {(call.split, call.files_in_all) for call in calls} == {("", 17)}


def test_closing_table(mixed: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    main(ShardConfig(source=str(mixed), out=str(tmp_path / "out")), console=console)
    text = console.file.getvalue()
    rows = dict([cell.strip() for cell in line.split("│")[1:3]] for line in text.splitlines() if line.startswith("│"))
    assert {key: rows[key] for key in ("samples", "classes", "shards", "rejected")} == {
        "samples": "14",
        "classes": "3",
        "shards": "1",
        "rejected": "4",
    }
    assert {key: value for key, value in rows.items() if value == "1" and key != "shards"} == {
        "not JPEG, PNG or WebP": "1",
        "beside the class folders": "1",
        "damaged or unusual JPEG": "1",
        "empty": "1",
    }
    assert rows["rate"].endswith("files/s")
    assert max(map(len, text.splitlines())) <= 80


def test_a_path_that_looks_like_markup_is_shown_as_it_is(class_folders: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    main(ShardConfig(source=str(class_folders), out=str(tmp_path / "[red]out[/]")), console=console)
    assert "[red]out[/]" in console.file.getvalue()


def test_torch_is_not_imported(class_folders: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from crisp.shard_imagenet import ShardConfig, shard_imagenet\n"
        "shard_imagenet(ShardConfig(source=sys.argv[1], out=sys.argv[2], workers=1))\n"
        "sys.exit(next((f'{m} was imported' for m in ('torch', 'webdataset') if m in sys.modules), 0))"
    )
    command = [sys.executable, "-c", code, str(class_folders), str(tmp_path / "out")]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize(("folder", "samples"), [("imagenette/val", 500), ("imagenet-samples", 333)])
def test_real_images_are_all_taken(folder: str, samples: int, tmp_path: Path) -> None:
    data = os.environ.get("CRISP_TEST_DATA")
    if data is None:
        pytest.skip("CRISP_TEST_DATA is not set")
    manifest = _shard(Path(data) / folder, tmp_path / "out")
    assert (manifest.samples, manifest.rejected) == (samples, 0)
