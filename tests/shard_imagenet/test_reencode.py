"""Re-encoding against PIL and against the plain resize, and what must keep its bytes."""

import io
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crisp.pipelines.pixels import FINE
from crisp.pipelines.plain import resize_matrix, to_uint8
from crisp.shard_format import Codec
from crisp.shard_imagenet import reencode
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.examine import RejectedError, check
from crisp.shard_imagenet.reencode import read_orientation, replaces_check, resize_pixels, transform, turn

Photo = Callable[..., Image.Image]
Encode = Callable[..., bytes]
Pixels = NDArray[np.uint8]


def config(**options: Any) -> ShardConfig:
    return ShardConfig(source="source", out="out", **options)


def exif(orientation: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def decoded(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def difference(a: Pixels, b: Pixels) -> NDArray[np.int64]:
    return np.abs(a.astype(np.int64) - b)


def through_jpeg(pixels: Pixels, quality: int) -> Pixels:
    """What PIL's JPEG of them looks like."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return decoded(stream.getvalue())


def resized_by_pil(pixels: Pixels, height: int, width: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def resized_plainly(pixels: Pixels, height: int, width: int) -> Pixels:
    rows, columns = (resize_matrix(n, out, "bicubic") for n, out in zip(pixels.shape, (height, width), strict=False))
    between = np.floor(rows @ pixels.transpose(2, 0, 1).astype(np.float64) * FINE + 0.5) / FINE
    return to_uint8(between @ columns.T).transpose(1, 2, 0)


# --- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(256, 384), (97, 131), (64, 64), (200, 17)])
def test_the_resize_is_the_plain_one_and_pils(photographs: dict[str, Pixels], size: tuple[int, int]) -> None:
    for name, pixels in photographs.items():
        resized = resize_pixels(pixels, *size)
        assert resized.shape == (*size, 3)
        from_plain = difference(resized, resized_plainly(pixels, *size))
        assert from_plain.max() <= 1, name
        assert (from_plain > 0).mean() < 0.001, name
        from_pil = difference(resized, resized_by_pil(pixels, *size))
        assert (from_pil > 1).mean() < 0.003, name  # those that PIL clips between rows and columns
        assert from_pil.max() <= 8, name


@pytest.mark.parametrize(
    ("size", "out"),
    [
        ((1, 1), (1, 1)),
        ((2, 2), (1, 1)),
        ((2, 900), (1, 450)),
        ((900, 2), (450, 1)),
        ((3, 5), (2, 3)),
        ((1, 40), (1, 9)),
        ((57, 16), (57, 5)),
        ((33, 129), (16, 63)),
        ((129, 33), (64, 17)),
        ((20, 30), (41, 64)),
    ],
)
def test_sizes_out_of_the_ordinary(size: tuple[int, int], out: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert difference(resize_pixels(pixels, *out), resized_plainly(pixels, *out)).max() <= 1


def test_a_flat_image_stays_flat() -> None:
    assert np.unique(resize_pixels(np.full((77, 113, 3), 201, np.uint8), 31, 50)).tolist() == [201]


# --- short side -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((375, 500), (100, 133)),
        ((500, 375), (133, 100)),
        ((101, 101), (100, 100)),
        ((101, 199), (100, 197)),
        ((150, 1501), (100, 1001)),
        ((1999, 101), (1979, 100)),
    ],
)
def test_the_short_side_is_exact(size: tuple[int, int], expected: tuple[int, int], to_bytes: Encode) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    data, codec, height, width = transform(to_bytes(Image.fromarray(pixels)), Codec.JPEG, *size, config(short_side=100))
    assert (codec, height, width) == (Codec.JPEG, *expected)
    assert simplejpeg.decode_jpeg_header(data) == (*expected, "YCbCr", "420")


def test_close_to_pils_pipeline_in_pixels_and_size(photographs: dict[str, Pixels], to_bytes: Encode) -> None:
    for name, pixels in photographs.items():
        source = to_bytes(Image.fromarray(pixels), quality=95)
        height, width, _ = pixels.shape
        data, _, out_height, out_width = transform(source, Codec.JPEG, height, width, config(short_side=200))
        wanted = resized_by_pil(decoded(source), out_height, out_width)
        peer = to_bytes(Image.fromarray(wanted), quality=90)
        assert difference(decoded(data), decoded(peer)).mean() < 1.5, name
        assert abs(len(data) / len(peer) - 1) < 0.01, name
        ours, pils = difference(decoded(data), wanted).mean(), difference(decoded(peer), wanted).mean()
        assert ours < 1.02 * pils, name
        assert b"Exif" not in data


def test_quality(photographs: dict[str, Pixels], to_bytes: Encode) -> None:
    source = to_bytes(Image.fromarray(photographs["chelsea"]))
    sizes = [
        len(transform(source, Codec.JPEG, 300, 451, config(short_side=100, quality=quality))[0])
        for quality in (1, 50, 90, 100)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] * 4 < sizes[3]


@pytest.mark.parametrize(
    ("size", "reduction"), [((399, 500), 1), ((400, 601), 2), ((801, 803), 4), ((1601, 2003), 8), ((4001, 1703), 8)]
)
def test_large_images_are_decoded_smaller(
    size: tuple[int, int],
    reduction: int,
    photographs: dict[str, Pixels],
    to_bytes: Encode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To twice the short side wanted, which leaves the picture as it was, to the edge."""
    shapes = []

    def decode(*arguments: Any, **options: Any) -> Pixels:
        shapes.append(pixels := simplejpeg_decode(*arguments, **options))
        return pixels

    simplejpeg_decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    source = to_bytes(Image.fromarray(resized_by_pil(photographs["china"], *size)), quality=95)
    data, _, height, width = transform(source, Codec.JPEG, *size, config(short_side=100, quality=100))
    assert [pixels.shape[:2] for pixels in shapes] == [tuple(-(-side // reduction) for side in size)]
    full = resize_pixels(decoded(source), height, width)
    error = difference(decoded(data), through_jpeg(full, 100))
    assert error.mean() < 1.5
    assert error[:, -3:].mean() < 2
    assert error[-3:].mean() < 2


def test_a_24_megapixel_photograph(photographs: dict[str, Pixels], to_bytes: Encode) -> None:
    pixels = resized_by_pil(photographs["flower"], 4000, 6000)
    source = to_bytes(Image.fromarray(pixels))
    data, _, height, width = transform(source, Codec.JPEG, 4000, 6000, config(short_side=256))
    assert (height, width) == (256, 384)
    assert difference(decoded(data), through_jpeg(resize_pixels(pixels, 256, 384), 90)).mean() < 1.5
    assert reencode._memory.reserve(0).size < 16 * 1024 * 1024


# --- kept as it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize(
    "options",
    [
        {"short_side": 40},
        {"short_side": 10_000},
        {"orient": True},
        {"orient": True, "short_side": 41},
    ],
)
def test_bytes_that_need_no_change_are_untouched(
    codec: Codec, options: dict[str, Any], make_photo: Photo, to_bytes: Encode
) -> None:
    for given in ({}, {"exif": exif(1)}, {"exif": exif(9)}, {"exif": exif(0)}):
        data = to_bytes(make_photo(0), codec.name, **given)
        assert transform(data, codec, 40, 60, config(**options)) == (data, codec, 40, 60)


def test_without_orient_a_rotated_image_is_untouched_or_keeps_its_raw_orientation(
    make_photo: Photo, to_bytes: Encode
) -> None:
    data = to_bytes(make_photo(0), exif=exif(6))
    assert transform(data, Codec.JPEG, 40, 60, config(short_side=50))[0] is data
    smaller, _, height, width = transform(data, Codec.JPEG, 40, 60, config(short_side=20))
    assert (height, width) == (20, 30)
    assert Image.open(io.BytesIO(smaller)).getexif() == {}


def test_a_strip_that_no_jpeg_holds_is_untouched(to_bytes: Encode) -> None:
    strip = Image.fromarray(np.zeros((3, 100_000, 3), np.uint8))
    data = to_bytes(strip, "PNG")
    assert transform(data, Codec.PNG, 3, 100_000, config(short_side=2)) == (data, Codec.PNG, 3, 100_000)
    assert transform(data, Codec.PNG, 3, 100_000, config(short_side=1))[1:] == (Codec.JPEG, 1, 33_333)
    turned = to_bytes(strip, "PNG", exif=exif(6))
    assert transform(turned, Codec.PNG, 3, 100_000, config(orient=True))[0] is turned


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 3000), (3000, 2)])
def test_thin_images(size: tuple[int, int], to_bytes: Encode) -> None:
    image = Image.fromarray(np.full((*size, 3), 90, np.uint8))
    data, _, height, width = transform(
        to_bytes(image, exif=exif(8)), Codec.JPEG, *size, config(short_side=1, orient=True)
    )
    factor = min(size)
    assert (width, height) == (size[0] // factor, size[1] // factor)
    assert decoded(data).shape == (height, width, 3)


# --- orientation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_pil_does(orientation: int, make_photo: Photo, to_bytes: Encode) -> None:
    for codec in Codec:
        source = to_bytes(make_photo(1), codec.name, exif=exif(orientation), lossless=True)
        assert read_orientation(source, codec) == orientation
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(source))))
        np.testing.assert_array_equal(turn(decoded(source), orientation), upright)
        data, codec_after, height, width = transform(source, codec, 40, 60, config(orient=True, quality=100))
        assert (height, width) == upright.shape[:2]
        if orientation == 1:
            assert data is source
            continue
        assert codec_after is Codec.JPEG
        assert difference(decoded(data), through_jpeg(upright, 100)).max() <= 3  # two builds of libjpeg
        assert Image.open(io.BytesIO(data)).getexif() == {}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_made_smaller_and_turned(orientation: int, make_photo: Photo, to_bytes: Encode) -> None:
    source = to_bytes(make_photo(1, 40, 61), exif=exif(orientation))
    data, _, height, width = transform(source, Codec.JPEG, 40, 61, config(orient=True, short_side=20, quality=100))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(source))))
    assert (height, width) == ((20, 30) if orientation < 5 else (30, 20))
    wanted = through_jpeg(resized_by_pil(upright, height, width), 100)
    assert difference(decoded(data), wanted).mean() < 1


