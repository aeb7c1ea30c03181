"""The package as users get it: what wheel and sdist hold, and each form installed and run in and outside the clone."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from crisp import __version__

ROOT = Path(__file__).parents[1]
LINKS = {"pipelines": "../pipelines", "shard_imagenet": "../tools/shard_imagenet", "benchmarks": "../benchmarks"}
ASSETS = (".html", ".css", ".js")
HEAVY = ("torch", "torchvision", "timm", "numba", "nvidia", "cv2", "triton", "webdataset", "matplotlib", "numpy")

PROBE = """
import importlib, json
names = ["crisp", "crisp.cli", "crisp.pipelines.order", "crisp.shard_imagenet", "crisp.benchmarks"]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""


def run(*command: object, cwd: Path) -> str:
    """Output of a command that must succeed, without the environment's hints about where modules are."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_files() -> set[str]:
    """Modules, marker files and the report's assets, through the links, relative to the root."""
    return {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "crisp", followlinks=True)
        for name in names
        if name.endswith((".py", *ASSETS)) or name == "py.typed"
    }


def test_links_are_relative_and_point_to_the_folders_at_the_top() -> None:
    if not (ROOT / "pipelines").is_dir():
        pytest.skip("an unpacked sdist: it holds ordinary folders, not links")
    for name, target in LINKS.items():
        link = ROOT / "crisp" / name
        assert link.is_symlink()
        assert os.readlink(link) == target
        assert (link / "__init__.py").is_file()
    assert {path.name for path in (ROOT / "crisp").iterdir() if path.is_symlink()} == set(LINKS)


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["train", "--help"], ["bench", "--help"], ["nonsense"]])
def test_help_loads_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from crisp.cli import main; main(sys.argv[2:]); "
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = run(sys.executable, "-c", program, ROOT, *command, cwd=tmp_path).rpartition("LOADED")[2].split()
    assert "crisp" in loaded
    assert not set(HEAVY) & set(loaded)


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", out, ROOT, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel=wheel, sdist=sdist)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_beside_it(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    assert {name.split("/")[0] for name in names} == {"crisp", f"crisp_ssl-{__version__}.dist-info"}
    ours = {name for name in names if name.startswith("crisp/")}
    assert {name for name in ours if name.endswith((".py", "py.typed", *ASSETS))} == source_files()
    assert {"crisp/py.typed", *(f"crisp/report/assets/page{ending}" for ending in ASSETS)} <= ours
    assert not {name for name in ours if name.endswith((".pyc", ".nbi", ".nbc"))}


@pytest.mark.slow
def test_the_sdist_holds_ordinary_files_and_what_a_packager_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    top = f"crisp_ssl-{__version__}/"
    assert all(member.name.startswith(top) for member in members)
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.removeprefix(top) for member in members}
    assert source_files() <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "docs/layout.md", "Makefile"} <= names
    assert {"constraints.txt", "tests/test_packaging.py"} <= names
    assert not {name for name in names if name.startswith("runs/") or name.endswith(".pyc")}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["wheel", "sdist", "editable"])
def test_installed_forms_run_inside_and_outside_of_the_clone(form: str, built: Built, tmp_path: Path) -> None:
    venv, outside = tmp_path / "venv", tmp_path / "elsewhere"
    outside.mkdir()
    run(sys.executable, "-m", "venv", venv, "--without-pip", cwd=tmp_path)
    python = venv / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=outside).strip())
    # The dependencies of the running environment, and pip; not its own crisp, which is editable: a path that a .pth
    # file adds has its own .pth files left unread.
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    source = {"wheel": [built.wheel], "sdist": [built.sdist], "editable": ["-e", ROOT]}[form]
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed",
        "--disable-pip-version-check", *source, cwd=outside)  # fmt: skip

    installed = ROOT if form == "editable" else site
    for cwd, first_found in ((outside, installed), (ROOT, ROOT)):  # python -m and -c look into the folder they start in
        files = json.loads(run(python, "-c", PROBE, cwd=cwd))
        assert all(Path(file).is_relative_to(first_found / "crisp") for file in files.values()), files
        isolated = json.loads(run(python, "-I", "-c", PROBE, cwd=cwd))  # the crisp command doesn't
        assert all(Path(file).is_relative_to(installed / "crisp") for file in isolated.values()), isolated
        by_command = run(venv / "bin" / "crisp", "--help", cwd=cwd)
        assert run(python, "-m", "crisp", "--help", cwd=cwd) == by_command
        assert "usage: crisp COMMAND" in by_command
        assert run(venv / "bin" / "crisp", "--version", cwd=cwd) == f"crisp {__version__}\n"
