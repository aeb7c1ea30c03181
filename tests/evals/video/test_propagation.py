import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crisp.evals.video.propagation import SoftMask, propagate, propagate_labels, read_out
from tests.evals.video.plain import plain_labels, plain_propagate, plain_read_out

# More columns than a neighbourhood reaches from any patch, and more than a tile both ways.
HEIGHT, WIDTH, DIM = 9, 27, 5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_objects() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[1:4, 2:14], mask[2:8, 16:26] = 1, 2
    return mask


def test_labels_equal_the_plain_twin() -> None:
    target, context, labels = (
        drawn(HEIGHT, WIDTH, DIM),
        drawn(3, HEIGHT, WIDTH, DIM, seed=1),
        drawn(3, 2, HEIGHT, WIDTH),
    )
    fast = propagate_labels(F.normalize(target, dim=-1), F.normalize(context, dim=-1), labels)
    plain = plain_labels(target, list(zip(context, labels, strict=True)))
    torch.testing.assert_close(fast, plain)


def test_ties_with_the_fifth_are_kept() -> None:
    """Features of four kinds: some hundred neighbours are equally near."""
    kinds = torch.eye(4, dtype=torch.float64)
    target, context = kinds[torch.randint(4, (HEIGHT, WIDTH))], kinds[torch.randint(4, (2, HEIGHT, WIDTH))]
    labels = torch.rand(2, 2, HEIGHT, WIDTH, dtype=torch.float64)
    plain = plain_labels(target, list(zip(context, labels, strict=True)))
    torch.testing.assert_close(propagate_labels(target, context, labels), plain)


def test_constant_features_average_the_neighbourhood() -> None:
    """Known answer: all weights tie, so that a patch gets the mean of the 25×25 around it, cut at the border."""
    height, width = 28, 31
    constant = F.one_hot(torch.zeros(height, width, dtype=torch.int64), 4).double()
    labels = torch.rand(1, 3, height, width, dtype=torch.float64)
    got = propagate_labels(constant, constant[None], labels)
    expected = F.avg_pool2d(labels[0], 25, stride=1, padding=12, count_include_pad=False)
    torch.testing.assert_close(got, expected)


def test_static_video_with_distinct_features_gives_the_first_mask_back() -> None:
    """Known answer, at patch resolution: one patch is like itself, all others weigh exp(-10) as much."""
    features = torch.eye(HEIGHT * WIDTH, dtype=torch.float64).unflatten(0, (HEIGHT, WIDTH))
    masks = list(propagate([features] * 6, {0: two_objects()}))
    for (mask,) in masks:
        np.testing.assert_array_equal(mask.values.argmax(0).numpy(), two_objects())


@pytest.mark.parametrize("frames", [1, 2, 11])
def test_sequence_equals_the_plain_twin(frames: int) -> None:
    """Over more frames than the queue holds; the first mask is larger than the patch grid, as masks are."""
    height, width = 3, 27
    features = [*drawn(frames, height, width, DIM)]
    large = np.kron(two_objects()[:height, :width], np.ones((3, 2), dtype=np.uint8)).astype(np.uint8)
    plain = plain_propagate(features, two_objects()[:height, :width], objects=2)
    fast = list(propagate(features, {0: large}))
    assert len(fast) == frames
    for (ours,), theirs in zip(fast, plain, strict=True):
        assert ours.ids == (1, 2)
        torch.testing.assert_close(ours.values, theirs)


