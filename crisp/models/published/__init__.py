"""Trained Vision Transformers of other systems, of timm and of our own runs, as `FrozenBackbone`s.

load.py      load_frozen: a source in, a `FrozenModel` out
registry.py  SYSTEMS, by the name that stands before the colon in `SYSTEM:FILE`
system.py    what a system's loader is
keys.py      every key of a file accounted for
"""

from crisp.models.published.registry import SYSTEMS
from crisp.models.published.system import Built, System

__all__ = ["SYSTEMS", "Built", "System"]
