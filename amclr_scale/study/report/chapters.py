"""The chapters of a study's report that hold its tables and figures, as Markdown."""

from collections.abc import Sequence

from amclr_scale.study.analysis.comparability import differences, surroundings, uneven_rate
from amclr_scale.study.analysis.comparison import Outcome
from amclr_scale.study.analysis.families import Analysed, slug_of
from amclr_scale.study.analysis.groups import Group, reference_method
from amclr_scale.study.analysis.results import Metric, Study
from amclr_scale.study.analysis.units import unit_of
from amclr_scale.study.report import curves, learning_rates, plots, probe_figures, rank_scaling, tables
from amclr_scale.study.report.claims import (
    SCORES,
    Speaker,
    claims_table,
    numbers_table,
    scale_of,
    scales_list,
    sources_list,
)
from amclr_scale.study.report.document import Document
from amclr_scale.study.report.plots import Looks
from amclr_scale.study.running.progress import duration

OFF_BUDGET = 0.1
UNEVEN = 1.2  # ratio of rates of equal runs above which a machine was not left alone


def scores(report: Document, study: Study, analysed: Sequence[Analysed], looks: Looks) -> None:
    report.say(
        "## Runs",
        "A row per method and batch size: means over seeds. Hours are the wall clock of all attempts, start and "
        "evaluation included. TFLOP are the useful operations of the whole run, forward and backward once: the plan's "
        "account with the similarities where it has one, else those of both towers. Encoder passes are per sample, "
        "relative to plain CLIP.",
    )
    first = analysed[0]
    report.table(tables.run_table(first.outcome, first.unit))
    report.say("## Scores by method and batch size", "Mean over seeds with its 95 % t interval over seeds.")
    for one in analysed:
        report.say(f"### {one.outcome.metric.name}")
        report.table(tables.matrix(one.outcome, one.unit, f"scores_{one.slug}"))
        if one is not first:
            report.figure(
                plots.score_by_batch(one.outcome, one.unit, looks, f"by_batch_{one.slug}", one.reference, study.margin)
            )
    further = further_scores(study)
    if further:
        report.say("### Further scores", "Not among the plan's outcomes: nothing is decided on them.")
    for metric in further:
        outcome = Outcome(metric, first.outcome.groups, resamples=0)
        split, _, name = metric.name.rpartition("/")
        report.say(f"{SCORES[name]}, {split}{', %' if unit_of(metric, study.runs).share else ''}:")
        report.table(tables.matrix(outcome, unit_of(metric, study.runs), f"scores_{slug_of(metric)}"))
    method = reference_method(study)
    sensitivity = tables.sensitivity_table(first.outcome, first.unit, method)
    if sensitivity.rows:
        report.say(
            "### How much the batch size matters",
            "The slope of the score over log2 B, by least squares, seed by seed: what a doubling of the batch brings "
            "on average. Where a curve bends, one number does not describe it.",
        )
        report.table(sensitivity)
    sweep = learning_rates.table(study, first.outcome, first.unit)
    if sweep.rows:
        how = learning_rates.TUNED if study.criterion else learning_rates.ON_SCORED
        hours = sum(run.hours or 0 for run in study.tuning)
        took = f"The {len(study.tuning)} tuning cells took {hours:.3g} hours." if hours else ""
        report.say("### Learning rates", how, learning_rates.too_narrow(first.outcome.groups), took)
        report.table(sweep)


def further_scores(study: Study) -> list[Metric]:
    """The usual scores on the first outcome's split that every run has and no outcome is."""
    split = study.metrics[0].keys[0].rpartition("/")[0]
    keys = [f"{split}/{name}" for name in SCORES]
    outcomes = {metric.keys for metric in study.metrics}
    return [Metric(key, (key,)) for key in keys if (key,) not in outcomes and all(key in r.results for r in study.runs)]


def verdicts(report: Document, study: Study, analysed: Sequence[Analysed], looks: Looks) -> None:
    margin = analysed[0].unit.margin(study.margin)
    report.say(
        "## Verdicts",
        "Differences are paired by seed. *matches*: two one-sided t tests (TOST) show that the difference lies within "
        f"{margin} either way. *better*, *worse*: a difference is shown, and a match is not. *undecided*: neither is, "
        "which is not evidence for equality. p-values (of no difference, of a match, of not being worse by the margin "
        "or more) are adjusted by Holm within each table and kind of test, at level 5 %; intervals are not adjusted. "
        "No match is said with a method when the margin is more than half of what it scores above guessing. The "
        "verdict holds for this test set; *with new items* also lets the test items vary. *Seeds needed*: to show a "
        "match with 80 % power if there is no difference, in a single comparison (Holm asks for more in a table of "
        "several), at the spread measured here and at both ends of that spread's own 95 % interval.",
        learning_rates.IN_VERDICTS if study.criterion else "",
        learning_rates.too_narrow(analysed[0].outcome.groups),
        learning_rates.items_unknown(analysed[0].outcome),
    )
    for place, one in enumerate(analysed):
        name = one.outcome.metric.name
        if place:
            name += " (exploratory)"
        for kind, compared, words in (
            ("reference", one.against_reference, f"against {one.reference.name}" if one.reference else ""),
            ("same_batch", one.same_batch, "against the reference's arm at the same batch size"),
            ("pairs", one.pairs, "the pairs that the plan names"),
        ):
            if not compared:
                continue
            report.say(f"### {name}, {words}")
            both = kind == "pairs"
            report.table(
                tables.verdict_table(compared, one.unit, study.margin, f"verdicts_{kind}_{one.slug}", both=both)
            )
            caption = f"{one.outcome.metric.name}, {words}: thick over seeds, thin over seeds and items, 95 %."
            figure = plots.differences(
                compared, one.unit, looks, f"differences_{kind}_{one.slug}", caption, study.margin, both=both
            )
            report.figure(figure)


