"""What a run will hold in memory, by component and by phase of a step, before it starts.

    found = account(config, world_size=8, num_samples=2_900_000, device="cuda")
    print(found.table())              # GiB and MiB per component and phase
    found.peak_bytes, found.peak_phase

Everything is per rank. A step goes through the phases of `PHASES`; a component counts in each phase with the bytes that
it has at the moment when that phase as a whole is largest, so the components of a phase add up to its peak.

Nothing is guessed where it can be run: the towers are traced on tensors without memory (`towers.py`), the objective on
a few rows among pretended ranks (`objective_memory.py`), the optimizer on one small parameter; what DeepSpeed allocates
follows its code (`state.py`). Each is done once per recipe, so that hundreds of execution settings take a second.
"""

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch

from amclr_scale.config.objective_options import declared
from amclr_scale.config.schema import Config
from amclr_scale.config.teacher import lent_sides
from amclr_scale.data.beside.references import reference_widths
from amclr_scale.distributed.launcher import ranks_on_node
from amclr_scale.engine.batch_plan import Plan, make_plan
from amclr_scale.engine.optimizers import parameter_groups
from amclr_scale.memory.components import PHASES, TEACHER, Component, Phase, always
from amclr_scale.memory.inputs import input_components
from amclr_scale.memory.objective_memory import (
    host_state_bytes,
    objective_memory,
    sample_state_bytes,
    staged_bytes,
)  # fmt: skip
from amclr_scale.memory.passes import Passes
from amclr_scale.memory.random_embeddings import layer_widths, made_together
from amclr_scale.memory.state import Groups, state_components, stepped
from amclr_scale.memory.teacher import Weights, teacher_components
from amclr_scale.memory.towers import input_sizes, skeleton, token_counts
from amclr_scale.memory.units import in_words
from amclr_scale.similarity import Group, Settings
from amclr_scale.similarity.backends import workspace
from amclr_scale.similarity.blocks import Workspace
from amclr_scale.similarity.distribution import choose
from amclr_scale.similarity.settings import Distribution

# On CUDA, beside tensors: cuBLAS's workspace (PyTorch's default of 4096 KiB x 8 on Hopper; 8 MiB before it), and what
# the caching allocator cannot hand out: blocks are rounded to 512 bytes, and what is split off them stays unused.
CUBLAS_WORKSPACE, FRAGMENTATION = 32 * 2**20, 0.05


class Device(Protocol):
    """Where the run will be: a torch.device, or a profile of one."""

    @property
    def type(self) -> str:
        """`cpu` or `cuda`."""


