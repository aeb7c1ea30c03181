"""What every system's loader is: a way to recognise a file, and one to build the backbone in it.

To add a system: a file with a `System`, one line in `crisp.models.published.registry`.
"""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

from crisp.models.frozen import FrozenBackbone


class Built(NamedTuple):
    """What a loader makes of a file."""

    backbone: FrozenBackbone
    """On the CPU, float32, in evaluation mode, without gradients; holds copies, not the file's memory"""
    arch_name: str
    """Inferred from the shapes, for tables: `ViT-S/16`"""
    account: str
    """What became of the file's keys, for the log"""


class System(abc.ABC):
    """One system's layout of weights.

    Attributes:
        name: what stands before the colon in `SYSTEM:FILE`.
        title: for tables.
    """

    name: str
    title: str

    @abc.abstractmethod
    def recognise(self, state: Mapping[str, Any]) -> bool:
        """Whether a file can only be this system's; cheap, from its keys and shapes.

        Args:
            state: the file's content as `crisp.models.weights_file.read_weights` gives it, wrapping and all.
        """

    @abc.abstractmethod
    def build(self, state: Mapping[str, Any], source: str) -> Built:
        """The backbone.

        Args:
            state: as above.
            source: the file, for messages.

        Raises:
            CrispError: a key that nobody knows, one that is missing, a shape that does not fit.
        """
