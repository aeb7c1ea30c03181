"""Every key of a file ends as a weight, or as ignored with the reason; one that nobody knows is an error."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crisp.errors import CrispError


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRules:
    """What the keys of a system's file are, as whole-match regular expressions on flat keys (`teacher.cls_token`)."""

    weights: Sequence[tuple[str, str]]
    """Pattern → the name that the engine has for it, with groups as in `re.Match.expand`; the first match counts"""
    ignored: Sequence[tuple[str, str]] = ()
    """Pattern → why the features do not need it"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SortedKeys:
    """The keys of one file, all of them."""

    tensors: dict[str, Tensor]
    """The engine's name → tensor, as the file has it"""
    file_keys: dict[str, str]
    """The engine's name → flat key in the file"""
    ignored: dict[str, str]
    """Flat key in the file → why"""

    def account(self, *notes: str) -> str:
        """For the log, one line: how many were loaded, what else was done (`notes`), how many were ignored and why."""
        reasons = Counter(self.ignored.values())
        ignored = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        parts = [f"{len(self.tensors)} tensors loaded", *notes, f"ignored: {ignored}" if ignored else "none ignored"]
        return ", ".join(parts)


def flatten(state: Mapping[str, Any]) -> dict[str, Any]:
    """Networks that a file keeps apart (`{"teacher": {…}}`) as one level of keys, `teacher.…`.

    A mapping is opened where it holds tensors by name; any other value (an optimiser's state, a command line) stays
    one key.
    """
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values()):
            flat.update({f"{key}.{inner_key}": inner for inner_key, inner in value.items()})
        else:
            flat[key] = value
    return flat


def sort_keys(state: Mapping[str, Any], rules: KeyRules, *, source: str, system: str) -> SortedKeys:
    """A file's keys by what they are.

    Args:
        state: the file's content.
        rules: the system's.
        source, system: for messages.

    Raises:
        CrispError: a key is unknown, two keys are the same weight, or a weight is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    file_keys: dict[str, str] = {}
    ignored: dict[str, str] = {}
    unknown: list[str] = []
    for key, value in flatten(state).items():
        reason = next((why for pattern, why in rules.ignored if re.fullmatch(pattern, key)), None)
        name = _name(key, rules.weights)
        if reason is not None:
            ignored[key] = reason
        elif name is None or not isinstance(value, Tensor):
            unknown.append(key)
        elif name in tensors:
            raise CrispError(
                f"{source}: {file_keys[name]} and {key} are the same weight of {system}; keep one of the two"
            )
        else:
            tensors[name] = value
            file_keys[name] = key
    if unknown:
        raise CrispError(
            f"{source}: read as {system}, {len(unknown)} keys have no known meaning ({few(unknown)}); name another "
            f"system (SYSTEM:FILE), or remove them from the file if they do not matter"
        )
    return SortedKeys(tensors=tensors, file_keys=file_keys, ignored=ignored)


def _name(key: str, weights: Sequence[tuple[str, str]]) -> str | None:
    for pattern, name in weights:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(name)
    return None


def few(keys: Iterable[str]) -> str:
    """The first three, for messages."""
    names = sorted(keys)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def own_copy(tensor: Tensor) -> Tensor:
    """In float32 and memory of its own, so that a mapped file can be closed, moved or overwritten."""
    return tensor.detach().to(torch.float32, copy=True).contiguous()
