"""Scores by group, and differences between groups: what the tables and figures of a report are made from.

Differences are paired over the seeds that both groups have. Every estimate comes over seeds (this test set, the
learning rates that were chosen), and over seeds and test items together (`decisions.with_items`), where items were
kept. Verdicts are about methods, not about one of their learning rates: they also let the rate vary (`Both.claim`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from amclr_scale.errors import UserError
from amclr_scale.study.analysis.groups import Group, Tuned
from amclr_scale.study.analysis.results import Metric
from amclr_scale.study.planning.amounts import MOST_OF_EFFECT
from amclr_scale.study.statistics.decisions import (
    Component,
    Decision,
    Estimate,
    decide,
    estimate,
    with_further,
    with_items,
)
from amclr_scale.study.statistics.equivalent_batch import EquivalentBatch, equivalent_batch
from amclr_scale.study.statistics.resampling import item_draws, over_seeds, spread
from amclr_scale.study.statistics.selection import Selection

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Both:
    """An estimate over seeds, and over seeds and items.

    Attributes:
        items: None where items were not kept, or a learning rate was chosen on them.
        regrets: how much better each group may be at another learning rate, by tuning.
        narrow: how many times as wide the interval over seeds would have to be; 1 unless rates were chosen on them.
    """

    seeds: Estimate
    items: Estimate | None
    regrets: tuple[Component, ...] = ()
    narrow: float = 1.0

    @property
    def claim(self) -> Estimate:
        """What a verdict is decided on: it lets the learning rates vary, too."""
        return self._claim(self.seeds)

    @property
    def claim_with_items(self) -> Estimate | None:
        return None if self.items is None else self._claim(self.items)

    def _claim(self, one: Estimate) -> Estimate:
        return with_further(replace(one, standard_error=one.standard_error * self.narrow), *self.regrets)


class Outcome:
    """One metric over all groups.

    Args:
        resamples: of the test items; 0: estimates over seeds alone.

    Attributes:
        scores: of each group by seed.
        clusters: clusters of test items; 0 where items were not kept.

    Raises:
        UserError: runs were measured on different items.
    """

    def __init__(self, metric: Metric, groups: Sequence[Group], *, resamples: int = 10_000):
        self.metric, self.groups = metric, list(groups)
        self._chosen = {group: group.chosen(metric) for group in groups}
        self._tuned = {group: group.tuned(metric) for group in groups}
        self.scores = {
            group: {seed: metric.score(run.results) for seed, run in runs.items()}
            for group, (runs, _) in self._chosen.items()
        }
        runs = [run for found, _ in self._chosen.values() for run in found.values()]
        numbers = [metric.number(run.items) for run in runs] if resamples else []
        known = [number for number in numbers if number is not None]
        self.clusters, self._draws = 0, {}
        if runs and len(known) == len(runs):
            try:
                draws = item_draws(known, resamples=resamples)
            except ValueError as error:
                raise UserError(f"{metric.name}: {error}") from error
            self.clusters = len(known[0].parts[0].sums)
            self._draws = {id(run): draws[:, k] for k, run in enumerate(runs)}

    @cached_property
    def guessing(self) -> float | None:
        """What guessing scores, where the metric knows."""
        runs = [run for found, _ in self._chosen.values() for run in found.values()]
        chance = [value for run in runs if (value := self.metric.chance(run.results)) is not None]
        return sum(chance) / len(chance) if chance else None

    def share_of_effect(self, group: Group, margin: float) -> float | None:
        """A margin over what a group scores above guessing; None where that is not known."""
        if self.guessing is None or not self.scores[group]:
            return None
        effect = float(np.mean(list(self.scores[group].values()))) - self.guessing
        return margin / effect if effect > 0 else math.inf

    def selection(self, group: Group) -> Selection | None:
        return self._chosen[group][1]

    def tuned(self, group: Group) -> Tuned | None:
        return self._tuned[group]

    def regret(self, group: Group) -> Component:
        """How much better a group may be at another learning rate."""
        tuned = self._tuned[group]
        return tuned.regret if tuned else Component(math.inf if group.criterion else 0.0)

    def chose_on_items(self, group: Group) -> bool:
        """Whether its learning rate was chosen on this metric's items, so that nothing is known about new ones."""
        tuned = self._tuned[group]
        return group.swept or (tuned is not None and tuned.same_items)

    def seeds(self, *groups: Group) -> list[int]:
        """Seeds that all of the groups have."""
        return sorted(set.intersection(*(set(self.scores[group]) for group in groups)))

    def values(self, group: Group, seeds: Sequence[int]) -> Array:
        return np.array([self.scores[group][seed] for seed in seeds])

    def draws(self, group: Group, seeds: Sequence[int]) -> Array | None:
        """The mean over seeds in every resample of the items, (R,)."""
        if not self._draws or self.chose_on_items(group):
            return None
        runs = self._chosen[group][0]
        return over_seeds(np.stack([self._draws[id(runs[seed])] for seed in seeds], 1))

    def mean(self, group: Group) -> Both | None:
        """None where no seed has a score."""
        return self.contrast([(1.0, group)])

    def difference(self, group: Group, base: Group) -> Both | None:
        """Group minus base, paired by seed; None where they share none."""
        return self.contrast([(1.0, group), (-1.0, base)])

    def contrast(self, terms: Sequence[tuple[float, Group]]) -> Both | None:
        """A weighted sum of groups' scores, seed by seed; None where they share no seed."""
        seeds = self.seeds(*(group for _, group in terms))
        if not seeds:
            return None
        values = np.sum([weight * self.values(group, seeds) for weight, group in terms], axis=0)
        draws = [self.draws(group, seeds) for _, group in terms]
        known = [weight * one for (weight, _), one in zip(terms, draws, strict=True) if one is not None]
        over, items = estimate(list(values)), None
        if len(known) == len(terms):
            items = with_items(over, spread(np.sum(known, axis=0)).standard_error, self.clusters)
        regrets = tuple(self.regret(group).times(weight) for weight, group in terms)
        return Both(over, items, regrets, _narrow([group for _, group in terms]))

    def equivalent_batch(self, group: Group, curve: Sequence[Group]) -> EquivalentBatch | None:
        """Where on the curve of a reference arm a group's score lies; None with fewer than two common batch sizes."""
        ordered = sorted(curve, key=lambda one: one.global_batch_size)
        seeds = self.seeds(group, *ordered) if ordered else []
        if len(ordered) < 2 or not seeds:
            return None
        draws = [self.draws(one, seeds) for one in ordered]
        known = [one for one in draws if one is not None]
        return equivalent_batch(
            [one.global_batch_size for one in ordered],
            np.stack([self.values(one, seeds) for one in ordered]),
            self.values(group, seeds),
            reference_draws=np.stack(known, 1) if len(known) == len(ordered) else None,
            arm_draws=self.draws(group, seeds),
            clusters=self.clusters,
            reference_regrets=[self.regret(one) for one in ordered],
            arm_regret=self.regret(group),
            narrow=_narrow([group, *ordered]),
        )


