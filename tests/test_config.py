"""Configs: JSON round trip, refusals, what a resumed run may change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from crisp.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, ViewsConfig, to_json, train_config_from_json
from crisp.errors import CrispError
from crisp.recipes import RECIPES, recipe_named
from crisp.runs import FREE_ON_RESUME, _leaves, check_free, check_resumable, create_run, read_run_config


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name: str) -> None:
    config = recipe_named(name)
    assert config.recipe == name
    assert RECIPES[name].__doc__
    assert train_config_from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ViewsConfig(global_px=100), r"views.global_px=100: must be a positive multiple"),
        (lambda: ViewsConfig(global_scale=(0.5, 0.2)), "global_scale"),
        (lambda: ViewsConfig(mask_ratio=(0.1, 1.5)), "mask_ratio"),
        (lambda: OptimConfig(epochs=5, warmup_epochs=10), "warmup_epochs=10"),
        (
            lambda: TrainConfig(optim=OptimConfig(global_batch=100)),
            "global_batch=100: must be a multiple of data.parts=8",
        ),
        (lambda: ViewsConfig(patch_px=0), "patch_px=0"),
        (lambda: ModelConfig(depth=0), "depth=0"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), "betas"),
        (lambda: OptimConfig(ema_momentum=(0.9, 1.5)), "ema_momentum"),
        (lambda: OptimConfig(clip_norm=-1.0), "clip_norm=-1.0"),
        (lambda: DataConfig(prefetch_batches=0), "prefetch_batches=0"),
        (lambda: recipe_named("vits17"), "'vits17': there is no such recipe; choose one of vits16"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, words: str) -> None:
    with pytest.raises(CrispError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_unknown_field_in_a_written_config_is_named() -> None:
    values = to_json(TrainConfig())
    values["model"]["wings"] = 2
    with pytest.raises(CrispError, match=r"config.json.model: unknown field \['wings'\]"):
        train_config_from_json(values)


def test_run_folder_is_made_once_and_read_back(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path / "r")
    check_free(tmp_path / "r")
    create_run(config)
    assert read_run_config(tmp_path / "r") == config
    with pytest.raises(CrispError, match="already holds a run"):
        check_free(tmp_path / "r")
    (tmp_path / "file").touch()
    with pytest.raises(CrispError, match="cannot be written"):
        create_run(TrainConfig(out=tmp_path / "file"))
    for damaged in ("[]", "{", '{"model": 3}'):
        (tmp_path / "r" / "config.json").write_text(damaged)
        with pytest.raises(CrispError, match="not a config"):
            read_run_config(tmp_path / "r")
    with pytest.raises(CrispError, match="not the folder of a run"):
        read_run_config(tmp_path)


def test_only_what_changes_no_sample_and_no_weight_may_change_on_resume(tmp_path: Path) -> None:
    written = TrainConfig()
    check_resumable(written, replace(written, data=replace(written.data, threads=7, shards=tmp_path), log_every=1))
    with pytest.raises(CrispError, match=r"model.arch=vit_base_patch16_224: the run has vit_small_patch16_224"):
        check_resumable(written, replace(written, model=ModelConfig(arch="vit_base_patch16_224")))
    with pytest.raises(CrispError, match="seed=1"):
        check_resumable(written, replace(written, seed=1))
    assert set(_leaves(written)) >= FREE_ON_RESUME, "every field named free exists"
