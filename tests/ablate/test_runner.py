"""Jobs: as many at once as slots, failures named and passed over, done stages left, stopped in order."""

import _thread
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from crisp.ablate.runner import Job, Slot, Stage, run_jobs


def stage(code: str, done: Path, *, name: str = "work") -> Stage:
    return Stage(name=name, command=lambda slot: [sys.executable, "-c", code], done=done.exists)


def job(tmp_path: Path, name: str, *stages: Stage) -> Job:
    return Job(name=name, log=tmp_path / "logs" / f"{name}.log", stages=stages)


def touch(path: Path) -> str:
    return f"import pathlib; pathlib.Path({str(path)!r}).touch()"


def test_two_slots_work_at_once_each_in_its_environment(tmp_path: Path) -> None:
    """Each job waits for the other: one after the other, neither would end."""
    files = [tmp_path / name for name in "ab"]
    jobs = []
    for mine, other in (files, files[::-1]):
        code = (
            f"import os, pathlib, time; pathlib.Path({str(mine)!r}).write_text(os.environ['SLOT'])\n"
            f"end = time.monotonic() + 30\n"
            f"while not pathlib.Path({str(other)!r}).exists():\n"
            f"    assert time.monotonic() < end; time.sleep(.02)\n"
        )
        jobs.append(job(tmp_path, mine.name, stage(code, mine)))
    assert run_jobs(jobs, [Slot(name=s, environment={"SLOT": s}) for s in ("x", "y")]) == {}
    assert sorted(path.read_text() for path in files) == ["x", "y"]


def test_a_failure_is_named_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    failing = stage("print('starts'); print('no such file: x'); raise SystemExit(3)", bad, name="training")
    after = tmp_path / "after"
    jobs = [
        job(tmp_path, "bad", failing, stage(touch(after), after)),
        job(tmp_path, "idle", stage("pass", tmp_path / "never")),
        job(tmp_path, "good", stage(touch(good), good)),
    ]
    failures = run_jobs(jobs, [Slot(name="CPU")])
    assert set(failures) == {"bad", "idle"}
    log = tmp_path / "logs/bad.log"
    assert str(failures["bad"]) == f"bad: training ended with status 3: no such file: x; its log is {log}"
    assert "before it was done: it printed nothing" in str(failures["idle"])
    assert "starts" in log.read_text()
    assert good.exists()
    assert not after.exists()
    assert str(failures["bad"]) in caplog.text


def test_done_stages_are_left_and_logs_are_continued(tmp_path: Path) -> None:
    done, second = tmp_path / "done", tmp_path / "second"
    done.touch()
    jobs = [job(tmp_path, "row", stage("raise SystemExit(1)", done), stage(f"print('here'); {touch(second)}", second))]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/row.log").write_text("before\n")
    assert run_jobs(jobs, [Slot(name="CPU")]) == {}
    assert (tmp_path / "logs/row.log").read_text() == "before\nhere\n"
    assert run_jobs(jobs, [Slot(name="CPU")]) == {}
    assert (tmp_path / "logs/row.log").read_text() == "before\nhere\n"


def test_stopping_lets_what_runs_save_and_begins_nothing_more(tmp_path: Path) -> None:
    ready, saved, later = tmp_path / "ready", tmp_path / "saved", tmp_path / "later"
    code = (
        "import pathlib, signal, sys, time\n"
        f"def leave(*_): {touch(saved).replace('import pathlib; ', '')}; sys.exit(0)\n"
        f"signal.signal(signal.SIGTERM, leave); {touch(ready)}\n"
        "time.sleep(60)\n"
    )
    jobs = [job(tmp_path, "first", stage(code, tmp_path / "no")), job(tmp_path, "second", stage(touch(later), later))]

    def interrupt() -> None:
        end = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < end:
            time.sleep(0.02)
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, [Slot(name="CPU")])
    thread.join()
    assert saved.exists()
    assert not later.exists()


def test_an_error_of_our_own_ends_it(tmp_path: Path) -> None:
    def command(slot: Slot) -> Sequence[str]:
        raise ZeroDivisionError

    broken = Stage(name="x", command=command, done=lambda: False)
    with pytest.raises(ZeroDivisionError):
        run_jobs([job(tmp_path, "row", broken)], [Slot(name="CPU")])
