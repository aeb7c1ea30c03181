"""What is wrong with the data is said before a single image went through the model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.segmentation.command_knn import evaluate_knn
from crisp.evals.segmentation.config import SegKnnConfig, SegLinearConfig
from crisp.evals.segmentation.folder import FolderLayout
from tests.evals.segmentation import tiny_data as tiny

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """The message with which an evaluation of `tmp_path` is refused."""

    def refuse(**options: Any) -> str:
        options.setdefault("dataset", "folder")
        config = SegKnnConfig(
            weights="gray:", data=tmp_path, cache=tmp_path / "cache", image_px=tiny.SIDE_PX, threads=2, **options
        )
        model = tiny.gray_model(fails_after=0)
        with pytest.raises(CrispError) as raised:
            evaluate_knn(config, model, ALONE)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return refuse


def save(path: Path, ids: np.ndarray) -> None:
    Image.fromarray(ids.astype(np.uint8)).save(path)


def test_sizes_that_differ(tmp_path: Path, refused: Callable[..., str]) -> None:
    tiny.write_folder(tmp_path)
    save(tmp_path / "annotations/train/5.png", np.zeros((tiny.SIDE_PX, tiny.SIDE_PX + 1)))
    assert "annotations/train/5.png: 33×32 px, its image 5.png has 32×32" in refused()


@pytest.mark.parametrize(
    ("write", "options", "mask", "known"),
    [
        (tiny.write_folder, {"folder": FolderLayout(classes=4)}, "annotations/val/2.png", "0–3, 255"),
        (
            tiny.write_ade20k,
            {"dataset": "ade20k"},
            "ADEChallengeData2016/annotations/training/ADE_train_00000003.png",
            "0–150, 255",
        ),
        (
            tiny.write_voc2012,
            {"dataset": "voc2012", "train_set": "train"},
            "VOCdevkit/VOC2012/SegmentationClass/2008_000002.png",
            "0–20, 255",
        ),
        (
            tiny.write_cityscapes,
            {"dataset": "cityscapes"},
            "gtFine/train/aachen/aachen_000002_000019_gtFine_labelIds.png",
            "0–33",
        ),
    ],
)
def test_an_unknown_id(
    write: Callable[[Path], Path],
    options: dict[str, Any],
    mask: str,
    known: str,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    """A single pixel, which the resize to the evaluation's side would leave out."""
    write(tmp_path)
    large = 4 * tiny.SIDE_PX
    ids = np.asarray(Image.open(tmp_path / mask).resize((large, large), Image.Resampling.NEAREST)).copy()
    ids[1, 1] = 177
    save(tmp_path / mask, ids)
    (image,) = [
        path
        for path in tmp_path.rglob("*")
        if path.stem.removesuffix("_leftImg8bit") == Path(mask).stem.removesuffix("_gtFine_labelIds")
        and str(path.relative_to(tmp_path)) != mask
        and ("val" in path.parts) == ("val" in Path(mask).parts)
    ]
    Image.open(image).resize((large, large), Image.Resampling.NEAREST).save(image)
    message = refused(**options)
    assert f"{mask}: holds the unknown label id 177; the layout knows {known}:" in message


def test_several_faulty_files_are_counted(tmp_path: Path, refused: Callable[..., str]) -> None:
    tiny.write_folder(tmp_path)
    for i in (4, 6, 9):
        save(tmp_path / f"annotations/train/{i}.png", np.zeros((3, 3)))
    assert "4.png: 3×3 px" in (message := refused())
    assert message.endswith("(and 2 more of 12 files are faulty)")


