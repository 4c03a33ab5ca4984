"""A measured number with what it needs to be believed: chance, standard error, a 95 % interval.

Every number here is a weighted mean of one value per item, or a sum of such means. Items that belong together (the
captions of one image) form a cluster, and clusters, not items, are what another sample of the world would exchange:

    number            m = sum_c a_c / sum_c w_c              a_c, w_c: sums over the items of cluster c
    standard error    sqrt(sum_c (a_c - m w_c)^2) / sum_c w_c        (for single items: sqrt(m (1 - m) / n))
    interval          percentiles of m under resampling of clusters with replacement (Efron, "Bootstrap Methods:
                      Another Look at the Jackknife", Annals of Statistics, 1979), seeded

A mean over groups of items (`mean_of_groups`) has no error from how many items of each group are drawn, and groups of
few clusters, whose spread is seen too small or not at all, do not narrow it.

Two models are compared on the same items with the same resamples, so that what is hard for both cancels.
Sums are float64.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 1 << 22  # resampled cluster counts alive at once


@dataclass(frozen=True)
class Part:
    """One weighted mean, by cluster."""

    sums: Tensor  # (C,) float64
    weights: Tensor  # (C,) float64

    def mean(self) -> Tensor:
        return self.sums.sum() / self.weights.sum()


@dataclass(frozen=True)
class Number:
    """A measured number: the mean of its parts, each a weighted mean over the same clusters."""

    parts: tuple[Part, ...]
    chance: float | None = None  # what guessing gives
    bounds: tuple[float, float] | None = None  # where intervals end; None: resamples do by themselves

    @property
    def value(self) -> float:
        return float(sum(part.mean() for part in self.parts)) / len(self.parts)

    @property
    def standard_error(self) -> float:
        influence = sum((p.sums - p.mean() * p.weights) / p.weights.sum() for p in self.parts)
        assert isinstance(influence, Tensor)
        return float(influence.square().sum().sqrt()) / len(self.parts)

    def resampled(self, counts: Tensor) -> Tensor:
        """The number in each resample: counts (R, C) of each cluster -> (R,)."""
        means = [(counts @ part.sums) / (counts @ part.weights) for part in self.parts]
        return torch.stack(means).mean(0)


def number(
    values: Tensor, *, clusters: Tensor | None = None, weights: Tensor | None = None, chance: float | None = None
) -> Number:
    """The (weighted) mean of one value per item.

    Args:
        values: (n,).
        clusters: (n,) int64, 0 ... C - 1; None: every item by itself.
        weights: (n,); None: all equal.
    """
    values = values.detach().cpu().double()
    weights = torch.ones_like(values) if weights is None else weights.detach().cpu().double()
    if clusters is None:
        return Number((Part(values * weights, weights),), chance)
    clusters = clusters.cpu()
    empty = torch.zeros(int(clusters.max()) + 1, dtype=torch.float64)
    sums, totals = empty.index_add(0, clusters, values * weights), empty.index_add(0, clusters, weights)
    return Number((Part(sums, totals),), chance)


def mean_of_groups(
    values: Tensor, groups: Tensor, *, kept: Tensor | None = None, clusters: Tensor | None = None,
    chance: float | None = None,
) -> Number:  # fmt: skip
    """The mean over groups of items (classes, say) of the mean of each one's items.

    It is a weighted mean, where an item weighs 1 / (items of its group). But a resample has more items of some groups
    than there are, and a mean of their values would go up with the easy ones among them, as a mean over groups does
    not. So an item has, in place of its value, that value's distance from the mean of its group, beside the number.

    Distances from the mean of m clusters are too small, by sqrt((m - 1) / m) as a rule, and are enlarged by that. A
    group of one cluster shows no spread: its distance is that from the mean of all such groups ("collapsed strata",
    Cochran, "Sampling Techniques", 1977, section 5A.12), which is rather too large. Resamples of such distances may go
    beyond the smallest and the largest value; intervals end there.

    Args:
        values: (n,).
        groups: (n,) int64; those without items do not count.
        kept: (n,) bool: items of groups that count, whole groups; None: all.
        clusters: (n,) int64, as of `number`.
    """
    values, groups = values.detach().cpu().double(), groups.cpu()
    sizes, sums = torch.bincount(groups).double(), torch.bincount(groups, weights=values)
    of_group = (sums / sizes)[groups]
    weights = 1 / sizes[groups] if kept is None else kept.cpu() / sizes[groups]
    mean = (of_group * weights).sum() / weights.sum()
    drawn = groups if clusters is None else torch.stack([groups, clusters.cpu()]).unique(dim=1)[0]
    several = torch.bincount(drawn, minlength=len(sizes)).double()[groups]  # clusters of the item's group
    lone = several == 1
    of_lone = (values * weights)[lone].sum() / weights[lone].sum().clamp(min=torch.finfo(torch.float64).tiny)
    enlarged = (values - of_group) * (several / (several - 1).clamp(min=1)).sqrt()
    distance = torch.where(lone, values - of_lone, enlarged)
    found = number(distance + mean, clusters=clusters, weights=weights, chance=chance)
    counted = values[weights > 0]
    return replace(found, bounds=(float(counted.min()), float(counted.max())))


def mean_of(*numbers: Number) -> Number:
    """The mean of several numbers over the same clusters."""
    chances = [n.chance for n in numbers if n.chance is not None]
    chance = sum(chances) / len(numbers) if len(chances) == len(numbers) else None
    ends = [n.bounds for n in numbers if n.bounds is not None]
    bounds = (min(low for low, _ in ends), max(high for _, high in ends)) if len(ends) == len(numbers) else None
    return Number(tuple(part for n in numbers for part in n.parts), chance, bounds)


def cluster_counts(clusters: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each cluster is in each resample, (r, C) at a time."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK // clusters)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = torch.randint(clusters, (size, clusters), generator=generator)
        ones = torch.ones((size, clusters), dtype=torch.float64)
        yield torch.zeros((size, clusters), dtype=torch.float64).scatter_add_(1, drawn, ones)


def intervals(
    numbers: Mapping[str, Number], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """The central `level` of every number's resamples; numbers over equally many clusters share their resamples."""
    by_size: dict[int, list[str]] = {}
    for name, one in numbers.items():
        by_size.setdefault(len(one.parts[0].sums), []).append(name)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    found: dict[str, tuple[float, float]] = {}
    for clusters, names in by_size.items():
        drawn: dict[str, list[Tensor]] = {name: [] for name in names}
        for counts in cluster_counts(clusters, resamples, seed):
            for name in names:
                drawn[name].append(numbers[name].resampled(counts))
        for name in names:
            within = torch.cat(drawn[name])
            if (ends := numbers[name].bounds) is not None:
                within = within.clamp(*ends)
            low, high = torch.quantile(within, tails).tolist()
            found[name] = (low, high)
    return {name: found[name] for name in numbers}


@dataclass(frozen=True)
class Comparison:
    """How much better the second of two models is, on the same items."""

    difference: float
    low: float
    high: float
    share_of_resamples_above_zero: float


def compare(first: Number, second: Number, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Comparison:
    """Paired comparison of one number of two models.

    Raises:
        ValueError: they were not measured on the same items.
    """
    sizes = [len(one.parts[0].sums) for one in (first, second)]
    if sizes[0] != sizes[1] or any(
        not torch.equal(a.weights, b.weights) for a, b in zip(first.parts, second.parts, strict=True)
    ):
        raise ValueError(
            f"second: a paired comparison needs the same items for both, got {sizes[0]} and {sizes[1]} clusters; "
            "evaluate both models on the same split"
        )
    draws = [second.resampled(counts) - first.resampled(counts) for counts in cluster_counts(sizes[0], resamples, seed)]
    drawn = torch.cat(draws)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(drawn, tails).tolist()
    above = float((drawn > 0).double().mean())
    return Comparison(second.value - first.value, low, high, above)
