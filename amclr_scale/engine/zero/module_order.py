"""At stage 3 all ranks must run modules in one order: compared once a step, without a wait of its own.

Before a module runs, stage 3 gathers its parameters, and ranks that run different modules gather different ones: with
messages of one size they compute with each other's numbers, and nothing says so. DeepSpeed therefore compares the
orders that it has written down, at the beginning of the next call of the model, with two broadcasts for each list and
a wait at each of them. It writes down wherever the order is not the one that it knows, and with the gradient cache
that is in most steps: some calls have a backward, some have none, and the backwards of kept graphs follow one another.

Here the modules of a step are noted on the host instead, and one number that stands for all of them, and for what
DeepSpeed would have compared, goes to all ranks where the step waits for its gradient's norm anyway
(`gradient_norm.py`), before any weight changes. Outside of a step (evaluation, probes) DeepSpeed compares as it does.

It sees more. DeepSpeed does not look at a pass in which a known order ends or another begins, stops only the ranks that
differ from rank 0, which waits for them, and compares a step's last pass when its weights have changed. And where one
rank has a known order and another has not, the second sends a message that the first does not expect.

It may see it later: at the end of a step, not in its next call. Either comes after the messages of the pass that went
wrong, so where ranks differ in how many those were, they hang in them with both. Where they do not, the step goes on
with wrong numbers that no weight will see; only orders that were written down differently, and by which ranks then
gather different things ahead, can make them hang before its end. So in the first steps, in which the orders of a run
appear, every call is compared: what differs because a rank's model or code does is told as early as ever.
"""

import hashlib
import logging
from array import array
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import all_gather, world_size
from amclr_scale.distributed.process_group import gather_objects

COMPARES = "assert_ints_same_as_other_ranks"  # DeepSpeed's function, which its coordinator calls
BEGINS, VISITS = "reset_step", "trace_prologue"  # the coordinator's, at every call of the model and every module
AT_ONCE = 2  # steps whose every call is compared: a step's order is written down in one and gathered by in the next

log = logging.getLogger(__name__)


class ModuleOrderError(RuntimeError):
    """Ranks ran modules in different orders, and gathered each other's parameters. The message names the modules."""


class ModuleOrders:
    """`with orders:` around a training step; `numbers` and `check` in it, or it compares by itself at its end.

    Args:
        engine: DeepSpeed's, at stage 3.
        coordinator: its own, of which two methods are replaced.
        namespace: where that finds the function that compares.
    """

    def __init__(self, engine: Any, coordinator: Any, namespace: Any):
        self._module, self._device, self._namespace = engine.module, engine.device, namespace
        self._begin_there: Callable[[], None] = getattr(coordinator, BEGINS)
        self._visit_there: Callable[[Any], None] = getattr(coordinator, VISITS)
        self._inside, self._compared, self._steps = False, False, 0
        self._forget()
        setattr(coordinator, BEGINS, self._begin)
        setattr(coordinator, VISITS, torch.compiler.disable(self._visit))  # what is compiled would visit once

    def _forget(self) -> None:
        self._calls = [array("q")]  # the numbers of the modules that ran before the first call, in the first, ...
        self._before = hashlib.blake2b(digest_size=8)  # of all but the last of them

    def __enter__(self) -> None:
        self._inside, self._compared = True, False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self._compared:  # no norm was taken: under offload a step that overflowed
                self.check(self.numbers().cpu())
        finally:
            self._inside = False
            self._forget()
        self._steps += kind is None

    def _begin(self) -> None:
        """What DeepSpeed does where a call of the model begins, inside a step without its messages."""
        if not self._inside:
            self._begin_there()
            return
        self._before.update(self._calls[-1].tobytes())
        theirs = getattr(self._namespace, COMPARES)
        setattr(self._namespace, COMPARES, self._note)  # for this call alone: other engines ask there too
        try:
            self._begin_there()
        finally:
            setattr(self._namespace, COMPARES, theirs)
        self._calls.append(array("q"))
        if self._steps < AT_ONCE:
            self.check(self.numbers().cpu())
            self._compared = False

    def _note(self, ints: list[int]) -> None:
        self._before.update(array("q", (len(ints), *ints)).tobytes())

    def _visit(self, module: Any) -> None:
        if self._inside:
            self._calls[-1].append(module.ds_id)
        self._visit_there(module)

    def numbers(self) -> Tensor:
        """(W,) int64, on the device: one of each rank, that stands for this step so far; (0,) of one rank alone.

        Nothing waits, and all ranks call it.
        """
        if world_size() == 1:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        so_far = self._before.copy()
        so_far.update(self._calls[-1].tobytes())
        number = int.from_bytes(so_far.digest(), "little", signed=True)
        # Filled, not copied: the device would be waited for to take a number out of the host's memory.
        mine = torch.full((1,), number, dtype=torch.int64, device=self._device)
        return all_gather(mine)

    def check(self, numbers: Tensor) -> None:
        """Raise where ranks differ.

        Args:
            numbers: of all ranks, on the host.

        Raises:
            ModuleOrderError: on every rank.
        """
        self._compared = True
        if len(set(numbers.tolist())) > 1:
            raise ModuleOrderError(
                "ranks ran modules in different orders, and stage 3 gathers what each of them is about to run; every "
                f"rank must run the same modules for every micro-batch: {self._difference(gather_objects(self._calls))}"
            )

    def _difference(self, ranks: "list[list[array[int]]]") -> str:
        """In words, the first place where a rank differs from rank 0; the same on every rank."""
        names = {getattr(m, "ds_id", None): name or "the whole model" for name, m in self._module.named_modules()}
        for call, (of_first, *of_others) in enumerate(zip_longest(*ranks, fillvalue=array("q"))):
            for rank, theirs in enumerate(of_others, start=1):
                for place, (first, other) in enumerate(zip_longest(of_first, theirs)):
                    if first != other:
                        one, two = ("none" if n is None else names.get(n, f"number {n}") for n in (first, other))
                        return f"module {place + 1} of call {call} was {one} on rank 0 and {two} on rank {rank}"
        return "parameters have other numbers, or were in another order before this step"


def note_orders(engine: Any) -> ModuleOrders | None:
    """Compare an engine's orders of modules once a step; None where this DeepSpeed compares in some way of its own."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as namespace

    offload: Any = getattr(engine.optimizer, "parameter_offload", None)
    coordinator = offload.get_param_coordinator() if hasattr(offload, "get_param_coordinator") else None
    if not (hasattr(namespace, COMPARES) and hasattr(coordinator, BEGINS) and hasattr(coordinator, VISITS)):
        log.debug("this DeepSpeed compares orders of modules in a way that is not known here, and may wait for it")
        return None
    return ModuleOrders(engine, coordinator, namespace)
