from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from crisp.distributed import World
from crisp.evals.segmentation.bank import Bank, StandardisedRows, kept_rows
from crisp.evals.segmentation.standardise import IMAGES_AT_A_TIME, fit_standardiser
from crisp.evals.segmentation.truth import Truth

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


def features_of(images: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(images, 3, 5)) * [1, 1e-3, 100, 1, 1] + [0, 5, -1000, 0, 0]
    features[..., 3] = 0.1  # not exact in binary: rounding must not make it a variance
    return features.astype(np.float32)


@pytest.mark.parametrize("images", [2, IMAGES_AT_A_TIME, 2 * IMAGES_AT_A_TIME + 7])
def test_equals_scikit_learn_on_the_chosen_images(images: int) -> None:
    features = features_of(images + 4)
    chosen = np.sort(np.random.default_rng(1).permutation(images + 4)[:images])
    scaler = StandardScaler().fit(features[chosen].reshape(-1, 5))
    ours = fit_standardiser(features, chosen, ALONE)
    np.testing.assert_allclose(ours.mean, scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(ours.std, scaler.scale_, rtol=1e-6)
    assert ours.std[3] == 1
    everything = torch.from_numpy(features.reshape(-1, 5))
    np.testing.assert_allclose(ours(everything), scaler.transform(everything.numpy()), rtol=1e-4, atol=1e-5)


def test_rows_of_a_memory_map(tmp_path: Path) -> None:
    features = features_of(9)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    standardiser = fit_standardiser(mapped, np.arange(9), ALONE)
    numbers = np.array([0, 4, 5, 20, 26])
    rows = StandardisedRows(mapped, numbers, standardiser)
    expected = standardiser(torch.from_numpy(features.reshape(-1, 5)[numbers]))
    assert (len(rows), rows.shape, rows.ndim) == (5, (5, 5), 2)
    assert (rows[1:4] == expected[1:4].numpy()).all()
    assert torch.equal(rows.whole(torch.float32, torch.device("cpu")), expected)
    assert torch.equal(rows.whole(torch.bfloat16, torch.device("cpu")), expected.bfloat16())


def test_bank_drops_patches_by_their_mode_and_keeps_ignored_pixels() -> None:
    features = features_of(3)
    pixels = np.array(
        [
            [[0, 0, 0, 1], [1, 1, 0, 255], [2, 2, 2, 2]],
            [[255, 255, 255, 1], [3, 3, 255, 0], [0, 0, 1, 1]],
            [[5, 5, 5, 5]] * 3,
        ],
        np.uint8,
    )
    modes = np.array([[0, 1, 2], [255, 3, 0], [5, 5, 5]], np.uint8)
    truth = Truth(pixels, modes, np.zeros((3, 256), np.uint8))
    standardiser = fit_standardiser(features, np.arange(3), ALONE)
    bank = Bank(features, truth, np.array([0, 1]), standardiser, (0, 255))
    assert kept_rows(truth, np.array([0, 1]), (0, 255)).tolist() == [1, 2, 4]
    assert bank.modes.tolist() == [1, 2, 3]
    assert bank.labels.tolist() == [[1, 1, 0, 255], [2, 2, 2, 2], [3, 3, 255, 0]]
    expected = standardiser(torch.from_numpy(features.reshape(-1, 5)[[1, 2, 4]]))
    assert (bank.features[0:3] == expected.numpy()).all()
