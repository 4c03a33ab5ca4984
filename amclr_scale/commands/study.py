"""Run a study: arms x batch sizes x seeds from one plan, with what is held equal, and a report at the end.

    amclr-scale study mini_amclr

Finished cells are skipped, broken ones go on, failing ones are recorded. Exit codes: 0 all cells are finished, 1 some
failed, 2 a mistake in the plan, told in words, 75 asked to end: the same command goes on.
"""

import argparse
import contextlib
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amclr_scale.commands.words import command_parser, refused
from amclr_scale.errors import UserError

if TYPE_CHECKING:
    from amclr_scale.study.planning.plan import StudyPlan
    from amclr_scale.study.planning.planned import Planned
    from amclr_scale.study.running.folder import StudyFolder


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    from amclr_scale.study.planning.help import describe

    parser = command_parser("study", __doc__, describe())
    parser.add_argument("plan", metavar="PLAN", help="YAML file, or the name of a shipped plan, such as mini_amclr")
    parser.add_argument(
        "words", nargs="*", default=[], metavar="key=value", help="overrides of the plan, such as budget.epochs=4"
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--dry-run", action="store_true", help="check everything, print the cells, stop")
    one.add_argument("--report", action="store_true", help="only write the report of what is there")
    one.add_argument(
        "--publish", metavar="DIR",
        help="only write the report, and into DIR its short form, to be committed: report.md, 3 pictures, report.json",
    )  # fmt: skip
    one.add_argument("--pilot", action="store_true", help="only measure samples/s of every arm and batch size")
    one.add_argument("--slurm", metavar="DIR", help="write job arrays into DIR instead of running; submits nothing")
    parser.add_argument(
        "--minutes", type=float, metavar="N", default=math.inf,
        help="run a piece of the study: after so long cells save and it ends with 75; the same command goes on, on "
        "another machine too, where the folder is copied. With --dry-run: what a piece will finish",
    )  # fmt: skip
    parser.add_argument("--cells", metavar="PATTERN", help="only cells with such names, as 'sogclr-*-s0'")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    """Everything, with a mistake of the user told in words."""
    try:
        return study(arguments(argv))
    except UserError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # while it plans or reports; cells that run are told to save
        return 128 + signal.SIGINT
    except Exception as error:
        if (told := refused(error, "folder")) is None:
            raise
        print(f"\n{told[1]}", file=sys.stderr, flush=True)
        return told[0]


def study(options: argparse.Namespace) -> int:
    """The flow: plan -> cells -> run those that choose learning rates -> run those that are scored -> report."""
    from amclr_scale.study.planning.cells import base_tree
    from amclr_scale.study.planning.load import load_plan
    from amclr_scale.study.running.corpora import check_corpora, keep_corpora
    from amclr_scale.study.running.folder import StudyFolder
    from amclr_scale.study.running.margin import check_margin
    from amclr_scale.study.running.phases import called, run_phases
    from amclr_scale.study.running.pilot import run_pilot
    from amclr_scale.study.running.preview import hours, piece, preview
    from amclr_scale.study.running.tuning import plan_cells

    if options.report or options.publish:
        return report(reported_folder(options), Path(options.publish) if options.publish else None)
    until = end_of(options.minutes)
    plan = load_plan(Path(options.plan), options.words)
    folder = StudyFolder(plan.place)
    tree = base_tree(plan)
    epoch = epoch_of(plan, tree)
    measures = options.pilot or (plan.held_equal == "wall_clock" and not options.dry_run)
    cells, choices = ([], []) if measures else plan_cells(plan, tree, epoch, folder)
    with contextlib.nullcontext() if options.dry_run else folder.lock():
        if measures:
            piloted = run_pilot(plan, tree, epoch, folder, say)
            if piloted and piloted.interrupted:
                return piloted.exit_code
            cells, choices = plan_cells(plan, tree, epoch, folder)
            if options.pilot:
                say(hours(plan, folder, cells))
                return 0
        chosen = called(cells, options.cells)
        if not chosen:
            raise UserError(f"--cells: no cell is called {options.cells}; names are such as {cells[0].name}")
        folder.check(plan, cells)
        corpora = check_corpora(plan, folder, cells)
        check_margin(plan, folder, cells)
        say(preview(plan, folder, cells, epoch, memory=options.dry_run))
        say(piece(plan, folder, chosen, options.minutes))
        if options.dry_run:
            for choice in choices:
                say(choice.line(plan.criterion.name))
            return 0

        folder.write(plan, tree, cells)
        keep_corpora(folder, corpora)
        if options.slurm:
            return arrays(plan, folder, chosen, cells, Path(options.slurm))
        outcome = run_phases(plan, tree, epoch, folder, cells, say, pattern=options.cells, until=until)
        if outcome.done and not outcome.interrupted:
            report(folder.path)
        return outcome.exit_code


def arrays(
    plan: "StudyPlan", folder: "StudyFolder", chosen: Sequence["Planned"], cells: Sequence["Planned"], target: Path
) -> int:
    """Write job arrays of what can run now, and make features of what has run.

    Raises:
        UserError: nothing can run.
    """
    from amclr_scale.checkpoint.signals import EXIT_RESUMABLE
    from amclr_scale.study.running.features import device_of, make_features, needed, parted
    from amclr_scale.study.running.slurm import write_jobs

    if make_features(folder, chosen, cells, device_of(plan), say).interrupted:
        return EXIT_RESUMABLE
    ready, without = parted(folder, [*{cell.name: cell for cell in [*needed(chosen, cells), *chosen]}.values()])
    if without and all(cell.waits or folder.is_finished(cell) for cell in ready):
        raise UserError(
            f"--slurm: {len(without)} cells lack features of others, which could not be made; "
            f"see {folder.logs}/*.features.log"
        )
    for script in write_jobs(plan, folder, ready, target):
        say(f"sbatch {script}")
    if waiting := sum(cell.waits for cell in cells):
        say(f"{waiting} cells wait for the learning rates that these choose: the same command then writes them")
    if without:
        say(f"{len(without)} cells wait for features of these: the same command then makes them and writes it")
    return 0


def end_of(minutes: float) -> float:
    """By time.monotonic(), when a piece of so many minutes that begins now is over.

    Raises:
        UserError: that is no time.
    """
    if not minutes > 0:
        raise UserError(f"--minutes: expected a number above 0, got {minutes:g}")
    return time.monotonic() + 60 * minutes


def epoch_of(plan: "StudyPlan", tree: Mapping[str, Any]) -> float:
    """Samples per epoch.

    Raises:
        UserError: the data is not usable; with what is wrong with the cells' configurations besides.
    """
    from amclr_scale.study.planning.cells import configuration_mistakes
    from amclr_scale.study.planning.lengths import samples_per_epoch

    try:
        return samples_per_epoch(plan, tree)
    except UserError as error:
        lines = str(error).splitlines()
        lines += [line for line in configuration_mistakes(plan) if not line.startswith(tuple(lines))]
        raise UserError("\n".join(lines)) from error


def reported_folder(options: argparse.Namespace) -> Path:
    """The folder whose report is asked for.

    Raises:
        UserError: something else is asked for that a report would take no notice of.
    """
    from amclr_scale.study.planning.load import plan_tree

    tree = plan_tree(Path(options.plan), options.words)
    folder = Path(tree.get("folder") or f"studies/{tree['name']}")
    lines = [
        f"{word.partition('=')[0]}: a report takes the plan that was run, {folder / 'study.yaml'}, so {word} would "
        "change nothing; leave it out"
        for word in options.words
        if word.partition("=")[0] not in ("folder", "name")
    ]
    lines += ["--cells: a report is of all cells that are there; leave it out"] if options.cells is not None else []
    if lines:
        raise UserError("\n".join(lines))
    return folder


def report(folder: Path, publish: Path | None = None) -> int:
    """Write the report and say where it is.

    Args:
        publish: a folder for its short form as well.
    """
    from amclr_scale.study.report.write import publish_report, write_report

    say(f"report: {publish_report(folder, publish) if publish else write_report(folder)}")
    return 0


def say(line: str) -> None:
    """A line on the console, at once."""
    print(line, flush=True)
