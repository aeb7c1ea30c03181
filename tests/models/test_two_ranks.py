import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("two_ranks.py")


def test_two_uneven_ranks_equal_one(tmp_path: Path) -> None:
    """3 + 2 images on two ranks, the second without a masked patch or a valid region, against 5 on one."""
    spec = importlib.util.spec_from_file_location("two_ranks", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    whole = worker.step(slice(None), world=1)
    for rank in ranks:
        _, errors = rank.communicate(timeout=240)
        assert rank.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))

    assert set(first) == set(second) == set(whole)
    assert whole["regions"] > 0
    assert second["share patch"] == second["share region"] == 0
    for name, value in whole.items():
        if name.startswith("share"):
            torch.testing.assert_close(first[name] + second[name], value, rtol=1e-12, atol=0)
        else:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
            torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-13)
