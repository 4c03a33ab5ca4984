"""What tables and plots call the arms. Arms of one label are one method at different batch sizes."""

from amclr_scale.study.planning.arms import CONTROLS
from amclr_scale.study.planning.plan import StudyPlan


def labels_of(plan: StudyPlan) -> dict[str, str]:
    """The label of every arm whose kind is known: its own; else its kind's; else, where another has that, its name."""
    known = [arm for arm in plan.arms if (arm.like or arm.name) in CONTROLS]
    labels = {arm.name: arm.label or CONTROLS[arm.like or arm.name].label for arm in known}
    given = list(labels.values())
    for arm in known:
        if arm.label is None and arm.like not in (None, arm.name) and given.count(labels[arm.name]) > 1:
            labels[arm.name] = arm.name
    return labels
