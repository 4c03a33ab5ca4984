"""What is alive at each moment of a forward and its backward, as affine functions of the micro-batch."""

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from amclr_scale.memory.zero3.coordinator import Visit


@dataclass(frozen=True, eq=False)
class Gathered:
    """Bytes of gathered parameters after each event of a forward or a backward, which begins with none."""

    bytes: Tensor  # (1 + events,)


class Peak(NamedTuple):
    """Bytes at a worst moment.

    Attributes:
        activations: with gradients of parameters that are on their way.
        gradients: of parameters, which are in place by then, where they began to exist in this backward.
        gathered: parameters.
    """

    activations: int
    gradients: int = 0
    gathered: int = 0


@dataclass(frozen=True, eq=False)
class Timeline:
    """What is alive after each allocation or release of a forward and its backward, for a micro-batch of m samples.

    Attributes:
        slope, constant: (1 + events,) bytes alive: slope m + constant, without gradients of parameters.
        gradients: (1 + events,) bytes of parameters' gradients, where they are made now and stay (first micro-batch).
        arriving: (1 + events,) those of them that were just made.
        added: (1 + events,) those that were just made, where they are added to earlier ones (later micro-batches): none
            that is only a copy, in the parameter's layout, of what backward made.
        forward_end: events of the forward; what is alive after them is kept for the backward.
        visits: where stage 3 gathers parameters, and gives them up.
    """

    slope: Tensor
    constant: Tensor
    gradients: Tensor
    arriving: Tensor
    added: Tensor
    forward_end: int
    visits: tuple[Visit, ...] = ()

    @property
    def end(self) -> int:
        """How many events there are."""
        return len(self.slope) - 1

    @cached_property
    def forward_visits(self) -> tuple[Visit, ...]:
        """Those of the forward: the first ones."""
        return tuple(itertools.takewhile(lambda visit: visit.forward, self.visits))

    @cached_property
    def holds(self) -> bool:
        """Whether the graph holds on to the memory of a parameter."""
        return any(end > visit.at for visit in self.visits for end in visit.held_until)

    @lru_cache(maxsize=4096)  # noqa: B019  traces are few and stay
    def kept(self, m: int) -> int:
        """Bytes alive between forward and backward: the graph and the outputs."""
        return int(self._alive(m)[self.forward_end])

    @lru_cache(maxsize=4096)  # noqa: B019
    def forward_peak(self, m: int, gathered: Gathered | None = None) -> Peak:
        """The worst moment of the forward.

        Args:
            gathered: parameters that are gathered after each event; None: they are always there, and not counted.
        """
        alive = self._alive(m)[: self.forward_end + 1]
        moment = int((alive if gathered is None else alive + gathered.bytes).argmax())
        return Peak(int(alive[moment]), gathered=0 if gathered is None else int(gathered.bytes[moment]))

    @lru_cache(maxsize=4096)  # noqa: B019
    def backward_peak(self, m: int, gathered: Gathered | None = None, *, first: bool, widening: int = 1) -> Peak:
        """The worst moment of the backward.

        Args:
            gathered: parameters that are gathered after each event, from the end of the forward on.
            first: gradients of parameters begin to exist now; otherwise they are there already and not counted.
            widening: more than 1: gradients move into sums of so many times their size, as soon as they are there.
        """
        begin = self.forward_end
        arriving = (self.arriving if first or widening > 1 else self.added)[begin:]
        done = (self.gradients - self.arriving)[begin:]
        moving = self._alive(m)[begin:] + arriving
        none = torch.zeros_like(done)
        settled = widening * done if first else none
        if widening > 1 and first:
            just_made = self.gradients[begin:].diff(prepend=none[:1]) > 0
            moving += arriving * torch.where(just_made, widening, widening - 1)
        whole = none if gathered is None else gathered.bytes
        moment = int((moving + settled + whole).argmax())
        return Peak(int(moving[moment]), int(settled[moment]), int(whole[moment]))

    def _alive(self, m: int) -> Tensor:
        return self.slope * m + self.constant
