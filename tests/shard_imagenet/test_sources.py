import os
from pathlib import Path

import pytest

from crisp.errors import CrispError
from crisp.shard_imagenet.sources import Rejection, SourceFile, list_source


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")


def test_class_folders_by_sorted_name(tmp_path: Path) -> None:
    _touch(tmp_path / "b/2", tmp_path / "b/1", tmp_path / "a/deep/er/1", tmp_path / "a/1", tmp_path / "é/1")
    (tmp_path / "c").mkdir()
    source = list_source(tmp_path)
    assert source.classes == ("a", "b", "c", "é")
    assert source.files == [
        SourceFile(0, "a/1", 0, 5),
        SourceFile(1, "a/deep/er/1", 0, 5),
        SourceFile(2, "b/1", 1, 5),
        SourceFile(3, "b/2", 1, 5),
        SourceFile(4, "é/1", 3, 5),
    ]
    assert source.rejections == []


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    _touch(tmp_path / "b", tmp_path / "a c")
    source = list_source(tmp_path)
    assert source.classes == ()
    assert source.files == [SourceFile(0, "a c", -1, 5), SourceFile(1, "b", -1, 5)]


def test_what_is_no_image_file_is_listed(tmp_path: Path) -> None:
    _touch(tmp_path / "a/1", tmp_path / "README", tmp_path / ".cache/1", tmp_path / "a/.hidden/1")
    os.mkfifo(tmp_path / "a/pipe")
    (tmp_path / "a/broken").symlink_to("nowhere")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a", target_is_directory=True)
    source = list_source(tmp_path)
    assert [file.path for file in source.files] == ["a/1"]
    assert sorted(source.rejections) == [
        Rejection(".cache", "hidden folder"),
        Rejection("README", "beside the class folders"),
        Rejection("a/.hidden", "hidden folder"),
        Rejection("a/broken", "not a regular file"),
        Rejection("a/loop", "link to a folder"),
        Rejection("a/pipe", "not a regular file"),
    ]


def test_links_to_files_and_to_class_folders_are_followed(tmp_path: Path) -> None:
    _touch(tmp_path / "store/1")
    (tmp_path / "subset/b").mkdir(parents=True)
    (tmp_path / "subset/a").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "subset/b/x").symlink_to(tmp_path / "store/1")
    source = list_source(tmp_path / "subset")
    assert source.files == [SourceFile(0, "a/1", 0, 5), SourceFile(1, "b/x", 1, 5)]
    assert source.rejections == []


def test_refusals(tmp_path: Path) -> None:
    _touch(tmp_path / "file", tmp_path / "hidden/.git/1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes/a").mkdir(parents=True)
    for name, message in (
        ("missing", "missing: no such folder; give "),
        ("file", "file: a file, not a folder; give "),
        ("empty", "empty: no file in it; give "),
        ("classes", "classes: no file in it; give "),
        ("hidden", "hidden: no file in it; give "),
    ):
        with pytest.raises(CrispError, match=message):
            list_source(tmp_path / name)