def equivalent(report: Document, first: Analysed) -> None:
    if first.reference is None:
        return
    table = tables.equivalent_batch_table(first.outcome, first.curve)
    if not table.rows:
        return
    report.say(
        "## Equivalent batch size",
        f"The batch size at which {first.reference.title} scores what another method scores at B, on straight lines in "
        "log2 B between the batch sizes that were run. A curve that is not monotone can have several answers. The "
        "interval holds all batch sizes within the range at which a paired t test (seeds and items) does not tell the "
        "method apart from every curve that may lie there: from the straight line to twice the bend that three "
        "neighbouring sizes show. Sizes more than 2 times apart are told: what lies between was not measured. Outside "
        "the range nothing was measured; a number for it is called extrapolated.",
    )
    report.table(table)


def costs(report: Document, study: Study, first: Analysed, groups: Sequence[Group], looks: Looks) -> None:
    made = [
        plots.score_by_cost(
            first.outcome, first.unit, looks, "tflop", "TFLOP", "by_flops",
            "Score against the useful floating-point operations of a run.",
        ),
        plots.score_by_cost(
            first.outcome, first.unit, looks, "optimizer_steps", "optimizer steps", "by_steps",
            "Score against optimizer steps.",
        ),
        plots.score_by_cost(
            first.outcome, first.unit, looks, "hours", "hours", "by_hours", "Score against wall clock."
        ),
        plots.score_by_cost(
            first.outcome, first.unit, looks, "peak_gib", "peak memory per rank, GiB", "by_memory",
            "Score against peak memory per rank: the frontier.",
        ) if study.held_equal == "memory" else None,
        plots.by_batch(
            groups, looks, "peak_gib", "peak memory per rank, GiB", "memory", "Peak memory per rank against batch size."
        ),
        plots.by_batch(
            groups, looks, "samples_per_second", "samples/s", "throughput", "Throughput against batch size."
        ),
        plots.heat_map(first.outcome, first.unit, "gradient_batch_and_negatives"),
    ]  # fmt: skip
    if any(made):
        report.say("## Costs")
        for figure in made:
            report.figure(figure)


def over_ranks(report: Document, groups: Sequence[Group]) -> None:
    found = rank_scaling.points(groups)
    if not found:
        return
    report.say(
        "## Over ranks",
        "The same recipe on W ranks: samples/s of all ranks together, from the logged steps. Speed-up and efficiency "
        "are against the fewest ranks at the same global batch, where a rank's share b = B / W shrinks; *at equal b*, "
        "against the fewest ranks with the same share. Scores of these cells must agree (Checks).",
    )
    report.figure(rank_scaling.scaling_figure(found))
    report.table(rank_scaling.scaling_table(found))


def training(report: Document, first: Analysed, groups: Sequence[Group], looks: Looks) -> None:
    curve = curves.score_by_samples(first.outcome, first.unit, looks, f"by_samples_{first.slug}")
    objective = curves.objective_by_samples(groups, looks, "objective_by_samples")
    logged = curves.diagnostics(groups, looks)
    if curve or objective or logged:
        report.say("## During training")
        if curve is None:
            report.say("The metric was measured at the end only; what follows is the training objective.")
        for figure in (curve, objective, *logged):
            report.figure(figure)
        others = curves.diagnostic_keys(groups)[curves.MOST_DIAGNOSTICS :]
        if others:
            report.say(f"Logged as well, and not drawn here: {', '.join(f'`{key}`' for key in others)}.")


