"""A place that cannot be written is refused before anything is measured."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from crisp.benchmarks import feed, loader, shard, step
from crisp.benchmarks.report_file import check_report, write_report
from crisp.errors import CrispError


@dataclass
class Config:
    path: Path
    rounds: int = 3


def test_what_is_written(tmp_path: Path) -> None:
    check_report(tmp_path / "F.json")
    write_report(tmp_path / "F.json", Config(Path("x")), hardware="two cores", measured={"results": [1.5]})
    written = json.loads((tmp_path / "F.json").read_text())
    assert written.pop("date")
    assert written == {"hardware": "two cores", "config": {"path": "x", "rounds": 3}, "results": [1.5]}
    write_report(None, Config(Path("x")), hardware="", measured={})


@pytest.mark.parametrize("place", ["nowhere/F.json", "."])
@pytest.mark.parametrize("bench", [feed, loader, shard, step])
def test_a_place_that_cannot_be_written(tmp_path: Path, bench, place: str) -> None:
    data = ["--images", str(tmp_path)] if bench in (feed, shard) else ["--shards", str(tmp_path)]
    with pytest.raises(CrispError, match=r"^json=.*; name a file in a folder that exists"):
        bench.main([*data, "--json", str(tmp_path / place)])
