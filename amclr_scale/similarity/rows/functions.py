"""Row blocks of a similarity matrix, never the whole of it: for whatever is not a log-sum.

b  rows on this rank    B  columns, over all ranks    c  rows in one block    D  embedding width

Similarities are float32 (float64 for float64 features), whatever precision the features or autocast have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amclr_scale.distributed.collectives import (
    Group,
    Negatives,
    all_gather,
    check_even,
    gather,
    group,
    reduce_scatter,
)
from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.distributed.purpose import purpose
from amclr_scale.similarity import settings
from amclr_scale.similarity.backends import similarity_dtype
from amclr_scale.similarity.keys import FEATURES

BLOCK_NUMBERS = 2**21  # of similarities in a block

RowFunction = Callable[..., tuple[Tensor, ...]]


def map_rows(
    fn: RowFunction, anchors: Tensor, keys: Tensor, *per_row: Tensor, negatives: Negatives = "all"
) -> tuple[Tensor, ...]:
    """Run `fn` over blocks of anchors @ (all ranks' keys).T and join its results row by row.

    `fn(block, positive_column, *per_row)` gets a block (c, B), the column of each row's positive (c,), and the same
    rows of `per_row`. It returns a tuple of tensors with c rows, and must be pure: backward runs it a second time, so
    that one block is alive at once, in forward and in backward. What it captures may require gradients.

    Args:
        fn: the row function.
        anchors: (b, D), the rows.
        keys: (b, D), this rank's part of the columns.
        per_row: tensors with b rows.
        negatives: whose keys are columns: "all" ranks', "local", or those of a group of so many consecutive ranks.

    Raises:
        ValueError: shapes that do not fit, or a row function that returns something else.
    """
    ranks = checked(anchors, keys, per_row, negatives)
    dtype = similarity_dtype(anchors, keys)
    with purpose(FEATURES):
        columns = gather(keys, ranks).to(dtype)  # (B, D)
    positives = torch.arange(len(anchors), device=anchors.device) + ranks.rank * len(anchors)  # (b,)
    device = anchors.device.type

    def block_of(rows: Tensor, columns: Tensor, positive: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, enabled=False):
            found = fn(rows.to(dtype) @ columns.T, positive, *extra)
        if not isinstance(found, tuple) or any(x.shape[:1] != rows.shape[:1] for x in found):
            got = [tuple(x.shape) for x in found] if isinstance(found, tuple) else type(found).__name__
            raise ValueError(f"fn: expected a tuple of tensors with {len(rows)} rows, as many as the block, got {got}")
        return found

    size = rows_at_once(len(columns))
    results = [
        checkpoint(block_of, rows, columns, *rest, use_reentrant=False, preserve_rng_state=False)
        for rows, *rest in zip(*(torch.split(x, size) for x in (anchors, positives, *per_row)), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def mean_rows(
    fn: Callable[..., Tensor],
    anchors: Tensor | tuple[Tensor, ...],
    keys: Tensor | tuple[Tensor, ...],
    *per_row: Tensor,
    shared: tuple[Tensor, ...] = (),
    negatives: Negatives = "all",
) -> Tensor:
    """The mean over this rank's rows of what `fn` makes of them: a tensor ().

    With one factor for all rows, the gradient needs nothing that is known after forward: it is made there, block by
    block, 3 matrix products and one run of `fn` where `map_rows` has 4 and two. Backward multiplies it by its upstream
    gradient. What is held from forward to backward is (b + B) D, and a gradient of each other input that has one.

    Args:
        fn: `fn(block, positive_column, *per_row, *shared)` -> (c,), pure, and of the rows of a block (c, B) one by one.
        anchors: (b, D), the rows; or m of them, of which `fn` gets m blocks before the positive columns.
        keys: (b, D), this rank's part of the columns; or m of them.
        per_row: tensors with b rows, of which it gets the block's.
        shared: tensors of which it gets all; what it captures gets no gradient.
        negatives: as in `map_rows`.

    Raises:
        ValueError: shapes that do not fit.
    """
    lefts, rights = ((x,) if isinstance(x, Tensor) else x for x in (anchors, keys))
    for left, right in zip(lefts, rights, strict=True):
        ranks = checked(left, right, per_row, negatives)
    plan = _Plan(fn, ranks, len(lefts), len(per_row), torch.is_grad_enabled())
    return cast(Tensor, _MeanRows.apply(plan, *lefts, *rights, *per_row, *shared))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Plan:
    fn: Callable[..., Tensor]
    ranks: Group
    products: int  # m
    per_row: int  # how many there are
    will_differentiate: bool


class _MeanRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *inputs: Tensor) -> Tensor:
        m = plan.products
        anchors, keys, others = inputs[:m], inputs[m : 2 * m], inputs[2 * m :]
        b, device = len(anchors[0]), anchors[0].device
        dtype, first = similarity_dtype(*anchors, *keys), plan.ranks.rank * b
        needed = [need and plan.will_differentiate for need in ctx.needs_input_grad[1:]]
        wanted = [*(needed[k] or needed[m + k] for k in range(m)), *needed[2 * m :]]
        with purpose(FEATURES):
            columns = [all_gather(x, plan.ranks).to(dtype) for x in keys]  # (B, D) each
        positives = torch.arange(first, first + b, device=device)
        gradients = [
            torch.zeros_like(x, dtype=dtype if x.is_floating_point() else None) if need else None
            for x, need in zip((*anchors, *columns, *others), needed, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float64, device=device)
        size = rows_at_once(len(columns[0]))
        for start in range(0, b, size):
            here = slice(start, start + size)
            rows = [x[here].to(dtype) for x in anchors]
            given = [x[here] if k < plan.per_row else x for k, x in enumerate(others)]
            with torch.autocast(device.type, enabled=False), torch.set_grad_enabled(any(needed)):
                blocks = [x @ y.T for x, y in zip(rows, columns, strict=True)]
                leaves = [x.detach().requires_grad_(want) for x, want in zip((*blocks, *given), wanted, strict=True)]
                found = plan.fn(*leaves[:m], positives[here], *leaves[m:])
                if found.shape != positives[here].shape:
                    got = tuple(found.shape)
                    raise ValueError(f"fn: expected a number of each of the block's {len(rows[0])} rows, got {got}")
                ours = [x for x in leaves if x.requires_grad]
                made = iter(torch.autograd.grad(found.sum(), ours) if ours else ())
            total += found.detach().double().sum()
            for k in range(m):
                if wanted[k]:
                    weights, left, right = next(made), gradients[k], gradients[m + k]
                    if left is not None:
                        torch.mm(weights, columns[k], out=left[here])
                    if right is not None:
                        right.addmm_(weights.T, rows[k])
            for k, gradient in enumerate(gradients[2 * m :]):
                if gradient is not None:
                    (gradient[here] if k < plan.per_row else gradient).add_(next(made))
        ctx.plan, ctx.count, ctx.dtypes = plan, b, [x.dtype for x in inputs]
        ctx.save_for_backward(*gradients)
        return (total / b).to(dtype)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        m = ctx.plan.products
        found = [None if x is None else x * (upstream / ctx.count) for x in ctx.saved_tensors]
        with purpose(FEATURES):
            found[m : 2 * m] = [None if x is None else reduce_scatter(x, ctx.plan.ranks) for x in found[m : 2 * m]]
        return None, *(None if x is None else x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))


def checked(
    anchors: Tensor,
    keys: Tensor,
    beside: tuple[Tensor, ...],
    negatives: Negatives,
    names: tuple[str, str, str] = ("anchors", "keys", "per_row"),
) -> Group:
    """The ranks whose keys are columns, if the shapes fit; else an error with the caller's names."""
    if anchors.ndim != 2 or keys.shape[1:] != anchors.shape[1:]:
        raise ValueError(
            f"{names[1]}: expected (b, D) like {names[0]}, which are {tuple(anchors.shape)}, got {tuple(keys.shape)}"
        )
    for name, x in ((names[1], keys), *((f"{names[2]}[{i}]", x) for i, x in enumerate(beside))):
        if len(x) != len(anchors):
            raise ValueError(f"{name}: expected {len(anchors)} rows, as many as {names[0]}, got {len(x)}")
    ranks = group(negatives)
    check_even(len(keys), keys.shape[1], ranks)
    return ranks


def rows_at_once(columns: int) -> int:
    """Rows of a block of so many columns."""
    chunk = settings.current().chunk
    return max(1, BLOCK_NUMBERS // columns) if chunk == "auto" else chunk
