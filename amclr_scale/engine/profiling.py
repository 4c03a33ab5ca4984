"""A torch.profiler trace of a few steps, and DeepSpeed's own summaries of operations and messages."""

import contextlib
import io
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from amclr_scale.engine.batch_plan import Position
from amclr_scale.engine.hooks import Hook
from amclr_scale.engine.step import StepReport
from amclr_scale.types import Batch

SKIPPED = 3  # first steps: allocation, compilation, the loader's start


class StepProfiler(Hook):
    """Profiles so many steps of a run; 0 steps: nothing.

    Writes into `profile/` of the run folder: `rank0.json`, one per rank, for chrome://tracing or Perfetto;
    `operators.txt`, the most expensive operators; `messages.txt`, DeepSpeed's messages between ranks by collective,
    size and time; `flops.txt`, its floating-point operations by module. All ranks leave it together.
    """

    def __init__(self, folder: Path, steps: int, rank: int):
        self.folder, self.steps, self.rank, self.done = folder / "profile", steps, rank, 0
        self._profiler: Any = None
        if steps:
            self.folder.mkdir(parents=True, exist_ok=True)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=lambda p: p.export_chrome_trace(str(self.folder / f"rank{rank}.json")),
                profile_memory=True,
            )

    def on_step(self, done: Position, batch: Batch, report: StepReport) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def __enter__(self) -> Self:
        if self._profiler is not None:
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profiler is None:
            return
        self._profiler.__exit__(*error)
        if any(error) or self._profiler.profiler is None:
            return  # other ranks may be gone, and the summary below waits for them; or there were too few steps
        import deepspeed  # which has been imported where anything is trained, and is needed nowhere else

        summary = io.StringIO()
        with contextlib.redirect_stdout(summary):
            deepspeed.comm.log_summary()
        if self.rank == 0:
            table = self._profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
            (self.folder / "operators.txt").write_text(table)
            (self.folder / "messages.txt").write_text(summary.getvalue())
