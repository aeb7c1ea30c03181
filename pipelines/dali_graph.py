"""The DALI graph that renders a plan, on the GPU or, the same graph, on the CPU.

No torch here: the processes that read ahead of the graph unpickle `StepInputs` from this file and should start fast.
The graph draws nothing at random; every number that shapes a view is fed to it. So a step renders to the same pixels
whatever was rendered before it.

How near it comes to others on photographs, as a mean over pixels, in levels of 255:
- resizes, against the same filter in float64: .01 (global views) to .03 (local). What is left sits at a view's border:
  DALI filters a window with the pixels around it, as PIL's `resize(box=…)` does, and repeats the image's last pixel;
  the CPU renderer ends the filter at the window, as cropping first does.
- resizes, against PIL: .12 to .20, since PIL (and torch on uint8) round between the two axes and DALI does not.
- the whole recipe, against the CPU renderer: .21, since colour is not rounded to 8 bits here.
Decoded pixels are libjpeg-turbo's, bit for bit, on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crisp.config import ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.source import Work

try:
    from nvidia.dali import Pipeline, fn, math, pipeline_def, types
    from nvidia.dali.data_node import DataNode
except ModuleNotFoundError as error:
    raise CrispError(
        f"renderer dali: {error}; install it with pip install 'crisp-ssl[cuda13]' (NVIDIA driver 580 or later; "
        f"'crisp-ssl[cuda12]' from 525.60 on), or take --data.renderer cpu, which needs neither"
    ) from error

Source = Callable[[int], Work]
"""Work of a global step. Pure and picklable."""

DaliDevice = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderOptions:
    """Of the decoder on the GPU; none of it changes a pixel."""

    hardware_share: float = 0.75
    """Of the JPEGs, decoded by the hardware decoder where there is one"""
    preallocate_px: tuple[int, int] = (0, 0)
    """Width and height of images for which memory is reserved at once"""


class GraphInputs(NamedTuple):
    """What the graph is fed for a step: B samples along each first axis (V views, K seeds, n patches)."""

    encoded: list[NDArray[np.uint8]]
    """B × [bytes]"""
    window_px: NDArray[np.float32]
    """[B, V, 2, 2] (start, end) × (y, x); a flipped window starts at its right edge"""
    blur_sigma_px: NDArray[np.float32]
    """[B, V]; 0: no blur"""
    color_factors: NDArray[np.float32]
    """[B, V, 4] brightness, contrast, saturation, hue in degrees"""
    solarize: NDArray[np.bool_]
    """[B, V]"""
    view_from_reference: NDArray[np.float32]
    """[B, V, 2, 3]"""
    patch_masks: NDArray[np.bool_]
    """[B, 2, n]"""
    region_seed: NDArray[np.int64]
    """[B, K]"""
    label: NDArray[np.int64]
    """[B]"""
    sample_id: NDArray[np.int64]
    """[B]"""


# Of the fields above; dimensions per sample, without B.
_INPUT_DTYPES = [
    types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT, types.BOOL,
    types.FLOAT, types.BOOL, types.INT64, types.INT64, types.INT64,
]  # fmt: skip
_INPUT_NDIMS = [1, 3, 1, 2, 1, 3, 2, 1, 0, 0]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """DALI's callback: iteration i of a graph is global step `first_step` + i."""

    source: Source
    first_step: int
    views: ViewsConfig

    def __call__(self, iteration: int) -> GraphInputs:
        """Arrays of one step."""
        work = self.source(self.first_step + iteration)
        plan = work.plan
        check_drawn_for(self.views, work)
        x, y, width, height = np.moveaxis(plan.crop_px.astype(np.float32), -1, 0)
        start = np.stack([y, np.where(plan.flip, x + width, x)], axis=-1)
        end = np.stack([y + height, np.where(plan.flip, x, x + width)], axis=-1)
        encoded, *arrays = GraphInputs(
            encoded=[_readable(image) for image in work.encoded],
            window_px=np.stack([start, end], axis=-2),
            blur_sigma_px=plan.blur_sigma_px,
            color_factors=plan.color_factors,
            solarize=plan.solarize,
            view_from_reference=plan.view_from_reference.swapaxes(0, 1),
            patch_masks=plan.patch_masks.swapaxes(0, 1),
            region_seed=plan.region_seed,
            label=work.label,
            sample_id=plan.sample_id,
        )
        return GraphInputs._make([encoded, *map(np.ascontiguousarray, arrays)])  # DALI takes dense arrays alone


def _readable(image: memoryview) -> NDArray[np.uint8]:
    """The image's bytes, without what nvImageCodec 0.9 trips over.

    Looking for EXIF in an extended WebP it steps over chunks without their padding, and fails on those of odd length.
    Orientation is not asked for, so the header may as well say that there is none.
    """
    data = np.frombuffer(image, np.uint8)
    if bytes(image[:4]) == b"RIFF" and bytes(image[8:16]) == b"WEBPVP8X" and data[20] & 0x08:
        data = data.copy()
        data[20] ^= 0x08
    return data


def check_drawn_for(views: ViewsConfig, work: Work) -> None:
    """The graph leaves out blur and solarise where the config never draws them; the plan must agree."""
    plan = work.plan
    assert plan.flip.shape == (len(work.encoded), views.views), "the plan is of other views than the graph's"
    for view in range(views.views):
        group = min(view, 2)
        assert views.blur_probability[group] or not plan.blur_sigma_px[:, view].any(), f"view {view} is never blurred"
        assert views.solarize_probability[group] or not plan.solarize[:, view].any(), f"view {view} is never solarised"


