"""The plan's benchmark runs and reports each part."""

import re

import pytest

from crisp.benchmarks import plan


@pytest.mark.parametrize("extra", [[], ["--views.seed-policy", "visible", "--views.mask-shape", "rand"]])
def test_prints_a_row_for_every_part(capsys, extra):
    plan.main(["--batch", "4", "--ranks", "3", "--shards", "20", "--repeats", "5", *extra])
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\S.*?) \| [\d.]+ \| [\d.]+–[\d.]+ \| [\d.]+ \|$", printed, re.MULTILINE)
    assert "order" in rows
    assert rows[-1] == "**order and plan**"
    assert len(rows) == 8
    assert "B=4 of G=12, V=12" in printed
