"""Which checkpoints stay: for any steps, scores and choices."""

from hypothesis import given
from hypothesis import strategies as st

from crisp.training.retention import doomed

STEPS = st.lists(st.integers(1, 400), unique=True)
SCORES = st.dictionaries(st.integers(1, 400), st.floats(0, 1))


@given(STEPS, SCORES, st.integers(1, 5), st.integers(0, 50), st.booleans())
def test_what_is_promised_stays_and_nothing_else(
    steps: list[int], scores: dict[int, float], keep_last: int, keep_every: int, keep_best: bool
) -> None:
    gone = doomed(steps, scores, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
    kept = set(steps) - set(gone)
    assert gone == sorted(set(gone))
    assert set(gone) <= set(steps)
    newest = set(sorted(steps)[-keep_last:])
    multiples = {step for step in steps if keep_every and step % keep_every == 0}
    scored = {step for step in steps if step in scores} if keep_best else set()
    assert newest | multiples <= kept
    extra = kept - newest - multiples
    assert len(extra) <= 1
    if scored:
        best = max(scores[step] for step in scored)
        assert min(step for step in scored if scores[step] == best) in kept
    assert extra <= scored


@given(STEPS, SCORES, st.integers(1, 5), st.integers(0, 50), st.booleans())
def test_deleting_twice_deletes_nothing_more(
    steps: list[int], scores: dict[int, float], keep_last: int, keep_every: int, keep_best: bool
) -> None:
    choices = {"keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best}
    left = set(steps) - set(doomed(steps, scores, **choices))  # type: ignore[arg-type]
    assert doomed(sorted(left), scores, **choices) == []  # type: ignore[arg-type]
