"""Trained Vision Transformers of other systems, of timm and of our own runs, as `FrozenBackbone`s.

load.py      load_frozen: a source in, a `FrozenModel` out
registry.py  SYSTEMS, by the name that stands before the colon in `SYSTEM:FILE`
system.py    what a system's loader is         vit_system.py  what those of plain ViTs share
keys.py      every key of a file accounted for  hf_folder.py   weights in Hugging Face's folders
vit.py       timm's ViT as the engine           positions.py   how position embeddings are resized
ours.py      our own runs                       timm_vit.py    any ViT of timm
attention.py the last block's attention         fingerprint.py what features are kept under
Each other file is a system.
"""

from crisp.models.published.load import load_frozen
from crisp.models.published.registry import SYSTEMS
from crisp.models.published.system import Built, System

__all__ = ["SYSTEMS", "Built", "System", "load_frozen"]
