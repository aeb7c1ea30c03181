"""The CPU renderer against the plain one, against the geometry, and on files that are out of the ordinary."""

import dataclasses
import gc
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from crisp.batch import Batch
from crisp.config import ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.decode import READ_AHEAD, Decoder
from crisp.pipelines.plain import render_plain
from crisp.pipelines.plan import make_plan
from crisp.pipelines.source import Work

IMAGES = ("reference", "global_views", "local_views")
MEAN, STD = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def photograph(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Coloured noise at several scales: edges, saturated areas and fine detail."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for side, weight in ((3, 1.0), (17, 0.7), (90, 0.4)):
        noise = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += weight * (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float64) - 127)
    return np.clip(total * 1.3 + 127, 0, 255).astype(np.uint8)


def file(pixels: NDArray[Any], file_format: str = "JPEG", mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, file_format, **options)
    return buffer.getvalue()


def work_of(encoded: list[bytes], sizes: list[tuple[int, int]], views: ViewsConfig, *, epoch: int = 0) -> Work:
    height, width = np.array(sizes).T
    sample_id = np.arange(40, 40 + len(encoded))
    plan = make_plan(views, seed=3, epoch=epoch, sample_id=sample_id, height_px=height, width_px=width)
    return Work(encoded=[memoryview(data) for data in encoded], plan=plan, label=np.zeros(len(encoded), np.int64))


@pytest.fixture(scope="module")
def photographs() -> Work:
    sizes = [(333, 500), (375, 281), (97, 64), (31, 700)]
    return work_of([file(photograph(*size, seed)) for seed, size in enumerate(sizes)], sizes, ViewsConfig())


@pytest.fixture
def renderer() -> Iterator[CpuRenderer]:
    renderer = CpuRenderer(ViewsConfig(), threads=2)
    yield renderer
    renderer.close()


def assert_same_levels(batch: Batch, plain: Batch) -> None:
    """Float32 sums against float64 ones may round the other way, once per stage; and only rarely."""
    for name in IMAGES:
        got, expected = getattr(batch, name).double().numpy(), getattr(plain, name).numpy()
        difference = np.abs(got - expected) * STD * 255
        assert (difference < 0.01).mean() > 0.995, name
        # a level that differs by one before solarising may fall on the other side of 128, where 127 meets 128
        assert difference.max() < 2.01, name


def test_ramps(ramp_work: Any) -> None:
    renderer = CpuRenderer(ramp_work.views, threads=2)
    ramp_work.check(renderer.render(ramp_work.work))
    renderer.close()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_agrees_with_the_plain_renderer(photographs: Work, interpolation: Any) -> None:
    """Every draw of the recipe; blur, solarise and grayscale all occur among these views."""
    plan = photographs.plan
    assert (plan.blur_sigma_px > 0).any()
    assert (plan.blur_sigma_px == 0).any()
    assert plan.solarize.any()
    assert plan.flip.any()
    views = ViewsConfig(interpolation=interpolation)
    renderer = CpuRenderer(views, threads=2)
    assert_same_levels(renderer.render(photographs), render_plain(photographs, views))
    renderer.close()


def test_agrees_with_the_plain_renderer_on_sides_that_are_not_whole_vectors() -> None:
    views = ViewsConfig(patch_px=14, reference_px=154, global_px=126, local_px=70, local_views=3)
    sizes = [(150, 200), (71, 33)]
    work = work_of([file(photograph(*size, 9)) for size in sizes], sizes, views)
    renderer = CpuRenderer(views, threads=1)
    assert_same_levels(renderer.render(work), render_plain(work, views))
    renderer.close()


def test_blur_of_every_width_agrees_with_the_plain_renderer() -> None:
    views = ViewsConfig(patch_px=4, reference_px=16, global_px=16, local_px=4, local_views=10, blur_sigma_px=(0.1, 3.0))
    work = work_of([file(photograph(50, 60))], [(50, 60)], views)
    sigma = np.linspace(0.1, 3.0, 12, dtype=np.float32)[None]  # up to radius 9 on a side of 4: mirrored repeatedly
    work = dataclasses.replace(work, plan=dataclasses.replace(work.plan, blur_sigma_px=sigma))
    renderer = CpuRenderer(views, threads=1)
    assert_same_levels(renderer.render(work), render_plain(work, views))
    renderer.close()


