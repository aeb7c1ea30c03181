import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crisp.errors import CrispError
from crisp.evals.video.checks import check_data
from crisp.evals.video.layouts import (
    LAYOUTS,
    find_davis2016,
    find_davis2017,
    find_mose,
    find_youtube_vos,
)
from crisp.evals.video.masks import object_ids, read_mask, write_mask
from crisp.evals.video.sequences import VideoData, hold_out
from tests.evals.video.official import davis2016, davis2017, five, frame_folder, mose, youtube_vos


def read(dataset: Any, root: Path, split: str) -> VideoData:
    return LAYOUTS[dataset].read(root, split)


def names(data: VideoData) -> list[str]:
    return [sequence.name for sequence in data.sequences]


def test_davis2017(tmp_path: Path) -> None:
    root = davis2017(tmp_path)
    data = read("davis2017", root, "val")
    assert names(data) == ["bear", "camel"]
    assert data.scored
    assert data.archive_root is None
    bear = data.sequences[0]
    assert [path.name for path in bear.frames] == [f"{frame:05}.jpg" for frame in range(5)]
    assert bear.starts == {0: root / "Annotations/480p/bear/00000.png"}
    assert len(bear.truths) == 5
    assert bear.written == (0, 1, 2, 3, 4)
    assert names(read("davis2017", root, "train")) == ["bear"]
    hidden = read("davis2017", root, "test-dev")
    assert names(hidden) == ["hidden"]
    assert not hidden.scored
    assert hidden.archive_root == ""
    with pytest.raises(CrispError, match=r"hidden/00001\.png: this true mask is missing"):
        read("davis2017", root, "all")
    with pytest.raises(CrispError, match=r"split 'valid': davis2017 has no such split; choose one of train, val"):
        read("davis2017", root, "valid")


def test_davis2016_has_one_object_and_lists_of_pairs(tmp_path: Path) -> None:
    data = read("davis2016", davis2016(tmp_path), "val")
    assert names(data) == ["bear", "camel"]
    assert check_data(data, threads=1)["bear"].objects == {1: 0}
    first = read_mask(data.sequences[0].starts[0], single_object=True)
    assert object_ids(first) == (1,)
    assert names(read("davis2016", tmp_path, "all")) == ["bear", "camel"]


def test_davis2016_from_the_archive_of_2017(tmp_path: Path) -> None:
    root = davis2017(tmp_path)
    (root / "ImageSets/2016").mkdir()
    (root / "ImageSets/2016/val.txt").write_text("camel\n")
    data = read("davis2016", root, "val")
    assert names(data) == ["camel"]
    assert check_data(data, threads=1)["camel"].objects == {1: 0}


def test_youtube_vos_valid_starts_with_every_png_and_writes_what_meta_asks_for(tmp_path: Path) -> None:
    root = youtube_vos(tmp_path)
    data = read("youtube-vos", root, "valid")
    a, b = data.sequences
    assert not data.scored
    assert data.archive_root == "Annotations/"
    assert (list(a.starts), a.written) == ([0], (0, 1, 2, 3, 4))
    assert (list(b.starts), b.written) == ([0, 2], (0, 1, 2, 3))
    assert [b.mask_name(frame) for frame in b.written] == ["00000.png", "00005.png", "00010.png", "00015.png"]
    assert check_data(data, threads=1)["b"].objects == {1: 0, 2: 2}


def test_youtube_vos_object_that_only_one_knows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = youtube_vos(tmp_path)
    check_data(read("youtube-vos", root, "valid"), threads=1)
    assert "not in both" not in caplog.text
    meta = json.loads((root / "valid/meta.json").read_text())
    del meta["videos"]["a"]["objects"]["1"]
    meta["videos"]["b"]["objects"]["9"] = {"category": "dog", "frames": []}
    (root / "valid/meta.json").write_text(json.dumps(meta))
    check_data(read("youtube-vos", root, "valid"), threads=1)
    assert "a: objects 1 are in meta.json or in the masks to start from, but not in both" in caplog.text
    assert "b: objects 9 are in meta.json" in caplog.text


def test_youtube_vos_train_finds_where_objects_begin(tmp_path: Path) -> None:
    data = read("youtube-vos", youtube_vos(tmp_path), "train")
    assert data.scored
    assert data.archive_root is None
    assert [list(sequence.starts) for sequence in data.sequences] == [[0], [0, 2]]


