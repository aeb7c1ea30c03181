import numpy as np
import pytest
import torch

from crisp.models.stochastic_depth import depth_rates, draw_kept, kept_rows

CPU = torch.device("cpu")


def test_rates_are_linear_in_depth() -> None:
    assert depth_rates(0.2, 3) == pytest.approx([0, 0.1, 0.2])
    assert depth_rates(0.1, 1) == [0]


def test_shares_are_those_of_the_rates_and_branches_are_apart() -> None:
    kept = draw_kept([0.0, 0.25, 0.5], seed=3, step=7, slots=np.arange(500), views=4)
    assert kept.shape == (3, 2, 4, 500)
    assert kept[0].all()
    np.testing.assert_allclose(kept.mean((2, 3)), [[1, 1], [0.75, 0.75], [0.5, 0.5]], atol=0.04)
    both = (kept[2, 0] & kept[2, 1]).mean()
    assert abs(both - 0.25) < 0.04


def test_draws_belong_to_the_slot_not_to_the_rank() -> None:
    draw = {"rates": [0.1, 0.5], "seed": 1, "step": 4, "views": 3}
    whole = draw_kept(slots=np.arange(8), **draw)
    np.testing.assert_array_equal(draw_kept(slots=np.array([6, 1]), **draw), whole[..., [6, 1]])
    assert not np.array_equal(draw_kept(slots=np.arange(8), **(draw | {"step": 5})), whole)
    assert not np.array_equal(draw_kept(slots=np.arange(8), **(draw | {"seed": 2})), whole)


def test_rows_name_what_is_kept() -> None:
    kept = draw_kept([0.0, 0.5], seed=0, step=0, slots=np.arange(6), views=2)
    nothing, rows = kept_rows(kept, [0.0, 0.5], device=CPU)
    assert nothing is None
    assert rows is not None
    assert rows.scale == 2
    for branch, got in enumerate((rows.attention, rows.mlp)):
        assert got.tolist() == np.flatnonzero(kept[1, branch].ravel()).tolist()
    assert kept_rows(kept[:1], [0.0], device=CPU) == [None]