def test_blur_is_opencvs(renderer: CpuRenderer, photographs: Work) -> None:
    cv2 = pytest.importorskip("cv2")
    still = dataclasses.replace(
        photographs.plan,
        color_matrix=np.broadcast_to(np.eye(3, 4, dtype=np.float32), photographs.plan.color_matrix.shape).copy(),
        solarize=np.zeros_like(photographs.plan.solarize),
        blur_sigma_px=np.zeros_like(photographs.plan.blur_sigma_px),
    )
    sigma = 1.3
    blurred = dataclasses.replace(still, blur_sigma_px=np.full_like(still.blur_sigma_px, sigma))
    sharp, soft = (
        np.rint(
            (renderer.render(dataclasses.replace(photographs, plan=plan)).local_views.double().numpy() * STD + MEAN)
            * 255
        )
        for plan in (still, blurred)
    )
    expected = cv2.GaussianBlur(
        sharp[0, 0].transpose(1, 2, 0).astype(np.uint8), (9, 9), sigma, borderType=cv2.BORDER_REFLECT_101
    )
    difference = np.abs(soft[0, 0].transpose(1, 2, 0) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.1


def test_same_output_for_any_number_of_threads(photographs: Work) -> None:
    batches = []
    for threads in (1, 2, 3):
        renderer = CpuRenderer(ViewsConfig(), threads=threads)
        batches.append(renderer.render(photographs))
        renderer.close()
    for field in dataclasses.fields(Batch):
        first, *others = (getattr(batch, field.name) for batch in batches)
        assert all(torch.equal(first, other) for other in others), field.name


def test_two_callers_share_one_renderer(renderer: CpuRenderer, photographs: Work) -> None:
    expected = renderer.render(photographs)
    with ThreadPoolExecutor(2) as pool:
        for batch in pool.map(renderer.render, [photographs] * 4):
            assert all(torch.equal(getattr(batch, name), getattr(expected, name)) for name in IMAGES)


def test_what_the_plan_says_beside_pixels_is_passed_on(renderer: CpuRenderer, photographs: Work) -> None:
    batch, plan = renderer.render(photographs), photographs.plan
    for name in ("view_from_reference", "patch_masks", "region_seed", "sample_id"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), getattr(plan, name))
    np.testing.assert_array_equal(batch.label.numpy(), photographs.label)


def test_float16_is_the_rounded_float32(renderer: CpuRenderer, photographs: Work) -> None:
    half = CpuRenderer(ViewsConfig(), threads=1, dtype=torch.float16)
    batch, full = half.render(photographs), renderer.render(photographs)
    for name in IMAGES:
        assert torch.equal(getattr(batch, name), getattr(full, name).half()), name
    half.close()


def test_a_batch_that_is_held_is_not_overwritten(renderer: CpuRenderer, photographs: Work) -> None:
    first = renderer.render(photographs)
    address, view = first.global_views.data_ptr(), first.global_views[1, :2]
    copy = view.clone()
    del first  # a view is held still
    gc.collect()
    assert renderer.render(photographs).global_views.data_ptr() != address
    assert torch.equal(view, copy)
    del view
    addresses = {renderer.render(photographs).global_views.data_ptr() for _ in range(4)}
    assert address in addresses, "memory is used again"
    assert len(addresses) <= 2


ODD_FILES = {
    "gray": file(photograph(120, 90), mode="L"),
    "cmyk": file(photograph(120, 90), mode="CMYK"),
    "progressive": file(photograph(120, 90), progressive=True),
    "png": file(photograph(120, 90), "PNG"),
    "png palette": file(photograph(120, 90), "PNG", mode="P"),
    "png alpha": file(photograph(120, 90), "PNG", mode="RGBA"),
    "webp": file(photograph(120, 90), "WEBP", lossless=True),
    "1x1": file(photograph(1, 1)),
    "1x1 png": file(photograph(1, 1), "PNG"),
    "3x400": file(photograph(3, 400)),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_files_are_decoded_as_pil_does(renderer: CpuRenderer, name: str) -> None:
    data = ODD_FILES[name]
    pil = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    decoded = Decoder()(memoryview(data))
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - pil).max() <= 3  # two builds of libjpeg may differ in chroma
    work = work_of([data], [pil.shape[:2]], ViewsConfig())
    assert_same_levels(renderer.render(work), render_plain(work, ViewsConfig()))


