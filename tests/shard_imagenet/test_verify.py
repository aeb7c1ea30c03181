import dataclasses
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from crisp import cli, shard_format
from crisp.errors import CrispError
from crisp.shard_format import Codec, ShardInfo, open_shards
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.shard_imagenet.examine import Sample
from crisp.shard_imagenet.folder import Begun, begin, complete
from crisp.shard_imagenet.listing import Entry
from crisp.shard_imagenet.verify import Problem, Progress, VerifyConfig, main, verify_shards
from crisp.shard_imagenet.work import Record, write_record
from crisp.shard_imagenet.writer import write_shard
from crisp.storage import Location

Damage = Callable[[Path], None]


def _shard(source: Path, out: Path) -> None:
    shard_imagenet(ShardConfig(source=str(source), out=str(out), shard_bytes=15_000, workers=1))


def _verify(out: Path) -> list[Problem]:
    return verify_shards(Location.of(out), workers=1)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def out(class_folders: Path, tmp_path: Path) -> Path:
    """Twelve samples in three shards, and two files that were rejected."""
    for name in ("list.csv", "notes"):
        (class_folders / name).write_bytes(b"")
    _shard(class_folders, tmp_path / "out")
    manifest, _ = open_shards(tmp_path / "out")
    assert len(manifest.shards) == 3
    assert manifest.rejected == 2
    return tmp_path / "out"


def _flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def _in_row(row: int, column: str) -> Damage:
    """One bit of a value in index.npy."""

    def damage(out: Path) -> None:
        rows = np.load(out / "index.npy", mmap_mode="r+")
        rows[column][row] ^= 1
        rows.flush()

    return damage


def _edit_manifest(out: Path, **values: object) -> None:
    """As somebody does who knows of its checksum."""
    path = out / "manifest.json"
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps(changed | {"checksum": shard_format._checksum(changed)}))


def _one_shard(name: str) -> dict[str, list[object]]:
    return {"name": [name], "samples": [12], "bytes": [1], "checksum": [1]}


def test_a_whole_folder_has_no_problem(out: Path) -> None:
    seen: list[Progress] = []
    before = _bytes(out)
    assert verify_shards(Location.of(out), workers=2, on_progress=seen.append) == []
    size = sum(len(data) for name, data in before.items() if name.endswith(".tar"))
    assert seen[-1] == Progress(bytes=size, bytes_in_all=size, samples=12, shards=3)
    assert _bytes(out) == before


def test_png_webp_no_labels_and_gaps_are_whole(tmp_path: Path, make_photo: Callable, to_bytes: Callable) -> None:
    source, out = tmp_path / "flat", tmp_path / "out"
    source.mkdir()
    for i, codec in enumerate(("JPEG", "PNG", "WEBP")):
        (source / f"{i}.jpg").write_bytes(to_bytes(make_photo(i), codec))
        (source / f"{i}.x.jpg").write_bytes(b"not an image")
    (source / "\udcff.jpg").write_bytes(to_bytes(make_photo(9)))  # not UTF-8
    shard_imagenet(ShardConfig(source=str(source), out=str(out), shard_samples=1, workers=1))
    manifest, index = open_shards(out)
    names = [info.name for info in manifest.shards]
    assert names != [f"shard-{i:06d}.tar" for i in range(len(names))], "no gap in the names"
    assert set(index["codec"].tolist()) == {1, 2, 3}
    assert set(index["label"].tolist()) == {-1}
    assert _verify(out) == []


# --- damage, what is said of it, and the remedy -----------------------------------------------------------------------


def _remade(name: str) -> Callable[[Path, Path], None]:
    """What 'remove it and run the crisp shard that made the folder again' says."""

    def mend(source: Path, out: Path) -> None:
        (out / name).unlink(missing_ok=True)
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.stem != name[:12]}
        _shard(source, out)
        assert {path: path.stat().st_mtime_ns for path in kept} == kept, "another shard was made again, too"

    return mend


def _all_remade(source: Path, out: Path) -> None:
    """What 'remove OUT and run the crisp shard that made it again' says."""
    shutil.rmtree(out)
    _shard(source, out)


def _cut(name: str, size: int) -> Damage:
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:size])


def _removed(name: str) -> Damage:
    return lambda out: (out / name).unlink()


def _flipped(name: str, at: int, bit: int = 1) -> Damage:
    return lambda out: _flip(out / name, at, bit)


def _written(name: str, data: bytes) -> Damage:
    return lambda out: (out / name).write_bytes(data)


