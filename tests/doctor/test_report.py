"""The report is whole or absent, replaces nothing but a report, and tells nothing private."""

import errno
import json
import os
from pathlib import Path

import pytest

from crisp.cli import main
from crisp.doctor.check import Answer, Line
from crisp.doctor.config import DoctorConfig
from crisp.doctor.privacy import redactor, shown_environment
from crisp.doctor.report import Report, check_place, to_markdown, write_report
from crisp.errors import CrispError
from tests.doctor.conftest import check


def a_report(text: str = "1 | 2\n3") -> Report:
    answer = Answer(status="fail", text=text, traceback="Traceback …", output="said")
    line = Line(check=check("m:broken"), answer=answer, remedy="mend it", seconds=1.25)
    return Report(options=" --quick", facts={"Machine": {"cores": "2"}}, lines=[line])


def test_a_report_is_replaced_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    for text in ("first", "second"):
        check_place(out)
        write_report(out, a_report(text))
        assert text in out.read_text()
        assert json.loads((tmp_path / "report.json").read_text())["lines"][0]["text"] == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_tables_hold_whatever_is_found() -> None:
    text = to_markdown(a_report())
    assert "| fail | broken | 1 \\| 2<br>3 | a test | 1.2 |" in text
    assert "- remedy: mend it" in text
    assert "```\nTraceback …\n```" in text


@pytest.mark.parametrize("taken", ["report.md", "report.json"])
def test_another_file_is_not_replaced(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("# My thesis\n")
    with pytest.raises(CrispError, match=rf"{taken}: there already, and no report of crisp doctor"):
        check_place(tmp_path / "report.md")


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"no folder .*nowhere; name a file in a folder that exists"):
        check_place(tmp_path / "nowhere" / "report.md")
    with pytest.raises(CrispError, match="its JSON is written beside it"):
        DoctorConfig(out=tmp_path / "report.json")


@pytest.mark.parametrize("failing", [1, 2])
def test_on_a_full_disk_the_report_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    out = tmp_path / "report.md"
    write_report(out, a_report("before"))
    calls, fsync = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CrispError, match=r"cannot be written \(No space left on device\); make room"):
        write_report(out, a_report("after"))
    assert "before" in out.read_text()
    assert "before" in (tmp_path / "report.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_no_room_for_scratch_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(prefix: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/crisp-doctor-x")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    assert main(["doctor", "--out", str(tmp_path / "report.md")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be made (No space left on device); make room, or set TMPDIR" in said


def test_secrets_names_and_folders_are_taken_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "grace"))
    monkeypatch.setattr("socket.gethostname", lambda: "node17.cluster")
    environment = {"WANDB_API_KEY": "abcdef0123456789", "USER": "grace", "PASSWORD": "x", "MY_SECRET": "s3cret-value"}
    redact = redactor(environment)
    assert redact(f"{tmp_path}/grace/runs/a") == "~/runs/a"
    assert redact("key=abcdef0123456789 s3cret-value") == "key=<secret> <secret>"
    assert redact("/scratch/grace/x by grace, not by graceful") == "/scratch/<user>/x by <user>, not by graceful"
    assert redact("s3://me:pw@host/bucket and /home/linus/x") == "s3://<secret>@host/bucket and /home/<user>/x"
    assert redact("connection to node17:1 failed") == "connection to <host>:1 failed"
    assert redact(str(Path.cwd() / "crisp" / "x.py")) == "<crisp>/x.py"
    assert redactor({"USER": "root"})("the root of it") == "the root of it"


def test_only_known_variables_are_shown() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0", "WANDB_API_KEY": "abcdef0123456789", "HOME": "/home/grace"}
    assert shown_environment(environment) == {"CUDA_VISIBLE_DEVICES": "0"}
