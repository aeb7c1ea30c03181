import dataclasses
import functools
import gc
import io
import itertools
import multiprocessing
import operator
import os
import re
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import crisp
from crisp.batch import Batch
from crisp.config import DaliConfig, ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.constants import IMAGENET_STD
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.faults import SampleError
from crisp.pipelines.plan import Plan, make_plan
from crisp.pipelines.source import Work

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'crisp-ssl[cuda13]'")

from nvidia.dali import backend, fn, pipeline_def

import crisp.pipelines.dali
from crisp.pipelines.dali import DaliRenderer
from crisp.pipelines.dali_extra import dali_available
from crisp.pipelines.dali_graph import build_graph

PHOTOGRAPHS = [
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "chelsea.png"),
    ("skimage.data", "coffee.png"),
    ("skimage.data", "rocket.jpg"),
    ("sklearn.datasets.images", "china.jpg"),
    ("sklearn.datasets.images", "flower.jpg"),
]
SMALL = ViewsConfig(local_views=2, local_px=32, global_px=64, reference_px=64)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    encoded = []
    for package, name in PHOTOGRAPHS:
        data = (files(package) / name).read_bytes()
        if name.endswith(".png"):
            data = saved(Image.open(io.BytesIO(data)).convert("RGB"), "JPEG", quality=92)
        encoded.append(data)
    return encoded


def drawn(encoded: list[bytes], views: ViewsConfig, *, step: int = 0) -> Work:
    sizes = np.array([Image.open(io.BytesIO(data)).size for data in encoded], np.int64)
    plan = make_plan(
        views,
        seed=3,
        epoch=step,
        sample_id=np.arange(len(encoded)),
        height_px=sizes[:, 1],
        width_px=sizes[:, 0],
    )
    # bytes, not memoryviews: spawned workers get their source pickled
    return Work(encoded=encoded, plan=plan, label=np.arange(len(encoded)))  # type: ignore[arg-type]


def only(plan: Plan, *kept: str) -> Plan:
    """The plan with crops and flips, and of the rest only what is kept."""
    neutral = {
        "blur_sigma_px": np.zeros_like(plan.blur_sigma_px),
        "color_factors": np.tile(np.float32([1, 1, 1, 0]), (*plan.flip.shape, 1)),
        "color_matrix": np.tile(np.eye(3, 4, dtype=np.float32), (*plan.flip.shape, 1, 1)),
        "solarize": np.zeros_like(plan.solarize),
    }
    return dataclasses.replace(plan, **{name: value for name, value in neutral.items() if name not in kept})


def dali(views: ViewsConfig, steps: list[Work], **options: Any) -> DaliRenderer:
    return DaliRenderer(
        views,
        source=functools.partial(operator.getitem, steps),
        **{
            "batch_size": len(steps[0].encoded),
            "device": "cpu",
            "device_id": None,
            "threads": 2,
            "prefetch_batches": 1,
            "options": DaliConfig(workers=0),
            **options,
        },
    )


def rendered(views: ViewsConfig, work: Work, **options: Any) -> Batch:
    return next(dali(views, [work], **options).batches(0))


def cpu_rendered(views: ViewsConfig, work: Work) -> Batch:
    renderer = CpuRenderer(views, threads=2)
    batch = renderer.render(dataclasses.replace(work, encoded=[memoryview(data) for data in work.encoded]))
    renderer.close()
    return batch


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def assert_same(one: Batch, other: Batch) -> None:
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, getattr(other, name)), name


def apart(one: Batch, other: Batch, name: str) -> float:
    """Mean absolute difference in levels of 255."""
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    difference = getattr(one, name).float() - getattr(other, name).float()
    return float((difference * std * 255).abs().mean())


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_ramps(ramp_work: Any) -> None:
    ramp_work.check(rendered(ramp_work.views, ramp_work.work))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_geometry_is_the_cpu_renderers(photographs: list[bytes], interpolation: Any) -> None:
    views = ViewsConfig(local_views=4, interpolation=interpolation)
    work = drawn(photographs, views)
    work = dataclasses.replace(work, plan=only(work.plan))
    ours, theirs = rendered(views, work), cpu_rendered(views, work)
    for name in ("reference", "global_views", "local_views"):
        assert apart(ours, theirs, name) < 0.1, name


