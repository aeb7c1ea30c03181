"""The command line: help, wrong input, and the errors of each command in one line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crisp.cli import BENCHMARKS, COMMANDS, PICTURES, main


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    status = main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["-h"]):
        status, out, _ = run(capsys, *args)
        assert status == 0
        assert all(name in out for name in COMMANDS)
    assert max(map(len, out.splitlines())) <= 120


def test_commands_without_a_name_list_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for command, table in (("bench", BENCHMARKS), ("viz", PICTURES)):
        for help_ in ([], ["--help"]):
            status, out, _ = run(capsys, command, *help_)
            assert status == 0
            assert f"usage: crisp {command} NAME" in out
            assert all(f"  {name} " in out and text in out for name, text in table.items())
            assert max(map(len, out.splitlines())) <= 120
    assert "vits16" in run(capsys, "train")[1]


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go into ./runs, where an earlier `crisp demo` may have left one."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture
def shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Shards of twelve small noise images in two classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        target = tmp_path / "images" / f"class{i % 2}" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(target)
    assert main(["shard", str(tmp_path / "images"), str(tmp_path / "shards")]) == 0
    capsys.readouterr()
    return tmp_path / "shards"


def _one_line(status: int, err: str, *words: str) -> None:
    assert status == 1
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("shard", "{tmp}/nowhere", "{tmp}/out"), ("nowhere", "no such file or folder")),
        (("shard", "{tmp}/empty", "{tmp}/out"), ("empty",)),
        (("train", "vits17"), ("'vits17'", "choose one of vits16")),
        (("train", "demo"), ("data.shards", "not given")),
        (("train", "demo", "--data.shards", "{tmp}/nowhere"), ("no such folder", "crisp shard")),
        (("train", "demo", "--data.shards", "{tmp}/empty"), ("no manifest.json", "crisp shard")),
        (("train", "demo", "--optim.global-batch", "33"), ("global_batch=33", "multiple of data.parts=8")),
        (("demo", "--epochs", "0", "--out", "{tmp}/demo"), ("epochs=0",)),
        (("demo", "--seed", "-1", "--out", "{tmp}/demo"), ("seed=-1",)),
        (("train", "--resume"), ("no run given",)),
        (("train", "--resume", "{tmp}/empty"), ("no config.json",)),
        (("bench", "nothing"), ("'nothing'", "choose one of")),
        (("bench", "step", "--recipe", "vits17"), ("'vits17'", "choose one of vits16")),
        (("bench", "step", "--pairs", "0"), ("pairs=0",)),
        (("bench", "step", "--shards", "{tmp}/nowhere"), ("no such folder", "crisp shard")),
        (("bench", "feed"), ("--images", "--shards")),
        (("bench", "feed", "--shards", "{tmp}/nowhere"), ("no such folder", "crisp shard")),
        (("bench", "feed", "--images", "{tmp}/nowhere"), ("nowhere", "no such file or folder")),
        (("doctor", "--out", "{tmp}/nowhere/report.md"), ("no folder", "nowhere")),
        (("doctor", "--out", "{tmp}/report.json"), ("name a .md file",)),
        (("viz", "nothing"), ("'nothing'", "choose one of regions")),
        (("viz", "views", "--shards", "{tmp}/nowhere", "--out", "{tmp}/a.png"), ("no such folder", "crisp shard")),
        (("viz", "views", "--shards", "{tmp}/empty", "--out", "{tmp}/a.gif"), ("a.gif", ".png or .pdf")),
        (("demo", "--images", "{tmp}/empty", "--out", "{tmp}/demo"), ("0 usable photographs",)),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = run(capsys, *(a.format(tmp=tmp_path) for a in args))
    _one_line(status, err, *words)


def test_batch_larger_than_the_data(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "train", "demo", "--data.shards", shards, "--out", shards.parent / "run")
    _one_line(status, err, "global_batch=32", "12 samples")
    assert not (shards.parent / "run").exists(), "nothing is left behind"


def test_gpu_asked_for_where_there_is_none(shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = run(capsys, "train", "demo", "--data.shards", shards, "--device", "cuda")
    _one_line(status, err, "device=cuda", "--device cpu")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--sample", "0", "12", "--out", "{tmp}/a.png"), ("sample=12", "12 samples", "from 0 to 11")),
        (("--sample", "11", "--views.local-views", "0", "--out", "{tmp}/shards/index.npy/a.png"), ("a.png", "--out")),
    ],
)
def test_a_picture_that_cannot_be_drawn(
    shards: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: tuple[str, ...]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")
    rest = (a.format(tmp=shards.parent) for a in args)
    status, _, err = run(capsys, "viz", "views", "--shards", shards, *rest)
    _one_line(status, err, *words)


def test_unknown_model(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(
        capsys, "train", "demo", "--data.shards", shards, "--optim.global-batch", "8", "--model.arch", "vit_smal",
        "--out", shards.parent / "run",
    )  # fmt: skip
    _one_line(status, err.splitlines()[-1], "vit_smal")


@pytest.mark.parametrize("damage", ["index", "truncated tar", "no index"])
def test_damaged_shards(shards: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    if damage == "index":
        data = bytearray((shards / "index.npy").read_bytes())
        data[-3] ^= 1
        (shards / "index.npy").write_bytes(data)
    elif damage == "truncated tar":
        tar = next(shards.glob("*.tar"))
        tar.write_bytes(tar.read_bytes()[:-512])
    else:
        (shards / "index.npy").unlink()
    status, _, err = run(capsys, "train", "demo", "--data.shards", shards, "--optim.global-batch", "8")
    _one_line(status, err, str(shards), "again" if damage != "no index" else "crisp shard")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "trian")
    assert status == 2
    assert "'trian' is not a command" in err
