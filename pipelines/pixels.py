"""Pixels → views, compiled: crop, antialiased resize, flip, blur, colour, solarise, normalise. Plain twin: `plain.py`.

One call renders all views of one sample without the interpreter lock and without torch, so threads scale and no
library starts threads of its own inside them. Everything is kept planar, and filtered in float32 between 8-bit images.
`resize_image` is the resize alone, pixels to pixels, for `crisp shard`.

How a resize is laid out. Rows first: an output row is a weighted sum of image rows, which vectors of neighbouring
bytes do at once. Columns would need a different source offset in every lane; so blocks of 16 rows are transposed, after
which one vector holds one column of 16 rows and a column too is a weighted sum of vectors. A flip reverses the table
of column taps. LLVM's loop vectoriser finds neither the register-resident sums nor the 16×16 transpose: the two are
written as vector IR (`_weighted_sum`, `_transpose_tile`), for any CPU that LLVM knows; it is four times as fast as
the same loops left to the vectoriser.

All kernels live in this one file because numba's cache looks at the file of the function that it cached, and no other.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.decode import READ_AHEAD

LANES = 16
"""Floats per vector: one AVX-512 register, two of AVX2, four of NEON or SSE."""
STRIP = 192
"""Bytes of an image row filtered at a time, so that 16 rows of sums stay in the first-level cache."""

FINE, BELOW = 128, 128
"""`resize_image` keeps levels between rows and columns in 16 bits, which are transposed in half the time of 32: steps
of 1 / FINE from −BELOW on, so that what a cubic filter adds at an edge is not lost."""

_options: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "reassoc"},  # no NaN or infinity rules are relaxed
}
_SCALE = tuple(1 / (255 * std) for std in IMAGENET_STD)
_SHIFT = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))


def padded_px(side: int) -> int:
    """A view's side rounded up to whole vectors: rows and columns of the 8-bit planes that kernels work on."""
    return -(-side // LANES) * LANES


# --- vectors --------------------------------------------------------------------------------------------------------

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)


def _index(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), value)


def _lanes(indices: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), indices)


def _vector_at(builder: Any, pointer: Any, offset: Any, vector: ir.VectorType) -> Any:
    return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())


