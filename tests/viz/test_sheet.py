"""Pages of panels: places in inches, blocks of maps, and names that would break a formula."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from crisp.errors import CrispError
from crisp.viz.figure import check_out, save_figure
from crisp.viz.sheet import Group, fit_lines, mosaic, mosaic_shape, mosaic_units, new_sheet, show

pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")


def test_panels_have_the_aspect_of_their_row_and_do_not_overlap() -> None:
    sheet = new_sheet([Group(head="one"), Group(head="two", units=(1.0, 1.5), labels=("a", "b"))], [1.0, 0.5])
    width, height = sheet.figure.get_size_inches()
    boxes = [[panel.get_position() for group in row for panel in group] for row in sheet.panels]
    assert [len(row) for row in boxes] == [3, 3]
    for row, aspect in zip(boxes, (1.0, 0.5), strict=True):
        for box, unit in zip(row, (1.0, 1.0, 1.5), strict=True):
            assert box.height * height / (box.width * width) == pytest.approx(aspect / unit)
        for left, right in itertools.pairwise(row):
            assert left.x1 < right.x0
    assert boxes[1][0].y1 < boxes[0][0].y0
    assert boxes[0][0].y1 < 1
    assert boxes[1][-1].x1 <= 1
    assert boxes[1][-1].y0 >= 0
    texts = [text.get_text() for text in sheet.figure.texts]
    assert [text for text in texts if text] == ["one", "two", "a", "b"]


def test_names_are_not_read_as_formulas(tmp_path: Path) -> None:
    sheet = new_sheet([Group(head=r"runs/$x_1$ \frac{ <&>")], [1.0])
    show(sheet.panels[0][0][0], np.zeros((4, 4, 3), np.uint8))
    assert save_figure(sheet.figure, tmp_path / "a" / "x.pdf").read_bytes()[:5] == b"%PDF-"
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "x.pdf"], "no partial file stays"


def test_pdfs_hold_letters_and_no_date(tmp_path: Path) -> None:
    sheet = new_sheet([Group(head="CRISP")], [1.0])
    content = save_figure(sheet.figure, tmp_path / "x.pdf").read_bytes()
    assert b"/FontFile2" in content or b"/Subtype /Type0" in content or b"/CIDFontType2" in content
    assert b"/Type3" not in content
    assert b"CreationDate" not in content


def test_what_cannot_be_drawn_or_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"60 columns would be under"):
        new_sheet([Group(head="")] * 60, [1.0])
    with pytest.raises(CrispError, match=r"1000 rows would be .* inches high; draw fewer images with --count"):
        new_sheet([Group(head="")], [1.0] * 1000)
    with pytest.raises(CrispError, match=r"out=x\.jpg: pictures are written as \.png or \.pdf"):
        check_out(Path("x.jpg"))
    (tmp_path / "x.png").mkdir()
    with pytest.raises(CrispError, match=r"x\.png: a folder"):
        check_out(tmp_path / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(CrispError, match="cannot be written"):
        save_figure(new_sheet([Group(head="")], [1.0]).figure, tmp_path / "file" / "x.png")


def test_a_mosaic_is_row_by_row_with_white_between() -> None:
    maps = [np.full((60, 60, 3), 40 * i, np.uint8) for i in range(5)]
    assert mosaic_shape(5, in_a_row=True) == (1, 5)
    assert mosaic_shape(5, in_a_row=False) == (2, 3)
    assert [mosaic_shape(n, in_a_row=False) for n in (1, 3, 6, 12, 16)] == [(1, 1), (2, 2), (2, 3), (3, 4), (4, 4)]
    whole = mosaic(maps, (2, 3))
    height, width = whole.shape[:2]
    assert width / height == pytest.approx(mosaic_units((2, 3)), rel=0.01)
    for i in range(5):
        row, column = divmod(i, 3)
        assert (whole[int((row + 0.5) / 2 * height), int((column + 0.5) / 3 * width)] == 40 * i).all()
    assert (whole[-1, -1] == 255).all(), "the place left over"
    assert (whole[:, width // 3 + 1] == 255).all()


def test_long_names_are_broken_into_three_lines_at_most() -> None:
    assert fit_lines("short", 2.0, 8) == "short"
    lines = fit_lines("a rather long name of a model " * 9, 1.0, 8).split("\n")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 15
