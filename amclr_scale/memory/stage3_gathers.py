"""Gathered parameters over the two passes of the gradient cache, at ZeRO's stage 3 on several ranks.

The hooks of the towers' traces (`visits.py`) are called in the order in which a step calls them, on a `Coordinator`
(`gathering.py`), for as many steps as it takes to settle. Which parameters are gathered does not depend on the size of
a micro-batch, so one replay holds for all of them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from amclr_scale.memory.components import Phase
from amclr_scale.memory.timeline import Gathered
from amclr_scale.memory.towers import Modality, Tower
from amclr_scale.memory.zero3.coordinator import Bytes, Coordinator, Limits, Visit

STEPS = 3  # the first one sees an order of modules that no later one does
LOOKED_AT = 4  # of equal calls in a row: the first ones, which differ, and the last

Both = dict[Modality, tuple[Gathered | None, Gathered | None]]  # in a second forward, and in the backward
Calls = tuple[tuple[tuple[Modality, ...], int], ...]  # what each call encodes, and how often in a row


def looked_at(count: int) -> list[int]:
    """Of so many equal calls in a row, those that can be the worst: a batch may have a million of them."""
    return [*range(min(count, LOOKED_AT - 1)), *([count - 1] if count >= LOOKED_AT else [])]


def _stands_for(index: int, count: int) -> int:
    """Calls that one of those that are looked at stands for: the last but one, for all in between."""
    return count - LOOKED_AT + 1 if index == LOOKED_AT - 2 and count > LOOKED_AT else 1


@dataclass(frozen=True)
class Replay:
    """Bytes of gathered parameters.

    Attributes:
        first_pass: of each call that is looked at, by modality: during its forward.
        second_pass: the same; (during the second forward, or None where the graph was kept; during the backward).
        between: in the phases data, objective and reduce.
        sent: elements of each message, in each call of the first pass, then in each of the second, and after them.
    """

    first_pass: list[dict[Modality, Gathered]]
    second_pass: list[Both]
    between: dict[Phase, int]
    sent: list[list[int]]

    def sent_in(self, calls: Calls) -> Counter[int]:
        """Messages by their elements in a step of all these calls, which may be more than were followed."""
        weights = _weights(calls)
        return _weighed([*weights, *weights, 1], self.sent)

    def sent_in_first_pass(self, calls: Calls) -> Counter[int]:
        """Those of the first forwards alone."""
        weights = _weights(calls)
        return _weighed(weights, self.sent[: len(weights)])


def _weights(calls: Calls) -> list[int]:
    return [_stands_for(index, count) for _, count in calls for index in looked_at(count)]


def _weighed(weights: list[int], sent: list[list[int]]) -> Counter[int]:
    found = Counter[int]()
    for weight, messages in zip(weights, sent, strict=True):
        found.update({elements: weight * several for elements, several in Counter(messages).items()})
    return found


def fewer(calls: Calls, *towers: Tower) -> Calls:
    """Fewer calls that behave the same: where no graph holds on to parameters, those between make no difference."""
    if any(tower.with_graph.holds or tower.again.holds for tower in towers):
        return calls
    return tuple((kinds, min(count, LOOKED_AT)) for kinds, count in calls)


@lru_cache(maxsize=1024)
def replay(
    image: Tower, text: Tower, coordinator: tuple[tuple[int, ...], int, int, Limits], without: Calls, kept: Calls
) -> Replay:
    """Follow some steps.

    Args:
        coordinator: elements of each parameter, bytes of an element, ranks, DeepSpeed's options.
        without: calls of which no graph is kept, in their order.
        kept: those after them, of which it is.
    """
    steps = _Steps({"image": image, "text": text}, Coordinator(*coordinator))
    steps.run(without, kept)  # nothing is known at first
    found = [steps.run(without, kept) for _ in range(STEPS - 1)]

    def worst(several: Iterable[Gathered | None]) -> Gathered | None:
        there = [one.bytes for one in several if one is not None]
        return Gathered(torch.stack(there).amax(0)) if there else None

    first, second = list[dict[Modality, Gathered]](), list[Both]()
    for calls in zip(*(step.first_pass for step in found), strict=True):
        first.append({m: Gathered(torch.stack([call[m].bytes for call in calls]).amax(0)) for m in calls[0]})
    for both in zip(*(step.second_pass for step in found), strict=True):
        second.append({m: (worst(call[m][0] for call in both), worst(call[m][1] for call in both)) for m in both[0]})
    between = {phase: max(step.between[phase] for step in found) for phase in found[0].between}
    return Replay(first, second, between, found[-1].sent)


@dataclass
class _Hold:
    """Memory of a parameter that was given up and that a graph still holds, from one place of its trace to another."""

    begin: int
    end: int
    bytes: int


@dataclass(eq=False)
class _Call:
    """A call of the model, and its graph.

    Attributes:
        stands_for: so many equal ones.
        again: whether it is the second one of its samples.
        at: how far each tower's trace has been followed.
        holds: memory that its graph holds.
    """

    modalities: tuple[Modality, ...]
    stands_for: int = 1
    again: bool = False
    at: dict[Modality, int] = field(default_factory=dict)
    holds: dict[Modality, list[_Hold]] = field(default_factory=dict)

    def held(self, modality: Modality) -> int:
        return sum(hold.bytes for hold in self.holds.get(modality, ()) if hold.begin <= self.at[modality] < hold.end)


class _Steps:
    """One step after another."""

    def __init__(self, towers: Mapping[Modality, Tower], coordinator: Coordinator):
        self.towers, self.coordinator = towers, coordinator
        self._graphs: list[_Call] = []
        self._saved: dict[int, tuple[_Call, Modality, int]] = {}  # parameter: the graph that lets go of it last, where
        self._hooked: set[int] = set()  # modules that are told of the end of their next backward

    def run(self, without: Calls, kept: Calls) -> Replay:
        """One step."""
        data, marks = self.coordinator.bytes, [len(self.coordinator.sent)]
        first, second = list[dict[Modality, Gathered]](), list[Both]()
        for modalities, count in without:
            for _ in looked_at(count):
                first.append(self._forward(_Call(modalities), graph=False))
                marks.append(len(self.coordinator.sent))
        for modalities, count in kept:
            for index in looked_at(count):
                first.append(self._forward(_Call(modalities, _stands_for(index, count)), graph=True))
                marks.append(len(self.coordinator.sent))
        objective, graphs = self.coordinator.bytes + self._held(), list(self._graphs)
        for modalities, count in without:
            for _ in looked_at(count):
                call = _Call(modalities, again=True)
                forward = self._forward(call, graph=True)
                backward = self._backward(call)
                second.append({m: (forward[m], backward[m]) for m in modalities})
                marks.append(len(self.coordinator.sent))
        for call in graphs:
            backward = self._backward(call)
            second.append({m: (None, backward[m]) for m in call.modalities})
            marks.append(len(self.coordinator.sent))
        reduce = self.coordinator.bytes
        self.coordinator.step()
        self._saved = {}
        sent = [self.coordinator.sent[begin:end] for begin, end in pairwise([*marks, None])]
        return Replay(first, second, {"data": data, "objective": objective, "reduce": reduce}, sent)

    def _forward(self, call: _Call, *, graph: bool) -> dict[Modality, Gathered]:
        self.coordinator.begin()
        if graph:
            self._graphs.append(call)
        found: dict[Modality, Gathered] = {}
        for modality in call.modalities:
            tower = self.towers[modality]
            timeline = (tower.again if call.again else tower.with_graph) if graph else tower.without_graph
            visits = timeline.forward_visits
            if modality != call.modalities[0]:  # the call of the whole model has begun
                visits = visits[1:]
            if modality != call.modalities[-1]:  # and goes on
                visits = visits[:-1]
            call.at[modality] = 0
            found[modality] = self._follow(call, modality, visits, timeline.forward_end, graph=graph)
        return found

    def _backward(self, call: _Call) -> dict[Modality, Gathered]:
        found: dict[Modality, Gathered] = {}
        for modality in reversed(call.modalities):
            tower = self.towers[modality]
            timeline = tower.again if call.again else tower.with_graph
            visits = timeline.visits[len(timeline.forward_visits) :]
            if modality != call.modalities[-1]:  # the backward of the whole model has begun
                visits = tuple(v for v in visits if v.module)
            found[modality] = self._follow(call, modality, visits, timeline.end, graph=True)
        self.coordinator.end_backward()
        self._graphs.remove(call)
        return found

    def _follow(self, call: _Call, modality: Modality, visits: Iterable[Visit], end: int, *, graph: bool) -> Gathered:
        """Go on in a trace, to an event. Returns what is gathered after each, from where it stood."""
        coordinator, begin = self.coordinator, call.at[modality]
        elsewhere = self._held() - call.held(modality)
        places, after, highest = [call.at[modality] - begin], [coordinator.bytes], [coordinator.bytes]
        for visit in visits:
            call.at[modality] = visit.at
            coordinator.highest = coordinator.bytes
            self._visit(call, modality, visit, graph=graph)
            places.append(visit.at - begin)
            after.append(coordinator.bytes)
            highest.append(coordinator.highest)
        call.at[modality] = end
        level: Bytes = np.repeat(np.array(after, np.int64), np.diff([*places, end - begin + 1]))
        np.maximum.at(level, places, highest)
        for hold in call.holds.get(modality, ()):
            level[max(0, hold.begin - begin) : max(0, hold.end - begin)] += hold.bytes
        return Gathered(torch.from_numpy(level + elsewhere))

    def _visit(self, call: _Call, modality: Modality, visit: Visit, *, graph: bool) -> None:
        coordinator = self.coordinator
        if visit.before:
            if visit.forward:
                (self._hooked.add if graph else self._hooked.discard)(visit.module)
            coordinator.fetch(visit)
        elif visit.forward or visit.module in self._hooked:
            # A module counts the inputs of its last forward only: of several kept graphs, one backward is noticed.
            if not visit.forward:
                self._hooked.discard(visit.module)
            if graph:
                self._save(call, modality, visit)
            coordinator.release(visit)
        for parameter, size in coordinator.given_up:
            holder = self._saved.pop(parameter, None)
            if holder is not None:
                graph_of, where, end = holder
                if graph_of in self._graphs and graph_of.at[where] < end:
                    graph_of.holds.setdefault(where, []).append(_Hold(graph_of.at[where], end, size))
        coordinator.given_up.clear()

    def _save(self, call: _Call, modality: Modality, visit: Visit) -> None:
        for parameter, end in zip(visit.parameters, visit.held_until, strict=True):
            if end > visit.at:
                self._saved[parameter] = (call, modality, end)

    def _held(self) -> int:
        """Bytes that all graphs hold where they stand."""
        return sum(call.stands_for * call.held(m) for call in self._graphs for m in call.at)
