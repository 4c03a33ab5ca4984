"""The head of a report: what was asked, what was found and what that cannot say, for a reader with one minute."""

import math
from collections import Counter
from collections.abc import Sequence

from amclr_scale.study.analysis.families import Analysed, few_steps, hardly_trained
from amclr_scale.study.analysis.groups import Group, nearest
from amclr_scale.study.analysis.results import Cell, Study
from amclr_scale.study.analysis.units import words_of
from amclr_scale.study.planning.amounts import MOST_OF_EFFECT
from amclr_scale.study.report import learning_rates, probe_figures, rank_scaling, tables
from amclr_scale.study.report.claims import scale_of
from amclr_scale.study.statistics.decisions import Verdict

LEVEL = 0.05
LARGE_SHARE = 0.2  # of what the reference scores above guessing: a margin to be told about
MEANING = {
    Verdict.MATCHES: "shown to match",
    Verdict.BETTER: "shown to be better",
    Verdict.WORSE: "shown to be worse",
}


def brief(study: Study, question: str, analysed: Sequence[Analysed], groups: Sequence[Group]) -> str:
    """A few points, as Markdown."""
    lines = [f"- **Asked.** {question}", f"- **Run.** {_ran(study)}"]
    if analysed:
        first = analysed[0]
        lines.append(f"- **Scores.** {_scores(first)}")
        if first.against_reference:
            lines.append(f"- **Verdicts.** {_verdicts(first, study.margin)}")
        lines += [f"- **Beware.** {beware}"] if (beware := _beware(study, first)) else []
        lines += [f"- **Equivalent batch size.** {worth}"] if (worth := _worth(first)) else []
    near = _near(groups)
    lines += [f"- **Gradients.** {near}"] if near else []
    speed = _speed(groups)
    lines += [f"- **Ranks.** {speed}"] if speed else []
    lines += [f"- **Must agree.** {alike}"] if analysed and (alike := _agreement(analysed[0])) else []
    lines.append(f"- **What it cannot say.** {_cannot(study)}")
    return "\n".join(lines)


def _ran(study: Study) -> str:
    seeds = _seeds(study)
    batches = ", ".join(f"{batch:,}" for batch in sorted({cell.global_batch_size for cell in study.cells}))
    sizes = "sizes" if "," in batches else "size"
    methods = len(dict.fromkeys(cell.title for cell in study.cells))
    cells, lost = len(study.cells) + len(study.tuning_cells), len(study.missing)
    missing = f"; {lost} of its {cells} cells have no result yet" if lost else ""
    tuning = len({cell.seed for cell in study.tuning_cells})
    missing = f"{f', learning rates chosen on {tuning} others' if tuning else ''}{missing}"
    return (
        f"{methods} {'method' if methods == 1 else 'methods'} at global batch {sizes} {batches}, {seeds}, "
        f"with equal {study.held_equal.replace('_', ' ')}{missing}."
        if study.held_equal != "grid"
        else f"{methods} methods over a grid of gradient batches and negatives, {seeds}{missing}."
    )


def _seeds(study: Study) -> str:
    """How many seeds everything has, or has so far."""
    planned = len({cell.seed for cell in study.cells})
    wanted = Counter(_without_seed(cell) for cell in study.cells)
    there = Counter(_without_seed(run.cell) for run in study.runs)
    low, high = (end((there[one] for one in wanted), default=0) for end in (min, max))
    so_far = f"{low} of " if low == high else f"{low} to {high} of "
    return f"{so_far if there != wanted else ''}{planned} {'seed' if planned == 1 else 'seeds'} each"


def _without_seed(cell: Cell) -> str:
    return cell.cell.removesuffix(f"-s{cell.seed}")


def _scores(first: Analysed) -> str:
    """The best method at every batch size, beside the reference's arm there."""
    words, lower = [], first.outcome.metric.lower_is_better
    for batch in sorted({group.global_batch_size for group in first.outcome.groups}):
        here = [
            (group, mean.seeds.value)
            for group in first.outcome.groups
            if group.global_batch_size == batch and (mean := first.outcome.mean(group))
        ]
        if not here:
            continue
        best, value = (min if lower else max)(here, key=lambda one: one[1])
        said = f"at B = {batch:,} {best.title} {first.unit.score(value)}{first.unit.name and ' ' + first.unit.name}"
        of = first.reference
        base = nearest([group for group, _ in here if of and group.method == of.method], batch, ())
        if base is not None and best.method != base.method:
            said += f" ({base.title} {first.unit.score(dict(here)[base])})"
        words.append(said)
    return f"{'Lowest' if lower else 'Highest'} {first.outcome.metric.name}, mean over seeds: {'; '.join(words)}."


