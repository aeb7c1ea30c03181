import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from crisp.evals.classification.augment import RandomCropFlip, epoch_order


def test_the_image_is_torchvisions_for_the_same_window(photographs: dict[str, NDArray[np.uint8]]) -> None:
    image = Image.fromarray(photographs["chelsea"])
    flipped = set()
    for number in range(6):
        crop = RandomCropFlip(3, 1, side_px=48)
        x, y, w, h = crop.window(number, height_px=image.height, width_px=image.width)
        expected = vision.resized_crop(image, y, x, h, w, [48, 48], InterpolationMode.BILINEAR)
        if crop.flips(number):
            expected = vision.hflip(expected)
        flipped.add(crop.flips(number))
        np.testing.assert_array_equal(np.asarray(crop(image, number)), np.asarray(expected))
    assert flipped == {True, False}


def test_windows_are_drawn_as_random_resized_crop_draws_them() -> None:
    height, width = 300, 400
    windows = np.array([RandomCropFlip(0, 0).window(i, height_px=height, width_px=width) for i in range(4000)])
    x, y, w, h = windows.T
    assert (x >= 0).all() and (y >= 0).all() and (x + w <= width).all() and (y + h <= height).all()  # noqa: PT018
    area, aspect = w * h / (height * width), w / h
    assert 0.075 < area.min() < 0.1
    assert area.max() <= 1
    assert abs(area.mean() - _torchvision_area(height, width)) < 0.02
    assert 0.74 < aspect.min() < 0.78
    assert 1.29 < aspect.max() < 1.35
    flips = [RandomCropFlip(0, 0).flips(i) for i in range(4000)]
    assert abs(np.mean(flips) - 0.5) < 4 * math.sqrt(0.25 / 4000)


def _torchvision_area(height: int, width: int) -> float:
    """Mean area of torchvision's own windows, which fall back and are rejected as ours are."""
    from torchvision.transforms import RandomResizedCrop

    blank = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(4000)]
    return float(np.mean([h * w for h, w in sizes]) / (height * width))


def test_draws_depend_on_seed_epoch_and_image_alone() -> None:
    def draws(seed: int, epoch: int, images: range) -> list[object]:
        crop = RandomCropFlip(seed, epoch)
        return [(crop.window(i, height_px=99, width_px=77), crop.flips(i)) for i in images]

    assert draws(1, 2, range(20)) == draws(1, 2, range(20))
    assert draws(1, 2, range(5, 9)) == draws(1, 2, range(20))[5:9]
    assert draws(1, 2, range(20)) != draws(1, 3, range(20))
    assert draws(1, 2, range(20)) != draws(2, 2, range(20))


def test_the_order_of_an_epoch_is_a_permutation_of_its_own() -> None:
    first, second = (epoch_order(50, seed=0, epoch=epoch) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()
    assert first.tolist() == epoch_order(50, seed=0, epoch=0).tolist()
