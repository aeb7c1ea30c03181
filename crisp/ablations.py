"""The rows of the paper's ablations as recipes: ViT-S/16, 50 epochs at batch 256, one choice changed (section 4.4).

They want `--init.weights` with iBOT's ViT-S/16, as the paper's do. Rows that the paper does not have (warping, seeds
per image) are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from crisp.config import OptimConfig, Sharing, TrainConfig

_COST = "By the paper's 49 minutes per epoch, 41 hours on four RTX 3090, 18.5 GB each."


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """A row: what it changes."""

    table: str
    """Which comparison it belongs to: a key of `TABLES`"""
    row: str
    """Its value there"""
    change: dict[str, dict[str, Any]]
    """Fields by part of the config"""

    @property
    def name(self) -> str:
        """Of the recipe."""
        return f"ablation_{self.table}_{self.row}"

    def config(self) -> TrainConfig:
        """The run."""
        base = TrainConfig(recipe=self.name, optim=OptimConfig(epochs=50))
        parts = {part: replace(getattr(base, part), **fields) for part, fields in self.change.items()}
        return replace(base, **parts)


def _heads(mlp: Sharing, last_layer: Sharing) -> dict[str, dict[str, Any]]:
    return {"model": {"head_mlp": mlp, "head_last_layer": last_layer}}


# By table, then by row. The default of the method is a row of each.
TABLES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "layers": {str(m): {"region": {"blocks": m}} for m in (1, 2, 4, 6)},  # table 5
    "threshold": {str(b): {"region": {"threshold": b}} for b in (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.99)},  # figure 6
    "blocks": {str(n): {"region": {"concept_depth": n}} for n in (0, 1, 2, 4, 6)},  # table 6
    "heads": {  # table 7, MLP then last layer; "default" is section 4.1's, which is none of its rows
        "shared_shared": _heads("shared", "shared"),
        "shared_separate": _heads("shared", "separate"),
        "shared_cls_apart": _heads("shared", "cls_apart"),
        "separate_separate": _heads("separate", "separate"),
        "cls_apart_cls_apart": _heads("cls_apart", "cls_apart"),
        "default": {},
    },
    "norm": {"separate": {}, "shared": {"model": {"shared_norm": True}}},
    "warp": {mode: {"region": {"warp_mode": mode}} for mode in ("centre", "forward", "coverage")},
    "seeds": {str(k): {"views": {"seeds_per_image": k}} for k in (1, 2, 4, 8)}
    | {"visible": {"views": {"seed_policy": "visible"}}},
}

ABLATIONS = [
    Ablation(table=table, row=row, change=change) for table, rows in TABLES.items() for row, change in rows.items()
]


def _recipe(ablation: Ablation) -> Callable[[], TrainConfig]:
    def recipe() -> TrainConfig:
        return ablation.config()

    recipe.__name__ = ablation.name
    changes = [f"{part}.{name}={value}" for part, fields in ablation.change.items() for name, value in fields.items()]
    recipe.__doc__ = f"Ablation of {ablation.table}: {', '.join(changes) or 'the default'}.\n\n{_COST}"
    return recipe


RECIPES: dict[str, Callable[[], TrainConfig]] = {ablation.name: _recipe(ablation) for ablation in ABLATIONS}
