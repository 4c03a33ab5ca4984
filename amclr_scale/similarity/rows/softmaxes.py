"""Softmaxes over rows and over columns of any function of similarities, both from one pass over row blocks.

b  rows on this rank    B  columns, over all ranks    c  rows in one block    D  embedding width

With m pairs of rows a and columns k, numbers n_j of a column and numbers shared by all, a function of the entries gives

    x_ij, y_ij = f(a^1_i . k^1_j, ..., a^m_i . k^m_j, n_j, shared)
    log_sum_i  = log sum_j exp(x_ij)        expected_i = sum_j p_ij y_ij,  p_ij = exp(x_ij - log_sum_i)
    mean_i     = (1/B) sum_j y_ij           positive_i = y_ii

and for a column the same sums over i. Forward makes each block once, and keeps numbers per row and per column; backward
makes it again, takes both directions' gradients from it, and multiplies it with rows and with columns: 4 m products,
where one direction at a time (`mean_rows`) has 6 m. Every rank has its own rows and all columns, so sums over a column
are exchanged, as the gradients of columns are. Similarities and sums are float32 (float64 for float64 features).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import Group, all_gather, exchange, reduce_scatter
from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.distributed.purpose import purpose
from amclr_scale.similarity.backends import similarity_dtype
from amclr_scale.similarity.blocks import LOWEST, MASKED
from amclr_scale.similarity.keys import FEATURES
from amclr_scale.similarity.rows.functions import checked, rows_at_once

EntryFunction = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Softmax:
    """One direction; tensors (b,) over this rank's anchors, differentiable."""

    log_sum: Tensor
    expected: Tensor  # nan where it was not asked for
    mean: Tensor  # likewise
    positive: Tensor  # the same in both directions


def softmaxes(
    fn: EntryFunction,
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    *,
    per_column: tuple[Tensor, ...] = (),
    shared: tuple[Tensor, ...] = (),
    expected: bool = False,
    mean: bool = False,
    exclude_positive: bool = False,
) -> tuple[Softmax, Softmax]:
    """The softmaxes of rows, and those of columns.

    Args:
        fn: `fn(*blocks, *per_column, *shared) -> (x, y)`, of m blocks (c, B) and all columns' numbers (B,); a pure
            function of each entry by itself, which runs once in forward and once in backward. y may be x.
        rows: m of (b, D).
        columns: m of (b, D), this rank's part.
        per_column: tensors (b,), this rank's part.
        shared: tensors of which it gets all; what it captures gets no gradient.
        expected, mean: whether these are wanted, which takes passes over the block.
        exclude_positive: positives are in no softmax; they count in the mean.

    Raises:
        ValueError: shapes that do not fit.
    """
    for left, right in zip(rows, columns, strict=True):
        ranks = checked(left, right, per_column, "all", ("rows", "columns", "per_column"))
    size = rows_at_once(len(columns[0]) * ranks.size)
    plan = _Plan(fn, ranks, size, len(rows), len(per_column), expected, mean, exclude_positive)
    found = _Softmaxes.apply(plan, *rows, *columns, *per_column, *shared)  # type: ignore[no-untyped-call]
    row_sum, row_expected, row_mean, column_sum, column_expected, column_mean, positive = found
    return (
        Softmax(row_sum, row_expected, row_mean, positive),
        Softmax(column_sum, column_expected, column_mean, positive),
    )


