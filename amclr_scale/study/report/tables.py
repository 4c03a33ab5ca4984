"""The tables of a report: runs, scores by batch size, verdicts, equivalent batch sizes, agreement, what is missing.

Scores that are shares are shown in percent, their differences in points (hundredths); others as they are. Every number
that is shown is in the table's CSV with all its digits, in the metric's own unit.
"""

import math
from collections.abc import Sequence
from typing import Any

from scipy import special

from amclr_scale.config.objective_options import declared
from amclr_scale.study.analysis.comparability import Difference
from amclr_scale.study.analysis.comparison import Both, Comparison, Outcome
from amclr_scale.study.analysis.groups import Group, per_doubling
from amclr_scale.study.analysis.results import Missing, Run
from amclr_scale.study.analysis.units import Unit
from amclr_scale.study.report.document import Table
from amclr_scale.study.statistics.decisions import Estimate
from amclr_scale.study.statistics.power import seeds_needed_for_equivalence

DASH = "-"
TUNE_MORE = "tune on more"  # another learning rate may bring more than the margin, whatever the number of scored seeds


def raw_estimate(name: str, both: Both | None) -> dict[str, Any]:
    """An estimate's columns of a CSV."""
    if both is None:
        return {name: None}
    low, high = both.seeds.interval()
    wide_low, wide_high = both.items.interval() if both.items else (None, None)
    return {
        name: both.seeds.value, f"{name}_low": low, f"{name}_high": high, "seeds": both.seeds.n,
        f"{name}_low_with_items": wide_low, f"{name}_high_with_items": wide_high,
    }  # fmt: skip


def mean_of(runs: Sequence[Run], quantity: str) -> float | None:
    """The mean of a quantity of the runs that have it."""
    values = [value for run in runs if (value := getattr(run, quantity)) is not None]
    return sum(values) / len(values) if values else None


def flops_of(group: Group) -> float | None:
    """The plan's figure where all have one, else the towers' counted one."""
    planned = [run.cell.flops for run in group.runs]
    known = [value for value in planned if value is not None]
    return sum(known) / len(known) if len(known) == len(planned) else mean_of(group.runs, "useful_flops")


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def run_table(outcome: Outcome, unit: Unit) -> Table:
    """A row per group."""
    header = [
        "arm", "B", "seeds", f"score, {unit.name or 'value'} [95 %, seeds]", "[95 %, seeds, items]", "lr", "samples",
        "steps", "epochs", "encoder passes", "comparisons per anchor", "TFLOP", "hours", "samples/s", "peak GiB",
    ]  # fmt: skip
    rows, raw = [], []
    for group in outcome.groups:
        mean, cell = outcome.mean(group), group.runs[0].cell
        flops, hours = flops_of(group), mean_of(group.runs, "hours")
        speed, peak = mean_of(group.runs, "samples_per_second"), mean_of(group.runs, "peak_gib")
        rates = " or ".join(f"{rate:.3g}" for rate in group.peaks)
        low, high = mean.items.interval() if mean and mean.items else (math.nan, math.nan)
        rows.append([
            group.title, f"{group.global_batch_size:,}", str(mean.seeds.n if mean else 0),
            unit.estimate(mean.seeds) if mean else DASH,
            DASH if math.isnan(low) else f"[{unit.score(low)}, {unit.score(high)}]",
            rates, f"{cell.samples:,}", f"{cell.steps:,}", f"{cell.epochs:.3g}", _number(cell.encoder_cost),
            _number(cell.comparisons, 4), _number(None if flops is None else flops / 1e12), _number(hours),
            _number(speed), _number(peak),
        ])  # fmt: skip
        raw.append({
            "arm": group.arm, "title": group.title, "global_batch_size": group.global_batch_size,
            **raw_estimate("score", mean), "learning_rates": rates, "samples": cell.samples, "steps": cell.steps,
            "epochs": cell.epochs, "encoder_cost": cell.encoder_cost, "negatives": cell.negatives,
            "comparisons": cell.comparisons, "flops": flops, "hours": hours, "samples_per_second": speed,
            "peak_gib": peak,
        })  # fmt: skip
    return Table("runs", header, rows, raw)


def matrix(outcome: Outcome, unit: Unit, name: str) -> Table:
    """Methods down, batch sizes across."""
    batches = sorted({group.global_batch_size for group in outcome.groups})
    methods = dict.fromkeys((group.method, group.variant, group.title) for group in outcome.groups)
    at = {(group.method, group.variant, group.global_batch_size): group for group in outcome.groups}
    rows, raw = [], []
    for method, variant, title in methods:
        line = [title]
        for batch in batches:
            group = at.get((method, variant, batch))
            mean = outcome.mean(group) if group else None
            line.append(unit.estimate(mean.seeds) if mean else DASH)
            if group and mean:
                raw.append({"metric": outcome.metric.name, "arm": group.arm, "title": title, "global_batch_size": batch,
                            **raw_estimate("score", mean)})  # fmt: skip
        rows.append(line)
    return Table(name, ["arm", *(f"B = {batch:,}" for batch in batches)], rows, raw)


