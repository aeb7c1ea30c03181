"""The archive that a data set's server takes: palette PNGs by video, every frame that it asks for, and nothing else."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

from crisp.errors import CrispError
from crisp.evals.video.sequences import ArchiveRoot, VideoSequence

# The earliest that a zip can express: the same masks make the same bytes, whenever they are packed.
_TIME = (1980, 1, 1, 0, 0, 0)


def write_archive(path: Path, sequences: Sequence[VideoSequence], masks: Path, *, root: ArchiveRoot) -> None:
    """Pack masks, whole or not at all.

    Args:
        path: of the zip; one that is there is replaced.
        sequences: all of a split.
        masks: folder with a folder of masks per sequence.
        root: what stands before the videos' names in the zip: `Annotations/` for YouTube-VOS, nothing for MOSE and
            DAVIS.

    Raises:
        CrispError: a mask is missing, or the zip cannot be written.
    """
    members = [
        (f"{root}{sequence.name}/{sequence.mask_name(frame)}", masks / sequence.name / sequence.mask_name(frame))
        for sequence in sequences
        for frame in sequence.written
    ]
    for _, file in members:
        if not file.is_file():
            raise CrispError(f"{file}: this mask is missing on the main rank; choose an --out that all nodes share")
    partial = path.with_name(f".partial-{path.name}")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
            for name, file in sorted(members):
                archive.writestr(zipfile.ZipInfo(name, _TIME), file.read_bytes())
        partial.rename(path)
    except OSError as error:
        raise CrispError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from error
    finally:
        partial.unlink(missing_ok=True)
