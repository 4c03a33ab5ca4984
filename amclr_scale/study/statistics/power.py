"""How many seeds a decision needs, and what a number of seeds can find: exact for normal differences.

With sigma the standard deviation of the differences over n paired seeds, f degrees of freedom, e = sigma / sqrt(n) and
r = sqrt(chi^2_f / f) the estimated over the true deviation, the probability that a test rejects is an integral over r:

    difference            E[Phi(d - t r) + Phi(-d - t r)], d = |true difference| / e, t the two-sided critical value
                          (the noncentral t, whose implementation in scipy is nan here and there)
    equivalence (TOST)    E[Phi((margin - difference) / e - t r) - Phi(t r - (margin + difference) / e)]+, t one-sided
                          (Owen's Q)

Without pairs n counts the seeds of each arm, and e = sigma sqrt(2 / n). Everything is float64.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from amclr_scale.study.statistics.decisions import above_zero

Array = NDArray[np.float64]
MOST_SEEDS = 100_000
_nodes, _weights = np.polynomial.legendre.leggauss(200)
NODES, WEIGHTS = (_nodes + 1) / 2, _weights / 2  # of an integral over a probability, 0 to 1


def power_of_difference(sigma: float, delta: float, n: int, *, alpha: float = 0.05, paired: bool = True) -> float:
    """Probability that the two-sided t test finds a true difference of delta.

    Args:
        sigma: standard deviation of the differences (paired), or of one arm (not paired).
        n: seeds per arm.
    """
    freedom, share = (n - 1, 1) if paired else (2 * n - 2, 2)
    shift = abs(delta) / (sigma * math.sqrt(share / n))
    critical = float(special.stdtrit(freedom, 1 - alpha / 2)) * _ratios(freedom, NODES)
    return float(WEIGHTS @ (special.ndtr(shift - critical) + special.ndtr(-shift - critical)))


def _ratios(freedom: float, probability: Array) -> Array:
    """Quantiles of the estimated over the true deviation, sqrt(chi^2_f / f)."""
    return np.asarray(np.sqrt(special.gammaincinv(freedom / 2, probability) * 2 / freedom))


def power_of_equivalence(
    sigma: float, margin: float, n: int, *, difference: float = 0.0, alpha: float = 0.05, paired: bool = True
) -> float:
    """Probability that TOST shows equivalence when the true difference is `difference`."""
    freedom, share = (n - 1, 1) if paired else (2 * n - 2, 2)
    error = sigma * math.sqrt(share / n)
    critical = float(special.stdtrit(freedom, 1 - alpha))
    largest = margin / error / critical  # r beyond which the tests cannot both reject
    reach = float(special.gammainc(freedom / 2, freedom / 2 * largest**2))
    r = _ratios(freedom, reach * NODES)
    high = special.ndtr((margin - difference) / error - critical * r)
    low = special.ndtr(critical * r - (margin + difference) / error)
    return float(reach * (WEIGHTS @ np.maximum(high - low, 0)))


def detectable_difference(sigma: float, n: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true difference that a paired t test over n seeds finds with this power.

    Args:
        sigma: standard deviation of the differences, above 0.
        n: seeds, at least 2.
    """

    def lacking(shift: float) -> float:
        return power_of_difference(1.0, shift, n, alpha=alpha) - power

    high = 1.0
    while lacking(high) < 0:
        high *= 2
    return sigma * float(optimize.brentq(lacking, 0.0, high))


def seeds_needed(
    sigma: float, delta: float, *, power: float = 0.8, alpha: float = 0.05, paired: bool = True
) -> int | None:
    """Seeds per arm to find a difference of delta; the normal approximation, not paired, is 15.7 sigma^2 / delta^2.

    Args:
        sigma: standard deviation of the differences (paired), or of one arm (not paired).
        delta: the true difference, in the unit of sigma.

    Returns:
        The smallest number, at least 2; None above 100,000.

    Raises:
        ValueError: delta is not above 0, or sigma is negative.
    """
    above_zero(delta, "delta")
    return _smallest(sigma, power, lambda n: power_of_difference(sigma, delta, n, alpha=alpha, paired=paired))


def seeds_needed_for_equivalence(
    sigma: float,
    margin: float,
    *,
    difference: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
    paired: bool = True,
) -> int | None:
    """Seeds per arm to show equivalence within `margin` when the true difference is `difference`.

    Returns:
        The smallest number, at least 2; None above 100,000, or where the true difference is not inside the margin.
    """
    if abs(difference) >= above_zero(margin, "margin"):
        return None
    asked: dict[str, Any] = {"difference": difference, "alpha": alpha, "paired": paired}
    return _smallest(sigma, power, lambda n: power_of_equivalence(sigma, margin, n, **asked))


def _smallest(sigma: float, power: float, reached: Any) -> int | None:
    """The smallest n with enough power, which grows with n: doubling, then halving."""
    if not sigma >= 0:
        raise ValueError(f"sigma: expected a standard deviation, got {sigma}")
    if sigma == 0:
        return 2
    high = 2
    while reached(high) < power:
        if high >= MOST_SEEDS:
            return None
        high = min(2 * high, MOST_SEEDS)
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if middle > 1 and reached(middle) >= power else (middle, high)
    return high
