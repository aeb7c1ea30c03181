from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from crisp.demo_images import (
    CropConfig,
    load_rgb,
    wheel_photographs,
    write_crops,
    write_demo_images,
    write_own_images,
)
from crisp.errors import CrispError

FEW = CropConfig(train=2, test=1)
SAME_LIGHT = {"contrast": 1.0, "exposure": 1.0, "white_balance": 1.0}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_same_seed_same_bytes_and_another_seed_other_crops(tmp_path: Path) -> None:
    names = write_demo_images(tmp_path / "a", seed=3, crops=FEW)
    assert write_demo_images(tmp_path / "b", seed=3, crops=FEW) == names
    write_demo_images(tmp_path / "c", seed=4, crops=FEW)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())
    assert names == sorted(path.stem for path in wheel_photographs())
    assert len(a) == len(names) * (FEW.train + FEW.test)
    assert {name.split("/")[0] for name in a} == {"train", "test"}


def test_a_crop_depends_on_its_own_number_alone(tmp_path: Path, photographs: dict[str, NDArray[np.uint8]]) -> None:
    write_crops(photographs, tmp_path / "few", seed=0, crops=FEW)
    write_crops(photographs, tmp_path / "more", seed=0, crops=CropConfig(train=4, test=2))
    few, more = files(tmp_path / "few"), files(tmp_path / "more")
    assert few.items() <= more.items()
    assert len(set(more.values())) == len(more)


@pytest.mark.parametrize("width", [400, 401])
def test_training_and_test_crops_share_no_pixel(tmp_path: Path, width: int) -> None:
    # Left of the middle the photograph is red, right of it green, and the middle column of an odd width is blue.
    photograph = np.zeros((300, width, 3), np.uint8)
    photograph[:, : width // 2, 0] = 200
    photograph[:, width // 2 :, 2] = 200
    photograph[:, -(width // 2) :] = (0, 200, 0)
    crops = CropConfig(train=12, test=12, quality=100, **SAME_LIGHT)
    write_crops({"halves": photograph}, tmp_path, seed=0, crops=crops)
    for split, colour in (("train", (200, 0, 0)), ("test", (0, 200, 0))):
        for path in (tmp_path / split / "halves").iterdir():
            assert np.abs(load_rgb(path).astype(int) - colour).max() <= 3, path


def test_crops_have_the_sizes_asked_for(tmp_path: Path, photographs: dict[str, NDArray[np.uint8]]) -> None:
    write_crops(photographs, tmp_path, seed=0, crops=CropConfig(long_side_px=(100, 140), aspect=(0.5, 2.0)))
    sizes = [load_rgb(path).shape[1::-1] for path in tmp_path.rglob("*.jpg")]
    assert {max(size) for size in sizes} >= {100, 140}
    assert all(100 <= max(size) <= 140 for size in sizes)
    assert min(w / h for w, h in sizes) < 0.7
    assert max(w / h for w, h in sizes) > 1.3
    assert all(0.45 < w / h < 2.2 for w, h in sizes)


def test_light_changes_contrast_exposure_and_white_balance(tmp_path: Path) -> None:
    checks = np.where(np.indices((200, 400)).sum(axis=0) // 20 % 2, 148, 108).astype(np.uint8)
    photograph = np.repeat(checks[..., None], 3, axis=-1)

    def crops_under(name: str, **light: float) -> list[NDArray[np.float64]]:
        crops = CropConfig(**{**SAME_LIGHT, **light})  # type: ignore[arg-type]
        write_crops({"checks": photograph}, tmp_path / name, seed=0, crops=crops)
        return [load_rgb(path).astype(float) for path in (tmp_path / name).rglob("*.jpg")]

    def contrast_ratio(images: list[NDArray[np.float64]]) -> float:
        return max(image.std() for image in images) / min(image.std() for image in images)

    def means(images: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.array([image.mean((0, 1)) for image in images])  # [crop, channel]

    same = crops_under("same")
    assert contrast_ratio(same) < 1.2
    assert means(same).mean(axis=1).std() < 3
    assert means(same).std(axis=1).max() < 0.5
    assert contrast_ratio(crops_under("contrast", contrast=2.5)) > 3
    assert means(crops_under("exposure", exposure=1.5)).mean(axis=1).std() > 20
    assert means(crops_under("white", white_balance=1.25)).std(axis=1).mean() > 8


def test_own_images_are_classes_and_what_is_passed_over_is_said(
    tmp_path: Path, photographs: dict[str, NDArray[np.uint8]]
) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    Image.fromarray(photographs["chelsea"]).save(source / "cat.jpg")
    Image.fromarray(photographs["chelsea"][:, :, 0]).save(source / "cat.png")  # same stem, gray
    Image.fromarray(photographs["coffee"]).save(source / "cup.JPG", "JPEG")
    Image.fromarray(photographs["flower"]).save(source / "zinnia.webp")
    (source / "broken.jpg").write_bytes((source / "cat.jpg").read_bytes()[:900])
    Image.fromarray(photographs["coffee"][:100, :200]).save(source / "a-small.png")
    (source / "notes.txt").write_text("no image")

    names, passed_over = write_own_images(source, tmp_path / "out", seed=0, limit=3, crops=FEW)
    assert names == ["cat", "cat.png", "cup"]
    assert passed_over.keys() == {"broken.jpg", "a-small.png", "zinnia.webp"}
    assert passed_over["broken.jpg"].startswith("cannot be decoded")
    assert passed_over["a-small.png"] == "200x100: its halves are under 128 px"
    assert passed_over["zinnia.webp"] == "after the first 3 photographs"
    assert len(files(tmp_path / "out")) == 9


def test_own_photographs_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[:100] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the top of the scene is the right side of the pixels
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = load_rgb(tmp_path / "turned.png")
    assert upright.shape == (300, 200, 3)
    assert upright[:, 150:].min() == 255
    assert upright[:, :50].max() == 0


def test_own_images_that_cannot_make_a_demo(tmp_path: Path, photographs: dict[str, NDArray[np.uint8]]) -> None:
    with pytest.raises(CrispError, match="nowhere: no such folder"):
        write_own_images(tmp_path / "nowhere", tmp_path / "out", seed=0)
    with pytest.raises(CrispError, match="0 usable photographs, the demo needs at least 2"):
        write_own_images(tmp_path, tmp_path / "out", seed=0)
    Image.fromarray(photographs["coffee"]).save(tmp_path / "one.jpg")
    (tmp_path / "two.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(CrispError, match=r"1 usable photographs.*passed over: two\.jpg: cannot be decoded") as caught:
        write_own_images(tmp_path, tmp_path / "out", seed=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
