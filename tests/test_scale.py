"""Runs in 1, 2 and 4 ranks, replicated (DDP) or sharded (FSDP2), over gloo: one run, whatever it is trained in.

Resumed in the same world a run ends bit for bit the same. In another world it sees the same samples exactly, and
differs by the order of float32 additions alone. The largest differences measured after nine steps between any two of
1, DDP 2 and 4, FSDP 2 and 4 ranks, without stochastic depth: losses 2.3e-7 (relative), weights 3.1e-6 (norm of the
difference to norm), where nine steps move them by 2e-2.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.distributed.tensor import DTensor

from crisp.checkpoint import list_checkpoints
from crisp.config import KnnConfig, TrainConfig
from crisp.distributed import world_from_environment
from crisp.metrics import METRICS_FILE, read_metrics
from crisp.optim import gradient_norms, gradients_of
from crisp.runs import CHECKPOINTS, KNN_FILE
from crisp.training.state import build_state
from tests.ranks import Outcome, in_ranks, run
from tests.test_trainer import STEPS, assert_identical, final_state, shards, tiny

__all__ = ["shards"]  # a fixture

LOSS_TOLERANCE = 2e-6
"""Relative"""
WEIGHT_TOLERANCE = 2e-5
"""Of a network: norm of the difference to norm"""

Parallel = Literal["ddp", "fsdp"]
Whole = Callable[[int, Parallel], tuple[Path, list[Outcome]]]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Undisturbed runs, each trained once."""
    done: dict[tuple[int, Parallel], tuple[Path, list[Outcome]]] = {}
    folder = tmp_path_factory.mktemp("whole")

    def of(ranks: int, parallel: Parallel) -> tuple[Path, list[Outcome]]:
        if (ranks, parallel) not in done:
            config = replace(tiny(shards, folder / f"{parallel}-{ranks}"), parallel=parallel)
            done[ranks, parallel] = config.run_folder, finish(run(config, ranks))
        return done[ranks, parallel]

    return of


def finish(outcomes: list[Outcome], *, error: str | None = None) -> list[Outcome]:
    """The outcomes of ranks that all ended alike."""
    for outcome in outcomes:
        assert (outcome.error or "").split(":")[0] == (error or ""), outcome.error
    return outcomes


def samples(outcomes: list[Outcome]) -> dict[int, list[int]]:
    """Ids of each global batch, whoever rendered them."""
    return {step: sorted(i for o in outcomes for i in o.samples[step]) for step in outcomes[0].samples}


