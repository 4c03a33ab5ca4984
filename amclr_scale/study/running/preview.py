"""What a study is about to do, in words and a table: what is held fixed, the cells, hours, memory, warnings."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from amclr_scale.config.schema import Config
from amclr_scale.data.names import known_as
from amclr_scale.study.planning.cells import predicted_gib
from amclr_scale.study.planning.plan import Expected, StudyPlan
from amclr_scale.study.planning.planned import Planned, reference_of
from amclr_scale.study.planning.warnings import warnings
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.pilot import unmeasured
from amclr_scale.study.running.progress import Rates, duration
from amclr_scale.study.running.run import waiting


def preview(
    plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned], epoch: float, *, memory: bool = True
) -> str:
    """All of it, as printed before the first cell and by --dry-run.

    Args:
        plan, folder, cells: the study.
        epoch: samples per epoch.
        memory: also predict memory, which takes seconds per arm.
    """
    arm, batch = reference_of(plan, cells)
    gib = {one.variant: predicted_gib(plan, one, epoch) for one in first_seeds(cells)} if memory else {}
    parts = [
        f"study {plan.name} in {folder.path}" + (f": {plan.question}" if plan.question else ""),
        f"{len(cells)} cells{tuned(plan, cells)}, {len(plan.seeds)} seeds; reference {arm} at a global batch of "
        f"{batch}; outcome {plan.metrics[0].name}, equal within +- {plan.margin}",
        held(plan, cells, epoch),
        table(cells, gib),
        hours(plan, folder, cells),
    ]
    parts += [f"needs: {plan.needs.strip()}"] if plan.needs else []
    parts += [f"warning: {line}" for line in warnings(plan, cells, epoch, gib)]
    others = folder.others(cells)
    if others:
        parts.append(f"note: {len(others)} runs in {folder.runs} are no cells of this plan, and stay out of its report")
    return "\n".join(parts)


def tuned(plan: StudyPlan, cells: Sequence[Planned]) -> str:
    """How many cells choose learning rates, and by what."""
    tuning = sum(cell.role == "tuning" for cell in cells)
    if not tuning:
        return ""
    seeds = ", ".join(map(str, plan.tuning_seeds))
    return (
        f": {tuning} on seeds {seeds} choose a learning rate by {plan.criterion.name}, then {len(cells) - tuning} are "
        "scored at it"
    )


def first_seeds(cells: Sequence[Planned]) -> list[Planned]:
    """One cell of every variant, and of both of its roles."""
    return list({(cell.variant, cell.role): cell for cell in reversed(cells)}.values())[::-1]


def held(plan: StudyPlan, cells: Sequence[Planned], epoch: float) -> str:
    """What every cell shares, and what differs."""
    samples = _from_to([cell.samples for cell in cells], ",")
    epochs = _from_to([cell.epochs for cell in cells], ".4g")
    steps = _from_to([cell.steps for cell in cells], ",")
    lines = [
        f"held equal: {plan.held_equal}; {samples} samples = {epochs} epochs of {epoch:,.0f}, in {steps} steps",
    ]
    longer = [f"{arm.name} x {arm.budget_factor:g}" for arm in plan.arms if arm.budget_factor != 1]
    lines += [f"another share of the budget: {', '.join(longer)}"] if longer else []
    features = [f"{arm.name} of {arm.features_of}" for arm in plan.arms if arm.features_of]
    lines += [f"features of other cells, which run first: {', '.join(features)}"] if features else []
    lines.append(f"shared: {', '.join(_shared(cells))}")
    said = [dict(word.split("=", 1) for word in cell.words) for cell in cells]
    keys = sorted({key for words in said for key in words})
    different = [key for key in keys if len({words.get(key) for words in said}) > 1]
    lines.append(f"differs between cells: {', '.join(different)}; the rest of the recipe is shared")
    temperatures = {str(cell.config.objective.get("temperature")) for cell in cells} - {"None"}
    learned = sorted({cell.arm for cell in cells if cell.config.objective.get("temperature") is None})
    shared = ", ".join([*sorted(temperatures), *([f"learned by {', '.join(learned)}"] if learned else [])])
    lines.append(f"temperature: {shared}")
    return "\n".join(lines)


def _from_to(numbers: Sequence[float], form: str) -> str:
    least, most = format(min(numbers), form), format(max(numbers), form)
    return least if least == most else f"{least} to {most}"


def _shared(cells: Sequence[Planned]) -> Iterator[str]:
    """Data, towers and optimizer, as far as all cells have the same."""

    def same(tell: Callable[[Config], str]) -> list[str]:
        told = {tell(cell.config) for cell in cells}
        return [*told] if len(told) == 1 else []

    yield from same(lambda config: f"data {', '.join(known_as(config.data.train))}")
    yield from same(
        lambda config: f"{config.model.image.name} from {'given' if config.model.image.weights else 'random'} weights"
    )
    yield from same(
        lambda config: f"{config.model.text.name} from {'given' if config.model.text.pretrained else 'random'} weights"
    )
    yield from same(lambda config: f"{config.optimizer.name}, weight decay {config.optimizer.weight_decay:g}")
    yield from same(lambda config: f"{config.optimizer.schedule} schedule")


def table(cells: Sequence[Planned], gib: Mapping[str, float]) -> str:
    """One line per arm, batch size and axes; seeds together.

    Args:
        cells: all of them.
        gib: predicted peak memory per rank, by variant; empty: no such column.
    """
    head = (
        "arm", "batch", "axes", *(["for"] if any(cell.role == "tuning" for cell in cells) else []), "seeds",
        "samples", "steps", "epochs", "lr", "encoder cost", "negatives",
        "encoder FLOPs", "similarity FLOPs", *(["GiB per rank"] if gib else []),
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for one in first_seeds(cells):
        encoders, similarities = one.flops
        rows.append((
            one.arm, f"{one.global_batch_size}", ", ".join(f"{key}={value}" for key, value in one.axes.items()) or "-",
            *(["tuning" if one.role == "tuning" else "verdicts"] if "for" in head else []),
            f"{sum((other.variant, other.role) == (one.variant, one.role) for other in cells)}", f"{one.samples:,}",
            f"{one.steps:,}", f"{one.epochs:.2f}", "chosen" if one.waits else f"{one.lr:.3g}",
            f"{one.encoder_cost:g}", f"{one.negatives:,}", f"{encoders:.3g}",
            f"{similarities:.3g}", *([f"{gib[one.variant]:.2f}"] if gib else []),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def hours(plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned]) -> str:
    """How long it will take: from cells that have run, else as the plan expects."""
    rates = Rates(folder, cells)
    left = [cell for cell in cells if not folder.is_finished(cell)]
    done = len(cells) - len(left)
    if not left:
        return "every cell is finished"
    predicted = [rates.predict(cell) for cell in left]
    known = [seconds for seconds in predicted if seconds is not None]
    lines = [f"{done} cells are finished"] if done else []
    if len(known) == len(predicted):
        jobs = plan.execution.jobs
        lines.append(f"time: about {duration(sum(known) / jobs)} for the others, {jobs} at once, from measured ones")
    else:
        lacking = [cell for cell in left if cell.setting not in folder.rates]
        timed, helps = [cell for cell in left if cell not in lacking], any(not cell.features for cell in lacking)
        further = unmeasured(plan) if lacking else ""
        offer = f"; --pilot measures samples/s in {plan.budget.pilot_steps} steps of every arm and batch size{further}"
        lines.append(f"time: unknown until a cell has run{offer if helps else ''}")
        if timed and not helps:
            seconds = sum(cell.samples / folder.rates[cell.setting] for cell in timed) / plan.execution.jobs
            lines.append(
                f"by the pilot's samples/s: {duration(seconds)} of training, {plan.execution.jobs} at once; start and "
                f"evaluation of every cell come on top{further}"
            )
        if plan.expected:
            lines.append(f"expected: {expectation(plan.expected, left)}")
    return "\n".join(lines)


def piece(plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned], minutes: float) -> str:
    """What so many minutes will finish: by cells that have run, else the pilot's rates, else as the plan expects."""
    if math.isinf(minutes):
        return "in one piece; --minutes N runs so many minutes and saves"
    expected = plan.expected
    if expected and expected.device and plan.execution.device == "cpu":  # which says nothing of this machine
        expected = None
    rates, left = Rates(folder, cells), 60.0 * minutes * plan.execution.jobs
    finished, order = list[str](), waiting(plan, folder, cells)
    for cell in order:
        seconds = rates.predict(cell)
        if seconds is None and cell.setting in folder.rates:
            seconds = cell.samples / folder.rates[cell.setting]
        if seconds is None and expected:
            seconds = plan.execution.jobs * expected_seconds(expected, [cell])
        if seconds is None:
            return f"{minutes:g} minutes: unknown until a cell has run, or --pilot"
        if seconds > left:
            next_one = f"{cell.name} takes about {duration(seconds)} and gets {left / seconds:.0%} of it"
            break
        left -= seconds
        finished.append(cell.name)
    else:
        next_one = "then all are finished"
    named = f" ({finished[0]}{f' to {finished[-1]}' if len(finished) > 1 else ''})" if finished else ""
    return f"{minutes:g} minutes finish {len(finished)} of {len(order)} cells{named}; {next_one}"


