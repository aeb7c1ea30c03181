from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.features import LAST_BLOCKS, FrozenFeatures, Tokens, extract_features, has_cls
from crisp.evals.images import CentreCrop, FileImages, WholeImage, normalised
from crisp.evals.store import FeatureStore
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.shards import ShardSet
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from tests.evals.tiny_backbone import tiny_model


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


# -------------------------------------------------------------------------------------- features of a frozen backbone


def alone() -> World:
    return World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


def frozen(tokens: Tokens, **options: int | bool) -> FrozenFeatures:
    return FrozenFeatures(tiny_model(**options), tokens, side_px=32, device=torch.device("cpu"))


def test_each_kind_of_feature_is_made_of_its_tokens() -> None:
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = tiny_model(depth=5)
    pixels = normalised(images, mean=IMAGENET_MEAN, std=IMAGENET_STD, device=torch.device("cpu"))
    blocks = model.backbone(pixels, last=4)
    last = blocks[-1]
    assert last.cls is not None
    expected = {
        "cls": last.cls,
        "cls-last-4": torch.cat([block.cls for block in blocks if block.cls is not None], dim=1),
        "cls-mean": torch.cat([last.cls, last.patches.mean(1)], dim=1),
        "mean": last.patches.mean(1),
    }
    for tokens, value in expected.items():
        features = frozen(tokens, depth=5)  # type: ignore[arg-type]
        torch.testing.assert_close(features(images), value)
        assert features.width == value.shape[1]
    assert expected["cls-last-4"].shape[1] == LAST_BLOCKS * model.backbone.dim
    assert LAST_BLOCKS == 4


def test_half_precision_is_used_where_it_is_asked_for() -> None:
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact = frozen("cls-mean")(images)
    half = FrozenFeatures(tiny_model(), "cls-mean", side_px=32, device=torch.device("cpu"), precision="bfloat16")(
        images
    )
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1


def test_what_a_model_cannot_give_is_refused_before_the_work() -> None:
    assert has_cls(tiny_model())
    assert not has_cls(tiny_model(with_cls=False))
    with pytest.raises(CrispError, match=r"tokens=cls: the model has no \[CLS\] token; take --tokens mean"):
        frozen("cls", with_cls=False)
    with pytest.raises(CrispError, match="tokens=cls-last-4: tiny ViT has 2 blocks"):
        frozen("cls-last-4", depth=2)
    with pytest.raises(CrispError, match="patches of 14 px do not divide 32 px"):
        frozen("cls", patch_px=14)


def test_stored_features_are_computed_once_by_weights_images_and_preparation(source: Path, tmp_path: Path) -> None:
    images = FileImages(source, sorted(path.relative_to(source).as_posix() for path in source.rglob("*.*")))
    features, store = frozen("cls"), FeatureStore(tmp_path)
    calls: list[int] = []
    inner = features._of

    def counted(images: Any, numbers: NDArray[np.int64], *rest: Any) -> NDArray[np.float32]:
        calls.append(len(numbers))
        return inner(images, numbers, *rest)

    features._of = counted  # type: ignore[method-assign]

    def stored(prepare: CentreCrop | WholeImage, numbers: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        return features.stored(store, images, prepare, batch=2, threads=1, world=alone(), title="test", numbers=numbers)

    first = stored(WholeImage(32))
    np.testing.assert_array_equal(stored(WholeImage(32)), first)
    assert calls == [5]
    assert not np.array_equal(stored(CentreCrop(36, 32)), first)
    np.testing.assert_array_equal(stored(WholeImage(32), np.array([3, 1])), first[[3, 1]])
    assert calls == [5, 5, 2]
    for number in range(5):
        with Image.open(source / images.names[number]) as file:
            pixels = np.asarray(file.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
        alone_ = features(torch.from_numpy(pixels.copy())[None])[0]
        torch.testing.assert_close(torch.from_numpy(first[number].copy()), alone_, atol=1e-5, rtol=0)
