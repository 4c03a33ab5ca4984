"""What tables and plots call the arms. Arms of one label are one method at different batch sizes."""

from collections.abc import Iterator, Mapping
from itertools import combinations

from amclr_scale.study.planning.arms import CONTROLS
from amclr_scale.study.planning.plan import SWEPT, ArmPlan, StudyPlan


def labels_of(plan: StudyPlan) -> dict[str, str]:
    """The label of every arm whose kind is known: its own; else its kind's; else, where another has that, its name."""
    known = [arm for arm in plan.arms if (arm.like or arm.name) in CONTROLS]
    labels = {arm.name: arm.label or CONTROLS[arm.like or arm.name].label for arm in known}
    own: dict[str, str] = {}
    for first, second, _ in clashes(plan, labels):
        own |= {arm.name: arm.name for arm in (first, second) if arm.label is None and arm.like not in (None, arm.name)}
    return labels | own


def clashes(plan: StudyPlan, labels: Mapping[str, str]) -> Iterator[tuple[ArmPlan, ArmPlan, list[int]]]:
    """Pairs of arms that a table could not tell apart, with the batch sizes that both have."""
    for first, second in combinations([arm for arm in plan.arms if arm.name in labels], 2):
        one, other = ({key: arm.axes[key] for key in arm.axes if key != SWEPT} for arm in (first, second))
        alike = one.keys() == other.keys() and all(any(value in other[key] for value in one[key]) for key in one)
        batches = sorted(set(first.batch_sizes or plan.batch_sizes) & set(second.batch_sizes or plan.batch_sizes))
        if labels[first.name] == labels[second.name] and alike and batches:
            yield first, second, batches
