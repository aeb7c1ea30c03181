"""The sharding benchmark on a handful of images: that it measures what it says, not how fast anything is."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from crisp.benchmarks import shard
from crisp.benchmarks.peers.shard_decoders import DECODERS, STRICT_CHECK, decode_all
from crisp.benchmarks.shard import (
    PEERS,
    Measured,
    Result,
    ShardBenchConfig,
    bench_shard,
    in_fresh_process,
    main,
    make_claims,
    prepare_images,
    tables,
)
from crisp.benchmarks.shard_manifest import (
    ManifestResult,
    ManifestTurn,
    summarise_manifest,
    take_manifest_turn,
    write_manifest,
)
from crisp.errors import CrispError
from crisp.shard_format import MANIFEST_FILE


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve JPEGs, of which one is not larger than the short side."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(12):
        small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        size = (240, 200) if i == 5 else (480, 360)
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.JPEG", quality=95)
    return folder


def peer(script: str, images: Path, out: Path, python: str = sys.executable) -> dict[str, float]:
    options = ("--workers", "2", "--short-side", "256", "--quality", "90")
    file = Path(shard.__file__).parent / "peers" / script
    done = subprocess.run([python, file, images, out, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.slow
def test_everybody_takes_turns(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "DECODERS", {name: DECODERS[name] for name in ("simplejpeg", STRICT_CHECK)})
    file = tmp_path / "results.json"
    options = "--rounds 1 --workers 2 --copies 2"
    main(["--images", str(images), "--json", str(file), *options.split()])
    written = json.loads(file.read_text())
    found = {(result["section"], result["name"]): result for result in written["results"]}
    assert set(written["skipped"]) == {"litdata", "MDS"}, "they have no interpreter here"
    assert set(found) == {("untouched", name) for name in ("crisp", "simplejpeg", STRICT_CHECK)} | {
        ("re-encode", name) for name in ("crisp", "PIL+webdataset")
    }
    for result in found.values():
        assert 0 < result["slowest"] <= result["images_per_s"] <= result["fastest"]
        assert result["cpu_ms_per_image"] > 0
        assert len(result["rounds"]) == 1
    smaller, untouched = found["re-encode", "crisp"], found["untouched", "crisp"]
    assert smaller["kb_per_image"] < untouched["kb_per_image"]
    assert untouched["peak_rss_mb"] > 10
    assert written["images"] == 24
    assert written["manifest"]["samples"] == 142_000_000
    assert written["config"]["copies"] == 2
    assert "cores" in written["hardware"]
    text = " ".join(capsys.readouterr().out.split())
    assert "PIL+webdataset" in text
    assert "litdata: left out" in text


def test_images_are_linked_into_class_folders(images: Path, tmp_path: Path) -> None:
    files = prepare_images(ShardBenchConfig(images=images, copies=3), tmp_path / "prepared")
    assert len(set(files)) == 36
    assert len({Path(file).stat().st_ino for file in files}) == 12
    assert {Path(file).parent.name for file in files} == {"class-0000", "class-0001", "class-0002"}


def test_the_usual_script_writes_what_webdataset_reads(images: Path, tmp_path: Path) -> None:
    files = prepare_images(ShardBenchConfig(images=images, copies=2), tmp_path / "images")
    said = peer("shard_webdataset.py", tmp_path / "images", tmp_path / "out")
    assert said["images"] == 24
    assert said["seconds"] > 0
    assert said["cpu_seconds"] > 0
    members: dict[str, bytes] = {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(members) == 3 * 24
    for key in {name.partition(".")[0] for name in members}:
        about = json.loads(members[f"{key}.json"])
        with Image.open(io.BytesIO(members[f"{key}.jpg"])) as image:
            image.load()
            assert image.size == (about["width"], about["height"])
        small = about["source"].endswith("0000007.jpg")  # '5.JPEG' in the order of names
        assert min(image.size) == (200 if small else 256)
        assert members[f"{key}.cls"] == str(int(about["source"][6:10])).encode()
    assert any(Path(files[7]).read_bytes() == data for data in members.values()), "small ones keep their bytes"


@pytest.mark.parametrize("decoder", ["simplejpeg, kept", "PIL", STRICT_CHECK])
def test_decoding_alone_decodes_every_file_once(images: Path, decoder: str) -> None:
    files = [str(path) for path in images.iterdir()] * 2
    seconds, cpu_seconds = decode_all(decoder, files, workers=2)
    assert seconds > 0
    assert cpu_seconds > 0


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != STRICT_CHECK])
def test_decoders_make_the_same_pixels(images: Path, decoder: str) -> None:
    module, make = DECODERS[decoder]
    pytest.importorskip(module)
    decode = make()
    for path in sorted(images.iterdir()):
        pixels = np.asarray(decode(path.read_bytes()))
        if decoder == "torchvision":
            pixels = pixels.transpose(1, 2, 0)
        with Image.open(path) as image:
            wanted = np.asarray(image.convert("RGB")).astype(int)
        assert pixels.shape == wanted.shape
        assert np.abs(pixels - wanted).mean() < 1


@pytest.mark.slow
def test_142_million_samples_open_in_little_memory(tmp_path: Path) -> None:
    folder = tmp_path / "manifest"
    write_manifest(folder)
    turns = [in_fresh_process(take_manifest_turn, folder, cold) for cold in (True, False)]
    assert max(turn.rss_increase_mb for turn in turns) < 200
    result = summarise_manifest(folder, turns[:1], turns[1:])
    assert result.index_bytes_per_sample < 40
    assert (folder / "index.npy").stat().st_blocks * 512 < 1e6, "a hole, not 4.7 GB"
    assert len(json.loads((folder / MANIFEST_FILE).read_text())["shards"]["name"]) == 14_000


def manifest_result() -> ManifestResult:
    turn = ManifestTurn(open_ms=40, order_ms=1, order_ms_slowest=2, rss_increase_mb=80)
    return ManifestResult(
        samples=142_000_000,
        shards=14_000,
        open_ms=turn.open_ms,
        open_ms_slowest=45,
        open_cold_ms=60,
        open_cold_ms_slowest=70,
        order_ms=turn.order_ms,
        order_ms_slowest=turn.order_ms_slowest,
        rss_increase_mb=turn.rss_increase_mb,
        index_bytes_per_sample=33,
    )


def result(section: str, name: str, rounds: list[float], cpu_ms: float) -> Result:
    return Result(
        section=section,
        name=name,
        images_per_s=sorted(rounds)[len(rounds) // 2],
        slowest=min(rounds),
        fastest=max(rounds),
        rounds=rounds,
        cpu_ms_per_image=cpu_ms,
        kb_per_image=30.0 if name == "crisp" else None,
        peak_rss_mb=120.0 if name == "crisp" else None,
    )


RESULTS = [
    result("untouched", "crisp", [900, 1000, 1100], 2.0),
    result("untouched", "simplejpeg", [1200, 1250, 1100], 1.5),
    result("untouched", "PIL", [500, 500, 500], 4.0),
    result("untouched", STRICT_CHECK, [2000, 2000, 2000], 1.0),
    result("re-encode", "crisp", [600, 600, 600], 3.0),
    result("re-encode", "PIL+webdataset", [400, 400, 400], 9.0),
]


def test_claims_are_against_the_fastest_decoder() -> None:
    claims = {claim.name: claim for claim in make_claims(RESULTS, manifest_result())}
    limit = claims["untouched ÷ simplejpeg"]
    assert limit.value == pytest.approx(1000 / 1200)
    assert limit.per_round == pytest.approx(0.8)
    assert limit.by_cpu == pytest.approx(0.75)
    assert (limit.goal, limit.met) == ("≥ 0.85", False)
    assert claims[f"untouched ÷ {STRICT_CHECK}"].goal == "", "a figure, no goal"
    assert claims["re-encode ÷ PIL+webdataset"].met is False
    assert "re-encode ÷ MDS" not in claims
    assert claims["142 M samples: open, ms"].met is True
    assert claims["142 M samples: open cold, ms"].met is False


def test_tables_fit_80_columns() -> None:
    rows = [*RESULTS, *(result("re-encode", name, [12345.0], 12.34) for name in PEERS if name != "PIL+webdataset")]
    rows = [*rows, result("untouched", "simplejpeg, kept", [12345.0, 23456.0, 23456.0], 12.34)]
    long = [r for r in rows if len(r.rounds) == 3]
    measured = Measured(
        images=1_000_000,
        workers=128,
        results=rows,
        manifest=manifest_result(),
        claims=make_claims(long, manifest_result()),
        skipped={},
    )
    console = Console(width=80)
    with console.capture() as capture:
        for table in tables(measured):
            console.print(table)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "12345–23456" in text


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"copies": 0}, {"workers": -1}])
def test_wrong_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(CrispError, match=next(iter(wrong))):
        ShardBenchConfig(images=Path("x"), **wrong)  # type: ignore[arg-type]


def test_a_folder_without_jpegs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"no \.jpg"):
        bench_shard(ShardBenchConfig(images=tmp_path))


def test_a_peer_that_fails_is_named(images: Path, tmp_path: Path) -> None:
    """An interpreter that is there but has none of the requirements."""
    (tmp_path / "python").write_text("#!/bin/sh\necho No module named litdata >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(CrispError, match=r"shard_litdata\.py failed \(No module named litdata\)"):
        shard._peer_turn(tmp_path / "python", "shard_litdata.py", tmp_path, 1)