def _verdicts(first: Analysed, margin: float) -> str:
    """What was decided, in both families of comparisons, and how much was not."""
    reference = first.reference.name if first.reference else "the reference"
    words = []
    for compared, against in (
        (first.against_reference, reference),
        (first.same_batch, "the reference's arm at the same batch size"),
    ):
        decided = [
            f"{MEANING[verdict]}: {listed(found)}"
            for verdict in MEANING
            if (found := [one.group for one in compared if one.decision.verdict == verdict])
        ]
        if compared:
            open_ = sum(one.decision.verdict == Verdict.UNDECIDED for one in compared)
            decided += [f"undecided: {open_}, which is no evidence for equality"] if open_ else []
            words.append(f"Of {len(compared)} against {against}, {'; '.join(decided)}.")
    decided = [f"{one.pair}: {one.decision.verdict}" for one in first.pairs]
    words += [f"Pairs that the plan names: {'; '.join(decided)}."] if decided else []
    not_worse = [one.group for one in first.against_reference if one.decision.p_not_worse < LEVEL]
    if not_worse:
        words.append(f"Shown not to be worse than {reference} by the margin or more: {listed(not_worse)}.")
    return f"Margin {first.unit.margin(margin)}. {' '.join(words)}"


def _beware(study: Study, first: Analysed) -> str:
    """A verdict on methods that have not learned is none; a batch that took few steps may only have taken too few."""
    words = []
    found = [group for group, _ in hardly_trained(first)]
    if found:
        reference = ", the reference among them" if first.reference in found else ""
        words.append(f"Hardly trained{reference}: {listed(found)}. What is said of these says little about methods.")
    words += [wide] if (wide := wide_margin(study, first)) else []
    words += [narrow] if (narrow := learning_rates.too_narrow(first.outcome.groups)) else []
    if study.held_equal != "steps" and (steps := few_steps(study)):
        words.append(f"Few optimizer steps ({steps}): there, a low score may be too little training.")
    return " ".join(words)


def wide_margin(study: Study, first: Analysed) -> str:
    """A margin that is a large part of what the reference has learned, and what follows for its verdicts."""
    of = first.reference
    share = first.outcome.share_of_effect(of, study.margin) if of else None
    if of is None or share is None or share < LARGE_SHARE:
        return ""
    if math.isinf(share):
        return f"{of.name} scores no more than guessing, and nothing is said to match it."
    told = f"The margin is {share:.0%} of what {of.name} scores above guessing"
    return f"{told}{', and nothing is said to match it' if share > MOST_OF_EFFECT else ''}."


def _worth(first: Analysed) -> str:
    """The batch size at which the reference's arm scores what others do, where the interval has an end."""
    words = []
    for group in first.outcome.groups:
        found = None if group in first.curve else first.outcome.equivalent_batch(group, first.curve)
        if found and found.crossings and not (found.low_open and found.high_open):
            first_one, *others = (f"{value:,.0f}" for value in found.crossings)
            again = f" and, as its curve bends, again at {' and '.join(others)}" if others else ""
            here = f"{group.name} scores what {first.curve[0].title} scores at B = {first_one}{again}"
            why = f"; {found.warning()}" if found.warning() else ""
            words.append(f"{here} (95 % interval: {found.interval()}{why})")
    return f"{'; '.join(words)}." if words else ""


def listed(groups: Sequence[Group]) -> str:
    """Methods, each with its batch sizes."""
    batches: dict[str, list[str]] = {}
    for group in groups:
        batches.setdefault(group.title, []).append(f"{group.global_batch_size:,}")
    return "; ".join(f"{title} (B = {', '.join(sizes)})" for title, sizes in batches.items())


def _near(groups: Sequence[Group]) -> str:
    """The range of the last cosines at every batch size."""
    words = []
    probed = probe_figures.probed(groups)
    for batch in sorted({group.global_batch_size for group in probed}):
        known = [
            (one.value, group.title)
            for group in probed
            if group.global_batch_size == batch and (one := probe_figures.last(group, probe_figures.COSINE))
        ]
        if known:
            (low, least), (high, most) = min(known), max(known)
            words.append(f"at B = {batch:,} from {low:.2f} ({least}) to {high:.2f} ({most})")
    return f"Cosine with the gradient of the whole probe set, at the end: {'; '.join(words)}." if words else ""


def _speed(groups: Sequence[Group]) -> str:
    found = rank_scaling.points(groups)
    if not found:
        return ""
    most = max(one.ranks for one in found)
    words = []
    for one in found:
        base = rank_scaling.baseline(one, found)
        if one.ranks == most and base and (speed := rank_scaling.ratio(one, base, per_rank=False)):
            words.append(f"{one.name} {words_of(speed, rank_scaling.DIGITS)} times the samples/s of {base.ranks}")
    return f"On {most} ranks: {'; '.join(words)}." if words else ""


def _agreement(first: Analysed) -> str:
    """How far cells are apart that differ in name, or in how they were run, alone."""
    table = tables.agreement_table(first.outcome, first.unit)
    if not table.raw:
        return ""
    worst = max(table.raw, key=lambda row: float(row["largest_difference"]))
    apart = first.unit.difference(float(worst["largest_difference"])).lstrip("+")
    return (
        f"{len(table.raw)} {'pair' if len(table.raw) == 1 else 'pairs'} of cells; the farthest apart on one seed: "
        f"{worst['first']} and {worst['second']}, {apart}{' points' if first.unit.share else ''}."
    )


def _cannot(study: Study) -> str:
    seeds = len({run.cell.seed for run in study.runs})  # so far
    lines = [f"Anything at another scale than this one: {scale_of(study)}."]
    if seeds < 2:
        lines.append("Any difference: one seed has no interval.")
    elif seeds < 5:
        lines.append(f"Small differences: {seeds} seeds find large ones only.")
    lines.append("[Limits](#limits) has the rest.")
    return " ".join(lines)
