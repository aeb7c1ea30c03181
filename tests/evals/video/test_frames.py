import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.errors import CrispError
from crisp.evals.video.frames import frame_size, prepared_size, read_frame
from crisp.evals.video.protocol import DINO_MEAN, DINO_STD


@pytest.mark.parametrize(
    ("frame", "patch_px", "expected"),
    [
        ((480, 854), 16, (480, 832)),  # DAVIS at 480p
        ((480, 854), 8, (480, 832)),
        ((480, 910), 16, (480, 896)),
        ((1080, 1920), 16, (480, 832)),
        ((854, 480), 16, (832, 480)),  # upright
        ((500, 500), 16, (480, 448)),  # DINO's rule for a square
        ((480, 1000), 16, (480, 960)),
        ((480, 854), 14, (476, 826)),
        ((854, 480), 14, (826, 476)),
    ],
)
def test_480p(frame: tuple[int, int], patch_px: int, expected: tuple[int, int]) -> None:
    assert prepared_size(*frame, size="480p", patch_px=patch_px) == expected


@pytest.mark.parametrize(("patch_px", "expected"), [(16, 480), (8, 480), (14, 476)])
def test_480x480(patch_px: int, expected: int) -> None:
    assert prepared_size(480, 854, size="480x480", patch_px=patch_px) == (expected, expected)


def test_frame_is_resized_as_bytes_and_normalised(tmp_path: Path) -> None:
    """Bilinear with pixel centres, not antialiased, rounded to a byte; channels in the order R, G, B."""
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(8) * 31  # red
    pixels[..., 1], pixels[..., 2] = 7, 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_frame(tmp_path / "a.png", 4, 6, mean=DINO_MEAN, std=DINO_STD)
    assert image.shape == (3, 4, 6)
    assert image.dtype == torch.float32
    bytes_ = image * torch.tensor(DINO_STD)[:, None, None] + torch.tensor(DINO_MEAN)[:, None, None]
    bytes_ = (bytes_ * 255).numpy()
    np.testing.assert_allclose(bytes_, np.rint(bytes_), atol=1e-3)
    at = np.clip((np.arange(6) + 0.5) * 8 / 6 - 0.5, 0, 7)
    np.testing.assert_allclose(bytes_[0], np.broadcast_to(at * 31, (4, 6)), atol=1)
    np.testing.assert_allclose(bytes_[1], 7, atol=1e-3)
    np.testing.assert_allclose(bytes_[2], 200, atol=1e-3)


def test_size_in_the_header_is_that_of_the_decoded_frame(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (30, 20)).save(tmp_path / "plain.jpg")
    assert frame_size(tmp_path / "turned.jpg") == (30, 20)
    assert frame_size(tmp_path / "plain.jpg") == (20, 30)


def test_damaged_frame_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(CrispError, match=r"a\.png: cannot be read as a frame"):
        frame_size(tmp_path / "a.png")
    with pytest.raises(CrispError, match=r"a\.png: this frame cannot be decoded"):
        read_frame(tmp_path / "a.png", 4, 4, mean=DINO_MEAN, std=DINO_STD)
    Image.effect_noise((300, 200), 60).save(tmp_path / "b.jpg")
    assert frame_size(tmp_path / "b.jpg") == (200, 300)
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole + bytes(50))  # some cameras write on behind the end
    assert frame_size(tmp_path / "b.jpg") == (200, 300)
    (tmp_path / "b.jpg").write_bytes(whole[:-100])
    with pytest.raises(CrispError, match=r"b\.jpg: this frame is cut short"):
        frame_size(tmp_path / "b.jpg")


def test_missing_opencv_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cv2":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CrispError, match=r"OpenCV is missing.*pip install 'crisp-ssl\[eval\]'"):
        read_frame(tmp_path / "a.png", 4, 4, mean=DINO_MEAN, std=DINO_STD)
