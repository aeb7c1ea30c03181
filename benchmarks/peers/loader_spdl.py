"""SPDL's pipeline, threads in one process, over a folder of images with torchvision's transforms of uint8 tensors.

    python loader_spdl.py < SPEC            (--check: only say whether it could run)

SPDL's own decoder wants FFmpeg's shared libraries, which no wheel brings; so images are decoded by torchvision, whose
libjpeg-turbo is as fast as a folder of JPEGs is decoded in such a script.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from clock import Opener, Spec, Views, run_script  # type: ignore[import-not-found]
from loader_recipes import Rendered, TensorRecipe  # type: ignore[import-not-found]
from spdl.pipeline import PipelineBuilder  # type: ignore[import-not-found]
from torch.utils.data import default_collate
from torchvision.io import ImageReadMode, decode_image

_BUFFERED = 2  # batches that wait to be taken


def prepare(spec: Spec) -> Opener:
    """A pipeline with as many threads as the others have."""
    recipe = TensorRecipe(spec["config"]["views"])
    threads, batch = spec["config"]["data"]["threads"], spec["config"]["optim"]["global_batch"]
    torch.set_num_threads(1)  # the pipeline's threads are the parallel ones

    def endless() -> Iterator[str]:
        files = sorted(str(path) for path in Path(spec["folder"]).rglob("*") if path.is_file())
        while True:
            yield random.choice(files)

    def render(path: str) -> Rendered:
        made: Rendered = recipe(decode_image(path, mode=ImageReadMode.RGB))
        return made

    def collate(samples: list[Rendered]) -> Views:
        reference, global_views, local_views = default_collate(samples)
        if spec["device"] == "gpu":
            reference = reference.pin_memory().cuda(non_blocking=True)
            global_views, local_views = (
                [view.pin_memory().cuda(non_blocking=True) for view in group] for group in (global_views, local_views)
            )
        return reference, global_views, local_views

    @contextmanager
    def open_pipeline() -> Iterator[Iterator[Views]]:
        pipeline = (
            PipelineBuilder()
            .add_source(endless())
            .pipe(render, concurrency=threads)
            .aggregate(batch)
            .pipe(collate)
            .add_sink(_BUFFERED)
            .build(num_threads=threads)
        )
        with pipeline.auto_stop():
            yield iter(pipeline)

    return open_pipeline


if __name__ == "__main__" and sys.argv[1:] != ["--check"]:
    run_script(prepare)
