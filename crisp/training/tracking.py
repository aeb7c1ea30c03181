"""Weights & Biases beside TensorBoard, where the config names a project. The only file that knows the package."""

import json
import secrets
from pathlib import Path
from typing import Any

from crisp.config import TrainConfig, to_json
from crisp.errors import CrispError

ID_FILE = "wandb.json"


def check_wandb(config: TrainConfig) -> None:
    """Refuse a run whose tracker is missing before it begins.

    Raises:
        CrispError: a project is named and the package is not installed.
    """
    if config.wandb.project is not None:
        _package(config.wandb.project)


class WandbSink:
    """A run there, which a resumed run continues: its id is kept in RUN/wandb.json.

    After a kill, the steps since the checkpoint are sent again; the x axis is the step, so their points coincide.

    Args:
        config: with `wandb.project` set.
        run: the folder, which exists.

    Raises:
        CrispError: the package is missing, or it refuses the run (no login, no such project).
    """

    def __init__(self, config: TrainConfig, run: Path) -> None:
        assert config.wandb.project is not None
        wandb = _package(config.wandb.project)
        path = run / ID_FILE
        known = json.loads(path.read_text())["id"] if path.exists() else None
        run_id: str = known or secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity,
                mode=config.wandb.mode,
                id=run_id,
                name=run.name,
                resume="allow",
                dir=str(run),
                config=to_json(config),
                settings=wandb.Settings(console="off"),  # the progress bar is ours
            )
        except wandb.errors.Error as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CrispError(
                f"wandb.project={config.wandb.project}: refused ({reason}); log in with 'wandb login', or choose "
                f"--wandb.mode offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if known is None:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"id": run_id}) + "\n")
            partial.replace(path)

    def write(self, values: dict[str, Any]) -> None:
        """`values` holds step and numbers."""
        self._run.log(values)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _package(project: str) -> Any:
    try:
        import wandb
        import wandb.errors
    except ModuleNotFoundError as error:
        raise CrispError(
            f"wandb.project={project}: the package wandb is not installed; pip install 'crisp-ssl[wandb]', or leave "
            f"the field out (TensorBoard events are always written)"
        ) from error
    return wandb
