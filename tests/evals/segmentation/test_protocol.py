"""Each constant of the protocol, by name. A changed value is another protocol, and its scores another table's."""

import numpy as np
import pytest

from crisp.evals.segmentation import cityscapes, logistic, neighbours, protocol, scoring
from crisp.evals.segmentation.config import SegKnnConfig, SegLinearConfig, SegmentationConfig

CONSTANTS = {
    "GRID": 16,
    "HELD_OUT_DIVISOR": 10,
    "SEED": 0,
    "KS": (1, 3, 10, 30),
    "DISTANCES": ("cosine", "l2"),
    "QUERY_CHUNK": 1024,
    "KEY_CHUNK": 262_144,
    "MAX_ITER": 1000,
    "TOL": 1e-12,
    "HISTORY": 5,
    "LINE_SEARCH": 50,
    "ADE20K_CLASSES": 150,
    "ADE20K_IGNORED": (0, 255),
    "ADE20K_DTYPE": "bf16",
    "ADE20K_TRAIN": 20_210,
    "ADE20K_VAL": 2_000,
    "VOC_CLASSES": 21,
    "VOC_IGNORED": (255,),
    "VOC_TRAIN": 1_464,
    "VOC_VAL": 1_449,
    "VOC_TRAINAUG": 10_582,
    "CITYSCAPES_CLASSES": 19,
    "CITYSCAPES_IGNORED": (255,),
    "CITYSCAPES_TRAIN": 2_975,
    "CITYSCAPES_VAL": 500,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant(name: str) -> None:
    assert getattr(protocol, name) == CONSTANTS[name]


def test_search_and_regression_have_the_same_ones() -> None:
    for name in ("DISTANCES", "QUERY_CHUNK", "KEY_CHUNK"):
        assert getattr(neighbours, name) == getattr(protocol, name)
    for name in ("MAX_ITER", "TOL", "HISTORY", "LINE_SEARCH"):
        assert getattr(logistic, name) == getattr(protocol, name)
    assert logistic.C_GRID == protocol.CS


def test_every_constant_is_listed() -> None:
    written = {name for name in vars(protocol) if name.isupper()}
    assert written == {*CONSTANTS, "CS"}


def test_cs() -> None:
    np.testing.assert_allclose(protocol.CS, [10 ** (-6 + 11 * i / 7) for i in range(8)], rtol=1e-12)


def test_image_px() -> None:
    assert (protocol.image_px(16), protocol.image_px(14)) == (256, 224)


def test_bank_of_ade20k() -> None:
    assert protocol.ADE20K_TRAIN * protocol.GRID**2 == 5_173_760


def test_defaults_are_the_protocol() -> None:
    knn = SegKnnConfig(weights="w", data=".")  # type: ignore[arg-type]
    linear = SegLinearConfig(weights="w", data=".")  # type: ignore[arg-type]
    shared = SegmentationConfig(weights="w", data=".")  # type: ignore[arg-type]
    assert (knn.ks, knn.distances, knn.dtype) == (protocol.KS, protocol.DISTANCES, "auto")
    assert (knn.query_chunk, knn.key_chunk) == (protocol.QUERY_CHUNK, protocol.KEY_CHUNK)
    assert (linear.cs, linear.max_iter) == (protocol.CS, protocol.MAX_ITER)
    assert (shared.image_px, shared.seed, shared.precision) == (None, protocol.SEED, "float32")
    assert shared.train_set == "trainaug"


def test_the_bank_is_read_once_for_a_validation_set_at_vit_s() -> None:
    predicted = len(protocol.KS) * len(protocol.DISTANCES) * 16**2
    assert scoring.images_at_a_time(protocol.GRID**2, 384, predicted) >= protocol.ADE20K_TRAIN // 10
    assert scoring.images_at_a_time(4096, 10**6, 10**6) == 1


@pytest.mark.parametrize("images", [10, 19, 23, 1464, 20_210])
def test_held_out_split(images: int) -> None:
    fit, held_out = protocol.held_out_split(images)
    assert len(held_out) == images // 10
    assert sorted([*fit, *held_out]) == list(range(images))
    order = np.random.default_rng(0).permutation(images)
    assert set(held_out) == set(order[: images // 10])
    assert set(protocol.held_out_split(images, seed=1)[1]) != set(held_out)


def test_cityscapes_train_ids() -> None:
    """Those of the data set's own table: 19 classes in the order of their label ids, all others void."""
    assert list(cityscapes.CLASS_IDS) == [
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ]  # fmt: skip
    assert list(cityscapes.CLASS_IDS.values()) == [
        7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33,
    ]  # fmt: skip
