import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crisp.evals.classification.heads import Heads, cosine_rate
from crisp.evals.classification.protocol import GRID_LRS

CPU = torch.device("cpu")


def batches(count: int, *, width: int = 6, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, width, dtype=torch.float64, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for size in ([8] * (count - 1) + [3])
    ]


def test_45_heads_are_45_separate_sgds_each_with_its_cosine_schedule() -> None:
    epochs, data = 4, batches(5)
    rates = [4 * rate for rate in GRID_LRS]
    heads = Heads(range(45), rates, width=6, classes=4, seed=7, device=CPU, dtype=torch.float64)
    layers, optimisers, schedulers = [], [], []
    for row, rate in enumerate(rates):
        layer = torch.nn.Linear(6, 4, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(heads.weight[row])
            layer.bias.copy_(heads.bias[row])
        layers.append(layer)
        optimisers.append(torch.optim.SGD(layer.parameters(), rate, momentum=0.9, weight_decay=0))
        schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimisers[-1], epochs, eta_min=0))
    for epoch in range(epochs):
        rates_now = heads.rates_at(epoch, epochs)
        for features, labels in data:
            losses = heads.step(features, labels, rates_now)
            for row, (layer, optimiser) in enumerate(zip(layers, optimisers, strict=True)):
                loss = F.cross_entropy(layer(features), labels)
                torch.testing.assert_close(losses[row], loss.detach(), rtol=1e-9, atol=1e-9)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        for scheduler in schedulers:
            scheduler.step()
    for row, layer in enumerate(layers):
        torch.testing.assert_close(heads.weight[row], layer.weight.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(heads.bias[row], layer.bias.detach(), rtol=1e-9, atol=1e-10)
    features, labels = data[0]
    right = [int((layer(features).argmax(1) == labels).sum()) for layer in layers]
    assert heads.hits(features, labels).tolist() == right
    assert len(set(right)) > 2


def test_a_step_is_that_of_gradients_summed_over_shares_of_the_batch() -> None:
    """What DDP would do with ranks of 5 and 3 images, the sum divided by all 8."""
    heads = Heads(range(3), [0.1, 0.2, 0.3], width=6, classes=4, seed=0, device=CPU, dtype=torch.float64)
    weights, biases = heads.weight.clone().requires_grad_(), heads.bias.clone().requires_grad_()
    features, labels = batches(2)[0]
    for rows in (slice(0, 5), slice(5, 8)):
        for row in range(3):
            logits = F.linear(features[rows], weights[row], biases[row])
            (F.cross_entropy(logits, labels[rows], reduction="sum") / 8).backward()
    heads.step(features, labels, heads.rates_at(0, 4))
    assert weights.grad is not None
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(heads.weight, weights.detach() - rates * weights.grad, rtol=1e-12, atol=1e-15)


def test_the_cosine_ends_at_zero() -> None:
    assert cosine_rate(0.3, 0, 10) == 0.3
    assert cosine_rate(0.3, 5, 10) == pytest.approx(0.15)
    assert 0 < cosine_rate(0.3, 9, 10) < 0.01
    assert cosine_rate(0.3, 10, 10) == pytest.approx(0)


def test_heads_begin_as_the_protocol_says_on_whatever_rank() -> None:
    every = Heads(range(5), [0.1] * 5, width=300, classes=40, seed=3, device=CPU)
    assert every.weight.std() == pytest.approx(0.01, rel=0.02)
    assert abs(every.weight.mean()) < 1e-4
    assert not every.bias.any()
    some = Heads([1, 4], [0.1] * 2, width=300, classes=40, seed=3, device=CPU)
    assert torch.equal(some.weight, every.weight[[1, 4]])
    assert not torch.equal(every.weight[0], every.weight[1])
    assert not torch.equal(every.weight, Heads(range(5), [0.1] * 5, width=300, classes=40, seed=4, device=CPU).weight)


def test_state_is_by_the_number_of_the_head_and_shares_memory() -> None:
    heads = Heads([2, 5], [0.1, 0.2], width=3, classes=2, seed=0, device=CPU)
    assert sorted(heads.state()) == sorted(
        f"{name}.{number}" for name in ("weight", "bias", "weight_momentum", "bias_momentum") for number in (2, 5)
    )
    heads.state()["bias.5"].fill_(3)
    assert heads.bias.tolist() == [[0, 0], [3, 3]]


def test_a_head_that_diverged_is_right_nowhere_and_leaves_the_others_alone() -> None:
    heads = Heads(range(3), [0.1] * 3, width=6, classes=4, seed=0, device=CPU, dtype=torch.float64)
    features, labels = batches(2)[0]
    before = heads.hits(features, labels).tolist()
    heads.weight[1, 0, 0] = float("nan")
    after = heads.hits(features, labels).tolist()
    assert after == [before[0], 0, before[2]]
    assert before[1] > 0


def test_no_heads_do_nothing() -> None:
    heads = Heads([], [], width=6, classes=4, seed=0, device=CPU)
    features, labels = batches(2)[0]
    assert heads.step(features, labels, heads.rates_at(0, 2)).shape == (0,)
    assert heads.hits(features, labels).shape == (0,)
