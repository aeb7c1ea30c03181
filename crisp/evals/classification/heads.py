"""Many linear classifiers trained on the same features in one pass, each by SGD at a rate of its own.

H heads, C classes, F values per feature, B images of a global batch. All heads' logits are one product
[B, F] × [F, H·C] and their gradients another; the gradient of softmax and cross-entropy is written out, so nothing is
kept for a backward pass. Memory on a rank: three arrays [H, C, F] (weights, momentum, gradient) and a few [B, H·C]; for
ImageNet, ViT-S, 45 heads and B = 1024 in one process 3 × 276 MB and 184 MB each.

Under torchrun the *features* of a global batch are gathered (6 MB at 1024 × 1536), and each rank trains some of the
heads on all of them. That is what DDP's sum of gradients gives, without sending gradients (276 MB a step).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from crisp.evals.classification.protocol import INIT_STD, MOMENTUM


def cosine_rate(base: float, epoch: int, epochs: int) -> float:
    """The rate of an epoch (from 0): a cosine from `base` to 0, constant within an epoch."""
    return base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


class Heads:
    """H linear classifiers with SGD (momentum, no decay, no Nesterov).

    Args:
        numbers: of these heads among all: they seed the weights, so a head begins alike on any rank.
        rates: [H] base learning rates, already scaled by the batch.
        width: F.
        classes: C.
        seed: of the weights, N(0, INIT_STD); biases are 0.
        device: where they are.
        dtype: of weights and arithmetic.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        rates: Sequence[float],
        *,
        width: int,
        classes: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert len(numbers) == len(rates)
        self.numbers, self.rates, self.classes = list(numbers), list(rates), classes
        self.weight = torch.empty(len(numbers), classes, width, dtype=dtype, device=device)
        for row, number in enumerate(numbers):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            self.weight[row] = torch.randn(classes, width, generator=generator, dtype=dtype).mul_(INIT_STD).to(device)
        self.bias = torch.zeros(len(numbers), classes, dtype=dtype, device=device)
        self.weight_momentum = torch.zeros_like(self.weight)
        self.bias_momentum = torch.zeros_like(self.bias)

    def __len__(self) -> int:
        return len(self.numbers)

    def state(self) -> dict[str, Tensor]:
        """All that training goes on from, by the heads' numbers; views of the tensors themselves."""
        return {
            f"{name}.{number}": getattr(self, name)[row]
            for row, number in enumerate(self.numbers)
            for name in ("weight", "bias", "weight_momentum", "bias_momentum")
        }

    def logits(self, features: Tensor) -> Tensor:
        """[B, F] → [B, H, C]."""
        flat = torch.addmm(self.bias.view(-1), features.to(self.weight.dtype), self.weight.flatten(0, 1).T)
        return flat.view(len(features), len(self), self.classes)

    def rates_at(self, epoch: int, epochs: int) -> Tensor:
        """[H] learning rates of an epoch (from 0), for its steps."""
        rates = [cosine_rate(rate, epoch, epochs) for rate in self.rates]
        return torch.tensor(rates, dtype=torch.float64).to(self.weight)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, rates: Tensor) -> Tensor:
        """One SGD step of every head on a global batch.

        Args:
            features: [B, F].
            labels: [B] int64.
            rates: [H] of this step.

        Returns:
            [H] mean cross-entropy before the step, on the device.
        """
        if not len(self):
            return self.bias.new_zeros(0)
        features = features.to(self.weight.dtype)
        logits = self.logits(features)
        target = labels.view(-1, 1, 1).expand(-1, len(self), 1)
        log_probabilities = F.log_softmax(logits, dim=2)
        loss = -log_probabilities.gather(2, target).mean(dim=(0, 2))
        # d loss / d logits = (softmax − one-hot) / B
        error = log_probabilities.exp_()
        error.scatter_add_(2, target, torch.full_like(target, -1, dtype=error.dtype))
        error = error.div_(len(features)).flatten(1)  # [B, H·C]
        self.weight_momentum.mul_(MOMENTUM).add_((error.T @ features).view_as(self.weight))
        self.bias_momentum.mul_(MOMENTUM).add_(error.sum(0).view_as(self.bias))
        self.weight.addcmul_(self.weight_momentum, rates.view(-1, 1, 1), value=-1)
        self.bias.addcmul_(self.bias_momentum, rates.view(-1, 1), value=-1)
        return loss

    @torch.no_grad()
    def hits(self, features: Tensor, labels: Tensor) -> Tensor:
        """How many of B images each head classifies right, [H] int64 on the device. A head with a value that is not
        finite has diverged and classifies none right."""
        if not len(self):
            return torch.zeros(0, dtype=torch.int64, device=labels.device)
        logits = self.logits(features)
        right = (logits.argmax(2) == labels.view(-1, 1)) & logits.isfinite().all(2)
        return right.sum(0)
