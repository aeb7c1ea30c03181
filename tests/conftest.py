"""Fixtures for every folder of tests, and what holds for the whole run: threads, and warnings as errors."""

import os
from pathlib import Path

# Before torch, NumPy or OpenCV are imported, here and in what tests start: the test processes share the cores.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = str(max(1, len(os.sched_getaffinity(0)) // _WORKERS))
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, _THREADS)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the crisp command does

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from numpy.typing import NDArray  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """A warning raised by our own code, or aimed at it by a library it calls, is an error."""
    for package in ("crisp", "tests"):
        config.addinivalue_line("filterwarnings", rf"error:::{package}(\.|$)")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real photographs named by $CRISP_TEST_DATA; tests that want it are skipped where it is unset."""
    value = os.environ.get("CRISP_TEST_DATA")
    if not value:
        pytest.skip("CRISP_TEST_DATA is not set: it names a folder of real photographs (CONTRIBUTING.md)")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"CRISP_TEST_DATA={value}: no such folder")
    return folder


@pytest.fixture(scope="session")
def photographs() -> dict[str, NDArray[np.uint8]]:
    """Natural photographs that come with scikit-image and scikit-learn, RGB [h, w, 3], by name; read only."""
    from crisp.demo_images import load_rgb, wheel_photographs

    wanted = {"astronaut", "chelsea", "coffee", "china", "flower"}
    return {path.stem: load_rgb(path) for path in wheel_photographs() if path.stem in wanted}