def verdict_table(compared: Sequence[Comparison], unit: Unit, margin: float, name: str, *, both: bool = False) -> Table:
    """What each comparison has shown; `both` names what it is against, too."""
    header = [
        "arm", "seeds", f"difference{', points' if unit.share else ''} [95 %, seeds]", "[95 %, seeds, items]",
        "verdict", "p equal", "p match", "p not worse", "with new items", "seeds needed",
    ]  # fmt: skip
    rows, raw = [], []
    for one in compared:
        seeds, wide, decision = one.difference.seeds, one.difference.items, one.decision
        low, high = wide.interval() if wide else (math.nan, math.nan)
        untuned = math.hypot(*(part.half(0.05) for part in one.difference.regrets)) >= margin
        needed = None if untuned else needed_seeds(seeds, margin)
        rows.append([
            one.pair if both else one.group.name, str(seeds.n), unit.change(seeds),
            DASH if math.isnan(low) else f"[{unit.difference(low)}, {unit.difference(high)}]",
            decision.verdict, _p(decision.p_different), _p(decision.p_equivalent), _p(decision.p_not_worse),
            one.with_items.verdict if one.with_items else DASH, TUNE_MORE if untuned else needed_words(needed),
        ])  # fmt: skip
        raw.append({
            "arm": one.group.name, "against": one.base.name, **raw_estimate("difference", one.difference),
            "margin": margin, "verdict": decision.verdict, "p_different_holm": decision.p_different,
            "p_equivalent_holm": decision.p_equivalent, "p_not_worse_holm": decision.p_not_worse,
            "verdict_with_items": one.with_items.verdict if one.with_items else None,
            "deviation_of_differences": seeds.deviation,
            **dict(zip(("seeds_needed", "seeds_needed_least", "seeds_needed_most"), needed or (), strict=False)),
        })  # fmt: skip
    return Table(name, header, rows, raw, words=(4, 8))


def needed_seeds(seeds: Estimate, margin: float) -> tuple[int | None, int | None, int | None] | None:
    """Seeds to show equivalence with 80 % power if there is no difference; None where the spread is unknown.

    Returns:
        At the measured spread over seeds, and at both ends of that spread's 95 % interval.
    """
    if math.isnan(seeds.standard_error):
        return None
    freedom = seeds.degrees_of_freedom
    ends = [seeds.deviation * math.sqrt(freedom / float(special.chdtri(freedom, p))) for p in (0.025, 0.975)]
    least, most = (seeds_needed_for_equivalence(end, margin) for end in ends)
    return seeds_needed_for_equivalence(seeds.deviation, margin), least, most


def needed_words(needed: tuple[int | None, int | None, int | None] | None) -> str:
    if needed is None:
        return "unknown"
    middle, least, most = (">100,000" if one is None else f"{one:,}" for one in needed)
    return middle if least == most else f"{middle} ({least} to {most})"


def _p(value: float) -> str:
    if math.isnan(value):
        return DASH
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def sensitivity_table(outcome: Outcome, unit: Unit, baseline: str) -> Table:
    """How much a doubling of the batch changes every method's score, and how that differs from the reference's arm.

    Args:
        baseline: the reference's method.
    """
    methods: dict[tuple[str, Any], list[Group]] = {}
    for group in outcome.groups:
        methods.setdefault((group.method, group.variant), []).append(group)
    several = {key: groups for key, groups in methods.items() if len(groups) > 1}
    rows, raw = [], []
    for (method, variant), groups in several.items():
        terms = per_doubling(groups)
        slope = outcome.contrast(terms)
        others = several.get((baseline, variant)) or several.get((baseline, ()))
        beside = None
        batches = [[group.global_batch_size for group in one or []] for one in (groups, others)]
        if method != baseline and others and batches[0] == batches[1]:
            beside = outcome.contrast([*terms, *((-weight, group) for weight, group in per_doubling(others))])
        if slope is None:
            continue
        low, high = slope.items.interval() if slope.items else (math.nan, math.nan)
        rows.append([
            groups[0].title, ", ".join(f"{group.global_batch_size:,}" for group in groups), str(slope.seeds.n),
            unit.change(slope.seeds), DASH if math.isnan(low) else f"[{unit.difference(low)}, {unit.difference(high)}]",
            unit.change(beside.seeds) if beside else DASH,
        ])  # fmt: skip
        raw.append({"arm": method, "title": groups[0].title, **raw_estimate("per_doubling", slope),
                    **raw_estimate("beside_reference_arm", beside)})  # fmt: skip
    header = [
        "arm", "B", "seeds", f"{'points ' if unit.share else ''}per doubling [95 %, seeds]", "[95 %, seeds, items]",
        "minus the reference's arm [95 %, seeds]",
    ]  # fmt: skip
    return Table("sensitivity", header, rows, raw, words=(1,))