def test_mose_counts_the_first_mask_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = mose(tmp_path)
    data = read("mose", root, "valid")
    assert names(data) == ["0a0b", "1c1d"]
    assert data.archive_root == ""
    assert not data.scored
    held_out = read("mose", root, "holdout")
    assert len(held_out.sequences) == 1
    assert len(read("mose", root, "train").sequences) == 12
    # id 2 alone: 1 comes later, and does not count as a missing one does in DAVIS
    assert next(iter(check_data(held_out, threads=1).values())).objects == {2: 0}
    assert "objects 1 are not in the mask to start from" in caplog.text


def test_frame_folder(tmp_path: Path) -> None:
    data = read("folder", frame_folder(tmp_path / "clip"), "all")
    assert names(data) == ["clip"]
    assert not data.scored
    assert list(data.sequences[0].starts) == [0]
    data = read("folder", frame_folder(tmp_path / "two", masks_of=[1, 3]), "all")
    assert list(data.sequences[0].starts) == [1, 3]
    data = read("folder", frame_folder(tmp_path / "whole", masks_of=range(5)), "all")
    assert data.scored
    assert list(data.sequences[0].starts) == [0]
    for name in ("x", "y"):
        shutil.copytree(tmp_path / "whole/images", tmp_path / "many/images" / name)
        shutil.copytree(tmp_path / "whole/masks", tmp_path / "many/masks" / name)
    assert names(read("folder", tmp_path / "many", "all")) == ["x", "y"]
    (tmp_path / "many/masks/y/00004.png").unlink()
    with pytest.raises(CrispError, match="x has a mask for every frame and y has not"):
        read("folder", tmp_path / "many", "all")


def test_hold_out_is_one_in_ten_and_fixed() -> None:
    videos = [f"{n:05x}" for n in range(205)]
    held_out = hold_out(videos)
    assert len(held_out) == 20
    assert set(held_out) <= set(videos)
    assert held_out == hold_out(reversed(videos)) == tuple(sorted(held_out))
    assert held_out[:4] == ("00008", "0000b", "00014", "00018")
    assert len(hold_out(["a", "b"])) == 1


def test_data_sets_are_found_where_they_lie(tmp_path: Path) -> None:
    davis2017(tmp_path / "sets/DAVIS")
    davis2016(tmp_path / "old")
    youtube_vos(tmp_path / "yt")
    mose(tmp_path / "mose")
    assert find_davis2017(tmp_path) == find_davis2017(tmp_path / "sets/DAVIS") == tmp_path / "sets/DAVIS"
    assert find_davis2016(tmp_path) == tmp_path / "old"
    assert find_youtube_vos(tmp_path) == find_youtube_vos(tmp_path, "holdout") == tmp_path / "yt"
    assert find_mose(tmp_path) == find_mose(tmp_path, "holdout") == tmp_path / "mose"
    shutil.rmtree(tmp_path / "mose/valid")
    assert find_mose(tmp_path) is None
    assert find_youtube_vos(tmp_path / "old") is None
    assert find_davis2017(tmp_path / "nowhere") is None


# --- what is wrong is named at once ---------------------------------------------------------------------------------

FIRST = "Annotations/480p/bear/00000.png"
THIRD = "Annotations/480p/bear/00002.png"


def replace_mask(root: Path, name: str, mask: Any) -> None:
    write_mask(np.asarray(mask, dtype=np.uint8), root / name)


def without_meta_frame(root: Path) -> None:
    (root / "valid/JPEGImages/a/00020.jpg").unlink()


def with_stray_mask(root: Path) -> None:
    shutil.copy(root / "valid/Annotations/a/00000.png", root / "valid/Annotations/a/00099.png")


