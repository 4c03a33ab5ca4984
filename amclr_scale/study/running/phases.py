"""A study in phases: cells that others read features of, those that choose learning rates, those that are scored."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.features import device_of, make_features, needed, parted
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
    outcome = Outcome(0, (), False)

    def run(some: Sequence[Planned]) -> Outcome:
        there, without = parted(folder, some)
        failed = tuple(cell.name for cell in without)
        for cell in without:
            say(f"{cell.name}: not started, for there are no features of {cell.features and cell.features.of}")
        ended = Runner(plan, folder, there, say, make_command, until).run() if there else Outcome(0, (), False)
        return ended + Outcome(0, failed, False)

    first = needed(called(cells, pattern), cells)
    if first:
        outcome += run(first)
        if not outcome.interrupted:
            outcome += make_features(folder, called(cells, pattern), cells, device_of(plan), say, until)

    def rest(role: str) -> list[Planned]:
        early = {cell.name for cell in first}
        return [cell for cell in called(cells, pattern) if cell.role == role and cell.name not in early]

    tuning = rest("tuning")
    if tuning and not outcome.interrupted:
        outcome += run(tuning)
    if tuning and not outcome.interrupted:
        cells, choices = plan_cells(plan, tree, epoch, folder)
        for choice in choices:
            say(choice.line(plan.criterion.name))
        folder.write(plan, tree, cells)
        check_margin(plan, folder, cells)
    scored = rest("scored")
    ready = [cell for cell in scored if not cell.waits]
    if ready and not outcome.interrupted:
        outcome += run(ready)
    waits = f"; {len(scored) - len(ready)} wait for a learning rate" if len(ready) < len(scored) else ""
    failed = f"; failed: {', '.join(outcome.failed)}" if outcome.failed else ""
    say(f"{outcome.done} of {len(first) + len(tuning) + len(scored)} cells are finished{waits}{failed}")
    return outcome
