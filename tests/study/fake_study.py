"""A study of fake cells, here or as a process of its own, for tests that end it.

python -m tests.study.fake_study PLAN FOLDER HOW [key=value ...]
"""

import math
import sys
from pathlib import Path

from amclr_scale.study.planning.cells import base_tree, make_cells
from amclr_scale.study.planning.load import load_plan
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.run import Outcome, Runner

FAKE = str(Path(__file__).with_name("fake_training.py"))


def fake_command(_: StudyPlan, folder: StudyFolder, cell: Planned, slot: int, how: str = "done") -> list[str]:
    return [sys.executable, "-S", FAKE, str(folder.runs / cell.name), cell.recipe_hash, how]


def run_fakes(
    plan: StudyPlan, cells: list[Planned], how: dict[str, str], said: list[str] | None = None, until: float = math.inf
) -> Outcome:
    """Run cells that behave as `how` says by name, `done` where it says nothing."""

    def make_command(plan: StudyPlan, folder: StudyFolder, cell: Planned, slot: int) -> list[str]:
        return fake_command(plan, folder, cell, slot, how.get(cell.name, "done"))

    place = StudyFolder(plan.place)
    with place.lock():
        place.write(plan, {}, [])  # counting operations takes longer than all the cells
        return Runner(plan, place, cells, (said if said is not None else []).append, make_command, until).run()


def main(file: str, folder: str, how: str, *words: str) -> int:
    """The first two cells behave as `how` says."""
    plan = load_plan(Path(file), [f"folder={folder}", "execution.jobs=2", *words])
    cells = make_cells(plan, base_tree(plan), 4938.0)
    return run_fakes(plan, cells, {"clip-B32-s0": how, "clip-B64-s0": how}).exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
