"""The parts of an account: what they are called, when they are alive, and what shrinks them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Phase = Literal["data", "teacher", "pass_1", "objective", "pass_2", "reduce", "optimizer"]
PHASES: tuple[Phase, ...] = ("data", "pass_1", "objective", "pass_2", "reduce", "optimizer")  # of every step
TEACHER: Phase = "teacher"  # of steps in which one encodes the batch, before pass_1 or after it
Kind = Literal["state", "gradients", "activations", "features", "similarity", "input", "slack"]
Place = Literal["device", "host"]


@dataclass(frozen=True)
class Component:
    """One kind of memory.

    Attributes:
        name: in words.
        by_phase: bytes at the peak of each phase in which it is alive.
        knob: the key of the configuration that shrinks it, and what to do with that.
        kind: which row of a summary it belongs to.
        place: the device's memory, or the host's. On a CPU both are one, and all tensors of this process count as the
            device's.
    """

    name: str
    by_phase: Mapping[Phase, int]
    knob: str
    kind: Kind
    place: Place = "device"

    @property
    def bytes(self) -> int:
        """At its largest."""
        return max(self.by_phase.values(), default=0)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those in which it is alive."""
        return tuple(phase for phase in (*PHASES, TEACHER) if self.by_phase.get(phase, 0))


def always(size: int) -> dict[Phase, int]:
    """Alive in every phase."""
    return dict.fromkeys((*PHASES, TEACHER), size)
