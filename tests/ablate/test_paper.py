"""The paper's figures as transcribed: what stands there, and that nothing unreadable does."""

import pytest

from crisp.ablate.paper import COLUMNS, DEFAULTS, FIGURES, LEFT_OUT, PARAMETERS, TITLES
from crisp.ablations import TABLES
from crisp.evals.paper import COLUMNS as MAIN_COLUMNS
from crisp.recipes import recipe_named
from crisp.runs import _leaves


def figures(table: str, row: str) -> list[float]:
    return [FIGURES[table][row][column.name].value for column in COLUMNS if column.name in FIGURES[table][row]]


@pytest.mark.parametrize(
    ("table", "row", "expected"),
    [
        ("layers", "1", [55.6, 64.4, 69.0]),
        ("layers", "4", [57.6, 64.7, 69.1]),
        ("layers", "6", [56.4, 64.4, 68.8]),
        ("blocks", "0", [63.2, 69.0]),
        ("blocks", "1", [57.4, 64.7, 69.1]),
        ("blocks", "2", [64.7, 69.1]),
        ("blocks", "4", [56.4, 64.4, 68.8]),
        ("blocks", "6", [56.1, 64.3, 68.8]),
        ("heads", "shared_shared", [55.6, 63.9, 67.9]),
        ("heads", "shared_separate", [56.3, 64.4, 68.9]),
        ("heads", "shared_cls_apart", [56.3, 64.0, 69.0]),
        ("heads", "separate_separate", [56.7, 64.9, 69.0]),
        ("heads", "cls_apart_cls_apart", [57.0, 65.0, 69.0]),
    ],
)
def test_figures(table: str, row: str, expected: list[float]) -> None:
    assert figures(table, row) == expected


def test_what_cannot_be_read_is_left_out_and_said() -> None:
    assert "2" not in FIGURES["layers"]
    assert "VOC k-NN" not in FIGURES["blocks"]["0"]
    assert "VOC k-NN" not in FIGURES["blocks"]["2"]
    assert set(FIGURES) == {"layers", "blocks", "heads"}
    assert set(LEFT_OUT) == set(TITLES) == set(TABLES)
    assert "M = 2" in LEFT_OUT["layers"]
    assert "34.6" in LEFT_OUT["blocks"]


def test_points_put_back_are_marked() -> None:
    assert FIGURES["layers"]["4"]["VOC k-NN"].point_restored
    assert not FIGURES["layers"]["6"]["VOC k-NN"].point_restored


def test_rows_and_columns_are_those_that_run() -> None:
    for table, rows in FIGURES.items():
        assert set(rows) <= set(TABLES[table])
    main = {(c.task, c.dataset, c.metric) for columns in MAIN_COLUMNS.values() for c in columns}
    assert {(c.task, c.dataset, c.metric) for c in COLUMNS} <= main


def test_the_method_is_a_row_of_each_table() -> None:
    assert set(DEFAULTS) == set(PARAMETERS) == set(TABLES)
    base = _leaves(recipe_named("vits16"))
    for table, row in DEFAULTS.items():
        change = TABLES[table][row]
        assert all(base[f"{part}.{name}"] == value for part, fields in change.items() for name, value in fields.items())
