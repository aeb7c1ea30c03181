"""Pictures fit their budget: narrower, then fewer, the first and the last always there."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from crisp.report import pictures
from crisp.report.pictures import encode, gather_moments, spread
from tests.report.folders import draw_pictures


@pytest.mark.parametrize(
    ("count", "chosen", "places"),
    [
        (5, 5, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (5, 3, [0, 2, 4]), (5, 2, [0, 4]), (5, 1, [4]), (1, 1, [0]),
        (7, 4, [0, 2, 4, 6]),
    ],
)  # fmt: skip
def test_spread(count: int, chosen: int, places: list[int]) -> None:
    assert spread(count, chosen) == places


def test_pictures_with_room_are_all_there_in_their_size(tmp_path: Path) -> None:
    draw_pictures(tmp_path, steps=(1, 2, 3))
    moments, _ = gather_moments(tmp_path)
    shown = encode(moments, "regions", budget=1_000_000)
    assert [picture.step for picture in shown] == [1, 2, 3]
    assert {(picture.width_px, picture.height_px) for picture in shown} == {(60, 30)}
    kind, _, data = shown[0].data_uri.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (60, 30)


def test_many_and_large_pictures_stay_in_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "WIDTHS_PX", (160, 120, 90, 64))
    draw_pictures(tmp_path, steps=tuple(range(1, 15)), width_px=130)
    moments, _ = gather_moments(tmp_path)
    one = len(encode(moments[:1], "pca", budget=10**9)[0].data_uri)
    for budget, narrower in ((one * 20, False), (one * 9, True), (one * 2, True)):
        shown = encode(moments, "pca", budget=budget)
        assert sum(len(picture.data_uri) for picture in shown) <= budget
        assert (shown[0].width_px < 130) == narrower
        assert (shown[0].step, shown[-1].step) == (1, 14)
    assert [picture.step for picture in encode(moments, "pca", budget=10)] == [14], "the last one, whatever it takes"


def test_a_kind_that_is_not_there(tmp_path: Path) -> None:
    draw_pictures(tmp_path, steps=(1,))
    assert encode(gather_moments(tmp_path)[0], "attention", budget=1000) == []