def _make_weighted_sum(width: int) -> Any:
    """`width` is a multiple of `LANES`; the sums stay in registers over all taps."""

    @intrinsic
    def weighted_sum(
        typing: Any, source: Any, at: Any, step: Any, weights: Any, first: Any, taps: Any, out: Any, out_at: Any
    ) -> Any:
        """out[out_at + i] = Σ_k weights[first + k] · source[at + k · step + i] for i < width.

        Arrays are C-contiguous and indexed flat. `source` and `out` are uint8, uint16 or float32; into whole numbers
        the sum is rounded and clipped. uint16 holds (level + BELOW) · FINE: the weights are multiplied by FINE on the
        way there, and divided by it on the way back.
        """
        int_t = types.intp
        signature = types.void(source, int_t, int_t, weights, int_t, int_t, out, int_t)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, at, step, _, first, taps, _, out_at = arguments
            source_type, weight_type, out_type = (signature.args[i] for i in (0, 3, 6))
            source_data, weight_data, out_data = (
                context.make_array(array_type)(context, builder, arguments[i]).data
                for i, array_type in ((0, source_type), (3, weight_type), (6, out_type))
            )
            whole = {types.uint8: (_BYTES, 255.0), types.uint16: (_SHORTS, 65535.0)}
            start_level = 0.5 if out_type.dtype in whole else 0.0
            if out_type.dtype == types.uint16:
                start_level += BELOW * FINE
            if source_type.dtype == types.uint16:
                start_level -= BELOW
            start = ir.Constant(_FLOATS, [start_level] * LANES)
            vectors = range(width // LANES)
            sums = [cgutils.alloca_once_value(builder, start) for _ in vectors]
            for total in sums:  # alloca_once_value stores at the function's entry; a loop comes here again
                builder.store(start, total)
            with cgutils.for_range(builder, taps) as loop:
                weight = builder.load(builder.gep(weight_data, [builder.add(first, loop.index)]))
                undefined = ir.Constant(_FLOATS, ir.Undefined)
                weight = builder.insert_element(undefined, weight, ir.Constant(ir.IntType(32), 0))
                weight = builder.shuffle_vector(weight, undefined, _lanes([0] * LANES))
                base = builder.add(at, builder.mul(loop.index, step))
                for i, total in enumerate(sums):
                    offset = builder.add(base, _index(i * LANES))
                    if source_type.dtype in whole:
                        kind, _ = whole[source_type.dtype]
                        levels = builder.load(_vector_at(builder, source_data, offset, kind), align=1)
                        values = builder.sitofp(builder.zext(levels, _INTS), _FLOATS)
                    else:
                        values = builder.load(_vector_at(builder, source_data, offset, _FLOATS), align=4)
                    product = builder.fmul(weight, values, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for i, total in enumerate(sums):
                offset, values = builder.add(out_at, _index(i * LANES)), builder.load(total)
                if out_type.dtype in whole:
                    kind, largest = whole[out_type.dtype]
                    low, high = (ir.Constant(_FLOATS, [limit] * LANES) for limit in (0.0, largest))
                    values = builder.select(builder.fcmp_ordered("<", values, low), low, values)
                    values = builder.select(builder.fcmp_ordered(">", values, high), high, values)
                    values = builder.trunc(builder.fptosi(values, _INTS), kind)
                    builder.store(values, _vector_at(builder, out_data, offset, kind), align=1)
                else:
                    builder.store(values, _vector_at(builder, out_data, offset, _FLOATS), align=4)
            return context.get_dummy_value()

        return signature, generate

    return weighted_sum


_weighted_sum_16 = _make_weighted_sum(16)
_weighted_sum_48 = _make_weighted_sum(48)
_weighted_sum_64 = _make_weighted_sum(64)


@intrinsic
def _transpose_tile(typing: Any, source: Any, at: Any, step: Any, out: Any, out_at: Any, out_step: Any) -> Any:
    """out[out_at + i · out_step + j] = source[at + j · step + i] for i, j < 16; C-contiguous arrays, indexed flat."""
    int_t = types.intp
    signature = types.void(source, int_t, int_t, out, int_t, int_t)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, at, step, _, out_at, out_step = arguments
        source_type, out_type = signature.args[0], signature.args[3]
        element = context.get_data_type(source_type.dtype)
        vector, align = ir.VectorType(element, LANES), context.get_abi_sizeof(element)
        source_data = context.make_array(source_type)(context, builder, arguments[0]).data
        out_data = context.make_array(out_type)(context, builder, arguments[3]).data
        rows = []
        for i in range(LANES):
            offset = builder.add(at, builder.mul(step, _index(i)))
            rows.append(builder.load(_vector_at(builder, source_data, offset, vector), align=align))
        # Interleaving row i with row i + 8 is a perfect shuffle of the tile; log2(16) of them transpose it.
        half = LANES // 2
        low = _lanes([lane for i in range(half) for lane in (i, LANES + i)])
        high = _lanes([lane for i in range(half, LANES) for lane in (i, LANES + i)])
        for _ in range(LANES.bit_length() - 1):
            pairs = [(rows[i], rows[i + half]) for i in range(half)]
            rows = [builder.shuffle_vector(a, b, lanes) for a, b in pairs for lanes in (low, high)]
        for i, row in enumerate(rows):
            offset = builder.add(out_at, builder.mul(out_step, _index(i)))
            builder.store(row, _vector_at(builder, out_data, offset, vector), align=align)
        return context.get_dummy_value()

    return signature, generate


# --- filters --------------------------------------------------------------------------------------------------------


_padded_px = njit(**_options)(padded_px)


@njit(**_options)
def _resize_taps(extent_px: float, out: int, cubic: bool, flip: bool) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """First source pixel [out] and weights [out, taps] of each output pixel; see `plain.resize_matrix`.

    Every row has as many taps as the widest, moved so that none leaves the window; entries past `out`, up to whole
    vectors, weigh nothing. The window's last pixel need not be whole.
    """
    length = int(np.ceil(extent_px))
    scale = extent_px / out
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    taps = min(int(2 * support) + 1, length)
    first = np.zeros(_padded_px(out), np.intp)
    weights = np.zeros((_padded_px(out), taps), np.float32)
    values = np.empty(taps, np.float64)
    for j in range(out):
        centre = (j + 0.5) * scale
        target = out - 1 - j if flip else j
        start = min(max(int(centre - support + 0.5), 0), length - taps)
        first[target] = start
        total = 0.0
        for k in range(taps):
            distance = abs(start + k + 0.5 - centre) / stretch
            if not cubic:
                value = max(0.0, 1 - distance)
            elif distance < 1:
                value = (1.5 * distance - 2.5) * distance * distance + 1
            elif distance < 2:
                value = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
            else:
                value = 0.0
            values[k] = value
            total += value
        for k in range(taps):
            weights[target, k] = values[k] / total
    return first, weights


@njit(**_options)
def _resize_band(image, width, x, y, w, top, rows, columns, strip, turned, tile) -> None:  # type: ignore[no-untyped-def]
    """Rows `top` to `top + 15` of a resized window → `tile` [S, 3, 16]; `rows` and `columns` are of `_resize_taps`.

    S is as many as `columns` has entries. Scratch: `strip` [16, STRIP] and `turned` [≥ (3w + READ_AHEAD), 16], both
    float32, or both uint16 where the weights of `rows` are multiplied by FINE and those of `columns` divided.
    """
    first_row, row_weights = rows
    first_column, column_weights = columns
    row_taps, column_taps = row_weights.shape[1], column_weights.shape[1]
    for left in range(0, 3 * w, STRIP):
        length = min(STRIP, 3 * w - left)
        for i in range(LANES):
            at = ((y + first_row[top + i]) * width + x) * 3 + left
            for j in range(0, length, 64):
                _weighted_sum_64(
                    image, at + j, width * 3, row_weights, (top + i) * row_taps, row_taps, strip, i * STRIP + j
                )
        for j in range(0, length, LANES):
            _transpose_tile(strip, j, STRIP, turned, (left + j) * LANES, LANES)
    for j in range(len(first_column)):
        _weighted_sum_48(turned, first_column[j] * 48, 48, column_weights, j * column_taps, column_taps, tile, j * 48)


@njit(**_options)
def _resize(image, width, crop_px, cubic, flip, side, planes, strip, turned, tile) -> None:  # type: ignore[no-untyped-def]
    """Window (x, y, w, h) of `image` [pixels · 3 + READ_AHEAD] uint8, `width` pixels a row → `planes` [3, S, S] uint8.

    S = padded_px(side). Scratch: `tile` [S, 3, 16], `strip` and `turned` of `_resize_band`.
    """
    x, y, w, h = crop_px[0], crop_px[1], crop_px[2], crop_px[3]
    size = _padded_px(side)
    rows, columns = _resize_taps(float(h), side, cubic, False), _resize_taps(float(w), side, cubic, flip)
    for top in range(0, size, LANES):
        _resize_band(image, width, x, y, w, top, rows, columns, strip, turned, tile)
        for c in range(3):
            for j in range(0, size, LANES):
                _transpose_tile(tile, (j * 3 + c) * LANES, 48, planes, (c * size + top) * size + j, size)


@njit(**_options)
def resize_image(  # type: ignore[no-untyped-def]
    image, height_px: float, width_px: float, out_height: int, out_width: int
) -> NDArray[np.uint8]:
    """Bicubic: `image` [h · w · 3 + READ_AHEAD] uint8 → [≥ out_height, ≥ out_width, 3] uint8, padded as `padded_px`.

    h and w are `height_px` and `width_px` rounded up. A fraction is what libjpeg leaves when it decodes 101 pixels at
    half the size: 51, of which the last is half beyond the image's edge.
    """
    width = int(np.ceil(width_px))
    first_row, row_weights = _resize_taps(height_px, out_height, True, False)
    first_column, column_weights = _resize_taps(width_px, out_width, True, False)
    rows = first_row, row_weights * np.float32(FINE)
    columns = first_column, column_weights * np.float32(1 / FINE)
    out = np.empty((len(first_row), len(first_column), 3), np.uint8)
    strip = np.empty((LANES, STRIP), np.uint16)
    turned = np.empty((3 * width + READ_AHEAD, LANES), np.uint16)
    tile = np.empty((len(columns[0]), 3, LANES), np.uint8)
    row_bytes = 3 * len(columns[0])
    for top in range(0, len(rows[0]), LANES):
        _resize_band(image, width, 0, 0, width, top, rows, columns, strip, turned, tile)
        for j in range(0, row_bytes, LANES):
            _transpose_tile(tile, j * LANES, LANES, out, top * row_bytes + j, row_bytes)
    return out


@njit(**_options)
def _mirror(i: int, length: int) -> int:
    """Index i of an image mirrored about its outermost pixels, however often it takes."""
    if length == 1:
        return 0
    period = 2 * (length - 1)
    i %= period
    return min(i, period - i)


@njit(**_options)
def _blur(planes, side, sigma_px, rows, line) -> None:  # type: ignore[no-untyped-def]
    """Gaussian blur of `planes` [3, S, S] uint8 in place; see `plain.blur_matrix`.

    Scratch: `rows` [≥ (side + 2 radius) · S] uint8, `line` [≥ S + 2 radius + 16] float32.
    """
    size = planes.shape[1]
    radius = int(np.ceil(3 * sigma_px))
    taps = 2 * radius + 1
    kernel = np.empty(taps, np.float32)
    for k in range(taps):
        kernel[k] = np.exp(-0.5 * ((k - radius) / sigma_px) ** 2)
    kernel /= kernel.sum()
    for c in range(3):
        for i in range(side + 2 * radius):
            rows[i * size : (i + 1) * size] = planes[c, _mirror(i - radius, side)]
        for i in range(side):
            for j in range(0, size, LANES):
                _weighted_sum_16(rows, i * size + j, size, kernel, 0, taps, line, radius + j)
            for k in range(1, radius + 1):
                line[radius - k] = line[radius + _mirror(-k, side)]
                line[radius + side - 1 + k] = line[radius + _mirror(side - 1 + k, side)]
            for j in range(0, size, LANES):
                _weighted_sum_16(line, j, 1, kernel, 0, taps, planes, (c * size + i) * size + j)


# --- photometry -----------------------------------------------------------------------------------------------------


@njit(**_options)
def _finish(planes, side, matrix, solarize, line, out, half) -> None:  # type: ignore[no-untyped-def]
    """`planes` [3, S, S] uint8 through the colour `matrix` [3, 4], solarise and normalise → `out` [3, side, side].

    `out` is float32, or uint16 for the bits of float16 where `half`. Scratch: `line` [≥ side] float32.
    """
    for d in range(3):
        from_red, from_green, from_blue, offset = matrix[d, 0], matrix[d, 1], matrix[d, 2], matrix[d, 3]
        scale, shift = np.float32(_SCALE[d]), np.float32(_SHIFT[d])
        # solarise, v → 255 − v for levels of 128 and more, is folded into their normalisation
        bright_scale = -scale if solarize else scale
        bright_shift = shift + np.float32(255) * scale if solarize else shift
        for i in range(side):
            red, green, blue = planes[0, i, :side], planes[1, i, :side], planes[2, i, :side]
            row = line[:side] if half else out[d, i].view(np.float32)
            for j in range(side):
                value = (
                    from_red * np.float32(red[j])
                    + from_green * np.float32(green[j])
                    + from_blue * np.float32(blue[j])
                    + offset
                )
                value = np.floor(min(max(value + np.float32(0.5), np.float32(0)), np.float32(255)))
                bright = value >= np.float32(128)
                row[j] = value * (bright_scale if bright else scale) + (bright_shift if bright else shift)
            if half:
                _to_float16(row, out[d, i])


@njit(**_options)
def _to_float16(values, bits16) -> None:  # type: ignore[no-untyped-def]
    """The bits of float16, rounded to nearest even, of float32 values whose size lies in [2⁻¹⁴, 65504].

    A normalised level's lies between .004 and 3.
    """
    bits32 = values.view(np.uint32)
    for j in range(len(bits16)):
        magnitude = (bits32[j] & np.uint32(0x7FFFFFFF)) - np.uint32(112 << 23)
        magnitude += np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))
        bits16[j] = ((bits32[j] >> np.uint32(16)) & np.uint32(0x8000)) | (magnitude >> np.uint32(13))


