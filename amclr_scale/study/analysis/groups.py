"""The groups of a study: an arm at a batch size, with the values of any further axis; members differ in the seed alone.

Where a learning rate was swept, tuning cells chose one and the group's runs are those that were scored at it. A study
without tuning seeds has runs at all rates: each seed then speaks at the rate that the other seeds chose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from amclr_scale.study.analysis.results import Axes, Cell, Metric, Run, Study
from amclr_scale.study.statistics.decisions import Component
from amclr_scale.study.statistics.selection import Narrowness, Selection, allowance, is_edge, narrowness, select

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tuned:
    """How tuning chose a learning rate, and what it leaves open in one metric.

    Attributes:
        rates: those that all tuning seeds finished, ascending.
        scores: (L, k), the metric on the tuning seeds.
        judged: (L,), the mean of what the rate was chosen by.
        chosen: index of the rate at which the group was scored.
        same_items: whether it was chosen on the items that the metric is measured on.
        regret: how much better another of the rates may be in the metric.
    """

    rates: tuple[float, ...]
    scores: Array
    judged: tuple[float, ...]
    chosen: int
    same_items: bool
    regret: Component

    @property
    def at_edge(self) -> bool:
        return is_edge(self.chosen, len(self.rates))


@dataclass(frozen=True, eq=False)
class Group:
    """Finished cells that differ in the seed alone, and in the learning rate where it was not chosen before.

    Attributes:
        kind: the known arm that this one began as (`like` in the plan), or its own name.
        method: the first arm of this one's label: arms of one label are one method, at different batch sizes.
        tuning: the cells that chose its learning rate; none where there was nothing to choose, or no tuning.
        criterion: what they chose by; None where they were not to choose.
    """

    arm: str
    kind: str
    method: str
    title: str
    global_batch_size: int
    variant: Axes
    runs: tuple[Run, ...]
    tuning: tuple[Run, ...] = ()
    criterion: Metric | None = None

    @property
    def name(self) -> str:
        return f"{self.title}, B = {self.global_batch_size:,}"

    @cached_property
    def rates(self) -> list[float]:
        """The learning rates of its runs, ascending."""
        return sorted({run.cell.rate for run in self.runs})

    @property
    def peaks(self) -> list[float]:
        """What these rates are at its batch size, by the plan's rule: the highest that its runs have trained at."""
        return sorted({run.cell.rate if run.cell.lr is None else run.cell.lr for run in self.runs})

    def at_rate(self, rate: float) -> dict[int, Run]:
        """Runs by seed."""
        return _at_rate(self.runs, rate)

    @property
    def swept(self) -> bool:
        """Whether the rate has to be chosen on the runs that are scored."""
        return len(self.rates) > 1

    @property
    def narrowness(self) -> Narrowness | None:
        """How much too narrow its intervals are; None where they are not, or where one seed has no interval."""
        seeds = min(len(self.at_rate(rate)) for rate in self.rates)
        return narrowness(len(self.rates), seeds) if self.swept and seeds > 1 else None

    def chosen(self, metric: Metric) -> tuple[dict[int, Run], Selection | None]:
        """The run that speaks for each seed, and how a rate was chosen among the runs themselves."""
        by_rate = [self.at_rate(rate) for rate in self.rates]
        if not self.swept:
            return by_rate[0], None
        seeds = sorted(set.intersection(*(set(runs) for runs in by_rate)))
        if not seeds:
            return {}, None
        scores = np.array([[metric.score(runs[seed].results) for seed in seeds] for runs in by_rate])
        selection = select(scores, lower_is_better=metric.lower_is_better)
        return {seed: by_rate[at][seed] for seed, at in zip(seeds, selection.chosen, strict=True)}, selection

    def tuned(self, metric: Metric) -> Tuned | None:
        """How tuning chose, seen in a metric; None where it was not to, or runs at the chosen rate are not there."""
        if self.criterion is None:
            return None
        seeds = {run.cell.seed for run in self.tuning}
        by_rate = {rate: _at_rate(self.tuning, rate) for rate in sorted({run.cell.rate for run in self.tuning})}
        whole = {rate: runs for rate, runs in by_rate.items() if runs.keys() == seeds}
        if self.rates[0] not in whole:
            return None
        scores, judged = (
            np.array([[one.score(run.results) for _, run in sorted(runs.items())] for runs in whole.values()])
            for one in (metric, self.criterion)
        )
        chosen = list(whole).index(self.rates[0])
        return Tuned(
            tuple(whole), scores, tuple(map(float, judged.mean(1))), chosen,
            bool(metric.splits & self.criterion.splits),
            allowance(scores, chosen, lower_is_better=metric.lower_is_better),
        )  # fmt: skip


