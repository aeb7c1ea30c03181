"""Projection heads of the three token kinds: MLP, l2-normalised bottleneck, weight-normed prototypes (iBOT's head).

The head is split where it pays: `bottlenecks` for every token that is wanted, and `prototypes`, the last layer's
effective weight, for the loss to multiply with only where it must (`crisp.ops.cross_entropy`).
Axes: D backbone width, d bottleneck width, P prototypes.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crisp.config import ModelConfig, Sharing

Kind = Literal["cls", "patch", "region"]

# Kinds that name the same owner share a module (paper, table 7).
_OWNER: dict[Sharing, dict[Kind, str]] = {
    "shared": {"cls": "all", "patch": "all", "region": "all"},
    "cls_apart": {"cls": "cls", "patch": "dense", "region": "dense"},
    "separate": {"cls": "cls", "patch": "patch", "region": "region"},
}


class LastLayer(nn.Module):
    """Weight-normed linear layer without bias: `weight_v` [P, d] gives directions, `weight_g` [P, 1] gains.

    The two stay apart as parameters, because the teacher's moving average acts on each. The gain starts at 1, and
    either learns or stays there.
    """

    def __init__(self, bottleneck: int, prototypes: int, *, learn_gain: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(bottleneck, prototypes, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=learn_gain)

    def forward(self) -> Tensor:
        """The effective weight [P, d]."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))


class ProjectionHeads(nn.Module):
    """Heads of the given kinds; those that share hold the same module under each kind's name.

    Args:
        dim: D.
        config: sizes, and what is shared.
        kinds: cls and patch, and region where it is used: a module that no loss reaches would have no gradient.
    """

    def __init__(self, dim: int, config: ModelConfig, *, kinds: Sequence[Kind]) -> None:
        super().__init__()
        hidden, bottleneck = config.head_hidden, config.head_bottleneck
        self.kinds = tuple(kinds)
        self.mlp = _one_per_owner(kinds, config.head_mlp, lambda: _mlp(dim, hidden, bottleneck))
        self.last_layer = _one_per_owner(
            kinds,
            config.head_last_layer,
            lambda: LastLayer(bottleneck, config.prototypes, learn_gain=config.learn_last_layer_gain),
        )

    def bottlenecks(self, kind: Kind, tokens: Tensor) -> Tensor:
        """[…, D] → […, d], each of length 1, at least float32."""
        return F.normalize(at_least_float32(self.mlp[kind](tokens)), dim=-1)

    def prototypes(self, kinds: Sequence[Kind] | None = None) -> dict[Kind, Tensor]:
        """Effective weight [P, d] of each kind's last layer, computed once per distinct layer; default: all kinds.

        Logits are `bottlenecks @ prototypes.T`. The layer is linear, so the mean of many tokens' logits is the
        last layer applied to the mean of their bottlenecks.
        """
        layers = {kind: self.last_layer[kind] for kind in kinds or self.kinds}
        weights = {layer: layer() for layer in layers.values()}
        return {kind: weights[layer] for kind, layer in layers.items()}


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mlp(dim: int, hidden: int, bottleneck: int) -> nn.Sequential:
    mlp = nn.Sequential(
        nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
    )
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return mlp


def _one_per_owner(kinds: Sequence[Kind], sharing: Sharing, build: Callable[[], nn.Module]) -> nn.ModuleDict:
    owned: dict[str, nn.Module] = {}
    for kind in kinds:
        owner = _OWNER[sharing][kind]
        if owner not in owned:
            owned[owner] = build()
    return nn.ModuleDict({kind: owned[_OWNER[sharing][kind]] for kind in kinds})
