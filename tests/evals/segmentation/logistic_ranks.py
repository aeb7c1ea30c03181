"""One rank of `test_logistic.py`: a share of the rows, the models to a file.

python logistic_ranks.py RANK WORLD FOLDER
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from crisp.errors import CrispError
from crisp.evals.segmentation.logistic import LogisticModel, fit_logistic

ROWS, CLASSES, C = 90, 4, 2.0
SHARES = {"uneven": (slice(0, 60), slice(60, ROWS)), "empty": (slice(0, ROWS), slice(0, 0))}
"""Of two ranks, which may have no rows"""


def rows() -> tuple[Tensor, Tensor]:
    """All rows, by class, so that no rank has examples of every class; class 2 has none."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 1, 3]).repeat_interleave(ROWS // 3)
    features = torch.randn(ROWS, 6, generator=draw, dtype=torch.float64)
    features[:, :3] += 2 * torch.nn.functional.one_hot(targets.clamp_max(2), 3)
    return features, targets


def fit(share: slice) -> LogisticModel:
    """With these rows on this rank."""
    features, targets = rows()
    return fit_logistic(features[share], targets[share], classes=CLASSES, c=C)


def main() -> None:
    """Fit, then see that a mistake on one rank is raised on this one, too."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    models = {name: fit(shares[rank]) for name, shares in SHARES.items()}
    features, targets = rows()
    targets[-1] = CLASSES  # the second rank's
    share = SHARES["uneven"][rank]
    try:
        fit_logistic(features[share], targets[share], classes=CLASSES, c=C)
        message = ""
    except CrispError as error:
        message = str(error)
    torch.distributed.destroy_process_group()
    found = {name: (model.weight, model.bias) for name, model in models.items()}
    torch.save({**found, "message": message}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
