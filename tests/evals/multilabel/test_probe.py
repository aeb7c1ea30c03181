import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crisp.evals.multilabel.average_precision import mean_average_precision
from crisp.evals.multilabel.data import IGNORED
from crisp.evals.multilabel.probe import masked_bce, scores_of, train_probe


def targets(count: int, classes: int = 3, *, low: int = 0) -> np.ndarray:
    return np.random.default_rng(0).integers(low, 2, (count, classes)).astype(np.int8)


def test_the_loss_is_the_mean_over_what_is_not_ignored() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = torch.from_numpy(targets(6, low=-1))
    kept = wanted != IGNORED
    assert 0 < kept.sum() < kept.numel()
    loss = masked_bce(logits, wanted)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits[kept], wanted[kept].double()))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).all()
    assert masked_bce(logits, torch.full((6, 3), IGNORED)).item() == 0


def test_training_is_adamw_with_a_cosine_per_epoch_in_batches_of_a_permutation() -> None:
    features = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = targets(7)
    probe = train_probe(features, wanted, epochs=3, global_batch=3, seed=5)
    plain = train_probe(features, wanted, epochs=0, global_batch=3, seed=5)  # as it begins
    assert plain.weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert not plain.bias.any()
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    for epoch in range(3):
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * epoch / 3)) / 2
        order = np.random.default_rng((5, epoch)).permutation(7)
        for rows in (order[:3], order[3:6], order[6:]):
            loss = F.binary_cross_entropy_with_logits(plain(features[rows]), torch.from_numpy(wanted[rows]).double())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    torch.testing.assert_close(probe.weight, plain.weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(probe.bias, plain.bias, rtol=1e-12, atol=0)


def test_perfect_features_give_1_and_constant_ones_the_share_of_positives() -> None:
    wanted = (np.arange(64)[:, None] >> np.arange(3) & 1).astype(np.int8)  # each combination of labels, 8 times
    perfect = torch.from_numpy(wanted).float() * 2 - 1
    probe = train_probe(perfect, wanted, epochs=60, global_batch=20, seed=0)
    assert mean_average_precision(scores_of(probe, perfect), wanted) == (1, 1)
    constant = torch.ones(64, 4)
    probe = train_probe(constant, wanted, epochs=2, global_batch=20, seed=0)
    floor = pytest.approx(0.5)
    assert mean_average_precision(scores_of(probe, constant), wanted) == (floor, floor)
