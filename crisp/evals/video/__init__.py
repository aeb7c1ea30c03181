"""Video object segmentation by label propagation: DAVIS, YouTube-VOS, MOSE, and any folder of frames and masks."""