def assert_close(run: Path, other: Path) -> None:
    """Losses of every step and final weights within this file's tolerances."""
    one, two = read_metrics(run / METRICS_FILE), read_metrics(other / METRICS_FILE)
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, STEPS + 1))
    for a, b in zip(one, two, strict=True):
        for term in ("loss", "loss_cls", "loss_patch", "loss_region", "regions_valid"):
            assert a[term] == pytest.approx(b[term], rel=LOSS_TOLERANCE), (a["step"], term)
    state, other_state = final_state(run), final_state(other)
    for part in ("student", "teacher", "loss"):
        ours, theirs = (torch.cat([s[part][name].flatten() for name in sorted(s[part])]) for s in (state, other_state))  # type: ignore[attr-defined]
        assert (ours - theirs).norm() <= WEIGHT_TOLERANCE * theirs.norm(), part


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, "ddp"), (2, "fsdp"), pytest.param(4, "ddp", marks=pytest.mark.slow), (4, "fsdp")],
)
def test_every_world_trains_the_same_run(whole: Whole, ranks: int, parallel: Parallel) -> None:
    alone, outcomes_alone = whole(1, "ddp")
    run, outcomes = whole(ranks, parallel)
    assert samples(outcomes) == samples(outcomes_alone)
    assert all(len(ids) == 8 // ranks for outcome in outcomes for ids in outcome.samples.values())
    assert_close(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_cut_and_resumed_in_the_same_world_it_ends_bit_for_bit_the_same(
    shards: Path, tmp_path: Path, ranks: int, parallel: Parallel
) -> None:
    """With stochastic depth, in the epoch whose last layers are frozen and after it."""
    config = replace(tiny(shards, tmp_path / "whole"), parallel=parallel)
    undisturbed = finish(run(config, ranks))
    config = replace(config, out=tmp_path / "cut")
    finish(run(config, ranks, stop_after=3), error="StoppedError")
    finish(run(config, ranks, resume=True, stop_after=4), error="StoppedError")
    last = finish(run(config, ranks, resume=True))
    assert [outcome.samples for outcome in last] == [
        {step: ids for step, ids in outcome.samples.items() if step >= 6} for outcome in undisturbed
    ]
    assert_identical(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_moves_from_4_sharded_ranks_to_2_replicated_to_2_sharded_to_1(
    shards: Path, tmp_path: Path, whole: Whole
) -> None:
    config = tiny(shards, tmp_path / "moved")
    seen: dict[int, list[int]] = {}
    worlds: list[tuple[int, Parallel, int | None]] = [(4, "fsdp", 3), (2, "ddp", 3), (2, "fsdp", 3), (1, "ddp", None)]
    for ranks, parallel, stop_after in worlds:
        outcomes = run(replace(config, parallel=parallel), ranks, resume=ranks < 4, stop_after=stop_after)
        finish(outcomes, error="StoppedError" if stop_after else None)
        seen |= samples(outcomes)
    assert "resumed with 1 ranks, written by 2" in outcomes[0].log
    alone, outcomes_alone = whole(1, "ddp")
    assert seen == samples(outcomes_alone)
    assert_close(tmp_path / "moved", alone)


def test_a_file_of_one_rank_is_torn_and_all_go_on_from_the_checkpoint_before(shards: Path, tmp_path: Path) -> None:
    config = replace(tiny(shards, tmp_path / "run"), parallel="fsdp")
    finish(run(config, 2))
    ended = final_state(tmp_path / "run")
    torn = list_checkpoints(tmp_path / "run" / CHECKPOINTS)[-1]
    os.truncate(torn / "teacher" / "shard-00002-model-00001-of-00001.safetensors", 1000)
    outcomes = finish(run(config, 2, resume=True))
    assert [list(outcome.samples) for outcome in outcomes] == [[8], [8]]
    for outcome in outcomes:
        assert "truncated; restore it, or delete it to go on from the one before; going on from" in outcome.log
    assert_identical(final_state(tmp_path / "run"), ended)
    assert (torn.parent / f".damaged-{torn.name}").is_dir()


def test_a_rank_whose_disk_is_full_fails_that_save_on_all_and_training_goes_on(shards: Path, tmp_path: Path) -> None:
    config = replace(tiny(shards, tmp_path / "run"), keep_checkpoints=10)
    outcomes = finish(run(config, 2, fault="full at step 4"))
    assert [int(path.name[-2:]) for path in list_checkpoints(tmp_path / "run" / CHECKPOINTS)] == [2, 6, 8, 9]
    words = "not saved (rank 1: No space left on device); kept: step-00000002; make room"
    assert [words in outcome.log for outcome in outcomes] == [True, False], "the main rank says so"
    assert not list((tmp_path / "run" / CHECKPOINTS).glob(".partial-*"))


def test_a_rank_whose_disk_is_full_at_the_end_is_an_error_of_all(shards: Path, tmp_path: Path) -> None:
    """The write fails inside torch this time."""
    config = replace(tiny(shards, tmp_path / "run"), parallel="fsdp")
    outcomes = finish(run(config, 2, fault="full from step 4"), error="CrispError")
    for outcome in outcomes:
        assert outcome.error is not None
        assert "step-00000009: not saved (rank 1: No space left on device); kept: step-00000002" in outcome.error
    assert [path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()] == ["step-00000002"]


def test_ranks_that_see_different_checkpoints_do_not_start(shards: Path, tmp_path: Path) -> None:
    config = replace(tiny(shards, tmp_path / "run"), checkpoint_every=1)
    finish(run(config, 2, stop_after=1), error="StoppedError")
    for outcome in finish(run(config, 2, resume=True, fault="sees no checkpoint"), error="CrispError"):
        assert outcome.error is not None
        assert "(the newest: none, step-00000001); put the run on a file system that all nodes share" in outcome.error


def test_the_sharded_state_of_a_seed_is_the_replicated_one(shards: Path, tmp_path: Path) -> None:
    assert in_ranks(_compare_sharded, 4, tmp_path / "ranks", tiny(shards, tmp_path / "run")) == [None] * 4


def _compare_sharded(config: TrainConfig) -> None:
    with world_from_environment("cpu") as world:
        plain = build_state(config, world)
        sharded = build_state(replace(config, parallel="fsdp"), world)
        for network in ("student", "teacher"):
            theirs = dict(getattr(plain.networks, network).named_parameters())
            ours: dict[str, Any] = dict(getattr(sharded.networks, network).named_parameters())
            assert ours.keys() == theirs.keys()
            for name, parameter in ours.items():
                assert isinstance(parameter, DTensor), name
                assert torch.equal(parameter.full_tensor(), theirs[name]), name
        for p, q in zip(plain.networks.student.parameters(), sharded.networks.student.parameters(), strict=True):
            p.grad, q.grad = p.detach() + 1, q.detach() + 1
        # a rank's shards may be empty: a CLS token has one row
        torch.testing.assert_close(
            *(gradient_norms(gradients_of(s.networks.student.parameters())) for s in (sharded, plain))
        )


def test_the_online_knn_of_a_sharded_teacher_is_that_of_a_whole_one(shards: Path, tmp_path: Path) -> None:
    scores = []
    for ranks, parallel in ((2, "fsdp"), (1, "ddp")):
        knn = KnnConfig(every_epochs=3, val_shards=str(shards), k=3)
        config = replace(tiny(shards, tmp_path / f"{parallel}"), parallel=parallel, knn=knn)  # type: ignore[arg-type]
        finish(run(config, ranks))
        scores.append([line["top1"] for line in read_metrics(config.run_folder / KNN_FILE)])
    assert len(scores[0]) == 1
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train_sharded_as_replicated(shards: Path, tmp_path: Path, precision: Any) -> None:
    """Autocast casts the same operations; only the additions over ranks differ."""
    config = replace(tiny(shards, tmp_path), precision=precision)
    for parallel in ("ddp", "fsdp"):
        finish(run(replace(config, out=tmp_path / parallel, parallel=parallel), 2))
    ours, theirs = (read_metrics(tmp_path / parallel / METRICS_FILE) for parallel in ("fsdp", "ddp"))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-2)
