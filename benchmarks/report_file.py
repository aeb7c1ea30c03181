"""What a benchmark measured, as a JSON file."""

import dataclasses
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

from crisp.errors import CrispError


def check_report(path: Path | None) -> None:
    """Refuse a place that cannot be written, before anything is measured.

    Raises:
        CrispError: no such folder, or not one to write in.
    """
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise CrispError(
            f"json={path}: {'a folder' if path.is_dir() else 'no such folder'}; name a file in a folder that exists"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CrispError(f"json={path}: not writable; name another file")


def write_report(path: Path | None, config: Any, *, hardware: str, measured: dict[str, Any]) -> None:
    """Date, hardware, configuration, then what was measured; nothing where no path was given.

    Args:
        path: of the file.
        config: a dataclass.
        hardware: one line.
        measured: as JSON types.
    """
    if path is None:
        return
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    written = {"date": str(date.today()), "hardware": hardware, "config": values, **measured}
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
