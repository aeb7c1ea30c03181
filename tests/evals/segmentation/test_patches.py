from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.errors import CrispError
from crisp.evals.segmentation.masks import read_mask
from crisp.evals.segmentation.patches import mode_labels, patch_pixels, prepare_image, prepare_mask


def test_patch_pixels_row_by_row() -> None:
    labels = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6)
    expected = [labels[i : i + 2, j : j + 2].ravel() for i in (0, 2) for j in (0, 2, 4)]
    np.testing.assert_array_equal(patch_pixels(labels, 2), expected)


def test_mode_labels() -> None:
    pixels = np.random.default_rng(0).integers(0, 5, size=(500, 9)).astype(np.uint8)
    pixels[0] = 255
    expected = [min(set(row.tolist()), key=lambda label: (-row.tolist().count(label), label)) for row in pixels]
    np.testing.assert_array_equal(mode_labels(pixels), expected)
    np.testing.assert_array_equal(mode_labels(pixels), torch.from_numpy(pixels).mode(dim=1).values)  # CAPI's


def test_ties_go_to_the_smallest_label() -> None:
    np.testing.assert_array_equal(mode_labels(np.array([[9, 3, 9, 3], [255, 0, 255, 0]], np.uint8)), [3, 0])


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_prepare_image_is_pil_bicubic(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34), dtype=np.uint8)  # gray, wide
    path = tmp_path / f"image{suffix}"
    exif = Image.Exif()
    exif[274] = 6  # turned: masks are stored as images are, so neither is turned
    Image.fromarray(pixels).save(path, exif=exif)
    expected = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(prepare_image(path, 32), np.asarray(expected))
    # torchvision's transforms, as CAPI composes them
    from torchvision import transforms

    resize = transforms.Resize((32, 32), interpolation=transforms.InterpolationMode.BICUBIC)
    np.testing.assert_array_equal(prepare_image(path, 32), np.asarray(resize(Image.open(path).convert("RGB"))))


def test_prepare_mask_makes_no_new_labels() -> None:
    labels = np.random.default_rng(0).choice([0, 7, 255], (37, 50)).astype(np.uint8)
    prepared = prepare_mask(Image.fromarray(labels), 32)
    rows, columns = ((np.arange(32) + 0.5) * side / 32 for side in labels.shape)
    np.testing.assert_array_equal(prepared, labels[rows.astype(int)][:, columns.astype(int)])


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_masks_of_one_byte(tmp_path: Path, mode: str) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (5, 7), dtype=np.uint8)
    mask = Image.fromarray(labels * 255).convert("1") if mode == "1" else Image.fromarray(labels)
    if mode == "P":
        mask.putpalette([9, 9, 9, 0, 0, 0])
    mask.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as file:
        assert file.mode == mode
    np.testing.assert_array_equal(np.asarray(read_mask(tmp_path / "mask.png")), labels)


@pytest.mark.parametrize("mode", ["RGB", "I;16", "LA"])
def test_other_masks_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "mask.png")
    with pytest.raises(CrispError, match="one id of one byte per pixel"):
        read_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("name", ["mask.png", "mask.mat"])
def test_damaged_masks(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither of the two" * 20)
    with pytest.raises(CrispError, match="cannot be read as a mask"):
        read_mask(tmp_path / name)


def test_a_truncated_image(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(CrispError, match=r"a\.png: cannot be read as an image"):
        prepare_image(tmp_path / "a.png", 32)
