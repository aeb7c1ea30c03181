"""What an evaluation or a picture sees of a trained model, whoever trained it: images in, tokens out of its blocks.

`crisp.models.published` has one small loader per system; each builds a `FrozenBackbone`. Axes: B images, n patches, D
width, h heads.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from crisp.errors import CrispError


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTokens:
    """What one block puts out for B images, through the model's final norm."""

    cls: Tensor | None
    """[B, D]; None where the model has no such token"""
    patches: Tensor
    """[B, n, D], row by row"""


class FrozenBackbone(nn.Module, abc.ABC):
    """A trained Vision Transformer in evaluation mode and without gradients.

    Attributes:
        dim: D.
        depth: number of blocks.
        patch_px: side of a patch.
        native_px: side of the square images that its position embeddings are made for.
        mean, std: of the normalisation that it was trained with, per channel, of pixels in [0, 1].
        facts: what the tokens depend on beside the tensors and the attributes above (heads, how positions are resized).
    """

    dim: int
    depth: int
    patch_px: int
    native_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    facts: Mapping[str, str | int | float] = MappingProxyType({})

    @abc.abstractmethod
    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        """Tokens of the last blocks, each through the final norm, the last block's at the end of the list.

        Args:
            images: [B, 3, H, W] normalised, sides divisible by `patch_px`; position embeddings are resized.
            last: how many blocks, from 1 to `depth`.
        """

    def cls_attention(self, images: Tensor) -> Tensor:
        """Attention [B, h, n] of the CLS token to the patches in the last block, as it is inside the softmax's output.

        The columns of CLS itself and of registers are left out, so that rows sum to less than 1.

        Raises:
            CrispError: the model has no CLS token.
        """
        raise CrispError(
            "this model has no CLS token, so no attention of it can be shown; take one that has, such as DINO"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenModel:
    """A backbone and what identifies it."""

    backbone: FrozenBackbone
    name: str
    """For tables and file names: `DINO ViT-S/16`, `CRISP vits16 step 100000`"""
    source: str
    """What the user gave"""
    fingerprint: str
    """Hex digest of all that the features depend on (tensors and architecture): the key of caches"""
    account: str
    """What became of the file's keys, in one or more lines for the log: loaded, interpolated, ignored and why"""
