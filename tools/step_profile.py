"""What one training step spends its time on, as text: kernels, launches, gaps, waits. For tools/benchmark_step.py.

device busy    the union of all kernels and copies over the step's time: what is missing, the device spent waiting
host ahead     time that the host waits inside CUDA calls for the device; little of it, and the host is the bottleneck
waits          places in our or a library's Python code that make the host wait for the device
"""

import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
ROWS = 25


@dataclass(frozen=True)
class Stretch:
    """An event of the trace, in microseconds."""

    name: str
    begin: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.begin


def union(stretches: list[Stretch]) -> float:
    """Time that is covered by at least one."""
    covered = reached = 0.0
    for s in sorted(stretches, key=lambda s: s.begin):
        covered += max(0.0, s.end - max(s.begin, reached))
        reached = max(reached, s.end)
    return covered


def gaps(stretches: list[Stretch]) -> list[tuple[float, str, str]]:
    """(length, what ended before it, what began after it), the longest first."""
    found, reached, last = list[tuple[float, str, str]](), 0.0, ""
    for s in sorted(stretches, key=lambda s: s.begin):
        if last and s.begin > reached:
            found.append((s.begin - reached, last, s.name))
        if s.end > reached:
            reached, last = s.end, s.name
    return sorted(found, reverse=True)


def waits(step: Callable[[], object]) -> Counter[str]:
    """Where a step makes the host wait for a CUDA device: innermost frames, and how often."""
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            found[" < ".join(f"{_short(f.filename)}:{f.lineno}" for f in reversed(frames[-3:]))] += 1

    shown, warnings.showwarning = warnings.showwarning, note
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = shown
    return found


def _short(path: str) -> str:
    return "/".join(path.split("/")[-2:])


def _table(title: str, total: float, times: dict[str, list[float]], rows: int = ROWS) -> list[str]:
    lines = [f"{title:<72} {'ms':>9} {'share':>6} {'calls':>6} {'us each':>8}"]
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:rows]:
        spent, calls = sum(each), len(each)
        lines.append(
            f"{name[:72]:<72} {spent / 1e3:9.2f} {spent / max(total, 1e-9):6.1%} {calls:6d} {spent / calls:8.1f}"
        )
    return lines


def profile_step(step: Callable[[], object], device: torch.device, phases: Callable[[], dict[str, float]]) -> str:
    """Run a step three times (as it is, traced, watched for waits) and say what it did.

    Args:
        step: one optimizer step; warmed up.
        phases: seconds by phase since it was last asked.
    """
    cuda = device.type == "cuda"

    def finish() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    phases()
    finish()
    begin = time.perf_counter()
    step()
    issued = time.perf_counter() - begin
    finish()
    taken = time.perf_counter() - begin
    by_phase = phases()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
        step()
        finish()

    kernels, copies, host, runtime = (defaultdict[str, list[float]](list) for _ in range(4))
    busy: list[Stretch] = []
    for event in trace.events() or ():
        begin_us, end_us = event.time_range.start, event.time_range.end
        if str(event.device_type).endswith("CUDA"):
            if event.is_user_annotation:
                continue
            busy.append(Stretch(event.name, begin_us, end_us))
            copying = event.name.startswith(("Memcpy", "Memset"))
            (copies if copying else kernels)[event.name].append(end_us - begin_us)
        elif event.name.startswith("cu"):
            runtime[event.name].append(end_us - begin_us)
        else:
            host[event.name].append(event.self_cpu_time_total)
    lines = [
        f"step {taken * 1e3:.1f} ms, host done after {issued * 1e3:.1f} ms (untraced)",
        "phases: " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in by_phase.items()),
    ]
    operators = sum(len(each) for name, each in host.items() if name.startswith("aten::"))
    lines.append(f"operators on the host: {operators}")
    if cuda:
        span = max(s.end for s in busy) - min(s.begin for s in busy)
        covered = union(busy)
        launches, alone = sum(map(len, kernels.values())), sum(map(sum, kernels.values()))
        waited = sum(sum(each) for name, each in runtime.items() if name.startswith(WAITING))
        lines += [
            f"traced: device busy {covered / 1e3:.1f} of {span / 1e3:.1f} ms ({covered / span:.1%}), "
            f"{launches} kernels, {sum(map(len, copies.values()))} copies; kernels alone {alone / 1e3:.1f} ms",
            f"busy of the untraced step: {covered / 1e3 / (taken * 1e3):.1%}",
            f"host waited {waited / 1e3:.1f} ms inside CUDA calls",
            "",
            *_table("kernels", covered, kernels),
            "",
            *_table("copies", covered, copies, 8),
            "",
            *_table("CUDA calls of the host", span, runtime, 12),
            "",
            "longest gaps of the device:",
            *(f"{length:9.0f} us  after {a[:50]}  before {b[:50]}" for length, a, b in gaps(busy)[:12]),
            "",
            "waits of the host for the device:",
            *(f"{count:5d} x {where}" for where, count in waits(step).most_common(20)),
        ]
    lines += ["", *_table("operators of the host, own time", issued * 1e6, host)]
    return "\n".join(lines) + "\n"
