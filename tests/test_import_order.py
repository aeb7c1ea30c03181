"""Imports point down only, proved from the syntax trees: those in functions and under TYPE_CHECKING count too."""

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room is a module or a folder right under crisp/. It may import itself and every layer below its own.
LAYERS = (
    {"__main__", "cli"},
    {"demo", "doctor", "ablate"},
    {"benchmarks", "report"},
    {"trainer"},
    {"training", "run_list"},
    {"viz"},
    {"evals", "export", "shard_imagenet", "demo_images"},
    {"interruption"},
    {"pipelines", "models", "losses", "regions", "optim", "checkpoint", "metrics", "progress", "runs"},
    {"ops", "distributed"},
    {"batch", "geometry", "masking", "shard_format", "schedules", "recipes", "ablations", "storage", "run_state"},
    {"config", "philox", "machine"},
    {"errors", "jit", "process_settings", "__init__"},
)

# What may look sideways in its own layer, and why.
PEERS = {
    ("__main__", "cli"): "python -m crisp is the same command",
    ("metrics", "runs"): "the names of the files in a run's folder",
    ("recipes", "ablations"): "the rows of ablations are recipes, too",
    ("losses", "models"): "a loss takes what the networks put out",
    ("models", "checkpoint"): "a trained network is read from a checkpoint",
    ("models", "runs"): "and built as the config of its run says",
}

# Rooms that never reach torch, whatever they import: the command line and its errors come fast, sharding stays light.
TORCH_FREE = {
    "cli",
    "process_settings",
    "config",
    "recipes",
    "geometry",
    "masking",
    "shard_format",
    "shard_imagenet",
    "schedules",
    "runs",
    "run_list",
    "run_state",
    "storage",
    "ablations",
}


@dataclass(frozen=True)
class Import:
    """An import statement: what it names, and where it stands."""

    importer: str
    imported: str
    line: int
    deferred: bool
    """Inside a function or under TYPE_CHECKING, so not run when the module is imported"""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """All modules of the package by dotted name, through the links."""
    found = {}
    for path in sorted(p for p in walk(ROOT / "crisp") if p.suffix == ".py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def walk(folder: Path) -> Iterator[Path]:
    """Files under a folder; `Path.rglob` doesn't follow links."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


def imports_of(name: str, path: Path) -> Iterator[Import]:
    """Every import statement of a file; `from a import b` names a.b where that is a module, else a."""
    tree = ast.parse(path.read_text(), str(path))
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    known = MODULES if name.startswith("crisp") else {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import; write crisp.…"
            module = node.module or ""
            targets = [f"{module}.{a.name}" if f"{module}.{a.name}" in known else module for a in node.names]
        else:
            continue
        yield from (Import(name, target, node.lineno, id(node) in deferred) for target in targets)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


MODULES = modules()
IMPORTS = [found for name, path in MODULES.items() for found in imports_of(name, path)]
INTERNAL = [found for found in IMPORTS if found.imported.split(".")[0] == "crisp"]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def test_every_room_has_its_layer() -> None:
    assert sum(map(len, LAYERS)) == len(LEVEL), "a room stands in two layers"
    assert {room(name) for name in MODULES} == set(LEVEL)


def test_imports_point_down() -> None:
    wrong = [
        str(found)
        for found in INTERNAL
        if (ours := room(found.importer)) != (theirs := room(found.imported))
        and LEVEL[theirs] <= LEVEL[ours]
        and (ours, theirs) not in PEERS
    ]
    assert not wrong, "\n".join(wrong)


def test_peers_are_needed_and_without_circles() -> None:
    used = {(room(found.importer), room(found.imported)) for found in INTERNAL}
    assert set(PEERS) <= used, "a permission that nothing uses"
    graph: dict[str, set[str]] = {}
    for ours, theirs in used:
        if ours != theirs:
            graph.setdefault(ours, set()).add(theirs)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_modules_of_a_room_do_not_import_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for found in INTERNAL:
        if not found.deferred and found.imported != found.importer:
            graph.setdefault(found.importer, set()).add(found.imported)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_torch_free(name: str) -> None:
    """Through every module that importing the room would load. The command line's deferred imports are its point."""
    with_deferred = name != "cli"
    seen = {module for module in MODULES if room(module) == name}
    waiting = list(seen)
    while waiting:
        module = waiting.pop()
        for found in IMPORTS:
            if found.importer != module or (found.deferred and not with_deferred):
                continue
            top = found.imported.split(".")[0]
            assert top not in {"torch", "torchvision", "timm", "triton", "nvidia"}, f"{name} reaches {found}"
            if top == "crisp" and found.imported not in seen:
                seen.add(found.imported)
                waiting.append(found.imported)


def test_only_the_dali_files_import_dali() -> None:
    importers = {found.importer for found in IMPORTS if found.imported.split(".")[0] == "nvidia"}
    assert importers
    assert all(name.startswith("crisp.pipelines.dali") for name in importers), importers


def test_nothing_is_imported_under_a_second_name() -> None:
    everywhere = IMPORTS + [
        found for path in walk(ROOT / "tests") if path.suffix == ".py" for found in imports_of(path.stem, path)
    ]
    bare = {"pipelines", "tools", "benchmarks", "shard_imagenet"}
    wrong = [str(found) for found in everywhere if found.imported.split(".")[0] in bare]
    assert not wrong, "\n".join(wrong)


def test_imports_that_are_written_are_seen(tmp_path: Path) -> None:
    """The proof is worth what `imports_of` sees."""
    path = tmp_path / "module.py"
    path.write_text(
        "import crisp.trainer as t\n"
        "from crisp.models import vit\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from torch import Tensor\n"
        "def f():\n    def g():\n        import nvidia.dali.fn\n"
        "class C:\n    import crisp.viz\n"
    )
    assert [(found.imported, found.deferred) for found in imports_of("crisp.module", path)] == [
        ("crisp.trainer", False),
        ("crisp.models.vit", False),
        ("typing", False),
        ("torch", True),
        ("crisp.viz", False),
        ("nvidia.dali.fn", True),
    ]
