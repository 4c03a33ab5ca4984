"""A training run put together: what is read before there are other processes, what is built then, and its hooks."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from amclr_scale.checkpoint.checkpointer import Checkpointer
from amclr_scale.checkpoint.delivery import Delivery, arrange
from amclr_scale.checkpoint.lock import RunLock
from amclr_scale.checkpoint.remote_copy import RemoteCopy
from amclr_scale.checkpoint.resume import Found
from amclr_scale.checkpoint.signals import Signals
from amclr_scale.checkpoint.start import agree_on_start, goes_on, lock_new
from amclr_scale.config.schema import Config
from amclr_scale.data.indexing import UnlistedShardsError
from amclr_scale.data.names import probe_name
from amclr_scale.distributed.launcher import RankInfo, export
from amclr_scale.distributed.process_group import device_type, seed_everything
from amclr_scale.encoders.decay import by_pattern, exempt
from amclr_scale.encoders.libraries.transformers_parts import save_architectures
from amclr_scale.engine.batch_plan import Position, make_plan
from amclr_scale.engine.batch_probe import Probe, read_probe
from amclr_scale.engine.build import Inputs, Trainer, build_trainer, open_data
from amclr_scale.engine.deepspeed_setup import throughput
from amclr_scale.engine.hooks import Hook
from amclr_scale.engine.profiling import StepProfiler
from amclr_scale.engine.records import FinalMeasurement, Measurement, TrainingRecords
from amclr_scale.engine.step import TrainStep
from amclr_scale.errors import UserError
from amclr_scale.evaluation.evaluators import numbers_of
from amclr_scale.evaluation.frozen_features.measure import numbers_of_probe
from amclr_scale.evaluation.run import MOMENTUM, Evaluator
from amclr_scale.evaluation.suites.of_runs import RunSuites
from amclr_scale.metrics.best import BestSoFar
from amclr_scale.metrics.log import RunLog
from amclr_scale.metrics.phases import Phases
from amclr_scale.metrics.run_folder import METRICS, create, name_run
from amclr_scale.metrics.scores import score_of
from amclr_scale.metrics.stopwatch import Stopwatch
from amclr_scale.types import Batch

if TYPE_CHECKING:
    from amclr_scale.memory.account import Account
    from amclr_scale.planner.auto_execution import AutoExecution

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """What is read and checked before there is a process group."""

    inputs: Inputs
    probed: Batch | None  # of run.probe
    evaluator: Evaluator | None  # None: nothing is to be measured
    suites: RunSuites
    auto_keys: "AutoExecution | None"  # keys of execution that wait for the device's free memory


def prepare(config: Config, rank_info: RankInfo) -> Prepared:
    """Open what is trained and measured on.

    Raises:
        UserError: data, tokenizer or evaluation are not usable.
    """
    inputs = with_shards_since(config, lambda begun: open_data(config, rank_info, begun=begun))
    probed = read_probe(config, rank_info)
    evaluator = None
    if config.evaluation.splits or config.evaluation.probes:
        rank, ranks = rank_info.rank, rank_info.world_size
        evaluator = with_shards_since(config, lambda begun: Evaluator(config, rank=rank, world_size=ranks, begun=begun))
    check_best(config, evaluator)
    suites = RunSuites(config)
    auto_keys = None
    if config.execution.auto or config.execution.kept_micro_batches == "auto":
        from amclr_scale.planner.auto_execution import AutoExecution  # takes seconds, which other runs need not spend

        auto_keys = AutoExecution(config, rank_info, inputs.loader.num_samples)
    elif config.execution.memory_report and rank_info.rank == 0:  # remembered: ranks can be pretended only now
        predict_memory(config, rank_info, inputs.loader.num_samples)
    return Prepared(inputs, probed, evaluator, suites, auto_keys)


def with_shards_since(config: Config, opened: Callable[[bool], T]) -> T:
    """Open what a run reads: shards that a folder has got since it began do not keep it from going on.

    It trains and measures on what it began with, so that its numbers before and after are of the same samples.

    Args:
        opened: opens them, told whether the run has begun.

    Raises:
        UserError: the data are not usable, or a run that begins would leave shards out.
    """
    try:
        return opened(False)
    except UnlistedShardsError:  # only then are checkpoints looked at, which takes as long as reading the newest
        if not goes_on(config):
            raise
        return opened(True)


def check_best(config: Config, evaluator: Evaluator | None) -> None:
    """Raise `UserError` if `checkpoint.best` names nothing that will be measured on the way."""
    wanted = config.checkpoint.best
    if wanted is None:
        return
    if evaluator is None or config.evaluation.every_samples is None:
        raise UserError(
            "checkpoint.best: expected evaluation.splits and evaluation.every_samples with it, or nothing is measured "
            f"on the way; got {config.evaluation.splits or 'no splits'} and {config.evaluation.every_samples}"
        )
    split, _, number = wanted.rpartition("/")
    known = {task.name: numbers_of(task, config.evaluation) for task in evaluator.tasks}
    known |= {probe_name(one, config.evaluation): numbers_of_probe(one, train) for one, train, _ in evaluator.probes}
    known |= {MOMENTUM + name: found for name, found in known.items()} if config.evaluation.momentum else {}
    if split not in known or score_of(number) is None:
        raise UserError(
            f"checkpoint.best: expected SPLIT/NUMBER, such as {next(iter(known))}/image_to_text_R@1, of the splits "
            f"{', '.join(known)}, got {wanted}"
        )
    measured = known[split]
    if measured is not None and number not in measured:
        raise UserError(
            f"checkpoint.best: expected a number that is measured of {split} ({', '.join(sorted(measured))}), got "
            f"{number}"
        )


@dataclass(frozen=True)
class Job:
    """A run that is ready to go: what trains, and what its hooks are made of."""

    config: Config  # with nothing left at auto
    settled: list[str]  # words about keys that were
    rank_info: RankInfo
    device: torch.device
    inputs: Inputs
    probed: Batch | None
    evaluator: Evaluator | None
    suites: RunSuites
    trainer: Trainer
    step: TrainStep
    folder: Path
    lock: RunLock
    delivery: Delivery | None  # to the node that keeps the run; None: all ranks see its folder
    log: RunLog
    records: TrainingRecords
    signals: Signals
    stopwatch: Stopwatch
    found: Found | None  # the checkpoint that it goes on from
    scores: BestSoFar  # of its evaluations; rank 0's also of those before it was interrupted

    @property
    def begin(self) -> int:
        """Steps that are done already."""
        return self.found.step(self.config) if self.found else 0

    @property
    def speaks(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank_info.rank == 0

    def introduction(self) -> list[str]:
        """What a run says first."""
        trainer, name = self.trainer, self.config.objective["name"]
        frozen = f", {trainer.frozen:,} of them frozen" if trainer.frozen else ""
        return [
            "\n".join([f"run folder {self.folder}", str(self.inputs.plan), *self.settled]),
            f"{trainer.parameters:,} parameters{frozen}, objective {name}, {trainer.optimizer}, on {self.device}",
            f"similarities: {trainer.similarities}",
            *(f"evaluation.suites: {words}" for words in self.suites.words),
            f"to stop: Ctrl-C, or kill {os.getpid()} on {platform.node()}, saves the run and ends it; twice: at once",
            *(
                f"note: {note}"
                for note in (
                    *self.inputs.loader.notes,
                    *trainer.model.notes,
                    *(self.found.notes() if self.found else ()),
                )
            ),
        ]


def build_job(
    config: Config, source: str | None, prepared: Prepared, *, rank_info: RankInfo, device: torch.device,
    signals: Signals, stopwatch: Stopwatch,
) -> Job:  # fmt: skip
    """Agree on where the run begins, and build what trains. All ranks call it together, in the process group.

    Args:
        source: the configuration's file, for the name of the run folder.

    Raises:
        UserError: a key of model, objective, optimizer or execution is not usable here, or the run folder is not.
    """
    loader, tokenizer, settled = prepared.inputs.loader, prepared.inputs.tokenizer, list[str]()
    if prepared.auto_keys:
        config, settled = prepared.auto_keys.resolve_auto(device)
    plan = make_plan(config, loader.samples_per_epoch, rank_info.world_size)
    inputs = replace(prepared.inputs, plan=plan)
    found, folder, lock = agree_on_start(
        config, name_run(config, source), loader.fingerprint, tokenizer, rank_info.rank
    )
    begin = found.step(config) if found else 0
    loader.seek(begin)
    stopwatch.lap("process group")

    trainer = build_trainer(
        config, inputs, device=device, world_size=rank_info.world_size, folder=folder, stopwatch=stopwatch,
        fresh=found is None,
    )  # fmt: skip
    lock = lock or lock_new(folder, rank_info.rank, config.run.shared)
    delivery = None if config.run.shared else arrange(folder, lock, rank_info.rank)
    if delivery and found:
        found = delivery.fetch(found)
    if rank_info.rank == 0:
        create(
            folder, config, str(device), rank_info.world_size,
            no_weight_decay=by_pattern(exempt(trainer.model)), resumed_at=begin if found else None,
        )  # fmt: skip
        tokenizer.save(folder / "tokenizer")
        save_architectures(trainer.model, folder)
    seed_everything(config.seed, rank_info.rank + 1)  # dropout differs between ranks

    phases = Phases(device)
    step = TrainStep(
        trainer.engine, trainer.objective, micro_batch_sizes=plan.micro_batch_sizes, kept=plan.kept, device=device,
        phases=phases, teacher=trainer.teacher, trim_texts=config.execution.trim_texts,
        advice=lambda phase: advise_about(config, rank_info, loader.num_samples, device, phase),
    )  # fmt: skip
    log = RunLog(folder, config, speaks=rank_info.rank == 0, total_steps=plan.total_steps)
    records = TrainingRecords(
        config, plan, log, objective=trainer.objective, phases=phases, device=device, begin=begin,
        throughput=throughput(config, plan, trainer.model, trainer.flops, device), bad_samples=loader.counts.total,
        repeated=loader.repeated,
    )  # fmt: skip
    return Job(
        config, settled, rank_info, device, inputs, prepared.probed, prepared.evaluator, prepared.suites, trainer, step,
        folder, lock, delivery, log, records, signals, stopwatch, found,
        BestSoFar(folder / METRICS if rank_info.rank == 0 else None),
    )  # fmt: skip


class _StartUp(Hook):
    """Where the seconds before the first step went."""

    def __init__(self, job: Job):
        self.job = job

    def on_first_step(self) -> None:
        self.job.stopwatch.lap("first step")
        self.job.log.say(str(self.job.stopwatch))


def _profiler(job: Job) -> Hook | None:
    steps = job.config.execution.profile
    return StepProfiler(job.folder, steps, job.rank_info.rank) if steps else None


def _probe(job: Job) -> Hook | None:
    if job.probed is None:
        return None
    plan, engine, objective = job.inputs.plan, job.trainer.engine, job.trainer.objective
    probe = Probe(
        job.config, job.probed, micro_batch_sizes=plan.micro_batch_sizes, device=job.device,
        order=job.inputs.loader.order, teacher=job.trainer.teacher,
    )  # fmt: skip
    every = job.config.run.probe.every_samples or plan.samples_per_epoch
    return Measurement("probe", lambda: probe(engine, objective), plan, job.records, job.log, every=every, state=probe)


def _evaluation(job: Job) -> Hook | None:
    evaluator, engine, every = job.evaluator, job.trainer.engine, job.config.evaluation.every_samples
    if evaluator is None:
        return None
    teacher = job.trainer.teacher if job.config.evaluation.momentum else None

    def measure() -> dict[str, float]:
        results = evaluator(engine)
        if teacher is None:
            return results
        with teacher.in_place():
            return results | evaluator(engine, MOMENTUM)

    def told(done: Position, results: dict[str, float]) -> None:
        job.scores.add(done.step, results)
        job.log.say(job.scores.line(done.step, done.samples, results))

    return FinalMeasurement("eval", measure, job.inputs.plan, job.records, job.log, every=every, told=told)


def _memory(job: Job) -> Hook | None:
    if not job.config.execution.memory_report:
        return None
    from amclr_scale.memory.measured.report import StepMemory

    predicted = predict_memory(job.config, job.rank_info, job.inputs.loader.num_samples) if job.speaks else None
    return StepMemory(
        job.folder, predicted, device=job.device, engine=job.trainer.engine, objective=job.trainer.objective,
        phases=job.step.phases, say=job.log.say, teacher=job.trainer.teacher,
    )  # fmt: skip


# What goes on beside training, in this order. A new hook is a class and a line here: from the job to the hook, or to
# None where the configuration asks for none.
HOOKS: list[Callable[[Job], Hook | None]] = [
    _StartUp, _profiler, lambda job: job.records, _probe, _evaluation, _memory,
]  # fmt: skip


def hooks_of(job: Job) -> list[Hook]:
    """The run's hooks; the last one saves it, with the state of the others. One that keeps it elsewhere follows."""
    hooks = [hook for make in HOOKS if (hook := make(job)) is not None]
    checkpointer = Checkpointer(
        job.folder, job.config, job.inputs.plan, engine=job.trainer.engine, objective=job.trainer.objective,
        fingerprint=job.inputs.loader.fingerprint, tokenizer=job.inputs.tokenizer, log=job.log, signals=job.signals,
        device=job.device, hooks=hooks, scores=job.scores, found=job.found, teacher=job.trainer.teacher,
        delivery=job.delivery,
    )  # fmt: skip
    further = [RemoteCopy(job.folder, job.config, checkpointer)] if job.config.run.remote else []
    return [*hooks, checkpointer, *further]


def predict_memory(config: Config, rank_info: RankInfo, num_samples: int) -> "Account":
    """What each rank will hold in memory, by component and phase."""
    from amclr_scale.memory.account import account

    export(rank_info)  # objectives share their work by whether all ranks are on one node
    return account(config, world_size=rank_info.world_size, num_samples=num_samples, device=device_type())


def advise_about(config: Config, rank_info: RankInfo, num_samples: int, device: torch.device, phase: str) -> str:
    """What to turn down after memory has run out."""
    from amclr_scale.planner.oom_advice import advise

    return advise(config, rank_info=rank_info, num_samples=num_samples, device=device, phase=phase)
