"""A study's metrics, each with its decided families of comparisons: what every chapter of the report begins from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from amclr_scale.study.analysis.comparison import Comparison, Outcome, compare
from amclr_scale.study.analysis.groups import Group, baseline_of, methods_of, reference_method, reference_of
from amclr_scale.study.analysis.results import Metric, Study
from amclr_scale.study.analysis.units import Unit, unit_of


@dataclass(frozen=True)
class Analysed:
    """One metric with its decided families."""

    outcome: Outcome
    unit: Unit
    slug: str
    reference: Group | None
    against_reference: list[Comparison]
    same_batch: list[Comparison]
    pairs: list[Comparison]

    @property
    def curve(self) -> list[Group]:
        """The reference's method at all its batch sizes."""
        of = self.reference
        if of is None:
            return []
        return [group for group in self.outcome.groups if (group.method, group.variant) == (of.method, of.variant)]


NEAR_CHANCE = 3.0  # times what guessing scores
FAR_BELOW_BEST = 0.1  # of the best score of the study
FEW_STEPS = 500


def hardly_trained(first: Analysed) -> list[tuple[Group, float]]:
    """Groups, with their scores, that a comparison can say little about: their training did not get anywhere."""
    guessing = first.outcome.guessing
    means = [(group, mean.seeds.value) for group in first.outcome.groups if (mean := first.outcome.mean(group))]
    if guessing is None or not means:
        return []
    least = max(NEAR_CHANCE * guessing, max(value for _, value in means) * FAR_BELOW_BEST)
    return [(group, value) for group, value in means if value < least]


def few_steps(study: Study) -> str:
    """Batch sizes whose cells took few optimizer steps, in words; empty: none did."""
    steps = {run.cell.global_batch_size: run.cell.steps for run in study.runs if run.cell.steps < FEW_STEPS}
    return ", ".join(f"{count:,} at B = {batch:,}" for batch, count in sorted(steps.items()))


def slug_of(metric: Metric) -> str:
    """A metric's name in file names."""
    return re.sub(r"[^A-Za-z0-9]+", "_", metric.name).strip("_")


def analyse(study: Study, groups: Sequence[Group]) -> list[Analysed]:
    """Every metric of the plan: all groups against the reference, its method at the same batch, and named pairs.

    Where the first two are the same comparisons (a study of one batch size), the second family is empty.
    """
    reference = reference_of(study, groups)
    method, methods = reference_method(study), methods_of(study.cells)
    same = [(g, base) for g in groups if g.method != method and (base := baseline_of(groups, method, g))]
    far = [(g, reference) for g in groups if reference is not None and g is not reference]
    if [(one.name, base.name) for one, base in same] == [(one.name, base.name) for one, base in far]:
        same = []
    named = dict.fromkeys(
        (one, base)
        for first, second in study.plan.get("pairs") or ()
        for one in groups
        if one.method == methods.get(first) and (base := baseline_of(groups, methods.get(second, second), one))
        if base is not one
    )
    found = []
    for metric in study.metrics:
        outcome = Outcome(metric, groups)
        found.append(
            Analysed(
                outcome, unit_of(metric, study.runs), slug_of(metric), reference,
                compare(outcome, far, study.margin), compare(outcome, same, study.margin),
                compare(outcome, list(named), study.margin),
            )
        )  # fmt: skip
    return found
