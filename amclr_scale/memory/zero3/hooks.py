"""Where ZeRO's stage 3 acts during a trace of a tower: DeepSpeed's own hooks, on tensors without memory.

Each parameter has memory between the hook before a module of its own and the hook after it, and none otherwise, so what
the graph keeps of it beyond that shows: a view of it that was saved for backward. (Which parameters are really given up
there is decided by what came before, and followed in `gathering.py`.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from amclr_scale.memory.zero3.coordinator import Visit

Events = list[tuple[int, int]]  # signed bytes, storage


@dataclass(frozen=True)
class _Seen:
    """A hook, in the numbering of all events."""

    at: int
    before: bool
    forward: bool
    module: int
    parameters: tuple[int, ...]
    births: tuple[int, ...]  # after a module: the events with which the memory of its parameters began


@contextmanager
def _as_partitioned(linear_saves_weight: bool) -> Iterator[None]:
    """What DeepSpeed changes once parameters are partitioned: linear layers save the weight, not a view of it.

    And no messages: they ask which rank this is, and there is none.
    """
    from deepspeed.runtime.zero import linear, parameter_offload, utils

    as_traced = SimpleNamespace(device_name=lambda: "cpu")  # whose autocast a trace is under (towers.py)
    with (
        mock.patch.object(linear, "get_accelerator", return_value=as_traced),
        mock.patch.object(F, "linear", linear.zero3_linear_wrap if linear_saves_weight else F.linear),
        mock.patch.object(parameter_offload, "print_rank_0"),
        mock.patch.object(utils, "warned", True, create=True),
    ):
        yield


class Visits:
    """Stands for DeepSpeed's coordinator. `with visits.listen(events):` around a trace, `visits.take(events)` after it.

    Args:
        model: on tensors without memory; its parameters are empty outside of their modules from now on.
        linear_saves_weight: DeepSpeed's `memory_efficient_linear`.
    """

    def __init__(self, model: nn.Module, *, linear_saves_weight: bool = True):
        from deepspeed.runtime.zero import parameter_offload as zero  # seconds of imports, which stage 3 alone needs

        self._events: Events = []
        self._seen: list[_Seen] = []
        self._modules = {id(module): number for number, module in enumerate(model.modules())}
        self._parameters: list[Any] = list(model.parameters())
        self._births: dict[int, int] = {}  # parameter -> the event with which its memory began
        self._gathered: set[int] = set()  # those events
        self._users: dict[int, set[int]] = {}
        self._full = [(p.shape, p.dtype) for p in self._parameters]
        self._place = self._parameters[0].device
        self._nothing = {dtype: torch.empty(0, dtype=dtype, device=self._place) for _, dtype in self._full}
        self._status = zero.ZeroParamStatus
        for number, parameter in enumerate(self._parameters):
            parameter.ds_id, parameter.ds_status = number, self._status.NOT_AVAILABLE
            parameter.is_external_param = False
            parameter.all_gather = lambda number=number: self._begin(number)
            parameter.partition = lambda number=number: self._end(number)
            self._end(number)
        self._offload: Any = object.__new__(zero.DeepSpeedZeRoOffload)
        self._offload.__dict__.update(
            module=model, param_coordinator=self, forward_hooks=[], backward_hooks=[], zenflow=False
        )
        for module in model.modules():
            zero._init_external_params(module)
        zero._inject_parameters(model, zero.ZeROOrderedDict)
        depth = len(zero.FWD_MODULE_STACK)
        # DeepSpeed counts modules over the whole process and compares the counts of ranks; one alone may trace.
        (counter,) = zero.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
        modules = counter[0]
        self._offload.setup_zero_stage3_hooks()
        counter[0] = modules
        self._stack, self._depth = zero.FWD_MODULE_STACK, depth
        self._model, self._external = model, 0
        self._linear_saves_weight = linear_saves_weight
        self._reset()

    def learned(self) -> bool:
        """Whether what ran since the last question used parameters of other modules for the first time.

        DeepSpeed knows them from then on, so that what was listened to has to be run again.
        """
        before, modules = self._external, list[Any](self._model.modules())
        self._external = sum(len(list(module.ds_external_parameters())) for module in modules)
        return self._external > before

    @contextmanager
    def listen(self, events: Events) -> Iterator[None]:
        """Note the hooks of what runs inside, in terms of the events that a tracker writes down."""
        self._events, self._seen = events, []
        self._births, self._gathered = {}, set()
        with _as_partitioned(self._linear_saves_weight):
            yield
        self._reset()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What DeepSpeed's engine does around a forward: a parameter that another module reads is gathered for it.

        CLIP's text embeddings ask a child for the shape of its weight, attention of torch takes that of its projection.
        """
        tables: list[Any] = [module._parameters for module in self._model.modules()]
        for table in tables:
            table._in_forward = True
        try:
            yield
        finally:
            for table in tables:
                table._in_forward = False

    def close(self) -> None:
        """DeepSpeed remembers this model no longer."""
        del self._stack[self._depth :]

    def take(self, events: Events) -> tuple[Events, tuple[Visit, ...], list[int]]:
        """The events but for parameters' memory, the hooks in their numbering, and that numbering."""
        ends, alive = dict[int, int](), dict[int, int]()
        for index, (size, storage) in enumerate(events):
            if storage in alive and size < 0:
                ends[alive.pop(storage)] = index
            elif index in self._gathered:
                alive[storage] = index
        parameters = self._gathered | set(ends.values())
        numbering, kept = [0], 0  # events kept before each
        for index in range(len(events)):
            kept += index not in parameters
            numbering.append(kept)
        last = len(events)
        visits = tuple(
            Visit(
                numbering[seen.at], seen.before, seen.forward, seen.module, seen.parameters,
                tuple(numbering[ends.get(birth, last)] for birth in seen.births),
            )
            for seen in self._seen
        )  # fmt: skip
        return [event for index, event in enumerate(events) if index not in parameters], visits, numbering

    # What the hooks call.

    def is_invalid_trace(self) -> bool:
        return True

    def is_record_trace(self) -> bool:
        return False

    def trace_prologue(self, module: nn.Module) -> None:
        pass

    def reset_step(self) -> None:
        pass

    def fetch_sub_module(self, module: nn.Module, forward: bool) -> None:
        own = self._own(module)
        self._see(module, before=True, forward=forward, own=own)
        for number in own:
            self._users.setdefault(number, set()).add(id(module))
            self._begin(number)

    def release_sub_module(self, module: nn.Module, forward: bool = False) -> None:
        own = self._own(module)
        self._see(module, before=False, forward=forward, own=own)
        for number in own:
            self._users.get(number, set()).discard(id(module))
            if not self._users.get(number):
                self._end(number)

    def _own(self, module: Any) -> tuple[int, ...]:
        found = [*module.parameters(recurse=False), *(p for _, p in module.ds_external_parameters())]
        return tuple(sorted({p.ds_id for p in found}))

    def _see(self, module: nn.Module, *, before: bool, forward: bool, own: tuple[int, ...]) -> None:
        births = () if before else tuple(self._births.get(number, -1) for number in own)
        number = self._modules[id(module)]
        self._seen.append(_Seen(len(self._events), before, forward, number, own, births))

    def _begin(self, number: int) -> None:
        parameter, (shape, dtype) = self._parameters[number], self._full[number]
        if parameter.ds_status == self._status.AVAILABLE:
            return
        self._births[number] = len(self._events)
        self._gathered.add(len(self._events))
        parameter.data = torch.empty(shape, dtype=dtype, device=self._place)
        parameter.ds_status = self._status.AVAILABLE

    def _end(self, number: int) -> None:
        parameter: Any = self._parameters[number]
        parameter.data = self._nothing[self._full[number][1]]
        parameter.ds_status = self._status.NOT_AVAILABLE

    def _reset(self) -> None:
        self._users = {}
        for number in range(len(self._parameters)):
            self._end(number)
