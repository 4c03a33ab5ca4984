"""Train a dual encoder from one configuration file.

    deepspeed launch/train.py --config configs/quickstart.yaml train.global_batch_size=1024 objective.name=sogclr

The same words follow `torchrun launch/train.py`, `srun` or, for one rank, `amclr-scale train`. Exit codes: 0 done,
1 failed, 2 a mistake in the configuration, the data or the command, told in words, 75 ended early by Ctrl-C, SIGTERM,
SIGUSR1 or train.max_hours with all its state saved: the same command with resume=auto goes on. A second signal ends it
at once. A run whose last checkpoint could not be written has failed.
"""

import argparse
import json
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from amclr_scale.checkpoint.mirror import check_remote
from amclr_scale.checkpoint.signals import EXIT_RESUMABLE, Signals, StoppedError, UnsavedError
from amclr_scale.commands.words import command_parser, refused
from amclr_scale.config.help import describe
from amclr_scale.config.load import dump, load
from amclr_scale.config.schema import Config
from amclr_scale.distributed.launcher import SUPERVISED, RankInfo, end_with_launcher, read_rank_info, when_runner_ends
from amclr_scale.errors import AbsentError, AgreedError, UserError
from amclr_scale.metrics.run_folder import check_writable
from amclr_scale.metrics.stopwatch import Stopwatch
from amclr_scale.metrics.trackers import check_trackers