def _at_rate(runs: Sequence[Run], rate: float) -> dict[int, Run]:
    chosen = [run for run in runs if run.cell.rate == rate]
    return {run.cell.seed: run for run in sorted(chosen, key=lambda run: run.cell.seed)}


def per_doubling(groups: Sequence[Group]) -> list[tuple[float, Group]]:
    """The terms of the least-squares slope of a score over log2 B, for `Outcome.contrast`.

    Args:
        groups: one method at two or more batch sizes.
    """
    x = np.log2([group.global_batch_size for group in groups])
    centred = x - x.mean()
    return [(float(weight), group) for weight, group in zip(centred / (centred**2).sum(), groups, strict=True)]


def groups_of(study: Study) -> list[Group]:
    """All groups with a finished cell that is scored, in the plan's order of arms, then by batch size."""
    method = methods_of(study.cells)
    order = list(dict.fromkeys((method[cell.arm], cell.variant) for cell in study.cells))
    scored, tuning = _by_group(study.runs), _by_group(study.tuning)
    tuned = {_key(cell) for cell in study.tuning_cells}
    arms = [arm for arm in study.plan.get("arms") or [] if isinstance(arm, Mapping)]
    kinds = {str(arm["name"]): str(arm.get("like") or arm["name"]) for arm in arms}
    return [
        Group(
            arm, kinds.get(arm, arm), method[arm], scored[key][0].cell.title, batch, variant, tuple(scored[key]),
            tuple(tuning.get(key, ())), study.criterion if key in tuned else None,
        )
        for key in sorted(scored, key=lambda key: (order.index((method[key[0]], key[1])), key[2]))
        for arm, variant, batch in (key,)
    ]  # fmt: skip


def methods_of(cells: Sequence[Cell]) -> dict[str, str]:
    """Of every arm the first arm of its label; itself where two of that label have cells of one kind.

    Plans are refused for such labels; folders of earlier versions may have them.
    """
    arms: dict[tuple[str, Axes, int], set[str]] = {}
    for cell in cells:
        arms.setdefault((cell.label, cell.variant, cell.global_batch_size), set()).add(cell.arm)
    apart = {label for (label, _, _), alike in arms.items() if len(alike) > 1}
    first = {cell.label: cell.arm for cell in reversed(cells)}
    return {cell.arm: cell.arm if cell.label in apart else first[cell.label] for cell in cells}


def _by_group(runs: Sequence[Run]) -> dict[tuple[str, Axes, int], list[Run]]:
    found: dict[tuple[str, Axes, int], list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run.cell), []).append(run)
    return found


def _key(cell: Cell) -> tuple[str, Axes, int]:
    return cell.arm, cell.variant, cell.global_batch_size


def called(groups: Sequence[Group], name: str) -> list[Group]:
    """The groups of the method that has an arm with that name; where there is none, of the arms that began as it."""
    methods = {group.method for group in groups if group.arm == name}
    return [group for group in groups if group.method in methods] or [group for group in groups if group.kind == name]


def find(groups: Sequence[Group], arm: str, batch: int | None = None, variant: Axes = ()) -> Group | None:
    """The group of an arm at a batch size (None: the first) that comes nearest to a variant."""
    return nearest([group for group in groups if group.arm == arm], batch, variant)


def nearest(groups: Sequence[Group], batch: int | None, variant: Axes) -> Group | None:
    """The one at a batch size (None: the first) that comes nearest to a variant.

    An axis that both have must have the same value; among those that are left, the one with the fewest other axes, and
    in a grid of batches and groups the one with the largest groups: the whole batch, where the plan has it.
    """
    wanted = dict(variant)
    fitting = [
        group
        for group in groups
        if batch in (None, group.global_batch_size)
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


def reference_method(study: Study) -> str:
    """The method of the arm that the plan names as reference, whether or not one of its cells is finished."""
    arm = str(study.reference.get("arm", "clip"))
    return methods_of(study.cells).get(arm, arm)


def baseline_of(groups: Sequence[Group], method: str, group: Group) -> Group | None:
    """What a group is compared with: a method at its batch size and, where both have an axis, its value of that."""
    return nearest([one for one in groups if one.method == method], group.global_batch_size, group.variant)
