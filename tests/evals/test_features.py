from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crisp.errors import CrispError
from crisp.evals.features import extract_features
from crisp.pipelines.shards import ShardSet
from crisp.shard_imagenet import ShardConfig, shard_imagenet


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, NDArray[np.uint8]]) -> Path:
    """Two class folders of odd sizes, upright, wide and gray."""
    folder = tmp_path_factory.mktemp("images")
    crops = {
        "cat/0.jpg": photographs["chelsea"][:200, :311],
        "cat/1.png": photographs["chelsea"][:, :97],
        "cup/0.jpg": photographs["coffee"][13:, 100:340],
        "cup/1.jpg": photographs["coffee"][:150, :150, 0],
        "cup/2.png": photographs["coffee"][:64, :400],
    }
    for name, pixels in crops.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def plain_prepare(path: Path, *, resize_px: int, crop_px: int) -> Tensor:
    """Shorter side to `resize_px`, middle square, normalised; written with PIL and NumPy alone."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    scale = resize_px / min(width, height)
    size = (resize_px, int(height * scale)) if width <= height else (int(width * scale), resize_px)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - crop_px) / 2), round((size[1] - crop_px) / 2)
    pixels = np.asarray(image.crop((left, top, left + crop_px, top + crop_px)), np.float32) / 255
    normalised = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(normalised.astype(np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_features_are_those_of_the_prepared_images_in_order(source: Path, tmp_path: Path, batch: int) -> None:
    shard_imagenet(ShardConfig(source=str(source), out=str(tmp_path / "shards"), shuffle="no", workers=1))
    seen: list[int] = []

    def flat(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.flatten(1)

    features, labels = extract_features(
        flat, ShardSet(tmp_path / "shards"), resize_px=72, crop_px=64, batch=batch, threads=2
    )
    expected = [plain_prepare(path, resize_px=72, crop_px=64) for path in sorted(source.rglob("*.*"))]
    assert labels.tolist() == [0, 0, 1, 1, 1]
    assert features.shape == (5, 3 * 64 * 64)
    assert max(seen) <= batch
    assert sum(seen) == 5
    for image, plain in zip(features.view(5, 3, 64, 64), expected, strict=True):
        torch.testing.assert_close(image, plain, atol=1e-5, rtol=0)


def test_refuses_images_without_labels_and_impossible_crops(source: Path, tmp_path: Path) -> None:
    shard_imagenet(ShardConfig(source=str(source / "cup"), out=str(tmp_path / "flat"), workers=1))
    shards = ShardSet(tmp_path / "flat")
    with pytest.raises(CrispError, match="3 of 3 images have no label"):
        extract_features(lambda images: images.flatten(1), shards)
    with pytest.raises(CrispError, match="crop_px=224: must lie between 1 and resize_px=200"):
        extract_features(lambda images: images.flatten(1), shards, resize_px=200)
