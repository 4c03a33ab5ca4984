"""The best learning rate per cell, without rewarding luck.

The highest of several scores is too high: the winner was also lucky, the more so the more values were tried and the
closer they are. Choosing and scoring must not use the same run. So seed s is scored at the value whose mean over the
OTHER seeds is highest (leave one out): its own luck has no say in the choice. What remains is that all seeds share the
test items, and that with one seed nothing can be left out: then the choice is the naive one, and is called biased.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Selection:
    """What a sweep over values chose.

    Attributes:
        best: index of the value with the highest mean over all seeds.
        chosen: for each seed, the index chosen by the others.
        scores: for each seed, its score at `chosen`.
        naive: the mean score of `best`, biased upwards.
        biased: whether `scores` are, too (one seed).
        at_edge: `best` is the first or last value: the sweep should be wider.
    """

    best: int
    chosen: tuple[int, ...]
    scores: tuple[float, ...]
    naive: float
    biased: bool
    at_edge: bool


def select(scores: NDArray[np.float64], *, lower_is_better: bool = False) -> Selection:
    """Choose among values, in ascending order of the value.

    Args:
        scores: (L, n), L values, n seeds.
    """
    values, n = scores.shape
    sign = -1 if lower_is_better else 1
    means = scores.mean(1)
    best = int((sign * means).argmax())
    edge = values > 1 and best in (0, values - 1)
    if n == 1:
        return Selection(best, (best,), (float(scores[best, 0]),), float(means[best]), values > 1, edge)
    without = (scores.sum(1, keepdims=True) - scores) / (n - 1)  # (L, n): mean of the other seeds
    chosen = (sign * without).argmax(0)
    own = scores[chosen, np.arange(n)]
    return Selection(best, tuple(map(int, chosen)), tuple(map(float, own)), float(means[best]), False, edge)