@dataclass(frozen=True)
class _Plan:
    fn: EntryFunction
    ranks: Group
    size: int  # rows of a block, in backward as in forward
    products: int  # m
    per_column: int
    expected: bool
    mean: bool
    exclude_positive: bool

    def gathered(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs with all ranks' columns in place of this rank's, in the precision of similarities."""
        m, dtype = self.products, similarity_dtype(*inputs[: 2 * self.products])
        with purpose(FEATURES):
            every = [all_gather(x, self.ranks) if self.of_columns(k) else x.detach() for k, x in enumerate(inputs)]
        return tuple(x.to(dtype) if k < 2 * m else x for k, x in enumerate(every))

    def of_columns(self, k: int) -> bool:
        """Whether the k-th input is one of columns."""
        return self.products <= k < 2 * self.products + self.per_column

    def blocks(self, given: tuple[Tensor, ...]) -> list[slice]:
        """Rows of a block at a time."""
        b = len(given[0])
        return [slice(start, min(start + self.size, b)) for start in range(0, b, self.size)]

    def products_of(self, given: tuple[Tensor, ...], here: slice) -> list[Tensor]:
        """The m blocks of these rows."""
        m = self.products
        return [left[here] @ right.T for left, right in zip(given[:m], given[m : 2 * m], strict=True)]

    def positives(self, block: Tensor, here: slice) -> Tensor:
        """A view of those of a block (c, B) of these rows."""
        first = self.ranks.rank * (block.shape[1] // self.ranks.size) + here.start
        return block[:, first:].diagonal()[: len(block)]


@dataclass
class _Sums:
    """Of n anchors over the keys seen so far, in place."""

    shift: Tensor  # (n,)
    mass: Tensor  # sum_j exp(x_ij - shift_i)
    moment: Tensor  # sum_j exp(x_ij - shift_i) y_ij
    total: Tensor  # sum_j y_ij
    plan: _Plan

    @classmethod
    def empty(cls, plan: _Plan, like: Tensor, n: int) -> "_Sums":
        mass, moment, total = like.new_zeros(3, n)
        return cls(like.new_full((n,), LOWEST), mass, moment, total, plan)

    def add(self, part: slice, x: Tensor, y: Tensor, dim: int) -> None:
        """Further keys, along `dim`, of some anchors."""
        shift = x.amax(dim).clamp_(min=LOWEST)
        e = (x - shift.unsqueeze(dim)).exp_()
        mass, nan = e.sum(dim), torch.full_like(shift, torch.nan)
        total = y.sum(dim) if self.plan.mean else nan
        self.join(part, shift, mass, e.mul_(y).sum(dim) if self.plan.expected else nan, total)

    def join(self, part: slice, shift: Tensor, mass: Tensor, moment: Tensor, total: Tensor) -> None:
        """Sums over other keys, whatever their shift."""
        new = torch.maximum(self.shift[part], shift)
        keep, take = (self.shift[part] - new).exp(), (shift - new).exp()
        self.mass[part] = keep * self.mass[part] + take * mass
        self.moment[part] = keep * self.moment[part] + take * moment
        self.total[part] += total
        self.shift[part] = new

    def found(self, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """log_sum, expected and mean; an anchor without keys has -inf and 0."""
        expected = torch.where(self.mass > 0, self.moment / self.mass, 0.0)
        return self.shift + self.mass.log(), expected, self.total / keys


class _Softmaxes(torch.autograd.Function):
    """(plan, inputs) -> log_sum, expected, mean of rows, the same of columns, and positives: (b,) each."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = plan.gathered(inputs)
        like, b, B = given[0], len(given[0]), len(given[plan.products])
        rows, columns, own = (_Sums.empty(plan, like, n) for n in (b, B, b))
        positive = like.new_empty(b)
        with torch.autocast(like.device.type, enabled=False):
            for here in plan.blocks(given):
                x, y = plan.fn(*plan.products_of(given, here), *given[2 * plan.products :])
                positive[here] = plan.positives(y, here)
                if plan.exclude_positive:
                    x = x.clone()  # y may be x, and x one of the blocks
                    plan.positives(x, here).fill_(MASKED)
                rows.add(here, x, y, 1)
                columns.add(slice(None), x, y, 0)
        parts = torch.stack([columns.shift, columns.mass, columns.moment, columns.total])
        for part in exchange(parts.view(4, plan.ranks.size, b).transpose(0, 1), plan.ranks):
            own.join(slice(None), *part)
        found = (*rows.found(B), *own.found(B))
        ctx.plan, ctx.dtypes = plan, [x.dtype for x in inputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*found[:2], *found[3:5], *given)
        return *found, positive

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        row_sum, row_expected, column_sum, column_expected, *given = ctx.saved_tensors
        m, needed = plan.products, ctx.needs_input_grad[1:]
        rows = _Weights(row_sum, row_expected, *upstream[:3])
        columns = _Weights(column_sum, column_expected, *upstream[3:6]).of_all(plan.ranks)
        found = [torch.zeros_like(x) if need else None for x, need in zip(given, needed, strict=True)]
        with torch.autocast(given[0].device.type, enabled=False):
            for here in plan.blocks(given):
                leaves = [*plan.products_of(given, here), *(x.detach() for x in given[2 * m :])]
                wanted = [*(needed[k] or needed[m + k] for k in range(m)), *needed[2 * m :]]
                with torch.enable_grad():
                    x, y = plan.fn(*(leaf.requires_grad_(want) for leaf, want in zip(leaves, wanted, strict=True)))
                d_x = torch.zeros_like(x)
                d_y = d_x if y is x else torch.zeros_like(y)
                rows[here].add_to(d_x, d_y, x.detach(), y.detach(), 1, plan, here)
                columns.add_to(d_x, d_y, x.detach(), y.detach(), 0, plan, here)
                if upstream[6] is not None:
                    plan.positives(d_y, here).add_(upstream[6][here])
                made = _pulled_back([(x, d_x)] if y is x else [(x, d_x), (y, d_y)], leaves)
                for k, weights in enumerate(made[:m]):
                    left, right = found[k], found[m + k]
                    if left is not None and weights is not None:
                        torch.mm(weights, given[m + k], out=left[here])
                    if right is not None and weights is not None:
                        right.addmm_(weights.T, given[k][here])
                for total, gradient in zip(found[2 * m :], made[m:], strict=True):
                    if total is not None and gradient is not None:
                        total.add_(gradient)
        with purpose(FEATURES):
            whole = [
                x if x is None or not plan.of_columns(k) else reduce_scatter(x, plan.ranks) for k, x in enumerate(found)
            ]
        return None, *(None if x is None else x.to(dtype) for x, dtype in zip(whole, ctx.dtypes, strict=True))


@dataclass(frozen=True)
class _Weights:
    """What makes one direction's gradients of a block: numbers of its anchors (n,)."""

    log_sum: Tensor
    expected: Tensor
    d_log_sum: Tensor | None  # upstream gradients; None: of what nobody used
    d_expected: Tensor | None
    d_mean: Tensor | None

    def of_all(self, ranks: Group) -> "_Weights":
        """Those of all ranks' anchors."""
        return self._each(lambda x: all_gather(x, ranks))

    def __getitem__(self, part: slice) -> "_Weights":
        return self._each(lambda x: x[part])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "_Weights":
        return replace(self, **{name: change(x) for name, x in vars(self).items() if x is not None})

    def add_to(self, d_x: Tensor, d_y: Tensor, x: Tensor, y: Tensor, dim: int, plan: _Plan, here: slice) -> None:
        """Add what the sums along `dim` say to the gradients of x and y (c, B)."""

        def beside(numbers: Tensor) -> Tensor:
            return numbers.unsqueeze(dim)

        if self.d_log_sum is not None or self.d_expected is not None:
            p = (x - beside(self.log_sum)).exp_()
            if plan.exclude_positive:
                plan.positives(p, here).zero_()
            if self.d_log_sum is not None:
                d_x.addcmul_(p, beside(self.d_log_sum))
            if self.d_expected is not None:
                p.mul_(beside(self.d_expected))
                d_x.addcmul_(p, y - beside(self.expected))
                d_y.add_(p)
        if self.d_mean is not None:
            d_y.add_(beside(self.d_mean / y.shape[1]))


def _pulled_back(outputs: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor | None]:
    """From gradients of a function's outputs to those of its inputs; None where there is none."""
    ours = [leaf for leaf in leaves if leaf.requires_grad]
    differentiable = [(out, d) for out, d in outputs if out.requires_grad]
    if not differentiable:
        return [None] * len(leaves)
    outs, ds = zip(*differentiable, strict=True)
    made = iter(torch.autograd.grad(outs, ours, ds, allow_unused=True))
    return [next(made) if leaf.requires_grad else None for leaf in leaves]
