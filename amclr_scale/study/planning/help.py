"""Every key of a plan with its type, default and meaning, and the known arms, for `--help`. Imports no torch."""

from amclr_scale.config.help import section
from amclr_scale.study.planning.arms import ABSENT, CONTROLS
from amclr_scale.study.planning.plan import ArmPlan, Metric, StudyPlan


def describe() -> str:
    """One paragraph each."""
    lines = ["keys of a plan (give them in the file or as words):", *section(StudyPlan, "")]
    lines += ["keys of an arm:", *section(ArmPlan, "arms[].")]
    lines += ["keys of an outcome:", *section(Metric, "metrics[].")]
    lines.append("known arms:")
    for name, control in CONTROLS.items():
        lines += [f"  {name}: {control.tells}", f"      {' '.join(control.words)}"]
    lines += [f"  no arm by itself: {name}: {why}" for name, why in ABSENT.items()]
    return "\n".join(lines)