@dataclass(frozen=True)
class Account:
    """Components of one rank, and what they add up to."""

    components: tuple[Component, ...]
    device: str
    world_size: int
    local_batch_size: int
    micro_batch_sizes: tuple[int, int]  # images, texts
    notes: tuple[str, ...] = field(default=())  # what the numbers leave out or bound
    phases: tuple[Phase, ...] = PHASES  # of this run's steps

    def in_phase(self, phase: Phase, place: str = "device") -> int:
        """Bytes at the peak of a phase."""
        return sum(c.by_phase.get(phase, 0) for c in self.components if c.place == place)

    @property
    def by_phase(self) -> dict[Phase, int]:
        """Bytes on the device at the peak of each phase."""
        return {phase: self.in_phase(phase) for phase in self.phases}

    @property
    def peak_phase(self) -> Phase:
        """The phase with the largest peak."""
        return max(self.phases, key=self.in_phase)

    @property
    def peak_bytes(self) -> int:
        """On the device, over the whole step."""
        return self.in_phase(self.peak_phase)

    @property
    def host_bytes(self) -> int:
        """In the host's memory, beside the device's."""
        return max(self.in_phase(phase, "host") for phase in self.phases)

    def of_kind(self, *kinds: str, phase: Phase | None = None) -> int:
        """Bytes of some kinds of components on the device at the peak of a phase, by default of the largest one."""
        at = phase or self.peak_phase
        return sum(c.by_phase.get(at, 0) for c in self.components if c.kind in kinds and c.place == "device")

    def largest(self, phase: Phase | None = None) -> Component:
        """The component that takes most at the peak of a phase, by default of the largest phase."""
        at = phase or self.peak_phase
        return max((c for c in self.components if c.place == "device"), key=lambda c: c.by_phase.get(at, 0))

    def advice(self, limit: int | None = None, phase: Phase | None = None) -> str:
        """Which component is the largest, which key shrinks it, and by how much the whole misses a limit in bytes.

        Args:
            limit: bytes of the device's memory.
            phase: where memory ran out; None: the phase with the largest peak.
        """
        at = phase or self.peak_phase
        top, need = self.largest(at), self.in_phase(at)
        share = f"{in_words(top.by_phase.get(at, 0))} of {in_words(need)} in phase {at}"
        missing = (
            f"{in_words(need - limit)} more than {in_words(limit)}; " if limit is not None and need > limit else ""
        )
        return f"{missing}largest: {top.name}, {share}; {top.knob}"

    def table(self) -> str:
        """Text: components down, phases across."""
        shown = [c for c in self.components if c.bytes]
        names = [c.name if c.place == "device" else f"{c.name} (host)" for c in shown]
        wide = max(map(len, (*names, "total")))

        def row(name: str, sizes: list[int]) -> str:
            return f"{name:{wide}}" + "".join(f"{in_words(size) if size else '':>12}" for size in sizes)

        lines = [f"{'':{wide}}" + "".join(f"{phase:>12}" for phase in self.phases)]
        lines += [row(n, [c.by_phase.get(p, 0) for p in self.phases]) for n, c in zip(names, shown, strict=True)]
        lines.append(row("total", list(self.by_phase.values())))
        if self.host_bytes:
            lines.append(row("total (host)", [self.in_phase(p, "host") for p in self.phases]))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def account(config: Config, *, world_size: int, num_samples: int, device: str | Device = "cuda") -> Account:
    """What one rank of a run will hold. Only before torch.distributed is initialised: ranks are pretended.

    Args:
        config: of the run.
        world_size: W.
        num_samples: N, the size of the data set.
        device: "cpu", "cuda", or something with that as its `type`.

    Raises:
        UserError: the model cannot be built, or the execution settings do not fit it.
    """
    kind = device if isinstance(device, str) else device.type
    plan = make_plan(config, num_samples, world_size)
    groups, frozen, buffers = _sizes(config.model_dump_json(include={"model", "data", "objective", "optimizer"}))
    passes = Passes(config, plan, kind, sizes=[size for group in groups for size in group])
    components = [
        *state_components(
            config,
            groups,
            frozen,
            buffers,
            world_size,
            kind,
            gradients_in_pass_2=passes.peaks["pass_2"].gradients,
            widening=passes.widening,
        ),
        *passes.components(),
        *teacher_components(config, plan, kind, Weights(*stepped(config, groups, world_size, kind, buffers)), passes),
        *_objective_components(config, plan, num_samples, kind, passes),
        *input_components(config, plan, kind),
    ]
    if kind == "cuda":
        peaks = {p: sum(c.by_phase.get(p, 0) for c in components if c.place == "device") for p in (*PHASES, TEACHER)}
        slack = {p: CUBLAS_WORKSPACE + round(FRAGMENTATION * size) for p, size in peaks.items()}
        components.append(
            Component("workspace and fragmentation", slack, "PYTORCH_ALLOC_CONF=expandable_segments:True", "slack")
        )
    return Account(
        tuple(components),
        kind,
        world_size,
        plan.local_batch_size,
        plan.micro_batch_sizes,
        _notes(config, kind),
        phases_of(config),
    )


def phases_of(config: Config) -> tuple[Phase, ...]:
    """Of a step, in its order."""
    if not lent_sides(config) or config.model.momentum is None:
        return PHASES
    at = PHASES.index("pass_1") + (config.model.momentum.order == "last")
    return (*PHASES[:at], TEACHER, *PHASES[at:])


def _notes(config: Config, device: str) -> tuple[str, ...]:
    """What the numbers leave out or bound."""
    notes = []
    if config.execution.compile:
        notes.append("execution.compile: compiled towers may need less or more than accounted")
    if together := made_together(json.dumps(config.objective, sort_keys=True), config.model.embedding_width):
        notes.append(f"left out: activations of the objective's parts that read both sides ({', '.join(together)})")
    if lent_sides(config) and config.execution.zero_stage == 3:
        notes.append("what a teacher gathers at stage 3 is taken for what the first pass does")
    for name in reference_widths(config.data)[1]:
        notes.append(f"data.{name}: the file is not here, so its width is taken for model.embedding_width")
    if config.execution.kept_micro_batches == "auto":
        notes.append("execution.kept_micro_batches: auto is counted as 1")
    if device == "cuda":
        notes.append("beside this, the CUDA context of a process takes some 0.5 GiB, and NCCL's buffers as much")
    else:
        notes.append("on a CPU texts are cut to the longest caption of a micro-batch: this bounds them from above")
    return tuple(notes)


