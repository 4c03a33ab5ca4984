"""What a run writes down about itself: training records every few steps, and what is measured now and then."""

import resource
import time
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.config.schema import Config
from amclr_scale.data.captions.further_captions import OFTEN
from amclr_scale.distributed.collectives import all_sum, world_size
from amclr_scale.engine.batch_plan import Plan, Position
from amclr_scale.engine.hooks import Hook
from amclr_scale.engine.step import StepReport
from amclr_scale.metrics.log import RunLog
from amclr_scale.metrics.phases import Phases
from amclr_scale.metrics.throughput import Throughput
from amclr_scale.objectives import diagnostics
from amclr_scale.objectives.base import Objective
from amclr_scale.types import Batch

WAIT_WARNING = 0.2  # share of the time spent waiting for data above which the log says what to turn


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: the CUDA allocator's, or this process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def faster_data(data: schema.Data, device: torch.device) -> str:
    """What to turn where a run waits for data."""
    there = device.type == "cuda" and not data.features.image and "device" not in (data.augment_on, data.resident)
    return "raise execution.workers" + ", or set data.augment_on=device" * there


class TrainingRecords(Hook):
    """Loss, rates, seconds by phase and diagnostics, of the first, the last and every `run.log_every_steps`-th step.

    Args:
        phases: of the step.
        bad_samples: unusable samples that this rank has met so far.
        repeated: share of this rank's further views that repeat another one, by name.
        begin: steps that are done already.
    """

    def __init__(
        self, config: Config, plan: Plan, log: RunLog, *, objective: Objective, phases: Phases, throughput: Throughput,
        device: torch.device, bad_samples: Callable[[], int] = lambda: 0,
        repeated: Callable[[], dict[str, float]] = dict, begin: int = 0,
    ):  # fmt: skip
        self.run, self.data, self.plan, self.log = config.run, config.data, plan, log
        self.objective, self.phases, self.throughput, self.device = objective, phases, throughput, device
        self.bad_samples, self.repeated = bad_samples, repeated
        self._warned = self._told = False
        self._samples, self._time = begin * plan.global_batch_size, time.perf_counter()  # as of the last record
        self._first: tuple[int, float] | None = None  # the first step that was run here, and when it was done

    def on_step(self, done: Position, batch: Batch, report: StepReport) -> None:
        self.log.advance(done.step)
        self._first = self._first or (done.step, time.perf_counter())
        if done.step % self.run.log_every_steps and done.step != 1 and not done.last:
            return
        seconds = time.perf_counter() - self._time
        rates = self.throughput.record((done.samples - self._samples) / seconds)
        record = {**self._record(report, seconds), **rates}
        if self.run.diagnostics:
            found = diagnostics.of_step(self.objective, report.embeddings, batch.texts[0])
            record |= {f"diagnostics/{name}": value for name, value in found.items()}
        place = {"step": done.step, "samples": done.samples, "epoch": done.epoch, "lr": done.lr}
        self.log.step({**place, **record}, self.plan.total_steps, self._left(done.step))
        if record["data_wait_share"] > WAIT_WARNING and done.step > self.run.log_every_steps and not self._warned:
            self._warned = True
            share = f"{record['data_wait_share']:.0%}"
            self.log.say(f"data: {share} of the time went into waiting for data; {faster_data(self.data, self.device)}")
        repeated = [name for name in self.repeated() if record[name] > OFTEN]
        if repeated and not self._told:
            self._told = True
            said = {"repeated": "repeat another view of their sample", "missing": "could not be made"}
            words = (
                f"{record[name]:.0%} of further {what} {said[kind]}"
                for name in repeated
                for kind, _, what in [name.partition("_")]
            )
            self.log.say(f"data: {', '.join(words)}; metrics.jsonl counts them")
        self._samples, self._time = done.samples, time.perf_counter()

    def _left(self, step: int) -> float | None:
        """Seconds until the last step, at the pace since the first step that was run here, measurements included."""
        if self._first is None or step == self._first[0]:
            return None
        first, since = self._first
        return (time.perf_counter() - since) / (step - first) * (self.plan.total_steps - step)

    def restart(self, samples: int) -> None:
        """Leave out the time since the last record: it was not training's.

        Args:
            samples: seen so far.
        """
        self.phases.seconds()
        self._samples, self._time = samples, time.perf_counter()

    def _record(self, report: StepReport, seconds: float) -> dict[str, float]:
        """What a logged step says. Loss and metrics are means over ranks: then they are those of the global batch."""
        spent = self.phases.seconds()
        own = {"loss": float(report.loss.value.detach())}
        own |= {f"objective/{name}": value for name, value in report.loss.metrics.items()}
        own["bad_samples"] = self.bad_samples() * world_size()  # of all ranks: their sum, not their mean
        own |= self.repeated()
        mine = torch.tensor(list(own.values()), dtype=torch.float64, device=self.device)
        means = (all_sum(mine) / world_size()).tolist()
        return {
            **dict(zip(own, means, strict=True)),
            "grad_norm": report.grad_norm,
            "logit_scale": report.logit_scale,
            "data_wait_share": min(1.0, spent.get("data", 0.0) / seconds),
            "peak_memory_gib": peak_memory_gib(self.device),
            **{f"seconds/{name}": value for name, value in spent.items()},
        }

    def __enter__(self) -> Self:
        self._time = time.perf_counter()
        return self


class Measurement(Hook):
    """Something measured after the last step, and on the way each time that so many samples have been seen.

    Args:
        name: before its numbers in metrics.jsonl.
        measure: called on all ranks together.
        records: of training, which the time is not to count for.
        every: samples from one measurement to the next; None: after the last step only.
        state: what goes into checkpoints under `name`: a thing with `state_dict` and `load_state_dict`.
        told: of every measurement's place and results, on all ranks.
    """

    def __init__(
        self, name: str, measure: Callable[[], dict[str, float]], plan: Plan, records: TrainingRecords, log: RunLog,
        *, every: float | None, state: Any = None, told: Callable[[Position, dict[str, float]], None] | None = None,
    ):  # fmt: skip
        self.name, self.measure, self.plan, self.records, self.log = name, measure, plan, records, log
        self.every, self.state, self.told = every, state, told

    def after_step(self, done: Position) -> None:
        if done.last or (self.every is not None and self.plan.reaches(done, self.every)):
            self.record(done)

    def record(self, done: Position) -> dict[str, float]:
        """Measure, and write the numbers down."""
        began = time.perf_counter()
        results = self.measure()
        found = {f"{self.name}/{key}": value for key, value in results.items()}
        seconds = {f"{self.name}_seconds": time.perf_counter() - began}
        self.log.write({"step": done.step, "samples": done.samples, **found, **seconds})
        if self.told:
            self.told(done, results)
        self.records.restart(done.samples)
        return results

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.state is None else dict(self.state.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.state is not None:
            self.state.load_state_dict(state)


class FinalMeasurement(Measurement):
    """One whose last numbers are the run's results: made after the last step is saved, so that no interruption costs
    more than they do. A run that is resumed there makes them.
    """

    def after_step(self, done: Position) -> None:
        if not done.last:
            super().after_step(done)

    def on_end(self) -> dict[str, float]:
        return self.record(self.plan.position(self.plan.total_steps))
