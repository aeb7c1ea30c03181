"""The protocols' constants, by name: who changes one, changes what the scores can be compared with."""

import pytest

from crisp.evals.classification import protocol


def test_knn() -> None:
    assert (protocol.RESIZE_PX, protocol.CROP_PX) == (256, 224)
    assert protocol.KNN_K == (10, 20, 100, 200)
    assert protocol.KNN_TEMPERATURE == 0.07
    assert protocol.KNN_TOKENS == "cls"


def test_linear() -> None:
    assert protocol.MOMENTUM == 0.9
    assert protocol.WEIGHT_DECAY == 0
    assert protocol.LR_BATCH == 256
    assert protocol.GLOBAL_BATCH == 4 * 256
    assert protocol.INIT_STD == 0.01
    assert protocol.CROP_SCALE == (0.08, 1)
    assert protocol.CROP_ASPECT == (3 / 4, 4 / 3)
    assert protocol.FLIP_PROBABILITY == 0.5
    assert (protocol.CRISP_LRS, protocol.CRISP_EPOCHS) == ((1e-3,), 200)
    assert protocol.GRID_EPOCHS == 100


def test_the_grid_has_45_rates() -> None:
    assert len(protocol.GRID_LRS) == len(set(protocol.GRID_LRS)) == 45
    assert list(protocol.GRID_LRS) == sorted(protocol.GRID_LRS)
    expected = [digit * 10.0**power for power in (-4, -3, -2, -1, 0) for digit in range(1, 10)]
    assert list(protocol.GRID_LRS) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("width", "has_cls", "tokens"),
    [
        (384, True, "cls-last-4"),
        (192, True, "cls-last-4"),
        (768, True, "cls-mean"),
        (1024, True, "cls-mean"),
        (384, False, "mean"),
    ],
)
def test_features_of_each_size(width: int, has_cls: bool, tokens: str) -> None:
    assert protocol.SMALL_WIDTH == 384
    assert protocol.linear_tokens(width, has_cls=has_cls) == tokens
