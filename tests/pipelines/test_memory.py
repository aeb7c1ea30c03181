"""Memory does not grow with the number of batches: 2,000 of them, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from crisp.shard_imagenet import ShardConfig, shard_imagenet

BATCHES = 2000

# Resident memory of the process and of those that it started, in MB, every 100 batches. Images of many sizes and a
# shard that is opened anew all the time would show what is kept of each.
SCRIPT = """
import json, multiprocessing, sys
from pathlib import Path
import torch
from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.pipelines import shards
from crisp.pipelines.loader import build_train_loader

def resident_mb():
    pids = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

if __name__ == "__main__":
    folder, renderer, batches = sys.argv[1], sys.argv[2], int(sys.argv[3])
    shards._OPEN = 3
    config = TrainConfig(
        data=DataConfig(shards=folder, renderer=renderer, threads=2, parts=4, shuffle_window_shards=2),
        views=ViewsConfig(reference_px=64, global_px=64, local_px=32, local_views=2),
        optim=OptimConfig(global_batch=8),
    )
    loader = build_train_loader(config, rank=0, world_size=1, device=torch.device("cpu"))
    resident = []
    for i, batch in enumerate(loader, start=1):
        if i % 100 == 0:
            resident.append(resident_mb())
        if i == batches:
            break
    loader.close()
    print(json.dumps(resident))
"""


@pytest.mark.slow
@pytest.mark.parametrize("renderer", ["cpu", "dali"])
def test_two_thousand_batches_take_no_more_memory_than_a_few_hundred(
    tmp_path: Path, photographs: dict[str, NDArray[np.uint8]], renderer: str
) -> None:
    if renderer == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    (tmp_path / "images").mkdir()
    pixels = photographs["coffee"]
    for i in range(200):
        height, width = 60 + 7 * (i % 30), 80 + 11 * (i % 23)
        Image.fromarray(pixels[:height, :width]).save(tmp_path / "images" / f"{i:03d}.jpg")
    shard_imagenet(ShardConfig(source=str(tmp_path / "images"), out=str(tmp_path / "shards"), shard_samples=20))
    script = tmp_path / "measure.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "shards", renderer, str(BATCHES)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    resident = json.loads(done.stdout.splitlines()[-1])
    assert len(resident) == BATCHES // 100
    settled, end = max(resident[2:6]), max(resident[-4:])
    assert end <= settled + 10, resident