def _narrow(groups: Sequence[Group]) -> float:
    return max([1.0, *(found.factor for group in groups if (found := group.narrowness))])


@dataclass(frozen=True)
class Comparison:
    """One group against another, decided within its family."""

    group: Group
    base: Group
    difference: Both
    decision: Decision
    with_items: Decision | None

    @property
    def pair(self) -> str:
        """Both, where the base is not the same for all."""
        return f"{self.group.name}, against {self.base.title}"


def compare(outcome: Outcome, pairs: Sequence[tuple[Group, Group]], margin: float) -> list[Comparison]:
    """Decide a family of comparisons, group against base.

    Nothing matches a base whose effect the margin swallows, or where a learning rate was chosen on the scored seeds.
    """
    found = [(group, base, outcome.difference(group, base)) for group, base in pairs]
    known = [(group, base, both) for group, base, both in found if both is not None]
    sign = -1 if outcome.metric.lower_is_better else 1
    may_match = [
        (outcome.share_of_effect(base, margin) or 0) <= MOST_OF_EFFECT and not group.swept and not base.swept
        for group, base, _ in known
    ]
    seeds = [replace(both.claim, value=sign * both.claim.value) for *_, both in known]
    items = [replace(one, value=sign * one.value) for *_, both in known if (one := both.claim_with_items) is not None]
    decided = decide(seeds, margin, may_match=may_match)
    wide: Sequence[Decision | None] = [None] * len(known)
    if len(items) == len(known):
        wide = decide(items, margin, may_match=may_match)
    return [Comparison(*one, decision, also) for one, decision, also in zip(known, decided, wide, strict=True)]
