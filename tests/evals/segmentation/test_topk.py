"""Predictions from nearest patches against a search and a vote written out in NumPy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crisp.errors import CrispError
from crisp.evals.segmentation import neighbours
from crisp.evals.segmentation.neighbours import DISTANCES, Distance, nearest
from crisp.evals.segmentation.topk import (
    MAX_K,
    pixel_modes,
    predict_pixels_grid,
    predict_pixels_plain,
)

KS = (1, 3, 10, 30)
SCREENS = (torch.float32, torch.bfloat16)


def searched(queries: Tensor, bank: Tensor, k: int, distance: Distance) -> np.ndarray:
    """All distances in float64, sorted, equal ones by number."""
    ours, keys = queries.double().numpy(), bank.double().numpy()
    if distance == "cosine":
        lengths = np.linalg.norm(ours, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
        distances = 1 - (ours @ keys.T) / np.maximum(lengths, 1e-30)
    else:
        distances = (keys**2).sum(1) - 2 * ours @ keys.T
    return np.argsort(distances, axis=1, kind="stable")[:, :k]


def voted(labels: np.ndarray) -> np.ndarray:
    """[M, k, p²] → [M, p²], by counting."""
    return np.apply_along_axis(lambda votes: np.bincount(votes, minlength=256).argmax(), 1, labels)


def clustered(count: int, width: int = 24, *, seed: int = 0, spread: float = 1.0, clusters: int = 8) -> Tensor:
    """Features around shared centres, of very different lengths."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=torch.Generator().manual_seed(99))
    features = centres[torch.randint(clusters, (count,), generator=draw)]
    features = features + spread * torch.randn(count, width, generator=draw)
    return features * (0.1 + 3 * torch.rand(count, 1, generator=draw))


def some_labels(count: int, pixels: int = 9, *, seed: int = 0, classes: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256 - classes, 256, (count, pixels), generator=draw).to(torch.uint8)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles and slices at the sizes of tests."""
    monkeypatch.setattr(neighbours, "TILE", 256)
    monkeypatch.setattr(neighbours, "BLOCK", 8)
    monkeypatch.setattr(neighbours, "BLOCKS_AT_ONCE", 100)
    monkeypatch.setattr(neighbours, "PAIRS_AT_ONCE", 33)
    monkeypatch.setattr(neighbours, "QUERIES_AT_ONCE", 7)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("key_chunk", [10_000, 700, 97])
def test_neighbours_are_those_of_a_sort(screen: torch.dtype, key_chunk: int) -> None:
    queries, bank = clustered(50, seed=1), clustered(3001)
    found = nearest(queries, bank, k=30, key_chunk=key_chunk, query_chunk=16, screen=screen)
    for distance in DISTANCES:
        np.testing.assert_array_equal(found[distance].numpy(), searched(queries, bank, 30, distance))


@pytest.mark.parametrize("distance", DISTANCES)
def test_predictions_are_those_of_the_plain_form(distance: Distance) -> None:
    queries, bank, labels = clustered(40, seed=1), clustered(2000), some_labels(2000)
    fast = predict_pixels_grid(queries, bank, labels, ks=KS, distances=[distance], key_chunk=600, query_chunk=32)
    plain = predict_pixels_plain(
        queries, bank, labels, ks=KS, distance=distance, key_chunk=500, query_chunk=32, dtype=torch.float64
    )
    indices = searched(queries, bank, 30, distance)
    for k in KS:
        assert fast[k, distance].dtype == torch.uint8
        assert torch.equal(fast[k, distance], plain[k])
        np.testing.assert_array_equal(fast[k, distance].numpy(), voted(labels.numpy()[indices[:, :k]]))


@pytest.mark.parametrize("screen", SCREENS)
def test_equally_near_patches_come_by_number(screen: torch.dtype) -> None:
    """Few distinct patches, each many times, over all chunks; whole numbers, so every distance is exact."""
    draw = torch.Generator().manual_seed(0)
    distinct = torch.randint(-3, 4, (20, 16), generator=draw).float()
    bank = distinct[torch.randint(20, (1000,), generator=draw)]
    queries = torch.randint(-3, 4, (30, 16), generator=draw).float()
    found = nearest(queries, bank, k=30, distances=("l2",), key_chunk=300, screen=screen)["l2"]
    np.testing.assert_array_equal(found.numpy(), searched(queries, bank, 30, "l2"))
    found = nearest(distinct, bank, k=5, distances=("cosine",), key_chunk=300, screen=screen)["cosine"]
    for mine, patches in zip(distinct, found, strict=True):
        assert patches.tolist() == (bank == mine).all(1).nonzero()[:5, 0].tolist()


@pytest.mark.parametrize("screen", SCREENS)
def test_nearly_equal_features_are_told_apart(screen: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Differences of 1e-4 of the length, far below what bfloat16 can show: float32 has to screen, float64 to decide."""
    caplog.set_level("DEBUG")
    queries, bank = clustered(20, seed=1, spread=1e-4, clusters=1), clustered(1500, spread=1e-4, clusters=1)
    found = nearest(queries, bank, k=10, screen=screen)
    for distance in DISTANCES:
        np.testing.assert_array_equal(found[distance].numpy(), searched(queries, bank, 10, distance))
    assert f"{int(screen == torch.bfloat16)} chunk(s) again in float32" in caplog.text