def _resize(image: DataNode, side_px: int, views: ViewsConfig, **window: DataNode) -> DataNode:
    """A uint8 image, or a window of it, as a square; antialiased. A window that ends before it starts is flipped."""
    interpolation = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[views.interpolation]
    return fn.resize(image, size=[side_px, side_px], interp_type=interpolation, antialias=True, **window)


def _normalize(image: DataNode, dtype: types.DALIDataType) -> DataNode:
    """HWC in 0..255 → CHW, normalised."""
    return fn.crop_mirror_normalize(
        image,
        dtype=dtype,
        output_layout="CHW",
        mean=[255 * mean for mean in IMAGENET_MEAN],
        std=[255 * std for std in IMAGENET_STD],
    )


def _recolor(image: DataNode, factors: DataNode, view: int) -> DataNode:
    """One YIQ matrix for brightness, contrast, saturation and hue; clipped to 0..255, float32.

    Kept in float because uint8 is dear on the CPU: at 224 px color_twist takes 1.2 ms to uint8, .4 to float, and the
    clip .1.
    """
    brightness, contrast, saturation, hue_deg = (factors[view, i] for i in range(4))
    twisted = fn.color_twist(
        image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue_deg, dtype=types.FLOAT
    )
    return math.min(math.max(twisted, 0.0), 255.0)


def _feed(inputs: StepInputs, workers: int) -> Any:
    """`GraphInputs` whose fields are the graph's nodes."""
    return GraphInputs._make(
        fn.external_source(
            inputs,
            num_outputs=len(GraphInputs._fields),
            dtype=_INPUT_DTYPES,
            ndim=_INPUT_NDIMS,
            batch=True,
            parallel=workers > 0,
            # A worker makes a whole step: as many steps must be asked for as there are workers to keep busy.
            prefetch_queue_depth=workers or None,
        )
    )


def _decode(encoded: DataNode, device: DaliDevice, options: DecoderOptions) -> DataNode:
    hints: dict[str, Any] = {}
    if device == "gpu":  # a batch with a larger image than any before costs an allocation, which stops the whole GPU
        hints = {
            "hw_decoder_load": options.hardware_share,
            "preallocate_width_hint": options.preallocate_px[0],
            "preallocate_height_hint": options.preallocate_px[1],
        }
    return fn.decoders.image(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as libjpeg-turbo does it, so that GPU and CPU see the same chroma
        **hints,
    )


@pipeline_def(enable_conditionals=True)
def _render(
    views: ViewsConfig,
    device: DaliDevice,
    dtype: types.DALIDataType,
    inputs: StepInputs,
    workers: int,
    decoder: DecoderOptions,
) -> Any:
    # `if` on a value of the graph splits the batch: only the samples that want an operator run through it.
    fed = _feed(inputs, workers)
    image = _decode(fed.encoded, device, decoder)
    rendered = []
    for view, side_px in enumerate(views.view_px):
        group = min(view, 2)
        pixels = _resize(image, side_px, views, roi_start=fed.window_px[view, 0], roi_end=fed.window_px[view, 1])
        if views.blur_probability[group] > 0:
            sigma_px = fed.blur_sigma_px[view]
            if sigma_px > 0:
                pixels = fn.gaussian_blur(pixels, sigma=sigma_px)  # window 2·ceil(3σ) + 1
        pixels = _recolor(pixels, fed.color_factors, view)
        if views.solarize_probability[group] > 0 and fed.solarize[view]:
            pixels = math.min(pixels, 255.0 - pixels)  # 255 − v from 127.5 up
        rendered.append(_normalize(pixels, dtype))
    reference = _normalize(_resize(image, views.reference_px, views), dtype)
    passed = [fed.view_from_reference, fed.region_seed, fed.label, fed.sample_id]
    if device == "gpu":
        passed = [array.gpu() for array in passed]
    return (reference, *rendered, fed.patch_masks, *passed)  # the masks stay on the host, as `Batch` has them


def build_graph(
    views: ViewsConfig,
    *,
    source: Source,
    batch_size: int,
    device: DaliDevice,
    device_id: int | None = None,
    first_step: int = 0,
    threads: int = 1,
    prefetch_batches: int = 2,
    workers: int = 1,
    half: bool = False,
    decoder: DecoderOptions = DecoderOptions(),
) -> Pipeline:
    """The graph whose run i renders global step `first_step` + i.

    Args:
        views: what to render; the source's plans must be drawn for it.
        source: the work of a step.
        batch_size: B, the same for every step.
        device: where pixels are rendered. A `gpu` graph can be constructed and serialised, but not built, without one.
        device_id: of the GPU; None: the current one.
        first_step: step of the first run.
        threads: CPU threads of the graph (decoding, and all of the work on the CPU).
        prefetch_batches: runs kept in flight.
        workers: processes that call the source ahead of the graph, one whole step each; 0: call it in `run`.
        half: float16 pixels in place of float32.
        decoder: how the GPU decodes.

    Returns:
        A pipeline with the outputs reference [B, 3, H, W], the V views [B, 3, side, side] each, normalised, then
        `patch_masks` of `GraphInputs`, always on the host, and its other fields that pass through, on `device`.
    """
    return _render(
        views,
        device,
        types.FLOAT16 if half else types.FLOAT,
        StepInputs(source, first_step, views),
        workers,
        decoder,
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch_batches,
        py_num_workers=workers,
        py_start_method="spawn",
    )


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1)
def _decode_alone(device: DaliDevice) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return _decode(encoded, device, DecoderOptions())


def decodes(image: memoryview, *, device: DaliDevice, device_id: int | None) -> str | None:
    """Decode one image in a graph of its own, which costs some milliseconds; DALI's message if it dies of it."""
    graph = _decode_alone(device, device_id=device_id)
    graph.feed_input("encoded", [_readable(image)])
    try:
        graph.run()
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1]
    return None
