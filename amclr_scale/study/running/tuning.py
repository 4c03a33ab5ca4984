"""Learning rates that tuning cells have chosen: by one number, on seeds that no verdict uses."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amclr_scale.errors import UserError
from amclr_scale.study.planning.cells import make_cells
from amclr_scale.study.planning.plan import SWEPT, StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.folder import StudyFolder


@dataclass(frozen=True)
class Choice:
    """What the tuning cells of one arm at one batch size have chosen.

    Attributes:
        rate: the one with the highest mean.
        scores: means over the tuning seeds by rate; a rate at which a cell failed has none.
    """

    setting: str
    rate: Any
    scores: Mapping[Any, float]
    failed: tuple[Any, ...]

    def line(self, criterion: str) -> str:
        """In words."""
        scores = ", ".join(f"{rate}: {score:.4g}" for rate, score in self.scores.items())
        failed = f"; failed at {', '.join(map(str, self.failed))}" if self.failed else ""
        return f"{self.setting}: {SWEPT} {self.rate}, by {criterion} ({scores}){failed}"


def choose(plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned]) -> list[Choice]:
    """The choices that can be made: where every tuning cell is finished or has failed, and one rate has all seeds.

    Raises:
        UserError: a finished tuning cell has no such result.
    """
    settings: dict[str, dict[Any, list[Planned]]] = {}
    for cell in cells:
        if cell.role == "tuning":
            settings.setdefault(cell.setting, {}).setdefault(cell.axes[SWEPT], []).append(cell)
    sign, found = -1 if plan.criterion.lower_is_better else 1, []
    for setting, rates in settings.items():
        scores, failed, open_ = {}, [], False
        for rate, same in rates.items():
            finished = [cell for cell in same if folder.is_finished(cell)]
            if len(finished) == len(same):
                scores[rate] = sum(_score(plan, folder, cell) for cell in same) / len(same)
            elif any(folder.has_failed(cell) for cell in same if cell not in finished):
                failed.append(rate)
            else:
                open_ = True
        if scores and not open_:
            best = max(scores, key=lambda rate: sign * scores[rate])
            found.append(Choice(setting, best, scores, tuple(failed)))
    return found


def _score(plan: StudyPlan, folder: StudyFolder, cell: Planned) -> float:
    file = folder.runs / cell.name / "evaluation.json"
    results, keys = json.loads(file.read_text("utf-8")), plan.criterion.keys
    absent = [key for key in keys if results.get(key) is None]
    if absent:
        raise UserError(f"tuning.metric: {file} has no {', '.join(absent)}, by which a learning rate would be chosen")
    return float(sum(results[key] for key in keys) / len(keys))


def plan_cells(
    plan: StudyPlan, tree: Mapping[str, Any], epoch: float, folder: StudyFolder
) -> tuple[list[Planned], list[Choice]]:
    """All cells, with the learning rates that what has run in the folder chooses.

    Raises:
        UserError: as `make_cells` and `choose`.
    """
    cells = make_cells(plan, tree, epoch, rates=folder.rates)
    choices = choose(plan, folder, cells)
    if choices:
        chosen = {one.setting: one.rate for one in choices}
        cells = make_cells(plan, tree, epoch, rates=folder.rates, chosen=chosen)
    return cells, choices
