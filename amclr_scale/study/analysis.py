"""A study's metrics, each with its decided families of comparisons: what every chapter of the report begins from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from amclr_scale.study.comparison import Comparison, Group, Outcome, baseline_of, compare, reference_of
from amclr_scale.study.results import Metric, Study
from amclr_scale.study.units import Unit, unit_of


@dataclass(frozen=True)
class Analysed:
    """One metric with its decided families."""

    outcome: Outcome
    unit: Unit
    slug: str
    reference: Group | None
    against_reference: list[Comparison]
    same_batch: list[Comparison]


def slug_of(metric: Metric) -> str:
    """A metric's name in file names."""
    return re.sub(r"[^A-Za-z0-9]+", "_", metric.name).strip("_")


def analyse(study: Study, groups: Sequence[Group]) -> list[Analysed]:
    """Every metric of the plan: all groups against the reference, and against the reference's arm at the same batch."""
    reference = reference_of(study, groups)
    arm = reference.arm if reference else study.reference.get("arm", "clip")
    same = [(g, base) for g in groups if g.arm != arm and (base := baseline_of(study, groups, g))]
    far = [(g, reference) for g in groups if reference is not None and g is not reference]
    found = []
    for metric in study.metrics:
        outcome = Outcome(metric, groups)
        found.append(
            Analysed(
                outcome, unit_of(metric, study.runs), slug_of(metric), reference,
                compare(outcome, far, study.margin), compare(outcome, same, study.margin),
            )
        )  # fmt: skip
    return found
