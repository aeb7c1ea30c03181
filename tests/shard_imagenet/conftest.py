import io
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def photo(seed: int, height: int = 40, width: int = 60) -> Image.Image:
    """Smooth but never flat, so that it compresses as photographs do."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, codec: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, codec, **options)
    return stream.getvalue()


@pytest.fixture
def own_fork_server() -> Iterator[None]:
    """What other tests have the process's fork server import, torch first of all, is not this tool's memory."""
    server = forkserver._forkserver
    before = server._preload_modules
    server._stop()
    yield
    server._stop()
    server.set_forkserver_preload(before)


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Twelve JPEGs in three classes, with equal names, spaces and letters beyond ASCII."""
    source = tmp_path / "source"
    for label, name in enumerate(("a b", "n01", "élan")):
        (source / name).mkdir(parents=True)
        for i in range(4):
            (source / name / f"Bild {i} ß.x.JPEG").write_bytes(encode(photo(10 * label + i)))
    return source


@pytest.fixture
def make_photo() -> Callable[..., Image.Image]:
    return photo


@pytest.fixture
def to_bytes() -> Callable[..., bytes]:
    return encode
