"""The constants of ImageNet's two protocols: DINO's and iBOT's weighted k-NN, iBOT's linear probes, CRISP's own."""

from crisp.evals.features import Tokens

RESIZE_PX = 256
"""Shorter side of a validation image, and of every image for k-NN"""
CROP_PX = 224
"""Side of what the backbone sees"""

# ------------------------------------------------------------------------------------------------------------- k-NN

KNN_K = (10, 20, 100, 200)
KNN_TEMPERATURE = 0.07
"""A neighbour votes with exp(cos / this)"""
KNN_TOKENS: Tokens = "cls"

# ----------------------------------------------------------------------------------------------------------- linear

GRID_LRS = tuple(float(f"{digit}e{power}") for power in range(-4, 1) for digit in range(1, 10))
"""Base learning rates of iBOT's heads: {1..9} × 10^{−4..0}"""
GRID_EPOCHS = 100
"""iBOT's default"""
CRISP_LRS = (1e-3,)
CRISP_EPOCHS = 200
GLOBAL_BATCH = 1024
"""CRISP: 256 per GPU on 4; iBOT: 128 per GPU on 8"""
LR_BATCH = 256
"""The base rate is for this batch: it is multiplied by batch / LR_BATCH"""
MOMENTUM = 0.9
WEIGHT_DECAY = 0.0
INIT_STD = 0.01
"""Of the weights; biases start at 0"""
CROP_SCALE = (0.08, 1.0)
"""Area of the random crop, as a share of the image"""
CROP_ASPECT = (3 / 4, 4 / 3)
FLIP_PROBABILITY = 0.5
SMALL_WIDTH = 384
"""Backbones up to this width (ViT-S) give their last 4 [CLS], wider ones the last [CLS] and the mean patch"""


def linear_tokens(width: int, *, has_cls: bool) -> Tokens:
    """iBOT's feature for a backbone of this width; the mean patch alone where there is no [CLS] token."""
    if not has_cls:
        return "mean"
    return "cls-last-4" if width <= SMALL_WIDTH else "cls-mean"
