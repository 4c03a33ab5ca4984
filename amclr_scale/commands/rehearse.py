"""`amclr-scale fit --verify`: run a choice on this machine's CPU, and hold it to the limit that was promised."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from amclr_scale.config.load import build, dump
from amclr_scale.config.schema import Config

STEPS = 4  # that a rehearsal takes


def verify(options: argparse.Namespace, fit: Any, choice: Any) -> bool:
    """Run a choice, and one with a batch 15 % larger: what tensors held against the limit, and a step under it.

    The step under the limit is a real one: the system refuses the process more memory (`limited`).
    """
    from amclr_scale.memory.units import in_words
    from amclr_scale.planner.settings import with_batch

    lanes = fit.config.data.lanes
    batch = choice.config.train.global_batch_size
    larger = -(-round(1.15 * batch) // lanes) * lanes
    print(f"\nverified on this machine, {fit.world_size} processes, three steps each (limit {in_words(fit.memory)}):")
    print(f"{'global batch':>14}{'predicted':>14}{'measured':>14}{'error':>9}{'s/step predicted':>18}{'measured':>10}")
    peaks, ran = list[float](), list[bool]()
    for size in (batch, larger):
        wanted = fit.choice(with_batch(choice.config, size))
        found, failure = rehearse(wanted.config, fit.world_size, fit.memory)
        peaks.append(found["peak_bytes"])
        ran.append(not failure)
        predicted = wanted.account.peak_bytes
        error = predicted / found["peak_bytes"] - 1
        by_phase = [
            f"{phase} {in_words(bytes_)} ({in_words(round(found[phase]))})"
            for phase, bytes_ in wanted.account.by_phase.items()
        ]
        print(f"{size:>14,}{in_words(predicted):>14}{in_words(round(found['peak_bytes'])):>14}{error:>+9.1%}"
              f"{wanted.cost.seconds:>18.3g}{found['seconds']:>10.3g}")  # fmt: skip
        print(f"{'':14}by phase (measured): {', '.join(by_phase)}")
        print(f"{'':14}with the process held to the limit: {failure or 'ran'}")
    right = peaks[0] <= fit.memory < peaks[1] and ran == [True, False]
    print("the first stays within the limit, the second exceeds it" if right else "NOT as predicted")
    return right


def rehearse(config: Config, world_size: int, limit: int) -> tuple[dict[str, float], str]:
    """Run three steps of a configuration on so many processes here, and one more with each of them held to a limit.

    Returns the most that any rank's tensors held in the three, and why the fourth failed, if it did.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "config.yaml", Path(folder) / "found"
        train = config.train  # the largest batch may be more than the run is to see at all
        if train.samples is not None:
            train = train.model_copy(update={"samples": max(train.samples, STEPS * train.global_batch_size)})
        path.write_text(dump(config.model_copy(update={"train": train})))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command = [*launcher, "-m", "amclr_scale", "fit", "--gpus", str(world_size), "--config", str(path),
                   "--rehearse", str(out), "--limit", str(limit)]  # fmt: skip
        # Every tensor of some size is a mapping of its own, and goes back to the system at once.
        allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        environment = {**os.environ, **allocator, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        failures = [path.read_text() for path in sorted(Path(folder).glob("found*.failed"))]
        if done.returncode and not failures:
            raise RuntimeError(f"a rank failed:\n{done.stderr[-3000:]}")
        found = [json.loads(Path(f"{out}{rank}").read_text()) for rank in range(world_size)]
    return {key: max(one[key] for one in found) for key in found[0]}, failures[0] if failures else ""


def data_bytes() -> int:
    """Writable memory of this process that is its own, as RLIMIT_DATA counts it: touched or not, and no files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmData:")[2].split()[0])


def rehearse_here(options: argparse.Namespace) -> None:
    """One rank of `rehearse`: data, model, engine and steps as launch/train.py makes them, with the tensors tracked."""
    from amclr_scale.distributed.launcher import read_rank_info
    from amclr_scale.distributed.process_group import seed_everything, start, stop
    from amclr_scale.engine.build import build_trainer, open_data
    from amclr_scale.engine.step import TrainStep
    from amclr_scale.memory.account import phases_of
    from amclr_scale.memory.measured.phase_peaks import MemoryReport
    from amclr_scale.metrics.phases import Phases
    from amclr_scale.metrics.stopwatch import Stopwatch

    rank_info = read_rank_info()
    config = build(yaml.safe_load(Path(options.config).read_text()), rank_info.world_size)
    inputs = open_data(config, rank_info)
    device = start(rank_info, config.execution.threads)
    inputs.loader.seek(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            config, inputs, device=device, world_size=rank_info.world_size, folder=Path(folder), stopwatch=Stopwatch()
        )
        seed_everything(config.seed, rank_info.rank + 1)
        phases = Phases(device)
        step = TrainStep(
            trainer.engine, trainer.objective, micro_batch_sizes=inputs.plan.micro_batch_sizes,
            kept=inputs.plan.kept, device=device, phases=phases, teacher=trainer.teacher,
        )  # fmt: skip
        batches = iter(inputs.loader)
        batch = next(batches)
        begin = time.perf_counter()
        step(batch, config.optimizer.lr)  # optimizer states begin to exist; timed, for nobody looks on
        seconds = time.perf_counter() - begin
        report = MemoryReport(device, trainer.engine, trainer.objective, phases, trainer.teacher)
        beside = 0  # the most that this process holds beside tensors, between two operations
        tracker = report.tracker
        assert tracker is not None

        def look(*_: int) -> None:
            nonlocal beside
            beside = max(beside, data_bytes() - tracker.total)

        for last in (False, True):  # what the first one leaves behind belongs to the second
            report.restart()
            with phases("data", host=True):
                batch = next(batches)
            if last:
                tracker.on_change = look
            step(batch, config.optimizer.lr)
        report.close()
        tracker.on_change = None
    peaks = {phase: peak.allocated for phase, peak in report.peaks.items()}
    found: dict[str, float] = {
        "peak_bytes": max(peaks.values()),
        "seconds": seconds,
        **{phase: peaks.get(phase, 0) for phase in phases_of(config)},
    }
    Path(f"{options.rehearse}{rank_info.rank}").write_text(json.dumps(found))
    limited(
        lambda: step(batch, config.optimizer.lr),
        beside + options.limit,
        Path(f"{options.rehearse}{rank_info.rank}.failed"),
    )
    inputs.loader.close()
    stop()


def limited(run: Callable[[], object], limit: int, told: Path) -> None:
    """Run something while the system refuses this process more than so many bytes; where it fails, write down why.

    Ranks wait for one another first: what the limit was taken from is then written down everywhere.
    """
    import torch.distributed as dist

    from amclr_scale.engine.step import OutOfMemoryError

    if dist.is_initialized():
        dist.barrier()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        run()
    except OutOfMemoryError as error:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        told.write_text(str(error).splitlines()[0])
        os._exit(3)  # the launcher ends the others, which may wait for this one
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
