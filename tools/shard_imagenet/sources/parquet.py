"""Parquet files as the `datasets` library writes them: image (bytes and path), and label if there is one.

They lie in the source, in a folder data of it, or in folders train and val. In one folder they belong to a split by
their names: train-…, validation-… or val-…; without such names all of them are one.
"""

from pathlib import Path
from typing import Any

from crisp.errors import CrispError
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import Listing, ListingWriter
from crisp.shard_imagenet.parquet_rows import Columns, find_columns, named, open_parquet
from crisp.shard_imagenet.sources.container_files import by_split, container_files, has_files, split_roots
from crisp.shard_imagenet.sources.wanted import MAX_LABEL, label_names, wanted_splits
from crisp.storage import Location

_SUFFIX = ".parquet"


def recognise(source: Location) -> bool:
    """A Parquet file, or a folder of them in one of the places above."""
    if not source.is_folder():
        return source.name.endswith(_SUFFIX)
    return (
        has_files(source, _SUFFIX)
        or ((source / "data").is_folder() and has_files(source / "data", _SUFFIX))
        or bool(split_roots(source, _SUFFIX))
    )


def list_splits(source: Location, cfg: ShardConfig, folder: Path) -> list[Listing]:
    """List the rows of the files in order of the files' names. Images are not read, only their paths and labels.

    Raises:
        CrispError: no file, other columns than expected, class names that differ between files, a label without a
            name; pyarrow is not installed.
        OSError: a file cannot be read.
    """
    if cfg.labels is not None:
        raise CrispError(f"labels={cfg.labels}: the labels of Parquet files lie in them; leave --labels out")
    files = _files(source, cfg)
    if cfg.split != "auto":
        files = {split: files[split] for split in wanted_splits(cfg, files)}
    names: tuple[str, ...] = ()
    writers, largest = {}, -1
    for split in sorted(files):
        if not files[split]:
            raise CrispError(
                f"{source}: no Parquet file of {split or 'train or val'} in it; give the folder of the .parquet files"
            )
        writers[split] = writer = ListingWriter(folder, split=split)
        for location in files[split]:
            file = open_parquet(location)
            columns = find_columns(file, str(location))
            if columns.classes and names and columns.classes != names:
                raise CrispError(f"{location}: other class names than the files before; shard them one by one")
            names = names or columns.classes
            largest = max(largest, _add_file(file, location, columns, writer))
    names = label_names(cfg, names, largest)
    return [writer.finish(layout="Parquet files", classes=names, by_class=False) for writer in writers.values()]


def _files(source: Location, cfg: ShardConfig) -> dict[str, list[Location]]:
    """Files by split."""
    if not source.is_folder():
        return {"": [source]}
    if roots := split_roots(source, _SUFFIX):
        return {split: [root / name for name in container_files(root, cfg, _SUFFIX)] for split, root in roots.items()}
    names = container_files(source, cfg, _SUFFIX)
    if not names and (source / "data").is_folder():
        source = source / "data"
        names = container_files(source, cfg, _SUFFIX)
    return by_split([source / name for name in names]) or {"": []}


def _add_file(file: Any, location: Location, columns: Columns, writer: ListingWriter) -> int:
    """Add the rows of a file; the largest label."""
    container = writer.add_container("parquet", location)
    row, largest = 0, -1
    for group in range(file.metadata.num_row_groups):
        size = _mean_size(file.metadata.row_group(group), columns.image)
        paths, labels = _paths_and_labels(file, location, group, columns)
        for path, label in zip(paths, labels, strict=True):
            name = f"{location.name}/{row}" + (f"/{path}" if path else "")
            if -1 <= label <= MAX_LABEL:
                writer.add(name, label=label, container=container, offset=row, size=size)
                largest = max(largest, label)
            else:
                writer.reject(name, f"label out of range: {label}")
            row += 1
    return largest


def _mean_size(group: Any, image: str) -> int:
    """Bytes of an image, uncompressed, on average."""
    for column in range(group.num_columns):
        chunk = group.column(column)
        if chunk.path_in_schema == image:
            return int(chunk.total_uncompressed_size) // max(group.num_rows, 1)
    raise AssertionError(f"{image} is a column of the schema")


def _paths_and_labels(file: Any, location: Location, group: int, columns: Columns) -> tuple[list[str], list[int]]:
    """Of one row group; '' and −1 where there is none."""
    import pyarrow as pa

    rows = file.metadata.row_group(group).num_rows
    wanted = [name for name in (columns.path, columns.label) if name is not None]
    if not wanted:
        return [""] * rows, [-1] * rows
    try:
        table = file.read_row_group(group, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise named(error, location, f"row group {group} cannot be read") from error
    paths, labels = [""] * rows, [-1] * rows
    if columns.path is not None:
        structs = table.column(columns.path.partition(".")[0]).combine_chunks()
        # Writers other than pyarrow do not check that text is UTF-8.
        binary = structs.flatten()[0].cast(pa.large_binary()).to_pylist()
        paths = [(path or b"").decode(errors="surrogateescape") for path in binary]
    if columns.label is not None:
        labels = [-1 if label is None else label for label in table.column(columns.label).to_pylist()]
    return paths, labels
