"""What a study's report says, chapter by chapter, as Markdown with its tables and figures."""

import re
from collections.abc import Iterator, Sequence

from scipy import special

from amclr_scale.study.analysis.families import Analysed, analyse, few_steps, hardly_trained
from amclr_scale.study.analysis.groups import Group, groups_of, reference_of
from amclr_scale.study.analysis.results import Study
from amclr_scale.study.analysis.units import Unit, unit_of
from amclr_scale.study.report import chapters, plots, tables
from amclr_scale.study.report.brief import LEVEL, brief, listed
from amclr_scale.study.report.claims import scale_of
from amclr_scale.study.report.document import Document
from amclr_scale.study.report.learning_rates import how_chosen, too_narrow
from amclr_scale.study.report.plots import Looks
from amclr_scale.study.statistics.decisions import Verdict
from amclr_scale.study.statistics.power import detectable_difference

HELD_EQUAL = {
    "samples": "Every cell sees the same number of samples. A larger batch then takes fewer optimizer steps, and an "
    "arm with further views encodes more for every sample.",
    "steps": "Every cell takes the same number of optimizer steps. A larger batch then sees more samples.",
    "compute": "Every cell spends the same floating-point operations in the towers. An arm with further views then "
    "sees fewer samples.",
    "wall_clock": "Every cell is given the same time on the same hardware.",
    "memory": "Every cell fits the same memory per device; batch sizes differ between arms.",
    "grid": "The batch that a gradient is averaged over and the number of negatives are varied apart.",
}


def compose(study: Study, discussion: str | None = None) -> Document:
    """The whole report.

    Args:
        discussion: a chapter written by hand, in Markdown.
    """
    report = Document()
    groups = groups_of(study)
    analysed = analyse(study, groups) if groups else []
    report.say(f"# {study.name}: a batch-size study")
    report.say("## In brief", brief(study, _question(study), analysed, groups))
    _design(report, study, groups)
    if analysed:
        looks = Looks(cell.title for cell in study.cells)
        first = analysed[0]
        _answer(report, study, first, looks)
        if discussion:
            report.say("## Discussion", demoted(discussion))
        chapters.scores(report, study, analysed, looks)
        chapters.verdicts(report, study, analysed, looks)
        chapters.equivalent(report, first)
        chapters.costs(report, study, first, groups, looks)
        chapters.over_ranks(report, groups)
        chapters.training(report, first, groups, looks)
        chapters.against_whole_set(report, groups, looks)
        chapters.checks(report, study, first)
        chapters.claims(report, study, first, groups)
    elif discussion:
        report.say("## Discussion", demoted(discussion))
    _missing(report, study)
    _limits(report, study, analysed)
    return report


def demoted(text: str) -> str:
    """Headings of a hand-written chapter, below the report's own; fenced code as it is."""
    blocks = re.split(r"(^```.*?^```)", text.strip(), flags=re.DOTALL | re.MULTILINE)
    return "".join(b if b.startswith("```") else re.sub(r"^(#{1,4}) ", r"##\1 ", b, flags=re.MULTILINE) for b in blocks)


def _design(report: Document, study: Study, groups: Sequence[Group]) -> None:
    share = bool(study.runs) and unit_of(study.metrics[0], study.runs).share
    done, planned = len(study.runs) + len(study.tuning), len(study.cells) + len(study.tuning_cells)
    arms = dict.fromkeys(cell.title for cell in study.cells)
    batches = sorted({cell.global_batch_size for cell in study.cells})
    seeds = sorted({cell.seed for cell in study.cells})
    reference = reference_of(study, groups)
    report.say(
        "## Question and design",
        _question(study),
        "\n".join([
            f"- cells: {done} of {planned} finished",
            f"- methods: {'; '.join(arms)}",
            f"- global batch size{'s'[: len(batches) - 1]}: {', '.join(f'{b:,}' for b in batches)}; "
            f"seeds: {', '.join(map(str, seeds))}",
            f"- held equal: {study.held_equal}. {HELD_EQUAL.get(study.held_equal, '')}",
            *_unequal(study),
            f"- outcome: {'; '.join(_metric_words(study, i) for i in range(len(study.metrics)))}",
            f"- margin of equivalence, declared in the plan: {Unit(share).margin(study.margin)}",
            f"- reference: {reference.name if reference else _wanted(study) + ' (not finished)'}",
            *([f"- learning rates: {how}"] if (how := how_chosen(study, groups)) else []),
            f"- scale: {scale_of(study)}",
        ]),
    )  # fmt: skip


def _unequal(study: Study) -> Iterator[str]:
    """What the plan gives to some arms beyond what is held equal."""
    arms = study.plan.get("arms") or []
    titles = {cell.arm: cell.title for cell in study.cells}
    factors = {arm["name"]: arm.get("budget_factor") or 1 for arm in arms}
    shares = [f"{titles[name]} x {factor:g}" for name, factor in factors.items() if factor != 1 and name in titles]
    if shares:
        yield f"- another share of it: {', '.join(shares)}"
    others = {arm["name"]: arm["features_of"] for arm in arms if arm.get("features_of")}
    one = dict.fromkeys((cell.cell for cell in study.cells), ": one model for all seeds, and intervals are for it")
    read = [f"{titles[name]} (of {of}{one.get(of, '')})" for name, of in others.items() if name in titles]
    if read:
        yield f"- beside features of another cell, whose training and embedding are not counted: {', '.join(read)}"


def _question(study: Study) -> str:
    asked = " ".join(str(study.plan.get("question") or "").split())
    return asked or (
        'Does a method at a small batch size score what CLIP scores at a large one? "Matches" is a claim of '
        "equivalence, and needs evidence of its own: a difference that was not found is not equality."
    )