def _begun_again(out: Path) -> None:
    (out / ".incomplete").mkdir()
    (out / ".incomplete/plan.json").write_bytes(b"{}")


ONLY_THAT = "run the 'crisp shard' that made the folder again: only that shard is made again"
ALL = "restore it from a copy; without one, remove {out} and run the 'crisp shard' that made it again"
TAR = "shard-000001.tar"
SAMPLE = "sample 000000000 (row 4, a b/Bild 0 ß.x.JPEG)"


@pytest.mark.parametrize(
    ("damage", "what", "remedy", "mend"),
    [
        pytest.param(_removed(TAR), f"{TAR}: missing", ONLY_THAT, _remade(TAR), id="no tar"),
        pytest.param(
            _cut(TAR, 5000), f"{TAR}: 5,000 bytes in place of 20,480: sample 000000003 (row 5): the tar ends there",
            f"remove it and {ONLY_THAT}", _remade(TAR), id="cut tar",
        ),
        pytest.param(
            _flipped(TAR, 700), f"{TAR}: damaged: {SAMPLE}: its image", f"remove it and {ONLY_THAT}", _remade(TAR),
            id="image",
        ),
        pytest.param(
            _written(TAR, b""), f"{TAR}: 0 bytes in place of 20,480: row 4 of index.npy: the tar ends there",
            f"remove it and {ONLY_THAT}", _remade(TAR), id="empty tar",
        ),
        pytest.param(
            _removed("shard-000001.idx"), "shard-000001.idx: missing", ONLY_THAT, _remade("shard-000001.idx"),
            id="no idx",
        ),
        pytest.param(
            _flipped("shard-000001.idx", 20), f"shard-000001.idx: not the index of {TAR}", f"remove it and {ONLY_THAT}",
            _remade("shard-000001.idx"), id="idx",
        ),
        pytest.param(_removed("index.npy"), "index.npy: missing", ALL, _all_remade, id="no index"),
        pytest.param(
            _cut("index.npy", 300), "index.npy: 300 bytes, where 12 samples take ", ALL, _all_remade, id="cut index"
        ),
        pytest.param(
            _flipped("index.npy", 30), "index.npy: its header is not that of 12 rows of 33 bytes", ALL, _all_remade,
            id="index's header",
        ),
        *(
            pytest.param(
                _in_row(4, column), f"index.npy: {said}", ALL, _all_remade,
                id=f"index's {column}",
            )
            for column, said in {
                "offset": f"{SAMPLE}: offset 513 (in the tar 512)",
                "length": f"{SAMPLE}: length {{other_length}} (in the tar {{length}})",
                "shard": "row 4: shard 0, but it is in shard-000001.tar, number 1",
                "height": f"{SAMPLE}: height 41 (in the tar 40)",
                "width": f"{SAMPLE}: width 61 (in the tar 60)",
                "label": f"{SAMPLE}: label 1 (in the tar 0)",
                "checksum": f"{SAMPLE}: checksum {{other_checksum}} (in the tar {{checksum}})",
                "codec": f"{SAMPLE}: codec 0 (in the tar 1)",
            }.items()
        ),
        pytest.param(_removed("manifest.json"), "manifest.json: missing", ALL, _all_remade, id="no manifest"),
        pytest.param(
            _written("manifest.json", b"{"), "manifest.json: not a manifest (", ALL, _all_remade, id="no JSON"
        ),
        pytest.param(
            lambda out: _edit_manifest(out, version=1), "manifest.json: format version 1, this crisp reads 2", ALL,
            _all_remade, id="version",
        ),
        pytest.param(
            lambda out: _edit_manifest(out, samples=13), "manifest.json: 13 samples, but 12 in its shards", ALL,
            _all_remade, id="samples",
        ),
        pytest.param(
            lambda out: _edit_manifest(out, samples="12"), "manifest.json: a count, size or checksum in it is not a",
            ALL, _all_remade, id="no number",
        ),
        pytest.param(
            lambda out: _edit_manifest(out, classes=["a", "b", "a"]), "manifest.json: two of its classes have the same",
            ALL, _all_remade, id="classes",
        ),
        pytest.param(
            lambda out: _edit_manifest(out, classes=["a", "b"]), "index.npy: row ", ALL, _all_remade,
            id="label without class",
        ),
        pytest.param(
            lambda out: _edit_manifest(out, index_fingerprint=""), "index.npy: its fingerprint is not the manifest's",
            ALL, _all_remade, id="fingerprint",
        ),
        pytest.param(
            lambda out: _edit_manifest(out, shards=_one_shard("shard-100000.tar")),
            "manifest.json: a shard in it is not one of those that were planned (3)", ALL, _all_remade,
            id="shard's name",
        ),
        pytest.param(
            lambda out: _edit_manifest(out, shards=_one_shard("../x.tar")),
            "manifest.json: the names of its shards are not those of shards in order", ALL, _all_remade,
            id="foreign name",
        ),
        pytest.param(
            lambda out: _edit_manifest(out, rejected=3),
            "rejected.jsonl: 2 lines, the manifest says 3 were rejected", ALL, _all_remade, id="rejected",
        ),
        pytest.param(
            _flipped("rejected.jsonl", 0), "rejected.jsonl: line 1 is not a source with a reason", ALL, _all_remade,
            id="rejected.jsonl",
        ),
        pytest.param(_removed("rejected.jsonl"), "rejected.jsonl: missing", ALL, _all_remade, id="no rejected.jsonl"),
        pytest.param(
            _written("shard-000007.tar", b"x"), "shard-000007.tar: not in the manifest", "remove it",
            lambda source, out: (out / "shard-000007.tar").unlink(), id="stray tar",
        ),
        pytest.param(
            _written(f"{TAR}.partial", b"x"), f"{TAR}.partial: left by a run that was stopped",
            "remove it, unless a run is writing it now", lambda source, out: (out / f"{TAR}.partial").unlink(),
            id="partial",
        ),
        pytest.param(
            _begun_again, ".incomplete: a run that mends the folder is begun, not complete",
            "run that 'crisp shard' again", lambda source, out: _shard(source, out), id="mending begun",
        ),
    ],
)  # fmt: skip
def test_damage_is_named_and_the_remedy_mends_it(
    class_folders: Path, out: Path, damage: Damage, what: str, remedy: str, mend: Callable[[Path, Path], None]
) -> None:
    before = _bytes(out)
    row = open_shards(out)[1][4]
    length, checksum = int(row["length"]), int(row["checksum"])
    values = {"out": out, "length": length, "checksum": checksum}
    values |= {"other_length": length ^ 1, "other_checksum": checksum ^ 1}
    damage(out)
    (problem,) = _verify(out)
    assert problem.what.startswith(what.format(**values))
    assert problem.remedy == remedy.format(**values)
    mend(class_folders, out)
    assert _verify(out) == []
    assert _bytes(out) == before


