"""Bootstrap of a study's scores over test items, and over items and seeds together.

One set of resamples serves every run of a metric, so that what is hard for all of them cancels from a difference:

    items             clusters of items drawn with replacement (Efron, "Bootstrap Methods: Another Look at the
                      Jackknife", Annals of Statistics, 1979), the runs as they are: says what another test set would
                      change, not what another seed would
    items and seeds   both drawn with replacement, independently of one another (Owen, "The Pigeonhole Bootstrap",
                      Annals of Applied Statistics, 2007). With n seeds its variance over seeds is (n - 1) / n of what
                      it should be, and its ends are normal ones, not Student's: at 3 seeds it covers far less than it
                      claims. Use it from about 20 seeds on; below, `statistics.with_items`.

Sums are float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from amclr_scale.evaluation.numbers import Number, cluster_counts

Array = NDArray[np.float64]


def item_draws(numbers: Sequence[Number], *, resamples: int = 10_000, seed: int = 0) -> Array:
    """Every number in every resample of the items they share, (R, K).

    Raises:
        ValueError: they were not measured on the same items.
    """
    clusters = len(numbers[0].parts[0].sums)
    weights = [part.weights for part in numbers[0].parts]
    for place, one in enumerate(numbers):
        sizes = [len(part.sums) for part in one.parts]
        if len(sizes) != len(weights) or any(
            size != clusters or not torch.equal(part.weights, same)
            for size, part, same in zip(sizes, one.parts, weights, strict=True)
        ):
            raise ValueError(
                f"numbers[{place}]: expected the items of numbers[0] ({clusters} clusters), got others ({sizes[0]}); "
                "evaluate all runs on the same splits"
            )
    sums = [torch.stack([one.parts[p].sums for one in numbers], 1) for p in range(len(weights))]  # (C, K) each
    rows = []
    for counts in cluster_counts(clusters, resamples, seed):
        parts = [(counts @ s) / (counts @ w)[:, None] for s, w in zip(sums, weights, strict=True)]
        rows.append(torch.stack(parts).mean(0))
    return np.asarray(torch.cat(rows).numpy(), dtype=np.float64)


def over_seeds(draws: Array) -> Array:
    """The mean over runs in every item resample, (R, n) -> (R,): seeds as they are."""
    return np.asarray(draws.mean(1))


def over_items_and_seeds(draws: Array, *, seed: int = 0) -> Array:
    """The mean over runs when seeds are drawn, too, (R, n) -> (R,). Give both arms' difference for a comparison."""
    resamples, n = draws.shape
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.asarray((draws * counts).sum(1) / n)


@dataclass(frozen=True)
class Spread:
    """What resampling says of one number."""

    standard_error: float
    low: float
    high: float


def spread(draws: Array, level: float = 0.95) -> Spread:
    """Standard deviation and central interval of the resamples, (R,)."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Spread(float(draws.std(ddof=1)), float(low), float(high))
