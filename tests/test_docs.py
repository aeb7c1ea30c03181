"""What README and docs tell a reader to type is understood by the command line, and their extras and links exist."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from crisp import cli, runs
from crisp.recipes import recipe_named

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
PROGRAM = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:crisp|torchrun\b.* -m crisp|python -m crisp)\s+(?=\S)")


class Parsed(Exception):  # noqa: N818
    """The command line was understood; nothing is run."""


def blocks(page: Path, language: str) -> Iterator[str]:
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if found[1] == language:
            yield found[2]


def typed_commands() -> Iterator[tuple[Path, list[str]]]:
    """The words after `crisp` of every command in a block."""
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                if program := PROGRAM.match(line):
                    words = shlex.split(re.sub(r"\$[A-Z_]+", "0", line[program.end() :]), comments=True)
                    yield page, words[:-1] if words[-1] == "…" and not words[-2].startswith("--") else words


def mentioned_commands() -> Iterator[tuple[Path, list[str]]]:
    """The words after `crisp` of every command in running text, which may leave things out."""
    for page in [*PAGES, *RESULTS]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for command in re.findall(r"`([^`\n]+)`", text):
            if program := PROGRAM.match(command):
                yield page, [word for word in shlex.split(command[program.end() :]) if word != "…"]


def ids(value: Any) -> str:
    return value.name if isinstance(value, Path) else " ".join(value)


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    understand = tyro.cli

    def stop(*args: Any, **options: Any) -> None:
        understand(*args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)
    monkeypatch.setattr(runs, "read_run_config", lambda run: recipe_named("vits16"))


@pytest.mark.parametrize(("page", "words"), list(typed_commands()), ids=ids)
def test_what_a_page_says_to_type_is_understood(parse_only: None, page: Path, words: list[str]) -> None:
    if len(words) == 1 and words[0] in ("recipes", "eval", "bench", "viz"):  # they list what there is
        assert cli.main(words) == 0
        return
    with pytest.raises(Parsed):
        cli.main(words)


@pytest.mark.parametrize(("page", "words"), list(mentioned_commands()), ids=ids)
def test_what_a_page_mentions_exists(capsys: pytest.CaptureFixture[str], page: Path, words: list[str]) -> None:
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    names = [word for word in words if re.fullmatch(r"[a-z][a-z0-9-]*", word)][: 2 if words[0] in TABLES else 1]
    if not names:
        assert set(options) <= {"--help", "--version"}
        return
    assert names[0] in cli.COMMANDS
    if names[0] in TABLES and len(names) > 1:
        assert names[1] in TABLES[names[0]]
    if names[0] == "train":
        names = ["train", "vits16"]
    if set(options) - {"--help", "--resume"}:
        with pytest.raises(SystemExit) as ended:
            cli.main([*names, "--help"])
        assert ended.value.code == 0
        help_text = capsys.readouterr().out
        assert [option for option in options if option != "--resume" and option not in help_text] == []


TABLES = {"bench": cli.BENCHMARKS, "viz": cli.PICTURES, "eval": cli.EVALUATIONS}


def test_every_page_has_something_to_check() -> None:
    assert len(list(typed_commands())) > 25
    assert len(list(mentioned_commands())) > 25


def test_extras_that_pages_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for page in [*PAGES, *RESULTS, *(ROOT / "crisp").rglob("*.py")]
        for found in re.findall(r"crisp-ssl\[([a-z0-9,-]+)\]", page.read_text())
        for extra in found.split(",")
    }
    assert len(named) > 5
    assert named <= set(extras)


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_of_a_page_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="Sphinx is not installed: pip install 'crisp-ssl[docs]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    built = {page.stem for page in tmp_path.glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= built
