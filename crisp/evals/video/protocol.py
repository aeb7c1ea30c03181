"""The constants of the protocol: DINO's label propagation (Caron et al., 2021) and the measures of DAVIS."""

# Frames (the paper's text says both 480p and 480×480)
SHORT_SIDE_PX = 480
LONG_SIDE_MULTIPLE_PX = 64
SQUARE_PX = 480
DINO_MEAN = (0.485, 0.456, 0.406)
DINO_STD = (0.228, 0.224, 0.225)

# Features
LAST_BLOCKS = 4

# Propagation
QUEUE_FRAMES = 7
NEIGHBOURHOOD_PATCHES = 12
TEMPERATURE = 0.1
TOP_K = 5

# Masks
BACKGROUND_ID = 0
VOID_ID = 255

# Measures
FRAMES_LEFT_OUT_AT_EACH_END = 1
CONTOUR_TOLERANCE_OF_DIAGONAL = 0.008
RECALL_ABOVE = 0.5
DECAY_BINS = 4
EMPTY_UNION_J = 1.0
EMPTY_CONTOURS_F = 1.0
ONE_EMPTY_CONTOUR_F = 0.0

# Train videos that stand in for a validation split whose truth is hidden
HOLD_OUT_ONE_IN = 10
HOLD_OUT_SEED = 0
