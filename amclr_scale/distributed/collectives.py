"""What crosses ranks, and the one rule that makes gradients those of one big batch.

    An objective returns this rank's mean over its local rows.
    The backward of everything in this package is the gradient of the SUM over ranks of what it returned.
    The engine averages parameter gradients over ranks.

So a parameter gets (1/W) d/dw sum_r mean_r = d/dw (mean over the global batch): factor one, for any number of
ranks, features and temperature alike. Nobody multiplies by a world size.

Every rank brings the same number of rows (b); rank r's are rows r b ... (r+1) b - 1 of the global batch. Without an
initialised process group there is one rank. Everybody in a group has to call the same functions in the same order.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.distributed.purpose import current_purpose, purpose

Negatives = Literal["all", "local"] | int


def _collective(*names: str) -> Any:
    """The first of these functions that this torch has: 2.13 renames two, and warns where the old names are used."""
    return next((getattr(dist, name) for name in names if hasattr(dist, name)), None)


_all_gather_single = _collective("all_gather_single", "all_gather_into_tensor")
_reduce_scatter_single = _collective("reduce_scatter_single", "reduce_scatter_tensor")


@dataclass(frozen=True)
class Group:
    """The ranks whose rows meet: all of them, some consecutive ones, or this one alone."""

    rank: int
    size: int
    first: int  # global rank of its first member; the others follow
    process_group: Any = None  # torch.distributed's; None when the rank is alone

    def global_rank(self, rank: int) -> int:
        return self.first + rank % self.size


_subgroups: dict[tuple[Any, int], list[Any]] = {}


def rank() -> int:
    """The rank of this process, 0 without a process group."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """The number of ranks, 1 without a process group."""
    return dist.get_world_size() if _initialised() else 1


def group(negatives: Negatives = "all") -> Group:
    """The ranks that contrast with this one.

    Args:
        negatives: "all" ranks, "local" rows only, or g: groups of g consecutive ranks.

    Raises:
        ValueError: negatives is none of these, or g does not divide the number of ranks.
    """
    if negatives == "all":
        members = world_size()
    elif negatives == "local":
        members = 1
    elif isinstance(negatives, int) and not isinstance(negatives, bool) and negatives >= 1:
        members = negatives
    else:
        raise ValueError(f"negatives: expected 'all', 'local' or a number of ranks, got {negatives!r}")
    if world_size() % members:
        raise ValueError(
            f"negatives: groups of {members} ranks do not divide {world_size()} ranks; "
            f"choose a divisor of {world_size()}, or 'all'"
        )
    if members == 1:
        return Group(0, 1, rank())
    if members == world_size():
        return Group(rank(), members, 0, dist.group.WORLD)
    first = rank() // members * members
    return Group(rank() - first, members, first, _subgroup(members))


def _subgroup(members: int) -> Any:
    key = (dist.group.WORLD, members)
    if key not in _subgroups:  # every rank makes every group, in the same order: torch.distributed asks for it
        starts = range(0, world_size(), members)
        _subgroups[key] = [dist.new_group(list(range(start, start + members))) for start in starts]
    return _subgroups[key][rank() // members]


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def check_even(rows: int, width: int, ranks: Group) -> None:
    """Refuse a batch of which some rank has another number of rows: nobody would know whose rows are whose.

    Raises:
        ValueError: names the first rank that differs from this group's first, on every rank of the group.
    """
    if ranks.size == 1:
        return
    shapes = gather_numbers([rows, width], ranks)
    for member, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"batch: rank {ranks.global_rank(member)} has {shape[0]} rows of width {shape[1]}, rank {ranks.first} "
                f"has {shapes[0][0]} of width {shapes[0][1]}; all ranks need the same: drop the last, uneven batch"
            )


def gather_numbers(numbers: list[int], ranks: Group) -> list[list[int]]:
    """Every rank's numbers, in rank order; all have equally many."""
    if ranks.size == 1:
        return [numbers]
    device = "cuda" if "nccl" in dist.get_backend(ranks.process_group) else "cpu"
    return cast(list[list[int]], all_gather(torch.tensor([numbers], device=device), ranks).tolist())