@pytest.mark.parametrize(
    "kept",
    [("blur_sigma_px",), ("color_factors", "color_matrix"), ("solarize",)],
    ids=["blur", "colour", "solarise"],
)
def test_photometry_is_the_cpu_renderers_each_on_its_own(photographs: list[bytes], kept: tuple[str, ...]) -> None:
    views = ViewsConfig(
        local_views=4, solarize_probability=(0.5, 0.5, 0.5), blur_probability=(1, 1, 1), jitter_probability=1
    )
    work = drawn(photographs, views)
    plain, work = (dataclasses.replace(work, plan=only(work.plan, *names)) for names in ((), kept))
    ours, theirs, without = rendered(views, work), cpu_rendered(views, work), rendered(views, plain)
    for name in ("global_views", "local_views"):
        assert apart(ours, theirs, name) < 0.4, name
        assert apart(ours, without, name) > 1, f"{name}: the plan's {kept[0]} shows nowhere"
    assert torch.equal(ours.reference, without.reference), "the reference is not to be augmented"


def test_everything_together_is_the_cpu_renderers(photographs: list[bytes]) -> None:
    views = ViewsConfig()
    work = drawn(photographs, views)
    ours, theirs = rendered(views, work), cpu_rendered(views, work)
    for name in ("reference", "global_views", "local_views"):
        assert apart(ours, theirs, name) < 0.4, name
    for name in ("view_from_reference", "patch_masks", "region_seed", "label", "sample_id"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_half_precision(photographs: list[bytes]) -> None:
    work = drawn(photographs, SMALL)
    half = rendered(SMALL, work, dtype=torch.float16)
    for name in ("reference", "global_views", "local_views"):
        assert getattr(half, name).dtype == torch.float16
        assert apart(half, rendered(SMALL, work), name) < 0.05, name


ODD_FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grayscale JPEG": ("L", "JPEG", {}),
    "CMYK JPEG": ("CMYK", "JPEG", {}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True}),
    "JPEG with 4:2:0 chroma": ("RGB", "JPEG", {"subsampling": "4:2:0"}),
    "JPEG stored as RGB": ("RGB", "JPEG", {"keep_rgb": True}),
    "rotated JPEG": ("RGB", "JPEG", {"exif": 6}),
    "PNG": ("RGB", "PNG", {}),
    "grayscale PNG": ("L", "PNG", {}),
    "palette PNG": ("P", "PNG", {}),
    "16-bit PNG": ("I;16", "PNG", {}),
    "PNG with alpha": ("RGBA", "PNG", {}),
    "rotated PNG": ("RGB", "PNG", {"exif": 6}),
    "lossy WebP": ("RGB", "WEBP", {"quality": 90}),
    "lossless WebP": ("RGB", "WEBP", {"lossless": True}),
    "rotated WebP": ("RGB", "WEBP", {"lossless": True, "exif": 6}),
    "WebP with alpha": ("RGBA", "WEBP", {"quality": 90}),
    "JPEG of one pixel": ("RGB", "JPEG", {"size": (1, 1)}),
    "PNG of one pixel": ("RGB", "PNG", {"size": (1, 1)}),
    "JPEG of one row": ("RGB", "JPEG", {"size": (57, 1)}),
}


def odd_file(photograph: bytes, mode: str, file_format: str, options: dict[str, Any]) -> bytes:
    options = dict(options)
    image = Image.open(io.BytesIO(photograph)).resize(options.pop("size", (83, 61)))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256 + 77)
    else:
        image = image.convert(mode)
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options["exif"] = exif
    return saved(image, file_format, **options)


