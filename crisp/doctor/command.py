"""`crisp doctor`: facts, then a line per check as it ends, then the report."""

import logging
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.text import Text

from crisp.doctor.check import Check, Line
from crisp.doctor.config import Context, DoctorConfig
from crisp.doctor.examine import examine
from crisp.doctor.facts import extras, installed, machine_facts
from crisp.doctor.privacy import redactor
from crisp.doctor.process import run_apart
from crisp.doctor.registry import CHECKS
from crisp.doctor.report import Report, check_place, counts, json_path, write_report
from crisp.errors import CrispError

log = logging.getLogger(__name__)

_MARKS = {"pass": ("pass", "green"), "fail": ("FAIL", "bold red"), "skipped": ("skip", "dim")}
_NAME_WIDTH = 17
_FACT_WIDTH = 21
_FACTS_TIMEOUT_S = 120.0
_WIDTH = 80


def main(config: DoctorConfig, *, checks: Sequence[Check] | None = None, console: Console | None = None) -> None:
    """Examine the machine and write the report.

    Args:
        config: what to examine.
        checks: those to run; default: all of `registry`.
        console: where lines go; default: standard output, 80 columns where it is no terminal.

    Raises:
        CrispError: a check failed, or the report cannot be written.
    """
    console = console or Console(highlight=False)
    if console.width > 2 * _WIDTH or not console.is_terminal:
        console.width = _WIDTH
    check_place(config.out)
    redact = redactor()
    with _scratch_folder() as scratch:
        context = Context(
            folder=Path(scratch), report_folder=config.out.parent.resolve(), device="cpu", asked_device=config.device
        )
        facts, gpus = _facts(context)
        facts = {title: {redact(name): redact(text) for name, text in rows.items()} for title, rows in facts.items()}
        for title, rows in facts.items():
            console.print(Text(title, style="bold"))
            for name, text in rows.items():
                _row(console, (name, text), (_FACT_WIDTH, 0))
            console.print()
        if config.device == "cpu":
            gpus = 0
        device = "cuda" if gpus else "cpu"
        lines = _run(
            CHECKS if checks is None else checks,
            _on(context, device),
            gpus=gpus,
            quick=config.quick,
            redact=redact,
            console=console,
        )
    options = (" --quick" if config.quick else "") + (f" --device {config.device}" if config.device != "auto" else "")
    write_report(config.out, Report(options=options, facts=facts, lines=lines))
    console.print()
    console.print(Text(f"{counts(lines)}; report: {config.out} and {json_path(config.out)}"), soft_wrap=True)
    if failed := [line.check.name for line in lines if line.answer.status == "fail"]:
        raise CrispError(
            f"{len(failed)} of {len(lines)} checks failed ({', '.join(failed)}); remedies are above and in {config.out}"
        )


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="crisp-doctor-")
    except OSError as error:
        raise CrispError(
            f"{error.filename or 'scratch folder'}: cannot be made ({error.strerror or error}); make room, or set "
            f"TMPDIR to a folder that can be written"
        ) from error


def _on(context: Context, device: str) -> Context:
    return Context(
        folder=context.folder,
        report_folder=context.report_folder,
        device="cuda" if device == "cuda" else "cpu",
        asked_device=context.asked_device,
    )


def _facts(context: Context) -> tuple[dict[str, dict[str, str]], int]:
    """Tables by title, and the number of GPUs that torch sees."""
    answer = run_apart("crisp.doctor.facts:torch_facts", context, timeout_s=_FACTS_TIMEOUT_S)
    if answer.status == "pass":
        of_torch = dict(line.split(": ", 1) for line in answer.text.splitlines())
    else:
        of_torch = {"torch": f"unusable: {answer.text}"}
    machine = machine_facts(context.report_folder) | of_torch
    return {"Machine": machine, "Packages": installed(), "Extras": extras()}, int(answer.values.get("gpus", 0))


def _run(
    checks: Sequence[Check], context: Context, *, gpus: int, quick: bool, redact: object, console: Console
) -> list[Line]:
    status: Status = console.status("")  # a spinner on a terminal, nothing in a log file
    shown: list[str] = []

    def before(check: Check) -> None:
        status.update(Text(check.name))

    def after(line: Line) -> None:
        if line.check.group not in shown:
            shown.append(line.check.group)
            console.print(Text(line.check.group, style="bold"))
        show(line, console)

    with status:
        return examine(checks, context, gpus=gpus, quick=quick, redact=redact, before=before, after=after)  # type: ignore[arg-type]


def show(line: Line, console: Console) -> None:
    """One check's line; where it failed, the remedy below."""
    word, style = _MARKS[line.answer.status]
    _row(console, (word, line.check.name, line.answer.text), (5, _NAME_WIDTH, 0), style=style)
    if line.remedy:
        _row(console, ("", f"remedy: {line.remedy}"), (5, 0))


def _row(console: Console, texts: Sequence[str], widths: Sequence[int], *, style: str = "") -> None:
    """Columns of given widths, of which the last one takes what is left and is wrapped; no spaces at the end."""
    head = "".join(f"{text:<{width - 1}} " for text, width in zip(texts[:-1], widths, strict=False))
    room = max(20, console.width - len(head))
    first, *more = textwrap.wrap(texts[-1], room, break_on_hyphens=False) or [""]
    text = Text(f"{head}{first}".rstrip())
    text.stylize(style, 0, len(texts[0]))
    for part in more:
        text.append(f"\n{' ' * len(head)}{part}")
    console.print(text, soft_wrap=True)
