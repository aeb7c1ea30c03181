"""`crisp eval`: the list of evaluations comes fast, every name leads to a command, mistakes are one line."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from crisp.cli import EVALUATIONS, main
from crisp.evals.all import TASKS
from crisp.evals.catalogue import EVALUATIONS as CATALOGUE
from crisp.evals.config import EvalConfig
from crisp.evals.paper import COLUMNS
from tests.evals.coloured import class_folders


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_without_a_name_it_lists_what_there_is(capsys: pytest.CaptureFixture[str], args: tuple[str, ...]) -> None:
    status, out, _ = run(capsys, "eval", *args)
    assert status == 0
    assert "usage: crisp eval NAME" in out
    assert all(f"  {name} " in out and evaluation.help in out for name, evaluation in EVALUATIONS.items())
    assert max(map(len, out.splitlines())) <= 120


def test_the_list_imports_nothing_heavy() -> None:
    code = (
        "import sys; from crisp.cli import main; main(['eval']);"
        "print([name for name in ('torch', 'numpy', 'cv2', 'rich', 'tyro') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", EVALUATIONS)
def test_help_of_each(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(EVALUATIONS[name].module)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: crisp eval {name}" in out
    assert all(f"--{field}" in out for field in ("weights", "data", "out", "cache", "batch", "device", "precision"))


def test_a_wrong_name(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "eval", "knm")
    assert status == 1
    assert err.strip() == f"crisp eval: eval 'knm': there is no such evaluation; choose one of {', '.join(EVALUATIONS)}"


def test_every_task_has_a_command_and_an_entry() -> None:
    assert set(TASKS) | {"all", "region-quality"} == set(EVALUATIONS)
    assert {evaluation.task for evaluation in CATALOGUE} == set(TASKS)
    names = [evaluation.name for evaluation in CATALOGUE]
    assert len(set(names)) == len(names)


def test_every_column_of_the_paper_is_evaluated() -> None:
    entries = {(evaluation.task, evaluation.dataset) for evaluation in CATALOGUE}
    banks = ("-1pct", "-10pct")  # of ImageNet, scored by one evaluation
    for column in (column for columns in COLUMNS.values() for column in columns):
        dataset = column.dataset
        for bank in banks:
            dataset = dataset.removesuffix(bank)
        assert (column.task, dataset) in entries


@pytest.mark.parametrize("name", EVALUATIONS)
def test_no_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the data nor the weights exist: one of the two is named at once, and nothing is written."""
    status, _, err = run(
        capsys, "eval", name, "--weights", tmp_path / "nothing.pth", "--data", tmp_path / "nowhere",
        "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--device", "cpu",
    )  # fmt: skip
    assert status == 1
    (line,) = err.strip().splitlines()
    assert line.startswith("crisp eval: ")
    assert "nowhere" in line or "nothing.pth" in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_numbers_are_checked() -> None:
    from crisp.errors import CrispError

    for wrong, words in (({"batch": 0}, "batch=0"), ({"threads": -1}, "threads=-1"), ({"weights": ""}, "weights=''")):
        with pytest.raises(CrispError, match=words):
            EvalConfig(**{"weights": "a", "data": Path(), **wrong})


@pytest.mark.slow
def test_torchrun_writes_the_bytes_of_one_process(tmp_path: Path) -> None:
    """The whole command, twice: a timm model with random weights on tiny images of three classes."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=12).state_dict(), tmp_path / "tiny.pth")
    data = class_folders(tmp_path / "colours", train=8)
    weights = f"timm:vit_tiny_patch16_224@{tmp_path / 'tiny.pth'}"
    results = []
    for name, start in (("one", ["-m"]), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"])):
        subprocess.run(
            [
                sys.executable, *start, "crisp", "eval", "knn", "--weights", weights,
                "--data", data, "--out", tmp_path / name, "--cache", tmp_path / f"{name}-cache", "--device", "cpu",
                "--threads", "1", "--batch", "4", "--k", "1", "5",
            ],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        results.append((tmp_path / name / "knn-colours.json").read_bytes())
    assert results[0] == results[1]
