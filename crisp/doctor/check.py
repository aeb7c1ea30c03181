"""A check, how it ends, and the line that it becomes. Nothing here imports torch."""

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["pass", "fail", "skipped"]


class Wrong(Exception):  # noqa: N818  (an outcome, as StopIteration is)
    """What a check found is not as it should be: the line fails with this message."""


class NotHere(Exception):  # noqa: N818
    """There is nothing to check on this machine: the line is skipped with this reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    group: str
    proves: str
    """What holds where it passes"""
    remedy: str
    """What to do where it fails"""
    run: str
    """`module:function` of one that takes a `Context` and returns a `Finding`; imported in the check's own process,
    so that a library that is missing or broken fails the checks that need it and no other"""
    gpus: int = 0
    """GPUs without which it is skipped"""
    quick: bool = False
    """Part of `--quick`"""
    needs: tuple[str, ...] = ()
    """Checks that must have passed; it sees their values"""
    timeout_s: float = 120.0
    """After which its process is ended, and it has failed"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a check that passed has measured."""

    figure: str
    """For people, with its unit and, where there is one, the tolerance that it is held against"""
    values: dict[str, float] = field(default_factory=dict)
    """For the JSON, and for the checks that need this one"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How a check's process ended."""

    status: Status
    text: str
    """The figure; where it failed the message, where it was skipped the reason"""
    values: dict[str, float] = field(default_factory=dict)
    missing: str | None = None
    """Module that could not be imported"""
    traceback: str = ""
    output: str = ""
    """The last that the process printed, where it failed"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A check and how it ended."""

    check: Check
    answer: Answer
    remedy: str
    """'' where there is nothing to mend"""
    seconds: float
