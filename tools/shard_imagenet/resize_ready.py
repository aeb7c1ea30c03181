"""Importing this loads the compiled resize, or compiles it once per machine: for the process workers are forked from.

Otherwise each worker would take a second for it.
"""

import numpy as np

from crisp.shard_imagenet.reencode import resize_pixels

resize_pixels(np.zeros((8, 8, 3), np.uint8), 4, 4)
