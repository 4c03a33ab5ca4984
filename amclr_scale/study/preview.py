"""What a study is about to do, in words and a table: what is held fixed, the cells, hours, memory, warnings."""

from collections.abc import Sequence

from amclr_scale.config.load import recipe
from amclr_scale.study.cells import Planned, reference_of
from amclr_scale.study.folder import StudyFolder
from amclr_scale.study.plan import StudyPlan
from amclr_scale.study.progress import Rates, duration
from amclr_scale.study.warnings import warnings


def preview(plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned], epoch: float) -> str:
    """All of it, as printed before the first cell and by --dry-run.

    Args:
        plan, folder, cells: the study.
        epoch: samples per epoch.
    """
    arm, batch = reference_of(plan)
    parts = [
        f"study {plan.name} in {folder.path}" + (f": {plan.question}" if plan.question else ""),
        f"{len(cells)} cells, {len(plan.seeds)} seeds; reference {arm} at a global batch of {batch}; "
        f"outcome {plan.metrics[0].name}, equal within +- {plan.margin:g}",
        held(plan, cells, epoch),
        table(cells),
        hours(plan, folder, cells),
    ]
    parts += [f"warning: {line}" for line in warnings(plan, cells, epoch)]
    others = folder.others(cells)
    if others:
        parts.append(f"note: {len(others)} runs in {folder.runs} are no cells of this plan, and stay out of its report")
    return "\n".join(parts)


def held(plan: StudyPlan, cells: Sequence[Planned], epoch: float) -> str:
    """What every cell shares, and what differs."""
    lengths = sorted({cell.samples for cell in cells})
    steps = sorted({cell.steps for cell in cells})
    span = f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"
    lines = [
        f"held equal: {plan.held_equal}; {span} samples = {lengths[0] / epoch:.2f} epochs of {epoch:,.0f}, in "
        f"{steps[0]:,} to {steps[-1]:,} steps"
    ]
    recipes = [recipe(cell.config) for cell in cells]
    keys = sorted({key for one in recipes for key in one})
    different = [key for key in keys if len({repr(one.get(key)) for one in recipes}) > 1]
    lines.append(f"differs between cells: {', '.join(different)}; every other key of the recipe is shared")
    temperatures = sorted({str(one.get("objective.temperature", "none")) for one in recipes})
    lines.append(f"objective.temperature: {', '.join(temperatures)}" + (" (shared)" if len(temperatures) == 1 else ""))
    return "\n".join(lines)


def table(cells: Sequence[Planned]) -> str:
    """One line per arm, batch size and axes; seeds together."""
    head = ("arm", "batch", "axes", "seeds", "samples", "steps", "epochs", "lr", "encoder cost", "negatives", "FLOPs")
    groups: dict[tuple[str, int, str], list[Planned]] = {}
    for cell in cells:
        axes = ", ".join(f"{key}={value}" for key, value in cell.axes.items())
        groups.setdefault((cell.arm, cell.global_batch_size, axes), []).append(cell)
    rows = [head]
    for (arm, batch, axes), group in groups.items():
        one = group[0]
        rows.append((
            arm, f"{batch}", axes or "-", f"{len(group)}", f"{one.samples:,}", f"{one.steps:,}", f"{one.epochs:.2f}",
            f"{one.lr:.3g}", f"{one.encoder_cost:g}", f"{one.negatives:,}",
            "unknown" if one.flops is None else f"{one.flops:.3g}",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  " + "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip


def hours(plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned]) -> str:
    """How long it will take, from cells that have run."""
    rates = Rates(folder, cells)
    left = [cell for cell in cells if not folder.is_finished(cell)]
    if not left:
        return "every cell is finished"
    done = len(cells) - len(left)
    predicted = [rates.predict(cell) for cell in left]
    known = [seconds for seconds in predicted if seconds is not None]
    if len(known) < len(predicted):
        return f"{done} cells are finished; time for the others: unknown until a cell has run"
    return (
        f"{done} cells are finished; about {duration(sum(known) / plan.execution.jobs)} for the others, "
        f"{plan.execution.jobs} at once, from measured ones"
    )
