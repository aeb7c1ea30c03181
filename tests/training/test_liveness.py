"""Who is to blame, as a function of what was told and when."""

from dataclasses import replace

import pytest

from crisp.training.liveness import SLOW_FACTOR, Beat, Phase, Sightings, moved

TIMEOUT_S, INTERVAL_S = 10.0, 1.0


def at(rank: int, phase: Phase = Phase.TRAINING, *, step: int = 7, slow: bool = False) -> Beat:
    return Beat(rank=rank, host=f"node{rank}", pid=100 + rank, step=step, phase=phase, slow=slow)


def watch(beats: list[Beat], *, seconds: int, silent: tuple[int, ...] = ()) -> tuple[Sightings, float]:
    """Nobody moves; the silent ones have stopped beating, too."""
    sightings = Sightings(timeout_s=TIMEOUT_S, interval_s=INTERVAL_S)
    for now in range(seconds + 1):
        sightings.see([replace(b, number=0 if b.rank in silent else now) for b in beats], float(now))
    return sightings, float(seconds)


def blamed(sightings: Sightings, now_s: float) -> list[str]:
    return [line.split(" (")[0] for line in sightings.culprits(now_s, but=0)]


def test_the_one_behind_is_blamed_and_not_those_that_wait() -> None:
    beats = [at(0), at(1, Phase.WAITING_FOR_DATA), at(2)]
    assert blamed(*watch(beats, seconds=9)) == []
    sightings, now_s = watch(beats, seconds=11)
    assert sightings.culprits(now_s, but=0) == [
        "rank 1 (node1, process 101): 11 s without progress in waiting for data of step 7; 2 rank(s) wait for it"
    ]


def test_a_silent_one_is_blamed_alone_and_nobody_before() -> None:
    beats = [at(0), at(1), at(2)]
    assert blamed(*watch(beats, seconds=11, silent=(1,))) == ["rank 1"]
    # Quiet for a while only: the others may stand because of it.
    sightings, _ = watch(beats, seconds=5)
    for now in range(6, 12):
        sightings.see([replace(b, number=5 if b.rank == 1 else now) for b in beats], float(now))
    assert sightings.culprits(11.0, but=0) == []
    assert [line.split(" (")[0] for line in sightings.gone(11.0, but=0)] == ["rank 1"]


def test_all_are_named_where_all_stand_at_the_same_place() -> None:
    assert blamed(*watch([at(0), at(1)], seconds=11)) == ["rank 0", "rank 1"]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.TRAINING, Phase.SAVING, Phase.EVALUATING])
def test_slow_phases_get_more_time_and_those_that_wait_for_them_too(phase: Phase) -> None:
    beats = [at(0, phase, slow=True), at(1, Phase.TRAINING, step=8)]
    assert blamed(*watch(beats, seconds=SLOW_FACTOR * 10 - 1)) == []
    assert blamed(*watch(beats, seconds=SLOW_FACTOR * 10 + 1)) == ["rank 0"]


def test_parts_of_a_long_phase_count_as_progress() -> None:
    sightings, beat = Sightings(timeout_s=TIMEOUT_S, interval_s=INTERVAL_S), at(0, Phase.EVALUATING)
    for now in range(100):
        if now % 8 == 0:
            beat = moved(beat, step=beat.step, phase=beat.phase, slow=beat.slow)
        sightings.see([replace(beat, number=now)], float(now))
        assert sightings.culprits(float(now), but=0) == []


def test_a_failed_rank_is_blamed_at_once_and_one_that_left_never() -> None:
    failed = replace(at(1), ending="failed", reason="CrispError: no space")
    sightings, now_s = watch([at(0), failed, replace(at(2), ending="left"), replace(at(3), ending="lost")], seconds=1)
    assert sightings.culprits(now_s, but=0) == [
        "rank 1 (node1, process 101): failed in training of step 7: CrispError: no space"
    ]
    assert sightings.culprits(now_s, but=1) == []
    assert sightings.has_left(2)


def test_a_watcher_that_was_stopped_itself_blames_nobody() -> None:
    sightings, now_s = watch([at(0), at(1)], seconds=5)
    sightings.forget_times(now_s + 1000)
    assert sightings.culprits(now_s + 1001, but=0) == []


def test_beats_survive_the_store() -> None:
    beat = replace(at(3, Phase.SAVING), ending="failed", reason="ü")
    assert Beat.from_bytes(beat.to_bytes()) == beat
