"""Images for pictures: where they come from, which are chosen, and what a model sees of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crisp.errors import CrispError
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.viz.inputs import Images, Shape, check_size, prepare


def save(path: Path, value: int, size: tuple[int, int] = (24, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in (("b/2.png", 20), ("a/1.PNG", 10), ("a/deep/3.webp", 30)):
        save(tmp_path / "images" / name, value)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_files_folders_and_shards_follow_each_other(folder: Path, tmp_path: Path) -> None:
    single = save(tmp_path / "single.png", 99)
    shard_imagenet(ShardConfig(source=str(folder), out=str(tmp_path / "shards"), workers=1))
    images = Images([str(single), str(folder), str(tmp_path / "shards")])
    assert len(images) == 7
    assert [images.decode(i)[0, 0, 0].tolist() for i in range(4)] == pytest.approx([99, 10, 30, 20], abs=1)
    assert [images.name(i) for i in range(2)] == [str(single), str(folder / "a" / "1.PNG")]
    assert images.name(5) == f"{tmp_path / 'shards'}: sample 1"
    assert sorted(int(images.decode(i)[0, 0, 0]) for i in (4, 5, 6)) == pytest.approx([10, 20, 30], abs=1)
    assert images.chosen((), 3, spread=True) == [0, 3, 6]
    assert images.chosen((), 3, spread=False) == [0, 1, 2]
    assert images.chosen((), 30, spread=True) == list(range(7))
    assert images.chosen((5, 1, 5), 3, spread=True) == [5, 1, 5]
    with pytest.raises(CrispError, match="sample=7: there are 7 images; name one from 0 to 6"):
        images.chosen((7,), 1, spread=True)


def test_what_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CrispError, match="nowhere: no such file or folder"):
        Images([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CrispError, match="empty: no images"):
        Images([str(tmp_path / "empty")])
    damaged = folder / "a" / "0.jpg"
    damaged.write_bytes(b"\xff\xd8\xff\xe0 no more")
    with pytest.raises(CrispError, match=r"0\.jpg: cannot be decoded"):
        Images([str(folder)]).decode(0)


@pytest.mark.parametrize(("shape", "expected"), [("crop", (64, 64)), ("squash", (64, 64)), ("whole", (32, 64))])
def test_shapes(shape: Shape, expected: tuple[int, int]) -> None:
    """A 200 × 100 image, red on its middle square, black beside it."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 50:150, 0] = 200
    seen = prepare(pixels, size_px=64, patch_px=16, shape=shape)
    assert seen.shape == (*expected, 3)
    red = (seen[..., 0] > 100).mean()
    assert red == pytest.approx(1 if shape == "crop" else 0.5, abs=0.02)


def test_whole_images_have_sides_of_whole_patches_and_stay_below_the_size() -> None:
    for height, width in ((333, 500), (500, 333), (10, 900), (57, 60)):
        seen = prepare(np.zeros((height, width, 3), np.uint8), size_px=450, patch_px=14, shape="whole")
        assert max(seen.shape[:2]) == 448
        assert not any(side % 14 for side in seen.shape[:2])
        assert abs(np.log(seen.shape[1] / seen.shape[0] * height / width)) < 0.1 or min(seen.shape[:2]) == 14


def test_sizes_are_checked_with_a_remedy() -> None:
    check_size(1120, 14, who="x")
    with pytest.raises(CrispError, match=r"size_px=225: no multiple of the 14 px patches of DINOv2; take 224 or 238"):
        check_size(225, 14, who="DINOv2")
    with pytest.raises(CrispError, match=r"size_px=1119: .* take 1104 or 1120 "):
        check_size(1119, 16, who="x")
    for wrong in (0, 1121):
        with pytest.raises(CrispError, match=f"size_px={wrong}: must lie between one patch and 1120"):
            check_size(wrong, 1, who="x")
