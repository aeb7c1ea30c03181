"""Encoded images from the rows of a Parquet file, a few at a time."""

import bisect
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from crisp.errors import CrispError
from crisp.storage import Location

_ROWS = 32  # decoded at a time
_BUFFER = 1024 * 1024  # read at a time; without, pyarrow reads whole columns of a row group


class Columns(NamedTuple):
    """Where a Parquet file has images and labels; names as in the file, with '.' within a struct."""

    image: str
    path: str | None
    """Of the image, as text"""
    label: str | None
    classes: tuple[str, ...]
    """Names by label, as the `datasets` library notes them; empty if it does not"""


def open_parquet(location: Location) -> Any:
    """As pyarrow.parquet.ParquetFile, which reads only the footer now.

    Raises:
        CrispError: pyarrow is not installed.
        OSError: it cannot be read, or is no Parquet file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CrispError(f"{location}: needs pyarrow; install 'crisp-ssl[parquet]'") from error
    file = str(location.local) if location.local is not None else location.open()
    try:
        return parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, memory_map=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise named(error, location, "no Parquet file, or cut short") from error


def named(error: Exception, location: Location, what: str) -> OSError:
    """An error of pyarrow's as one that names the file; those of the system do already."""
    if isinstance(error, OSError) and error.filename is not None:
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    return OSError(5, f"{what} ({reason})", str(location))


def find_columns(file: Any, where: str) -> Columns:
    """Columns of images and labels: `image` and `label`, or the only ones of these kinds that `datasets` noted.

    Raises:
        CrispError: no such image column, or labels that are no whole numbers.
    """
    import pyarrow as pa

    schema = file.schema_arrow
    features = _features(schema.metadata)
    image = _pick(schema.names, features, "image", "Image")
    label = _pick(schema.names, features, "label", "ClassLabel")
    kind = schema.field(image).type if image is not None else None
    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
    path = None
    if kind is not None and pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]:
        fields = {field.name: field.type for field in kind}
        if "path" in fields and (pa.types.is_string(fields["path"]) or pa.types.is_large_string(fields["path"])):
            path = f"{image}.path"
        image, kind = f"{image}.bytes", fields["bytes"]
    if image is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise CrispError(f"{where}: columns {found}; needs image, a struct of bytes and path, or binary")
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        raise CrispError(f"{where}: column {label} is {schema.field(label).type}; labels must be whole numbers")
    names = features.get(label, {}).get("names") if label is not None else None
    return Columns(image, path, label, tuple(map(str, names)) if isinstance(names, list) else ())


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """What `datasets` noted about each column; empty without."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: about for name, about in features.items() if isinstance(about, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _pick(names: list[str], features: dict[str, dict[str, Any]], name: str, kind: str) -> str | None:
    if name in names:
        return name
    noted = [column for column in names if features.get(column, {}).get("_type") == kind]
    return noted[0] if len(noted) == 1 else None


class ParquetRows:
    """Reads one image after the other.

    Rows in order cost what their bytes do. Any other row starts anew at the beginning of its row group, and decodes
    what comes before it there: cheap with the 100 rows per group that `datasets` writes, expensive with thousands. In
    memory are one page of the file (pyarrow writes up to 1024 rows to a page) and 32 rows.

    Args:
        location: of the file.

    Raises:
        CrispError, OSError: as `open_parquet` and `find_columns`.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._file = open_parquet(location)
        self._column = find_columns(self._file, str(location)).image
        groups = self._file.metadata.num_row_groups
        rows = (self._file.metadata.row_group(group).num_rows for group in range(groups))
        self._starts = [0, *itertools.accumulate(rows)]
        self._batches: Iterator[Any] = iter(())
        self._end = 0  # first row after the batch, and of the next one
        self._group = -1
        self._batch: Any = ()
        self._batch_at = 0

    def read(self, row: int) -> bytes | None:
        """The bytes of an image; None if the row has none.

        Raises:
            OSError: they cannot be read.
        """
        import pyarrow

        assert 0 <= row < self._starts[-1], f"row {row} of {self._starts[-1]}"
        try:
            self._go_to(row)
        except (pyarrow.ArrowException, OSError, StopIteration) as error:
            raise named(error, self._location, f"row {row} cannot be read") from error
        data: bytes | None = self._batch[row - self._batch_at].as_py()
        return data

    def _go_to(self, row: int) -> None:
        """Make the batch with this row the current one."""
        group = bisect.bisect_right(self._starts, row) - 1
        if group != self._group or row < self._batch_at:
            self._group, self._end = -1, self._starts[group]  # -1: a failure below leaves nothing half-read behind
            self._batch, self._batch_at = (), self._end
            self._batches = self._file.iter_batches(
                batch_size=_ROWS, row_groups=[group], columns=[self._column], use_threads=False
            )
        while row >= self._end:
            self._group = -1
            batch = next(self._batches).column(0)
            self._batch = batch.flatten()[0] if "." in self._column else batch
            self._batch_at, self._end = self._end, self._end + len(batch)
        self._group = group
