"""Labels of a flat folder from a CSV with the columns file and label."""

import csv
from pathlib import PurePosixPath

from crisp.errors import CrispError
from crisp.shard_imagenet.sources.wanted import MAX_LABEL, read_text

# First columns of a heading; the second may be called anything.
_HEADINGS = {"file", "filename", "file_name", "image", "imageid", "image_id", "path", "name", "id", "img"}


class CsvLabels:
    """Label texts by file. Names may lack the extension; of a label text with spaces the first word counts, as in
    Kaggle's `ImageId,PredictionString`, where boxes follow.

    Args:
        where: path or URL of the CSV.

    Raises:
        CrispError: it cannot be read, has a line without a label, or names a file twice with different labels.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._labels: dict[str, str] = {}
        self._unused: set[str] = set()
        for number, row in enumerate(csv.reader(read_text(where, "--labels").splitlines()), start=1):
            if not row or (number == 1 and row[0].strip().lower() in _HEADINGS):
                continue
            if len(row) < 2 or not row[1].strip():
                raise CrispError(f"{where}, line {number}: {','.join(row)!r} has no label; a line is file,label")
            name, label = row[0].strip(), row[1].split()[0]
            if self._labels.setdefault(name, label) != label:
                raise CrispError(
                    f"{where}, line {number}: {name} is {label} here and {self._labels[name]} before; keep one of them"
                )
        if not self._labels:
            raise CrispError(f"{where}: no line file,label in it; give a CSV with one line per image")
        self._unused.update(self._labels)

    @property
    def integers(self) -> bool:
        """All labels are whole numbers, and so the labels themselves; else they are class names."""
        return all(label.isdecimal() for label in self._labels.values())

    @property
    def largest(self) -> int:
        """The largest label, if they are whole numbers.

        Raises:
            CrispError: it is so large that it must be a mistake.
        """
        name, label = max(self._labels.items(), key=lambda item: int(item[1]))
        if int(label) > MAX_LABEL:
            raise CrispError(f"{self.where}: {name} has label {label}; labels are class names, or count from 0")
        return int(label)

    def take(self, name: str) -> str | None:
        """Label of a file by its path, its path without extension, or its bare name; None if it has none."""
        path = PurePosixPath(name)
        for candidate in (name, str(path.with_suffix("")), path.name, path.stem):
            if candidate in self._labels:
                self._unused.discard(candidate)
                return self._labels[candidate]
        return None

    @property
    def unused(self) -> list[str]:
        """Names that no file had so far, sorted."""
        return sorted(self._unused)
