"""From shards to batches: order, plan, shards, renderers, loader."""
