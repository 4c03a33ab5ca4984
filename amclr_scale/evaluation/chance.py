"""What guessing gives: the expectation of a score when candidates come in random order."""

import torch
from torch import Tensor

from amclr_scale.metrics.scores import Score


def guessed(score: Score, right: Tensor | None, wrong: Tensor) -> float:
    """The mean over items of what shuffled candidates score.

    Args:
        right: (n,) int64, right candidates of each item, of which the best counts; None: one.
        wrong: (n,) int64, wrong ones.
    """
    if score.within is not None:
        return float(_hit(right, wrong, score.within).mean())
    pairs = torch.stack([torch.ones_like(wrong) if right is None else right, wrong])
    kinds, counts = torch.unique(pairs, dim=1, return_counts=True)
    expected = [_expected(score, *kind) for kind in kinds.T.tolist()]
    return float((torch.tensor(expected, dtype=torch.float64) * counts).sum() / counts.sum())


def _hit(right: Tensor | None, wrong: Tensor, k: int) -> Tensor:
    """Probability that a right one comes in the first k."""
    if right is None:
        candidates = (1 + wrong).double()
        return (torch.full_like(candidates, k) / candidates).clamp(max=1)
    right, wrong = right.double(), wrong.double()
    miss = torch.ones_like(right)
    for i in range(k):  # the i-th place goes to a wrong candidate, given that all before it did
        miss = miss * ((wrong - i).clamp(min=0) / (right + wrong - i).clamp(min=1))
    return 1 - miss


def _expected(score: Score, right: int, wrong: int) -> float:
    """Of the rank of the first right one, which is at most 1 + wrong."""
    places = torch.arange(wrong + 1, dtype=torch.float64)
    all_wrong = ((wrong - places) / (right + wrong - places)).cumprod(0)  # the first 1, 2, ..., wrong + 1 places
    before = torch.cat([all_wrong.new_ones(1), all_wrong[:-1]])
    values: Tensor = score.values(torch.arange(1, wrong + 2))
    return float((values.double() * (before - all_wrong)).sum())
