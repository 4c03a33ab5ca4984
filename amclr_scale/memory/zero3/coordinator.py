"""What ZeRO's stage 3 has gathered at each moment: its coordinator, followed on sizes alone.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, arXiv:1910.02054.

Before a module runs, forward or backward, its parameters are gathered; afterwards they may be given up. DeepSpeed
(runtime/zero/partitioned_param_coordinator.py) decides by the order of modules that it has seen between two calls of
the model, and the gradient cache shows it several orders in one step: forwards alone, forwards with their backward,
backwards of kept graphs. Followed here, as it is there:

    unknown    the order does not repeat: each module's parameters are gathered for it and given up after it
    recording  the same, and the order is written down until the next call begins
    known      those of the next modules are gathered ahead, and none is given up whose next use is near

Parameters that are gathered together arrive in one buffer, and each is copied out of it when the first of them is
needed; the buffer lives until the last of them was. A parameter alone is its own buffer. A graph may hold the memory of
a parameter for longer than ZeRO does: where it saved a view of it (a linear layer's transposed weight).

The hooks themselves (which module, when) come from a trace of the towers: `visits.py`.
"""

import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.int64]


@dataclass(frozen=True)
class Visit:
    """ZeRO's hook before or after a module.

    Attributes:
        at: allocations and releases of the trace that have happened before it.
        before: parameters are gathered; otherwise they may be given up.
        forward: of a forward, which recomputation runs inside a backward too.
        module: its number; 0 is the whole model.
        parameters: numbers of its own ones.
        held_until: of each parameter, the place in the trace where the graph lets go of its memory as it is now.
    """

    at: int
    before: bool
    forward: bool
    module: int
    parameters: tuple[int, ...]
    held_until: tuple[int, ...] = ()


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's options, in elements."""

    persistent: int = 100_000  # parameters up to this size stay whole
    live: int = 1_000_000_000
    prefetch: int = 50_000_000
    reuse: int = 1_000_000_000

    @classmethod
    def of(cls, deepspeed: Mapping[str, Any]) -> "Limits":
        """From DeepSpeed's configuration."""
        zero = deepspeed.get("zero_optimization", {})
        names = {"persistent": "param_persistence_threshold", "live": "max_live_parameters",
                 "prefetch": "prefetch_bucket_size", "reuse": "max_reuse_distance"}  # fmt: skip
        return cls(**{ours: int(zero[f"stage3_{key}"]) for ours, key in names.items() if f"stage3_{key}" in zero})


@dataclass(eq=False)
class _Arrival:
    """Parameters that were asked for together."""

    parameters: tuple[int, ...]
    buffer: int  # bytes; a parameter alone is its own
    waiting: int
    complete: bool = False


@dataclass(frozen=True)
class _Order:
    """Modules as they came, and what follows from that."""

    modules: tuple[int, ...]
    before: tuple[int, ...]  # elements of the parameters of all modules before each
    places: dict[int, list[int]]  # of each parameter
    parameters: tuple[tuple[int, int], ...]  # (parameter, place), as they will be asked for


