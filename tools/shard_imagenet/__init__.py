"""Images to WebDataset shards, an index and a manifest (`crisp shard SOURCE OUT`); nothing here imports torch.

From the top: what a run does, in the order in which it does it.

config.py      the choices
command.py     the command line: progress, tables, verify, merge
shard.py       shard_imagenet: list, plan, make what is missing, complete
sources/       what a source holds, for each layout           listing.py   as a table in files
plan.py        which files make up which shard
engines.py     who makes them: processes, or Ray
work.py        one shard: read, examine, write, record
reading.py     a file's bytes, out of folder, tar or Parquet  parquet_rows.py
examine.py     take it or say why not                         reencode.py  make it smaller, or upright
                                                              resize_ready.py  its code, loaded before workers are
writer.py      the tar, DALI's index of it, its rows
folder.py      begun, complete, and in between
verify.py      is all of it still there and whole             tar_walk.py  of one tar
"""

from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.shard import Sharded, shard_imagenet

__all__ = ["ShardConfig", "Sharded", "shard_imagenet"]
