"""Parameter groups, clipping and the frozen last layer."""

import torch
from torch import nn

from crisp.config import OptimConfig
from crisp.optim import (
    apply_schedule,
    build_optimizer,
    clip_each_gradient,
    drop_gradients,
    gradient_norms,
    gradients_of,
    take_step,
)
from crisp.schedules import StepSchedule


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)


def test_biases_and_vectors_are_not_decayed() -> None:
    model = Small()
    optimizer = build_optimizer(model, OptimConfig())
    schedule = StepSchedule(
        step=0,
        learning_rate=1e-3,
        weight_decay=0.2,
        ema_momentum=0.9,
        teacher_temperature=0.04,
        last_layer_frozen=False,
    )
    apply_schedule(optimizer, schedule)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert by_name == {
        "cls_token": 0.2, "linear.weight": 0.2, "linear.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0,
    }  # fmt: skip
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_clipping_is_per_tensor_and_equals_the_plain_loop() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(3,), (4, 5), (2, 2, 2), (1,)]]
    for scale, parameter in zip([0.01, 10.0, 1.0, 5.0], parameters, strict=True):
        parameter.grad = scale * torch.randn_like(parameter)
    parameters.append(nn.Parameter(torch.zeros(2)))  # has no gradient
    plain = []
    for parameter in parameters[:-1]:
        norm = parameter.grad.norm()
        plain.append(parameter.grad * (0.5 / (norm + 1e-6)) if 0.5 / (norm + 1e-6) < 1 else parameter.grad.clone())
    gradients = gradients_of(parameters)
    clip_each_gradient(gradients, gradient_norms(gradients), 0.5)
    for parameter, expected in zip(parameters, plain, strict=False):
        torch.testing.assert_close(parameter.grad, expected)
    assert parameters[0].grad.norm() < 0.1, "small gradients are left alone"


def test_dropped_gradients_leave_weights_and_moments_untouched() -> None:
    model = Small()
    optimizer = build_optimizer(model, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.1, 0.5
    before = model.linear.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    drop_gradients([model.linear.weight])
    optimizer.step()
    assert torch.equal(model.linear.weight, before)
    assert model.linear.weight not in optimizer.state
    assert not torch.equal(model.linear.bias, torch.zeros(3))


def test_a_skipped_step_changes_neither_weights_nor_moments_nor_their_count() -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = build_optimizer(model, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.1, 0.5

    def state() -> list[torch.Tensor]:
        moments = [value for p in model.parameters() for value in optimizer.state[p].values()]
        return [value.clone() for value in [*model.parameters(), *moments]]

    def step(gradient: float, *, skipped: bool) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        take_step(optimizer, skipped=torch.tensor(skipped))

    step(1.0, skipped=False)
    before = state()
    step(float("nan"), skipped=True)
    assert all(map(torch.equal, state(), before))
    step(1.0, skipped=False)
    assert not any(map(torch.equal, state(), before))


def test_norms_that_are_not_finite_are_seen() -> None:
    gradients = [torch.ones(3), torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan])]
    assert gradient_norms(gradients).isfinite().tolist() == [True, False, False]