def equivalent_batch_table(outcome: Outcome, curve: Sequence[Group]) -> Table:
    """At which batch size the reference arm scores what each other group scores."""
    rows, raw = [], []
    for group in outcome.groups:
        found = None if group in curve else outcome.equivalent_batch(group, curve)
        if found is None:
            continue
        rows.append([
            group.title, f"{group.global_batch_size:,}", found.number(), found.interval(), found.warning() or DASH,
        ])  # fmt: skip
        raw.append({
            "arm": group.arm, "title": group.title, "global_batch_size": group.global_batch_size,
            "crossings": " ".join(f"{value:.6g}" for value in found.crossings), "low": found.low, "high": found.high,
            "low_open": found.low_open, "high_open": found.high_open, "higher_than_all": found.above,
            "lower_than_all": found.below,
            "extrapolated_not_measured": " ".join(f"{value:.6g}" for value in found.extrapolated),
            "neighbours_apart": found.gap, "bend_low": found.bend and found.bend[0],
            "bend_high": found.bend and found.bend[1],
        })  # fmt: skip
    label = curve[0].title if curve else "reference"
    header = ["arm", "B", f"equivalent batch size of {label}", "95 %", "what was not measured"]
    return Table("equivalent_batch", header, rows, raw, words=(2, 3, 4))


def agreement_table(outcome: Outcome, unit: Unit) -> Table:
    """Cells that must agree: the same mathematics under two names, or one recipe run in two ways."""
    pairs = [
        (group, other, why)
        for place, other in enumerate(outcome.groups)
        for group in (*outcome.groups[:place], *outcome.groups[place + 1 :])
        if group.global_batch_size == other.global_batch_size
        if (why := same_mathematics(group, other))
    ]
    rows, raw = [], []
    for group, other, why in pairs:
        seeds = outcome.seeds(group, other)
        if not seeds:
            continue
        apart = abs(outcome.values(group, seeds) - outcome.values(other, seeds))
        usual = outcome.values(other, seeds).std(ddof=1) if len(seeds) > 1 else math.nan
        rows.append([
            group.name, other.name, why, str(len(seeds)), unit.difference(float(apart.max())).lstrip("+"),
            DASH if math.isnan(usual) else unit.difference(float(usual)).lstrip("+"),
        ])  # fmt: skip
        raw.append({"first": group.name, "second": other.name, "why": why, "seeds": len(seeds),
                    "largest_difference": float(apart.max()), "deviation_over_seeds": float(usual)})  # fmt: skip
    header = ["cells", "must agree with", "because", "seeds", "largest difference of a seed", "deviation over seeds"]
    return Table("agreement", header, rows, raw, left=3)


def same_mathematics(group: Group, other: Group) -> str:
    """Why two groups compute the same, from their configurations; empty where they do not."""
    a, b = group.runs[0].config, other.runs[0].config
    if {run.cell.recipe_hash for run in group.runs} & {run.cell.recipe_hash for run in other.runs}:
        once = (group.arm, str(group.variant)) > (other.arm, str(other.variant))  # not both ways round
        return "one recipe, run in two ways" if once else ""
    shared = [key for key in {*a, *b} if key.startswith(("data.", "model.", "optimizer.", "train."))]
    if any(a.get(key) != b.get(key) for key in shared):
        return ""
    first, second = group.runs[0].objective, other.runs[0].objective
    found = first.equals(group.global_batch_size) if first else None
    if found is None or second is None or found.name != b["objective.name"]:
        return ""
    wanted = declared({"name": found.name, **found.options}).options
    return found.why if wanted.model_dump() == second.options.model_dump() else ""


def difference_table(found: Sequence[Difference]) -> Table:
    """What is not the same in all runs."""
    rows = [[one.key, one.by, "\n".join(map(_valued, one.values[:6]))] for one in found]
    raw = [
        {"key": one.key, "by": one.by, "value": value, "where": where, "should_be_equal": one.warn}
        for one in found
        for where, value in one.values
    ]
    return Table("differences", ["key", "differs by", "values"], rows, raw, left=3)


def _valued(one: tuple[str, str]) -> str:
    where, value = one
    return f"{value if len(value) <= 60 else value[:57] + '...'} ({where})"


def missing_table(missing: Sequence[Missing]) -> Table:
    """Cells without a result, with the reason; those that have none to tell in one row."""
    rows = [[one.cell.cell, one.status, one.message.strip()[-400:]] for one in missing if one.message.strip()]
    silent: dict[str, list[str]] = {}
    for one in missing:
        if not one.message.strip():
            silent.setdefault(one.status, []).append(one.cell.cell)
    rows += [[", ".join(cells), status, DASH] for status, cells in silent.items()]
    raw = [{"cell": one.cell.cell, "status": one.status, "message": one.message} for one in missing]
    return Table("not_finished", ["cell", "status", "message"], rows, raw, left=3)
