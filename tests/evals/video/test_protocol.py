"""Every constant of the protocol, by name."""

from crisp.evals.video import protocol

EXPECTED = {
    "SHORT_SIDE_PX": 480,
    "LONG_SIDE_MULTIPLE_PX": 64,
    "SQUARE_PX": 480,
    "DINO_MEAN": (0.485, 0.456, 0.406),
    "DINO_STD": (0.228, 0.224, 0.225),
    "LAST_BLOCKS": 4,
    "QUEUE_FRAMES": 7,
    "NEIGHBOURHOOD_PATCHES": 12,
    "TEMPERATURE": 0.1,
    "TOP_K": 5,
    "BACKGROUND_ID": 0,
    "VOID_ID": 255,
    "FRAMES_LEFT_OUT_AT_EACH_END": 1,
    "CONTOUR_TOLERANCE_OF_DIAGONAL": 0.008,
    "RECALL_ABOVE": 0.5,
    "DECAY_BINS": 4,
    "EMPTY_UNION_J": 1.0,
    "EMPTY_CONTOURS_F": 1.0,
    "ONE_EMPTY_CONTOUR_F": 0.0,
    "HOLD_OUT_ONE_IN": 10,
    "HOLD_OUT_SEED": 0,
}


def test_constants() -> None:
    assert {name: getattr(protocol, name) for name in dir(protocol) if name.isupper()} == EXPECTED
