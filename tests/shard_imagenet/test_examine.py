import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from crisp.shard_format import Codec
from crisp.shard_imagenet.config import MAX_PIXELS, ShardConfig
from crisp.shard_imagenet.examine import Sample, examine
from crisp.shard_imagenet.listing import Container, Entry, Rejection
from crisp.shard_imagenet.reading import SourceReader
from crisp.storage import Location

Photo = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def _examine(folder: Path, name: str, size: int, max_pixels: int) -> Sample | Rejection:
    cfg = ShardConfig(source=str(folder), out="nowhere", max_pixels=max_pixels)
    reader = SourceReader([Container("folder", Location.of(folder))])
    return examine(Entry(0, name, 3, 0, 0, size), reader, cfg)


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Sample | Rejection]:
    def run(data: bytes, *, max_pixels: int = 64_000_000) -> Sample | Rejection:
        (tmp_path / "x.JPEG").write_bytes(data)
        return _examine(tmp_path, "x.JPEG", len(data), max_pixels)

    return run


def _rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90°
    return exif


def _ycck(cmyk: bytes) -> bytes:
    """The same file said to hold YCCK, by the transform byte of its Adobe marker."""
    at = cmyk.index(b"Adobe") + 11
    assert cmyk[at] == 0
    return cmyk[:at] + b"\x02" + cmyk[at + 1 :]