FAULTS: list[tuple[Callable[[Path], Path], str, str, Callable[[Path], Any], str]] = [
    (davis2017, "davis2017", "val", lambda r: (r / "JPEGImages/480p/bear/00001.jpg").unlink(),
     r"bear/00001\.png: no frame 00001"),
    (davis2017, "davis2017", "val", lambda r: (r / THIRD).unlink(), r"00002\.png: this true mask is missing"),
    (davis2017, "davis2017", "val", lambda r: shutil.rmtree(r / "JPEGImages/480p/camel"), "no such folder of frames"),
    (davis2017, "davis2017", "val", lambda r: shutil.rmtree(r / "Annotations/480p/camel"), "no such folder of masks"),
    (davis2017, "davis2017", "val", lambda r: (r / "ImageSets/2017/val.txt").unlink(), "no such list of sequences"),
    (davis2017, "davis2017", "val", lambda r: (r / "ImageSets/2017/val.txt").write_text("\n"), "an empty list"),
    (davis2017, "davis2017", "val", lambda r: (r / "ImageSets/2017/val.txt").write_text("bear\nbear\n"),
     "bear is listed twice"),
    (davis2017, "davis2017", "val", lambda r: replace_mask(r, FIRST, np.zeros((48, 64))), "no object in this"),
    (davis2017, "davis2017", "val", lambda r: replace_mask(r, FIRST, np.full((48, 64), 255)), "no object in this"),
    (davis2017, "davis2017", "val", lambda r: replace_mask(r, THIRD, np.ones((40, 64))),
     r"00002\.png: 64×40 px, but its frame is 64×48 px"),
    (davis2017, "davis2017", "val", lambda r: Image.new("RGB", (64, 48)).save(r / FIRST), "its pixels are RGB"),
    (davis2017, "davis2017", "val", lambda r: (r / THIRD).write_bytes((r / THIRD).read_bytes()[:90]),
     r"00002\.png: cannot be read as a mask"),
    (davis2017, "davis2017", "val", lambda r: Image.new("RGB", (60, 48)).save(r / "JPEGImages/480p/bear/00003.jpg"),
     r"00003\.jpg: 60×48 px, but 00000\.jpg is 64×48 px"),
    (davis2017, "davis2017", "val", lambda r: [p.unlink() for p in r.glob("*/480p/bear/0000[2-4].*")],
     "2 frames; first and last are not scored"),
    (davis2017, "davis2017", "test-dev", lambda r: (r / "Annotations/480p/hidden/00000.png").unlink(),
     r"hidden/00000\.png: the first frame's mask is missing"),
    (davis2016, "davis2016", "val", lambda r: (r / "ImageSets/480p/val.txt").write_text("bear\n"),
     "is no line of DAVIS-2016's lists"),
    (youtube_vos, "youtube-vos", "valid", without_meta_frame, r"00020\.jpg: meta\.json asks for this frame"),
    (youtube_vos, "youtube-vos", "valid", with_stray_mask, r"00099\.png: no frame 00099"),
    (youtube_vos, "youtube-vos", "valid", lambda r: (r / "valid/meta.json").unlink(), r"meta\.json: no such file"),
    (youtube_vos, "youtube-vos", "valid", lambda r: (r / "valid/meta.json").write_text('{"videos": {"a": 3}}'),
     "not YouTube-VOS's list"),
    (youtube_vos, "youtube-vos", "valid", lambda r: (r / "valid/meta.json").write_text('{"videos": {}}'), "no videos"),
    (youtube_vos, "youtube-vos", "valid", lambda r: (r / "valid/Annotations/a/00000.png").unlink(), "no mask to start"),
    (youtube_vos, "youtube-vos", "train", lambda r: (r / "train/Annotations/a/00005.png").unlink(), "is missing"),
    (mose, "mose", "valid", lambda r: shutil.rmtree(r / "valid/JPEGImages"), "no folders of videos there"),
    (frame_folder, "folder", "all", lambda r: (r / "masks/00000.png").unlink(), "no mask to start from"),
    (frame_folder, "folder", "all", lambda r: shutil.rmtree(r / "images"), "frames go into images/"),
    (frame_folder, "folder", "all", lambda r: [p.unlink() for p in (r / "images").iterdir()], "holds no frames"),
    (frame_folder, "folder", "all", lambda r: Image.new("RGB", (64, 48)).save(r / "images/00000.png"), "the same name"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "dataset", "split", "spoil", "message"), FAULTS)
def test_faults_are_named(
    tmp_path: Path,
    make: Callable[[Path], Path],
    dataset: str,
    split: str,
    spoil: Callable[[Path], Any],
    message: str,
) -> None:
    root = make(tmp_path / "data")
    check_data(read(dataset, root, split), threads=2)
    spoil(root)
    with pytest.raises(CrispError, match=message) as caught:
        check_data(read(dataset, root, split), threads=2)
    assert "\n" not in str(caught.value)


def test_meta_json_is_as_youtube_vos_has_it(tmp_path: Path) -> None:
    meta = json.loads((youtube_vos(tmp_path) / "valid/meta.json").read_text())
    assert meta["videos"]["b"]["objects"]["2"] == {"category": "cat", "frames": five(0, 5)[2:4]}
