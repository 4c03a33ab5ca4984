"""Whether a plan's margin makes sense beside what its reference scores, asked before anything is compared with it."""

import json
from collections.abc import Sequence
from pathlib import Path

from amclr_scale.errors import UserError
from amclr_scale.study.planning.amounts import MOST_OF_EFFECT, amount, written
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned, reference_of
from amclr_scale.study.running.folder import StudyFolder


def check_margin(plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned]) -> None:
    """Refuse a margin that is more than half of what the reference scores above guessing, while it may still change.

    Tuning cells of the reference count, too, once all of them have run. Where nothing of it has run yet, or something
    else was scored, nothing is said here; the report then says no match.

    Raises:
        UserError: the margin is too wide.
    """
    reference = reference_of(plan, cells)
    finished = [cell for cell in cells if folder.is_finished(cell)]
    of_reference = [cell for cell in finished if (cell.arm, cell.global_batch_size) == reference]
    if any(cell.role == "scored" for cell in finished if cell not in of_reference):
        return
    waiting = [cell for cell in cells if cell.role == "tuning" and cell not in finished]
    if any((cell.arm, cell.global_batch_size) == reference for cell in waiting):
        return  # at another learning rate it may score more; a study that was interrupted is not judged by what it has
    known = [(found, cell.name) for cell in of_reference if (found := _above_guessing(plan, folder.runs / cell.name))]
    if not known:
        return
    (effect, score), name = max(known)
    most = MOST_OF_EFFECT * max(effect, 0.0)
    if plan.equal_within <= most:
        return
    unit = amount(plan.margin)[1]
    shown = [written(round(value, 6), unit).partition(" ")[0] for value in (score, score - effect)]
    raise UserError(
        f"margin: expected at most {written(float(f'{most:.2g}'), unit)}, half of what {name} scores above guessing "
        f"({shown[0]} - {shown[1]}), got {plan.margin}; with more, an arm that has learned half as much would match"
    )


def _above_guessing(plan: StudyPlan, run: Path) -> tuple[float, float] | None:
    """What a run scores in the first outcome above guessing, and what it scores; None where it does not say."""
    results = json.loads((run / "evaluation.json").read_text("utf-8"))
    keys = plan.metrics[0].keys
    if any(key not in results or f"{key}/chance" not in results for key in keys):
        return None
    score, chance = (sum(results[f"{key}{end}"] for key in keys) / len(keys) for end in ("", "/chance"))
    return score - chance, score
