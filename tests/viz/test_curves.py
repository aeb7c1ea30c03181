"""What runs and evaluations left, as curves; ablations as tables."""

import json
from pathlib import Path

import numpy as np
import pytest

from crisp.config import OptimConfig, TrainConfig
from crisp.errors import CrispError
from crisp.run_state import RunState, write_state
from crisp.runs import create_run
from crisp.viz.ablation_table import AblationRow, AblationTable, draw_ablation, read_table
from crisp.viz.curve_data import Curve, read_curves
from crisp.viz.curves import CurvesConfig, default_keys, draw_curves, picture

pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")


def result(path: Path, *, step: int, source: str, values: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = [{"metric": m, "value": v, "std": None, "settings": {}} for m, v in values.items()]
    model = {"name": f"CRISP vits16 step {step}", "source": source}
    path.write_text(json.dumps({"task": "seg-knn", "dataset": "voc2012", "model": model, "scores": scores}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four epochs of 10 steps, a line every five; k-NN at half; evaluations of two checkpoints."""
    folder = tmp_path / "run"
    create_run(TrainConfig(out=folder, optim=OptimConfig(epochs=4, warmup_epochs=1)))
    write_state(folder, RunState(state="complete", steps=40, host="", pid=1, began_ticks=0))
    lines = [
        {"step": s, "epoch": (s - 1) // 10, "loss": 40.0 - s, "loss_cls": float("nan") if s == 10 else s,
         "loss_region": 0.0, "images_per_s": 7}
        for s in range(5, 41, 5)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 45, "lo')
    (folder / "knn.jsonl").write_text('{"step": 20, "epoch": 1, "top1": 0.25, "k": 20}\n')
    result(folder / "evals" / "20" / "seg-knn-voc2012.json", step=20, source="x", values={"mIoU": 41.0, "other": 1.0})
    checkpoint = str(folder / "checkpoints" / "step-00000040")
    result(tmp_path / "more" / "a.json", step=40, source=checkpoint, values={"mIoU": 43.0})
    result(tmp_path / "more" / "b.json", step=30, source="runs/another", values={"mIoU": 99.0})
    (tmp_path / "more" / "c.json").write_text("[1]")
    return folder


def test_values_stand_at_their_epochs(run: Path, tmp_path: Path) -> None:
    curves = read_curves(run, [tmp_path / "more"])
    np.testing.assert_allclose(curves["loss"].epochs, np.arange(0.5, 4.1, 0.5))
    np.testing.assert_allclose(curves["loss"].values, 40 - np.arange(5, 41, 5))
    assert 1.0 not in curves["loss_cls"].epochs, "what was not finite is left out"
    assert (curves["knn"].epochs.tolist(), curves["knn"].values.tolist()) == ([2], [25])
    found = curves["seg-knn voc2012 mIoU"]
    assert (found.epochs.tolist(), found.values.tolist()) == ([2, 4], [41, 43]), "another run's is not taken"
    assert not found.logged
    assert "epoch" not in curves
    assert default_keys({"run": curves}) == ["loss", "loss_cls", "knn", "seg-knn voc2012 mIoU", "seg-knn voc2012 other"]


def test_a_run_from_before_state_json_is_read_too(run: Path) -> None:
    (run / "state.json").unlink()
    np.testing.assert_allclose(read_curves(run)["loss"].epochs, np.arange(0.5, 4.1, 0.5))


def test_every_run_has_its_line(run: Path) -> None:
    curves = read_curves(run)
    short = {"loss": Curve(epochs=np.arange(50.0), values=np.arange(50.0), logged=True)}
    panels = draw_curves({"one": curves, "two": short}, ["loss", "knn"]).axes
    assert len(panels[0].lines) == 1 + 2, "many lines are drawn thin and as their running mean"
    assert panels[0].lines[0].get_color() != panels[0].lines[2].get_color()
    np.testing.assert_allclose(panels[0].lines[0].get_xydata()[:, 1], curves["loss"].values)
    assert len(panels[1].lines) == 1
    assert [panel.get_title() for panel in panels[:2]] == ["total loss", "k-NN accuracy (%)"]


def test_wrong_keys_and_empty_runs_are_said(run: Path, tmp_path: Path) -> None:
    config = CurvesConfig(runs=(run,), keys=("lose",), out=tmp_path / "x.png")
    with pytest.raises(CrispError, match="keys='lose': no run has it; there are images_per_s, knn, loss"):
        picture(config)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(CrispError, match=r"no line in metrics\.jsonl yet"):
        read_curves(run)


TABLE = AblationTable(
    title="Threshold", parameter="β",
    rows=(
        AblationRow(value=0.9, scores={"VOC": 55.25}, paper={"VOC": 60.0}),
        AblationRow(value=0.4, scores={"VOC": 50.0, "k-NN": 33.3}),
        AblationRow(value=0.75, scores={"k-NN": 35.0}, paper={"VOC": 61.9}, default=True),
    ),
)  # fmt: skip


def test_random_regions_are_drawn_beside_those_that_were_found() -> None:
    rows = tuple(
        AblationRow(value=beta, scores={"purity": 50 + beta, "purity, random": 40 + beta, "valid": 60.0})
        for beta in (0.6, 0.75)
    )
    purity, valid, _ = draw_ablation(AblationTable(title="β", parameter="β", rows=rows)).axes[:3]
    assert [panel.get_title() for panel in (purity, valid)] == ["purity", "valid"]
    lines = {line.get_label(): line.get_ydata().tolist() for line in purity.lines}  # type: ignore[union-attr]
    assert lines == {"random": [40.6, 40.75], "ours": [50.6, 50.75]}


def test_an_ablation_has_a_curve_per_metric_and_a_table() -> None:
    voc, knn, table = draw_ablation(TABLE).axes
    paper, ours = voc.lines[:2]
    assert paper.get_xydata().tolist() == [[0.75, 61.9], [0.9, 60.0]], "in the order of the parameter"
    assert ours.get_xydata().tolist() == [[0.4, 50.0], [0.9, 55.25]]
    assert knn.lines[0].get_xydata().tolist() == [[0.4, 33.3], [0.75, 35.0]]
    assert [list(line.get_xdata()) for line in knn.lines[1:]] == [[0.75, 0.75]], "the default is marked"
    cells = [text.get_text() for text in table.texts]
    assert cells[:3] == ["β", "VOC", "k-NN"]
    assert cells[3:6] == ["0.9", "55.2 (60.0)", "– (–)"]
    assert cells[9:] == ["0.75", "– (61.9)", "35.0 (–)"]


def test_names_are_set_beside_each_other() -> None:
    rows = tuple(AblationRow(value=name, scores={"VOC": v}) for name, v in (("cls_apart", 1.0), ("shared", 2.0)))
    panel, table = draw_ablation(AblationTable(title="Heads", parameter="sharing", rows=rows)).axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["cls apart", "shared"]
    assert panel.lines[0].get_linewidth() == 0
    assert [text.get_text() for text in table.texts][2:] == ["cls apart", "1.0", "shared", "2.0"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a table of an ablation"),
        ('{"title": "a", "parameter": "b"}', "not a table"),
        ('{"title": "a", "parameter": "b", "rows": [{"value": 1, "score": {}}]}', "not a table"),
        ('{"title": "a", "parameter": "b", "rows": [{"value": 1, "scores": {}}]}', "no scores"),
        ('{"title": "a", "parameter": "b", "rows": [{"value": 1, "scores": {"x": "y"}}]}', "no numbers"),
    ],
)
def test_other_files_are_no_tables(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(CrispError, match=words):
        read_table(tmp_path / "t.json")
    with pytest.raises(CrispError, match="No such file"):
        read_table(tmp_path / "nowhere.json")
