"""Fixtures for every folder of tests, and what holds for the whole run: threads, and warnings as errors."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from crisp.process_settings import SETTINGS

# Before torch, NumPy or OpenCV are imported, here and in what tests start: the test processes share the cores.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = str(max(1, len(os.sched_getaffinity(0)) // _WORKERS))
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, _THREADS)
for _name, _value in SETTINGS.items():  # as the crisp command does
    os.environ.setdefault(_name, _value)
# A shell that runs this in the background has it ignore Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from tests.faulty_http import Faults, faulty_proxy  # noqa: E402


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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, int]]:
    """Host and port of a real S3 API."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def store(s3_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """s3:// leads to a new bucket 'data' through a proxy that fails as its `choose` says; at first it never does."""
    import fsspec.config
    import s3fs

    from crisp import storage

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    faults = Faults(lambda number, method: None)
    with faulty_proxy(s3_server, faults) as url:
        # as a user configures fsspec for a store of their own
        options = {
            "endpoint_url": url,
            "config_kwargs": {"read_timeout": 1, "retries": {"max_attempts": 0}},
            "skip_instance_cache": True,
        }
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        storage._file_system.cache_clear()
        direct = s3fs.S3FileSystem(endpoint_url=f"http://{s3_server[0]}:{s3_server[1]}", skip_instance_cache=True)
        direct.mkdir("data")
        yield faults
        direct.rm("data", recursive=True)
        storage._file_system.cache_clear()
