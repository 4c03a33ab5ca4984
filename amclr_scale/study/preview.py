"""What a study is about to do, in words and a table: what is held fixed, the cells, hours, memory, warnings."""

from collections.abc import Sequence

from amclr_scale.study.cells import Planned, predicted_gib, reference_of
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
    arm, batch = reference_of(plan, cells)
    parts = [
        f"study {plan.name} in {folder.path}" + (f": {plan.question}" if plan.question else ""),
        f"{len(cells)} cells, {len(plan.seeds)} seeds; reference {arm} at a global batch of {batch}; "
        f"outcome {plan.metrics[0].name}, equal within +- {plan.margin:g}",
        held(plan, cells, epoch),
        table(plan, cells, epoch),
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
    said = [dict(word.split("=", 1) for word in cell.words) for cell in cells]
    keys = sorted({key for words in said for key in words})
    different = [key for key in keys if len({words.get(key) for words in said}) > 1]
    lines.append(f"differs between cells: {', '.join(different)}; the rest of the recipe is shared")
    temperatures = {str(cell.config.objective.get("temperature")) for cell in cells} - {"None"}
    learned = sorted({cell.arm for cell in cells if cell.config.objective.get("temperature") is None})
    shared = ", ".join([*sorted(temperatures), *([f"learned by {', '.join(learned)}"] if learned else [])])
    lines.append(f"temperature: {shared}")
    return "\n".join(lines)


def table(plan: StudyPlan, cells: Sequence[Planned], epoch: float) -> str:
    """One line per arm, batch size and axes; seeds together."""
    head = (
        "arm", "batch", "axes", "seeds", "samples", "steps", "epochs", "lr", "encoder cost", "negatives",
        "encoder FLOPs", "similarity FLOPs", "GiB per rank",
    )  # fmt: skip
    variants: dict[str, list[Planned]] = {}
    for cell in cells:
        variants.setdefault(cell.variant, []).append(cell)
    rows = [head]
    for seeds in variants.values():
        one = seeds[0]
        encoders, similarities = one.flops
        rows.append((
            one.arm, f"{one.global_batch_size}", ", ".join(f"{key}={value}" for key, value in one.axes.items()) or "-",
            f"{len(seeds)}", f"{one.samples:,}", f"{one.steps:,}", f"{one.epochs:.2f}", f"{one.lr:.3g}",
            f"{one.encoder_cost:g}", f"{one.negatives:,}", f"{encoders:.3g}", f"{similarities:.3g}",
            f"{predicted_gib(plan, one, epoch):.2f}",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


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
