"""The page as text: every section always, names escaped, curves and size bounded, whole or absent."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from crisp.cli import main
from crisp.evals.results import write_result
from crisp.report.command import main as report
from crisp.report.config import ReportConfig
from crisp.report.curves import MOST_POINTS
from crisp.report.evaluations import gather_results
from crisp.report.gather import gather_runs
from crisp.report.page import render, sections_of
from crisp.report.sections import looks
from crisp.report.sections.looks import PICTURE_CHARACTERS
from tests.report.folders import EVIL, bare_run, draw_pictures, full_run, line, result, write_lines

SECTIONS = (
    "overview", "configuration", "losses", "knn", "pictures", "regions", "quality", "evaluations", "speed", "schedules",
    "health", "machine", "faults",
)  # fmt: skip


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text())
    return reader


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("make", [bare_run, full_run])
def test_every_section_is_there_and_says_something(make: object, runs: int, tmp_path: Path) -> None:
    folders = tuple(make(tmp_path / f"run{i}") for i in range(runs))  # type: ignore[operator]
    page = report(ReportConfig(runs=folders, out=tmp_path / "page.html"))
    reader = read(page)
    assert [attributes["id"] for tag, attributes in reader.tags if tag == "section"] == list(SECTIONS)
    found, others = gather_results(folders, ())
    for section in sections_of(gather_runs(folders), found, others):
        assert section.blocks, f"{section.id} is empty"


def test_a_bare_run_says_what_is_missing(tmp_path: Path) -> None:
    text = read(report(ReportConfig(runs=(bare_run(tmp_path / "bare"),)))).text
    for sentence in (
        "bare has logged no line yet", "Total loss: not logged by this run", "measured no k-NN accuracy",
        "drew no pictures", "no region_quality.json", "no result of crisp eval", "no machine.json",
        "the recipe demo as it stands",
    ):  # fmt: skip
        assert sentence in text


def test_names_are_escaped_wherever_they_come_from(tmp_path: Path) -> None:
    run = full_run(tmp_path / "<script>alert('run')<" / 'b onclick="x">\'&amp;')
    write_result(run / "evals", result(EVIL, source=EVIL, dataset="<img src=x onerror=alert(1)>"))
    (run / "evals" / "<i>.json").write_text("{}")
    reader = read(report(ReportConfig(runs=(run,), out=tmp_path / "page.html")))
    assert not {tag for tag, _ in reader.tags} & {"b", "i"}
    scripts = [attributes for tag, attributes in reader.tags if tag == "script"]
    assert all(attributes.get("type") == "application/json" for attributes in scripts[:-1])
    assert scripts[-1] == {}, "the page's own"
    assert not [attributes for _, attributes in reader.tags if any(name.startswith("on") for name in attributes)]
    assert all((attributes.get("src") or "").startswith("data:") for tag, attributes in reader.tags if tag == "img")
    for text in (EVIL, 'b onclick="x">\'&amp;', "<img src=x onerror=alert(1)>", "<i>.json"):
        assert text in reader.text, "and still read as they are"
    assert EVIL not in (tmp_path / "page.html").read_text()


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = report(ReportConfig(runs=(full_run(tmp_path / "run"),)))
    reader = read(page)
    assert page == tmp_path / "run" / "report.html"
    for _, attributes in reader.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
    text = page.read_text()
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)


def test_our_rows_stand_above_the_papers_with_the_differences(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    further = tmp_path / "others"
    write_result(further, result("iBOT", source="timm:ibot", value=22.5))
    write_result(further / "deeper", result("CRISP again", source=str(run / "checkpoints" / "step-1"), value=20.0))
    found, _ = gather_results([run], [further])
    assert [(one.result.model.name[:5], one.run) for one in found] == [("CRISP", 0), ("CRISP", 0), ("iBOT", None)]
    sections = {section.id: section for section in sections_of(gather_runs([run]), found, [])}
    table = sections["evaluations"].blocks[0]
    assert table.kind == "table"
    assert table.heads == ["model", "weights", "mIoU", "run −", "run −", "iBOT −"]
    assert [row[0] for row in table.rows[:3]] == ["run", "run", "iBOT"]
    assert table.rows[2][1] == "timm:ibot"
    paper = next(row for row in table.rows[3:] if row[:2] == ["iBOT", "ViT-S"])
    assert paper == ["iBOT", "ViT-S", "22.0", "+6.0", "−2.0", "+0.5"]


def test_long_runs_stay_short(tmp_path: Path) -> None:
    runs = [bare_run(tmp_path / name) for name in ("a", "b", "c")]
    lines = [line(step, loss=step**0.5 * 1.23456789, learning_rate=1 / (step + 7)) for step in range(1, 3001)]
    for run in runs:
        write_lines(run / "metrics.jsonl", lines)
    page = report(ReportConfig(runs=tuple(runs), out=tmp_path / "page.html"))
    assert page.stat().st_size + PICTURE_CHARACTERS < 10_000_000
    curves = [
        series.curve
        for section in sections_of(gather_runs(runs), [], [])
        for block in section.blocks
        if block.kind == "chart"
        for series in block.series
    ]
    assert len(curves) > 50
    assert all(len(curve) <= MOST_POINTS for curve in curves)
    assert all((curve.steps[0], curve.steps[-1]) == (1, 3000) for curve in curves)


def test_pictures_that_have_no_room_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bare_run(tmp_path / "run")
    draw_pictures(run, steps=tuple(range(1, 15)))
    monkeypatch.setattr(looks, "PICTURE_CHARACTERS", 20_000)
    reader = read(report(ReportConfig(runs=(run,))))
    shown = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert sum(len(attributes["src"] or "") for attributes in shown) <= 20_000
    assert f"{len(shown) // 2} of 14 pictures of kind regions have room here" in reader.text


def test_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = full_run(tmp_path / "run")
    page = report(ReportConfig(runs=(run,)))
    before = page.read_bytes()

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(Exception, match="No space left"):
        report(ReportConfig(runs=(run,)))
    assert page.read_bytes() == before


def test_names_that_are_no_text_do_not_stop_the_page(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run")
    page = render(sections_of(gather_runs([run]), [], ["\udcff.json"]), ["\udcff"], points=2000)
    assert "?.json" in page


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = full_run(tmp_path / "a"), bare_run(tmp_path / "b")
    assert main(["report", str(a), str(b), "--out", str(tmp_path / "both.html")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"report of 2 runs: 13 sections, 0\.\d MB", first)
    assert second == str(tmp_path / "both.html")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ("no run given", "crisp report runs/vits16")),
        (("{tmp}",), ("no config.json", "not the folder of a run")),
        (("{tmp}/run", "{tmp}/run"), ("given twice",)),
        (("{tmp}/run", "--out", "{tmp}"), ("a folder", "report.html")),
        (("{tmp}/run", "--evals", "{tmp}/nowhere"), ("nowhere", "no such folder")),
        (("{tmp}/run", "--out", "{tmp}/run/config.json/page.html"), ("cannot be written", "--out")),
    ],
)
def test_errors_are_one_line(
    args: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare_run(tmp_path / "run")
    assert main(["report", *(arg.format(tmp=tmp_path) for arg in args)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert all(word in error for word in words), error
