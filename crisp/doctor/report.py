"""The report: Markdown for people, JSON beside it for programs; both are whole or absent."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crisp.doctor.check import Line
from crisp.errors import CrispError
from crisp.storage import Location

TITLE = "# crisp doctor"
KIND = "crisp doctor"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that is told. Its texts are already free of names, folders and secrets."""

    options: str
    """As given on the command line"""
    facts: dict[str, dict[str, str]]
    """Tables of facts by their title"""
    lines: Sequence[Line]
    when: datetime = dataclasses.field(default_factory=lambda: datetime.now(UTC))


def json_path(out: Path) -> Path:
    """Where the JSON of a report goes."""
    return out.with_suffix(".json")


def check_place(out: Path) -> None:
    """Refuse a place that cannot be written, or that holds something else, before anything is examined.

    Raises:
        CrispError: no such folder, not one to write in, or a file there that is no report.
    """
    folder = out.parent
    if not folder.is_dir():
        raise CrispError(f"out={out}: no folder {folder}; name a file in a folder that exists")
    if not os.access(folder, os.W_OK):
        raise CrispError(f"out={out}: {folder} is not writable; name another file with --out")
    for path in (out, json_path(out)):
        if path.exists() and not _is_report(path):
            raise CrispError(f"out={path}: there already, and no report of crisp doctor; name another file with --out")


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(errors="replace") as stream:
        start = stream.read(100)
    return start.startswith(TITLE) or start.lstrip("{ \n").startswith(f'"report": "{KIND}"')


def write_report(out: Path, report: Report) -> None:
    """Both files, or neither; those that were there are replaced.

    Raises:
        CrispError: they cannot be written.
    """
    texts = {json_path(out): to_json(report), out: to_markdown(report)}
    try:
        with contextlib.ExitStack() as writing:
            for path, text in texts.items():
                stream = writing.enter_context(Location.of(str(path.absolute())).whole_file())
                stream.write(text.encode())
                stream.flush()  # a full disk is noticed before either file takes its name
                os.fsync(stream.fileno())
    except OSError as error:
        raise CrispError(
            f"out={out}: the report cannot be written ({error.strerror or error}); make room, or name another file"
        ) from error


def counts(lines: Sequence[Line]) -> str:
    """As in '20 passed, 1 failed, 7 skipped'."""
    of = {status: sum(line.answer.status == status for line in lines) for status in ("pass", "fail", "skipped")}
    return f"{of['pass']} passed, {of['fail']} failed, {of['skipped']} skipped"


def to_json(report: Report) -> str:
    """The report as JSON text."""
    lines: list[dict[str, Any]] = [
        {
            "name": line.check.name,
            "group": line.check.group,
            "status": line.answer.status,
            "text": line.answer.text,
            "values": line.answer.values,
            "proves": line.check.proves,
            "remedy": line.remedy,
            "seconds": round(line.seconds, 2),
            "traceback": line.answer.traceback,
            "output": line.answer.output,
        }
        for line in report.lines
    ]
    content = {
        "report": KIND,
        "when": report.when.isoformat(timespec="seconds"),
        "options": report.options,
        "facts": report.facts,
        "lines": lines,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def to_markdown(report: Report) -> str:
    """The report as Markdown text."""
    failed = [line for line in report.lines if line.answer.status == "fail"]
    parts = [
        TITLE,
        f"{report.when.isoformat(timespec='minutes')}, `crisp doctor{report.options}`: {counts(report.lines)}.",
    ]
    parts += [_failure(line) for line in failed]
    rows = [
        (line.answer.status, line.check.name, line.answer.text, line.check.proves, f"{line.seconds:.1f}")
        for line in report.lines
    ]
    parts.append("## Checks\n\n" + _table(("", "check", "found", "proves", "s"), rows))
    parts += [f"## {title}\n\n" + _table(("", ""), list(facts.items())) for title, facts in report.facts.items()]
    return "\n\n".join(parts) + "\n"


def _failure(line: Line) -> str:
    parts = [
        f"## Failed: {line.check.name}",
        f"{line.answer.text}",
        f"- what would hold: {line.check.proves}\n- remedy: {line.remedy}",
    ]
    parts += [f"```\n{text.rstrip()}\n```" for text in (line.answer.traceback, line.answer.output) if text.strip()]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in row) + " |" for row in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
