"""What the softmax of a timm attention gives, caught while the model runs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def caught_attention(attention: Any, run: Callable[[], Any]) -> Tensor:
    """Attention [B, h, N, N] of all tokens to all, prefix tokens first, of one block.

    timm applies `attn_drop` to the softmax's output where the attention is not fused; in evaluation it changes nothing.
    All rows are computed although one is wanted: for one block that is cheap up to some thousand tokens.

    Args:
        attention: the `attn` of a block.
        run: something that runs the model once.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        caught.append(output)

    fused, attention.fused_attn = attention.fused_attn, False
    handle = attention.attn_drop.register_forward_hook(catch)
    try:
        run()
    finally:
        handle.remove()
        attention.fused_attn = fused
    (weights,) = caught
    return weights
