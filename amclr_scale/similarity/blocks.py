"""The seam between mathematics and hardware: what is done with one block of keys.

b  anchors    n  keys of the block    D  width

With s_ij = anchor_i . key_j, everything here is a function of s, of numbers per anchor, and of numbers per key (a key
is an anchor of the other direction, so that one block of s serves both directions):

    statistics    shift_i = max_j s_ij,  mass_i = sum_j e_ij,  moment_i = sum_j e_ij x_ij
                  x_ij = (s_ij - shift_i) rate_i,  e_ij = 2^x_ij,  rate_i = log2(e) / t_i
    weights       W_ij = rows.factor_i    2^((s_ij - rows.shift_i)    rows.rate_i)
                       + columns.factor_j 2^((s_ij - columns.shift_j) columns.rate_j)
    gradients     d_anchors_i += sum_j W_ij key_j,    d_keys_j += sum_i W_ij anchor_i

(shift, mass) stay a pair: one float32 logarithm of the two, about 60 at a temperature of 0.01, would lose the last
digits of every weight. The shift is subtracted before the product with 1/t, when the subtraction is still exact.

Where a `Mask` leaves an entry out, e_ij and its part of W_ij are set to 0; a product with 0 would be nan at infinity.

A backend is one class with the three methods of `Blocks`; `torch_backend.py` has the one that runs everywhere.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LOWEST = -1e30  # below every similarity, yet finite: a mass of 0 times a shift from here is 0, not nan
MASKED = 2 * LOWEST  # an entry that counts nothing, even in a row that is masked altogether


@dataclass
class Statistics:
    """Running sums over the keys seen so far, one of each per anchor; updated in place."""

    rate: Tensor  # (n,) log2(e) / temperature
    shift: Tensor  # (n,)
    mass: Tensor  # (n,)
    moment: Tensor  # (n,)

    @classmethod
    def empty(cls, rate: Tensor) -> "Statistics":
        return cls(rate, torch.full_like(rate, LOWEST), torch.zeros_like(rate), torch.zeros_like(rate))

    def __getitem__(self, part: slice) -> "Statistics":
        return Statistics(self.rate[part], self.shift[part], self.mass[part], self.moment[part])

    def add(self, shift: Tensor, mass: Tensor, moment: Tensor) -> None:
        """Add the sums over other keys, whatever their shift."""
        new = torch.maximum(self.shift, shift)
        ours, theirs = (self.shift - new) * self.rate, (shift - new) * self.rate
        keep, take = ours.exp2(), theirs.exp2()
        self.moment.copy_(keep * (self.moment + ours * self.mass) + take * (moment + theirs * mass))
        self.mass.copy_(keep * self.mass + take * mass)
        self.shift.copy_(new)


@dataclass(frozen=True)
class Weights:
    """What makes weights of similarities, one of each per anchor."""

    rate: Tensor  # (n,)
    shift: Tensor  # (n,)
    factor: Tensor  # (n,) upstream gradient / (temperature mass)

    def __getitem__(self, part: slice) -> "Weights":
        return Weights(self.rate[part], self.shift[part], self.factor[part])


Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Mask:
    """Which entries count nothing; a positive is never one of them.

    Groups are one number per anchor and key, or two of each: entries are left out where any of them agrees, or with
    `only_same` where none does. They are symmetrical: rows and columns leave the same entries out. Limits are of a
    direction: its sums leave out what is more similar.
    """

    row_groups: Parts = ()  # none, one or two of (b,) int64
    column_groups: Parts = ()  # as many of (n,)
    only_same: bool = False
    row_limit: Tensor | None = None  # (b,)
    column_limit: Tensor | None = None  # (n,)

    def __getitem__(self, part: tuple[slice, slice]) -> "Mask":
        rows, columns = part
        return Mask(
            tuple(x[rows] for x in self.row_groups),
            tuple(x[columns] for x in self.column_groups),
            self.only_same,
            None if self.row_limit is None else self.row_limit[rows],
            None if self.column_limit is None else self.column_limit[columns],
        )

    def turned(self) -> "Mask":
        """With rows and columns swapped."""
        return Mask(self.column_groups, self.row_groups, self.only_same, self.column_limit, self.row_limit)

    @property
    def limited(self) -> bool:
        return self.row_limit is not None


@dataclass(frozen=True)
class Sigmoid:
    """The numbers of a sigmoid loss with r_ij = scale s_ij + bias; the sums are updated in place."""

    scale: Tensor  # ()
    bias: Tensor  # ()
    loss: Tensor  # () float64, sum of -log sigmoid(y r)
    d_scale: Tensor  # () float64, sum of Q s, with Q = -y sigmoid(-y r)
    d_bias: Tensor  # () float64, sum of Q


class TileCache:
    """Tiles of similarities that wait from forward to backward, as many as a budget allows.

    Backward asks for them in the order in which forward made them, so those kept are the first ones.
    """

    def __init__(self, budget: int = 0, tiles: list[Tensor] | None = None):
        self.left = budget
        self.tiles = tiles or []
        self.next = 0

    def room(self, buffer: Tensor) -> Tensor:
        """A tensor like `buffer` that will be kept, or `buffer` itself once the budget is spent."""
        self.left -= buffer.nbytes
        if self.left < 0:
            return buffer
        self.tiles.append(torch.empty_like(buffer))
        return self.tiles[-1]

    def take(self) -> Tensor | None:
        """The next tile, None once there are no more."""
        self.next += 1
        return self.tiles[self.next - 1] if self.next <= len(self.tiles) else None


@dataclass(frozen=True)
class Workspace:
    """What a backend holds while it works on a block, beyond what it is given."""

    rows: int  # of a tile
    columns: int
    entry_bytes: int  # per entry of a tile, all its buffers together
    feature_bytes: int = 0  # per feature that is converted before it is multiplied
    most_feature_bytes: int = 0  # of one side at a time

    def bytes(self, rows: int, keys: int, width: int) -> int:
        """For so many anchors and keys of this width."""
        converted = sum(min(n * width * self.feature_bytes, self.most_feature_bytes) for n in (rows, keys))
        return min(self.rows, rows) * min(self.columns, keys) * self.entry_bytes + converted


class Blocks(Protocol):
    """What a backend computes. Similarities, exponents and sums are float32, or float64 for float64 features.

    `diagonal` is the column of anchor 0's positive in the block (anchor i's is i further, as far as the block goes),
    None if the block holds no positive of these anchors.
    """

    def accumulate(
        self,
        anchors: Tensor,  # (b, D)
        keys: Tensor,  # (n, D)
        rows: Statistics,  # of the b anchors
        columns: Statistics | None = None,  # of the n keys
        *,
        diagonal: int | None = None,
        positive: Tensor | None = None,  # (b,), receives the similarities of the positives
        exclude_positive: bool = False,
        mask: Mask | None = None,
        cache: TileCache | None = None,
    ) -> None:
        """Add the keys to the statistics of the rows, and the anchors to those of the columns."""

    def differentiate(
        self,
        anchors: Tensor,  # (b, D)
        keys: Tensor,  # (n, D)
        rows: Weights | None,
        columns: Weights | None = None,
        *,
        d_anchors: Tensor | None = None,  # (b, D), in the precision of similarities
        d_keys: Tensor | None = None,  # (n, D)
        diagonal: int | None = None,
        positive_weight: Tensor | None = None,  # (b,), the weights of the positives, in place of the formula
        mask: Mask | None = None,
        cache: TileCache | None = None,
    ) -> None:
        """Add the gradients of this block to `d_anchors` and `d_keys`. A direction that is None has no gradient."""

    def sigmoid(
        self,
        anchors: Tensor,  # (b, D)
        keys: Tensor,  # (n, D)
        numbers: Sigmoid,
        *,
        d_anchors: Tensor | None = None,
        d_keys: Tensor | None = None,
        diagonal: int | None = None,
    ) -> None:
        """Add this block's sigmoid losses to `numbers`, and their gradients to `d_anchors` and `d_keys`, in one pass.

        The gradients are with respect to the similarities' logits: the caller multiplies them by the scale.
        """