@njit(**_options)
def render_sample(  # type: ignore[no-untyped-def]
    image, height, width, cubic, crop_px, flip, blur_sigma_px, color_matrix, solarize,
    sample, reference, global_views, local_views, half, columns, scratch,
) -> bool:  # fmt: skip
    """All views of one sample; False, with nothing written, if a window leaves the image.

    `image` [height · width · 3 + READ_AHEAD] uint8; the sample's rows of the plan, `crop_px` [V, 4] and so on; the
    batch's `reference` [B, 3, R, R], `global_views` [2, B, 3, G, G], `local_views` [L, B, 3, l, l], of which row
    `sample` is written: float32, or uint16 for the bits of float16 where `half`. `columns` and
    `scratch`: see `Scratch`.
    """
    for v in range(len(crop_px)):
        x, y, w, h = crop_px[v]
        if x < 0 or y < 0 or w < 1 or h < 1 or x + w > width or y + h > height:
            return False
    planes, strip, tile, rows, line = scratch
    whole, identity = np.array([0, 0, width, height], np.int32), np.eye(3, 4).astype(np.float32)
    for v in range(-1, len(crop_px)):  # the reference is one more view; one call of each kernel compiles once
        if v < 0:
            out, crop, mirrored, sigma_px, matrix, inverted = reference[sample], whole, False, 0.0, identity, False
        else:
            out = global_views[v, sample] if v < 2 else local_views[v - 2, sample]
            crop, mirrored, sigma_px = crop_px[v], flip[v], np.float64(blur_sigma_px[v])
            matrix, inverted = color_matrix[v], solarize[v]
        side = out.shape[1]
        size = _padded_px(side)
        view = planes[: 3 * size * size].reshape(3, size, size)
        _resize(image, width, crop, cubic, mirrored, side, view, strip, columns, tile)
        if sigma_px > 0:
            _blur(view, side, sigma_px, rows, line)
        _finish(view, side, matrix, inverted, line, out, half)
    return True


