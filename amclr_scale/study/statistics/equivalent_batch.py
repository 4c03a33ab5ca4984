"""The equivalent batch size: at which batch size does a reference arm score what another arm scores at B?

The reference's curve is its score at the batch sizes that were run, joined by straight lines in log2 B. It need not be
monotone; then several batch sizes can score the same, and all are given.

What lies between two sizes was not measured. Three neighbours show how much the curve bends there: a parabola through
them leaves the straight line by

    bend(w) = w (1 - w) h^2 / 2 * f''        f'' = 2 (slope after - slope before) / (size of both steps)

at share w of a step of h doublings. A curve may bend more sharply inside a step than over its neighbours, so every
curve from the straight line to twice that bend is allowed.

The interval is a test turned round (Fieller, "Some Problems in Interval Estimation", JRSS B, 1954): a batch size
belongs to it when the paired t test over seeds, at that point, does not find the arm above or below all curves that are
allowed there. Each end of the allowed curves is a sum of the reference's scores with known weights W, and one seed's
difference from it is

    d_s(w) = arm_s - sum_k W_k(w) reference_s(B_k)

so every w has an exact t test, at 3 seeds as at 30, where a bootstrap would resample three numbers. Items of the test
set join as in `decisions.with_items`. The interval is the hull of what is not rejected, within the measured range;
where it reaches an end of that range, it is open there. In simulated studies with sizes 4 times apart it holds the
truth in 96 % or more on straight, concave, convex, S-shaped and peaked curves; on straight lines alone, the interval of
95 % held it in 23 to 97 %. With sizes 8 times apart neighbours do not show how a curve bends, and nothing saves the
interval: `warning` says how far apart they are.

Outside the range nothing was measured. The number that the outermost segment, prolonged, would give is kept apart as
`extrapolated`, and text always calls it that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from amclr_scale.study.statistics.decisions import Component

Array = NDArray[np.float64]
POINTS = 128  # per segment of the curve
MOST_BEND = 2.0  # times the bend that neighbours show
FAR_APART = 2.0  # ratio of neighbouring batch sizes above which a number between them carries a warning
MOST_OPEN = 1.1  # ratio of the ends that the bend alone leaves open, above which they are told
FAR = 1e30  # in place of infinity, in a metric's unit
FARTHEST = 6.0  # doublings beyond the range that a line is prolonged at most


@dataclass(frozen=True)
class EquivalentBatch:
    """Where on the reference's curve an arm's score lies.

    Attributes:
        crossings: batch sizes in the measured range at which the curve has the score; several if it is not monotone.
        low, high: the interval; None where no batch size in the range is compatible with the score.
        low_open, high_open: the interval reaches that end of the range: nothing is known beyond.
        measured: smallest and largest batch size of the reference.
        above, below: the score is higher (lower) than the whole curve.
        extrapolated: where prolonged outermost segments would reach the score. Not measured.
        gap: the largest ratio of neighbouring sizes that the score lies between; 1 where it lies between none.
        bend: hull of the batch sizes at which an allowed curve has the score, were there no noise; None where there is
            none, or where two sizes say nothing about a bend.
    """

    crossings: tuple[float, ...]
    low: float | None
    high: float | None
    low_open: bool
    high_open: bool
    measured: tuple[float, float]
    above: bool
    below: bool
    extrapolated: tuple[float, ...]
    gap: float
    bend: tuple[float, float] | None

    def number(self) -> str:
        """The batch size in words: never a number without its mark."""
        if self.crossings:
            return " or ".join(f"{value:,.0f}" for value in self.crossings)
        where = f"none from {self.measured[0]:,.0f} to {self.measured[1]:,.0f}: scores "
        where += "higher than all" if self.above else "lower than all"
        if self.extrapolated:
            where += "; extrapolated, not measured: " + " or ".join(f"{value:,.0f}" for value in self.extrapolated)
        return where

    def warning(self) -> str:
        """What rests on no measurement, in words: how far apart the neighbours are, and what the bend leaves open."""
        words = [f"between sizes {self.gap:.3g} times apart"] if self.gap > FAR_APART else []
        if self.crossings and self.bend is None:
            words.append("two sizes say nothing about a bend")
        elif self.crossings and self.bend and self.bend[1] > MOST_OPEN * self.bend[0]:
            words.append(f"the curve's bend alone leaves {self.bend[0]:,.0f} to {self.bend[1]:,.0f}")
        return "; ".join(words)

    def interval(self) -> str:
        """The interval in words."""
        if self.low is None or self.high is None:
            return "no batch size in the range"
        if self.low_open and self.high_open:
            return "the whole range: not determined"
        low = f"below {self.measured[0]:,.0f}" if self.low_open else f"{self.low:,.0f}"
        high = f"above {self.measured[1]:,.0f}" if self.high_open else f"{self.high:,.0f}"
        return f"{low} to {high}"


def equivalent_batch(
    batches: Sequence[int],
    reference: Array,
    arm: Array,
    *,
    reference_draws: Array | None = None,
    arm_draws: Array | None = None,
    clusters: int = 0,
    reference_regrets: Sequence[Component] = (),
    arm_regret: Component | None = None,
    narrow: float = 1.0,
    level: float = 0.95,
) -> EquivalentBatch:
    """Find the reference's batch size with the arm's score.

    Args:
        batches: K batch sizes of the reference, ascending.
        reference: (K, n), its scores, one column per seed.
        arm: (n,), the arm's scores at its batch size, the same seeds.
        reference_draws: (R, K), the reference's means over seeds in resamples of the test items; None: this test set.
        arm_draws: (R,), the arm's mean in the same resamples.
        clusters: number of clusters of test items.
        reference_regrets, arm_regret: how much better each of the K, and the arm, may be at another learning rate.
        narrow: how many times as wide the interval over seeds has to be, where rates were chosen on these seeds.

    Raises:
        ValueError: fewer than two batch sizes, not ascending, or seeds that do not match.
    """
    x = np.log2(np.asarray(batches, float))
    if len(x) < 2 or (np.diff(x) <= 0).any():
        raise ValueError(f"batches: expected two or more, ascending, got {list(batches)}")
    if reference.shape != (len(x), len(arm)):
        raise ValueError(f"reference: expected {len(x)} batch sizes x {len(arm)} seeds, got {reference.shape}")
    curve, score = reference.mean(1), float(arm.mean())
    curves = _curves(x)  # (V, G, K)
    at = curves[0] @ x  # (G,)

    least, most = np.full(len(at), -np.inf), np.full(len(at), np.inf)  # of the difference there
    n = arm.shape[0]
    if n > 1:
        differences = arm - curves @ reference  # (V, G, n)
        of_seeds = differences.var(2, ddof=1) / n
        of_items = np.zeros_like(of_seeds)
        if reference_draws is not None and arm_draws is not None:
            of_items = np.stack([(arm_draws[:, None] - reference_draws @ one.T).var(0, ddof=1) for one in curves])
        tail = (1 + level) / 2
        squares = narrow**2 * special.stdtrit(n - 1, tail) ** 2 * of_seeds
        squares += arm_regret.half(1 - tail) ** 2 if arm_regret else 0.0
        regrets = np.array([one.half(1 - tail) for one in reference_regrets] or [0.0] * len(x))
        # A size whose weight is 0 has no part in the curve there, however little is known of its rate: 0 inf is nan.
        squares += (np.multiply(curves, regrets, where=curves != 0, out=np.zeros_like(curves)) ** 2).sum(2)
        squares += special.stdtrit(max(clusters - 1, 1), tail) ** 2 * of_items
        middle, half = differences.mean(2), np.sqrt(squares)
        least, most = (middle - half).min(0), (middle + half).max(0)
    found = _where_zero(at, least, most)
    crossings = _crossings(x, curve, score)
    above, below = score > curve.max(), score < curve.min()
    without_noise = curves @ curve  # (V, G)
    allowed = _where_zero(at, without_noise.min(0) - score, without_noise.max(0) - score)
    ends = [*crossings, *(2**place for place in allowed)]
    steps = np.diff(x)
    between = [
        float(2 ** steps[k]) for k in range(len(steps)) if min(curve[k : k + 2]) <= score <= max(curve[k : k + 2])
    ]
    return EquivalentBatch(
        crossings=crossings,
        low=float(2 ** found[0]) if found else None,
        high=float(2 ** found[-1]) if found else None,
        low_open=bool(least[0] <= 0 <= most[0]),
        high_open=bool(least[-1] <= 0 <= most[-1]),
        measured=(float(batches[0]), float(batches[-1])),
        above=bool(above),
        below=bool(below),
        extrapolated=_prolonged(x, curve, score) if above or below else (),
        gap=max(between, default=1.0),
        bend=(float(min(ends)), float(max(ends))) if len(x) > 2 and ends else None,
    )


def _where_zero(at: Array, least: Array, most: Array) -> tuple[float, ...]:
    """The first and the last place where zero lies between two curves, () where it does nowhere.

    Between two points both curves are taken as straight. Were points alone looked at, an interval would end at the last
    one inside it, too early, and one that is narrower than their distance would be none.

    Args:
        at: (G,), ascending.
        least, most: (G,), the curves at these points; infinite where nothing is known.
    """
    begin: Array = np.zeros(len(at) - 1)  # shares of each step
    end: Array = np.ones(len(at) - 1)
    for side in (np.maximum(least, -FAR), np.maximum(-most, -FAR)):  # where these are at most 0
        before, slope = side[:-1], np.diff(side)
        zero = np.divide(-before, slope, where=slope != 0, out=np.where(before <= 0, np.inf, -np.inf))
        begin = np.where(slope < 0, np.maximum(begin, zero), begin)
        end = np.where(slope < 0, end, np.minimum(end, zero))
    steps = np.flatnonzero(begin <= end)
    if not len(steps):
        return ()
    first, last = steps[0], steps[-1]
    step = np.diff(at)
    return float(at[first] + begin[first] * step[first]), float(at[last] + end[last] * step[last])


def _curves(x: Array) -> Array:
    """Weights of the reference's scores at POINTS + 1 places of every segment, (V, G, K): of the straight line, and of
    the curves with the largest bend that the neighbours on its left and on its right allow.
    """
    K, share = len(x), np.linspace(0, 1, POINTS + 1)
    bends = np.zeros((K, K))  # second derivative at each inner size
    for j in range(1, K - 1):
        before, after = x[j] - x[j - 1], x[j + 1] - x[j]
        bends[j, j - 1 : j + 2] = 2 / (before + after) * np.array([1 / before, -1 / before - 1 / after, 1 / after])
    segments = []
    for k in range(K - 1):
        line = np.zeros((POINTS + 1, K))
        line[:, k], line[:, k + 1] = 1 - share, share
        reach = MOST_BEND * share * (1 - share) * (x[k + 1] - x[k]) ** 2 / 2
        known = [j for j in (k, k + 1) if 0 < j < K - 1]  # at an end of the range, the one inner neighbour
        left, right = (known[0], known[-1]) if known else (0, 0)
        segments.append(np.stack([line, line - reach[:, None] * bends[left], line - reach[:, None] * bends[right]]))
    return np.concatenate(segments, 1)


def _crossings(x: Array, curve: Array, score: float) -> tuple[float, ...]:
    found: list[float] = []
    for k in range(len(x) - 1):
        first, last = curve[k] - score, curve[k + 1] - score
        if first == last == 0:  # the segment lies on the score: its ends stand for it
            places = [x[k], x[k + 1]]
        elif first * last <= 0:
            places = [x[k] + (x[k + 1] - x[k]) * first / (first - last)]
        else:
            continue
        found += [float(2**place) for place in places]
    return tuple(sorted({round(value, 6) for value in found}))


def _prolonged(x: Array, curve: Array, score: float) -> tuple[float, ...]:
    """Where the outermost segments would reach a score that no measured batch size has."""
    found = []
    for end, other, outwards in ((0, 1, -1), (-1, -2, 1)):
        slope = (curve[end] - curve[other]) / (x[end] - x[other])
        if slope == 0:
            continue
        place = x[end] + (score - curve[end]) / slope
        if 0 < (place - x[end]) * outwards <= FARTHEST:
            found.append(float(2**place))
    return tuple(found)