def _wanted(study: Study) -> str:
    return ", ".join(f"{key} {value}" for key, value in study.reference.items()) or "none named"


def _metric_words(study: Study, place: int) -> str:
    metric = study.metrics[place]
    words = metric.name if metric.keys == (metric.name,) else f"{metric.name} (mean of {', '.join(metric.keys)})"
    return f"`{words}`" + (" (first, decides)" if place == 0 and len(study.metrics) > 1 else "")


def _answer(report: Document, study: Study, first: Analysed, looks: Looks) -> None:
    report.say("## What was found")
    if first.reference is None:
        report.say("The reference has no finished cell, so nothing is compared with it yet.")
    else:
        lines = [f"Against {first.reference.name}, at a margin of {first.unit.margin(study.margin)}:"]
        for verdict in Verdict:
            groups = [one.group for one in first.against_reference if one.decision.verdict == verdict]
            if groups:
                lines.append(f"- **{verdict}**: {listed(groups)}")
        groups = [one.group for one in first.against_reference if one.decision.p_not_worse < LEVEL]
        lines.append(f"- not worse by the margin or more is shown of: {listed(groups) or 'none'}")
        report.say("\n".join([lines[0], "", *lines[1:]]))
    seeds = [mean.seeds.n for group in first.outcome.groups if (mean := first.outcome.mean(group))]
    report.say(_few_seeds(max(seeds, key=seeds.count)) if seeds else "", _detectable(first))
    report.figure(
        plots.score_by_batch(first.outcome, first.unit, looks, f"by_batch_{first.slug}", first.reference, study.margin)
    )
    guessing = first.outcome.guessing
    if guessing is not None:
        report.say(f"Guessing scores {100 * guessing:.2g} %.")
    report.say(_hardly_trained(first))


def _detectable(first: Analysed) -> str:
    """What a study of this size can find at all."""
    spreads = [one.difference.seeds for one in first.against_reference if one.difference.seeds.standard_error > 0]
    if not spreads:
        return ""
    middle = sorted(spreads, key=lambda one: one.deviation)[len(spreads) // 2]
    spread, found = (
        first.unit.difference(value).lstrip("+") + (" points" if first.unit.share else "")
        for value in (middle.deviation, detectable_difference(middle.deviation, middle.n))
    )
    return (
        f"Paired differences spread by {spread} over seeds (the middle comparison). At that spread, a true difference "
        f"of {found} is found with 80 % probability in a single comparison, and less often in a family of them."
    )


def _hardly_trained(first: Analysed) -> str:
    found = hardly_trained(first)
    if not found:
        return ""
    words = [
        f"{group.name} ({first.unit.score(value)} % after {group.runs[0].cell.steps:,} steps)" for group, value in found
    ]
    text = f"**Hardly trained**: {'; '.join(words)}. What is compared with these says little about methods."
    if first.reference is not None and first.reference in [group for group, _ in found]:
        text += (
            " **The reference is among them**: to match it, or to be better, is no evidence about large batches, "
            "only about too few steps or a learning rate that does not fit them."
        )
    return text


def _few_seeds(n: int) -> str:
    if n < 2:
        return "One seed: there is no interval, and nothing can be decided."
    quantile = float(special.stdtrit(n - 1, 0.975))
    quantiles = f"{quantile:.2f} standard errors to each side, where many seeds would need 1.96."
    few = ' Such a study finds large differences only; "undecided" is its most likely answer.' if n < 5 else ""
    freedom = f"{n - 1} degree{'s' if n > 2 else ''} of freedom"
    return f"With {n} seeds an interval has {freedom}: it reaches {quantiles}{few}"


def _missing(report: Document, study: Study) -> None:
    report.say("## Cells without a result")
    if study.missing:
        report.table(tables.missing_table(study.missing))
    else:
        report.say("None: every planned cell finished.")


def _limits(report: Document, study: Study, analysed: Sequence[Analysed]) -> None:
    lines = [f"- Everything here is at this scale: {scale_of(study)}. Trends at another scale may differ in sign."]
    seeds = {cell.seed for cell in study.cells}
    if len(seeds) < 5:
        lines.append(f"- {len(seeds)} seeds; five or more are customary, and the verdict tables say how many would do.")
    steps = few_steps(study)
    if steps:
        lines.append(
            f"- Few optimizer steps ({steps}): a large batch may score less because it has taken too few steps, not "
            "because of its negatives."
        )
    costs = {run.cell.title for run in study.runs if (run.cell.encoder_cost or 1) > 1}
    if costs and study.held_equal == "samples":
        lines.append(
            f"- At equal samples, more is encoded per sample than by plain CLIP in: {', '.join(sorted(costs))}."
        )
    rates = sorted({run.cell.lr for run in study.runs if run.cell.lr is not None})
    swept = any(group.swept or group.criterion for one in analysed for group in one.outcome.groups)
    if study.runs and not swept:
        words = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}, one per batch size"
        lines.append(f"- No learning rate was swept ({words}): an arm or a batch size may do better at another.")
    narrow = too_narrow(analysed[0].outcome.groups) if analysed else ""
    lines += [f"- {narrow}"] if narrow else []
    if analysed:
        clusters = analysed[0].outcome.clusters
        lines.append(
            f"- {clusters:,} test items: intervals over seeds and items say what another sample of them would change."
            if clusters
            else "- What was measured per item was not kept: all intervals hold for this test set only."
        )
    lines.append(
        "- Bootstrap: 10,000 resamples of items, seeded. Seeds are not resampled: their intervals are Student's."
    )
    report.say("## Limits", "\n".join(lines))
