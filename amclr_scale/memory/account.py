"""What a run will hold in memory, by component and by phase of a step, before it starts.

    found = account(config, world_size=8, num_samples=2_900_000, device="cuda")
    print(found.table())              # GiB and MiB per component and phase
    found.peak_bytes, found.peak_phase

Everything is per rank. A step goes through the phases of `PHASES`; a component counts in each phase with the bytes that
it has at the moment when that phase as a whole is largest, so the components of a phase add up to its peak.

Activations come from running the towers on tensors without memory (`towers.py`), everything else from the sizes of
what the engine, DeepSpeed and the objective allocate. Calls are cheap: a tower is traced once per recomputation and
precision, and every micro-batch size follows from that trace.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from amclr_scale.config.schema import Config
from amclr_scale.engine.plan import make_plan
from amclr_scale.memory.state import state_of
from amclr_scale.memory.towers import skeleton, trace
from amclr_scale.memory.units import in_words

Phase = Literal["data", "pass_1", "objective", "pass_2", "reduce", "optimizer"]
PHASES: tuple[Phase, ...] = ("data", "pass_1", "objective", "pass_2", "reduce", "optimizer")
Kind = Literal["state", "gradients", "activations", "features", "similarity", "input", "slack"]


class Device(Protocol):
    """Where the run will be: a torch.device, or a profile of one."""

    @property
    def type(self) -> str:
        """`cpu` or `cuda`."""


@dataclass(frozen=True)
class Component:
    """One kind of memory.

    Attributes:
        name: in words.
        by_phase: bytes at the peak of each phase in which it is alive.
        knob: the key of the configuration that shrinks it, and what to do with that.
        kind: which row of a summary it belongs to.
        place: the device's memory, or the host's. On a CPU both are one, and all of it counts as the device's.
    """

    name: str
    by_phase: Mapping[Phase, int]
    knob: str
    kind: Kind
    place: Literal["device", "host"] = "device"

    @property
    def bytes(self) -> int:
        """At its largest."""
        return max(self.by_phase.values(), default=0)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those in which it is alive."""
        return tuple(phase for phase in PHASES if self.by_phase.get(phase, 0))


@dataclass(frozen=True)
class Account:
    """Components of one rank, and what they add up to."""

    components: tuple[Component, ...]
    device: str
    world_size: int
    local_batch_size: int
    micro_batch_sizes: tuple[int, int]  # images, texts
    notes: tuple[str, ...] = field(default=())  # what the numbers leave out or bound

    def in_phase(self, phase: Phase, place: str = "device") -> int:
        """Bytes at the peak of a phase."""
        return sum(c.by_phase.get(phase, 0) for c in self.components if c.place == place)

    @property
    def by_phase(self) -> dict[Phase, int]:
        """Bytes on the device at the peak of each phase."""
        return {phase: self.in_phase(phase) for phase in PHASES}

    @property
    def peak_phase(self) -> Phase:
        """The phase with the largest peak."""
        return max(PHASES, key=self.in_phase)

    @property
    def peak_bytes(self) -> int:
        """On the device, over the whole step."""
        return self.in_phase(self.peak_phase)

    @property
    def host_bytes(self) -> int:
        """In the host's memory, beside a GPU; 0 on a CPU."""
        return max(self.in_phase(phase, "host") for phase in PHASES)

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
        wide = max(len(c.name) for c in self.components)
        head = f"{'':{wide}}" + "".join(f"{phase:>12}" for phase in PHASES)
        rows = [
            f"{c.name:{wide}}"
            + "".join(f"{in_words(size) if (size := c.by_phase.get(p, 0)) else '':>12}" for p in PHASES)
            for c in self.components
            if c.bytes
        ]
        total = f"{'total':{wide}}" + "".join(f"{in_words(self.in_phase(p)):>12}" for p in PHASES)
        return "\n".join([head, *rows, total])


def account(config: Config, *, world_size: int, num_samples: int, device: str | Device = "cuda") -> Account:
    """What one rank of a run will hold.

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
    model = skeleton(config)
    numels = [p.numel() for p in model.parameters() if p.requires_grad]
    held = state_of(config, numels, sum(b.nbytes for b in model.buffers()), world_size)
    always = dict.fromkeys(PHASES, 1)

    def everywhere(size: int) -> dict[Phase, int]:
        return {phase: size * on for phase, on in always.items()}

    components = [
        Component("parameters", everywhere(held.parameters + held.buffers), "execution.zero_stage: 3", "state"),
        Component("fp32 masters", everywhere(held.masters), "execution.offload: optimizer", "state"),
        Component("optimizer moments", everywhere(held.moments), "execution.zero_stage: 1 or more", "state"),
        Component("gradients", {"pass_2": held.gradients}, "execution.precision: bf16", "gradients"),
    ]
    images, texts = plan.micro_batch_sizes
    for modality, m in (("image", images), ("text", texts)):
        tower = trace(config, modality)  # type: ignore[arg-type]
        alive, _ = tower.with_graph.backward_peak(m, first=False)
        components.append(
            Component(
                f"{modality} activations",
                {"pass_1": tower.without_graph.forward_peak(m), "pass_2": max(alive, tower.with_graph.forward_peak(m))},
                f"execution.micro_batch_size below {m}, or execution.recompute_{modality}: full",
                "activations",
            )
        )
    return Account(tuple(components), kind, world_size, plan.local_batch_size, plan.micro_batch_sizes)
