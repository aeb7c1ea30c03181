"""Whatever is broken, there is a line that says so with its remedy, and the next check runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crisp.doctor.check import Check
from crisp.doctor.registry import CHECKS
from tests.doctor.conftest import Doctor, check

BROKEN = "tests.doctor.broken:"
FINE = check(f"{BROKEN}fine")


def as_registered(name: str, run: str) -> Check:
    """The doctor's own check, on a machine where something is broken."""
    own = next(each for each in CHECKS if each.name == name)
    return Check(
        name=own.name, group=own.group, proves=own.proves, remedy=own.remedy, run=BROKEN + run, timeout_s=own.timeout_s
    )


def fails(doctor: Doctor, broken: Check, *words: str) -> dict[str, Any]:
    """The check's line fails with these words and its remedy, in the terminal and in the report; another goes on."""
    found = doctor(broken, FINE)
    assert found.error is not None
    assert found.error.startswith(f"1 of 2 checks failed ({broken.name})")
    said = "".join(found.said.split())  # lines are broken anywhere
    line = json.loads(found.report.with_suffix(".json").read_text())["lines"][0]
    assert line["status"] == "fail"
    for word in words:
        assert word in line["text"]
    assert line["remedy"]
    for expected in (f"FAIL {broken.name} {line['text']} remedy: {line['remedy']}", "pass fine fine, to 1 µm"):
        assert "".join(expected.split()) in said
    assert "Traceback" not in found.said
    assert line["remedy"] in found.report.read_text()
    return dict(line)


@pytest.mark.parametrize(
    ("name", "run", "words"),
    [
        ("cross-entropy", "wrong_cross_entropy", ["loss in float64 is", "off the plain form, more than 1e-10"]),
        (
            "CPU renderer",
            "wrong_renderer",
            ["local_views of the CPU renderer is 0.", "of 255 levels off the plain one"],
        ),
        ("packages", "a_package_is_missing", ["simplejpeg", "cannot be imported"]),
        ("disk", "disk_is_full", ["No space left on device"]),
        ("checkpoint", "disk_is_full_at_a_checkpoint", ["not saved (No space left on device)", "make room"]),
    ],
)
def test_a_broken_part_is_a_line_with_its_remedy(doctor: Doctor, name: str, run: str, words: list[str]) -> None:
    broken = as_registered(name, run)
    line = fails(doctor, broken, *words)
    assert line["remedy"] == broken.remedy
    assert run in line["traceback"]


def test_a_module_that_cannot_be_imported_is_what_to_install(doctor: Doctor) -> None:
    line = fails(doctor, check(f"{BROKEN}imports_what_is_missing"), "ModuleNotFoundError", "no_such_dependency")
    assert line["remedy"].startswith("install what has the module crisp_has_no_such_dependency")
    line = fails(doctor, check("tests.doctor.nowhere:f"), "No module named 'tests.doctor.nowhere'")
    assert line["text"].startswith("ModuleNotFoundError")


def test_a_crash_is_a_line_and_says_where_it_was(doctor: Doctor) -> None:
    line = fails(doctor, check(f"{BROKEN}crashes"), "its process died: SIGSEGV")
    assert "about to crash" in line["output"]
    assert "in crashes" in line["output"]
    fails(doctor, check(f"{BROKEN}exits"), "its process died: exit status 3")


def test_a_hanging_check_is_ended_and_says_where_it_was(doctor: Doctor) -> None:
    line = fails(doctor, check(f"{BROKEN}hangs", timeout_s=5), "no answer within 5 s")
    assert "in hangs" in line["output"]


def test_an_answer_of_a_process_that_then_dies_does_not_count(doctor: Doctor) -> None:
    fails(doctor, check(f"{BROKEN}dies_after_its_answer"), "fine, to 1 µm, but then its process died: exit status 4")


@pytest.mark.slow
def test_a_failing_rank(doctor: Doctor) -> None:
    line = fails(doctor, as_registered("two ranks, gloo", "a_rank_fails"), "torchrun ended with status 1")
    assert "exitcode  : 7" in line["output"]


def test_an_import_of_torch_that_crashes_is_a_line_too(tmp_path: Path) -> None:
    """Nothing that the doctor itself imports needs torch, so it says so."""
    (tmp_path / "kills_the_server.py").write_text("import os\nos._exit(1)\n")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import crisp.doctor.process\n"
        "from crisp.doctor.command import main\n"
        "from crisp.doctor.config import DoctorConfig\n"
        "from crisp.doctor.registry import CHECKS\n"
        "assert not {'torch', 'numba', 'timm'} & set(sys.modules), 'a library that may be broken'\n"
        "crisp.doctor.process.PRELOAD[:] = ['kills_the_server']\n"
        f"main(DoctorConfig(out=Path({str(tmp_path / 'report.md')!r})), checks=CHECKS[:2])\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert "2 of 2 checks failed (packages, compiled code)" in done.stderr, done.stderr
    assert "FAIL packages         no process could be started" in done.stdout
    assert "unusable: no process could be started" in (tmp_path / "report.md").read_text()


def test_what_a_failed_check_is_needed_for_is_skipped(doctor: Doctor) -> None:
    found = doctor(
        check(f"{BROKEN}exits"),
        check(f"{BROKEN}fine", name="second", needs=("exits",)),
        check(f"{BROKEN}fine", name="third", needs=("second",)),
    )
    assert "skip second needs 'exits', which failed" in " ".join(found.said.split())
    assert "skip third needs 'second', which was skipped" in " ".join(found.said.split())


def test_values_reach_the_checks_that_need_them(doctor: Doctor) -> None:
    found = doctor(FINE, check(f"{BROKEN}uses_the_value_of_fine", needs=("fine",)))
    assert found.error is None
    assert "found 2.5" in found.said


def test_nothing_private_is_told(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STORE_TOKEN", "hunter2hunter2")
    monkeypatch.setenv("USER", "ada")
    found = doctor(check(f"{BROKEN}tells_secrets"))
    written = found.report.read_text() + found.report.with_suffix(".json").read_text()
    for text in (found.said, written):
        assert "with token <secret> of /home/<user>/x" in " ".join(text.split())
        assert "hunter2" not in text
        assert "ada/" not in text
        assert str(Path.home()) + "/" not in text
    assert "tells_secrets" in written
