"""Principal components against NumPy's SVD, and their colours."""

import numpy as np
import pytest

from crisp.errors import CrispError
from crisp.viz.components import LIMIT, Array, composite, one_by_one, principal_components, unit_range


def by_svd(tokens: Array, count: int) -> Array:
    """As CAPI's code has it: whiten each by its variance, divide all by the first's deviation, positive skew."""
    centred = tokens - tokens.mean(axis=0)
    u, _, _ = np.linalg.svd(centred, full_matrices=False)
    whitened = u[:, :count] * np.sqrt(len(tokens) - 1)
    whitened /= whitened[:, 0].std()
    for column in whitened.T:
        if (column**3).mean() < 0:
            column *= -1
    return whitened


@pytest.mark.parametrize(("patches", "width"), [(196, 48), (49, 96), (64, 64)])
def test_they_are_those_of_the_svd(patches: int, width: int) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.gamma(2.0, size=(patches, width)) @ rng.normal(size=(width, width)) + 7
    found = principal_components(tokens, 6)
    np.testing.assert_allclose(found, by_svd(tokens, 6), atol=1e-8)
    np.testing.assert_allclose(found.std(axis=0), 1)
    assert ((found**3).mean(axis=0) > 0).all()


def test_float32_tokens_with_a_large_mean() -> None:
    """The mean is taken off in float64: else the first component would be the rounding's."""
    rng = np.random.default_rng(1)
    tokens = rng.gamma(2.0, size=(400, 32))
    shifted = (tokens + 1000).astype(np.float32)
    np.testing.assert_allclose(principal_components(shifted, 3), by_svd(shifted.astype(np.float64), 3), atol=1e-6)


def test_a_blob_on_a_gradient_is_found() -> None:
    """Few patches far from many: the skew makes them bright."""
    tokens = np.random.default_rng(2).normal(scale=0.1, size=(100, 16))
    tokens[:9] += 3 * np.eye(16)[4]
    first = principal_components(tokens, 1)[:, 0]
    assert first[:9].min() > LIMIT
    assert first[9:].max() < 0


def test_an_empty_image_is_grey_and_missing_components_are_0() -> None:
    flat = principal_components(np.full((16, 8), 0.3, np.float32), 3)
    assert not flat.any()
    assert (composite(flat, (4, 4)) == 128).all()
    line = np.outer(np.arange(10.0) ** 2, np.ones(5))  # one direction only
    found = principal_components(line, 3)
    np.testing.assert_allclose(found[:, 0].std(), 1)
    assert not found[:, 1:].any()


@pytest.mark.parametrize(("patches", "width", "count"), [(3, 8, 3), (50, 4, 6), (50, 4, 0)])
def test_more_than_there_are_is_refused(patches: int, width: int, count: int) -> None:
    with pytest.raises(CrispError, match=f"components={count}: {patches} patches of width {width} have"):
        principal_components(np.ones((patches, width)), count)


def test_colours_saturate_at_the_limit() -> None:
    values = np.array([-9.0, -LIMIT, 0, LIMIT / 2, LIMIT, 9])
    np.testing.assert_allclose(unit_range(values), [0, 0, 0.5, 0.75, 1, 1])
    components = np.stack([values, values[::-1], np.zeros(6)], axis=1)
    colours = composite(components, (2, 3))
    assert colours.shape == (2, 3, 3)
    assert colours[0, 0].tolist() == [0, 255, 128]
    assert colours[1, 2].tolist() == [255, 0, 128], "row by row"


def test_one_by_one_is_blue_below_and_red_above() -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")
    (low, high) = one_by_one(np.array([[-2.3, 2.3], [0, 0]]), (1, 2))
    assert low.shape == high.shape == (1, 2, 3)
    assert low[0, 0, 2] > low[0, 0, 0]
    assert high[0, 0, 0] > high[0, 0, 2]
    assert np.ptp(low[0, 1].astype(int)) < 5, "grey at 0"
