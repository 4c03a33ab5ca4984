"""Time and memory of contrastive losses, forward and backward: ours, open_clip's, and the matrix products alone.

    python tools/benchmark_similarity.py                              # B from 1,024 up, one process and two ranks
    python tools/benchmark_similarity.py --batch 8192 --width 512 --json FILE
    python tools/benchmark_similarity.py --ranks 1 --batch 131072 --width 64 --methods clip
    python tools/benchmark_similarity.py --quick --json FILE          # a minute: what the GPU, or this CPU, is worth
    python tools/benchmark_similarity.py --large --json FILE          # CUDA: B = 65,536, 262,144 and 1,048,576, D = 768

All methods of a size run in turn in one process (one per rank), several rounds, so that a machine that slows down
slows all of them; figures are medians, and ratios are taken inside one run. On a CPU the time is CPU time, per rank.
Memory is the peak beyond the features, of one step in a fresh process (one process only).

units      time in products of 2 b B D operations, at the speed of the floor
x floor    time over that of four such products per rank with torch.mm into preallocated memory, in the features' type
           with float32 sums of gradients, and nothing else: what `clip` has to compute
TFLOP/s    of these four products (three for siglip) in the method's time, whatever the method itself computes

Features are float32 on a CPU and bfloat16 on a GPU; rows with "fp32 rows" take them as float32, which is what towers
hand out, whatever their precision. open_clip's rows run under autocast to the features' type, as its own training does.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amclr_scale.similarity import current, describe
from tools.similarity_methods import METHODS, REFERENCES, Features


def fitting(names: list[str], batch: int, ranks: int, device: torch.device) -> list[str]:
    """The methods that this machine has room and packages for."""
    room = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    methods = {name: METHODS[name] for name in names if ranks in METHODS[name].ranks}
    return [
        name
        for name, method in methods.items()
        if method.bytes_per_pair * batch * batch < 0.7 * room
        and (device.type == "cuda" or not method.cuda_only)
        and (not method.needs or importlib.util.find_spec(method.needs) is not None)
    ]


def seconds(step: Callable[[], float], device: torch.device, *, wall: bool) -> tuple[float, float]:
    """Time of one step (CPU time on a CPU, unless `wall`), and its loss."""
    clock = time.perf_counter if wall or device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    value = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, value


def peak_bytes(step: Callable[[], float], device: torch.device) -> float:
    """Peak memory of one step beyond what was there before; nan where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before)
    if sys.platform != "linux":
        return math.nan

    def kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = kib("VmRSS")
    step()
    return 1024.0 * (kib("VmHWM") - resident)


@dataclass(frozen=True)
class Job:
    names: list[str]
    batch: int
    width: int
    ranks: int
    repeats: int
    threads: int
    wall: bool
    memory: bool  # measure memory instead of time


def work(rank: int, job: Job, folder: str) -> None:
    """One rank of one job; rank's answer goes to a file."""
    torch.set_num_threads(job.threads)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if job.ranks > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=job.ranks)
    answer: dict[str, Any]
    if job.memory:
        (name,) = job.names
        small = Features.draw(1024, job.width, rank, job.ranks, device)
        small.step(METHODS[name].loss)  # what libraries allocate once
        f = Features.draw(job.batch, job.width, rank, job.ranks, device)
        answer = {name: peak_bytes(lambda: f.step(METHODS[name].loss), device)}
    else:
        f = Features.draw(job.batch, job.width, rank, job.ranks, device)
        times: dict[str, list[float]] = {name: [] for name in job.names}
        losses: dict[str, float] = {}
        for repeat in range(job.repeats + 1):
            for name in job.names:
                if job.ranks > 1:
                    dist.barrier()
                loss = METHODS[name].loss
                taken, losses[name] = seconds(lambda loss=loss: f.step(loss), device, wall=job.wall)  # type: ignore[misc]
                if repeat:  # the first round warms up
                    times[name].append(taken)
        answer = {name: {"seconds": statistics.median(times[name]), "loss": losses[name]} for name in job.names}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(answer))
    if job.ranks > 1:
        dist.destroy_process_group()


