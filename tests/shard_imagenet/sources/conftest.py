import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import Entry, Listing
from crisp.shard_imagenet.reading import SourceReader
from crisp.shard_imagenet.sources import list_source


class Lister:
    """Lists a source, and reads back what it holds."""

    def __init__(self, tables: Path) -> None:
        self._tables = tables

    def __call__(self, source: Path | str, **choices: object) -> list[Listing]:
        self._tables.mkdir(exist_ok=True)
        return list_source(ShardConfig(source=str(source), out="unused", **choices), self._tables)  # type: ignore[arg-type]

    def one(self, source: Path | str, **choices: object) -> Listing:
        (listing,) = self(source, **choices)
        return listing

    @staticmethod
    def entries(listing: Listing) -> list[Entry]:
        return listing.entries(np.arange(len(listing)))

    def labels(self, listing: Listing) -> dict[str, int]:
        return {entry.name: entry.label for entry in self.entries(listing)}

    def files(self, listing: Listing) -> dict[str, bytes | None]:
        """Bytes by name."""
        reader = SourceReader(listing.containers)
        try:
            return {entry.name: reader.read(entry) for entry in self.entries(listing)}
        finally:
            reader.close()

    @staticmethod
    def rejected(listing: Listing) -> dict[str, str]:
        return dict(listing.rejections)


@pytest.fixture
def lister(tmp_path_factory: pytest.TempPathFactory) -> Lister:
    return Lister(tmp_path_factory.mktemp("tables"))


def tar_bytes(members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> bytes:
    """A tar as tarfile writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    """A member that is no regular file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


@pytest.fixture
def make_tar() -> Callable[..., bytes]:
    return tar_bytes


@pytest.fixture
def make_special() -> Callable[..., tuple[tarfile.TarInfo, bytes]]:
    return special


@pytest.fixture
def make_jpegs(make_photo: Callable, to_bytes: Callable) -> Callable[[int], list[bytes]]:
    """Small JPEGs, all of them different."""
    return lambda count: [to_bytes(make_photo(seed, 20, 30)) for seed in range(count)]
