"""What a running job holds, by phase of a step: from the CUDA allocator, or on a CPU tensor by tensor.

    report = MemoryReport(device, engine, objective, phases)
    ...                                   # some steps
    report.close()
    report.peaks                          # phase -> Peak

On CUDA the allocator's own peaks are read at the end of each phase, which costs nothing and waits for nothing. On a CPU
a `WaitingTracker` is switched on inside the phases; it sees what this thread's operations allocate, in forward,
backward and DeepSpeed's hooks, says at each peak how much was parameters, optimizer states, gradients, and what each
phase made, and waits for each collective. Nothing that is computed changes. A step takes longer by some 10 to 30
microseconds for each operation, and a millisecond for each collective.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amclr_scale.encoders.resting import resting_weights
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.gradient_sums import held_gradient
from amclr_scale.memory.measured.gloo import WaitingTracker
from amclr_scale.metrics.phases import Phases

PARAMETERS, BUFFERS, OPTIMIZER, SAMPLE_STATE = "parameters", "buffers", "optimizer states", "sample state"
GRADIENTS, SHARES, BUCKET = "gradients", "gradient shares", "reduction bucket"
GATHERED = "gathered parameters"
AVERAGE, RESTING = "moving average", "towers at rest"
STATE = (PARAMETERS, BUFFERS, OPTIMIZER, SAMPLE_STATE, AVERAGE, RESTING)


@dataclass
class Peak:
    """The most that a phase held.

    Attributes:
        allocated: bytes.
        reserved: bytes that the CUDA allocator had from the driver; on a CPU the same as allocated.
        parts: bytes by what they are, or by the phase that made them; empty on CUDA.
    """

    allocated: int = 0
    reserved: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class MemoryReport:
    """Looks on while phases go by, until it is closed.

    Args:
        engine: DeepSpeed's, with the model and optimizer.
        objective: its buffers are the state per sample.
        phases: of the step that is looked at.
        teacher: of the run.

    Attributes:
        peaks: of each phase, over all steps since the last `restart`.
        state: bytes by kind that stay from step to step, as of the last `restart`.
    """

    def __init__(
        self, device: torch.device, engine: Any, objective: nn.Module, phases: Phases, teacher: Teacher | None = None
    ):
        self.device, self.engine, self.objective, self.phases = device, engine, objective, phases
        self.teacher = teacher
        self.peaks: dict[str, Peak] = {}
        self.state: dict[str, int] = {}
        self.tracker = WaitingTracker(device.type) if device.type != "cuda" else None
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        self._hooks = [] if self.tracker is None else list(map(self._hook, trained))
        self._coordinator = _coordinator(engine) if self.tracker is not None else None
        if self._coordinator is not None:
            self._coordinator.fetch_sub_module = self._labelled(self._coordinator.fetch_sub_module)
        phases.observe = self._phase

    def restart(self) -> None:
        """Forget the peaks: what only the first step does (optimizer states begin to exist) is over."""
        self.peaks = {}
        self.state = {name: _size(tensors) for name, tensors in self._walk().items() if name in STATE}

    def close(self) -> None:
        """Look on no longer."""
        self.phases.observe = None
        for hook in self._hooks:
            hook.remove()
        if self._coordinator is not None:
            del self._coordinator.fetch_sub_module  # the class's own is there again

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        peak = self.peaks.setdefault(name, Peak())
        if self.tracker is None:
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            peak.allocated = max(peak.allocated, torch.cuda.max_memory_allocated(self.device))
            peak.reserved = max(peak.reserved, torch.cuda.max_memory_reserved(self.device))
            return
        for kind, tensors in self._walk().items():
            self.tracker.add(tensors, kind)
        self.tracker.label = name
        self.tracker.reset_peak()
        with self.tracker:
            yield
        if self.tracker.peak > peak.allocated:
            parts = {label: size for label, size in self.tracker.at_peak.items() if size}
            self.peaks[name] = Peak(self.tracker.peak, self.tracker.peak, parts)

    def _walk(self) -> dict[str, list[Tensor]]:
        """What stays from step to step, by kind."""
        module, optimizer = self.engine.module, self.engine.optimizer
        return {
            PARAMETERS: [_held(p) for p in module.parameters()],
            BUFFERS: list(module.buffers()),
            OPTIMIZER: list(_optimizer_tensors(optimizer, set(map(id, module.parameters())))),
            SAMPLE_STATE: list(self.objective.buffers()),
            RESTING: list(resting_weights(module).values()) if self.device.type == "cpu" else [],
            AVERAGE: list(self.teacher.tensors()) if self.teacher else [],
            SHARES: [x for x in [getattr(optimizer, "grad_partitions_flat_buffer", None)] if x is not None],
            BUCKET: list(_buckets(optimizer)),
        }

    def _labelled(self, fetch: Callable[..., Any]) -> Callable[..., Any]:
        """Stage 3's gathering of parameters, counted as such rather than as the phase's."""

        def run(*args: Any, **kwargs: Any) -> Any:
            assert self.tracker is not None
            before, self.tracker.label = self.tracker.label, GATHERED
            try:
                return fetch(*args, **kwargs)
            finally:
                self.tracker.label = before

        return run

    def _hook(self, parameter: nn.Parameter) -> Any:
        def relabel(p: Tensor) -> None:
            held = held_gradient(p)
            if held is not None and self.tracker is not None:
                self.tracker.add([held], GRADIENTS)

        return parameter.register_post_accumulate_grad_hook(relabel)


def _coordinator(engine: Any) -> Any:
    """What gathers parameters at stage 3."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator()


def _held(parameter: nn.Parameter) -> Tensor:
    """What this rank keeps of a parameter: at stage 3 its share."""
    return getattr(parameter, "ds_tensor", parameter)


def _optimizer_tensors(optimizer: Any, own: set[int]) -> Iterator[Tensor]:
    """fp32 masters and states of DeepSpeed's wrapper, or of a plain optimizer."""
    plain = getattr(optimizer, "optimizer", optimizer)
    yield from getattr(optimizer, "fp32_partitioned_groups_flat", ())  # stage 3
    for group in plain.param_groups:
        yield from (p for p in group["params"] if id(p) not in own)
    for state in plain.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _buckets(optimizer: Any) -> Iterator[Tensor]:
    """What stage 3 gathers gradients in, all the time; the other stages make theirs for each reduction."""
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        if isinstance(bucket.buffer, Tensor):
            yield bucket.buffer


def _size(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
