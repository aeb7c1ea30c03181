"""A folder as Hugging Face models come: `model.safetensors`, or parts that `model.safetensors.index.json` lists."""

import json
from pathlib import Path
from typing import Any

from crisp.errors import CrispError
from crisp.models.weights_file import read_weights

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds such weights."""
    return (path / _WHOLE).is_file() or (path / _INDEX).is_file()


def read_hf_folder(path: Path) -> dict[str, Any]:
    """Tensors by name, of all parts.

    Raises:
        CrispError: a part or a tensor that the index lists is missing, or a file is damaged.
    """
    if (path / _WHOLE).is_file():
        return read_weights(str(path / _WHOLE))
    index = path / _INDEX
    try:
        parts: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(parts.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CrispError(f"{index}: not the index of a model in parts ({error}); download it again") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CrispError(f"{index}: it names {outside[0]}, a file outside its folder; download it again")
    state: dict[str, Any] = {}
    for name in names:
        state |= read_weights(str(path / name))
    lacking = parts.keys() - state.keys()
    if lacking:
        raise CrispError(f"{index}: {len(lacking)} tensors are in no part ({min(lacking)}); download the parts again")
    return state