# --- the parts of render_sample, to be measured alone ---------------------------------------------------------------


@njit(**_options)
def resize_views(image, height, width, cubic, crop_px, flip, sides, columns, scratch) -> None:  # type: ignore[no-untyped-def]
    """The resizes of `render_sample`, for P plans of one image: `crop_px` [P, V, 4], `flip` [P, V].

    `sides` [1 + V] of the reference and the views. Each overwrites the one before.
    """
    planes, strip, tile, _, _ = scratch
    whole = np.array([0, 0, width, height], np.int32)
    for p in range(len(crop_px)):
        for v in range(-1, crop_px.shape[1]):
            if v < 0:
                crop, mirrored = whole, False
            else:
                crop, mirrored = crop_px[p, v], flip[p, v]
            side = sides[v + 1]
            size = _padded_px(side)
            view = planes[: 3 * size * size].reshape(3, size, size)
            _resize(image, width, crop, cubic, mirrored, side, view, strip, columns, tile)


@njit(**_options)
def blur_views(blur_sigma_px, sides, scratch) -> None:  # type: ignore[no-untyped-def]
    """The blurs of `render_sample` for P plans, `blur_sigma_px` [P, V], of whatever the planes hold."""
    planes, _, _, rows, line = scratch
    for p in range(len(blur_sigma_px)):
        for v in range(blur_sigma_px.shape[1]):
            side, sigma_px = sides[v + 1], np.float64(blur_sigma_px[p, v])
            size = _padded_px(side)
            if sigma_px > 0:
                _blur(planes[: 3 * size * size].reshape(3, size, size), side, sigma_px, rows, line)


