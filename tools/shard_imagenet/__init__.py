"""Images to WebDataset shards, an index and a manifest (`crisp shard SOURCE OUT`); nothing here imports torch.

config.py    the choices
sources.py   which files there are, and their labels
examine.py   one file: read it, decode it, take it or say why not
writer.py    one shard: the tar and DALI's index of it
shard.py     shard_imagenet: all of them in order, then index, rejections and manifest
command.py   the same with progress and a closing table
"""

from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.shard import shard_imagenet

__all__ = ["ShardConfig", "shard_imagenet"]
