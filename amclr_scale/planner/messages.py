"""What one rank sends, counted where all of it passes: the operators under torch.distributed.

    with MessageCounter() as counted:
        step(batch, lr)
    counted.messages.wire_bytes

DeepSpeed's comms logger sees the collectives that DeepSpeed calls; the similarity engine calls torch.distributed
itself, so the logger misses it. Both end in the dispatcher's `c10d` operators, and that is where this counts.

A collective over W ranks has a payload of n bytes: the whole tensor that is gathered, reduced, exchanged or sent. On
the wire, each rank sends at least (and with the bandwidth-optimal algorithms of NCCL exactly)

    all_gather, reduce_scatter, all_to_all, broadcast, reduce    n (W - 1) / W        (broadcast, reduce: on average)
    all_reduce                                                   2 n (W - 1) / W
    send                                                         n

Gloo's own algorithms may send more; payloads do not depend on the backend.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The operators' names without underscores -> what they do, and which of their arguments is the whole payload.
_OPERATORS = {
    "allgather": ("all_gather", 0),
    "allgather_base": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "reduce": ("reduce", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
    "send": ("send", 0),
}
# Nothing is sent by these: a wait, the other end of a send, a look at the numbers.
_SILENT = {"barrier", "monitored_barrier", "recv", "recv_any_source", "check_for_nan"}


@dataclass(frozen=True)
class Message:
    """Equal calls of one collective.

    Attributes:
        collective: all_gather, all_reduce, reduce_scatter, all_to_all, broadcast, reduce or send.
        ranks: that take part.
        payload: bytes of one call, see above.
        calls: how many.
        purpose: what for, in words.
    """

    collective: str
    ranks: int
    payload: int
    calls: int = 1
    purpose: str = ""

    @property
    def wire_bytes(self) -> float:
        """That one rank sends, over all calls."""
        if self.collective == "send":
            return float(self.payload * self.calls)
        passes = 2 if self.collective == "all_reduce" else 1
        return passes * self.payload * self.calls * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Messages:
    """What one rank takes part in."""

    found: tuple[Message, ...] = ()

    def __iter__(self) -> Iterator[Message]:
        return iter(self.found)

    def __add__(self, other: "Messages") -> "Messages":
        return Messages(self.found + other.found)

    @property
    def wire_bytes(self) -> float:
        """That one rank sends."""
        return sum(message.wire_bytes for message in self.found)

    @property
    def payload_bytes(self) -> int:
        """Of all calls."""
        return sum(message.payload * message.calls for message in self.found)

    @property
    def calls(self) -> int:
        return sum(message.calls for message in self.found)

    def merged(self) -> "Messages":
        """Equal calls counted together, in order of first appearance."""
        counts: dict[Message, int] = {}
        for message in self.found:
            one = replace(message, calls=1)
            counts[one] = counts.get(one, 0) + message.calls
        return Messages(tuple(replace(one, calls=calls) for one, calls in counts.items()))

    def by_collective(self) -> dict[str, "Messages"]:
        """Collective -> its calls, in order of first appearance."""
        return _group(self.found, "collective")

    def by_purpose(self) -> dict[str, "Messages"]:
        """Purpose -> its calls, in order of first appearance."""
        return _group(self.found, "purpose")


def _group(messages: Iterable[Message], attribute: str) -> dict[str, Messages]:
    groups: dict[str, list[Message]] = {}
    for message in messages:
        groups.setdefault(getattr(message, attribute), []).append(message)
    return {name: Messages(tuple(found)) for name, found in groups.items()}


class MessageCounter(TorchDispatchMode):
    """Records every collective that starts inside its `with` block, in backward passes too. A barrier is none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._messages: list[Message] = []

    @property
    def messages(self) -> Messages:
        """So far, in order."""
        return Messages(tuple(self._messages))

    def purpose(self) -> str:
        """What the call that is being counted is for; subclasses may know."""
        return ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func._schema.name.partition("::")[2].strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: tuple[Any, ...]) -> None:
        if name in _SILENT:
            return
        if name not in _OPERATORS:
            raise NotImplementedError(f"MessageCounter: nobody has said yet what c10d::{name} sends")
        collective, payload = _OPERATORS[name]
        sizes = [tensor.nbytes for tensor in tree_leaves(args[payload]) if isinstance(tensor, Tensor)]
        ranks = next(
            dist.ProcessGroup.unbox(arg).size()
            for arg in args
            if "ProcessGroup" in str(getattr(arg, "_type", lambda: "")())
        )
        if sum(sizes):
            self._messages.append(Message(collective, ranks, sum(sizes), purpose=self.purpose()))
