"""At stage 3 all ranks must run modules in one order: compared once a step, without a wait of its own.

Before a module runs, stage 3 gathers its parameters, and ranks that run different modules gather different ones: with
messages of one size they compute with each other's numbers, and nothing says so. DeepSpeed therefore compares the
orders that it has written down, at the beginning of the next call of the model, with two broadcasts for each list and
a wait at each of them. It writes down wherever the order is not the one that it knows, and with the gradient cache
that is in every step: some calls have a backward, some have none, and the backwards of kept graphs follow one another.

Here the lists of a step's calls are noted on the host instead, and one number that stands for all of them goes to all
ranks where the step waits for its gradient's norm anyway (`gradient_norm.py`), before any weight changes. Outside of a
step (evaluation, probes) DeepSpeed compares as it does.

What is lost is time, and little of it. DeepSpeed's comparison too comes after the messages of the pass that went wrong:
where ranks differ in how many those were, they hang in them, with either. Where they do not, DeepSpeed stops in the
next call, and here the step goes on with wrong numbers that no weight will see. Only an order that ranks have written
down differently, and by which they then gather different things ahead, can still make them hang before the step ends.
So the first steps, in which the orders of a run appear, compare in every call: what differs because the model or the
code of a rank does is told as early as ever. More is seen in two respects. Where one rank knows the order and another
does not, DeepSpeed has the second send a message that the first does not expect, and here their numbers differ. And
DeepSpeed stops the ranks that differ from rank 0, which waits for them; here all of them stop.
"""

import hashlib
import logging
from array import array
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amclr_scale.distributed.collectives import world_size
from amclr_scale.distributed.process_group import gather_objects

COMPARES = "assert_ints_same_as_other_ranks"  # DeepSpeed's function, which its coordinator calls
AT_ONCE = 2  # steps whose every call is compared: a whole step's order is written down in one, and used in the next

log = logging.getLogger(__name__)

Lists = tuple[tuple[int, ...], ...]


class ModuleOrderError(RuntimeError):
    """Ranks ran modules in different orders, and gathered each other's parameters. The message names the modules."""


class ModuleOrders:
    """`with orders:` around a training step; `numbers` and `check` in it, or it does so itself at its end.

    Args:
        engine: DeepSpeed's, at stage 3.
        coordinator: its own, whose `reset_step` begins each call of the model; it is replaced.
        namespace: where that finds the function that compares.
    """

    def __init__(self, engine: Any, coordinator: Any, namespace: Any):
        self._module, self._device, self._namespace = engine.module, engine.device, namespace
        self._begin_as_deepspeed_does: Callable[[], None] = coordinator.reset_step
        self._inside, self._compared, self._steps = False, False, 0
        self._lists: list[tuple[int, ...]] = []  # of the call that begins
        self._calls: list[bytes] = []  # of this step; what stands for the lists of each
        self._met: dict[bytes, Lists] = {}  # and what it stands for: few, as calls are alike
        coordinator.reset_step = self._begin

    def __enter__(self) -> None:
        self._inside, self._compared = True, False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self._compared:  # no norm was taken: under offload a step that overflowed
                self.check(self.numbers().cpu())
        finally:
            self._inside, self._calls, self._met = False, [], {}
        self._steps += kind is None

    def _begin(self) -> None:
        """What DeepSpeed does where a call of the model begins, without its messages inside a step."""
        if not self._inside:
            self._begin_as_deepspeed_does()
            return
        self._lists = []
        theirs = getattr(self._namespace, COMPARES)
        setattr(self._namespace, COMPARES, self._note)  # for this call alone: other engines ask there too
        try:
            self._begin_as_deepspeed_does()
        finally:
            setattr(self._namespace, COMPARES, theirs)
        noted = tuple(self._lists)
        one = hashlib.blake2b(digest_size=8)
        for numbers in noted:
            one.update(array("q", (len(numbers), *numbers)).tobytes())
        self._calls.append(one.digest())
        self._met[one.digest()] = noted
        if self._steps < AT_ONCE:
            self.check(self.numbers().cpu())

    def _note(self, ints: list[int]) -> None:
        self._lists.append(tuple(ints))

    def numbers(self) -> Tensor:
        """(W,) int64, on the device: one of each rank, that stands for all calls of this step; (0,) of one rank alone.

        Nothing waits, and all ranks call it.
        """
        if world_size() == 1:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        whole = hashlib.blake2b(b"".join(self._calls), digest_size=8).digest()
        # Filled, not copied: a number that comes from the host's memory would be waited for.
        mine = torch.full((1,), int.from_bytes(whole, "little", signed=True), dtype=torch.int64, device=self._device)
        found = torch.empty(world_size(), dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(found, mine)
        return found

    def check(self, numbers: Tensor) -> None:
        """Raise where ranks differ.

        Args:
            numbers: of all ranks, on the host.

        Raises:
            ModuleOrderError: on every rank.
        """
        self._compared = True
        if len(set(numbers.tolist())) > 1:
            raise ModuleOrderError(self._difference(gather_objects([self._met[call] for call in self._calls])))

    def _difference(self, ranks: list[list[Lists]]) -> str:
        """In words, the first place where a rank differs from rank 0; the same on every rank."""
        names = {getattr(m, "ds_id", None): name or "the model" for name, m in self._module.named_modules()}
        told = "ranks ran modules in different orders, and stage 3 gathers what each of them is about to run: "
        for call, of_ranks in enumerate(zip_longest(*ranks)):
            for other, theirs in enumerate(of_ranks):
                if theirs == of_ranks[0]:
                    continue
                orders = [lists[0] if lists else () for lists in (of_ranks[0], theirs)]
                pairs = enumerate(zip_longest(*orders))
                place, pair = next(((n, (a, b)) for n, (a, b) in pairs if a != b), (0, (None, None)))
                first, second = ("none" if n is None else names.get(n, f"number {n}") for n in pair)
                return (
                    f"{told}before call {call + 1} of the model in this step, module {place + 1} was {first} on rank 0 "
                    f"and {second} on rank {other}. Every rank must run the same modules for every micro-batch"
                )
        return f"{told}the number of calls of the model differs between ranks"


def note_orders(engine: Any) -> ModuleOrders | None:
    """Compare an engine's orders of modules once a step; None where this DeepSpeed compares in some way of its own."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as namespace

    offload = getattr(engine.optimizer, "parameter_offload", None)
    coordinator = offload.get_param_coordinator() if hasattr(offload, "get_param_coordinator") else None
    if not hasattr(namespace, COMPARES) or not hasattr(coordinator, "reset_step"):
        log.debug("DeepSpeed compares its order of modules in another way than is known here, and may wait for it")
        return None
    return ModuleOrders(engine, coordinator, namespace)
