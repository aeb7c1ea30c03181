"""A run meets steps that are not finite: it passes over a few, and stops with a report when they do not end."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import crisp.trainer
from crisp.batch import Batch
from crisp.checkpoint import list_checkpoints, load_module_state
from crisp.errors import CrispError
from crisp.metrics import METRICS_FILE, read_metrics
from crisp.runs import CHECKPOINTS
from crisp.trainer import train
from tests.test_trainer import STEPS, shards, tiny

__all__ = ["shards"]  # a fixture


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Put a value that is not finite into the images of some steps, counted from 0."""

    def spoil_steps(steps: set[int]) -> None:
        step = crisp.trainer.train_step

        def spoiled(state: Any, batch: Batch, schedule: Any) -> Any:
            if schedule.step in steps:
                views = batch.global_views.clone()
                views[0, 0, 0, 0, 0] = torch.nan
                batch = replace(batch, global_views=views)
            return step(state, batch, schedule)

        monkeypatch.setattr(crisp.trainer, "train_step", spoiled)

    return spoil_steps


def test_a_few_are_counted_and_passed_over(
    shards: Path, tmp_path: Path, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spoil({2, 3, 6})
    config = replace(tiny(shards, tmp_path / "run"), max_skipped_steps=3)
    with caplog.at_level(logging.WARNING):
        run = train(config)
    lines = read_metrics(run / METRICS_FILE)
    assert [line["steps_skipped"] for line in lines] == [0, 0, 1, 2, 2, 2, 3, 3, 3]
    assert "1 step(s) skipped since the last line, 3 in all" in caplog.text
    good = [line["loss"] for line in lines if line["step"] not in (3, 4, 7)]
    assert all(torch.tensor(good).isfinite())
    state = load_module_state(list_checkpoints(run / CHECKPOINTS)[-1], "student")
    assert all(value.isfinite().all() for value in state.values())


def test_too_many_in_a_row_end_the_run_with_a_report(shards: Path, tmp_path: Path, spoil: Any) -> None:
    spoil(set(range(4, STEPS)))
    config = replace(tiny(shards, tmp_path / "run"), max_skipped_steps=3)
    with pytest.raises(CrispError, match=r"step 7: 3 steps in a row had gradients that are not finite") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    report = json.loads((tmp_path / "run" / "rank-00000-not-finite.json").read_text())
    assert report["step"] == 7
    assert report["skipped_in_a_row"] == 3
    assert report["loss"]["cls"] == "nan"
    assert len(report["sample_ids_of_rank"]["0"]) == 8
    assert "backbone.cls_token" in report["gradients_not_finite"]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / CHECKPOINTS)] == [
        "step-00000004",
        "step-00000006",
    ]


def test_steps_apart_are_no_row(shards: Path, tmp_path: Path, spoil: Any) -> None:
    spoil({1, 3, 5, 7})
    lines = read_metrics(train(replace(tiny(shards, tmp_path / "run"), max_skipped_steps=2)) / METRICS_FILE)
    assert lines[-1]["steps_skipped"] == 4
