"""Every number of CAPI's segmentation protocol (Darcet et al., 2025), which the paper follows, under its name."""

from typing import Literal

import numpy as np

Distance = Literal["cosine", "l2"]

# Preparation
GRID = 16
"""Patches along each side: 256 px at patch 16, 224 px at patch 14. Squares, whatever the image's shape was"""

# Choice of hyper-parameters
HELD_OUT_DIVISOR = 10
"""The first n // 10 images of a seeded permutation of train are held out"""
SEED = 0
"""Of that permutation (`numpy.random.default_rng`)"""

# k-NN
KS = (1, 3, 10, 30)
DISTANCES: tuple[Distance, ...] = ("cosine", "l2")
QUERY_CHUNK = 1024
KEY_CHUNK = 262_144

# Linear: L2-regularised multinomial logistic regression
CS = tuple((10.0 ** np.linspace(-6, 5, 8)).tolist())
MAX_ITER = 1000
TOL = 1e-12
HISTORY = 5
LINE_SEARCH = 50

# Data sets
ADE20K_CLASSES = 150
ADE20K_IGNORED = (0, 255)
ADE20K_DTYPE = "bf16"
"""Of its k-NN search, as CAPI's configuration has it; fp32 everywhere else"""
ADE20K_TRAIN, ADE20K_VAL = 20_210, 2_000

VOC_CLASSES = 21
"""Background, label 0, is one of them"""
VOC_IGNORED = (255,)
VOC_TRAIN, VOC_VAL = 1_464, 1_449
VOC_TRAINAUG = 10_582

CITYSCAPES_CLASSES = 19
CITYSCAPES_IGNORED = (255,)
CITYSCAPES_TRAIN, CITYSCAPES_VAL = 2_975, 500


def image_px(patch_px: int) -> int:
    """Side of the square that a model of this patch size sees."""
    return GRID * patch_px


def held_out_split(images: int, *, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Images to fit on, indices [n - n // 10] int64, and images held out, [n // 10]; both sorted.

    A function of the number of images and the seed alone; files are sorted by name, so that it is the same everywhere.
    """
    order = np.random.default_rng(seed).permutation(images)
    held_out = images // HELD_OUT_DIVISOR
    return np.sort(order[held_out:]), np.sort(order[:held_out])
