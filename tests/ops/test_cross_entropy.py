from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crisp.ops.cross_entropy import prototype_cross_entropy, prototype_cross_entropy_plain

DIM, PROTOTYPES = 16, 64


def _problem(students: int, groups: int, teachers: int, *, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(students + 10 * groups + 100 * teachers)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "student": F.normalize(draw(students, groups, DIM), dim=-1).requires_grad_(),
        "student_prototypes": draw(PROTOTYPES, DIM).requires_grad_(),
        "teacher": F.normalize(draw(teachers, groups, DIM), dim=-1).requires_grad_(),
        "teacher_prototypes": draw(PROTOTYPES, DIM).requires_grad_(),
        "center": draw(PROTOTYPES).requires_grad_(),
        "weights": draw(groups).abs(),
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
    }


def _loss_and_gradients(
    function: Callable[..., Tensor], problem: dict[str, Any], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = function(**problem, **options)
    # a factor that is not 1, as λ or a gradient scaler gives
    gradients = torch.autograd.grad(3.0 * loss, (problem["student"], problem["student_prototypes"]))
    return loss.detach(), *gradients


@pytest.mark.parametrize("chunk_rows", [1, 5, 12, 1000])
@pytest.mark.parametrize(("students", "groups", "teachers"), [(1, 11, 1), (4, 7, 2), (3, 1, 1)])
def test_chunked_equals_whole(students: int, groups: int, teachers: int, chunk_rows: int) -> None:
    problem = _problem(students, groups, teachers)
    chunked = _loss_and_gradients(prototype_cross_entropy, problem, chunk_rows=chunk_rows)
    whole = _loss_and_gradients(prototype_cross_entropy_plain, problem)
    torch.testing.assert_close(chunked, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("students", "groups"), [(1, 0), (0, 5)])
def test_nothing_to_compare_is_zero_with_zero_gradients(students: int, groups: int) -> None:
    loss, of_student, of_prototypes = _loss_and_gradients(prototype_cross_entropy, _problem(students, groups, 1))
    assert loss == 0
    assert of_student.shape == (students, groups, DIM)
    torch.testing.assert_close(of_prototypes, torch.zeros(PROTOTYPES, DIM, dtype=torch.float64), rtol=0, atol=0)


def test_all_weights_zero() -> None:
    problem = _problem(2, 5, 1) | {"weights": torch.zeros(5, dtype=torch.float64)}
    for value in _loss_and_gradients(prototype_cross_entropy, problem):
        assert torch.count_nonzero(value) == 0


def test_nothing_flows_to_the_teacher() -> None:
    problem = _problem(2, 5, 2)
    prototype_cross_entropy(**problem).backward()
    for name in ("teacher", "teacher_prototypes", "center"):
        assert problem[name].grad is None
    assert problem["student"].grad.abs().sum() > 0


def test_one_sided_gradients() -> None:
    problem = _problem(2, 5, 2)
    _, of_student, of_prototypes = _loss_and_gradients(prototype_cross_entropy_plain, problem)
    frozen = problem | {"student_prototypes": problem["student_prototypes"].detach()}
    (only,) = torch.autograd.grad(3 * prototype_cross_entropy(**frozen), frozen["student"])
    torch.testing.assert_close(only, of_student)
    frozen = problem | {"student": problem["student"].detach()}
    (only,) = torch.autograd.grad(3 * prototype_cross_entropy(**frozen), frozen["student_prototypes"])
    torch.testing.assert_close(only, of_prototypes)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
@pytest.mark.parametrize("weight", [1.0, 1e-6])
def test_half_precision_products(dtype: torch.dtype, tolerance: float, weight: float) -> None:
    """Also with weights below float16's range: the gradients are those of float32, to the type's precision."""
    problem = _problem(2, 40, 2, dtype=torch.float32)
    problem["student_prototypes"] = F.normalize(problem["student_prototypes"].detach(), dim=-1).requires_grad_()
    problem["weights"] = torch.full((40,), weight)
    whole = _loss_and_gradients(prototype_cross_entropy_plain, problem)
    with torch.autocast("cpu", dtype):
        half = _loss_and_gradients(prototype_cross_entropy, problem)
    for got, want in zip(half, whole, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= tolerance * want.norm()


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_never_holds_all_logits() -> None:
    problem = _problem(2, 100, 2, dtype=torch.float32)
    with _Largest() as chunked:
        _loss_and_gradients(prototype_cross_entropy, problem, chunk_rows=20)
    with _Largest() as whole:
        _loss_and_gradients(prototype_cross_entropy_plain, problem)
    assert whole.elements == 2 * 100 * PROTOTYPES
    assert chunked.elements <= max(20 * PROTOTYPES, 2 * 100 * DIM)
