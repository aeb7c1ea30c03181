"""The fused last layer and cross-entropy in Triton's interpreter, on the CPU, against the forms in torch.

`test_triton_interpreter.py` runs this file in a process of its own; by hand:
TRITON_INTERPRET=1 pytest tests/ops/interpreted_cross_entropy.py
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from torch.nn import functional as F
from triton.runtime import interpreter

from crisp.ops import cross_entropy_triton
from crisp.ops.cross_entropy import prototype_cross_entropy, prototype_cross_entropy_plain

SHAPES = [
    # students, groups, teachers, bottleneck width, prototypes
    (1, 32, 1, 32, 128),  # whole tiles
    (2, 37, 2, 40, 70),  # none of them whole
    (5, 3, 2, 16, 70),  # local views of a few images
    (1, 1, 1, 8, 5),
]


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """Triton's interpreter holds bfloat16 as integers, and multiplies those: give its products float32 instead."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, d, *options: multiply(self, wide(a), wide(b), d, *options),
    )


def problem(students, groups, teachers, width, prototypes, *, scale=1.0):
    generator = torch.Generator().manual_seed(students + groups)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    scale = scale / width**0.5
    return {
        "student": F.normalize(draw(students, groups, width), dim=-1).requires_grad_(),
        "student_prototypes": (scale * draw(prototypes, width)).requires_grad_(),
        "teacher": F.normalize(draw(teachers, groups, width), dim=-1),
        "teacher_prototypes": scale * draw(prototypes, width),
        "center": 0.1 * draw(prototypes),
        "weights": draw(groups).abs() * 1e-3,
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
    }


def loss_and_gradients(function, arguments, **options):
    loss = function(**arguments, **options)
    return loss.detach(), *torch.autograd.grad(3 * loss, (arguments["student"], arguments["student_prototypes"]))


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_equals_plain(shape):
    arguments = problem(*shape)
    fused = loss_and_gradients(prototype_cross_entropy, arguments, fused=True)
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    for got, want in zip(fused, loss_and_gradients(prototype_cross_entropy_plain, wide), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_fused_equals_chunked_in_half_precision(shape, dtype, tolerance):
    """Both round the same values, but sum in another order before they round the slopes."""
    arguments = problem(*shape)
    with torch.autocast("cpu", dtype):
        fused = loss_and_gradients(prototype_cross_entropy, arguments, fused=True)
        chunked = loss_and_gradients(prototype_cross_entropy, arguments, chunk_rows=7)
    for got, want in zip(fused, chunked, strict=True):
        assert (got - want).norm() <= tolerance * want.norm()


def test_large_logits_overflow_nowhere():
    """Beyond G a row of zeros meets centres of which exp is not finite."""
    arguments = problem(2, 35, 2, 16, 70, scale=200.0)
    arguments["center"] *= -1000
    fused = loss_and_gradients(prototype_cross_entropy, arguments, fused=True)
    for got, want in zip(fused, loss_and_gradients(prototype_cross_entropy_plain, arguments), strict=True):
        assert got.isfinite().all()
        assert (got - want).norm() <= 1e-4 * want.norm()


def test_same_arguments_same_bits():
    arguments = problem(2, 35, 2, 16, 70)
    one, other = (loss_and_gradients(prototype_cross_entropy, arguments, fused=True) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("students", "groups"), [(1, 0), (0, 5)])
def test_nothing_to_compare_is_zero_with_zero_gradients(students, groups):
    loss, _, of_prototypes = loss_and_gradients(
        prototype_cross_entropy, problem(students, groups, 1, 16, 20), fused=True
    )
    assert loss == 0
    assert not of_prototypes.any()


def test_without_gradients_only_the_loss_is_computed(monkeypatch):
    arguments = problem(2, 9, 2, 16, 20)
    monkeypatch.delattr(cross_entropy_triton, "student_gradient_kernel")
    monkeypatch.delattr(cross_entropy_triton, "prototype_gradient_kernel")
    with torch.no_grad():
        loss = prototype_cross_entropy(**arguments, fused=True)
        torch.testing.assert_close(loss, prototype_cross_entropy_plain(**arguments))
