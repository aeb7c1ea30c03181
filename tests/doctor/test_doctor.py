"""The doctor's own checks, on this machine: what runs without a GPU passes."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crisp.cli import main
from crisp.doctor.registry import CHECKS
from tests.doctor.conftest import Examined, check, examined

NAMES = [each.name for each in CHECKS]
BROKEN = "tests.doctor.broken:"


def statuses(found: Examined) -> dict[str, str]:
    lines = json.loads(found.report.with_suffix(".json").read_text())["lines"]
    return {line["name"]: line["status"] for line in lines}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examined]:
    return examined(tmp_path_factory.mktemp("doctor"), quick=True, device="cpu")


def test_every_quick_check_passes_here(quick: Examined) -> None:
    assert quick.error is None, quick.said
    wanted = {each.name: "pass" if each.quick and not each.gpus else "skipped" for each in CHECKS}
    assert statuses(quick) == wanted | {"GPU": "skipped"}


def test_what_is_skipped_says_why(quick: Examined) -> None:
    assert "skip GPU steps        left out by --device cpu" in quick.said
    assert "skip resume           left out by --quick" in quick.said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_reason_is_that(tmp_path: Path) -> None:
    found = examined(tmp_path, [check(f"{BROKEN}fine", gpus=1), check(f"{BROKEN}fine", name="GPU")])
    assert "skip fine             no CUDA device" in found.said
    gpu = next(each for each in CHECKS if each.name == "GPU")
    asked = examined(tmp_path, [gpu], device="cuda")
    assert "FAIL GPU              torch sees no GPU: " in asked.said
    assert "remedy: install the torch that fits the driver" in asked.said


def test_lines_fit_80_columns_and_a_log_file(quick: Examined) -> None:
    *lines, last = quick.said.splitlines()
    assert last.endswith(f"report: {quick.report} and {quick.report.with_suffix('.json')}")
    assert max(map(len, lines)) <= 80
    assert not re.search(r"[\x1b\r]| $", quick.said, re.MULTILINE)


def test_the_report_is_for_people_and_programs(quick: Examined) -> None:
    text, content = quick.report.read_text(), json.loads(quick.report.with_suffix(".json").read_text())
    assert content["options"] == " --quick --device cpu"
    assert text.startswith("# crisp doctor\n")
    for title in ("Machine", "Packages", "Extras"):
        assert f"## {title}" in text
    assert content["facts"]["Packages"]["torch"] in text
    assert set(content["facts"]["Machine"]) >= {"Python", "processor", "memory", "shared memory", "open files", "torch"}
    assert [line["name"] for line in content["lines"]] == NAMES
    assert not list(quick.report.parent.glob(".*")), "scratch files were left"


def test_the_register_is_in_order_and_complete() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for place, each in enumerate(CHECKS):
        assert set(each.needs) <= set(NAMES[:place]), each.name
        module, _, function = each.run.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert len(each.name) <= 16
        assert each.remedy
        assert each.proves
        if each.quick:
            assert all(other.quick for other in CHECKS if other.name in each.needs), each.name
    groups = [each.group for each in CHECKS]
    assert groups == sorted(groups, key=groups.index), "a group is in two places"


def test_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import crisp.doctor.command

    for run, status in (("fine", 0), ("exits", 1)):
        monkeypatch.setattr(crisp.doctor.command, "CHECKS", (check(BROKEN + run),))
        assert main(["doctor", "--out", str(tmp_path / "report.md"), "--device", "cpu"]) == status
        captured = capsys.readouterr()
        assert f"report: {tmp_path / 'report.md'}" in captured.out
        assert captured.err.count("\n") == status
    assert "1 of 1 checks failed (exits); remedies are above and in " in captured.err


@pytest.mark.slow
def test_every_check_passes_here(tmp_path: Path) -> None:
    found = examined(tmp_path, device="cpu")
    assert found.error is None, found.said
    assert statuses(found) == {each.name: "skipped" if each.gpus or each.name == "GPU" else "pass" for each in CHECKS}
    values = {line["name"]: line["values"] for line in json.loads((tmp_path / "report.json").read_text())["lines"]}
    speeds = values["loader speed"]["samples_per_s"], values["step speed"]["images_per_s"]
    assert values["headroom"]["ratio"] == pytest.approx(speeds[0] / speeds[1])
