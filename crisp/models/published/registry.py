"""The systems whose weights can be loaded, in the order in which a file is offered to them."""

from crisp.models.published.capi import Capi
from crisp.models.published.cribo import Cribo
from crisp.models.published.croc import Croc
from crisp.models.published.data2vec import Data2Vec, Data2VecEma
from crisp.models.published.dino import Dino
from crisp.models.published.dinov2 import Dinov2
from crisp.models.published.ibot import Ibot
from crisp.models.published.ijepa import Ijepa
from crisp.models.published.mae import Mae
from crisp.models.published.sit import Sit
from crisp.models.published.system import System
from crisp.models.published.webdino import Webdino

_ALL: tuple[System, ...] = (
    Capi(),
    Data2Vec(),
    Data2VecEma(),
    Cribo(),
    Croc(),
    Sit(),
    Ibot(),
    Ijepa(),
    Mae(),
    Webdino(),
    Dinov2(),
    Dino(),  # last: a bare ViT without a mark of its own is read as DINO's
)

SYSTEMS: dict[str, System] = {system.name: system for system in _ALL}
