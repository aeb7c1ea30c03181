"""What evaluations share around their work: ranks that agree, errors that all hear of, the precision."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crisp.errors import CrispError
from crisp.evals.config import EvalConfig
from crisp.evals.running import autocast, evaluation_world, from_main, together
from tests.ranks import in_ranks


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_autocast(precision: Any) -> None:
    config = EvalConfig(weights="a", data=Path(), device="cpu", precision=precision)
    with evaluation_world(config) as world, autocast(config, world.device):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == getattr(torch, precision)


def _agree() -> list[Any]:
    with evaluation_world(EvalConfig(weights="a", data=Path(), device="cpu")) as world:
        told: list[Any] = [from_main(world, lambda: world.rank + 10), together(lambda: world.rank)]

        def fails_in_the_last() -> None:
            if world.rank == world.size - 1:
                raise CrispError(f"broken on rank {world.rank}")

        with pytest.raises(CrispError) as caught:
            together(fails_in_the_last)
        return [*told, str(caught.value)]


def test_ranks_agree_and_share_errors(tmp_path: Path) -> None:
    assert in_ranks(_agree, 2, tmp_path / "ranks") == [[10, [0, 1], "broken on rank 1"]] * 2


def test_alone() -> None:
    with evaluation_world(EvalConfig(weights="a", data=Path(), device="cpu")) as world:
        assert from_main(world, lambda: 3) == 3
        with pytest.raises(CrispError, match="broken"):
            together(lambda: (_ for _ in ()).throw(CrispError("broken")))