@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_files_decode_as_in_the_cpu_renderer(photographs: list[bytes], kind: str) -> None:
    work = drawn([odd_file(photographs[0], *ODD_FILES[kind])], SMALL)
    work = dataclasses.replace(work, plan=only(work.plan))
    ours, theirs = rendered(SMALL, work), cpu_rendered(SMALL, work)
    assert apart(ours, theirs, "reference") < 0.5


def test_webps_whose_exif_follows_an_odd_chunk(photographs: list[bytes]) -> None:
    lengths = set()
    for side in range(40, 48):
        data = odd_file(photographs[0], "RGB", "WEBP", {"lossless": True, "exif": 6, "size": (side, side)})
        lengths.add(data[data.index(b"VP8L") + 4] % 2)
        rendered(SMALL, drawn([data], SMALL))
    assert lengths == {0, 1}


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(photographs: list[bytes]) -> list[Work]:
    return [drawn(photographs[step % 3 : step % 3 + 3], SMALL, step=step) for step in range(9)]


def test_layout_and_what_passes_through(steps: list[Work]) -> None:
    batch, plan = rendered(SMALL, steps[0]), steps[0].plan
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors(batch).items()}
    assert shapes == {
        "reference": ((3, 3, 64, 64), torch.float32),
        "global_views": ((2, 3, 3, 64, 64), torch.float32),
        "local_views": ((2, 3, 3, 32, 32), torch.float32),
        "view_from_reference": ((4, 3, 2, 3), torch.float32),
        "patch_masks": ((2, 3, 16), torch.bool),
        "region_seed": ((3, 1), torch.int64),
        "label": ((3,), torch.int64),
        "sample_id": ((3,), torch.int64),
    }
    assert all(tensor.is_contiguous() for tensor in tensors(batch).values())
    for name in ("view_from_reference", "patch_masks", "region_seed", "sample_id"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), getattr(plan, name))
    np.testing.assert_array_equal(batch.label.numpy(), steps[0].label)


