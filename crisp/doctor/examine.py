"""Runs checks in order, each in its own process, and makes a line of each."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from crisp.doctor.check import Answer, Check, Line
from crisp.doctor.config import Context
from crisp.doctor.process import run_apart

Redact = Callable[[str], str]


def examine(
    checks: Sequence[Check],
    context: Context,
    *,
    gpus: int,
    quick: bool,
    redact: Redact,
    before: Callable[[Check], None],
    after: Callable[[Line], None],
) -> list[Line]:
    """A line for each check, whatever happens to it.

    Args:
        checks: in an order in which a check comes after those that it needs.
        context: for the checks; the values of earlier ones are added.
        gpus: that may be used.
        quick: leave out the checks that take long.
        redact: applied to every text that comes out of a check.
        before: called with a check that is about to run.
        after: called with each line as it is there.
    """
    lines: list[Line] = []
    ended: dict[str, Answer] = {}
    for check in checks:
        start_s = time.perf_counter()
        answer = _reason_to_skip(check, ended, gpus=gpus, quick=quick, asked_device=context.asked_device)
        if answer is None:
            before(check)
            values = {name: other.values for name, other in ended.items()}
            answer = _redacted(run_apart(check.run, replace(context, values=values), timeout_s=check.timeout_s), redact)
        ended[check.name] = answer
        lines.append(
            Line(check=check, answer=answer, remedy=_remedy(check, answer), seconds=time.perf_counter() - start_s)
        )
        after(lines[-1])
    return lines


def _reason_to_skip(
    check: Check, ended: dict[str, Answer], *, gpus: int, quick: bool, asked_device: str
) -> Answer | None:
    reason = None
    if quick and not check.quick:
        reason = "left out by --quick"
    elif check.gpus and asked_device == "cpu":
        reason = "left out by --device cpu"
    elif check.gpus > gpus:
        reason = "no CUDA device" if gpus == 0 else f"needs {check.gpus} CUDA devices, there is {gpus}"
    else:
        for name in check.needs:
            if ended[name].status != "pass":
                what = "failed" if ended[name].status == "fail" else "was skipped"
                reason = f"needs '{name}', which {what}"
                break
    return None if reason is None else Answer(status="skipped", text=reason)


def _remedy(check: Check, answer: Answer) -> str:
    if answer.status != "fail":
        return ""
    if answer.missing is not None:
        return f"install what has the module {answer.missing}; the line 'packages' says what else is missing"
    return check.remedy


def _redacted(answer: Answer, redact: Redact) -> Answer:
    return replace(answer, text=redact(answer.text), traceback=redact(answer.traceback), output=redact(answer.output))