def test_constant_features_find_the_first_patches() -> None:
    found = nearest(torch.ones(3, 8), torch.ones(500, 8), k=4, key_chunk=200)
    for patches in found.values():
        assert patches.tolist() == [[0, 1, 2, 3]] * 3


def test_vectors_without_length() -> None:
    """A zero has cosine 0 with everything; its Euclidean distance is what it is."""
    bank = torch.cat([torch.zeros(2, 6), clustered(400, 6), torch.zeros(1, 6)])
    queries = torch.cat([torch.zeros(1, 6), clustered(5, 6, seed=2)])
    found = nearest(queries, bank, k=9, key_chunk=150)
    assert found["cosine"][0].tolist() == list(range(9))
    for distance in DISTANCES:
        np.testing.assert_array_equal(found[distance].numpy(), searched(queries, bank, 9, distance))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale: float) -> None:
    queries, bank = clustered(10, seed=1), clustered(900)
    for distance, found in nearest(queries * scale, bank * scale, k=7).items():
        np.testing.assert_array_equal(found.numpy(), searched(queries * scale, bank * scale, 7, distance))


def test_bfloat16_is_the_exact_search_of_rounded_features() -> None:
    queries, bank, labels = clustered(30, seed=1), clustered(1200), some_labels(1200)
    rounded = nearest(queries, bank, k=30, dtype=torch.bfloat16)
    for distance in DISTANCES:
        expected = searched(queries.bfloat16(), bank.bfloat16(), 30, distance)
        np.testing.assert_array_equal(rounded[distance].numpy(), expected)
        fast = predict_pixels_grid(queries, bank, labels, ks=KS, distances=[distance], dtype=torch.bfloat16)
        plain = predict_pixels_plain(queries, bank, labels, ks=KS, distance=distance, dtype=torch.bfloat16)
        assert all(torch.equal(fast[k, distance], plain[k]) for k in KS)


def test_a_lowered_float32_precision_changes_nothing_and_is_put_back() -> None:
    queries, bank = clustered(20, seed=1), clustered(800)
    torch.set_float32_matmul_precision("medium")
    try:
        found = nearest(queries, bank, k=10, screen=torch.float32)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for distance in DISTANCES:
        np.testing.assert_array_equal(found[distance].numpy(), searched(queries, bank, 10, distance))


def test_the_bank_may_be_memory_maps(tmp_path: Path) -> None:
    queries, bank, labels = clustered(20, seed=1), clustered(700), some_labels(700)
    np.save(tmp_path / "features.npy", bank.numpy())
    np.save(tmp_path / "labels.npy", labels.numpy())
    mapped = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("features", "labels"))
    found = predict_pixels_grid(queries, *mapped, ks=KS, key_chunk=256)
    expected = predict_pixels_grid(queries, bank, labels, ks=KS)
    assert set(found) == {(k, distance) for k in KS for distance in DISTANCES}
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_vote_against_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crisp.evals.segmentation.topk.MODE_PIXELS", 50)
    labels = torch.randint(0, 256, (13, MAX_K, 11), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels[:6] = labels[:6] % 3
    labels[0] = 255
    for k, modes in pixel_modes(labels, (MAX_K, 1, 2, 10, 3)).items():
        np.testing.assert_array_equal(modes.numpy(), voted(labels.numpy()[:, :k]))
        assert torch.equal(modes, labels[:, :k].mode(dim=1).values)


def test_a_tie_goes_to_the_smallest_label() -> None:
    labels = torch.tensor([[[9], [4], [4], [9], [255]]], dtype=torch.uint8)
    modes = pixel_modes(labels, (1, 2, 3, 4, 5))
    assert [int(modes[k]) for k in (1, 2, 3, 4, 5)] == [9, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (0, 3)}, "k=(0, 3): needs numbers from 1 to 127"),
        ({"ks": (3, 128)}, "k=(3, 128): needs numbers from 1 to 127"),
        ({"ks": ()}, "k=(): needs"),
        ({"ks": (51,)}, "k=51: the bank has 50 patches"),
        ({"distances": ("l1",)}, "distance='l1'"),
        ({"dtype": torch.float16}, "dtype=torch.float16"),
        ({"queries": torch.ones(2, 5)}, "queries of shape (2, 5): the bank's features have width 24"),
        ({"bank_features": torch.full((50, 24), torch.nan)}, "50 of 50 features of the bank (rows from 0 on)"),
        ({"queries": torch.full((2, 24), 1e16)}, "2 of 2 features of the images to label are not finite or longer"),
        ({"queries": torch.full((2, 24), torch.inf)}, "2 of 2 features of the images to label"),
        ({"bank_labels": some_labels(49)}, "labels of shape (49, 9)"),
        ({"bank_labels": some_labels(50).long()}, "labels of type torch.int64"),
        ({"bank_features": torch.ones(50)}, "bank of shape (50,)"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    given = {"queries": clustered(2), "bank_features": clustered(50), "bank_labels": some_labels(50), "ks": (3,)}
    with pytest.raises(CrispError) as raised:
        predict_pixels_grid(**{**given, **change})  # type: ignore[arg-type]
    assert message in str(raised.value)
