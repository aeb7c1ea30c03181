"""Results: the same bytes twice, read back, and beside the paper's figures with the differences."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crisp.errors import CrispError
from crisp.evals.results import ModelFacts, Result, Score, print_result, read_result, result_markdown, write_result
from crisp.evals.tables import Column, compare, difference, markdown_table
from tests.evals.tiny_backbone import tiny_model

SEGMENTATION = Result(
    task="seg-knn",
    dataset="ade20k",
    model=ModelFacts.of(tiny_model(dim=8)),
    scores=[
        Score(metric="mIoU", value=28.249999, settings={"k": 10, "distance": "cosine"}),
        Score(metric="mIoU", value=27.0, settings={"k": 1, "distance": "l2"}),
        Score(metric="pixel accuracy", value=71.23456),
    ],
    settings={"image_px": 256, "ks": [1, 10], "fingerprints": {"val": "12", "train": "ab"}},
    chosen={"k": 10, "distance": "cosine"},
)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    first = write_result(tmp_path / "a", SEGMENTATION)
    reordered: dict[str, Any] = dict(reversed(SEGMENTATION.settings.items()))
    tiny_noise = [replace(score, value=score.value + 1e-7) for score in SEGMENTATION.scores]
    second = write_result(tmp_path / "b", replace(SEGMENTATION, settings=reordered, scores=tiny_noise))
    assert first == tmp_path / "a" / "seg-knn-ade20k.json"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["seg-knn-ade20k.json", "seg-knn-ade20k.md"]
    for name in ("seg-knn-ade20k.json", "seg-knn-ade20k.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads(first.read_text())["scores"][0] == {
        "metric": "mIoU", "settings": {"distance": "cosine", "k": 10}, "std": None, "value": 28.25,
    }  # fmt: skip
    assert second.parent.name == "b"


def test_read_back(tmp_path: Path) -> None:
    result = read_result(write_result(tmp_path, SEGMENTATION))
    assert result == replace(SEGMENTATION, scores=[replace(s, value=round(s.value, 4)) for s in SEGMENTATION.scores])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 1, "scores": []}'])
def test_what_is_not_a_result(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CrispError, match=r"a\.json: not a result"):
        read_result(tmp_path / "a.json")
    with pytest.raises(CrispError, match="not a result"):
        read_result(tmp_path / "nowhere.json")


def test_headline_is_the_first_of_each_metric() -> None:
    assert [(m, s.value) for m, s in SEGMENTATION.headline().items()] == [
        ("mIoU", 28.249999),
        ("pixel accuracy", 71.23456),
    ]


def test_markdown_beside_the_paper() -> None:
    lines = result_markdown(SEGMENTATION).splitlines()
    assert lines[0] == "# seg-knn on ade20k: tiny ViT"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["model", "arch", "mIoU", "ours −"], "what the paper does not have is not compared"
    assert cells[2] == ["tiny ViT", "", "28.2", ""]
    assert ["SiT", "ViT-S", "17.6", "+10.6"] in cells
    assert ["CRISP", "ViT-S", "28.2", "±0.0"] in cells
    assert ["CAPI*", "ViT-L", "32.1", "−3.9"] in cells
    assert ["mIoU", "k 1, distance l2", "27.0"] in cells
    assert ["pixel accuracy", "", "71.2"] in cells
    assert "Chosen: k 10, distance cosine" in lines
    assert '  "image_px": 256,' in lines


def test_a_lost_decimal_point_is_told_where_it_matters() -> None:
    linear = replace(SEGMENTATION, task="seg-linear", dataset="cityscapes")
    assert "decimal point" in result_markdown(linear)
    assert "decimal point" not in result_markdown(SEGMENTATION)


def test_data_that_the_paper_lacks() -> None:
    page = result_markdown(replace(SEGMENTATION, dataset="camvid"))
    assert "The paper has no figures for this." in page
    assert "| tiny ViT |      | 28.2 |        |           71.2 |        |" in page


def test_hidden_truth() -> None:
    hidden = replace(SEGMENTATION, task="video", dataset="mose-valid", scores=[], chosen={})
    assert "No scores: the truth is hidden or absent." in result_markdown(hidden)
    console = Console(width=80, record=True, quiet=True)
    print_result(hidden, console)


def printed(result: Result, width: int) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        print_result(result, console)
    return capture.get().splitlines()


MANY = Result(
    task="multilabel",
    dataset="voc2012",
    model=replace(ModelFacts.of(tiny_model()), name="CRISP ViT-S/16, vits16 step 1000000"),
    scores=[
        Score(metric="mAP", value=94.96),
        Score(metric="mAP-1shot", value=49.3, std=1.27),
        Score(metric="mAP-2shot", value=61.14, std=0.8),
        Score(metric="mAP-5shot", value=70.0, std=0.31),
    ],
    settings={},
)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_on_a_terminal(width: int) -> None:
    lines = printed(MANY, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for shown in (
        "mAP-1shot",
        "mAP-5shot",
        "49.3 ± 1.3",
        "61.1 ± 0.8",
        "ViT-S/16",
        "(−0.2)",
        "61.0  (+0.1)",
        "(ours minus the paper's)",
    ):
        assert shown in text
    assert "…" not in text.replace("CRISP ViT-S/16, vits16 st…", ""), "nothing else is cut"
    assert sum("model" in line for line in lines) == {80: 2, 100: 1, 200: 1}[width], "as few tables as the width takes"


def test_differences() -> None:
    assert difference(28.249, 28.2) == "±0.0"
    assert difference(28.26, 28.2) == "+0.1"
    assert difference(27.0, 28.2) == "−1.2"


def test_compare_where_nothing_was_measured() -> None:
    heads, lines = compare("ours", [Column(head="top1", value=None)])
    assert heads == ["model", "arch", "top1", "ours −"]
    assert lines == [["ours", "", "–", ""]]


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    assert markdown_table(["a", "b"], [["x|y", ""]]).splitlines()[2] == r"| x\|y |     |"


def test_another_models_result_is_replaced_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        write_result(tmp_path, SEGMENTATION)
        write_result(tmp_path, SEGMENTATION)
        assert caplog.messages == []
        write_result(tmp_path, replace(SEGMENTATION, model=ModelFacts.of(tiny_model(dim=4))))
    assert "replaces the result of tiny ViT (tiny:)" in caplog.text


def test_a_file_of_that_name_that_is_no_result_does_not_cost_the_score(tmp_path: Path) -> None:
    (tmp_path / "seg-knn-ade20k.json").write_text("notes")
    assert read_result(write_result(tmp_path, SEGMENTATION)).task == "seg-knn"


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CrispError, match="cannot be written"):
        write_result(tmp_path / "file", SEGMENTATION)
    with pytest.raises(CrispError, match="seg-knn-ade20k: a figure is not a number"):
        write_result(tmp_path, replace(SEGMENTATION, scores=[Score(metric="mIoU", value=float("nan"))]))
