"""Recipes: what the ablations change, what the comparisons leave out, how they are listed."""

import pytest

from crisp.ablations import ABLATIONS, TABLES
from crisp.cli import main
from crisp.recipes import MAIN, RECIPES, recipe_named
from crisp.runs import _leaves


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.name)
def test_a_row_changes_what_it_says_and_nothing_else(ablation) -> None:
    base, row = _leaves(recipe_named("vits16")), _leaves(recipe_named(ablation.name))
    differing = {name for name, value in row.items() if value != base[name]}
    said = {f"{part}.{name}" for part, fields in ablation.change.items() for name in fields}
    assert differing - {"recipe", "optim.epochs"} <= said
    assert row["optim.epochs"] == 50
    assert row["optim.global_batch"] == 256
    for name in said:
        assert name in (RECIPES[ablation.name].__doc__ or "")


def test_the_papers_rows_are_there() -> None:
    assert list(TABLES["layers"]) == ["1", "2", "4", "6"]
    assert list(TABLES["blocks"]) == ["0", "1", "2", "4", "6"]
    assert {"0.4", "0.75", "0.99"} <= set(TABLES["threshold"])
    assert len(TABLES["heads"]) == 6
    for rows in TABLES.values():  # the method's own choice is a row of each
        assert any(not _differs(change) for change in rows.values())


def _differs(change: dict[str, dict[str, object]]) -> bool:
    base = _leaves(recipe_named("vits16"))
    return any(base[f"{part}.{name}"] != value for part, fields in change.items() for name, value in fields.items())


@pytest.mark.parametrize("size", ["vits16", "vitb16", "vitl16"])
def test_ibots_recipes_have_no_regions_and_share_what_ibot_shares(size: str) -> None:
    ibot, ours = recipe_named(f"ibot_{size}"), recipe_named(size)
    assert not ibot.region.enabled
    assert ibot.model.shared_norm
    assert (ibot.model.head_mlp, ibot.model.head_last_layer) == ("shared", "shared")
    assert ibot.model.arch == ours.model.arch
    assert ibot.views == ours.views
    assert ibot.optim.global_batch == 1024


def test_the_safe_start_is_slower_in_rate_and_teacher_alone() -> None:
    safe, base = _leaves(recipe_named("vits16_low_lr")), _leaves(recipe_named("vits16"))
    assert {name for name in base if safe[name] != base[name]} == {"recipe", "optim.base_lr", "optim.ema_momentum"}


def test_they_are_listed_and_told_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert main(["recipes", "vits16", "ablation_layers_6"]) == 0
    told = capsys.readouterr().out
    assert "163 hours" in told
    assert "region.blocks=6" in told
    assert "41 hours" in told
    assert main(["recipes", "vits17"]) == 1
    assert "'crisp recipes' lists them" in capsys.readouterr().err
    assert main(["train"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in MAIN)
    assert "ablation_" not in usage
