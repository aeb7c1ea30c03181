import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crisp.errors import CrispError
from crisp.viz.losses import draw_losses, running_mean


def write(path: Path, *, lines: int, region: float = 2.0) -> Path:
    rows = [
        {"step": 5 * i, "loss": 9.0 - i / 20, "loss_cls": 4.0, "loss_patch": 3.0, "loss_region": region}
        for i in range(1, lines + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Panel titles, as they are drawn."""
    axes = pytest.importorskip("matplotlib.axes", reason="pictures need the extra 'demo'")
    seen: list[str] = []
    monkeypatch.setattr(axes.Axes, "set_title", lambda self, text, **_: seen.append(text))
    return seen


@pytest.mark.parametrize("lines", [1, 2, 100])
def test_draws_total_and_terms(tmp_path: Path, titles: list[str], lines: int) -> None:
    target = draw_losses(write(tmp_path / "metrics.jsonl", lines=lines), tmp_path / "pictures" / "losses.png")
    assert titles == ["total", "[CLS]", "patch", "region"]
    with Image.open(target) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 50


def test_a_term_the_run_does_not_have_is_left_out(tmp_path: Path, titles: list[str]) -> None:
    draw_losses(write(tmp_path / "metrics.jsonl", lines=10, region=0.0), tmp_path / "losses.png")
    assert titles == ["total", "[CLS]", "patch"]


@pytest.mark.parametrize("window", [1, 2, 5, 8, 30])
def test_running_mean_equals_the_plain_form(window: int) -> None:
    values = np.random.default_rng(0).normal(size=23)
    before, after = window // 2, (window - 1) // 2
    plain = [values[max(0, i - before) : i + after + 1].mean() for i in range(len(values))]
    np.testing.assert_allclose(running_mean(values, window), plain, atol=1e-12)


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CrispError, match=r"metrics\.jsonl: no such file"):
        draw_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
    path = write(tmp_path / "metrics.jsonl", lines=0)
    with pytest.raises(CrispError, match="no line yet"):
        draw_losses(path, tmp_path / "losses.png")
    write(path, lines=3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CrispError, match=r"pip install 'crisp-ssl\[demo\]'"):
        draw_losses(path, tmp_path / "losses.png")
