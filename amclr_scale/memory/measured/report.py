"""`execution.memory_report`: what the first steps of a run hold, beside what was predicted.

Writes into the run folder: `memory.json`, every number in bytes; `memory.md`, the same as tables; on CUDA also
`memory_snapshot.pickle`, every allocation of these steps with its origin, for https://pytorch.org/memory_viz.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from amclr_scale.engine.batch_plan import Position
from amclr_scale.engine.hooks import Hook
from amclr_scale.engine.teacher import Teacher
from amclr_scale.memory.account import Account
from amclr_scale.memory.measured.phase_peaks import MemoryReport
from amclr_scale.memory.units import in_words
from amclr_scale.metrics.phases import Phases

STEPS = 3  # looked at; the first one is left out, in which optimizer states begin to exist
SNAPSHOT_ENTRIES = 200_000


class StepMemory(Hook):
    """Every rank looks on, so that all take equally long; the one with a prediction writes, and says it in words.

    Args:
        folder: the run's.
        predicted: its account; None on other ranks than 0.
        say: where the words go.
    """

    def __init__(
        self, folder: Path, predicted: Account | None, *, device: torch.device, engine: Any, objective: nn.Module,
        phases: Phases, say: Callable[[str], object], teacher: Teacher | None = None,
    ):  # fmt: skip
        self.folder, self.predicted, self.device, self.say = folder, predicted, device, say
        self.steps = 0
        self._begin = partial(MemoryReport, device, engine, objective, phases, teacher)
        self._report: MemoryReport | None = None

    def __enter__(self) -> Self:
        self._report = self._begin()
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
        return self

    def __exit__(self, *error: object) -> None:
        if self._report is not None:
            self._report.close()

    def after_step(self, done: Position) -> None:
        if self._report is None:
            return
        self.steps += 1
        if self.steps == 1:
            self._report.restart()
        if self.steps < STEPS:
            return
        report, self._report = self._report, None
        report.close()
        if self.device.type == "cuda":
            if self.predicted is not None:
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory_snapshot.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self.predicted is None:
            return
        (self.folder / "memory.json").write_text(json.dumps(as_json(self.predicted, report), indent=1) + "\n")
        (self.folder / "memory.md").write_text(as_markdown(self.predicted, report))
        self.say(in_text(self.predicted, report))


def as_json(predicted: Account, report: MemoryReport) -> dict[str, Any]:
    """Everything, in bytes."""
    phases = {
        phase: {"predicted": predicted.by_phase[phase], "measured": peak.allocated, "reserved": peak.reserved,
                "parts": peak.parts}
        for phase in predicted.phases if (peak := report.peaks.get(phase))
    }  # fmt: skip
    return {
        "device": str(report.device),
        "ranks": predicted.world_size,
        "local_batch_size": predicted.local_batch_size,
        "micro_batch_sizes": predicted.micro_batch_sizes,
        "phases": phases,
        "state": report.state,
        "components": [{**asdict(c), "by_phase": dict(c.by_phase)} for c in predicted.components if c.bytes],
        "notes": predicted.notes,
    }


def _rows(predicted: Account, report: MemoryReport) -> list[tuple[str, str, str, str, str]]:
    found = list[tuple[str, str, str, str, str]]()
    for phase in predicted.phases:
        peak = report.peaks.get(phase)
        if peak is not None and peak.allocated:
            ours = predicted.by_phase[phase]
            error = f"{ours / peak.allocated - 1:+.1%}"
            found.append((phase, in_words(ours), in_words(peak.allocated), error, in_words(peak.reserved)))
    return found


def in_text(predicted: Account, report: MemoryReport) -> str:
    """Phases for the console."""
    lines = [f"memory of steps 2 to {STEPS} on rank 0, as predicted and as measured:"]
    lines += [
        f"  {phase:10} {ours:>12} {theirs:>12} {error:>8}" for phase, ours, theirs, error, _ in _rows(predicted, report)
    ]
    return "\n".join([*lines, f"  {predicted.advice()}"])


def as_markdown(predicted: Account, report: MemoryReport) -> str:
    """Two tables: peaks by phase, and the components behind them."""
    head = f"# Memory of one rank of {predicted.world_size}\n\nSteps 2 to {STEPS}, on {report.device}.\n"
    table = ["| phase | predicted | measured | error | reserved |", "|---|---|---|---|---|"]
    table += [f"| {' | '.join(row)} |" for row in _rows(predicted, report)]
    parts = ["| phase | measured, by what it is or by the phase that made it |", "|---|---|"]
    for phase in predicted.phases:
        if (peak := report.peaks.get(phase)) and peak.parts:
            largest = sorted(peak.parts.items(), key=lambda part: -part[1])
            parts.append(f"| {phase} | {', '.join(f'{name} {in_words(size)}' for name, size in largest)} |")
    blocks = [head, "\n".join(table), "Predicted:", f"```\n{predicted.table()}\n```", predicted.advice()]
    if len(parts) > 2:
        blocks += ["Measured:", "\n".join(parts)]
    return "\n\n".join(blocks) + "\n"