if TYPE_CHECKING:
    from amclr_scale.commands.job import Job


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line: a file, words that override its keys, and what launchers add."""
    parser = command_parser("train", __doc__, describe())
    parser.add_argument(
        "--config", help="YAML file, or a shipped one's name, such as quickstart; default: the schema's"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what the run will need, stop")
    dry = parser.add_argument_group("with --dry-run")
    dry.add_argument("--ranks", type=int, metavar="W", help="as if the run had W ranks")
    dry.add_argument("--device", metavar="NAME", help="as if on h100, a100-40gb, ...: memory, samples/s, hours")
    dry.add_argument("--num-samples", type=int, metavar="N", help="where the training data is not here: its size")
    dry.add_argument("--verbose", action="store_true", help="also print the resolved configuration")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed passes it; LOCAL_RANK says the same
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides, such as optimizer.lr=1e-3")
    return parser.parse_intermixed_args(argv)


def started(config: Config, world_size: int) -> Config:
    """The recipe with what a model to start from settles; that needs torch, and a recipe without one does not.

    Raises:
        UserError: there is no such model, or keys contradict it.
    """
    if config.model.init is None and config.resume == "never":
        return config
    from amclr_scale.checkpoint.own_files import settled

    return settled(config, world_size)


def check_dry_run(options: argparse.Namespace) -> None:
    """Refuse what only --dry-run reads, without it, and numbers that are none.

    Raises:
        UserError: naming the option.
    """
    for name in ("ranks", "device", "num_samples", "verbose"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if value and not options.dry_run:
            raise UserError(f"{option}: expected it beside --dry-run; a run's ranks and device are those it starts on")
        if name in ("ranks", "num_samples") and value is not None and value < 1:
            raise UserError(f"{option}: expected at least 1, got {value}")


def run(config: Config, source: str | None, rank_info: RankInfo, stopwatch: Stopwatch, signals: Signals) -> None:
    """The flow: data -> processes, which agree -> encoders, objective, engine -> loop with its hooks -> results."""
    from amclr_scale.commands.agreement import check_ranks_agree
    from amclr_scale.commands.job import build_job, prepare
    from amclr_scale.distributed.process_group import start, stop
    from amclr_scale.distributed.rendezvous import announce
    from amclr_scale.distributed.watchdog import Watchdog

    stopwatch.lap("imports")

    # Data first: mistakes in it are found before any process waits for another.
    announcer = announce(rank_info, config.run.rendezvous_minutes)
    config = started(config, rank_info.world_size)  # may fetch a model
    prepared = prepare(config, rank_info)
    stopwatch.lap("data")
    device = start(rank_info, config.execution.threads, config.run, announcer)
    if not rank_info.counted:
        rank_info = read_rank_info()  # they have been
    watchdog = Watchdog(rank_info, limit=60 * config.run.watch_minutes)
    try:
        check_ranks_agree(config, prepared)
        job = build_job(
            config, source, prepared, rank_info=rank_info, device=device, signals=signals, stopwatch=stopwatch
        )
        carry_out(job)
    except (AgreedError, StoppedError, UnsavedError):
        watchdog.leave()  # all ranks end at one place: none of them is missing
        raise
    except UserError as error:
        signals.failed = True
        watchdog.announce(str(error))  # others may wait for this rank in a collective
        raise
    job.inputs.loader.close()
    watchdog.leave()
    stop()


def carry_out(job: "Job") -> None:
    """Train, from a checkpoint if one was found, and leave the results. All ranks call it together."""
    from amclr_scale.checkpoint.state import restore
    from amclr_scale.commands.job import hooks_of
    from amclr_scale.engine.loop import train
    from amclr_scale.metrics.run_folder import set_aside_results

    hooks = hooks_of(job)
    if job.found:
        trainer = job.trainer
        restore(job.found.checkpoint, trainer.engine, trainer.objective, job.device, hooks, trainer.teacher)
        if job.delivery:
            job.delivery.forget()
        job.stopwatch.lap("checkpoint")

    with job.lock:
        with job.log, ExitStack() as entered:
            for hook in hooks:
                entered.enter_context(hook)
            entered.push(job.signals.note_failure)  # before the hooks, whose farewell takes a while
            for words in job.introduction():
                job.log.say(words)
            job.signals.saves = job.begin < job.inputs.plan.total_steps
            if job.signals.saves and job.speaks and (aside := set_aside_results(job.folder)):
                job.log.say(f"note: results of this run's earlier end are in {aside} now")
            conclude(job, train(job.step, iter(job.inputs.loader), job.inputs.plan, hooks, begin=job.begin))
        if job.delivery:
            job.delivery.finish()


def conclude(job: "Job", results: dict[str, float]) -> None:
    """Leave the model and its numbers in the run folder. All ranks call it together."""
    from amclr_scale.evaluation.items import FILE, save_items
    from amclr_scale.evaluation.sheet import NOTHING, file_names
    from amclr_scale.metrics.curve import draw_if_possible
    from amclr_scale.trained.weights import save_weights

    folder, log, evaluator = job.folder, job.log, job.evaluator
    trainer = job.trainer
    save_weights(folder, trainer.model, trainer.objective, speaks=job.speaks, teacher=trainer.teacher)
    rows = job.config.evaluation.sheet
    sheets = evaluator.sheets(trainer.engine, rows) if evaluator and rows else {}
    suites, tables = job.suites(trainer.engine, job.config, folder) if job.suites.suites else ({}, "")
    if not job.speaks:
        return
    own, results = results, {**results, **suites}
    if tables:
        log.say(tables)
    if evaluator:
        save_items(folder / FILE, evaluator.numbers)
        log.say(f"{evaluator.table(own)}\n\nmeasured in {job.config.execution.precision}, as trained")
    (folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")  # the sign of a finished run
    for name, file in file_names(sheets).items():
        sheets[name].save(folder / file)
        log.picture(f"sheet/{name}", folder / file)
        log.say(f"captions found and missed on {name} {folder / file}")
    if rows and evaluator and not sheets:
        log.say(NOTHING)
    curve, words = draw_if_possible(folder)
    if curve:
        log.picture("learning_curve", curve)
    log.say(words)
    log.say(f"run folder {folder}")


def run_to_end(config: Config, source: str | None, rank_info: RankInfo, stopwatch: Stopwatch, signals: Signals) -> int:
    """Run; the exit code, with what all ranks end for together told once: by rank 0, or once per node.

    A run that was asked to end and is saved ends the process here, so that no signal can change its exit code.
    """
    from amclr_scale.distributed.process_group import stop

    try:
        run(config, source, rank_info, stopwatch, signals)
        return 0
    except StoppedError as stopped:
        code, speaks, words = EXIT_RESUMABLE, rank_info.rank == 0, str(stopped)
    except UnsavedError as error:
        code, speaks, words = 1, rank_info.rank == 0, str(error)
    except AgreedError as error:
        code, speaks, words = 2, rank_info.local_rank == 0, str(error)
    except AbsentError as error:
        code, speaks, words = 1, rank_info.local_rank == 0, str(error)
    signals.failed = code != EXIT_RESUMABLE
    if speaks:
        print(f"\n{words}", file=sys.stderr, flush=True)
    stop()  # together: a launcher ends the others as soon as one has left
    if code == EXIT_RESUMABLE:
        signals.leave(code)
    return code


def tell_waiting(rank_info: RankInfo, words: str, code: int) -> None:
    """Ranks that wait for this one to join them end with these words; those that it has joined have been told."""
    if rank_info.world_size == 1:
        return
    import torch.distributed as dist

    from amclr_scale.distributed.launcher import export
    from amclr_scale.distributed.rendezvous import tell_others

    if not dist.is_initialized():
        with suppress(UserError):  # an address that nobody knows
            export(rank_info)
        tell_others(rank_info, words, code)


def end_if_refused(rank_info: RankInfo, error: Exception) -> None:
    """Tell ranks that wait for this one why it fails; end here, in words, where a file system refused something."""
    told = refused(error, "run.folder")
    tell_waiting(rank_info, told[1] if told else f"{type(error).__name__}: {error}", told[0] if told else 1)
    if told is not None:
        print(f"\n{told[1]}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(told[0])


def main(argv: list[str]) -> int:
    """Check everything that can be checked without torch, then run."""
    stopwatch, signals = Stopwatch(), Signals()
    options = arguments(argv)
    rank_info = RankInfo()
    try:
        rank_info = read_rank_info()
        if rank_info.world_size > 1 or SUPERVISED in os.environ:
            end_with_launcher()  # before the seconds that imports take
        check_dry_run(options)
        config = load(options.config, options.words, options.ranks or rank_info.world_size)
        check_writable(config)
        if rank_info.rank == 0:
            check_trackers(config)
            check_remote(config)
        if options.dry_run:
            config = started(config, options.ranks or rank_info.world_size)
            if rank_info.rank == 0:
                from amclr_scale.commands.preview import preview

                if options.verbose:
                    print(dump(config))
                for said in preview(config, rank_info, options):
                    print(said, flush=True)
            return 0
        signals.speaks = rank_info.rank == 0
        with signals:
            if rank_info.local_rank == 0 and rank_info.world_size > 1:
                when_runner_ends(signals.ask)
            return run_to_end(config, options.config, rank_info, stopwatch, signals)
    except UserError as error:
        # Every rank meets the same mistake, as a rule, and one voice per node is enough: the others give it time to
        # speak and the launcher time to end them. One that is alive after that has met a mistake of its own.
        if rank_info.local_rank:
            tell_waiting(rank_info, str(error), 2)
            time.sleep(5)
        print(f"\n{error}", file=sys.stderr, flush=True)
        if not rank_info.local_rank:
            tell_waiting(rank_info, str(error), 2)
        # Others may be waiting in a collective: leaving at once, without Python's own farewell, ends them too.
        sys.stdout.flush()
        os._exit(2)
    except Exception as error:
        end_if_refused(rank_info, error)
        raise
    except KeyboardInterrupt:  # before signals are listened to, or while a dry run reads
        return 128 + signal.SIGINT