def test_every_byte_of_a_tar_is_checked(out: Path) -> None:
    """Wherever a bit flips: one problem, which names the shard, and the sample unless it is beyond the last."""
    path = out / TAR
    data, sources, regions = path.read_bytes(), set(), set()
    for at in range(0, len(data), 97):
        _flip(path, at, 1 << at % 8)
        (problem,) = _verify(out)
        path.write_bytes(data)
        assert problem.what.startswith(f"{TAR}: ")
        assert problem.remedy.startswith("remove it and run")
        if "though images" in problem.what:  # in a source's name
            continue
        region = problem.what.rpartition(": ")[2]
        regions.add(region)
        if region != "what is there is not zero":
            assert "sample 0000000" in problem.what
            sources.add(problem.what.partition("(")[2].partition(")")[0].partition(", ")[2])
    assert regions == {
        "its image", "its .json", "what is there is not zero",
        *(f"the header of its {member}" for member in ("image", ".cls", ".json")),
        *(f"the padding after its {member}" for member in (".jpg", ".cls", ".json")),
    }  # fmt: skip
    assert len(sources - {""}) == 4


def test_a_label_that_flips_is_named(out: Path) -> None:
    data = (out / TAR).read_bytes()
    at = data.index(b"000000000.cls") + 512
    _flip(out / TAR, at)
    assert [problem.what for problem in _verify(out)] == [f"{TAR}: damaged: {SAMPLE}: its label"]


def test_a_name_that_flips_is_noticed(class_folders: Path, out: Path) -> None:
    before = _bytes(out)
    _flip(out / TAR, before[TAR].index(b"Bild 0"))
    (problem,) = _verify(out)
    assert problem.what == f"{TAR}: its CRC-32 is not the manifest's, though images, labels and headers in it are right"
    assert problem.remedy.startswith(f"remove it and {ONLY_THAT}")
    _remade(TAR)(class_folders, out)
    assert _bytes(out) == before


def test_every_byte_of_the_manifest_is_checked(out: Path) -> None:
    whole = (out / "manifest.json").read_bytes()
    for at in range(0, len(whole) - 1, 7):  # without the newline at its end
        (out / "manifest.json").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert len(_verify(out)) == 1, at