@pytest.mark.parametrize("file", ["images/train/1.png", "annotations/train/1.png"])
def test_a_file_that_is_no_image(file: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    tiny.write_folder(tmp_path)
    (tmp_path / file).write_bytes(b"nothing of the kind")
    assert f"{file}: cannot be read as" in refused()


def test_an_empty_class(tmp_path: Path, refused: Callable[..., str]) -> None:
    tiny.write_folder(tmp_path, ids=range(4))
    for path in (tmp_path / "annotations/train").iterdir():
        ids = np.asarray(Image.open(path)).copy()
        ids[ids == 2] = 1
        save(path, ids)
    expected = "1 of 4 classes have no pixel in train, the first is 2; unpack all of it"
    assert expected in refused()
    assert expected in refused(folder=FolderLayout(classes=4))


def test_an_empty_class_can_be_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.write_folder(tmp_path, ids=range(2))
    config = SegKnnConfig(
        weights="gray:",
        data=tmp_path,
        cache=tmp_path / "cache",
        image_px=tiny.SIDE_PX,
        dataset="folder",
        folder=FolderLayout(classes=3),
        allow_empty_classes=True,
    )
    assert evaluate_knn(config, tiny.gray_model(), ALONE).scores[0].value == 100
    for split in ("train", "val"):
        assert f"1 of 3 classes have no pixel in {split}, the first is 2" in caplog.text


def test_a_named_class(tmp_path: Path, refused: Callable[..., str]) -> None:
    tiny.write_cityscapes(tmp_path)
    for path in (tmp_path / "gtFine/train").rglob("*_labelIds.png"):
        ids = np.asarray(Image.open(path)).copy()
        ids[ids == 19] = 0
        save(path, ids)
    assert "the first is 6 (traffic light)" in refused(dataset="cityscapes")


def test_all_ignored(tmp_path: Path, refused: Callable[..., str]) -> None:
    tiny.write_folder(tmp_path, ids=range(2))
    assert "the masks of train hold ignored labels (0, 1) alone" in refused(folder=FolderLayout(ignored=(0, 1)))


def test_every_patch_ignored_by_its_mode(tmp_path: Path, refused: Callable[..., str]) -> None:
    tiny.write_folder(tmp_path, ids=range(2))
    for path in (tmp_path / "annotations/train").iterdir():
        ids = np.full((tiny.SIDE_PX, tiny.SIDE_PX), 255)
        ids[::2, ::4] = np.arange(2).repeat(8)[:, None]
        save(path, ids)
    assert "each patch of train is ignored" in refused()


def test_too_few_images_to_hold_out(tmp_path: Path, refused: Callable[..., str]) -> None:
    tiny.write_folder(tmp_path, train=4)
    assert "train has 4 images, too few to hold out a tenth; give at least 10, or fix" in refused()


def test_more_neighbours_than_patches(tmp_path: Path, refused: Callable[..., str]) -> None:
    tiny.write_folder(tmp_path)
    assert "ks=(1, 177): train has 176 labelled patches to fit on" in refused(ks=(1, 177))


def test_a_side_that_the_patch_does_not_divide(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path)
    config = SegKnnConfig(weights="gray:", data=tmp_path, dataset="folder", image_px=tiny.SIDE_PX + 1)
    with pytest.raises(CrispError, match="image_px=33: must be a multiple of the model's patch, 8 px"):
        evaluate_knn(config, tiny.gray_model(fails_after=0), ALONE)


def test_masks_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is kept; a mask that has changed is checked again."""
    tiny.write_folder(tmp_path)
    config = SegKnnConfig(
        weights="gray:", data=tmp_path, cache=tmp_path / "cache", image_px=tiny.SIDE_PX, dataset="folder"
    )
    evaluate_knn(config, tiny.gray_model(), ALONE)
    from crisp.evals.segmentation import truth

    monkeypatch.setattr(truth, "read_mask", lambda path: pytest.fail("read again"))
    evaluate_knn(config, tiny.gray_model(fails_after=0), ALONE)
    monkeypatch.undo()
    shutil.copy(tmp_path / "images/val/0.png", tmp_path / "annotations/val/0.png")
    with pytest.raises(CrispError, match="mode RGB"):
        evaluate_knn(config, tiny.gray_model(fails_after=0), ALONE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": ()}, "ks"),
        ({"ks": (0, 1)}, "ks"),
        ({"ks": (1, 1)}, "ks"),
        ({"distances": ()}, "distances"),
        ({"distances": ("l2", "l2")}, "distances"),
        ({"query_chunk": 0}, "query_chunk=0"),
        ({"key_chunk": 0}, "key_chunk=0"),
        ({"image_px": 0}, "image_px=0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_wrong_options_of_knn(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CrispError, match=message):
        SegKnnConfig(weights="w", data=Path(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cs": ()}, "cs"),
        ({"cs": (1.0, 0.0)}, "cs"),
        ({"cs": (1.0, 1.0)}, "cs"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_wrong_options_of_linear(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CrispError, match=message):
        SegLinearConfig(weights="w", data=Path(), **options)
