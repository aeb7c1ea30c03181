"""Rows as runs: each changes what the table says and nothing else, at both scales."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crisp.ablate.config import AblateConfig
from crisp.ablate.rows import DEMO_DEPTH, DEMO_EPOCHS, Row, expected_hours, plan_rows
from crisp.ablations import ABLATIONS, TABLES
from crisp.errors import CrispError
from crisp.recipes import recipe_named
from crisp.run_state import RecordedRun
from crisp.runs import _leaves, create_run


def planned(tmp_path: Path, table: Any, **options: Any) -> list[Row]:
    return plan_rows(AblateConfig(table=table, out=tmp_path / "out", **options))


@pytest.mark.parametrize("table", TABLES)
def test_demo_rows_differ_in_their_change_alone(tmp_path: Path, table: Any) -> None:
    rows = planned(tmp_path, table)
    assert [row.name for row in rows] == list(TABLES[table])
    base = _leaves(recipe_named("demo"))
    common = {
        "out", "device", "data.shards", "optim.epochs", "optim.warmup_epochs", "knn.every_epochs", "knn.k",
        "knn.val_shards", "model.depth",
    }  # fmt: skip
    for row in rows:
        leaves = _leaves(row.config)
        differing = {name for name, value in leaves.items() if value != base[name]}
        assert differing <= common | set(row.change)
        assert all(leaves[name] == value for name, value in row.change.items())
        assert row.config.optim.epochs == DEMO_EPOCHS
        assert row.run == tmp_path / "out" / table / row.name
        assert row.config.run_folder == row.run
        assert row.config.region.blocks <= (row.config.model.depth or 12)
    depths = {row.config.model.depth for row in rows}
    assert depths == ({DEMO_DEPTH} if table == "layers" else {base["model.depth"]})
    assert len({str(replace(row.config, out=None)) for row in rows}) == len(rows) - _defaults(rows)


def _defaults(rows: list[Row]) -> int:
    """Rows beyond the first that the demo's defaults make equal to another (heads: the method's default is no row)."""
    return len(rows) - len(
        {tuple(sorted((k, str(v)) for k, v in _leaves(row.config).items() if k != "out")) for row in rows}
    )


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.name)
def test_paper_rows_are_the_recipes(tmp_path: Path, ablation: Any) -> None:
    (row,) = planned(
        tmp_path, ablation.table, rows=(ablation.row,), scale="paper", shards="/data/train", init_weights="ibot.pth"
    )
    expected = replace(
        recipe_named(ablation.name),
        out=row.run,
        data=replace(row.config.data, shards="/data/train"),
        init=replace(row.config.init, weights="ibot.pth"),
    )
    assert row.config == expected
    assert row.train_command(gpus=1)[3:5] == ["train", ablation.name]
    assert expected_hours(row, scale="paper") == pytest.approx(50 * 49 / 60)


def test_commands(tmp_path: Path) -> None:
    (row,) = planned(tmp_path, "norm", rows=("shared",), train=("optim.micro-batch=4", "data.read_threads=2"))
    assert "--model.shared-norm" in row.options
    assert row.config.model.shared_norm
    assert row.config.optim.micro_batch == 4
    alone, four = row.train_command(gpus=1), row.train_command(gpus=4, extra=("--data.threads", "3"))
    assert alone[1:4] == ["-m", "crisp", "train"]
    assert four[1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "crisp"]
    assert four[-2:] == ["--data.threads", "3"]
    create_run(row.config)
    resumed = row.train_command(gpus=1)
    assert resumed[3:6] == ["train", "--resume", str(row.run)]
    assert resumed[resumed.index("--optim.micro-batch") :][:2] == ["--optim.micro-batch", "4"]
    assert "--model.shared-norm" not in resumed  # it is in the run's config


def test_what_a_folder_holds(tmp_path: Path) -> None:
    (row,) = planned(tmp_path, "norm", rows=("shared",))
    assert row.state() == "new"
    assert expected_hours(row, scale="demo") > 0
    create_run(row.config)
    assert row.state() == "begun"
    record = RecordedRun(row.run, steps=10)
    with record:
        with pytest.raises(CrispError, match="trains it right now"):
            planned(tmp_path, "norm", rows=("shared",))
        record.stopped("told to")
    assert row.state() == "begun"
    assert planned(tmp_path, "norm", rows=("shared",))[0].state() == "begun"
    with RecordedRun(row.run, steps=10):
        pass
    assert row.state() == "complete"
    assert expected_hours(row, scale="demo") == 0
    with pytest.raises(CrispError, match=r"seed=1: the run has 0.*--out"):
        planned(tmp_path, "norm", rows=("shared",), seed=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": ("3",)}, ("rows=3", "1, 2, 4, 6")),
        ({"rows": ("1", "1")}, ("twice",)),
        ({"epochs": 0}, ("epochs=0",)),
        ({"gpus_per_row": 0}, ("gpus_per_row=0",)),
        ({"scale": "paper"}, ("shards: not given",)),
        ({"scale": "paper", "shards": "s"}, ("init_weights: not given", "'none'")),
        ({"train": ("--optim.micro-batch",)}, ("FIELD=VALUE",)),
        ({"train": ("optim.micro-bath=3",)}, ("row 1", "--optim.micro-bath")),
        ({"train": ("optim.micro-batch=x",)}, ("row 1", "invalid literal")),
        ({"train": ("optim.micro-batch=-1",)}, ("row 1", "micro_batch=-1")),
        ({"imagenet": Path("i")}, ("list_10pct",)),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(CrispError) as caught:
        planned(tmp_path, "layers", **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
