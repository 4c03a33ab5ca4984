"""The best learning rate per cell, without rewarding luck.

The highest of several scores is too high: the winner was also lucky, the more so the more values were tried and the
closer they are. Choosing and scoring must not use the same run. So values are chosen on tuning seeds, and other seeds
are scored at the chosen value: their mean, and its t interval, are exact for that value.

A verdict is about a method, not about one of its learning rates, and tuning may have missed the best of those that
were tried. What another value might bring is seen on the tuning seeds. With y_ls the score of value l on tuning seed s,
L values, k seeds, mean m_l, and the residual variance s^2 of values and seeds on (L - 1) (k - 1) degrees of freedom,

    m*_l = m_l + s / sqrt(k) t_l        t_l: multivariate Student's t (what these seeds leave open about the true means)
    regret = max_l m*_l - m*_chosen

`allowance` turns the 95 % quantile of the regret into a standard error, which `decisions.with_further` adds to a
difference. Where one value is clearly best it is zero. In simulated studies (tools/simulate_sweeps.py) verdicts so
decided are wrong in at most 6 % where 5 % is promised, at 3 to 10 scored and 2 to 5 tuning seeds; without the
allowance, when both arms have the same best value and tuning misses it in one, in up to 19 %.

A study without tuning seeds has to choose on the seeds that it scores. `select` then scores seed s at the value whose
mean over the OTHER seeds is highest (leave one out): its own luck has no say in the choice. But such scores depend on
one another, for every choice rests on almost the same runs, and the t interval takes them to be independent.
`narrowness` says by simulation how much too narrow it is.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from amclr_scale.study.statistics.decisions import Component

Array = NDArray[np.float64]
LEVEL = 0.95
# Profiles of the true means for `narrowness`: a peak whose neighbours lie this many standard deviations of a run lower.
PEAKS = (0.0, 0.2, 0.4, 0.7, 1.0, 1.5)


def allowance(scores: Array, chosen: int, *, lower_is_better: bool = False, draws: int = 20_000) -> Component:
    """How much better than the chosen value another one may be, by the tuning seeds.

    Args:
        scores: (L, k), L values, k tuning seeds.
        chosen: index of the value that was chosen.
        draws: of the means; always the same ones.

    Returns:
        Its error is infinite with one tuning seed, which says nothing about it, and 0 with one value.
    """
    values, seeds = scores.shape
    if values == 1:
        return Component(0.0)
    freedom = (values - 1) * (seeds - 1)
    if not freedom:
        return Component(np.inf)
    scores = -scores if lower_is_better else scores
    means = scores.mean(1)
    residual = scores - means[:, None] - scores.mean(0) + scores.mean()
    error = np.sqrt((residual**2).sum() / freedom / seeds)
    rng = np.random.default_rng(0)
    scale = np.sqrt(freedom / rng.chisquare(freedom, (draws, 1)))
    drawn = means + error * scale * rng.normal(size=(draws, values))
    regret = np.quantile(drawn.max(1) - drawn[:, chosen], LEVEL)
    return Component(float(regret / special.stdtrit(freedom, (1 + LEVEL) / 2)), freedom)


@dataclass(frozen=True)
class Selection:
    """What a sweep over values chose on the seeds that are scored.

    Attributes:
        best: index of the value with the highest mean over all seeds.
        chosen: for each seed, the index chosen by the others.
        scores: for each seed, its score at `chosen`.
        naive: the mean score of `best`, biased upwards.
        at_edge: `best` is the first or last value: the sweep should be wider.
    """

    best: int
    chosen: tuple[int, ...]
    scores: tuple[float, ...]
    naive: float
    at_edge: bool


def select(scores: Array, *, lower_is_better: bool = False) -> Selection:
    """Choose among values, in ascending order of the value; with one seed, on that seed.

    Args:
        scores: (L, n), L values, n seeds.
    """
    values, n = scores.shape
    sign = -1 if lower_is_better else 1
    means = scores.mean(1)
    best = int((sign * means).argmax())
    chosen = left_out(sign * scores) if n > 1 else np.array([best])
    own = scores[chosen, np.arange(n)]
    return Selection(best, tuple(map(int, chosen)), tuple(map(float, own)), float(means[best]), is_edge(best, values))


def is_edge(best: int, values: int) -> bool:
    """Whether the best of so many ascending values is the first or the last."""
    return values > 1 and best in (0, values - 1)


def left_out(scores: Array) -> NDArray[np.intp]:
    """For each seed the value with the highest sum over the others, (..., L, n) -> (..., n)."""
    found: NDArray[np.intp] = np.argmax(scores.sum(-1, keepdims=True) - scores, -2)
    return found


@dataclass(frozen=True)
class Narrowness:
    """How a 95 % interval of a difference fares when both arms' values were chosen on the scored seeds.

    Attributes:
        coverage: the share of simulated studies in which it holds the truth, in the worst of several profiles.
        factor: how many times as wide it would have to be there.
    """

    coverage: float
    factor: float


@lru_cache(maxsize=64)
def narrowness(values: int, seeds: int, studies: int = 4000) -> Narrowness:
    """By simulation, seeded: no true difference between two arms with the same profile of true means.

    Args:
        values: L, how many were tried.
        seeds: n, at least 2.
    """
    found = []
    for step in PEAKS:
        rng = np.random.default_rng(0)
        profile = -step * np.abs(np.arange(values) - (values - 1) // 2)[:, None]
        arms = profile + rng.normal(size=(2, studies, values, seeds))
        own = np.take_along_axis(arms, left_out(arms)[..., None, :], -2)[..., 0, :]  # (2, studies, n)
        difference = own[1] - own[0]
        half = special.stdtrit(seeds - 1, (1 + LEVEL) / 2) * difference.std(1, ddof=1) / np.sqrt(seeds)
        needed = np.abs(difference.mean(1)) / half
        found.append((float(np.mean(needed <= 1)), float(np.quantile(needed, LEVEL))))
    return Narrowness(min(share for share, _ in found), max(1.0, *(factor for _, factor in found)))
