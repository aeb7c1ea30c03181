"""k-NN while a run goes on: it finds what a whole evaluation finds, disturbs nothing, and refuses bad data early."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crisp.checkpoint import list_checkpoints, load_module_state, load_weights
from crisp.config import KnnConfig
from crisp.errors import CrispError
from crisp.evals.features import extract_features
from crisp.evals.knn import knn_accuracy
from crisp.metrics import read_metrics
from crisp.models.student_teacher import build_student_teacher
from crisp.pipelines.shards import ShardSet
from crisp.runs import CHECKPOINTS, KNN_FILE
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.trainer import train
from tests.test_trainer import STEPS, as_arguments, assert_identical, final_state, shards, tiny

__all__ = ["shards"]  # a fixture


def steps_saved(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / CHECKPOINTS)]


def test_it_is_measured_per_epoch_equals_the_whole_evaluation_and_disturbs_nothing(
    shards: Path, tmp_path: Path
) -> None:
    without = train(tiny(shards, tmp_path / "without"))
    config = replace(tiny(shards, tmp_path / "with"), knn=KnnConfig(every_epochs=1, val_shards=str(shards), k=3))
    run = train(config)
    assert_identical(final_state(run), final_state(without))

    lines = read_metrics(run / KNN_FILE)
    assert [(line["step"], line["epoch"], line["k"]) for line in lines] == [(3, 0, 3), (6, 1, 3), (STEPS, 2, 3)]
    networks = build_student_teacher(config, torch.device("cpu"))
    load_weights(networks.teacher, load_module_state(list_checkpoints(run / CHECKPOINTS)[-1], "teacher"), source="")
    x, y = extract_features(networks.teacher.backbone.forward_cls, ShardSet(shards), resize_px=73, crop_px=64)
    assert lines[-1]["top1"] == knn_accuracy(x, y, x, y, k=(3,), classes=3)[3]
    # Those of measured steps are candidates for the best, which stays beside the two newest.
    best = max(lines, key=lambda line: (line["top1"], -line["step"]))["step"]
    assert set(steps_saved(run)) == {8, 9} | ({best} if best < STEPS else set())


def test_a_resumed_run_measures_what_was_missed_and_drops_later_scores(shards: Path, tmp_path: Path) -> None:
    config = replace(tiny(shards, tmp_path / "run"), knn=KnnConfig(every_epochs=1, k=3), keep_checkpoints=10)
    run = train(config)
    whole = read_metrics(run / KNN_FILE)
    for step in (6, 8, 9):
        shutil.rmtree(run / CHECKPOINTS / f"step-{step:08d}")
    shutil.rmtree(run / CHECKPOINTS / "step-00000004")
    (run / KNN_FILE).write_text(json.dumps(whole[1]) + "\n")  # that of step 3 was never made
    train(config, resume=True)
    again = read_metrics(run / KNN_FILE)
    assert [(line["step"], line["top1"]) for line in again] == [(line["step"], line["top1"]) for line in whole]


def test_multiples_stay_for_good(shards: Path, tmp_path: Path) -> None:
    run = train(replace(tiny(shards, tmp_path / "run"), keep_checkpoints=1, keep_every=4))
    assert steps_saved(run) == [4, 8, 9]


@pytest.mark.slow
def test_two_ranks_share_an_odd_number_of_images_and_find_the_same(shards: Path, tmp_path: Path) -> None:
    knn = KnnConfig(every_epochs=1, k=3, max_train=7)
    alone = train(replace(tiny(shards, tmp_path / "alone"), knn=knn))
    config = replace(tiny(shards, tmp_path / "two"), knn=knn)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "crisp", "train", "demo"]
    done = subprocess.run(
        [sys.executable, *launch, *as_arguments(config)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = [[line["top1"] for line in read_metrics(run / KNN_FILE)] for run in (alone, tmp_path / "two")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("wrong", ["no label", "other classes", "missing tar", "too few", "no folder"])
def test_what_cannot_be_classified_is_refused_before_the_run_begins(shards: Path, tmp_path: Path, wrong: str) -> None:
    knn, words = KnnConfig(every_epochs=1, k=3), wrong
    if wrong == "no label":
        (tmp_path / "flat").mkdir()
        for i, path in enumerate(sorted((shards.parent / "images").rglob("*.jpg"))):
            shutil.copy(path, tmp_path / "flat" / f"{i}.jpg")
        shard_imagenet(ShardConfig(source=str(tmp_path / "flat"), out=str(tmp_path / "other"), workers=1))
        knn, words = replace(knn, train_shards=str(tmp_path / "other")), "24 of the 24 images .* have no label"
    elif wrong == "other classes":
        shutil.copytree(shards.parent / "images", tmp_path / "two", ignore=shutil.ignore_patterns("china"))
        shutil.rmtree(next((tmp_path / "two").iterdir()))
        shard_imagenet(ShardConfig(source=str(tmp_path / "two"), out=str(tmp_path / "other"), workers=1))
        knn, words = replace(knn, val_shards=str(tmp_path / "other")), "give two splits of one data set"
    elif wrong == "missing tar":
        shutil.copytree(shards, tmp_path / "other")
        next((tmp_path / "other").glob("*.tar")).unlink()
        knn, words = replace(knn, val_shards=str(tmp_path / "other")), "No such file"
    elif wrong == "too few":
        knn, words = replace(knn, k=24), "too few"
    else:
        knn, words = replace(knn, train_shards=str(tmp_path / "nowhere")), "no such folder"
    with pytest.raises(CrispError, match=words):
        train(replace(tiny(shards, tmp_path / "run"), knn=knn))
    assert not (tmp_path / "run").exists()


def test_subsets_are_bounded_and_seeded_and_held_out_images_are_no_neighbours(shards: Path, tmp_path: Path) -> None:
    from crisp.distributed import World
    from crisp.training.online_knn import OnlineKnn

    world = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))
    config = replace(tiny(shards, tmp_path), knn=KnnConfig(every_epochs=1, k=3, max_train=7))
    one, other = OnlineKnn(config, world), OnlineKnn(config, world)
    assert len(one._train) == 7
    assert len(one._val) == 2
    assert not set(one._train.sample_ids) & set(one._val.sample_ids)
    assert np.array_equal(one._train.sample_ids, other._train.sample_ids)
    assert not np.array_equal(one._train.sample_ids, OnlineKnn(replace(config, seed=1), world)._train.sample_ids)
