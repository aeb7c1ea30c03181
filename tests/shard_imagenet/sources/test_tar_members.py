import gzip
import io
import tarfile
from collections.abc import Callable
from itertools import pairwise

import pytest

from crisp.errors import CrispError
from crisp.shard_imagenet.sources.tar_members import Member, last_of_each, walk_tar


def _walk(data: bytes, *, start: int = 0, size: int | None = None) -> tuple[list[Member], dict[str, str]]:
    rejected: dict[str, str] = {}
    size = len(data) - start if size is None else size
    members = list(walk_tar(io.BytesIO(data), "x.tar", rejected.__setitem__, start=start, size=size))
    return members, rejected


def test_members_are_where_the_walk_says(make_tar: Callable, make_special: Callable) -> None:
    files = {"a": b"1", "./b/c": b"2" * 512, "b/" + "long" * 60: b"3" * 1500, "leer": b"", "ü ß": b"4"}
    data = b"before" + make_tar([make_special("b", tarfile.DIRTYPE), *files.items()]) + b"after"
    members, rejected = _walk(data, start=6, size=len(data) - 11)
    assert rejected == {}
    assert {m.name: data[m.offset : m.offset + m.size] for m in members} == {
        name.removeprefix("./"): content for name, content in files.items()
    }


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_formats(kind: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        info = tarfile.TarInfo("d/" * 40 + "é")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    (member,), _ = _walk(stream.getvalue())
    assert member.name == "d/" * 40 + "é"
    assert stream.getvalue()[member.offset :][:3] == b"abc"


def test_what_is_no_file_or_would_leave_the_archive_is_refused(make_tar: Callable, make_special: Callable) -> None:
    data = make_tar(
        [
            ("../up", b"1"),
            ("/root", b"2"),
            ("a/../../up", b"3"),
            make_special("link", tarfile.SYMTYPE, "/etc/passwd"),
            make_special("hard", tarfile.LNKTYPE, "fine"),
            make_special("pipe", tarfile.FIFOTYPE),
            make_special("device", tarfile.CHRTYPE),
            ("..fine/a..b", b"4"),
        ]
    )
    members, rejected = _walk(data)
    assert [member.name for member in members] == ["..fine/a..b"]
    assert rejected == {
        "../up": "refused: name leads out of the archive",
        "/root": "refused: absolute name",
        "a/../../up": "refused: name leads out of the archive",
        "link": "refused: link in an archive",
        "hard": "refused: link in an archive",
        "pipe": "not a regular file",
        "device": "not a regular file",
    }


def test_a_member_at_every_cut_is_missed(make_tar: Callable) -> None:
    """Whole or refused, wherever a tar is cut."""
    data = make_tar([("a", b"1" * 700), ("name" * 40, b"2" * 512), ("b", b""), ("c", b"3" * 100)])
    end = data.rstrip(b"\0").rfind(b"3") + 1
    first_mark = (end + 511) // 512 * 512
    for cut in [*range(0, first_mark, 64), *(first_mark + i for i in (-1, 0, 1, 511))]:
        with pytest.raises(CrispError, match=r"^x\.tar: (ends .*cut short|not a tar, or cut short)"):
            _walk(data[:cut])
    for cut in range(first_mark + 512, len(data) + 1, 256):
        assert len(_walk(data[:cut])[0]) == 4


def test_damage_is_an_error(make_tar: Callable) -> None:
    data = make_tar([("a", b"1" * 700), ("b", b"2")])
    for what, message in (
        (data[:1536] + b"\xff" * 512 + data[2048:], "no header at byte 1536: it is damaged; download it again"),
        (data[:1536] + bytes(512) + data[2048:], "goes on for .* after its end mark"),
        (data + data, "goes on for .* after its end mark"),
        (data + bytes(2**20), "goes on for .* after its end mark"),
        (b"JPEG" * 1000, "not a tar"),
        (b"", "not a tar, or cut short"),
        (gzip.compress(data), "compressed.*gunzip it first"),
    ):
        with pytest.raises(CrispError, match=message):
            _walk(what)
    assert len(_walk(data + bytes(30000))[0]) == 2


@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g"])
@pytest.mark.parametrize("size", [-512, 2**40])
def test_sizes_that_lie_neither_hang_nor_fill_the_memory(kind: bytes, size: int) -> None:
    info = tarfile.TarInfo("a")
    info.size, info.type = size, kind
    header = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(CrispError, match=r"x\.tar: "):
        _walk(header + bytes(4096))


def test_the_last_of_equal_names_is_taken(make_tar: Callable) -> None:
    data = make_tar([("a", b"first"), ("b", b"other"), ("./a", b"last!")])
    rejected: list[tuple[str, str]] = []
    kept = last_of_each(_walk(data)[0], lambda name, reason: rejected.append((name, reason)))
    assert {name: data[m.offset : m.offset + m.size] for name, m in kept.items()} == {"a": b"last!", "b": b"other"}
    assert rejected == [("a", "replaced: a later member has the same name")]


def test_the_file_may_be_read_between_members(make_tar: Callable) -> None:
    data = make_tar([(str(i), bytes([i]) * 900) for i in range(5)])
    file = io.BytesIO(data)
    contents = []
    for member in walk_tar(file, "x.tar", lambda name, reason: None, size=len(data)):
        file.seek(member.offset)
        contents.append(file.read(member.size))
    assert contents == [bytes([i]) * 900 for i in range(5)]
    assert all(a != b for a, b in pairwise(contents))