def test_many_damaged_samples_are_one_problem(out: Path) -> None:
    data = bytearray((out / TAR).read_bytes())
    data[600:9000] = bytes(8400)
    (out / TAR).write_bytes(data)
    (problem,) = _verify(out)
    assert problem.what.startswith(f"{TAR}: damaged: sample 000000000 (row 4): its image, ")
    assert problem.what.endswith("; and 2 more")


def test_bytes_after_the_end(out: Path) -> None:
    with (out / TAR).open("ab") as file:
        file.write(bytes(512))
    assert _verify(out)[0].what == f"{TAR}: 20,992 bytes in place of 20,480: after its last sample: its length"


def _write(out: Path, shards: list[list[Sample]]) -> None:
    """A complete folder of these samples, whatever they are."""
    folder = Location.of(out)
    begin(folder, Begun(shards=len(shards), made_from={"shards": len(shards)}, classes=("a",), rejections=()))
    for number, samples in enumerate(shards):

        def record(info: ShardInfo | None, rows: NDArray[np.void], number: int = number) -> None:
            write_record(folder, number, Record(info, rows, []))

        write_shard(folder, number, samples, before_naming=record)
    complete(folder)


def _sample(number: int, data: bytes = b"\xff\xd8\xff", label: int = 0) -> Sample:
    entry = Entry(number, f"{number}.jpg", label, 0, 0, len(data))
    return Sample(entry=entry, data=data, codec=Codec.JPEG, height=1, width=1, checksum=zlib.crc32(data))


def test_two_samples_with_one_key(tmp_path: Path) -> None:
    _write(tmp_path, [[_sample(0), _sample(1)], [_sample(1), _sample(2)]])
    assert _verify(tmp_path) == [
        Problem(
            "sample 000000001: more than one has this key",
            f"remove {tmp_path} and run the 'crisp shard' that made it again",
        )
    ]


def test_a_tar_that_was_written_wrongly(tmp_path: Path) -> None:
    """Its checksum says nothing then."""
    _write(tmp_path, [[_sample(0), _sample(1, b"\x89PNG\r\n\x1a\n")], [_sample(2)]])
    (problem,) = _verify(tmp_path)
    assert problem.what == (
        "shard-000000.tar: not as crisp writes it, though its CRC-32 is the manifest's: "
        "sample 000000001 (row 1, 1.jpg): the extension of its image"
    )
    assert problem.remedy == f"remove {tmp_path} and run the 'crisp shard' that made it again"


def test_a_label_without_a_class(tmp_path: Path) -> None:
    _write(tmp_path, [[_sample(0), _sample(1, label=1)]])
    assert [problem.what for problem in _verify(tmp_path)] == ["index.npy: row 1: label 1, of 1 classes"]


def test_names_are_printed_safely(tmp_path: Path) -> None:
    sample = _sample(0)
    _write(tmp_path, [[dataclasses.replace(sample, entry=sample.entry._replace(name="a\n\udcff[red]"))]])
    _flip(tmp_path / "shard-000000.tar", 512)
    assert "(row 0, a\\n\\udcff[red]): its image" in _verify(tmp_path)[0].what
    assert cli.main(["shard", "verify", str(tmp_path)]) == 1


