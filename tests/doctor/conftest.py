from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import crisp.doctor.process
from crisp.doctor.check import Check
from crisp.doctor.command import main
from crisp.doctor.config import Context, DoctorConfig
from crisp.errors import CrispError


@dataclass(frozen=True)
class Examined:
    """What `crisp doctor` printed, wrote, and ended with."""

    said: str
    report: Path
    error: str | None


Doctor = Callable[..., Examined]


@pytest.fixture(autouse=True, scope="session")
def _one_server_of_processes() -> None:
    """Other tests fork from the same server: whoever starts it, it imports for both."""
    crisp.doctor.process.PRELOAD[:] = ["tests.ranks", "crisp.doctor.preload"]


def examined(folder: Path, checks: Sequence[Check] | None = None, **options: Any) -> Examined:
    said, error = StringIO(), None
    config = DoctorConfig(out=folder / "report.md", **options)
    try:
        main(config, checks=checks, console=Console(file=said, highlight=False))
    except CrispError as raised:
        error = str(raised)
    return Examined(said=said.getvalue(), report=config.out, error=error)


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """Runs some checks with a report in a fresh folder."""
    return lambda *checks, **options: examined(tmp_path, checks, **options)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """For a check that is called right here."""
    return Context(folder=tmp_path, report_folder=tmp_path, device="cpu", asked_device="auto")


def check(run: str, **options: Any) -> Check:
    """A check of the tests."""
    words = {"name": run.partition(":")[2], "group": "tests", "proves": "a test", "remedy": "mend the test"}
    return Check(run=run, **{**words, "quick": True, **options})
