"""What identifies a frozen model: the key under which features are kept."""

import hashlib
import json

import torch

from crisp.models.frozen import FrozenBackbone


def fingerprint(backbone: FrozenBackbone) -> str:
    """SHA-256, in hex, of all that the features depend on.

    That is: names, dtypes, shapes and bytes of the tensors, sorted by name; the kind of backbone, its attributes and
    its facts. Where the file lay, and how it was wrapped, is no part of it.

    Args:
        backbone: on any device.
    """
    digest = hashlib.sha256()
    facts = {name: getattr(backbone, name) for name in ("dim", "depth", "patch_px", "native_px", "mean", "std")}
    facts |= {"kind": type(backbone).__name__, "facts": dict(backbone.facts)}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
