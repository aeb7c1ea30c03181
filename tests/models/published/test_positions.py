"""Position embeddings of other grids, against samples taken by hand from the cubic kernel, and against timm's."""

import itertools

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from crisp.errors import CrispError
from crisp.models.published.positions import PositionRule, check_last, grid_side, patch_grid, resize_positions


def cubic(distance: float) -> float:
    """Keys' kernel with a = -.75."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def sampled(table: Tensor, side: int, grid: tuple[int, int], factors: tuple[float, float]) -> Tensor:
    """[1, rows · columns, D]: pixel i of the result lies at (i + .5) / factor - .5 of the table; its edge repeats."""
    values = table[0].unflatten(0, (side, side)).double()
    rows = []
    for y, x in itertools.product(range(grid[0]), range(grid[1])):
        at_y, at_x = (y + 0.5) / factors[0] - 0.5, (x + 0.5) / factors[1] - 0.5
        total = torch.zeros(table.shape[-1], dtype=torch.float64)
        for j, i in itertools.product(range(int(at_y) - 3, int(at_y) + 4), range(int(at_x) - 3, int(at_x) + 4)):
            weight = cubic(at_y - j) * cubic(at_x - i)
            total += weight * values[min(max(j, 0), side - 1), min(max(i, 0), side - 1)]
        rows.append(total)
    return torch.stack(rows)[None].float()


@pytest.mark.parametrize("grid", [(7, 9), (3, 4), (5, 6), (2, 11)])
@pytest.mark.parametrize("rule", ["scale .1", "size"])
def test_bicubic_by_hand(grid: tuple[int, int], rule: PositionRule) -> None:
    table = torch.randn(1, 25, 3, generator=torch.Generator().manual_seed(0))
    extra = 0.1 if rule == "scale .1" else 0.0
    want = sampled(table, 5, grid, ((grid[0] + extra) / 5, (grid[1] + extra) / 5))
    torch.testing.assert_close(resize_positions(table, grid, rule), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(7, 9), (3, 4), (16, 16)])
def test_antialias_is_timms(grid: tuple[int, int]) -> None:
    table = torch.randn(1, 25, 3)
    want = resample_abs_pos_embed(table, list(grid), [5, 5], num_prefix_tokens=0)
    torch.testing.assert_close(resize_positions(table, grid, "size, antialias"), want)


def test_the_own_grid_is_untouched_and_the_rules_differ() -> None:
    table = torch.randn(1, 196, 8)
    rules: tuple[PositionRule, ...] = ("scale .1", "size", "size, antialias")
    for rule in rules:
        assert resize_positions(table, (14, 14), rule) is table
    smaller = [resize_positions(table, (7, 10), rule) for rule in rules]
    for one, other in itertools.combinations(smaller, 2):
        assert (one - other).abs().max() > 1e-2
    half = resize_positions(table.half(), (7, 10), "size")
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), smaller[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("side", range(1, 120, 7))
def test_the_factor_gives_every_grid(side: int) -> None:
    """The .1 keeps the floor of base · factor at the grid, for all grids that evaluations ask for."""
    table = torch.zeros(1, side * side, 1)
    for n in range(1, 150, 3):
        assert resize_positions(table, (n, 151 - n), "scale .1").shape[1] == n * (151 - n)


def test_refusals() -> None:
    with pytest.raises(CrispError, match="images of 70×64 px: the model has patches of 14; give multiples of that"):
        patch_grid(torch.zeros(1, 3, 70, 64), 14)
    assert patch_grid(torch.zeros(1, 3, 70, 42), 14) == (5, 3)
    for last in (0, 13):
        with pytest.raises(CrispError, match=f"the last {last} blocks: the model has 12; take 1 to 12"):
            check_last(last, 12)
    with pytest.raises(CrispError, match=r"w.pth: 195 position embeddings of patches make no square"):
        grid_side(195, source="w.pth")
