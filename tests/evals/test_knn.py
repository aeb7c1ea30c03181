import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from crisp.errors import CrispError
from crisp.evals.knn import knn_accuracy, knn_hits, nearest


def plain_knn(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int, temperature: float
) -> float:
    """The protocol as it is told: one query, one neighbour, one vote at a time."""
    right = 0
    for query, truth in zip(test.double(), test_labels.tolist(), strict=True):
        cosines = [
            (float(torch.dot(query, key) / (query.norm() * key.norm())), i) for i, key in enumerate(train.double())
        ]
        votes: dict[int, float] = {}
        for cosine, i in sorted(cosines, reverse=True)[:k]:
            label = int(train_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        best = min(votes, key=lambda label: (-votes[label], label))
        right += best == truth
    return right / len(test)


def blobs(seed: int, n: int, *, classes: int = 5, dim: int = 8, spread: float = 1.2) -> tuple[Tensor, Tensor]:
    """Noisy clusters that overlap, so that accuracies lie well between chance and 1."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    return centres[labels] + spread * torch.randn(n, dim, generator=rng), labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_plain_form(temperature: float) -> None:
    train, test = blobs(2, 90), blobs(3, 41)
    ours = knn_accuracy(*train, *test, k=(1, 3, 10, 90), classes=5, temperature=temperature, chunk=16)
    for k, accuracy in ours.items():
        assert accuracy == plain_knn(*train, *test, k=k, temperature=temperature), k
    assert 0.3 < ours[10] < 0.95


def test_equals_scikit_learn() -> None:
    (train, train_labels), (test, test_labels) = blobs(4, 300), blobs(5, 120)
    unit = [torch.nn.functional.normalize(x.double(), dim=1).numpy() for x in (train, test)]
    theirs = KNeighborsClassifier(
        n_neighbors=20,
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances**2 / 2) / 0.07),  # |a − b|² = 2 − 2 cos on the unit sphere
    ).fit(unit[0], train_labels)
    expected = theirs.score(unit[1], test_labels)
    assert knn_accuracy(train, train_labels, test, test_labels, k=(20,), classes=5) == {20: pytest.approx(expected)}


def test_length_of_features_does_not_matter() -> None:
    (train, train_labels), test = blobs(6, 80), blobs(7, 40)
    scale = torch.rand(80, 1, generator=torch.Generator().manual_seed(0)) * 50 + 0.01
    assert knn_accuracy(train, train_labels, *test, k=(7,), classes=5) == knn_accuracy(
        train * scale, train_labels, *test, k=(7,), classes=5
    )


def test_closer_neighbours_outvote_more_numerous_ones() -> None:
    # Two of class 1 at cosine .5, one of class 0 at cosine 1: exp(1/.07) against 2·exp(.5/.07).
    train = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [0.5, -(0.75**0.5)]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    assert knn_accuracy(train, labels, query, torch.tensor([0]), k=(3,), classes=2) == {3: 1.0}
    assert knn_accuracy(train, labels, query, torch.tensor([0]), k=(3,), classes=2, temperature=10) == {3: 0.0}


def test_refuses_what_cannot_be_scored() -> None:
    train, test = blobs(8, 12), blobs(9, 4)
    with pytest.raises(CrispError, match=r"k=\(5, 20\): needs numbers from 1 to the 12 training images"):
        knn_accuracy(*train, *test, k=(5, 20), classes=5)
    with pytest.raises(CrispError, match="no test images"):
        knn_accuracy(*train, test[0][:0], test[1][:0], k=(5,), classes=5)
    train[0][3, 2] = float("nan")
    with pytest.raises(CrispError, match="1 of 12 training features are not finite"):
        knn_accuracy(*train, *test, k=(5,), classes=5)


@pytest.mark.parametrize("bank_chunk", [1, 7, 64, 1000])
def test_a_bank_in_chunks_gives_the_same_neighbours(bank_chunk: int, tmp_path: Path) -> None:
    (train, train_labels), (test, test_labels) = blobs(10, 90), blobs(11, 33)
    cosines = torch.nn.functional.normalize(test, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
    expected, expected_rows = cosines.topk(20, dim=1)
    np.save(tmp_path / "train.npy", train.numpy())
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    for bank in (train, mapped):
        found, rows = nearest(bank, test, k=20, chunk=8, bank_chunk=bank_chunk)
        torch.testing.assert_close(found, expected)
        assert torch.equal(rows, expected_rows)
    options = {"k": (1, 20, 90), "classes": 5}
    assert knn_accuracy(mapped, train_labels, test, test_labels, bank_chunk=bank_chunk, **options) == knn_accuracy(
        train, train_labels, test, test_labels, **options
    )


def test_shares_of_the_queries_add_up() -> None:
    train, (test, test_labels) = blobs(12, 60), blobs(13, 25)
    options = {"k": (3, 10), "classes": 5, "temperature": 0.07}
    parts = [
        knn_hits(*train, test[at], test_labels[at], **options) for at in (slice(0, 11), slice(11, 11), slice(11, 25))
    ]
    assert {k: sum(part[k] for part in parts) for k in (3, 10)} == knn_hits(*train, test, test_labels, **options)


def test_perfect_features_give_1_and_constant_ones_the_share_of_one_class() -> None:
    labels = torch.arange(5).repeat_interleave(6)
    one_hot = torch.eye(5)[labels]
    val = torch.arange(5).repeat(4)
    assert set(knn_accuracy(one_hot, labels, torch.eye(5)[val], val, k=(1, 6), classes=5).values()) == {1.0}
    # All are equally near: whoever the neighbours are, they name one class for every image.
    constant = knn_accuracy(torch.ones(30, 4), labels, torch.ones(20, 4), val, k=(1, 6, 30), classes=5)
    assert set(constant.values()) == {1 / 5}
