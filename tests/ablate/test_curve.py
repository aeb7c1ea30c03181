"""Curves: a panel for each column, the paper's points and random regions in the panel that they belong to."""

from typing import Any

from crisp.ablate.curve import curve_figure
from crisp.ablate.paper import FIGURES
from crisp.ablate.table import AblationTable, TableRow


def made(table: str, **ours: dict[str, float]) -> AblationTable:
    rows = [
        TableRow(name=name, change={}, run="r", log="l", state="complete", ours=values,
                 paper=FIGURES.get(table, {}).get(name, {}))
        for name, values in ours.items()
    ]  # fmt: skip
    return AblationTable(table=table, scale="paper", title="A title", rows=rows, notes=[])


def drawn(table: AblationTable) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    figure: Any = curve_figure(table)
    shown = [panel for panel in figure.axes if panel.axison]
    return {
        panel.get_title(): {
            line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist())
            for line in panel.lines
            if not line.get_label().startswith("_")
        }
        for panel in shown
    }


def test_panels_and_points() -> None:
    values = {"VOC k-NN": 51.0, "purity": 70.0, "purity, random": 60.0, "valid": 40.0, "size": 20.0}
    table = made("layers", **{"6": {**values, "VOC k-NN": 50.0}, "2": values})
    panels = drawn(table)
    assert list(panels) == ["VOC k-NN (%)", "purity (%)", "valid (%)", "size (%)"]
    assert panels["VOC k-NN (%)"] == {
        "ours": ([2, 6], [51, 50]),
        "paper": ([1, 4, 6], [55.6, 57.6, 56.4]),
    }
    assert panels["purity (%)"] == {"ours": ([2, 6], [70, 70]), "random": ([2, 6], [60, 60])}


def test_nothing_to_draw() -> None:
    assert curve_figure(made("heads", default={"VOC k-NN": 1.0})) is None
    assert curve_figure(made("layers", **{"1": {}})) is None
