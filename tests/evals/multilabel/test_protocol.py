"""The constants of multi-label probes, by name."""

from crisp.evals.multilabel import protocol


def test_the_papers() -> None:
    assert protocol.SIDE_PX == 224
    assert protocol.TOKENS == "cls-mean"
    assert protocol.LR == 1e-3
    assert protocol.GLOBAL_BATCH == 4 * 256
    assert protocol.EPOCHS == {"voc2012": 500, "coco2014": 200, "coco2017": 200, "vg": 200}
    assert protocol.SHOTS == (1, 2, 5)


def test_decided_here() -> None:
    assert len(protocol.LOW_SHOT_SEEDS) == len(set(protocol.LOW_SHOT_SEEDS)) == 5
    assert protocol.VG_CLASSES == 500
    assert protocol.VG_VAL_IMAGES == 10_000
    assert protocol.VG_SPLIT_SEED == 0
    assert protocol.WEIGHT_DECAY == 0.01
    assert protocol.INIT_STD == 0.01
    assert len(protocol.VOC_CLASSES) == len(set(protocol.VOC_CLASSES)) == 20
    assert list(protocol.VOC_CLASSES) == sorted(protocol.VOC_CLASSES)