def test_no_local_views(photographs: list[bytes]) -> None:
    views = dataclasses.replace(SMALL, local_views=0)
    assert rendered(views, drawn(photographs, views)).local_views.shape == (0, 6, 3, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_renders_to_the_same_bytes_wherever_one_starts(steps: list[Work], workers: int) -> None:
    options = {"options": DaliConfig(workers=workers), "prefetch_batches": 2}
    renderer = dali(SMALL, steps, **options)
    from_0 = [batch for batch, _ in zip(renderer.batches(0), range(4), strict=False)]
    from_2 = [batch for batch, _ in zip(renderer.batches(2), range(2), strict=False)]
    renderer.close()
    for step in range(4):
        assert_same(from_0[step], rendered(SMALL, steps[step], threads=1))
    for step in range(2):
        assert_same(from_2[step], from_0[2 + step])
    assert not torch.equal(from_0[0].global_views, from_0[1].global_views)


def test_a_sample_is_the_same_in_a_batch_of_another_size(photographs: list[bytes]) -> None:
    together = rendered(SMALL, drawn(photographs, SMALL))
    pair = rendered(SMALL, drawn(photographs[:2], SMALL))
    assert torch.equal(pair.reference, together.reference[:2])
    assert torch.equal(pair.global_views, together.global_views[:, :2])
    assert torch.equal(pair.local_views, together.local_views[:, :2])


def test_closing_ends_the_iterator_and_its_processes_but_not_its_batches(steps: list[Work]) -> None:
    before = set(multiprocessing.active_children())
    renderer = dali(SMALL, steps, options=DaliConfig(workers=1))
    iterator = renderer.batches(0)
    batch = next(iterator)
    kept = {name: tensor.clone() for name, tensor in tensors(batch).items()}
    assert set(multiprocessing.active_children()) - before
    renderer.close()
    gc.collect()
    assert not set(multiprocessing.active_children()) - before
    rendered(SMALL, steps[1])  # would write over memory that is not the batch's own
    for name, tensor in kept.items():
        assert torch.equal(tensor, getattr(batch, name)), name
    assert next(iterator, None) is None


def test_a_second_iterator_ends_the_first(steps: list[Work]) -> None:
    renderer = dali(SMALL, steps)
    first = renderer.batches(0)
    next(first)
    second = renderer.batches(1)
    next(second)
    assert next(first, None) is None
    assert_same(next(second), rendered(SMALL, steps[2]))


# --- mistakes ---------------------------------------------------------------------------------------------------------


class Unreadable(list[Work]):
    """Steps of which one cannot be read, in this process or in a worker's."""

    def __getitem__(self, step: Any) -> Work:
        if step == 2:
            raise CrispError("shard-000001.tar: sample 7 has another checksum than the index says")
        return super().__getitem__(step)


def test_an_error_of_the_source_is_raised_as_it_is(steps: list[Work]) -> None:
    iterator = dali(SMALL, Unreadable(steps)).batches(0)
    next(iterator)
    next(iterator)
    with pytest.raises(CrispError, match=r"^shard-000001\.tar: sample 7 has another checksum"):
        next(iterator)


def test_an_error_in_a_worker_is_raised_as_it_is(steps: list[Work]) -> None:
    # DALI hands over a worker's exceptions as text in a plain Exception
    iterator = dali(SMALL, steps[:2], options=DaliConfig(workers=1)).batches(0)
    next(iterator)
    next(iterator)
    with pytest.raises(IndexError, match="list index out of range"):
        next(iterator)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_an_undecodable_image_is_named(steps: list[Work], damage: str) -> None:
    image = bytes(steps[1].encoded[2])
    broken = {"truncated": image[: len(image) // 2], "empty": b"", "text": b"not an image " * 9}[damage]
    bad = dataclasses.replace(steps[1], encoded=[*steps[1].encoded[:2], broken])
    iterator = dali(SMALL, [steps[0], bad]).batches(0)
    next(iterator)
    with pytest.raises(CrispError, match=r"^sample 2 of step 1: .*shard the source again"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)


def test_a_plan_of_other_views_is_refused(photographs: list[bytes]) -> None:
    with pytest.raises(AssertionError, match="other views"):
        rendered(ViewsConfig(local_views=3), drawn(photographs, ViewsConfig(local_views=2)))


def test_pixels_of_another_type_are_refused(steps: list[Work]) -> None:
    with pytest.raises(CrispError, match="bfloat16"):
        dali(SMALL, steps, dtype=torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_asked_for_where_there_is_none(steps: list[Work]) -> None:
    with pytest.raises(CrispError, match="torch sees no GPU"):
        dali(SMALL, steps, device="gpu")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_without_dali_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['nvidia.dali'] = None\n"
        "from crisp.errors import CrispError\n"
        "from crisp.pipelines.dali_extra import dali_available\n"
        "assert not dali_available()\n"
        "try: import crisp.pipelines.dali_graph\n"
        "except CrispError as error: print(error)"
    )
    message = python(code)
    assert dali_available()
    for part in ("crisp-ssl[cuda13]", "580", "crisp-ssl[cuda12]", "--data.renderer cpu"):
        assert part in message
    assert message.count("\n") == 1


def test_workers_import_no_torch() -> None:
    assert python("import sys, crisp.pipelines.dali_graph; print('torch' in sys.modules)") == "False\n"


def test_the_rest_of_the_package_never_imports_dali() -> None:
    package = Path(crisp.__file__).parent
    sources = [
        Path(folder) / name
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    assert len(sources) > 20
    importing = {
        path.name for path in sources if re.search(r"^ *(from|import) nvidia\b", path.read_text(), re.MULTILINE)
    }
    assert importing == {"dali_extra.py", "dali_graph.py"}


# --- the GPU's graph, without a GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("local_views", [0, 10])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_gpu_graph_serialises(interpolation: Any, local_views: int, half: bool) -> None:
    views = ViewsConfig(interpolation=interpolation, local_views=local_views)
    source = functools.partial(operator.getitem, [])
    graph = build_graph(views, source=source, batch_size=4, device="gpu", half=half)
    assert len(graph.serialize()) > 10_000
    registered = {
        "gpu": set(backend.RegisteredGPUOps()),
        "mixed": set(backend.RegisteredMixedOps()),
        "cpu": set(backend.RegisteredCPUOps()),
    }
    used = {(getattr(op._op, "schema_name", type(op._op).__name__), op._op.device) for op in graph._ops}
    assert {name for name, device in used if device == "gpu"} == {
        "Resize", "GaussianBlur", "ColorTwist", "CropMirrorNormalize",
        "_ArithmeticGenericOp", "_conditional__Split", "_conditional__Merge",
    }  # fmt: skip
    assert {name for name, device in used if device == "mixed"} == {"decoders__Image"}
    for name, device in used:
        assert name in registered[device], f"{name} has no {device} backend"
    assert [output.device for output in graph._graph_outputs] == ["gpu"] * (1 + views.views) + ["cpu"] + ["gpu"] * 4


def test_a_mistake_in_a_gpu_graph_shows_without_a_gpu() -> None:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def wrong() -> Any:
        encoded = fn.external_source(lambda: None)
        return fn.resize(fn.decoders.image(encoded, device="mixed"), device="cpu", size=[8, 8])

    with pytest.raises(RuntimeError, match=r"device|CPU|GPU"):
        wrong().serialize()


def a_gif(photographs: list[bytes]) -> bytes:
    """PIL takes it, and so does the CPU renderer; DALI dies of it."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(photographs[0])).save(buffer, "GIF")
    return buffer.getvalue()


def test_what_only_dali_cannot_decode_is_found_by_trying_each(
    steps: list[Work], photographs: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    good = [list(work.encoded) for work in steps]
    expected = [dataclasses.replace(work, encoded=list(images)) for work, images in zip(steps, good, strict=True)]
    bad = [dataclasses.replace(work, encoded=list(images)) for work, images in zip(steps, good, strict=True)]
    bad[2].encoded[1] = memoryview(a_gif(photographs))
    blamed = []

    def put_back(work: Work, b: int, fault: SampleError) -> None:
        blamed.append((work is bad[2], b, fault.kind))
        work.encoded[b] = good[2][b]

    found = itertools.islice(dali(SMALL, bad, replace=put_back).batches(0), len(steps))
    for batch, other in zip(found, dali(SMALL, expected).batches(0), strict=False):
        assert_same(batch, other)
    assert blamed == [(True, 1, "decode")]
    assert "its graph is built again" in caplog.text


def test_a_graph_that_always_dies_is_given_up(steps: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        def run(self, stream: Any) -> None:
            raise RuntimeError("first line\nout of memory")

    monkeypatch.setattr(crisp.pipelines.dali, "build_graph", lambda *args, **options: Dead())
    with pytest.raises(CrispError, match=r"step 1: DALI failed 3 times, at no image in particular \(out of memory\)"):
        next(dali(SMALL, steps).batches(1))


def test_a_graph_that_hangs_is_built_again(steps: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    real, built = crisp.pipelines.dali.build_graph, []

    class Stuck:
        def run(self, stream: Any) -> None:
            time.sleep(5)

    def build(*args: Any, **options: Any) -> Any:
        built.append(options["first_step"])
        return Stuck() if len(built) == 1 else real(*args, **options)

    monkeypatch.setattr(crisp.pipelines.dali, "build_graph", build)
    batch = next(dali(SMALL, steps, timeout_s=0.1, replace=None).batches(1))
    assert built == [1, 1]
    assert torch.equal(batch.sample_id, torch.from_numpy(steps[1].plan.sample_id))
