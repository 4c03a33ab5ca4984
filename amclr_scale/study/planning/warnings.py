"""What makes a study say less than it seems to: told before it costs anything."""

from collections.abc import Iterator, Mapping, Sequence

from amclr_scale.study.planning.amounts import amount, written
from amclr_scale.study.planning.plan import SWEPT, StudyPlan
from amclr_scale.study.planning.planned import Planned

FEW_STEPS = 500
POWER = 0.8
LEARNING_RATES = 5  # values of a sweep from which a best one may be taken


def warnings(
    plan: StudyPlan, cells: Sequence[Planned], epoch: float, gib: Mapping[str, float] | None = None
) -> Iterator[str]:
    """One line each.

    Args:
        plan, cells: the study.
        epoch: samples per epoch.
        gib: predicted peak memory per rank, by variant.
    """
    yield from _twice(cells)
    few = min(cells, key=lambda cell: cell.steps)
    if few.steps < FEW_STEPS:
        yield (
            f"{few.steps} optimizer steps at a global batch of {few.global_batch_size}: with so few, a large batch "
            "loses by training too little, not by its negatives (30 epochs of 100,000 pairs are 90 steps at 32,768); "
            "run held_equal: steps beside it"
        )
    large = sorted({cell.global_batch_size for cell in cells if cell.global_batch_size > epoch})
    if large:
        yield f"global batch {large[0]} is larger than the data set of {epoch:,.0f}: samples meet themselves in it"
    costly = sorted({cell.label for cell in cells if cell.encoder_cost > 1})
    if costly and plan.held_equal in ("samples", "steps") and any(cell.encoder_cost == 1 for cell in cells):
        most = max(cell.encoder_cost for cell in cells)
        yield (
            f"{', '.join(costly)}: up to {most:g} times the encoder work of the other arms at equal {plan.held_equal}; "
            "run held_equal: compute beside it"
        )
    towers = cells[0].config.model
    pretrained = [
        key for key, value in (
            ("model.image.weights", towers.image.weights),
            ("model.text.pretrained", towers.text.pretrained),
        ) if value
    ]  # fmt: skip
    if pretrained:
        yield (
            f"{', '.join(pretrained)}: towers that were trained before may have seen the test set; results are no "
            "longer zero-shot, and differences between arms shrink"
        )
    for metric in plan.metrics:
        if len(metric.splits) > 1:
            yield (
                f"metrics: {metric.name} is the mean of results on {len(metric.splits)} splits, so nothing is said "
                "about new items; name one outcome per split"
            )
    yield from _memory(plan, gib or {})
    yield from _seeds(plan)
    yield from _tuning(plan)
    swept = [plan.axes.get(SWEPT) or arm.axes.get(SWEPT) or [] for arm in plan.arms]
    least = min(len(values) for values in swept)
    if least < LEARNING_RATES:
        have = "one learning rate per batch size" if least < 2 else f"a sweep of {least} values of optimizer.lr"
        yield (
            f"{have}: an arm may win because it suits them; the fair curve takes the best of {LEARNING_RATES} or more "
            "per cell (axes: {optimizer.lr: [...]})"
        )


def _twice(cells: Sequence[Planned]) -> Iterator[str]:
    """Cells that compute what another one computes, in the same way."""
    first: dict[tuple[object, ...], Planned] = {}
    pairs: dict[tuple[str, str], int] = {}
    for cell in cells:
        if cell.waits:  # for a learning rate that may differ
            continue
        features = cell.features and cell.features.of
        how = cell.config.execution.model_dump_json()
        other = first.setdefault((cell.recipe_hash, how, cell.ranks, features), cell)
        if other is not cell:
            pair = (other.variant, cell.variant)
            pairs[pair] = pairs.get(pair, 0) + 1
    for (one, again), times in pairs.items():
        yield (
            f"arms: {one} and {again} are one recipe, run in one way, so {times} of their cells are paid twice and "
            "show nothing; take one of them out"
        )


def _tuning(plan: StudyPlan) -> Iterator[str]:
    """What a swept learning rate costs the verdicts."""
    if plan.sweeps and not plan.tuning_seeds:
        yield (
            "tuning.seeds: [] chooses learning rates on the seeds that are scored: intervals are too narrow, and "
            "nothing is said to match"
        )
    elif plan.sweeps and len(plan.tuning_seeds) == 2:
        yield (
            "tuning.seeds: what two seeds say of how good another learning rate would have been is so uncertain that "
            "hardly any verdict will be decided; take three or more"
        )
    if (
        plan.sweeps
        and plan.tuning_seeds
        and plan.criterion.splits & {split for one in plan.metrics for split in one.splits}
    ):
        yield (
            "learning rates are chosen on an outcome's own items, so nothing is said about new ones; name a result on "
            "a validation split as tuning.metric"
        )


def _memory(plan: StudyPlan, gib: Mapping[str, float]) -> Iterator[str]:
    """Cells that do not fit where the plan expects to run."""
    if plan.expected is None or plan.expected.device is None:
        return
    from amclr_scale.metrics.devices import GIB, find_profile

    profile = find_profile(plan.expected.device)
    large = [variant for variant, need in gib.items() if need * GIB > profile.memory_bytes]
    if large:
        most = max(large, key=lambda variant: gib[variant])
        yield (
            f"{len(large)} arms and batch sizes need more than the {profile.memory_bytes / GIB:.0f} GiB of an "
            f"{plan.expected.device}, {most} {gib[most]:.0f} GiB; give execution.words_by_batch a "
            "execution.micro_batch_size"
        )


def _seeds(plan: StudyPlan) -> Iterator[str]:
    """What the margin asks of the number of seeds."""
    try:
        from amclr_scale.study.statistics.power import power_of_equivalence, seeds_needed_for_equivalence
    except ImportError as error:
        yield f"statistics need {error.name}: pip install 'amclr_scale[report]'; nothing is said about seeds here"
        return
    seeds = len(plan.seeds)
    if seeds < 2:
        yield "1 seed: no spread over seeds is seen, so there will be no verdict; 5 seeds or more are customary"
        return
    margin, unit = amount(plan.margin)
    if plan.sigma is not None:
        needed = seeds_needed_for_equivalence(amount(plan.sigma)[0], margin, power=POWER)
        if needed is None or needed > seeds:
            yield (
                f"{seeds} seeds: to show that two arms match within {plan.margin}, when they do and differences "
                f"spread by {plan.sigma} over seeds, takes {needed or 'more than 100,000'} seeds at {POWER:.0%} power, "
                "and more in a table of several comparisons"
            )
        return
    # the largest spread that so many seeds can deal with, by halving an interval
    low, high = 0.0, margin * seeds**0.5
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if power_of_equivalence(middle, margin, seeds) >= POWER else (low, middle)
    yield (
        f"{seeds} seeds show a match within {plan.margin}, at {POWER:.0%} power in a single comparison, only where "
        f"paired differences spread by at most {written(float(f'{low:.2g}'), unit)} over seeds"
    )
