"""metrics.jsonl of a run that was killed and resumed."""

from pathlib import Path

from crisp.metrics import METRICS_FILE, MetricsWriter, read_metrics


def test_resumed_run_drops_later_lines_and_half_lines(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, from_step=0)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.0 / step})
    writer.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3]
    resumed = MetricsWriter(tmp_path, from_step=2)
    resumed.write({"step": 3, "loss": 7.0})
    resumed.close()
    assert read_metrics(tmp_path / METRICS_FILE) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 7.0},
    ]
    assert list((tmp_path / "tensorboard").iterdir())
