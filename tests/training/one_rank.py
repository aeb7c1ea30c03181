"""One of the ranks of `test_heartbeat.py`, without torchrun: a run of the tiny model that is long enough to disturb.

python one_rank.py SHARDS RUN (hang|go); `hang`: the loader of rank 1 blocks before the fourth step.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import crisp.trainer
from crisp.errors import CrispError
from crisp.training.meter import Meter
from tests.test_trainer import tiny


def blocking(self: Meter, batches: Iterator[Any]) -> Iterator[Any]:
    for step, batch in enumerate(batches):
        while step == 3:
            time.sleep(0.1)
        yield batch


def main() -> None:
    shards, run, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    if mode == "hang" and os.environ["RANK"] == "1":
        Meter.waiting = blocking  # type: ignore[method-assign]
    config = tiny(shards, run)
    optim = replace(config.optim, epochs=10_000)
    try:
        crisp.trainer.train(replace(config, rank_timeout_s=3.0, checkpoint_every=10**6, optim=optim))
    except CrispError as error:
        sys.exit(f"crisp train: {error}")


if __name__ == "__main__":
    main()