def expected_seconds(expected: Expected, cells: Sequence[Planned]) -> float:
    """How long cells take as the plan expects, all its devices at work."""
    if expected.device is None:
        work, rate = sum(cell.samples * cell.encoder_cost for cell in cells), expected.samples_per_second or 0.0
        return work / rate + len(cells) * expected.seconds_per_cell
    from amclr_scale.metrics.devices import find_profile

    peak = find_profile(expected.device).peak(cells[0].config.execution.precision)
    return sum(sum(cell.flops) for cell in cells) / (expected.count * peak * expected.utilisation)


def expectation(expected: Expected, cells: Sequence[Planned]) -> str:
    """The arithmetic from operations, or from a rate, to hours."""
    if expected.device is None:
        work, rate = sum(cell.samples * cell.encoder_cost for cell in cells), expected.samples_per_second or 0.0
        seconds = expected_seconds(expected, cells)
        return (
            f"{work:,.0f} samples through both towers / {rate:g} per second + {len(cells)} cells x "
            f"{expected.seconds_per_cell:g} s = {duration(seconds)}"
        ) + (f" ({expected.measured_on})" if expected.measured_on else "")
    from amclr_scale.metrics.devices import find_profile

    precision = cells[0].config.execution.precision
    peak, flops = find_profile(expected.device).peak(precision), sum(sum(cell.flops) for cell in cells)
    seconds = expected_seconds(expected, cells)
    return (
        f"{flops:.3g} FLOPs / ({expected.count} {expected.device} x {peak:.4g} x {expected.utilisation:g}) = "
        f"{seconds / 3600:.1f} h"
    )
