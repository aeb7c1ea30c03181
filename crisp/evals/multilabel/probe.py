"""One linear classifier with a sigmoid per class, trained on stored features."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from crisp.evals.multilabel.data import IGNORED
from crisp.evals.multilabel.protocol import INIT_STD, LR, WEIGHT_DECAY


def masked_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, averaged over what is not ignored.

    Args:
        logits: [B, C].
        targets: [B, C] 1, 0 or IGNORED.

    Returns:
        A scalar; 0 if all is ignored.
    """
    counted = targets != IGNORED
    losses = F.binary_cross_entropy_with_logits(logits, targets.clamp_min(0).to(logits.dtype), reduction="none")
    return torch.where(counted, losses, 0).sum() / counted.sum().clamp_min(1)


def train_probe(
    features: Tensor, targets: NDArray[np.int8], *, epochs: int, global_batch: int, seed: int
) -> torch.nn.Linear:
    """Train by AdamW at LR, a cosine per epoch to 0.

    Args:
        features: [N, F] on the device.
        targets: [N, C].
        epochs: passes; an epoch's last batch may be smaller.
        global_batch: images per step.
        seed: of weights and order.

    Returns:
        The classifier after the last epoch.
    """
    count, width = features.shape
    probe = torch.nn.utils.skip_init(torch.nn.Linear, width, targets.shape[1], device="cpu", dtype=features.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        probe.weight.copy_(torch.randn(probe.weight.shape, generator=generator, dtype=features.dtype) * INIT_STD)
        probe.bias.zero_()
    probe.to(features.device)
    wanted = torch.from_numpy(targets).to(features.device)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count)).to(features.device)
        for rows in order.split(global_batch):
            loss = masked_bce(probe(features[rows]), wanted[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return probe


@torch.no_grad()
def scores_of(probe: torch.nn.Linear, features: Tensor) -> NDArray[np.float32]:
    """[N, C] logits, on the CPU."""
    scores: NDArray[np.float32] = probe(features).cpu().numpy()
    return scores
