"""Reading published weights, which are somebody else's files: nothing in them is ever executed.

`.safetensors` through safetensors, `timm:NAME` through timm's own download, everything else as what torch.save wrote,
with weights_only. Whole runs of iBOT and DINO hold their command line as an `argparse.Namespace`; of all classes that
weights_only would refuse, that one (a bag of values) is let through.
"""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch

from crisp.errors import CrispError

TIMM_PREFIX = "timm:"


def read_weights(source: str) -> dict[str, Any]:
    """The content of a weights file, on the CPU: tensors by name, in whatever wrapping the file has.

    Args:
        source: a path (`.safetensors`, or what torch.save wrote), or `timm:NAME`, a pretrained model of timm.

    Raises:
        CrispError: it is missing, damaged, no weights file, or a pickle of something other than tensors and values.
    """
    if source.startswith(TIMM_PREFIX):
        return _read_timm(source.removeprefix(TIMM_PREFIX))
    path = Path(source)
    if not path.is_file():
        hint = "download it and give its path" if "://" in source else "give the path of a file, or timm:NAME"
        raise CrispError(f"{source}: no such file; {hint}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CrispError(f"{path}: holds a {type(content).__name__}, not tensors by name; save a state_dict")
    return content


def _read_torch(path: Path) -> Any:
    # Mapped files are read once, while they are copied; torch's format from before 2020 cannot be mapped.
    mmap = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise CrispError(
                f"{path}: pickles a {refused[1]}, which could run code and is not loaded; if you trust its origin, "
                f"load it there and save its state_dict alone, with torch.save or safetensors.torch.save_file"
            ) from error
        raise CrispError(
            f"{path}: not readable as weights (truncated, or not written by torch.save); download it again"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise CrispError(f"{path}: not a whole safetensors file ({error}); download it again") from error


def _read_timm(name: str) -> dict[str, Any]:
    if not timm.is_model_pretrained(name):
        raise CrispError(f"{TIMM_PREFIX}{name}: timm has no such pretrained model; see timm.list_pretrained('vit_*')")
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:  # hub errors are OSErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CrispError(
            f"{TIMM_PREFIX}{name}: cannot be downloaded ({reason}); check the network, or give the path of a file"
        ) from error
    return dict(model.state_dict())