def test_an_unreadable_tar(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Location.open

    def failing(self: Location) -> object:
        if self.name == TAR:
            raise OSError(5, "Input/output error", str(self))
        return whole(self)

    monkeypatch.setattr(Location, "open", failing)
    (problem,) = _verify(out)
    assert problem.what == f"{TAR}: cannot be read (Input/output error)"
    assert problem.remedy == f"mend that and verify again; if it cannot be mended, remove it and {ONLY_THAT}"


def test_no_damage_stops_it(out: Path) -> None:
    """Whatever was done to a file there is an answer, and not silence where something must be seen."""
    random = np.random.default_rng(0)
    before = _bytes(out)
    for name, data in before.items():
        for _ in range(12):
            at, size = int(random.integers(len(data))), int(random.choice([1, 7, 512, 3000]))
            middle = data[at : at + size]
            kind = random.integers(4)
            changed = (b"", bytes(len(middle)), random.bytes(len(middle)), middle * 2)[kind]
            (out / name).write_bytes(data[:at] + changed + data[at + size :])
            problems = _verify(out)
            # The manifest has no checksum of its own, and rejected.jsonl none at all.
            assert problems or changed == middle or name in ("manifest.json", "rejected.jsonl"), (name, at, size, kind)
        (out / name).write_bytes(data)
    assert _verify(out) == []


def test_a_folder_that_is_begun(class_folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part in ("0/2", "1/2"):
        if part == "1/2":
            (problem,) = _verify(out)
            assert problem.what == "manifest.json: not there yet: the folder is begun, not complete"
            remedy = f"run that 'crisp shard' again; 'crisp shard merge {out}' if all of its partitions are done"
            assert problem.remedy == remedy
        shard_imagenet(
            ShardConfig(source=str(class_folders), out=str(out), shard_bytes=15_000, workers=1, partition=part)
        )
    assert _verify(out) == []


def test_a_url(out: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for path in out.iterdir():
        store.pipe_file(f"/verified/{path.name}", path.read_bytes())
    folder = Location.of("memory://verified")
    assert verify_shards(folder, workers=2) == []
    store.pipe_file(f"/verified/{TAR}", b"x")
    assert [problem.what[:21] for problem in verify_shards(folder)] == [f"{TAR}: 1 b"]
    store.rm("/verified", recursive=True)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_on_whole_shards(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shard", "verify", str(out)]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert printed.splitlines()[0] == f"verified {out}"
    values = dict(line.strip("│ ").split("│") for line in printed.splitlines() if line.startswith("│"))
    rows = {name.strip(): value.strip() for name, value in values.items()}
    assert rows["samples"] == "12"
    assert rows["shards"] == "3"
    assert rows["read"] == "61.4 kB"
    assert rows["problems"] == "none"


def test_the_command_says_what_is_wrong(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "shard-000000.tar").unlink()
    (out / "shard-000002.tar").unlink()
    _flip(out / TAR, 700)
    assert cli.main(["shard", "verify", str(out), "--workers", "2"]) == 1
    printed, errors = capsys.readouterr()
    assert errors == f"crisp shard: {out}: 3 problems; above is what mends each\n"
    assert printed.splitlines()[:6] == [
        f"wrong in {out}:",
        "  shard-000000.tar: missing",
        "  shard-000002.tar: missing",
        f"    -> {ONLY_THAT}",
        f"  {TAR}: damaged: {SAMPLE}: its image",
        f"    -> remove it and {ONLY_THAT}",
    ]


def test_lines_fit_a_terminal(out: Path) -> None:
    _flip(out / TAR, 700)
    console = Console(width=80, force_terminal=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with pytest.raises(CrispError):
        main(VerifyConfig(out=str(out)), console=console)
    lines = console.export_text().splitlines()
    first = next(i for i, line in enumerate(lines) if TAR in line)
    assert [line.rstrip() for line in lines[first : first + 4]] == [
        f"  {TAR}: damaged: sample 000000000 (row 4, a b/Bild 0 ß.x.JPEG): its",
        "  image",
        "    -> remove it and run the 'crisp shard' that made the folder again: only that",
        "    shard is made again",
    ]


def test_train_and_val(class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "both", tmp_path / "out"
    shutil.copytree(class_folders, source / "train")
    shutil.copytree(class_folders, source / "val")
    _shard(source, out)
    assert cli.main(["shard", "verify", str(out)]) == 0
    assert "24" in capsys.readouterr()[0]
    before = _bytes(out / "val")
    _flip(out / "val" / TAR, 700)
    (out / "train/manifest.json").unlink()
    assert cli.main(["shard", "verify", str(out)]) == 1
    printed, errors = capsys.readouterr()
    assert f"wrong in {out}/train:\n  manifest.json: missing\n" in printed
    assert f"wrong in {out}/val:\n  {TAR}: damaged: sample" in printed
    assert f"{out}: 2 problems" in errors
    (out / "val" / TAR).unlink()
    shutil.rmtree(out / "train")
    _shard(source, out)
    assert cli.main(["shard", "verify", str(out)]) == 0
    assert _bytes(out / "val") == before


def test_at_most_fifty_lines(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(60):
        (out / f"{i:02d}.partial").write_bytes(b"")
    assert cli.main(["shard", "verify", str(out)]) == 1
    printed, errors = capsys.readouterr()
    assert printed.count(".partial: left by") == 50
    assert "  and 10 more\n" in printed
    assert "60 problems" in errors


@pytest.mark.parametrize("name", ["missing", "."])
def test_no_shards_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(CrispError, match=r"no shards in it; write some with 'crisp shard SOURCE"):
        main(VerifyConfig(out=str(tmp_path / name)))


def test_workers_are_not_negative() -> None:
    with pytest.raises(CrispError, match="workers=-1: must be 0"):
        VerifyConfig(out="x", workers=-1)
