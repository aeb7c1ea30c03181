"""MosaicML streaming's MDSWriter with PIL, in W processes, each with a folder of its own; then their index is merged.

python shard_mosaic.py IMAGES OUT --workers W --short-side 256 --quality 90
"""

from shard_pil import Work, every_nth_file, run, smaller  # type: ignore[import-not-found]
from streaming import MDSWriter  # type: ignore[import-not-found]
from streaming.base.util import merge_index  # type: ignore[import-not-found]

_COLUMNS = {"image": "bytes", "label": "int", "source": "str", "height": "int", "width": "int"}


def write(work: Work, number: int, files: list[tuple[str, int]]) -> None:
    """One process. Shards have the writer's default size, 64 MB."""
    with MDSWriter(out=str(work.out / f"{number:03d}"), columns=_COLUMNS) as writer:
        for file, label in files:
            encoded = smaller(file, work)
            writer.write(
                {
                    "image": encoded.data,
                    "label": label,
                    "source": encoded.source,
                    "height": encoded.height,
                    "width": encoded.width,
                }
            )


def contender(work: Work) -> int:
    """All processes; the number of images."""
    work.out.mkdir(parents=True)
    images: int = every_nth_file(write, work)
    merge_index(str(work.out), keep_local=True)
    return images


if __name__ == "__main__":
    run(contender)
