"""Train a dual encoder from one configuration file.

    deepspeed launch/train.py --config configs/quickstart.yaml train.global_batch_size=1024 objective.name=sogclr

The same words follow `torchrun launch/train.py`, `srun` or, for one rank, `amclr-scale train`. Exit codes: 0 done,
1 failed, 2 a mistake in the configuration, the data or the command, told in words, 75 ended early by SIGTERM, SIGUSR1
or train.max_hours with all its state saved: the same command with resume=auto goes on.
"""

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from amclr_scale.checkpoint.signals import EXIT_RESUMABLE, Signals, StoppedError
from amclr_scale.config.help import describe
from amclr_scale.config.load import dump, load
from amclr_scale.config.schema import Config
from amclr_scale.distributed.launcher import RankInfo, end_with_launcher, export, read_rank_info
from amclr_scale.errors import UserError
from amclr_scale.metrics.run_folder import check_writable, create, name_run
from amclr_scale.metrics.stopwatch import Stopwatch

if TYPE_CHECKING:
    from amclr_scale.engine.build import Inputs, Trainer
    from amclr_scale.evaluation.run import Evaluator
    from amclr_scale.memory.account import Account
    from amclr_scale.metrics.log import RunLog
    from amclr_scale.planner.auto_execution import AutoExecution
    from amclr_scale.types import Batch


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line: a file, words that override its keys, and what launchers add."""
    parser = argparse.ArgumentParser(
        prog="amclr-scale train",
        description=__doc__,
        epilog=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", help="YAML file, or a shipped one's name, such as quickstart; default: the schema's"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the configuration and the arithmetic, stop"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed passes it; LOCAL_RANK says the same
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides, such as optimizer.lr=1e-3")
    return parser.parse_intermixed_args(argv)


@dataclass(frozen=True)
class Prepared:
    """What is read and checked before there is a process group."""

    inputs: "Inputs"
    probed: "Batch | None"  # of run.probe
    evaluator: "Evaluator | None"  # None: nothing is to be measured
    auto_keys: "AutoExecution | None"  # keys of execution that wait for the device's free memory


def prepare(config: Config, rank_info: RankInfo) -> Prepared:
    """Open what is trained and measured on.

    Raises:
        UserError: data, tokenizer or evaluation are not usable.
    """
    from amclr_scale.engine.batch_probe import read_probe
    from amclr_scale.engine.build import open_data
    from amclr_scale.evaluation.run import Evaluator

    inputs = open_data(config, rank_info)
    probed = read_probe(config, rank_info)
    measured = config.evaluation.splits or config.evaluation.probes
    evaluator = Evaluator(config, rank=rank_info.rank, world_size=rank_info.world_size) if measured else None
    auto_keys = None
    if config.execution.auto or config.execution.kept_micro_batches == "auto":
        from amclr_scale.planner.auto_execution import AutoExecution  # takes seconds, which other runs need not spend

        auto_keys = AutoExecution(config, rank_info, inputs.loader.num_samples)
    elif config.execution.memory_report and rank_info.rank == 0:
        predict_memory(
            config, rank_info, inputs.loader.num_samples
        )  # remembered; ranks can be pretended only while there are none
    return Prepared(inputs, probed, evaluator, auto_keys)


def run(config: Config, source: str | None, rank_info: RankInfo, stopwatch: Stopwatch, signals: Signals) -> None:
    """The flow: data -> encoders -> engine -> objective -> loop -> results."""
    from amclr_scale.checkpoint.checkpointer import Checkpointer
    from amclr_scale.checkpoint.start import agree_on_start, lock_new
    from amclr_scale.checkpoint.state import restore
    from amclr_scale.distributed.process_group import seed_everything, start, stop
    from amclr_scale.distributed.watchdog import Watchdog
    from amclr_scale.engine.batch_plan import make_plan
    from amclr_scale.engine.batch_probe import Probe
    from amclr_scale.engine.build import build_trainer
    from amclr_scale.engine.deepspeed_setup import throughput
    from amclr_scale.engine.loop import train
    from amclr_scale.engine.profiling import StepProfiler
    from amclr_scale.engine.step import TrainStep
    from amclr_scale.metrics.log import RunLog
    from amclr_scale.metrics.phases import Phases

    stopwatch.lap("imports")

    # Data first: mistakes in it are found before any process waits for another.
    prepared = prepare(config, rank_info)
    loader, tokenizer, evaluator = prepared.inputs.loader, prepared.inputs.tokenizer, prepared.evaluator
    stopwatch.lap("data")
    device = start(rank_info, config.execution.threads)
    watchdog = Watchdog(rank_info)
    config, settled = prepared.auto_keys.resolve_auto(device) if prepared.auto_keys else (config, [])
    plan = make_plan(config, loader.samples_per_epoch, rank_info.world_size)
    inputs = replace(prepared.inputs, plan=plan)
    found, folder, lock = agree_on_start(
        config, name_run(config, source), loader.fingerprint, tokenizer, rank_info.rank
    )
    begin = found.step(config) if found else 0
    loader.seek(begin)
    stopwatch.lap("process group")

    trainer = build_trainer(
        config, inputs, device=device, world_size=rank_info.world_size, folder=folder, stopwatch=stopwatch
    )
    engine, objective = trainer.engine, trainer.objective
    lock = lock or lock_new(folder, rank_info.rank)
    if rank_info.rank == 0:
        create(folder, config, str(device), rank_info.world_size, resumed_at=begin if found else None)
        tokenizer.save(folder / "tokenizer")
    seed_everything(config.seed, rank_info.rank + 1)  # dropout differs between ranks
    probe = None
    if prepared.probed is not None:
        probe = Probe(config, prepared.probed, micro_batch_sizes=plan.micro_batch_sizes, device=device)
    if found:
        restore(found.checkpoint, engine, objective, device, probe)
        stopwatch.lap("checkpoint")
    phases, memory = Phases(device), None
    if config.execution.memory_report:
        from amclr_scale.memory.measured.report import StepMemory

        predicted = predict_memory(config, rank_info, loader.num_samples) if rank_info.rank == 0 else None
        memory = StepMemory(folder, predicted, device=device, engine=engine, objective=objective, phases=phases)
    step = TrainStep(
        engine, objective, micro_batch_sizes=plan.micro_batch_sizes,
        kept=plan.kept, device=device, phases=phases,
        advice=lambda phase: advise_about(config, rank_info, loader.num_samples, str(device), phase),
    )  # fmt: skip
    step.steps = begin

    with (
        lock,
        signals,  # from here on; a signal before the first step has nothing to save, and ends the process at once
        RunLog(folder, config, speaks=rank_info.rank == 0, total_steps=plan.total_steps) as log,
        StepProfiler(folder, config.execution.profile, rank_info.rank) as profiler,
        Checkpointer(
            folder, config, plan, engine=engine, objective=objective, fingerprint=loader.fingerprint,
            tokenizer=tokenizer, log=log, signals=signals, device=device, probe=probe, found=found,
        ) as checkpointer,
        memory or nullcontext(),
    ):  # fmt: skip
        log.say("\n".join([f"run folder {folder}", str(plan), *settled]))
        log.say(
            f"{trainer.parameters:,} parameters, objective {config.objective['name']}, {trainer.optimizer}, on {device}"
        )
        for note in (*trainer.model.notes, *(found.notes() if found else ())):
            log.say(f"note: {note}")

        def first_step_done() -> None:
            stopwatch.lap("first step")
            log.say(str(stopwatch))

        def step_done(done: int) -> None:
            if memory and (words := memory.step()):
                log.say(words)
            checkpointer(done)

        try:
            results = train(
                config, plan, step=step, objective=objective, batches=iter(loader), log=log, phases=phases,
                device=device, throughput=throughput(config, plan, trainer.model, trainer.flops, device),
                profiler=profiler, evaluate=(lambda: evaluator(engine)) if evaluator else None,
                probe=(lambda: probe(engine, objective)) if probe else None,
                on_first_step=first_step_done, after_step=step_done, begin=begin, bad_samples=loader.counts.total,
            )  # fmt: skip
        except StoppedError:
            watchdog.leave()  # all ranks stop at one step: none of them is missing
            raise
        conclude(folder, trainer, evaluator, results, log, speaks=rank_info.rank == 0)
    loader.close()
    watchdog.leave()
    stop()


def conclude(
    folder: Path,
    trainer: "Trainer",
    evaluator: "Evaluator | None",
    results: dict[str, float],
    log: "RunLog",
    *,
    speaks: bool,
) -> None:
    """Leave the model and its numbers in the run folder. All ranks call it together."""
    from amclr_scale.evaluation.items import FILE, save_items
    from amclr_scale.metrics.curve import draw_if_possible
    from amclr_scale.trained.weights import save_weights

    save_weights(folder, trainer.model, trainer.objective, speaks=speaks)
    if not speaks:
        return
    if evaluator:
        save_items(folder / FILE, evaluator.numbers)
        log.say(evaluator.table(results))
    (folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")  # the sign of a finished run
    log.say(draw_if_possible(folder))
    log.say(f"run folder {folder}")


def main(argv: list[str]) -> int:
    """Check everything that can be checked without torch, then run."""
    stopwatch, signals = Stopwatch(), Signals()
    options = arguments(argv)
    rank_info = RankInfo()
    try:
        rank_info = read_rank_info()
        if rank_info.world_size > 1:
            end_with_launcher()  # before the seconds that imports take
        config = load(options.config, options.words, rank_info.world_size)
        check_writable(config)
        if options.dry_run:
            if rank_info.rank == 0:
                print(dump(config))
                print(preview(config, rank_info))
            return 0
        run(config, options.config, rank_info, stopwatch, signals)
    except StoppedError as stopped:
        from amclr_scale.distributed.process_group import stop

        if rank_info.rank == 0:
            print(f"\n{stopped}", file=sys.stderr, flush=True)
        stop()  # together: a launcher ends the others as soon as one has left
        return EXIT_RESUMABLE
    except UserError as error:
        # Every rank meets the same mistake, as a rule, and one voice per node is enough: the others give it time to
        # speak and the launcher time to end them. One that is alive after that has met a mistake of its own.
        if rank_info.local_rank:
            time.sleep(5)
        print(f"\n{error}", file=sys.stderr, flush=True)
        # Others may be waiting in a collective: leaving at once, without Python's own farewell, ends them too.
        sys.stdout.flush()
        os._exit(2)
    return 0


def predict_memory(config: Config, rank_info: RankInfo, num_samples: int) -> "Account":
    """What each rank will hold in memory, by component and phase."""
    from amclr_scale.distributed.process_group import device_type
    from amclr_scale.memory.account import account

    export(rank_info)  # objectives share their work by whether all ranks are on one node
    return account(config, world_size=rank_info.world_size, num_samples=num_samples, device=device_type())


def advise_about(config: Config, rank_info: RankInfo, num_samples: int, device: str, phase: str) -> str:
    """What to turn down after memory has run out."""
    import torch

    from amclr_scale.planner.oom_advice import advise

    return advise(config, rank_info=rank_info, num_samples=num_samples, device=torch.device(device), phase=phase)


def preview(config: Config, rank_info: RankInfo) -> str:
    """The arithmetic of a run, from the index of its data, and the memory that it will need."""
    from amclr_scale.engine.build import open_data

    inputs = open_data(config, rank_info)
    if config.execution.auto:
        return f"{inputs.plan}\nexecution: auto is settled at the start, from free memory; amclr-scale fit predicts it"
    predicted = predict_memory(config, rank_info, inputs.loader.num_samples)
    return f"{inputs.plan}\npredicted memory of a rank:\n{predicted.table()}\n{predicted.advice()}"
