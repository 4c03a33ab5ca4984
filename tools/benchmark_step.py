"""A whole training step against open_clip's: same towers in kind, same batch, precision and optimizer, one process.

    python tools/benchmark_step.py                                      # ViT-B/32, 2,048 pairs, bf16, on a GPU
    python tools/benchmark_step.py --towers rn50 --batch 1024 --micro-batch 128 --out FOLDER
    python tools/benchmark_step.py --quick --profile --out FOLDER       # a minute, and where the time goes
    python tools/benchmark_step.py --towers toy --batch 32 --micro-batch 8 --device cpu

plain        everything in one micro-batch                     open_clip    its training step under autocast
cached       micro-batches, one kept: theory (3 + (n-1)/n)/3   accumulated  its step with --accum-freq n: theory 4/3
recomputed   plain, all blocks recomputed in backward          checkpointed its step with --grad-checkpointing
compiled     plain, towers compiled                            unaligned    plain, parameters in the model's order
cached_compiled   both

Random pixels and words from pinned memory: uint8 for ours, normalised float32 for open_clip, as their loaders give
them. Variants run in turn, several rounds; each turn begins with a step that is not counted, figures are medians. On a
CPU the time is CPU time. Peak memory is of one variant alone: its own state, and what its step adds. A variant that
fails is named with its error and the others go on.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tools.step_profile import profile_step
from tools.step_runners import PAIRS, Ours, Theirs, Variant, held

OURS = ("plain", "cached", "recomputed", "compiled", "cached_compiled", "unaligned")
THEIRS = ("open_clip", "accumulated", "checkpointed")
RECORDED = ("towers", "batch", "micro_batch", "precision", "zero_stage", "rounds", "steps")
DEFAULT = ("plain", "cached", "recomputed", "open_clip", "accumulated", "checkpointed")


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def failure(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"


def benchmark(
    options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, dict[str, Any]], dict[str, Variant]]:
    """Figures by variant, and the variants that ran."""
    pair = PAIRS[options.towers]
    makers: dict[str, Any] = {}
    ready, found = dict[str, Variant](), dict[str, dict[str, Any]]()
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}

    def free() -> None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def attempt(name: str, run: Callable[[], None]) -> None:
        free()
        try:
            run()
        except Exception as error:  # whatever it is: the other variants have their own figures
            found[name] = {"error": failure(error)}
            ready.pop(name, None)
            print(f"{name}: {found[name]['error']}", file=sys.stderr, flush=True)

    def prepare(name: str) -> None:
        kind = Ours if name in OURS else Theirs
        if kind.__name__ not in makers:
            makers[kind.__name__] = kind(pair, options, device)
        begin = time.perf_counter()
        ready[name] = makers[kind.__name__].variant(name)
        print(f"{name}: first step after {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)

    def measure(name: str) -> None:
        variant = ready[name]
        variant.step()
        before = held(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(options.steps):
            begin = clock(device)
            variant.step()
            times.setdefault(name, []).append(clock(device) - begin)
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(device) - before

    for name in options.variants:
        attempt(name, lambda name=name: prepare(name))  # type: ignore[misc]
    for _ in range(options.rounds):
        for name in list(ready):
            attempt(name, lambda name=name: measure(name))  # type: ignore[misc]

    from amclr_scale.metrics.devices import device_peak

    peak = device_peak(device, options.precision)
    for name in ready:
        seconds = statistics.median(times[name])
        shared = {"cached": "plain", "recomputed": "plain", "cached_compiled": "compiled"}
        owner = shared.get(name, name if name in OURS else "open_clip")
        own = ready[owner].own if owner in ready else 0
        found[name] = {
            "ms": 1e3 * seconds,
            "samples_per_s": options.batch / seconds,
            "utilisation": None if peak is None else ready[name].flops * options.batch / seconds / peak,
            "gflop_per_sample": ready[name].flops / 1e9,
            "peak_gib": (own + peaks[name]) / 2**30 if name in peaks and own else None,
            "times_ms": [round(1e3 * t, 2) for t in times[name]],
        }
    return found, ready


def table(found: dict[str, dict[str, Any]]) -> str:
    def ratio(name: str, other: str) -> str:
        here, there = found[name].get("ms"), found.get(other, {}).get("ms")
        return f"{there / here:.2f}" if here and there else ""

    lines = ["| variant | ms | samples/s | utilisation | peak GiB | x open_clip | x plain |", "|---" * 7 + "|"]
    for name, row in found.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | |")
            continue
        used = "" if row["utilisation"] is None else f"{row['utilisation']:.1%}"
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        lines.append(
            f"| {name} | {row['ms']:.1f} | {row['samples_per_s']:,.0f} | {used} | {peak} | {ratio(name, 'open_clip')} "
            f"| {ratio(name, 'plain')} |"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], file: Path) -> None:
    """Samples per second by variant; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {name: row["samples_per_s"] for name, row in report["variants"].items() if "error" not in row}
    figure, axes = plt.subplots(figsize=(7, 0.5 + 0.4 * len(rows)), layout="constrained")
    names = list(rows)[::-1]
    bars = axes.barh(names, [rows[n] for n in names], color=["#3b6fb6" if n in OURS else "#b0b0b0" for n in names])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_xlabel(
        f"samples/s, {report['towers']}, batch {report['batch']:,}, {report['precision']}, {report['device']}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", choices=list(PAIRS), default="vit-b-32")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default=None, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2, 3], default=1)
    parser.add_argument("--variants", nargs="+", choices=[*OURS, *THEIRS], default=list(DEFAULT))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a variant's turn")
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of two steps, half the batch unless it is given"
    )
    parser.add_argument(
        "--profile", nargs="*", metavar="VARIANT", help="also trace these; without names plain and cached"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for benchmark_step.json, .png and profile_VARIANT.txt")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw what an earlier run wrote")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.steps = 2, 2
        if options.batch == parser.get_default("batch"):
            options.batch //= 2
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    return options


def main(argv: list[str] | None = None) -> int:
    """Print a table, and write files if asked to; 1 if a variant failed."""
    options = arguments(argv)
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))
        return 0
    os.environ["DS_ACCELERATOR"] = options.device
    from amclr_scale.distributed.launcher import RankInfo
    from amclr_scale.distributed.process_group import start

    device = start(RankInfo(), 1 if options.device == "cpu" else None)
    found, ready = benchmark(options, device)
    cuda = device.type == "cuda"
    report = {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "deepspeed", "open_clip_torch", "timm")},
        **{key: getattr(options, key) for key in RECORDED},
        "variants": found,
    }  # fmt: skip
    print(table(found), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "benchmark_step.json").write_text(json.dumps(report, indent=1) + "\n")
        try:
            draw(report, options.out / "benchmark_step.png")
        except ImportError as error:
            print(f"no picture: {error}; --draw makes one from the JSON elsewhere", file=sys.stderr)
    for name in [] if options.profile is None else options.profile or ["plain", "cached"]:
        if name not in ready:
            continue
        try:
            text = f"{name}\n{profile_step(ready[name].step, device, ready[name].phases)}"
        except Exception as error:  # a trace that fails takes nothing of the figures with it
            text = f"{name}: {failure(error)}\n"
        print(f"\n{text}", flush=True)
        if options.out:
            (options.out / f"profile_{name}.txt").write_text(text)
    return int(any("error" in row for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
