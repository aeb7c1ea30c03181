"""Compiled functions where the machine code can and cannot be kept."""

import os
import subprocess
import sys

MODULE = """
from crisp.jit import compiled

@compiled
def double(x):
    return 2 * x
"""


def run_in(folder, **environment):
    (folder / "doubling.py").write_text(MODULE)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    return subprocess.run(
        [sys.executable, "-c", "import doubling; print(doubling.double(21), doubling.double.py_func(4))"],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_code_is_kept_beside_the_source(tmp_path):
    done = run_in(tmp_path)
    assert done.stdout.split() == ["42", "8"]
    assert done.stderr == ""
    assert list((tmp_path / "__pycache__").glob("*.nbc"))


def test_works_and_says_so_where_no_folder_can_be_written(tmp_path):
    (tmp_path / "__pycache__").write_text("a file, so that no folder can be made here, even by root")
    nowhere = "/dev/null/nowhere"
    done = run_in(tmp_path, HOME=nowhere, XDG_CACHE_HOME=nowhere, PYTHONDONTWRITEBYTECODE="1")
    assert done.stdout.split() == ["42", "8"]
    assert "double: compiled anew by every process" in done.stderr
    assert "set NUMBA_CACHE_DIR" in done.stderr


def test_code_is_kept_where_the_user_says(tmp_path):
    kept = tmp_path / "kept"
    source = tmp_path / "source"
    source.mkdir()
    run_in(source, NUMBA_CACHE_DIR=str(kept))
    assert list(kept.rglob("*.nbc"))