def run(job: Job) -> list[dict[str, Any]]:
    """Every rank's answer."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (job, folder), job.ranks)
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(job.ranks)]


def measure(names: list[str], batch: int, ranks: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per method."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = fitting(names, batch, ranks, device)
    answers = run(Job(names, batch, args.width, ranks, args.repeats, args.threads, args.wall, memory=False))
    taken = {name: statistics.mean(answer[name]["seconds"] for answer in answers) for name in names}
    rows = []
    for name in names:
        peak = math.nan
        if args.memory and ranks == 1 and name != "floor":
            (answer,) = run(Job([name], batch, args.width, ranks, 1, args.threads, args.wall, memory=True))
            peak = answer[name]
        reference = REFERENCES[METHODS[name].family]
        rows.append(
            {
                "ranks": ranks,
                "batch": batch,
                "width": args.width,
                "method": name,
                "seconds": taken[name],
                "of_reference": taken[name] / taken[reference] if reference in taken else None,
                "of_floor": taken[name] / taken["floor"] if "floor" in taken else None,
                "tflops": METHODS[name].products * 2 * batch * batch / ranks * args.width / taken[name] / 1e12,
                "units": 4 * taken[name] / taken["floor"] if "floor" in taken else None,
                "peak_mib": None if math.isnan(peak) else peak / 2**20,
                "loss": statistics.mean(answer[name]["loss"] for answer in answers) if name != "floor" else None,
            }
        )
    return rows


COLUMNS = {  # key of a row -> head of the column, and how numbers look
    "ms": ("ms", "{:,.2f}"),
    "of_reference": ("of reference", "{:.3f}"),
    "of_floor": ("x floor", "{:.2f}"),
    "units": ("units", "{:.2f}"),
    "tflops": ("TFLOP/s", "{:.3g}"),
    "peak_mib": ("peak MiB", "{:,.0f}"),
    "loss": ("loss", "{:.5f}"),
}


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table("method", "ranks", "batch", "width", *(head for head, _ in COLUMNS.values()))
    for row in rows:
        shown = row | {"ms": 1e3 * row["seconds"]}
        numbers = ["" if shown[key] is None else form.format(shown[key]) for key, (_, form) in COLUMNS.items()]
        out.add_row(row["method"], str(row["ranks"]), f"{row['batch']:,}", f"{row['width']:,}", *numbers)
    return out


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Time and peak memory against the batch, both axes logarithmic, one process."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from amclr_scale.study.report.compact import palette_png

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    shown = ["open_clip", "clip", "clip, cached", "open_clip siglip", "siglip", "fastclip, dense", "sogclr", "floor"]
    for axis, key, label in zip(
        axes, ("seconds", "peak_mib"), ("seconds per step", "peak memory beyond features, MiB"), strict=True
    ):
        for number, name in enumerate(shown):
            points = [(r["batch"], r[key]) for r in rows if r["method"] == name and r["ranks"] == 1 and r[key]]
            dense = METHODS[name].bytes_per_pair > 4
            style = ":" if name == "floor" else "--" if dense else "-"
            if points:
                axis.plot(*zip(*points, strict=True), style, marker="o", ms=4, color=f"C{number}", label=name)
        axis.set(xscale="log", yscale="log", xlabel="global batch B", ylabel=label)
        ticks = sorted({r["batch"] for r in rows})
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
    file.write_bytes(palette_png(file.read_bytes()))


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(threads: int) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": threads,
        "torch": torch.__version__,
        "triton": triton_version(),
        "similarities": describe(current(), torch.device("cuda" if gpu else "cpu")),
        "python": platform.python_version(),
    }


def defaults(args: argparse.Namespace, *, cuda: bool) -> dict[str, Any]:
    """What was not given."""
    plain = {
        "batch": [1024, 2048, 4096, 8192], "width": 512, "ranks": [1, 2], "methods": list(METHODS), "repeats": 5,
    }  # fmt: skip
    if args.quick:
        rows = ["open_clip", "inf_cl", "floor", *(name for name in METHODS if name.startswith(("clip", "siglip")))]
        rows = [name for name in rows if "cached" not in name]
        return plain | {"batch": [8192, 32768] if cuda else [2048], "ranks": [1], "methods": rows, "repeats": 3}
    if args.large:
        rows = ["floor", "clip", "clip, fp32 rows, bf16"]
        return plain | {
            "batch": [65536, 262144, 1048576], "width": 768, "ranks": [1], "methods": rows, "repeats": 1,
        }  # fmt: skip
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", help="global batch sizes (1,024 to 8,192)")
    parser.add_argument("--width", type=int, help="embedding width D (512)")
    parser.add_argument("--ranks", type=int, nargs="+", choices=(1, 2), help="(1 2)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help="(all that fit)")
    parser.add_argument("--repeats", type=int, help="rounds, after one to warm up (5)")
    parser.add_argument("--quick", action="store_true", help="CLIP's and SigLIP's rows at one size or two: a minute")
    parser.add_argument("--large", action="store_true", help="CUDA: ours at B = 65,536, 262,144 and 1,048,576, D = 768")
    parser.add_argument("--threads", type=int, default=1, help="threads per rank")
    parser.add_argument("--wall", action="store_true", help="wall time instead of CPU time; for an idle machine")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="measure time only")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw time and memory against B into this PNG")
    args = parser.parse_args()
    for name, value in defaults(args, cuda=torch.cuda.is_available()).items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    console = Console(width=110)
    rows: list[dict[str, Any]] = []
    console.print(machine(args.threads))
    for ranks in args.ranks:
        for batch in args.batch:
            rows += measure(args.methods, batch, ranks, args)
            console.print(table([row for row in rows if row["batch"] == batch and row["ranks"] == ranks]))
            if args.json:  # after each size: a long run that is stopped has its figures
                args.json.write_text(json.dumps({"machine": machine(args.threads), "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
