"""The training loop: data, step, log, evaluate, until the recipe's samples are seen."""

import resource
import time
from collections.abc import Callable, Iterator

import torch

from amclr_scale.config.schema import Config
from amclr_scale.distributed.collectives import all_sum, world_size
from amclr_scale.engine.batch_plan import Plan
from amclr_scale.engine.profiling import StepProfiler
from amclr_scale.engine.schedules import learning_rate
from amclr_scale.engine.step import StepReport, TrainStep
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


def train(
    config: Config,
    plan: Plan,
    *,
    step: TrainStep,
    objective: Objective,
    batches: Iterator[Batch],
    evaluate: Callable[[], dict[str, float]] | None,
    probe: Callable[[], dict[str, float]] | None = None,
    log: RunLog,
    phases: Phases,
    throughput: Throughput,
    profiler: StepProfiler,
    device: torch.device,
    on_first_step: Callable[[], None] = lambda: None,
    after_step: Callable[[int], None] = lambda _: None,
    begin: int = 0,
    bad_samples: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """Run the recipe to its end on every rank; returns the last evaluation.

    Args:
        on_first_step: called once, after the first step that is run here.
        probe: what `run.probe` measures, or None.
        after_step: called after every step and its evaluation, with the number of steps done; may raise to end the run.
        begin: steps that are done already; `batches` begin with the next one.
        bad_samples: unusable samples that this rank has met so far.
    """
    samples = begin * plan.global_batch_size
    logged_at, logged_time = samples, time.perf_counter()
    results: dict[str, float] = {}
    warned = False
    for done in range(begin + 1, plan.total_steps + 1):
        objective.set_epoch(samples / plan.samples_per_epoch)
        middle = samples + plan.global_batch_size / 2
        lr = learning_rate(config.optimizer, middle, plan.total_samples, plan.global_batch_size)
        with phases("data", host=True):
            batch = next(batches)
        report = step(batch, lr)
        samples += plan.global_batch_size
        log.advance(done)
        profiler.step()
        if done == begin + 1:
            on_first_step()

        if done % config.run.log_every_steps == 0 or done in (1, plan.total_steps):
            seconds = time.perf_counter() - logged_time
            rates = throughput.record((samples - logged_at) / seconds)
            record = {**_record(report, phases, seconds, bad_samples(), device), **rates}
            if config.run.diagnostics:
                found = diagnostics.of_step(objective, report.embeddings, batch.texts[0])
                record |= {f"diagnostics/{name}": value for name, value in found.items()}
            place = {"step": done, "samples": samples, "epoch": samples / plan.samples_per_epoch, "lr": lr}
            log.step({**place, **record}, plan.total_steps)
            if record["data_wait_share"] > WAIT_WARNING and done > config.run.log_every_steps and not warned:
                warned = True
                share = f"{record['data_wait_share']:.0%}"
                log.say(f"data: {share} of the time went into waiting for data; raise execution.workers")
            logged_at, logged_time = samples, time.perf_counter()
        del report  # embeddings and their gradients, which the next step need not find in its way

        last = done == plan.total_steps
        probed = probe is not None and (last or _crosses(samples, plan, config.run.probe.every_samples))
        every = config.evaluation.every_samples
        evaluated = evaluate is not None and (last or (every is not None and _crosses(samples, plan, every)))
        if probe is not None and probed:
            _measure("probe", probe, log, done, samples)
        if evaluate is not None and evaluated:
            results = _measure("eval", evaluate, log, done, samples)
        if probed or evaluated:  # the time that it took is not training's
            phases.seconds()
            logged_at, logged_time = samples, time.perf_counter()
        after_step(done)
    if evaluate is not None and begin >= plan.total_steps:  # resumed after its last step
        results = evaluate()
    return results


def _crosses(samples: int, plan: Plan, every: int | None) -> bool:
    """Whether the last step has reached a multiple of `every` samples; None: of a pass over the data."""
    unit = every or plan.samples_per_epoch
    return samples // unit > (samples - plan.global_batch_size) // unit


def _measure(
    name: str, measure: Callable[[], dict[str, float]], log: RunLog, done: int, samples: int
) -> dict[str, float]:
    began = time.perf_counter()
    results = measure()
    found = {f"{name}/{key}": value for key, value in results.items()}
    log.write({"step": done, "samples": samples, **found, f"{name}_seconds": time.perf_counter() - began})
    return results


def _record(
    report: StepReport, phases: Phases, seconds: float, bad_samples: int, device: torch.device
) -> dict[str, float]:
    """What a logged step says. Loss and metrics are averaged over ranks: then they are those of the global batch."""
    spent = phases.seconds()
    own = {"loss": float(report.loss.value.detach()), **{f"objective/{k}": v for k, v in report.loss.metrics.items()}}
    own["bad_samples"] = bad_samples * world_size()  # of all ranks: their sum, not their mean
    means = (all_sum(torch.tensor(list(own.values()), dtype=torch.float64, device=device)) / world_size()).tolist()
    return {
        **dict(zip(own, means, strict=True)),
        "grad_norm": report.grad_norm,
        "logit_scale": report.logit_scale,
        "data_wait_share": min(1.0, spent.get("data", 0.0) / seconds),
        "peak_memory_gib": peak_memory_gib(device),
        **{f"seconds/{name}": value for name, value in spent.items()},
    }
