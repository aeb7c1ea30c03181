"""Whether Triton's kernels can run here, and what to do where they cannot."""

import os
from importlib.util import find_spec

import torch

from crisp.errors import CrispError

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads it once as well: when a kernel is defined"""


def require_triton(wanted: str, device: torch.device) -> None:
    """Refuse what asks for a kernel that cannot run on tensors of this device.

    Args:
        wanted: what the user set, for the message.
        device: of the tensors.

    Raises:
        CrispError: Triton is not installed, or the tensors are elsewhere than on CUDA and it does not interpret.
    """
    if not HAS_TRITON:
        raise CrispError(f"{wanted}: Triton is not installed; install it, or leave it out")
    if device.type != "cuda" and not INTERPRETED:
        raise CrispError(
            f"{wanted}: tensors are on {device}; move them to CUDA, leave it out, or set TRITON_INTERPRET=1 before "
            f"starting Python"
        )