KEPT = {
    "colour": (Codec.JPEG, lambda p, e: e(p(0))),
    "grayscale": (Codec.JPEG, lambda p, e: e(p(0).convert("L"))),
    "CMYK": (Codec.JPEG, lambda p, e: e(p(0).convert("CMYK"))),
    "YCCK": (Codec.JPEG, lambda p, e: _ycck(e(p(0).convert("CMYK")))),
    "RGB in JPEG": (Codec.JPEG, lambda p, e: e(p(0), keep_rgb=True)),
    "progressive": (Codec.JPEG, lambda p, e: e(p(0), progressive=True)),
    "EXIF-rotated": (Codec.JPEG, lambda p, e: e(p(0), exif=_rotated_exif())),
    "bytes after the end": (Codec.JPEG, lambda p, e: e(p(0)) + bytes(100)),
    "PNG": (Codec.PNG, lambda p, e: e(p(0), "PNG")),
    "PNG with alpha": (Codec.PNG, lambda p, e: e(p(0).convert("RGBA"), "PNG")),
    "16-bit PNG": (Codec.PNG, lambda p, e: e(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)), "PNG")),
    "WebP": (Codec.WEBP, lambda p, e: e(p(0), "WEBP")),
    "lossless WebP": (Codec.WEBP, lambda p, e: e(p(0), "WEBP", lossless=True)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_kept_with_its_raw_size(
    kind: str, check: Callable[..., Sample | Rejection], make_photo: Photo, to_bytes: Encode
) -> None:
    codec, make = KEPT[kind]
    data = make(make_photo, to_bytes)
    sample = check(data)
    assert isinstance(sample, Sample), sample
    assert (sample.codec, sample.height, sample.width, sample.data) == (codec, 40, 60, data)
    assert sample.checksum == zlib.crc32(data)


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP"])
def test_one_pixel_is_kept(
    codec: str, check: Callable[..., Sample | Rejection], make_photo: Photo, to_bytes: Encode
) -> None:
    sample = check(to_bytes(make_photo(0, 1, 1), codec))
    assert isinstance(sample, Sample)
    assert (sample.height, sample.width) == (1, 1)


def _zeroed(data: bytes, count: int) -> bytes:
    return data[:-count] + bytes(count)


REJECTED = {
    "empty": ("empty", lambda p, e: b""),
    "text": ("not JPEG, PNG or WebP: it begins with b'hello, world", lambda p, e: b"hello, world of images"),
    "GIF": ("GIF: DALI cannot decode it", lambda p, e: e(p(0), "GIF")),
    "BMP": ("not JPEG, PNG or WebP: it begins with b'BM", lambda p, e: e(p(0), "BMP")),
    "cut JPEG": ("damaged or unusual JPEG: Premature end", lambda p, e: e(p(0))[:-300]),
    "JPEG without its last byte": ("damaged or unusual JPEG: Premature end", lambda p, e: e(p(0))[:-1]),
    "only a JPEG's first bytes": ("damaged or unusual JPEG", lambda p, e: e(p(0))[:4]),
    "JPEG, zeroed tail": ("damaged or unusual JPEG: Premature end", lambda p, e: _zeroed(e(p(0)), 300)),
    "JPEG, two zeroed bytes": ("damaged or unusual JPEG: Premature end", lambda p, e: _zeroed(e(p(0)), 2)),
    "cut PNG": ("damaged PNG", lambda p, e: e(p(0), "PNG")[:-300]),
    "PNG, zeroed tail": ("damaged PNG", lambda p, e: _zeroed(e(p(0), "PNG"), 300)),
    "PNG, zeroed end mark": ("damaged PNG: no end mark", lambda p, e: _zeroed(e(p(0), "PNG"), 4)),
    "cut WebP": ("damaged WEBP", lambda p, e: e(p(0), "WEBP")[:-100]),
    "animated WebP": (
        "animated WebP: 2 frames",
        lambda p, e: e(p(0), "WEBP", save_all=True, append_images=[p(1)], duration=100),
    ),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_rejected_with_the_reason(
    kind: str, check: Callable[..., Sample | Rejection], make_photo: Photo, to_bytes: Encode
) -> None:
    reason, make = REJECTED[kind]
    outcome = check(make(make_photo, to_bytes))
    assert isinstance(outcome, Rejection)
    assert outcome.source == "x.JPEG"
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP"])
def test_the_limit_on_pixels(
    codec: str, check: Callable[..., Sample | Rejection], make_photo: Photo, to_bytes: Encode
) -> None:
    data = to_bytes(make_photo(0), codec)
    assert isinstance(check(data, max_pixels=2400), Sample)
    assert check(data, max_pixels=2399) == Rejection("x.JPEG", "too many pixels: 60x40, more than 2399")


def test_a_damaged_jpeg_is_rejected_where_the_re_encoding_is_the_check(
    tmp_path: Path, make_photo: Photo, to_bytes: Encode
) -> None:
    cfg = ShardConfig(source=str(tmp_path), out="nowhere", short_side=30, max_pixels=5400)
    reader = SourceReader([Container("folder", Location.of(tmp_path))])
    reasons = {}
    for name, data in (
        ("whole", to_bytes(make_photo(0))),
        ("cut", to_bytes(make_photo(0))[:-100]),
        ("headless", to_bytes(make_photo(0))[:4]),
        ("CMYK, cut", to_bytes(make_photo(0).convert("CMYK"))[:-100]),
        ("large", to_bytes(make_photo(0, 80, 90))),
    ):
        (tmp_path / name).write_bytes(data)
        outcome = examine(Entry(0, name, 3, 0, 0, len(data)), reader, cfg)
        reasons[name] = outcome.reason if isinstance(outcome, Rejection) else (outcome.height, outcome.width)
    assert reasons.pop("headless").startswith("damaged or unusual JPEG: ")
    assert reasons == {
        "whole": (30, 45),
        "cut": "damaged or unusual JPEG: Premature end of JPEG file",
        "CMYK, cut": "damaged or unusual JPEG: Premature end of JPEG file",
        "large": "too many pixels: 90x80, more than 5400",
    }


def test_an_enormous_png_is_refused_by_its_header(
    check: Callable[..., Sample | Rejection], make_photo: Photo, to_bytes: Encode
) -> None:
    data = bytearray(to_bytes(make_photo(0), "PNG"))
    data[16:24] = (30000).to_bytes(4, "big") * 2  # 900 Mpx in IHDR; decoding it would take 2.7 GB
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    outcome = check(bytes(data))
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "too many pixels: 30000x30000, more than 64000000"


def test_a_file_too_large_for_the_index_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as stream:
        stream.write(b"\xff\xd8\xff")
        os.truncate(stream.fileno(), 2**32)  # sparse
        stream.flush()
    assert _examine(tmp_path, "x", 2**32, 1) == Rejection("x", "too large: 4294967296 bytes")


def test_of_a_large_file_that_is_no_image_only_the_head_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as stream:
        stream.write(b"hello, world")
        os.truncate(stream.fileno(), 2**31)  # reading it would take 2 GB
        stream.flush()
    outcome = _examine(tmp_path, "x", 2**31, 1)
    assert outcome == Rejection("x", "not JPEG, PNG or WebP: it begins with b'hello, world'")


def test_a_file_that_is_gone_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _examine(tmp_path, "x", 5, 1)


def _damaged(data: bytes, rng: random.Random) -> bytes:
    count = rng.randint(1, len(data) - 30)
    at = rng.randint(20, len(data) - 1)
    match rng.randrange(4):
        case 0:
            return data[:-count]
        case 1:
            return _zeroed(data, count)
        case 2:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case _:
            return (data[:at] + bytes(8) + data[at + 8 :])[: len(data)]


@pytest.mark.parametrize("progressive", [False, True])
def test_the_quick_jpeg_check_judges_as_a_full_decode(
    progressive: bool, check: Callable[..., Sample | Rejection], make_photo: Photo, to_bytes: Encode
) -> None:
    rng = random.Random(0)
    good = [to_bytes(make_photo(i, 90, 120), progressive=progressive, quality=95) for i in range(8)]
    verdicts = []
    for i in range(500):
        data = _damaged(good[i % len(good)], rng)
        try:
            simplejpeg.decode_jpeg(data)
            decodes = True
        except ValueError:
            decodes = False
        outcome = check(data, max_pixels=MAX_PIXELS)
        assert isinstance(outcome, Sample) == (decodes and data[:3] == b"\xff\xd8\xff")
        verdicts.append(decodes)
    assert 20 < sum(verdicts) < 480  # both verdicts were met


@pytest.mark.parametrize("codec", ["PNG", "WEBP"])
def test_no_damage_raises(
    codec: str, check: Callable[..., Sample | Rejection], make_photo: Photo, to_bytes: Encode
) -> None:
    rng = random.Random(1)
    good = to_bytes(make_photo(0), codec)
    outcomes = [check(_damaged(good, rng), max_pixels=10_000_000) for _ in range(600)]
    assert sum(isinstance(outcome, Rejection) for outcome in outcomes) > 120
