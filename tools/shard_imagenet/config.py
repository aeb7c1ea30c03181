"""The choices of `crisp shard`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crisp.errors import CrispError


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """Write a folder of images as WebDataset shards with an index."""

    source: Positional[Annotated[Path, arg(metavar="SOURCE")]]
    """Folder of images: one folder per class (labels by sorted name), or all in one without labels."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder for the shards; it must be empty or not exist yet."""
    workers: int = 0
    """Threads that read and decode; 0: the cores this process may use. The output is the same for any number."""
    shard_bytes: int = 256 * 1024 * 1024
    """A shard is closed before it grows beyond this (a single larger image gets its own)."""
    max_pixels: int = 64_000_000
    """Images with more pixels are rejected."""
    strict: bool = False
    """Stop at the first image that cannot be taken, in place of listing it in rejected.jsonl."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise CrispError(f"workers={self.workers}: must be 0 (automatic) or more")
        if self.shard_bytes < 1:
            raise CrispError(f"shard_bytes={self.shard_bytes}: must be 1 or more")
        if self.max_pixels < 1:
            raise CrispError(f"max_pixels={self.max_pixels}: must be 1 or more")