def against_whole_set(report: Document, groups: Sequence[Group], looks: Looks) -> None:
    probed = probe_figures.probed(groups)
    if not probed:
        return
    sizes = " or ".join(f"{size:,}" for size in probe_figures.probe_sizes(probed)) or "K"
    report.say(
        "## Batches against the whole set",
        f"A fixed random set of K = {sizes} training samples, the same for all runs of a seed, is encoded now and then "
        "during training.",
        "\n".join([
            "- *Averages*: how far the stored average u of a sample is from g, the mean over the set's negatives that "
            "it stands for, as |u - g| / g; 0 is exact. log(u / g) above 0: u remembers nearer negatives.",
            "- *Gradients*, with respect to the embeddings: those of K / B batches of B with the present averages, "
            "which hold every sample once, against that of all K as one batch with u = g. A cosine of 1 and a norm "
            "ratio of 1 are the whole set's gradient.",
            "- *Expected*: the mean over all ways to draw the batches, estimated from random partitions. What is left "
            "is bias, which every batch has; the rest of the distance is the luck of the draw, which later steps even "
            "out.",
            "- *Bias* and *noise*: |E g - G| and the standard deviation of one estimate, over |G|. *Last layer*: of "
            "the gradient of the parameters of the linear layer in which each encoder's head ends.",
            "- Every method is held against its own objective on all K samples, not against the others'. One without "
            "averages is held against a batch of K.",
        ]),
    )  # fmt: skip
    report.figure(probe_figures.by_batch(probed, looks))
    report.table(probe_figures.last_table(probed))
    for quantity in (
        probe_figures.ERROR, probe_figures.LOG_RATIO, probe_figures.COSINE, probe_figures.NORM,
        probe_figures.DRIFT_IMAGE, probe_figures.DRIFT_TEXT,
    ):  # fmt: skip
        report.figure(probe_figures.curve(probed, looks, quantity))
    report.figure(probe_figures.by_age(probed, looks))


def checks(report: Document, study: Study, first: Analysed) -> None:
    agreement = tables.agreement_table(first.outcome, first.unit)
    report.say("## Checks")
    if agreement.rows:
        report.say(
            "### Cells that must agree",
            "The same mathematics under two names. Rounding differs, and training multiplies it; a difference that is "
            "large beside the spread over seeds would be a fault.",
        )
        report.table(agreement)
    _wall_clock(report, study)
    found = differences(study.runs)
    warned = [one for one in found if one.warn]
    report.say(
        "### What differs between the runs",
        "From the configurations of the finished runs, not from the plan. All other keys of the recipe are equal.",
    )
    if warned:
        report.say(
            "Arms differ in keys that a comparison of objectives would hold equal: "
            + ", ".join(f"`{one.key}`" for one in warned)
            + ". Unless that difference is the arm, it is an alternative explanation of the results."
        )
    report.table(tables.difference_table(found))
    around = surroundings(study.runs)
    lines = [
        f"- {key}: {' / '.join(values)}"
        for key, values in around.items()
        if any(value not in ("", "{}") for value in values)
    ]
    mixed = [key for key in ("device", "cpu", "host", "ranks") if len(around[key]) > 1]
    report.say("### Where it ran", "\n".join(lines))
    jobs = (study.plan.get("execution") or {}).get("jobs", 1)
    if jobs > 1:
        report.say(f"{jobs} cells ran at once on a machine: hours and samples/s are those of a shared machine.")
    if len(around["commit"]) > 1 or len(around["packages"]) > 1:
        report.say("Not all runs were made by one version of the code and its packages.")
    uneven = uneven_rate(group.runs for group in first.outcome.groups if not group.swept)
    if uneven > UNEVEN:
        report.say(
            f"Runs that differ in the seed alone differ in samples/s by up to {uneven:.1f} times: the machine did "
            "other work, and hours and samples/s do not compare."
        )
    if mixed:
        report.say(f"Not all on one machine ({', '.join(mixed)} differ): hours and samples/s do not compare.")


def _wall_clock(report: Document, study: Study) -> None:
    """How far the time that cells took is from the time that they were given."""
    hours = (study.plan.get("budget") or {}).get("hours")
    if study.held_equal != "wall_clock" or not hours:
        return
    factors = {arm["name"]: arm.get("budget_factor") or 1.0 for arm in study.plan.get("arms") or []}
    shares = {
        run.cell.cell: run.training_seconds / (3600 * hours * factors.get(run.cell.arm, 1.0))
        for run in study.runs
        if run.training_seconds
    }
    off = [f"{cell} ({share:.0%})" for cell, share in shares.items() if abs(share - 1) > OFF_BUDGET]
    if shares:
        report.say(
            "### Time given and time taken",
            f"Cells are planned from a pilot's samples/s, to train for the budget of {duration(3600 * hours)}; start "
            f"and evaluation are not in it. The logged steps took {min(shares.values()):.0%} to "
            f"{max(shares.values()):.0%} of it. More than {OFF_BUDGET:.0%} off: {', '.join(off) or 'none'}.",
        )


def claims(report: Document, study: Study, first: Analysed, groups: Sequence[Group]) -> None:
    speaker = Speaker(study, first.outcome, first.unit, first.against_reference, first.reference)
    unit = "points, " if first.unit.share else ""
    report.say(
        "## Claims",
        f"What others have claimed, and what this study says about it ({unit}{first.outcome.metric.name}, 95 % over "
        f"seeds; each claim's comparisons are a family of their own). This study's scale: {scale_of(study)}. Anything "
        "measured at that scale speaks to the direction of a claim, not to its size.",
    )
    report.say(sources_list())
    report.table(claims_table(speaker))
    report.say(
        "### Published numbers",
        "Scores of other data, towers and lengths do not compare in size. They stand side by side so that nobody "
        "has to look them up, and so that a study at their scale can be held against them.",
    )
    report.say(scales_list())
    report.table(numbers_table(study, groups))
