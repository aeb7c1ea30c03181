import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crisp.errors import CrispError
from crisp.evals.classification.command_linear import evaluate_linear
from crisp.evals.classification.data import open_splits
from crisp.evals.classification.linear import Schedule, check_schedule, folder_for
from crisp.evals.classification.protocol import CRISP_LRS, GRID_LRS
from crisp.evals.features import FrozenFeatures
from crisp.evals.results import result_json
from tests.evals.classification.evaluations import (
    alone,
    error_in_ranks,
    gathered_in_ranks,
    linear_config,
    linear_in_ranks,
    results_in_ranks,
    train,
)
from tests.evals.coloured import class_folders, colour_model
from tests.evals.tiny_backbone import tiny_model
from tests.ranks import in_ranks


class StoppedError(Exception):
    """The training was cut here, as a test wanted."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("pictures"))


def test_an_interrupted_training_ends_bit_for_bit_as_one_that_was_not(root: Path, tmp_path: Path) -> None:
    whole = train(root, tmp_path / "whole", alone())
    expected = whole.run()

    def stop(done: int) -> None:
        if done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(root, tmp_path / "cut", alone()).run(epoch_done=stop)
    again = train(root, tmp_path / "cut", alone())
    done: list[int] = []
    resumed = again.run(epoch_done=done.append)
    assert done == [3]
    np.testing.assert_array_equal(resumed.accuracy, expected.accuracy)
    np.testing.assert_array_equal(resumed.losses, expected.losses)
    for name, tensor in again.heads.state().items():
        assert torch.equal(tensor, whole.heads.state()[name]), name
    assert expected.accuracy.shape == (3, 5)
    assert expected.losses[0, 2] > expected.losses[2, 2]  # it learns


def test_a_damaged_checkpoint_is_passed_over(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = train(root, tmp_path, alone())
    expected = first.run()
    newest = max((tmp_path / "heads").glob("step-*"))
    next(newest.glob("heads/*.safetensors")).write_bytes(b"torn")
    again = train(root, tmp_path, alone())
    np.testing.assert_array_equal(again.run().accuracy, expected.accuracy)
    assert "truncated" in caplog.text
    for name, tensor in again.heads.state().items():
        assert torch.equal(tensor, first.heads.state()[name]), name


@pytest.mark.slow
def test_two_ranks_train_the_heads_of_one(root: Path, tmp_path: Path) -> None:
    one = train(root, tmp_path / "one", alone())
    expected = one.run()
    ranks = in_ranks(linear_in_ranks, 2, tmp_path / "ranks", str(root), str(tmp_path / "two"))
    assert [sorted({name.split(".")[1] for name in rank["state"]}) for rank in ranks] == [["0", "2", "4"], ["1", "3"]]
    together = {name: values for rank in ranks for name, values in rank["state"].items()}
    for name, tensor in one.heads.state().items():
        # Features are float32, of batches of other sizes.
        torch.testing.assert_close(torch.tensor(together[name], dtype=torch.float64), tensor, rtol=1e-5, atol=1e-6)
    for rank in ranks:
        np.testing.assert_array_equal(rank["accuracy"], expected.accuracy)
        np.testing.assert_allclose(rank["losses"], expected.losses, rtol=1e-5)
    # And one rank goes on with what two have written.
    for newest in (tmp_path / "two/heads").glob("step-00000003"):
        shutil.rmtree(newest)
    resumed = train(root, tmp_path / "two", alone())
    resumed.run()
    for name, tensor in one.heads.state().items():
        torch.testing.assert_close(resumed.heads.state()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4, 5])
def test_ranks_gather_rows_in_order(tmp_path: Path, count: int) -> None:
    for gathered in in_ranks(gathered_in_ranks, 2, tmp_path, count):
        assert gathered == [[row, row] for row in range(count)]


def test_both_evaluations_write_the_same_json_twice(root: Path, tmp_path: Path) -> None:
    first, second = (results_in_ranks(str(root), str(tmp_path / cache)) for cache in ("first", "second"))
    assert first == second
    assert len(first) == 2


@pytest.mark.slow
def test_a_damaged_image_stops_both_ranks(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "pictures")
    damaged = max((tmp_path / "pictures/train").rglob("*.JPEG"))
    damaged.write_bytes(b"\xff\xd8\xff no image")
    errors = in_ranks(error_in_ranks, 2, tmp_path / "ranks", str(tmp_path / "pictures"), str(tmp_path / "cache"))
    assert errors[0] == errors[1]
    assert f"{damaged.name}: cannot be decoded" in errors[0]


@pytest.mark.slow
def test_both_evaluations_write_the_same_json_in_two_ranks(root: Path, tmp_path: Path) -> None:
    alone_ = results_in_ranks(str(root), str(tmp_path / "one"))
    assert in_ranks(results_in_ranks, 2, tmp_path, str(root), str(tmp_path / "two")) == [alone_, alone_]


def test_perfect_features_give_100_and_constant_ones_a_third(root: Path, tmp_path: Path) -> None:
    perfect = evaluate_linear(linear_config(root, tmp_path, epochs=4), colour_model(), alone())
    assert perfect.scores[0].value == 100
    constant = evaluate_linear(linear_config(root, tmp_path, epochs=4), colour_model(constant=True), alone())
    assert [score.value for score in constant.scores] == [pytest.approx(100 / 3)] * 2


def test_the_result_says_what_was_chosen_and_how(root: Path, tmp_path: Path) -> None:
    result = evaluate_linear(linear_config(root, tmp_path, epochs=3), tiny_model(), alone())
    best, last = result.scores
    assert best.value >= last.value
    assert last.settings["epoch"] == 3
    assert result.chosen["lr"] == best.settings["lr"]
    assert "validation" in result.chosen["by"]
    assert len(result.settings["last_epoch_by_lr"]) == 45
    assert max(result.settings["last_epoch_by_lr"].values()) == pytest.approx(last.value, abs=1e-4)
    assert result.settings["lr_scale"] == 5 / 256
    assert (result.task, result.dataset) == ("linear", root.name.lower())
    # It is done: evaluated again, nothing is trained, and the same comes out.
    assert result_json(evaluate_linear(linear_config(root, tmp_path, epochs=3), tiny_model(), alone())) == result_json(
        result
    )


def test_another_training_has_another_folder(root: Path, tmp_path: Path) -> None:
    train, val = open_splits(root)
    features = FrozenFeatures(tiny_model(), "cls", side_px=224, device=torch.device("cpu"))
    schedule = Schedule(rates=(0.1,), epochs=2, global_batch=4, seed=0)
    folders = {
        folder_for(tmp_path, features, train, val, schedule),
        folder_for(tmp_path, features, val, train, schedule),
        folder_for(tmp_path, features, train, val, replace(schedule, epochs=3)),
        folder_for(tmp_path, features, train, val, replace(schedule, rates=(0.2,))),
        folder_for(tmp_path, features, train, val, replace(schedule, seed=1)),
        folder_for(
            tmp_path,
            FrozenFeatures(tiny_model(), "mean", side_px=224, device=torch.device("cpu")),
            train,
            val,
            schedule,
        ),
    }
    assert len(folders) == 6
    assert folder_for(tmp_path, features, train, val, schedule) in folders


def test_crisps_own_setting_and_ibots_grid() -> None:
    def schedule(**changes: Any) -> Schedule:
        return linear_config("", "", global_batch=1024, epochs=None, **changes).schedule

    assert schedule() == Schedule(rates=GRID_LRS, epochs=100, global_batch=1024, seed=0)
    assert schedule(heads="crisp") == Schedule(rates=CRISP_LRS, epochs=200, global_batch=1024, seed=0)


def test_what_cannot_be_trained_is_refused() -> None:
    def refused(**changes: int) -> str:
        values = {"epochs": 1, "global_batch": 4, "seed": 0, **changes}
        with pytest.raises(CrispError) as raised:
            check_schedule(Schedule(rates=(0.1,), **values), images=12)
        return str(raised.value)

    assert "epochs=0: must be at least 1" in refused(epochs=0)
    assert "global_batch=13: the 12 training images are fewer" in refused(global_batch=13)