def inputs_on_host(config: Config, *, world_size: int, num_samples: int, device: str | Device = "cuda") -> int:
    """Bytes of the host's memory that batches alone take: part of the account, and known without tracing anything."""
    kind = device if isinstance(device, str) else device.type
    inputs = input_components(config, make_plan(config, num_samples, world_size), kind)
    return max(sum(c.by_phase.get(phase, 0) for c in inputs if c.place == "host") for phase in PHASES)


@lru_cache(maxsize=64)
def _sizes(recipe: str) -> tuple[Groups, tuple[int, ...], int]:
    """Elements of each trained parameter by optimizer group, of each frozen one, and bytes of buffers."""
    config = Config.model_validate_json(recipe)
    model = skeleton(config)
    groups = parameter_groups(
        model.named_parameters(), model.no_weight_decay(), config.optimizer, model.learning_rate_factors(),
        model.depths,
    )  # fmt: skip
    elements = tuple(tuple(p.numel() for p in group["params"]) for group in groups)
    frozen = tuple(p.numel() for p in model.parameters() if not p.requires_grad)
    return elements, frozen, sum(buffer.nbytes for buffer in model.buffers())


def _objective_components(config: Config, plan: Plan, num_samples: int, device: str, passes: Passes) -> list[Component]:
    """State per sample, and what the objective's forward and backward need at their worst moment."""
    execution, b, W = config.execution, plan.local_batch_size, plan.world_size
    similarity = execution.similarity
    sizes, D = input_sizes(config), config.model.embedding_width
    F = layer_widths(sizes)
    state, layout = sample_state_bytes(config.objective, num_samples, W, execution.sample_state, width=D, layers=F)
    group = declared(config.objective).group_size
    memory = objective_memory(
        config.objective, width=D, world_size=W, gather=similarity.gather,
        distribution=_distribution(config, W, b, device), layout=layout, num_samples=num_samples,
        group_share=None if group is None else group / b, sizes=sizes,
    )  # fmt: skip
    settings = Settings(
        chunk=similarity.chunk, backend="torch" if token_counts(config) else similarity.backend,
        precision=similarity.precision, run_precision=execution.precision,
    )  # fmt: skip
    cores = execution.threads or max(1, (os.cpu_count() or 1) // W)
    held = _workspace(settings, device, cores)
    rows_at_once = max(1, 2**21 // (b * W)) if similarity.chunk == "auto" else similarity.chunk
    blocks, rest = memory.peak(b, workspace=held, rows_at_once=rows_at_once, cache_bytes=similarity.cache_mib * 2**20)
    gradients = passes.leaf_bytes  # counted there
    on_host = host_state_bytes(config.objective, num_samples, W, layout, width=D, layers=F)
    waiting = staged_bytes(config.objective, b, W, layout, width=D, layers=F)
    return [
        Component(
            "sample state", always(state), "execution.sample_state: sharded divides it by the ranks", "state",
        ),
        Component("sample state on the host", always(on_host), "objective.device", "state", "host"),
        Component(
            "changes of sample state", dict.fromkeys(("objective", "pass_2", "reduce", "optimizer"), waiting),
            "execution.sample_state: sharded divides it by the ranks", "state",
        ),
        Component(
            "similarity blocks", {"objective": blocks},
            "execution.similarity.chunk: a smaller one, and execution.similarity.cache_mib: 0", "similarity",
        ),
        Component(
            "gathered features and sums", {"objective": max(0, rest - gradients)},
            "execution.similarity.gather: ring keeps one rank's features at a time", "similarity",
        ),
    ]  # fmt: skip


def _distribution(config: Config, world_size: int, rows: int, device: str) -> Distribution:
    """What `auto` will choose once there are so many ranks."""
    one_node = ranks_on_node() == world_size
    wanted = config.execution.similarity.distribution
    return choose(wanted, Group(0, world_size, 0), rows, torch.device(device), one_node=one_node)


def _workspace(settings: Settings, device: str, threads: int) -> Workspace:
    """What the similarities' backend holds at a time, with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return workspace(settings, torch.device(device))
    finally:
        torch.set_num_threads(before)