@dataclass
class Coordinator:
    """`PartitionedParameterCoordinator`, without tensors.

    Args:
        sizes: elements of each parameter.
        item: bytes of an element.
        world_size: W.
        limits: DeepSpeed's options.

    Attributes:
        bytes: gathered now: whole parameters, and buffers in which they arrive.
        highest: of `bytes`, since somebody set it.
        given_up: parameters, and the bytes of each, since somebody cleared it.
        sent: of every message so far that gathered parameters, the elements with their padding.
    """

    sizes: Sequence[int]
    item: int
    world_size: int
    limits: Limits
    bytes: int = 0
    highest: int = 0
    whole: dict[int, int] = field(default_factory=dict)  # available parameters, and their bytes
    given_up: list[tuple[int, int]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    _mode: Literal["unknown", "recording", "known"] = "unknown"
    _order: _Order | None = None
    _recorded: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    _arriving: dict[int, _Arrival] = field(default_factory=dict)
    _users: dict[int, set[int]] = field(default_factory=dict)
    _backward: dict[int, tuple[int, ...]] = field(default_factory=dict)  # modules whose backward has begun
    _ahead: deque[tuple[int, int]] = field(default_factory=deque)
    _asked_for: dict[int, int] = field(default_factory=dict)  # the latest use for which each parameter was gathered
    _decided: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    _place: int = 0
    _live: int = 0

    def begin(self) -> None:
        """A call of the model begins."""
        self._clear_arrivals()
        if self._mode == "recording":
            self._order, self._mode = self._written_down(), "known"
        elif self._mode == "unknown":
            self._mode, self._recorded = "recording", []
        self._ahead = deque(self._order.parameters if self._order else ())
        self._asked_for, self._place, self._live = {}, 0, 0

    def fetch(self, visit: Visit) -> None:
        """What happens before a module."""
        if self._mode == "known":
            assert self._order is not None
            expected = self._order.modules
            if len(expected) <= self._place or expected[self._place] != visit.module:
                self._mode, self._order, self._recorded = "unknown", None, []
                self._ahead, self._asked_for = deque(), {}
                self._clear_arrivals()
        if self._mode == "recording":
            self._recorded.append((visit.module, visit.parameters))
        if not visit.forward:
            self._backward[visit.module] = visit.parameters
        self._gather([p for p in visit.parameters if p not in self.whole and p not in self._arriving])
        for parameter in visit.parameters:
            self._users.setdefault(parameter, set()).add(visit.module)
            if parameter in self._arriving:
                arrival = self._arriving.pop(parameter)
                self._complete(arrival)
                arrival.waiting -= 1
                if not arrival.waiting:
                    self._add(-arrival.buffer)
        if self._mode == "known":
            self._gather_ahead(visit)
        self._place += 1

    def release(self, visit: Visit) -> None:
        """What happens after a module."""
        given_up = self._not_needed(visit)
        if not visit.forward:
            self._backward.pop(visit.module, None)
        for parameter in visit.parameters:
            self._users.get(parameter, set()).discard(visit.module)
        self._give_up(given_up)

    def end_backward(self) -> None:
        """A backward is over: modules after whose backward nothing was run are released."""
        while self._backward:
            module, parameters = self._backward.popitem()
            for parameter in parameters:
                self._users.get(parameter, set()).discard(module)
            self._give_up([p for p in parameters if self.sizes[p] > self.limits.persistent])

    def step(self) -> None:
        """The optimizer steps: everything is given up, and what is small is gathered for good."""
        self._clear_arrivals()
        self._users, self._backward = {}, {}
        self._give_up(list(self.whole))
        small = [p for p, size in enumerate(self.sizes) if size <= self.limits.persistent]
        self.whole = {p: self.sizes[p] * self.item for p in small}
        self._add(sum(self.whole.values()))
        self.sent += [self._padded(p) for p in small]  # one by one

    def _not_needed(self, visit: Visit) -> tuple[int, ...]:
        """The parameters of a module that go after it.

        What was once decided for a module at a place is never decided again, though the order may have changed since:
        DeepSpeed remembers the answers. So the first known order of a run has a say in all later ones.
        """
        if self._mode != "known":
            return visit.parameters
        key = visit.module, self._place
        if key not in self._decided:
            self._decided[key] = tuple(p for p in visit.parameters if not self._needed(p))
        return self._decided[key]

    def _needed(self, parameter: int) -> bool:
        assert self._order is not None
        if self.sizes[parameter] <= self.limits.persistent or self._asked_for.get(parameter, -1) > self._place:
            return True
        places, before = self._order.places.get(parameter, []), self._order.before
        following = bisect_left(places, self._place)
        return following < len(places) and before[places[following]] - before[self._place] < self.limits.reuse

    def _gather(self, parameters: Sequence[int]) -> None:
        if not parameters:
            return
        self._live += sum(self.sizes[p] for p in parameters)
        elements = sum(self._padded(p) for p in parameters)
        self.sent.append(elements)
        padded = elements * self.item
        alone = len(parameters) == 1
        arrival = _Arrival(tuple(parameters), 0 if alone else padded, len(parameters))
        self._arriving.update(dict.fromkeys(parameters, arrival))
        self._add(padded)

    def _padded(self, parameter: int) -> int:
        return -(-self.sizes[parameter] // self.world_size) * self.world_size

    def _complete(self, arrival: _Arrival) -> None:
        """Its parameters are there: copied out of the buffer."""
        if arrival.complete:
            return
        arrival.complete = True
        for parameter in sorted(arrival.parameters):
            size = self.sizes[parameter]
            if arrival.buffer:
                self.whole[parameter] = size * self.item
                self._add(size * self.item)
            else:
                self.whole[parameter] = self._padded(parameter) * self.item

    def _gather_ahead(self, visit: Visit) -> None:
        unasked = {p for p in visit.parameters if self._asked_for.get(p, -1) < self._place}
        found = set[int]()
        while self._ahead and len(found) < len(unasked):
            parameter, place = self._ahead.popleft()
            self._asked_for[parameter] = place
            found.add(parameter)
        most = min(self.limits.live - self._live, self.limits.prefetch)
        wanted, total = dict[int, None](), 0
        while self._ahead and total < most:
            parameter, place = self._ahead.popleft()
            self._asked_for[parameter] = max(self._asked_for.get(parameter, -1), place)
            if parameter not in self.whole and parameter not in self._arriving and parameter not in wanted:
                wanted[parameter] = None
                total += self.sizes[parameter]
        self._gather(list(wanted))

    def _give_up(self, parameters: Sequence[int]) -> None:
        for parameter in parameters:
            if parameter in self.whole and not self._users.get(parameter):
                size = self.whole.pop(parameter)
                self._add(-size)
                self._live -= self.sizes[parameter]
                self.given_up.append((parameter, size))

    def _clear_arrivals(self) -> None:
        """What was on its way arrives, and is given up."""
        for parameter, arrival in self._arriving.items():
            self._complete(arrival)
            self._give_up([parameter])
        self._add(-sum({id(a): a.buffer for a in self._arriving.values()}.values()))
        self._arriving = {}

    def _add(self, size: int) -> None:
        self.bytes += size
        self.highest = max(self.highest, self.bytes)

    def _written_down(self) -> _Order:
        elements = [sum(self.sizes[p] for p in parameters) for _, parameters in self._recorded]
        places: dict[int, list[int]] = {}
        asked = list[tuple[int, int]]()
        for place, (_, parameters) in enumerate(self._recorded):
            for parameter in sorted(parameters):
                places.setdefault(parameter, []).append(place)
                asked.append((parameter, place))
        return _Order(
            tuple(module for module, _ in self._recorded),
            tuple(itertools.accumulate(elements, initial=0)),
            places,
            tuple(asked),
        )
