"""The one coordinate convention, and affine maps in it (NumPy; pure functions).

Continuous pixel coordinates (x, y): the pixel in row i and column j covers [j, j+1) × [i, i+1), so its centre is
(j + .5, i + .5) and an image of W × H pixels spans [0, W] × [0, H]. A map is a [..., 2, 3] matrix that acts on
(x, y, 1). `b_from_a` takes coordinates of a to coordinates of b, so that maps compose visibly:
`view_from_reference = compose(view_from_image, invert(reference_from_image))`.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def compose(c_from_b: Array, b_from_a: Array) -> Array:
    """`c_from_a`: first `b_from_a`, then `c_from_b`. [..., 2, 3] each, broadcast; float64."""
    c_from_b, b_from_a = np.asarray(c_from_b, np.float64), np.asarray(b_from_a, np.float64)
    linear = c_from_b[..., :2] @ b_from_a[..., :2]
    offset = c_from_b[..., :2] @ b_from_a[..., 2:] + c_from_b[..., 2:]
    return np.concatenate([linear, offset], axis=-1)


def invert(b_from_a: Array) -> Array:
    """`a_from_b`. [..., 2, 3] float64.

    Raises:
        np.linalg.LinAlgError: a map that is not invertible.
    """
    b_from_a = np.asarray(b_from_a, np.float64)
    linear = np.linalg.inv(b_from_a[..., :2])
    return np.concatenate([linear, -linear @ b_from_a[..., 2:]], axis=-1)


def apply(b_from_a: Array, points_a: Array) -> Array:
    """Points (x, y) [..., P, 2] of frame a in frame b; `b_from_a` [..., 2, 3]."""
    b_from_a = np.asarray(b_from_a, np.float64)
    return points_a @ np.swapaxes(b_from_a[..., :2], -1, -2) + b_from_a[..., None, :, 2]


def crop_affine(crop_px: Array, out_px: Array | int, flip: NDArray[np.bool_] | bool = False) -> Array:
    """`view_from_image` of a crop window that is resized to a square and then, where asked, flipped left-right.

    Args:
        crop_px: [..., 4] (x, y, width, height) of the window in image pixels.
        out_px: [...] side of the view in pixels.
        flip: [...] mirror the view horizontally.

    Returns:
        [..., 2, 3] float64.
    """
    x, y, width, height = np.moveaxis(np.asarray(crop_px, np.float64), -1, 0)
    out = np.broadcast_to(np.asarray(out_px, np.float64), x.shape)
    sign = np.where(flip, -1.0, 1.0)
    x_scale, y_scale = sign * out / width, out / height
    matrix = np.zeros((*x.shape, 2, 3))
    matrix[..., 0, 0] = x_scale
    matrix[..., 0, 2] = np.where(flip, out, 0.0) - x_scale * x
    matrix[..., 1, 1] = y_scale
    matrix[..., 1, 2] = -y_scale * y
    return matrix


def resize_affine(height_px: Array, width_px: Array, out_px: int) -> Array:
    """`reference_from_image`: the whole image, each axis resized on its own to `out_px`. [...] → [..., 2, 3]."""
    height, width = np.broadcast_arrays(np.asarray(height_px, np.float64), np.asarray(width_px, np.float64))
    zero = np.zeros_like(width)
    return crop_affine(np.stack([zero, zero, width, height], axis=-1), out_px)


def patch_centres(grid: int, patch_px: int) -> Array:
    """Centres (x, y) of a grid's patches, row by row: [grid², 2]."""
    axis = (np.arange(grid) + 0.5) * patch_px
    x, y = np.meshgrid(axis, axis)
    return np.stack([x.ravel(), y.ravel()], axis=-1)
