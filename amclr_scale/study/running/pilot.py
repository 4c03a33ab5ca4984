"""Samples per second of every arm at every batch size, from a few steps on this machine.

A study that holds the wall clock equal has to know them before it can say how long its cells train. They are measured
once, as many cells at a time as the study will run, and kept in the study's folder.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amclr_scale.config.load import merge
from amclr_scale.errors import UserError
from amclr_scale.study.planning.cells import make_cells
from amclr_scale.study.planning.plan import Reference, StudyPlan, Tuning
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.run import Outcome, Runner

WARM_UP = 3  # steps


def pilot_plan(plan: StudyPlan) -> StudyPlan:
    """The same study with one seed, without evaluation, with every step logged, and without arms that read features of
    others: there are none yet.
    """
    execution, arms = plan.execution, [arm for arm in plan.arms if arm.features_of is None]
    words = (*execution.words, "run.log_every_steps=1")
    changed = {
        "seeds": plan.seeds[:1], "tuning": Tuning(seeds=[]), "metrics": [],
        "arms": arms, "reference": Reference(arm=arms[0].name) if len(arms) < len(plan.arms) else plan.reference,
        "execution": execution.model_copy(update={"words": words}),
    }  # fmt: skip
    return plan.model_copy(update=changed)


def unmeasured(plan: StudyPlan) -> str:
    """What a pilot leaves out, in words; "": nothing."""
    names = [arm.name for arm in plan.arms if arm.features_of]
    what = f"{', '.join(names)}: trained beside features that a cell of this study has yet to make"
    return f"; without {what}" if names else ""


def run_pilot(
    plan: StudyPlan, tree: Mapping[str, Any], epoch: float, folder: StudyFolder, say: Callable[[str], None]
) -> Outcome | None:
    """Measure what is not measured yet, and write `rates.json`; None when nothing was missing.

    Raises:
        UserError: a pilot failed, as its cells would.
    """
    short, place = pilot_plan(plan), StudyFolder(folder.path / "pilot")
    silent = merge(dict(tree), {"evaluation": {"splits": [], "probes": []}})
    every = make_cells(short, silent, epoch, steps=plan.budget.pilot_steps)
    cells = list({cell.setting: cell for cell in reversed(every)}.values())[::-1]  # at one learning rate of a sweep
    missing = [cell for cell in cells if cell.setting not in folder.rates]
    if not missing:
        return None
    say(f"pilot: {plan.budget.pilot_steps} steps of each of {len(missing)} arms and batch sizes{unmeasured(plan)}")
    place.write(short, silent, cells)
    outcome = Runner(short, place, missing, say).run()
    if outcome.failed:
        raise UserError(f"--pilot: the pilot of {', '.join(outcome.failed)} failed; its log is in {place.logs}")
    measured = {cell.setting: rate(place.records(cell.name)) for cell in missing if place.is_finished(cell)}
    folder.write_rates({**folder.rates, **measured})
    return outcome


def rate(records: Sequence[Mapping[str, Any]]) -> float:
    """Samples per second over the steps behind the warm-up, each of which was logged."""
    steps = [record for record in records if record["step"] > WARM_UP]
    seconds = samples = 0.0
    for before, now in itertools.pairwise(steps):
        samples += now["samples"] - before["samples"]
        seconds += (now["samples"] - before["samples"]) / now["samples_per_second"]
    return samples / seconds
