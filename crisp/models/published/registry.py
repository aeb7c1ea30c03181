"""The systems whose weights can be loaded, in the order in which a file is offered to them."""

from crisp.models.published.system import System

_ALL: tuple[System, ...] = ()

SYSTEMS: dict[str, System] = {system.name: system for system in _ALL}