def test_orientations_elsewhere_than_in_exif(make_photo: Photo, to_bytes: Encode) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="3"/>'
    assert read_orientation(to_bytes(make_photo(0), xmp=xmp), Codec.JPEG) == 3
    assert read_orientation(to_bytes(make_photo(0), "WEBP", xmp=xmp), Codec.WEBP) == 3
    icc = to_bytes(make_photo(0), icc_profile=bytes(200_000), exif=exif(5))  # segments of 64 kB before and after
    assert read_orientation(icc, Codec.JPEG) == 5
    filled = icc[:2] + b"\xff\xff" + icc[2:]  # fill bytes before a marker are legal
    assert read_orientation(filled, Codec.JPEG) == 5


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("codec", list(Codec))
def test_damaged_exif_is_no_orientation_or_one(codec: Codec, make_photo: Photo, to_bytes: Encode) -> None:
    source = to_bytes(make_photo(0), codec.name, exif=exif(6))
    at = source.rindex(b"MM\0*")
    draw = random.Random(0)
    for _ in range(1500):
        damaged = bytearray(source)
        for _ in range(draw.randint(1, 4)):
            damaged[at + draw.randrange(26)] = draw.choice((0, 1, 2, 255, draw.randrange(256)))
        assert 1 <= read_orientation(bytes(damaged[: draw.choice((None, at + draw.randrange(30)))]), codec) <= 8


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "mode"),
    [
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "P"),
        ("PNG", "RGBA"),
        ("PNG", "LA"),
        ("PNG", "1"),
        ("WEBP", "RGB"),
        ("WEBP", "RGBA"),
    ],
)
def test_formats(codec: str, mode: str, make_photo: Photo, to_bytes: Encode) -> None:
    image = make_photo(3, 80, 120)
    if mode.endswith("A"):
        image.putalpha(make_photo(4, 80, 120).convert("L"))
    source = to_bytes(image.convert(mode), codec)
    data, codec_after, height, width = transform(source, Codec[codec], 80, 120, config(short_side=50, quality=95))
    assert (codec_after, height, width) == (Codec.JPEG, 50, 75)
    colours = "Gray" if (codec, mode) == ("JPEG", "L") else "YCbCr"
    assert simplejpeg.decode_jpeg_header(data)[2] == colours
    assert difference(decoded(data), through_jpeg(resize_pixels(decoded(source), 50, 75), 95)).mean() < 1.5


