"""A study in two phases: first the cells that choose learning rates, then those that are scored at them."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amclr_scale.study.planning.cells import Planned
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.margin import check_margin
from amclr_scale.study.running.run import Command, Outcome, Runner, command
from amclr_scale.study.running.tuning import plan_cells


def called(cells: Sequence[Planned], pattern: str | None) -> list[Planned]:
    """The cells that were asked for."""
    return [cell for cell in cells if fnmatch.fnmatchcase(cell.name, pattern or "*")]


def run_phases(
    plan: StudyPlan, tree: Mapping[str, Any], epoch: float, folder: StudyFolder, cells: Sequence[Planned],
    say: Callable[[str], None], *, pattern: str | None = None, make_command: Command = command,
    until: float = math.inf,
) -> Outcome:  # fmt: skip
    """Run what is not finished.

    Args:
        plan, tree, epoch: the study.
        folder: its folder, written.
        cells: all of them.
        say: takes a line for the user.
        pattern: names of the cells that are to run; None: all.
        make_command: of a cell; another one in tests.
        until: by time.monotonic(), when to end.

    Raises:
        UserError: the tuning cells show that the margin is too wide, or lack what they are to be judged by.
    """
    chosen = called(cells, pattern)
    outcome = Outcome(0, (), False)
    tuning = [cell for cell in chosen if cell.role == "tuning"]
    if tuning:
        outcome = Runner(plan, folder, tuning, say, make_command, until).run()
    if tuning and not outcome.interrupted:
        cells, choices = plan_cells(plan, tree, epoch, folder)
        for choice in choices:
            say(choice.line(plan.criterion.name))
        folder.write(plan, tree, cells)
        check_margin(plan, folder, cells)
    scored = [cell for cell in called(cells, pattern) if cell.role == "scored"]
    ready = [cell for cell in scored if not cell.waits]
    if ready and not outcome.interrupted:
        outcome += Runner(plan, folder, ready, say, make_command, until).run()
    waits = f"; {len(scored) - len(ready)} wait for a learning rate" if len(ready) < len(scored) else ""
    failed = f"; failed: {', '.join(outcome.failed)}" if outcome.failed else ""
    say(f"{outcome.done} of {len(tuning) + len(scored)} cells are finished{waits}{failed}")
    return outcome
