"""The largest global batch that fits, and the fastest execution settings for a batch. Nothing is run but --verify.

    amclr-scale fit --config configs/quickstart.yaml --gpus 8 --device h100
    amclr-scale fit --config C --gpus 64 --per-node 8 --device a100-40gb --batch 32768 --num-samples 400000000
    amclr-scale fit --config C --gpus 2 --device cpu --memory 64MiB --verify

Words (key=value) go over the configuration, as for launch/train.py; keys of `execution` that they give stay as given,
all others are searched. docs/memory.md says what the answers rest on.
"""

import argparse
import gc
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

import psutil
import yaml

from amclr_scale.config.load import build, dump, from_words, load
from amclr_scale.config.schema import Config
from amclr_scale.errors import UserError

CUDA_RESERVE = 3 * 2**29  # bytes of a GPU that tensors cannot have: CUDA's context, NCCL's buffers
CPU_SHARE = 0.9  # of what the host has available


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="amclr-scale fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file; without it, the defaults")
    parser.add_argument("--gpus", type=int, required=True, help="ranks W, over all nodes")
    parser.add_argument("--per-node", type=int, help="ranks on one node (default: 8 on GPUs, all on a CPU)")
    parser.add_argument("--device", default="cpu", help="cpu (measured here) or a GPU: h100, h200, a100-40gb, ...")
    parser.add_argument("--memory", help="for the tensors of one rank, such as 78GiB (default: what the device has)")
    parser.add_argument("--host-memory", help="for one rank, beside its GPU (default: not limited)")
    parser.add_argument("--batch", type=int, help="global batch size, instead of the largest")
    parser.add_argument("--num-samples", type=int, help="size of the data set (default: that of data.train)")
    parser.add_argument("--utilisation", type=float, help="of the device's peak in matrix products (an hfu from a log)")
    parser.add_argument("--top", type=int, default=5, help="settings to print")
    parser.add_argument("--json", type=Path, help="also write everything there")
    parser.add_argument("--verify", action="store_true", help="on this CPU: run the batch, and one 15 %% larger")
    parser.add_argument("--rehearse", help=argparse.SUPPRESS)  # one rank of --verify,
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)  # and the bytes that its tensors may take
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides, such as objective.name=sogclr")
    return parser.parse_intermixed_args(argv)


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse what no search could answer, before anything takes seconds."""
    for name in ("gpus", "per_node", "batch", "num_samples", "top"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {given}")
    if options.json and not options.json.resolve().parent.is_dir():
        raise UserError(f"--json: expected a file in a folder that exists, got {options.json}")


def samples_of(config: Config) -> int:
    """N, from the index of the training data."""
    from amclr_scale.data.loader import TrainLoader

    try:
        loader = TrainLoader(config.data, seed=config.seed, global_batch_size=config.data.lanes)
    except UserError as error:
        raise UserError(f"{error}\n--num-samples: with it, the data need not be here") from error
    loader.close()
    return loader.num_samples


def given(words: list[str]) -> list[str]:
    """The keys of `execution` that words give and the search would decide otherwise."""
    from amclr_scale.planner.search import KEYS

    tree = from_words(words).get("execution", {})
    keys = [*tree, *(f"similarity.{key}" for key in tree.get("similarity", {}))]
    return [key for key in keys if key in KEYS]


def make_fit(options: argparse.Namespace) -> Any:
    """The search that the command line asks for."""
    from amclr_scale.memory.units import in_bytes
    from amclr_scale.metrics.devices import find_profile, measure_cpu
    from amclr_scale.planner.search import Fit, changed
    from amclr_scale.planner.step_time import Rates, default_rates

    config = changed(load(options.config, ["execution=auto", *options.words], options.gpus), auto=False)
    cpu = options.device.lower() == "cpu"
    per_node = min(options.per_node or (options.gpus if cpu else 8), options.gpus)
    if cpu:
        threads = config.execution.threads or max(1, len(os.sched_getaffinity(0)) // per_node)
        profile = measure_cpu(threads=threads, ranks=per_node)
        memory = round(CPU_SHARE * psutil.virtual_memory().available / per_node)
    else:
        try:
            profile = find_profile(options.device)
        except UserError as error:
            raise UserError(f"--{error}") from error
        memory = profile.memory_bytes - CUDA_RESERVE
    rates = default_rates(profile)
    if options.utilisation is not None:
        if not 0 < options.utilisation <= 1:
            raise UserError(f"--utilisation: expected a share in (0, 1], got {options.utilisation}")
        rates = Rates(options.utilisation, rates.launch, rates.message)
    return Fit(
        config, profile, world_size=options.gpus, num_samples=options.num_samples or samples_of(config),
        memory=in_bytes(options.memory, "--memory") if options.memory else memory,
        host_memory=in_bytes(options.host_memory, "--host-memory") if options.host_memory else None,
        ranks_per_node=per_node, rates=rates, fixed=given(options.words),
    )  # fmt: skip


def table(choices: list[Any]) -> str:
    """One line per choice."""
    from amclr_scale.memory.units import in_words

    head = ("zero", "offload", "recompute", "micro-batch", "kept", "gather", "chunk")
    rows = [(*head, "memory", "s/step", "samples/s", "sent", "time in")]
    for choice in choices:
        s, cost = choice.settings, choice.cost
        parts = [f"{name} {seconds / cost.seconds:.0%}" for name, seconds in cost.shares.items()][:2]
        rows.append((
            str(s["zero_stage"]), s["offload"], f"{s['recompute_image']}/{s['recompute_text']}",
            str(s["micro_batch_size"]), str(s["kept_micro_batches"]), s["similarity.gather"],
            str(s["similarity.chunk"]), in_words(choice.account.peak_bytes), f"{cost.seconds:.4g}",
            f"{cost.samples_per_second:,.0f}", in_words(round(cost.wire_bytes)), ", ".join(parts),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def answer(options: argparse.Namespace, fit: Any) -> list[Any]:
    """Search, print, and return the choices."""
    from amclr_scale.memory.units import in_words
    from amclr_scale.planner.traffic import on_the_wire

    nodes = -(-fit.world_size // fit.ranks_per_node)
    print(f"{fit.world_size} ranks on {nodes} node{'s' * (nodes > 1)}: {fit.profile.name}, {in_words(fit.memory)} for "
          f"the tensors of one; {fit.num_samples:,} samples; {fit.config.execution.precision}")  # fmt: skip
    print(f"rates: {fit.profile.source}; utilisation {fit.rates.utilisation:.0%}")
    batch = options.batch or fit.largest()
    if not options.batch:
        print(f"largest global batch: {batch:,} ({batch // fit.world_size:,} per rank)")
    if batch > fit.num_samples:
        print(f"note: a global batch of {batch:,} holds {batch / fit.num_samples:.1f} epochs: samples meet themselves")
    choices: list[Any] = fit.fastest(batch, options.top)
    best = choices[0]
    print(f"\nfastest settings for a global batch of {batch:,} (predicted):\n{table(choices)}\n")
    print(f"{best.account.table()}\n")
    wire = on_the_wire(
        best.config, world_size=fit.world_size, num_samples=fit.num_samples, device_type=fit.profile.type,
        ranks_per_node=fit.ranks_per_node,
    )  # fmt: skip
    print(f"{wire.table()}\n\nuse: train.global_batch_size={batch} {best.words()}")
    if options.json:
        found = [
            {
                "settings": choice.settings, "peak_bytes": choice.account.peak_bytes, "seconds": choice.cost.seconds,
                "samples_per_second": choice.cost.samples_per_second, "wire_bytes": choice.cost.wire_bytes,
            }
            for choice in choices
        ]  # fmt: skip
        options.json.write_text(json.dumps({"global_batch_size": batch, "choices": found}, indent=1) + "\n")
    return choices


def verify(options: argparse.Namespace, fit: Any, choice: Any) -> bool:
    """Run a choice, and one with a batch 15 % larger: what tensors held against the limit, and a step under it.

    The step under the limit is a real one: the system refuses the process more memory (`limited`).
    """
    from amclr_scale.memory.units import in_words
    from amclr_scale.planner.search import with_batch

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
        path.write_text(dump(config))
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
    from amclr_scale.memory.components import PHASES
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
            kept=inputs.plan.kept, device=device, phases=phases,
        )  # fmt: skip
        batches = iter(inputs.loader)
        batch = next(batches)
        begin = time.perf_counter()
        step(batch, config.optimizer.lr)  # optimizer states begin to exist; timed, for nobody looks on
        seconds = time.perf_counter() - begin
        report = MemoryReport(device, trainer.engine, trainer.objective, phases)
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
        **{phase: peaks.get(phase, 0) for phase in PHASES},
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


def main(argv: list[str]) -> int:
    """Answer; with --verify, 1 where the machine disagrees."""
    options = arguments(argv)
    # timm imports wandb where it is installed, for a quarter of a second, and nothing is logged here.
    hides = "wandb" not in sys.modules
    if hides:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        return run(options)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if hides:
            del sys.modules["wandb"]


def run(options: argparse.Namespace) -> int:
    """The flow: configuration -> search -> answer."""
    if options.rehearse:
        rehearse_here(options)
        return 0
    if options.verify and (options.device.lower() != "cpu" or options.batch):
        raise UserError("--verify: runs the largest batch on this CPU; expected --device cpu and no --batch")
    check_numbers(options)
    begin = time.perf_counter()
    gc.set_threshold(100_000, 20, 50)  # traces make millions of small objects, and hardly any in circles
    fit = make_fit(options)
    choices = answer(options, fit)
    print(f"answered in {time.perf_counter() - begin:.1f} s")
    return 0 if not options.verify or verify(options, fit, choices[0]) else 1