def test_16_bit_gray_is_scaled_not_clipped(to_bytes: Encode) -> None:
    ramp = np.linspace(0, 65535, 200).astype(np.uint16)[None].repeat(100, axis=0)
    data, *_ = transform(to_bytes(Image.fromarray(ramp), "PNG"), Codec.PNG, 100, 200, config(short_side=50))
    assert difference(decoded(data)[:, :, 0], np.linspace(0, 255, 100).astype(np.uint8)[None]).max() <= 4


# --- verdicts, threads, processes -----------------------------------------------------------------------------------


def is_good(run: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
    try:
        run(*arguments, **options)
    except (ValueError, RejectedError):
        return False
    return True


def damage(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(4, len(changed))] = draw.choice((0, 255, draw.randrange(256)))
    return bytes(changed[: draw.choice((len(changed), draw.randrange(4, len(changed))))])


def test_damaged_jpegs_are_refused_as_by_the_check(make_photo: Photo, to_bytes: Encode) -> None:
    """At full size and decoded smaller: `replaces_check` stands on it."""
    draw = random.Random(1)
    gray = make_photo(5).convert("L")
    verdicts = []
    for source in (to_bytes(make_photo(5)), to_bytes(make_photo(5), progressive=True), to_bytes(gray)):
        for _ in range(300):
            data = damage(source, draw)
            if not is_good(simplejpeg.decode_jpeg_header, data):
                continue
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            if height * width > 10_000:
                continue
            good = is_good(check, data, Codec.JPEG, max_pixels=10_000)
            for short_side in (1, 5, min(height, width) - 1):
                cfg = config(short_side=max(short_side, 1))
                if replaces_check(data, Codec.JPEG, height, width, cfg):
                    assert is_good(transform, data, Codec.JPEG, height, width, cfg) == good
                    verdicts.append(good)
    assert min(verdicts.count(True), verdicts.count(False)) > 50


def test_where_the_check_is_replaced(make_photo: Photo, to_bytes: Encode) -> None:
    smaller, upright = config(short_side=20), config(orient=True)
    jpeg, turned = to_bytes(make_photo(0)), to_bytes(make_photo(0), exif=exif(6))
    assert replaces_check(jpeg, Codec.JPEG, 40, 60, smaller)
    assert replaces_check(turned, Codec.JPEG, 40, 60, upright)
    assert not replaces_check(jpeg, Codec.JPEG, 40, 60, upright)
    assert not replaces_check(jpeg, Codec.JPEG, 40, 60, config(short_side=40))
    assert not replaces_check(to_bytes(make_photo(0).convert("CMYK")), Codec.JPEG, 40, 60, smaller)
    assert not replaces_check(to_bytes(make_photo(0), "PNG"), Codec.PNG, 40, 60, smaller)


def test_the_same_bytes_in_other_threads_and_processes(to_bytes: Encode) -> None:
    tasks = []
    for seed in range(6):
        pixels = np.random.default_rng(seed).integers(0, 256, (90 + 41 * seed, 130, 3), dtype=np.uint8)
        codec = Codec.JPEG if seed % 2 else Codec.PNG
        data = to_bytes(Image.fromarray(pixels), codec.name, exif=exif(seed + 1))
        tasks.append((data, codec, 90 + 41 * seed, 130, config(short_side=40 + seed, orient=True)))
    expected = [transform(*task)[0] for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda task: transform(*task)[0], tasks * 4)) == expected * 4
    program = (
        "import pickle, sys; from crisp.shard_imagenet.reencode import transform\n"
        "for task in pickle.load(sys.stdin.buffer): sys.stdout.buffer.write(transform(*task)[0])"
    )
    run = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(tasks), capture_output=True, check=True)
    assert run.stdout == b"".join(expected)


def test_numba_is_loaded_only_to_resize(to_bytes: Encode, make_photo: Photo) -> None:
    program = (
        "import sys; from crisp.shard_imagenet import reencode\n"
        "from crisp.shard_imagenet.config import ShardConfig\n"
        "data = sys.stdin.buffer.read(); cfg = ShardConfig(source='a', out='b', short_side=40, orient=True)\n"
        "assert reencode.transform(data, 1, 40, 60, cfg)[0] is data\n"
        "print('numba' in sys.modules, 'torch' in sys.modules)"
    )
    data = to_bytes(make_photo(0))
    run = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True)
    assert run.stdout.split() == [b"False", b"False"]