def test_context_is_the_first_frame_and_the_last_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue starts empty; the first frame is never in it."""
    seen = []

    def noted(target: torch.Tensor, context: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append([round(float(features[0, 0, 0] / features[0, 0, 1])) for features in context])
        return labels[0]

    monkeypatch.setattr("crisp.evals.video.propagation.propagate_labels", noted)
    features = [torch.tensor([float(frame), 1.0]).expand(2, 2, 2) for frame in range(12)]
    list(propagate(features, {0: np.eye(2, dtype=np.uint8)}))
    assert seen[:3] == [[0], [0, 1], [0, 1, 2]]
    assert seen[7] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert seen[10] == [0, 4, 5, 6, 7, 8, 9, 10]


def test_later_object_is_propagated_from_its_own_first_frame() -> None:
    """Of a static video with distinct features: it stays where it was given, whatever was there before."""
    later = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    later[2:8, 3:9] = 7  # over a part of object 1
    later[1, 3] = 1  # given before: ignored here
    features = torch.eye(HEIGHT * WIDTH, dtype=torch.float64).unflatten(0, (HEIGHT, WIDTH))
    masks = list(propagate([features] * 12, {1: two_objects(), 3: later}))
    assert masks[0] == []
    assert [[mask.ids for mask in frame] for frame in masks[1:]] == [[(1, 2)]] * 2 + [[(1, 2), (7,)]] * 9
    for frame in masks[3:]:
        np.testing.assert_array_equal(frame[1].values.argmax(0).numpy(), later == 7)
    # the earlier objects make room in the frame where it is given, and remember it
    np.testing.assert_array_equal(masks[3][0].values.argmax(0).numpy(), np.where(later == 7, 0, two_objects()))
    out = read_out(masks[-1], patch_px=1, height_px=HEIGHT, width_px=WIDTH)
    np.testing.assert_array_equal(out == 7, later == 7)


def test_later_object_alone_equals_a_video_that_begins_with_it() -> None:
    features = [*drawn(9, HEIGHT, WIDTH, DIM)]
    later = np.where(two_objects() == 2, 9, 0).astype(np.uint8)
    first = np.where(two_objects() == 1, 1, 0).astype(np.uint8)
    both = list(propagate(features, {0: first, 4: later}))
    alone = list(propagate(features[4:], {0: later}))
    for (_, ours), (theirs,) in zip(both[4:], alone, strict=True):
        assert ours.ids == theirs.ids == (9,)
        assert torch.equal(ours.values, theirs.values)


def test_each_group_has_its_own_first_frame_and_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(target: torch.Tensor, context: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append([round(float(features[0, 0, 0] / features[0, 0, 1])) for features in context])
        return labels[0]

    monkeypatch.setattr("crisp.evals.video.propagation.propagate_labels", noted)
    features = [torch.tensor([float(frame), 1.0]).expand(2, 2, 2) for frame in range(12)]
    first = np.eye(2, dtype=np.uint8)
    # frame 5 gives only what was given before, so it is a frame like others
    list(propagate(features, {0: first, 2: 3 * first[::-1].copy(), 5: first}))
    # frames 1 and 2 have one group, then two take turns
    assert seen[1:4] == [[0, 1], [0, 1, 2], [2]]
    assert seen[-2:] == [[0, 4, 5, 6, 7, 8, 9, 10], [2, 4, 5, 6, 7, 8, 9, 10]]


def test_object_too_small_for_the_grid_keeps_its_channel() -> None:
    mask = np.zeros((HEIGHT * 16, WIDTH * 16), dtype=np.uint8)
    mask[40:80, 40:80] = 3
    mask[1, 1] = 9  # one pixel, which no patch's centre meets
    masks = list(propagate([*drawn(3, HEIGHT, WIDTH, DIM)], {0: mask}))
    for (soft,) in masks:
        assert soft.ids == (3, 9)
        assert float(soft.values[2].abs().max()) == 0
        ids = set(np.unique(read_out([soft], patch_px=16, height_px=144, width_px=432)).tolist())
        assert ids == {0, 3}


# Sizes at which no wanted pixel's centre falls between two source pixels, where PIL's rounding would decide.
@pytest.mark.parametrize(("height_px", "width_px"), [(32, 64), (16, 32), (24, 40)])
def test_read_out_equals_the_plain_twin(height_px: int, width_px: int) -> None:
    labels = drawn(3, 3, 5).abs()
    labels[2] *= 0.01  # a weak object: stretched by its own maximum it wins where it is strongest
    size = {"patch_px": 8, "height_px": height_px, "width_px": width_px}
    got = read_out([SoftMask(ids=(4, 200), values=labels)], **size)
    np.testing.assert_array_equal(got, np.array([0, 4, 200], dtype=np.uint8)[plain_read_out(labels, **size)])
    assert set(np.unique(got)) == {0, 4, 200}


def test_constant_channels_win_nothing() -> None:
    """Background alone is 1 everywhere: its stretched channel is 0, as the empty object's, and the first one wins."""
    labels = torch.stack([torch.ones(3, 4), torch.zeros(3, 4)])
    assert not read_out([SoftMask(ids=(1,), values=labels)], patch_px=16, height_px=50, width_px=70).any()


def test_the_stronger_of_two_claims_wins() -> None:
    """Each mask is read out by itself; a pixel that objects of both win goes to the larger stretched channel."""
    ours = torch.tensor([[0.0, 0.0, 0.4, 1.0], [1.0, 1.0, 0.6, 0.0]])[:, None]
    theirs = torch.tensor([[1.0, 0.2, 0.1, 0.0], [0.0, 0.8, 0.9, 1.0]])[:, None]
    masks = [SoftMask(ids=(1,), values=ours), SoftMask(ids=(2,), values=theirs)]
    assert read_out(masks, patch_px=1, height_px=1, width_px=4).tolist() == [[1, 1, 2, 2]]
    assert read_out([], patch_px=1, height_px=1, width_px=4).tolist() == [[0, 0, 0, 0]]
