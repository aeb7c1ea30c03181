"""The table at the end: our rows beside the paper's, as Markdown and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crisp.ablate.config import AblateConfig
from crisp.ablate.evaluations import RowEvaluation, Values
from crisp.ablate.paper import COLUMNS, DEFAULTS, FIGURES, LEFT_OUT, PARAMETERS, TITLES, PaperFigure
from crisp.ablate.rows import Row
from crisp.ablate.runner import Failure
from crisp.evals.results import DIGITS, write_whole
from crisp.evals.tables import MISSING, difference, markdown_table

DEMO_NOTE = (
    "Scale demo: a tiny model, a few hundred crops, minutes of training. Our figures show that every row runs from its "
    "configuration to its score. They are no measure of the method, and not comparable with the paper's."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """A row as it came out."""

    name: str
    change: Mapping[str, Any]
    run: str
    log: str
    state: str
    """complete, or what is wrong with it"""
    ours: Values
    paper: Mapping[str, PaperFigure]


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationTable:
    """All of it."""

    table: str
    scale: str
    title: str
    rows: Sequence[TableRow]
    notes: Sequence[str]

    @property
    def columns(self) -> list[str]:
        """The paper's, then others of ours in the order in which they appear."""
        paper = [column.name for column in COLUMNS]
        shown = [name for name in paper if any(name in row.ours or name in row.paper for row in self.rows)]
        return [*shown, *dict.fromkeys(name for row in self.rows for name in row.ours if name not in paper)]


def make_table(
    config: AblateConfig,
    rows: Sequence[Row],
    evaluations: Sequence[RowEvaluation],
    failures: Mapping[str, Failure],
) -> AblationTable:
    """Read what the rows' folders hold; a row that failed keeps what there is of it."""
    paper = FIGURES.get(config.table, {})
    made = []
    for row in rows:
        ours: Values = {}
        for evaluation in evaluations:
            ours |= evaluation.read(row)
        failure = failures.get(row.name)
        made.append(
            TableRow(
                name=row.name,
                change=row.change,
                run=str(row.run),
                log=str(row.log),
                state=row.state() if failure is None else str(failure),
                ours=ours,
                paper=paper.get(row.name, {}),
            )
        )
    restored = any(figure.point_restored for row in made for figure in row.paper.values())
    notes = [
        *([DEMO_NOTE] if config.scale == "demo" else []),
        f"{LEFT_OUT[config.table]}",
        *(["The scan lost the decimal point of some of the paper's figures; it is put back."] if restored else []),
    ]
    return AblationTable(table=config.table, scale=config.scale, title=TITLES[config.table], rows=made, notes=notes)


def table_lines(table: AblationTable) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: each of the paper's columns as ours, the paper's and, at its scale, the difference."""
    papers = {column.name for column in COLUMNS}
    with_difference = table.scale == "paper"
    heads = ["row", "change"]
    for name in table.columns:
        heads += [name, "paper", *(["ours −"] if with_difference else [])] if name in papers else [name]
    lines = []
    for row in table.rows:
        change = ", ".join(f"{field} = {value}" for field, value in row.change.items())
        line = [row.name, change or "the default"]
        for name in table.columns:
            ours, theirs = row.ours.get(name), row.paper.get(name)
            line.append(MISSING if ours is None else f"{ours:.1f}")
            if name in papers:
                line.append(MISSING if theirs is None else f"{theirs.value:.1f}")
                if with_difference:
                    line.append("" if ours is None or theirs is None else difference(ours, theirs.value))
        lines.append(line)
    return heads, lines


def table_markdown(table: AblationTable) -> str:
    """A page."""
    parts = [f"# {table.title}\n", "Percent.\n", markdown_table(*table_lines(table))]
    parts += [f"{note}\n" for note in table.notes]
    if bad := [row for row in table.rows if row.state != "complete"]:
        parts.append("Not complete:\n\n" + "".join(f"- {row.name}: {row.state}\n" for row in bad))
    return "\n".join(parts)


def table_json(table: AblationTable) -> str:
    """The same for programs; figures rounded as in results."""
    rows = [
        {
            "row": row.name,
            "change": dict(row.change),
            "run": row.run,
            "log": row.log,
            "state": row.state,
            "ours": {name: round(value, DIGITS) for name, value in row.ours.items()},
            "paper": {name: figure.value for name, figure in row.paper.items()},
        }
        for row in table.rows
    ]
    plain = {"table": table.table, "scale": table.scale, "title": table.title, "notes": list(table.notes), "rows": rows}
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def curve_json(table: AblationTable) -> str:
    """As `crisp viz curves --table` reads it: values and figures, and which row is the method's choice."""
    rows = [
        {
            "value": number_of(row.name),
            "scores": {name: round(value, DIGITS) for name, value in row.ours.items()},
            "paper": {name: figure.value for name, figure in row.paper.items()},
            "default": row.name == DEFAULTS[table.table],
        }
        for row in table.rows
    ]
    plain = {"title": table.title, "parameter": PARAMETERS[table.table], "rows": rows}
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def number_of(row: str) -> float | str:
    """A row's name, as a number where it is one."""
    try:
        return float(row)
    except ValueError:
        return row


def write_table(table: AblationTable, folder: Path) -> Path:
    """Write FOLDER/table.md, table.json and curve.json.

    Returns:
        The Markdown file.
    """
    write_whole(folder / "table.json", table_json(table))
    write_whole(folder / "curve.json", curve_json(table))
    write_whole(folder / "table.md", table_markdown(table))
    return folder / "table.md"
