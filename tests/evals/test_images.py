from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from crisp.errors import CrispError
from crisp.evals.images import CentreCrop, FileImages, WholeImage, normalised, prepared_batches


@pytest.fixture
def folder(tmp_path: Path, photographs: dict[str, NDArray[np.uint8]]) -> Path:
    for i, width in enumerate((90, 60, 75, 64)):
        Image.fromarray(photographs["coffee"][i : i + 70, :width]).save(tmp_path / f"{i}.png")
    return tmp_path


def test_batches_hold_the_prepared_images_in_the_order_asked_for(folder: Path) -> None:
    images = FileImages(folder, [f"{i}.png" for i in range(4)])
    wanted = [np.array([2, 0]), np.array([], np.int64), np.array([3])]
    batches = list(prepared_batches(images, iter(wanted), WholeImage(32), threads=2))
    assert [len(batch) for batch in batches] == [2, 0, 1]
    for batch, numbers in zip(batches, wanted, strict=True):
        for image, number in zip(batch, numbers.tolist(), strict=True):
            with Image.open(folder / f"{number}.png") as file:
                expected = np.asarray(file.resize((32, 32), Image.Resampling.BICUBIC))
            np.testing.assert_array_equal(image.numpy(), expected)


def test_the_centre_crop_is_that_of_the_resized_image() -> None:
    pixels = np.arange(60 * 90 * 3, dtype=np.uint32).reshape(60, 90, 3).astype(np.uint8)
    crop = CentreCrop(60, 40)(Image.fromarray(pixels), 0)
    np.testing.assert_array_equal(np.asarray(crop), pixels[10:50, 25:65])
    with pytest.raises(CrispError, match="crop_px=50: must lie between 1 and resize_px=40"):
        CentreCrop(40, 50)


def test_normalised() -> None:
    images = torch.tensor([[[[255, 0, 51]]]], dtype=torch.uint8)
    out = normalised(images, mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 2.0), device=torch.device("cpu"))
    assert out.shape == (1, 3, 1, 1)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 0.0, 0.0]))


def test_missing_and_empty_files_are_named_when_the_folder_is_opened(folder: Path) -> None:
    with pytest.raises(CrispError, match=r"8\.png: no such file, and so 2 of 3 images"):
        FileImages(folder, ["0.png", "8.png", "9.png"])
    (folder / "1.png").write_bytes(b"")
    with pytest.raises(CrispError, match=r"1\.png: empty"):
        FileImages(folder, ["1.png"])


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "2.png").write_bytes(b"not an image")
    images = FileImages(folder, ["0.png", "2.png"])
    with pytest.raises(CrispError, match=r"2\.png: cannot be decoded"):
        list(prepared_batches(images, iter([np.array([0, 1])]), WholeImage(16), threads=1))


def test_the_fingerprint_depends_on_names_order_and_sizes(folder: Path) -> None:
    prints = {FileImages(folder, names).fingerprint for names in (["0.png", "1.png"], ["1.png", "0.png"], ["0.png"])}
    assert len(prints) == 3
    before = FileImages(folder, ["0.png"]).fingerprint
    assert before == FileImages(folder, ["0.png"]).fingerprint
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    assert before != FileImages(folder, ["0.png"]).fingerprint