@njit(**_options)
def finish_views(  # type: ignore[no-untyped-def]
    color_matrix, solarize, sample, reference, global_views, local_views, half, scratch
) -> None:
    """Colour, solarise and normalise of `render_sample` for P plans, `color_matrix` [P, V, 3, 4], `solarize` [P, V].

    Of whatever the planes hold, into rows `sample`, `sample` + 1, … of a batch.
    """
    planes, _, _, _, line = scratch
    identity = np.eye(3, 4).astype(np.float32)
    for p in range(len(color_matrix)):
        row = (sample + p) % len(reference)
        for v in range(-1, color_matrix.shape[1]):
            if v < 0:
                out, matrix, inverted = reference[row], identity, False
            else:
                out = global_views[v, row] if v < 2 else local_views[v - 2, row]
                matrix, inverted = color_matrix[p, v], solarize[p, v]
            side = out.shape[1]
            size = _padded_px(side)
            _finish(planes[: 3 * size * size].reshape(3, size, size), side, matrix, inverted, line, out, half)


class Scratch:
    """Working memory of one thread, kept from sample to sample: fresh memory costs a page fault per 4 kB.

    Args:
        side_px: of the largest view.
        radius_px: of the widest blur.
    """

    def __init__(self, side_px: int, radius_px: int) -> None:
        size = padded_px(side_px)
        self.fixed = (
            np.empty(3 * size * size, np.uint8),  # planes of the view at hand
            np.empty((LANES, STRIP), np.float32),
            np.empty((size, 3, LANES), np.uint8),
            np.empty((size + 2 * radius_px) * size, np.uint8),
            np.empty(size + 2 * radius_px + LANES, np.float32),
        )
        self._columns = np.empty((0, LANES), np.float32)

    def columns(self, width_px: int) -> NDArray[np.float32]:
        """Transposed rows of an image of that width: [≥ 3 · width_px + READ_AHEAD, LANES]."""
        if len(self._columns) < 3 * width_px + READ_AHEAD:
            self._columns = np.empty((3 * width_px + READ_AHEAD, LANES), np.float32)
        return self._columns
