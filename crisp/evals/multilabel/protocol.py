"""The constants of multi-label probes. Those under "decided here" fill what the paper leaves open."""

from crisp.evals.features import Tokens

SIDE_PX = 224
TOKENS: Tokens = "cls-mean"
"""[CLS ; mean patch]"""
LR = 1e-3
"""Not scaled by the batch"""
GLOBAL_BATCH = 1024
"""256 per GPU on 4 GPUs; the training on stored features is the same on any number"""
EPOCHS = {"voc2012": 500, "coco2014": 200, "coco2017": 200, "vg": 200}
SHOTS = (1, 2, 5)
"""Training images per class, on VOC"""

# ----------------------------------------------------------------------------------------------------- decided here

WEIGHT_DECAY = 0.01
"""AdamW's default"""
INIT_STD = 0.01
"""Of the weights; biases start at 0"""
LOW_SHOT_SEEDS = (0, 1, 2, 3, 4)
VG_CLASSES = 500
"""Visual Genome's most frequent object names"""
VG_VAL_IMAGES = 10_000
"""Of a data set of more than ten times as many; else a tenth. Visual Genome has no official split for this"""
VG_SPLIT_SEED = 0
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
