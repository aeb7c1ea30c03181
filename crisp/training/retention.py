"""Which checkpoints of a run stay."""

from collections.abc import Mapping, Sequence


def doomed(
    steps: Sequence[int], scores: Mapping[int, float], *, keep_last: int, keep_every: int, keep_best: bool
) -> list[int]:
    """The steps whose checkpoints may be deleted, oldest first.

    Args:
        steps: those that have a checkpoint, in any order.
        scores: k-NN accuracy by step, of whichever steps were measured.
        keep_last: the newest this many stay; at least 1.
        keep_every: multiples of this stay; 0 for none.
        keep_best: the one with the best score stays, the older of equals.
    """
    ordered = sorted(set(steps))
    kept = set(ordered[-keep_last:])
    if keep_every:
        kept.update(step for step in ordered if step % keep_every == 0)
    scored = [step for step in ordered if step in scores]
    if keep_best and scored:
        kept.add(max(scored, key=lambda step: (scores[step], -step)))
    return [step for step in ordered if step not in kept]
