"""The equivalent batch size: at which batch size does a reference arm score what another arm scores at B?

The reference's curve is its score at the batch sizes that were run, joined by straight lines in log2 B: an assumption
between two measured sizes. It need not be monotone; then several batch sizes can score the same, and all are given.

The interval is a test turned round (Fieller, "Some Problems in Interval Estimation", JRSS B, 1954): a batch size
belongs to it when the paired t test over seeds, at that point of the curve, does not find the arm different from the
reference. On a segment between B_k and B_k+1, at share w of the way, one seed's difference is

    d_s(w) = arm_s - (1 - w) reference_s(B_k) - w reference_s(B_k+1)

so every w has an exact t test, at 3 seeds as at 30, where a bootstrap would resample three numbers. Items of the test
set join as in `statistics.with_items`. The interval is the hull of what is not rejected, within the measured range;
where it reaches an end of that range, it is open there.

Outside the range nothing was measured. The number that the outermost segment, prolonged, would give is kept apart as
`extrapolated`, and text always calls it that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
POINTS = 128  # per segment of the curve
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

    def number(self) -> str:
        """The batch size in words: never a number without its mark."""
        if self.crossings:
            return " or ".join(f"{value:,.0f}" for value in self.crossings)
        where = f"none from {self.measured[0]:,.0f} to {self.measured[1]:,.0f}: scores "
        where += "higher than all" if self.above else "lower than all"
        if self.extrapolated:
            where += "; extrapolated, not measured: " + " or ".join(f"{value:,.0f}" for value in self.extrapolated)
        return where

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

    Raises:
        ValueError: fewer than two batch sizes, not ascending, or seeds that do not match.
    """
    x = np.log2(np.asarray(batches, float))
    if len(x) < 2 or (np.diff(x) <= 0).any():
        raise ValueError(f"batches: expected two or more, ascending, got {list(batches)}")
    if reference.shape != (len(x), len(arm)):
        raise ValueError(f"reference: expected {len(x)} batch sizes x {len(arm)} seeds, got {reference.shape}")
    curve, score = reference.mean(1), float(arm.mean())
    share = np.linspace(0, 1, POINTS + 1)
    weights = np.concatenate([_segment(k, len(x), share) for k in range(len(x) - 1)])  # (G, K)
    at = weights @ x  # (G,)

    inside = np.ones(len(at), bool)
    n = arm.shape[0]
    if n > 1:
        differences = arm - weights @ reference  # (G, n)
        of_seeds = differences.var(1, ddof=1) / n
        of_items = np.zeros_like(of_seeds)
        if reference_draws is not None and arm_draws is not None:
            of_items = (arm_draws[:, None] - reference_draws @ weights.T).var(0, ddof=1)
        tail = (1 + level) / 2
        squares = special.stdtrit(n - 1, tail) ** 2 * of_seeds
        squares += special.stdtrit(max(clusters - 1, 1), tail) ** 2 * of_items
        half = np.sqrt(squares)
        inside = np.abs(differences.mean(1)) <= half
    found = at[inside]
    crossings = _crossings(x, curve, score)
    above, below = score > curve.max(), score < curve.min()
    return EquivalentBatch(
        crossings=crossings,
        low=float(2 ** found[0]) if len(found) else None,
        high=float(2 ** found[-1]) if len(found) else None,
        low_open=bool(inside[0]),
        high_open=bool(inside[-1]),
        measured=(float(batches[0]), float(batches[-1])),
        above=bool(above),
        below=bool(below),
        extrapolated=_prolonged(x, curve, score) if above or below else (),
    )


def _segment(k: int, K: int, share: Array) -> Array:
    weights = np.zeros((len(share), K))
    weights[:, k], weights[:, k + 1] = 1 - share, share
    return weights


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
