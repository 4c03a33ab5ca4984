"""Scores by group, and differences between groups: what the tables and figures of a report are made from.

A group is an arm at a batch size, with the values of any further axis; its members differ in the seed alone. Where a
learning rate was swept, each seed is scored at the rate that the other seeds chose (`selection`).

Differences are paired over the seeds that both groups have. Every estimate comes twice: over seeds (this test set), and
over seeds and test items together (`statistics.with_items`), where items were kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from amclr_scale.errors import UserError
from amclr_scale.study.analysis.results import SWEPT, Axes, Metric, Run, Study
from amclr_scale.study.planning.amounts import MOST_OF_EFFECT
from amclr_scale.study.statistics.decisions import Decision, Estimate, decide, estimate, with_items
from amclr_scale.study.statistics.equivalent_batch import EquivalentBatch, equivalent_batch
from amclr_scale.study.statistics.resampling import item_draws, over_seeds, spread
from amclr_scale.study.statistics.selection import Selection, select

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Group:
    """Finished cells that differ in the seed (and the swept learning rate) alone.

    Attributes:
        kind: the known arm that this one began as (`like` in the plan), or its own name.
    """

    arm: str
    kind: str
    title: str
    global_batch_size: int
    variant: Axes
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return f"{self.title}, B = {self.global_batch_size:,}"

    @cached_property
    def rates(self) -> list[float]:
        """The learning rates tried, ascending."""
        return sorted({float(run.cell.axes.get(SWEPT, run.cell.lr)) for run in self.runs})

    def at_rate(self, rate: float) -> dict[int, Run]:
        """Runs by seed."""
        chosen = [run for run in self.runs if float(run.cell.axes.get(SWEPT, run.cell.lr)) == rate]
        return {run.cell.seed: run for run in sorted(chosen, key=lambda run: run.cell.seed)}

    @property
    def swept(self) -> bool:
        return len(self.rates) > 1

    def chosen(self, metric: Metric) -> tuple[dict[int, Run], Selection | None]:
        """The run that speaks for each seed, and how a swept learning rate was chosen."""
        by_rate = [self.at_rate(rate) for rate in self.rates]
        if not self.swept:
            return by_rate[0], None
        seeds = sorted(set.intersection(*(set(runs) for runs in by_rate)))
        if not seeds:
            return {}, None
        scores = np.array([[metric.score(runs[seed].results) for seed in seeds] for runs in by_rate])
        selection = select(scores, lower_is_better=metric.lower_is_better)
        return {seed: by_rate[at][seed] for seed, at in zip(seeds, selection.chosen, strict=True)}, selection


def per_doubling(groups: Sequence[Group]) -> list[tuple[float, Group]]:
    """The terms of the least-squares slope of a score over log2 B, for `Outcome.contrast`.

    Args:
        groups: one method at two or more batch sizes.
    """
    x = np.log2([group.global_batch_size for group in groups])
    centred = x - x.mean()
    return [(float(weight), group) for weight, group in zip(centred / (centred**2).sum(), groups, strict=True)]


def groups_of(study: Study) -> list[Group]:
    """All groups with a finished cell, in the plan's order of arms, then by batch size."""
    order = list(dict.fromkeys((cell.arm, cell.variant) for cell in study.cells))
    found: dict[tuple[str, Axes, int], list[Run]] = {}
    for run in study.runs:
        found.setdefault((run.cell.arm, run.cell.variant, run.cell.global_batch_size), []).append(run)
    arms = [arm for arm in study.plan.get("arms") or [] if isinstance(arm, Mapping)]
    kinds = {str(arm["name"]): str(arm.get("like") or arm["name"]) for arm in arms}
    return [
        Group(arm, kinds.get(arm, arm), found[key][0].cell.title, batch, variant, tuple(found[key]))
        for key in sorted(found, key=lambda key: (order.index(key[:2]), key[2]))
        for arm, variant, batch in (key,)
    ]


def called(groups: Sequence[Group], name: str) -> list[Group]:
    """The groups of the arm with that name; where there is none, of the arms that began as it."""
    return [group for group in groups if group.arm == name] or [group for group in groups if group.kind == name]


@dataclass(frozen=True)
class Both:
    """An estimate over seeds, and over seeds and items (None where items were not kept)."""

    seeds: Estimate
    items: Estimate | None


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

    def seeds(self, *groups: Group) -> list[int]:
        """Seeds that all of the groups have."""
        return sorted(set.intersection(*(set(self.scores[group]) for group in groups)))

    def values(self, group: Group, seeds: Sequence[int]) -> Array:
        return np.array([self.scores[group][seed] for seed in seeds])

    def draws(self, group: Group, seeds: Sequence[int]) -> Array | None:
        """The mean over seeds in every resample of the items, (R,)."""
        if not self._draws:
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
        return self._both(values, np.sum(known, axis=0) if len(known) == len(terms) else None)

    def _both(self, values: Array, draws: Array | None) -> Both:
        seeds = estimate(list(values))
        if draws is None:
            return Both(seeds, None)
        return Both(seeds, with_items(seeds, spread(draws).standard_error, self.clusters))

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
        )


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
    """Decide a family of comparisons, group against base. Nothing matches a base whose effect the margin swallows."""
    found = [(group, base, outcome.difference(group, base)) for group, base in pairs]
    known = [(group, base, both) for group, base, both in found if both is not None]
    sign = -1 if outcome.metric.lower_is_better else 1
    may_match = [(outcome.share_of_effect(base, margin) or 0) <= MOST_OF_EFFECT for _, base, _ in known]
    seeds = [replace(both.seeds, value=sign * both.seeds.value) for *_, both in known]
    items = [replace(both.items, value=sign * both.items.value) for *_, both in known if both.items is not None]
    decided = decide(seeds, margin, may_match=may_match)
    wide: Sequence[Decision | None] = [None] * len(known)
    if len(items) == len(known):
        wide = decide(items, margin, may_match=may_match)
    return [Comparison(*one, decision, also) for one, decision, also in zip(known, decided, wide, strict=True)]


def find(groups: Sequence[Group], arm: str, batch: int | None = None, variant: Axes = ()) -> Group | None:
    """The group of an arm at a batch size (None: the first) that comes nearest to a variant.

    An axis that both have must have the same value; among those that are left, the one with the fewest other axes, and
    in a grid of batches and groups the one with the largest groups: the whole batch, where the plan has it.
    """
    wanted = dict(variant)
    fitting = [
        group
        for group in groups
        if group.arm == arm
        and batch in (None, group.global_batch_size)
        and all(wanted.get(key, value) == value for key, value in group.variant)
    ]

    def strangeness(group: Group) -> tuple[int, float]:
        return sum(key not in wanted for key, _ in group.variant), -float(group.runs[0].cell.negatives or 0)

    return min(fitting, key=strangeness, default=None)


def reference_of(study: Study, groups: Sequence[Group]) -> Group | None:
    """The group that the plan names as reference; None while it has no finished cell."""
    arm, batch = study.reference.get("arm"), study.reference.get("global_batch_size")
    if arm is None:
        return None
    if batch is None:
        batch = max((cell.global_batch_size for cell in study.cells if cell.arm == arm), default=None)
    return find(groups, str(arm), batch)


def baseline_of(study: Study, groups: Sequence[Group], group: Group) -> Group | None:
    """The reference's arm at a group's batch size."""
    arm = study.reference.get("arm", "clip")
    return find(groups, str(arm), group.global_batch_size, group.variant)
