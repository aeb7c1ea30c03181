"""torchvision's recipe in a DataLoader: over a folder, with PIL or with tensors, and over WebDataset shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import webdataset as wds
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image

from crisp.benchmarks.peers.clock import Opener, Spec, Views
from crisp.benchmarks.peers.loader_recipes import PilRecipe, TensorRecipe
from crisp.shard_format import Codec, open_shards

_EXTENSIONS = ";".join(codec.extension for codec in Codec)


def folder_pil(spec: Spec) -> Opener:
    """iBOT's own loader: ImageFolder, PIL, DataLoader workers."""
    return lambda: _open_folder(spec, transform=PilRecipe(spec["config"]["views"]))


def folder_v2(spec: Spec) -> Opener:
    """The same with torchvision's JPEG decoder and its transforms of uint8 tensors."""
    return lambda: _open_folder(spec, transform=TensorRecipe(spec["config"]["views"]), loader=_decode)


def _decode(path: str) -> Any:
    return decode_image(path, mode=ImageReadMode.RGB)


@contextmanager
def _open_folder(spec: Spec, **arguments: Callable[..., Any]) -> Iterator[Iterator[Views]]:
    images: Any = ImageFolder(spec["folder"], **arguments)
    # Without end, as our order is: no pause between epochs.
    sampler = RandomSampler(images, replacement=True, num_samples=1 << 40)
    with _open_data_loader(images, spec, sampler=sampler) as batches:
        yield (views for views, _ in batches)


def webdataset_pil(spec: Spec) -> Opener:
    """WebDataset reads the tars one after another, each worker its own; PIL and the transforms as above."""
    shards = Path(spec["config"]["data"]["shards"])
    manifest, _ = open_shards(shards)
    tars = [str(shards / shard.name) for shard in manifest.shards]

    @contextmanager
    def open_tars() -> Iterator[Iterator[Views]]:
        samples = (
            wds.WebDataset(tars, resampled=True, shardshuffle=False)
            .shuffle(min(1000, manifest.samples))
            .decode("pilrgb")
            .to_tuple(_EXTENSIONS, "__key__")  # a flat folder has no labels
            .map_tuple(PilRecipe(spec["config"]["views"]))
        )
        with _open_data_loader(samples, spec) as batches:
            yield (views for views, _ in batches)

    return open_tars


@contextmanager
def _open_data_loader(samples: Any, spec: Spec, **arguments: Any) -> Iterator[Iterator[Any]]:
    batch, on_gpu = spec["config"]["optim"]["global_batch"], spec["device"] == "gpu"
    loader = DataLoader(samples, batch_size=batch, num_workers=spec["workers"], pin_memory=on_gpu, **arguments)
    batches = iter(loader)
    try:
        yield batches
    finally:
        del batches, loader  # ends the workers