def test_exif_rotation_is_ignored(renderer: CpuRenderer) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = photograph(60, 80)
    batches = [
        renderer.render(work_of([data], [(60, 80)], ViewsConfig())) for data in (file(pixels), file(pixels, exif=exif))
    ]
    assert torch.equal(batches[0].reference, batches[1].reference)
    assert torch.equal(batches[0].global_views, batches[1].global_views)


def test_16_bit_gray_is_scaled() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    decoded = Decoder()(memoryview(file(ramp, "PNG")))
    np.testing.assert_array_equal(decoded[0, :, 1], np.arange(256))


def test_a_jpeg_with_stray_bytes_is_an_image() -> None:
    """libjpeg only warns about them, and data sets hold such files."""
    data = file(photograph(40, 50))
    stray = data[:-2] + bytes(20) + data[-2:]
    np.testing.assert_array_equal(Decoder()(memoryview(stray)), Decoder()(memoryview(data)))


def test_decoded_memory_has_room_to_read_ahead() -> None:
    decoder = Decoder()
    for data in (ODD_FILES["1x1"], ODD_FILES["cmyk"], ODD_FILES["png"], file(photograph(211, 97))):
        memory, height, width = decoder.decode_flat(memoryview(data))
        assert memory.size >= height * width * 3 + READ_AHEAD


@pytest.mark.parametrize(
    "data", [b"", b"not an image", ODD_FILES["progressive"][:900], ODD_FILES["png"][:200], ODD_FILES["gray"][:30]]
)
def test_an_undecodable_image_names_its_sample(renderer: CpuRenderer, data: bytes) -> None:
    good = file(photograph(120, 90))
    work = work_of([good, data, good], [(120, 90)] * 3, ViewsConfig())
    with pytest.raises(CrispError, match=r"^sample 41: cannot be decoded \(.*shard the source again") as caught:
        renderer.render(work)
    assert "\n" not in str(caught.value)
    renderer.render(work_of([good], [(120, 90)], ViewsConfig()))  # and the renderer lives on


def test_a_window_outside_the_image_names_its_sample(renderer: CpuRenderer) -> None:
    work = work_of([file(photograph(120, 90))], [(300, 400)], ViewsConfig())
    with pytest.raises(CrispError, match="sample 40: a window of its plan leaves the image of 90×120 px"):
        renderer.render(work)


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 1, "dtype": torch.float64}])
def test_wrong_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(CrispError):
        CpuRenderer(ViewsConfig(), **options)


def test_rendering_starts_no_threads_but_its_own() -> None:
    """Libraries that start a pool of their own inside each thread would oversubscribe the machine."""
    program = f"""
import os, sys, threading
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_cpu import file, photograph, work_of
from crisp.config import ViewsConfig
from crisp.pipelines.cpu import CpuRenderer
work = work_of([file(photograph(300, 400))] * 6, [(300, 400)] * 6, ViewsConfig())
before = set(os.listdir("/proc/self/task"))
renderer = CpuRenderer(ViewsConfig(), threads=2)
renderer.render(work)
print(len(set(os.listdir("/proc/self/task")) - before))
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "2"


@pytest.mark.slow
def test_agrees_with_the_plain_renderer_on_real_photographs() -> None:
    folder = Path(os.environ.get("CRISP_TEST_DATA", "")) / "imagenet-samples"
    if "CRISP_TEST_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("CRISP_TEST_DATA names no folder with imagenet-samples")
    encoded = [path.read_bytes() for path in sorted(folder.iterdir())[:12]]
    sizes = [Decoder()(memoryview(data)).shape[:2] for data in encoded]
    work = work_of(encoded, sizes, ViewsConfig())
    renderer = CpuRenderer(ViewsConfig(), threads=2)
    assert_same_levels(renderer.render(work), render_plain(work, ViewsConfig()))
    renderer.close()