def all_gather(x: Tensor, ranks: Group | None = None) -> Tensor:
    """(b, ...) of every rank -> (W b, ...), in rank order, without gradient."""
    ranks = ranks or group()
    x = x.detach().contiguous()
    if ranks.size == 1:
        return x
    out = x.new_empty((ranks.size * x.shape[0], *x.shape[1:]))
    _all_gather_single(_bytes(out), _bytes(x), group=ranks.process_group)
    return out


def gather_shares(whole: Tensor, ranks: Group | None = None) -> None:
    """Every rank's share of `whole` (W n,), rank r's being [r n, (r + 1) n), is sent to all others, in place."""
    ranks = ranks or group()
    if ranks.size > 1:
        own = whole.view(ranks.size, -1)[ranks.rank]
        _all_gather_single(_bytes(whole), _bytes(own), group=ranks.process_group)


def all_sum(x: Tensor, ranks: Group | None = None) -> Tensor:
    """The sum over ranks of equally shaped tensors; differentiable."""
    ranks = ranks or group()
    return x if ranks.size == 1 else cast(Tensor, _AllSum.apply(x, ranks))  # type: ignore[no-untyped-call]


def gather(x: Tensor, ranks: Group | None = None) -> Tensor:
    """(b, ...) of every rank -> (W b, ...), in rank order; differentiable."""
    ranks = ranks or group()
    return x if ranks.size == 1 else cast(Tensor, _Gather.apply(x, ranks))  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, ranks: Group | None = None) -> Tensor:
    """(W b, ...) on every rank -> (b, ...): this rank's rows of the sum over ranks, without gradient."""
    ranks = ranks or group()
    x = x.detach().contiguous()
    if ranks.size == 1:
        return x
    if exchanges_sums(x.device):
        return exchange(x.view(ranks.size, -1, *x.shape[1:]), ranks).sum(0)
    out = x.new_empty((x.shape[0] // ranks.size, *x.shape[1:]))
    _reduce_scatter_single(out, x, group=ranks.process_group)
    return out


def exchanges_sums(device: torch.device) -> bool:
    """Whether `reduce_scatter` exchanges parts and adds them up: gloo's own sends the whole of x to everybody."""
    return device.type == "cpu"


class Arrival:
    """A tensor on its way."""

    def __init__(self, tensor: Tensor, sent: Tensor, requests: list[Any]):
        self._tensor, self._sent, self._requests = tensor, sent, requests

    def wait(self) -> Tensor:
        """The tensor, once it is here; the one that was sent may be reused afterwards."""
        for request in self._requests:
            request.wait()
        return self._tensor


def pass_on(x: Tensor, ranks: Group) -> Arrival:
    """Send x to the previous rank of the group, and receive the next one's: one step of a ring, in the background."""
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    previous, following = ranks.global_rank(ranks.rank - 1), ranks.global_rank(ranks.rank + 1)
    steps = [
        dist.P2POp(dist.isend, _bytes(x), previous, ranks.process_group),
        dist.P2POp(dist.irecv, _bytes(out), following, ranks.process_group),
    ]
    return Arrival(out, x, dist.batch_isend_irecv(steps))


def broadcast(x: Tensor, owner: int, shape: tuple[int, ...], ranks: Group) -> Tensor:
    """The owner's x, of this shape, without gradient; the others' x only says dtype and device."""
    x = x.detach().contiguous()
    if ranks.size == 1:
        return x
    out = x if owner == ranks.rank else x.new_empty(shape)
    if out.numel():
        dist.broadcast(_bytes(out), ranks.global_rank(owner), group=ranks.process_group)
    return out


def exchange(x: Tensor, ranks: Group | None = None) -> Tensor:
    """Part q of x (W, ...) goes to rank q; returns what the ranks had for this one, (W, ...) in rank order."""
    ranks = ranks or group()
    x = x.detach().contiguous()
    if ranks.size == 1:
        return x
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=ranks.process_group)
    return out


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8) if x.numel() else x.view(-1)  # any dtype travels on any backend


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Group) -> Tensor:
        ctx.ranks, ctx.purpose = ranks, current_purpose()
        out = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=ranks.process_group)
        return out

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        out = upstream.clone(memory_format=torch.contiguous_format)
        with purpose(ctx.purpose):
            dist.all_reduce(out, group=ctx.ranks.process_group)
        return out, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Group) -> Tensor:
        ctx.ranks, ctx.purpose = ranks, current_purpose()
        return all_gather(x, ranks)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        with purpose(ctx.purpose):
            return reduce_scatter(upstream, ctx.ranks), None
