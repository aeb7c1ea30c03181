"""litdata's `optimize` with PIL, in W workers of its own.

python shard_litdata.py IMAGES OUT --workers W --short-side 256 --quality 90
"""

import functools

from litdata import optimize  # type: ignore[import-not-found]
from shard_pil import Work, files_and_labels, run, smaller  # type: ignore[import-not-found]


def sample(item: tuple[str, int], work: Work) -> dict[str, object]:
    """What is stored of one image."""
    file, label = item
    encoded = smaller(file, work)
    return {
        "image": encoded.data,
        "label": label,
        "source": encoded.source,
        "height": encoded.height,
        "width": encoded.width,
    }


def contender(work: Work) -> int:
    """All workers; the number of images. Forked, though litdata's default is spawn: each would import torch anew."""
    files = files_and_labels(work.images)
    optimize(
        fn=functools.partial(sample, work=work),
        inputs=files,
        output_dir=str(work.out),
        num_workers=work.workers,
        chunk_bytes="64MB",
        start_method="fork",
        verbose=False,
    )
    return len(files)


if __name__ == "__main__":
    run(contender)
