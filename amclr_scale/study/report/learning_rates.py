"""How swept learning rates were chosen, and what that means for verdicts: sentences and a table of the report."""

from collections.abc import Sequence

from amclr_scale.study.analysis.comparison import Outcome
from amclr_scale.study.analysis.groups import Group
from amclr_scale.study.analysis.results import Study
from amclr_scale.study.analysis.units import Unit, unit_of
from amclr_scale.study.report.document import Table
from amclr_scale.study.report.tables import DASH
from amclr_scale.study.statistics.selection import is_edge

TUNED = (
    "Rates were chosen on tuning seeds, and other seeds were scored at the chosen rate: scores and their intervals are "
    "those of that rate. A verdict is about the method: its p-values also allow for what another of the rates may "
    "bring (with 95 % probability not more than the table says, by the tuning seeds)."
)
IN_VERDICTS = (
    "Intervals are those of the learning rates that tuning chose; p-values and verdicts also allow for what another of "
    "the tried rates may bring a method, so an interval without zero need not be a verdict. *Tune on more*: another "
    "rate may bring more than the margin, and more tuning seeds, not more scored ones, would say whether it does."
)
ON_SCORED = (
    "Each seed is scored at the learning rate that the other seeds chose. The score of the best rate, chosen and "
    "measured on the same runs, is biased upwards."
)


def too_narrow(groups: Sequence[Group]) -> str:
    """What choosing learning rates on the scored seeds does to intervals, with a simulated figure; empty: none were."""
    swept = [group for group in groups if group.swept]
    if not swept:
        return ""
    told = "Rate chosen on the scored seeds: "
    known = [(found, group) for group in swept if (found := group.narrowness)]
    if not known:
        return f"{told}with one seed, scores are biased upwards."
    worst, group = max(known, key=lambda one: one[0].factor)
    seeds = min(len(group.at_rate(rate)) for rate in group.rates)
    return (
        f"{told}intervals are too narrow. With {len(group.rates)} rates and {seeds} seeds one of 95 % for a difference "
        f"holds the truth in {worst.coverage:.0%} of simulated studies, and would have to be {worst.factor:.1f} times "
        "as wide. Verdicts are decided on intervals so wide, and nothing is said to match."
    )


def how_chosen(study: Study, groups: Sequence[Group]) -> str:
    """One line of the design; empty where nothing was swept."""
    if study.criterion is None:
        return too_narrow(groups)
    seeds = sorted({cell.seed for cell in study.tuning_cells})
    finished, planned = len(study.tuning), len(study.tuning_cells)
    return (
        f"chosen by `{study.criterion.name}` on tuning seeds {', '.join(map(str, seeds))}, which no verdict uses "
        f"({finished} of {planned} tuning cells finished)"
    )


def items_unknown(outcome: Outcome) -> str:
    """Why nothing is said about new test items; empty where it is."""
    if not any(outcome.chose_on_items(group) for group in outcome.groups):
        return ""
    return (
        "Rates were chosen on the very items that are measured: what suits these items best need not suit others, so "
        "nothing is said about new items."
    )


def table(study: Study, outcome: Outcome, unit: Unit) -> Table:
    """What was tried and chosen, by tuning or on the scored seeds."""
    return _tuned(study, outcome, unit) if study.criterion else _scored(outcome, unit)


def _tuned(study: Study, outcome: Outcome, unit: Unit) -> Table:
    assert study.criterion
    judged_in, rows, raw = unit_of(study.criterion, study.tuning), [], []
    for group in outcome.groups:
        found = outcome.tuned(group)
        if found is None:
            continue
        means = ", ".join(
            f"{rate:.3g}: {judged_in.score(score)}" for rate, score in zip(found.rates, found.judged, strict=True)
        )
        tried = {cell.rate for cell in study.tuning_cells if (cell.arm, cell.variant) == (group.arm, group.variant)}
        lost = sorted(tried - set(found.rates))
        notes = ["at the edge of the sweep: widen it"] if found.at_edge else []
        notes += [f"not finished at {', '.join(f'{rate:.3g}' for rate in lost)}"] if lost else []
        most = found.regret.half(0.025)
        rows.append([
            group.name, means, f"{found.rates[found.chosen]:.3g}", unit.difference(most) if most else "0",
            "; ".join(notes) or DASH,
        ])  # fmt: skip
        raw.append({
            "group": group.name, "rates": " ".join(map(str, found.rates)), "judged": " ".join(map(str, found.judged)),
            "chosen": found.rates[found.chosen], "tuning_seeds": found.scores.shape[1],
            "another_may_bring": most, "at_edge": found.at_edge, "chosen_on_these_items": found.same_items,
        })  # fmt: skip
    by = f"{study.criterion.name} on tuning seeds{', %' if judged_in.share else ''}, by rate"
    points = ", points" if unit.share else ""
    header = ["cells", by, "chosen", f"another rate may bring at most{points}", "note"]
    return Table("learning_rates", header, rows, raw, left=2, words=(4,))


def _scored(outcome: Outcome, unit: Unit) -> Table:
    rows, raw = [], []
    for group in outcome.groups:
        found = outcome.selection(group)
        if found is None:
            continue
        fair, seeds = sum(found.scores) / len(found.scores), len(found.scores)
        best, narrow = group.rates[found.best], group.narrowness
        notes = ["at the edge of the sweep: widen it"] if is_edge(found.best, len(group.rates)) else []
        notes += ["one seed: biased upwards"] if seeds == 1 else []
        rows.append([group.name, ", ".join(f"{rate:.3g}" for rate in group.rates), f"{best:.3g}",
                     unit.score(fair), unit.score(found.naive), "; ".join(notes) or DASH])  # fmt: skip
        raw.append({"group": group.name, "rates": " ".join(map(str, group.rates)), "best": best, "score": fair,
                    "naive": found.naive, "at_edge": found.at_edge, "seeds": seeds,
                    "interval_covers": narrow and narrow.coverage, "interval_needs_factor": narrow and narrow.factor,
                    })  # fmt: skip
    header = ["cells", "tried", "best", "score, chosen by the other seeds", "score of the best (biased)", "note"]
    return Table("learning_rates", header, rows, raw, left=2, words=(5,))
