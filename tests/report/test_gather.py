"""What is read from a run's folder, whole, bare and damaged."""

import json
import shutil
from pathlib import Path

import pytest

from crisp.errors import CrispError
from crisp.report.gather import differences, gather_run, gather_runs
from tests.report.folders import EVIL, bare_run, full_run, line, write_lines


def test_a_full_run(tmp_path: Path) -> None:
    run = gather_run(full_run(tmp_path / "run", threshold=0.6), "run")
    assert run.recipe == "demo"
    assert run.changes == {"region.threshold": (0.75, 0.6)}
    assert [one["step"] for one in run.metrics] == list(range(10, 121, 10))
    assert [one["top1"] for one in run.knn] == [0.12, 0.24]
    assert [(moment.step, sorted(moment.files)) for moment in run.moments] == [
        (60, ["pca", "regions"]),
        (120, ["pca", "regions"]),
    ]
    assert [start.step for start in run.starts] == [0, 60]
    assert run.damaged == [60]
    assert run.checkpoints == []
    assert (len(run.faults.replaced), run.faults.bad_samples, run.faults.kinds) == (2, 1, {"decode": 2})
    assert run.faults.unreadable_lines == 0
    assert run.quality is not None
    assert run.quality.values(EVIL, "found", "purity") == [{"step": 60, "purity": 0.61}, {"step": 120, "purity": 0.61}]
    assert run.quality.values(EVIL, "scattered", "purity") == []
    assert run.summary.state == "failed"


def test_a_bare_run(tmp_path: Path) -> None:
    run = gather_run(bare_run(tmp_path / "run"), "run")
    assert run.changes == {}
    assert (run.metrics, run.knn, run.moments, run.starts, run.checkpoints, run.damaged) == ([], [], [], [], [], [])
    assert (run.quality, run.moments_problem, run.event_files) == (None, "", 0)
    assert run.summary.state == "unknown"


def test_the_host_is_not_passed_on(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    state = json.loads((folder / "state.json").read_text())
    state["reason"] = "rank 3 (host-of-nobody, process 1): stands still"
    (folder / "state.json").write_text(json.dumps(state))
    assert gather_run(folder, "run").summary.reason == "rank 3 (its machine, process 1): stands still"


def test_a_recipe_that_is_gone(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "recipe": "of_last_year"}))
    assert gather_run(folder, "run").changes is None


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    a, b, c = (bare_run(tmp_path / name) for name in ("x/run", "y/run", "z"))
    assert [run.name for run in gather_runs([a, b, c])] == [str(a), str(b), "z"]
    with pytest.raises(CrispError, match="given twice"):
        gather_runs([a, tmp_path / "x" / ".." / "x" / "run"])
    with pytest.raises(CrispError, match="no run given"):
        gather_runs([])


def test_differences_between_runs(tmp_path: Path) -> None:
    a, b = bare_run(tmp_path / "a"), bare_run(tmp_path / "b", threshold=0.5)
    assert differences(gather_runs([a, b])) == ["region.threshold"]


def test_half_a_line_at_the_end_is_passed_over_and_damage_within_is_named(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 130, "lo')
    with (folder / "faults" / "rank-00000.jsonl").open("a") as file:
        file.write('{"step": 130, "ep')
    run = gather_run(folder, "run")
    assert run.metrics[-1]["step"] == 120
    assert (len(run.faults.replaced), run.faults.unreadable_lines) == (2, 1)
    for damaged in ('{"step": 1,\n', "[]\n", '{"loss": 2}\n'):
        (folder / "metrics.jsonl").write_text(damaged)
        with pytest.raises(CrispError, match=r"metrics\.jsonl: not lines of a run .*; restore"):
            gather_run(folder, "run")


def test_pictures_that_are_damaged_missing_or_elsewhere(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    pictures = folder / "pictures"
    (pictures / "step-00000060" / "regions.png").write_bytes(b"no picture")
    shutil.copy(pictures / "step-00000120" / "pca.png", tmp_path / "secret.png")
    index = json.loads((pictures / "index.json").read_text())
    index[1]["pca"] = "../../secret.png"  # a good image, but none of the run's
    index[1]["regions"] = "gone.png"
    (pictures / "index.json").write_text(json.dumps(index))
    run = gather_run(folder, "run")
    assert [(moment.step, list(moment.files)) for moment in run.moments] == [(60, ["pca"])]
    assert run.moments_problem.startswith("3 picture(s)")
    (pictures / "index.json").write_text('[{"step":')
    run = gather_run(folder, "run")
    assert not run.moments
    assert "cannot be read" in run.moments_problem


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"dataset": "a", "step": 1}]', '[{"step": 1, "found": {"purity": "a"}}]']
)
def test_region_quality_that_is_damaged(text: str, tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run")
    (folder / "region_quality.json").write_text(text)
    quality = gather_run(folder, "run").quality
    assert quality is not None
    assert not quality.lines
    assert "cannot be read" in quality.problem


def test_reports_of_steps_that_were_not_finite(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run")
    report = {"step": 40, "skipped_in_a_row": 20, "loss": {"cls": "nan"}, "gradients_not_finite": ["a", "b"]}
    (folder / "rank-00001-not-finite.json").write_text(json.dumps(report))
    assert gather_run(folder, "run").faults.not_finite == [{"rank": "00001", **report}]


def test_old_metrics_without_newer_values(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run")
    old = line(10)
    del old["gradient_norm"], old["steps_skipped"]
    write_lines(folder / "metrics.jsonl", [old])
    assert len(gather_run(folder, "run").metrics) == 1
