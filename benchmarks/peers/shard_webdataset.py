"""The usual script: PIL and webdataset's ShardWriter, in W processes that write shards of their own.

python shard_webdataset.py IMAGES OUT --workers W --short-side 256 --quality 90
"""

import json

import webdataset as wds
from shard_pil import Work, every_nth_file, run, smaller  # type: ignore[import-not-found]

_SHARD_BYTES = 256 * 1024 * 1024


def write(work: Work, number: int, files: list[tuple[str, int]]) -> None:
    """One process."""
    pattern = str(work.out / f"part-{number:03d}-%06d.tar")
    with wds.ShardWriter(pattern, maxsize=_SHARD_BYTES, verbose=0) as writer:
        for i, (file, label) in enumerate(files):
            encoded = smaller(file, work)
            about = {"source": encoded.source, "height": encoded.height, "width": encoded.width}
            writer.write(
                {
                    "__key__": f"{i * work.workers + number:09d}",
                    "jpg": encoded.data,
                    "cls": str(label).encode(),
                    "json": json.dumps(about).encode(),
                }
            )


def contender(work: Work) -> int:
    """All processes; the number of images."""
    work.out.mkdir(parents=True)
    images: int = every_nth_file(write, work)
    return images


if __name__ == "__main__":
    run(contender)
