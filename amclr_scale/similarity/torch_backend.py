"""Blocks of similarities in plain PyTorch, on any device: a few preallocated tiles, nothing waits for the device.

r, c  rows and columns of a tile    b  anchors    n  keys of a block    D  width

A tile is small enough to stay in cache, so the element-wise work between two matrix products costs some percent of
them. Operands are made tile by tile, in the form that `precision.py` describes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.similarity.blocks import LOWEST, MASKED, Mask, Sigmoid, Statistics, TileCache, Weights
from amclr_scale.similarity.precision import NARROW, WIDE_PRODUCTS, Form, Operand, add_product, operand, weight_parts
from amclr_scale.similarity.settings import Settings

BUFFERS = 3  # of a tile's size
COMMON_RANGE = 100.0  # powers of two that one exponential spans for both directions; float32 has 126
COMMON_SIZE = 2**18  # similarities of a block from which one is looked for: in small ones it saves nothing
WHOLE = 2**24  # float32 has whole numbers below exactly


def tile_shape(settings: Settings, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile, measured to be near the speed of one large product."""
    if settings.chunk != "auto":
        return settings.chunk, settings.chunk
    if device.type == "cuda":
        return 4096, 4096
    # Threads wait for one another: meet less. Rows a power of two apart would share their places in a cache.
    return (768, 768) if torch.get_num_threads() == 1 else (2048, 2048)


@dataclass(frozen=True)
class Tile:
    rows: slice
    columns: slice
    left: Operand  # (r, D) anchors
    right: Operand  # (c, D) keys

    def diagonal(self, matrix: Tensor, first: int | None) -> tuple[slice, Tensor] | None:
        """The anchors whose positive lies in this tile, and a view of those entries of a matrix (r, c)."""
        if first is None:
            return None
        start = max(self.rows.start, self.columns.start - first)
        stop = min(self.rows.stop, self.columns.stop - first)
        if start >= stop:
            return None
        row, column = start - self.rows.start, start + first - self.columns.start
        return slice(start, stop), matrix[row:, column:].diagonal()[: stop - start]


@dataclass(frozen=True)
class LeftOut:
    """What a mask leaves out of a tile."""

    mask: Mask | None  # of the tile
    tile: Tile
    diagonal: int | None

    def of_groups(self, matrix: Tensor, value: float) -> None:
        """Set those entries of a matrix (r, c) that neither direction counts."""
        if self.mask is None or not self.mask.row_groups:
            return
        pairs = [x[:, None] == y for x, y in zip(self.mask.row_groups, self.mask.column_groups, strict=True)]
        left_out = pairs[0] if len(pairs) == 1 else pairs[0].logical_or_(pairs[1])
        matrix.masked_fill_(self._but_positives(left_out.logical_not_() if self.mask.only_same else left_out), value)

    def above_limit(self, matrix: Tensor, similarities: Tensor, dim: int, value: float, out: Tensor) -> Tensor:
        """`matrix` with those set that the sums along `dim` do not count, in `out`."""
        limit = None if self.mask is None else (self.mask.row_limit if dim == 1 else self.mask.column_limit)
        if limit is None:
            return matrix
        left_out = self._but_positives(similarities > limit.unsqueeze(dim))
        return torch.where(left_out, matrix.new_tensor(value), matrix, out=out)

    def _but_positives(self, left_out: Tensor) -> Tensor:
        if found := self.tile.diagonal(left_out, self.diagonal):
            found[1].fill_(False)
        return left_out


@dataclass(frozen=True)
class Common:
    """One exponential for both directions, e_ij = 2^(rate s_ij - offset), where all anchors have one temperature.

    What an anchor's own shift and rate would have made is e_ij times a number of that anchor. So the exponentials of a
    tile, most of what is not a product, are made once.
    """

    rate: float
    offset: int

    @classmethod
    def of_sums(cls, anchors: Tensor, keys: Tensor, rows: Statistics, columns: Statistics) -> "Common | None":
        """Around the largest similarity there can be; None where rates differ or the least might underflow."""
        rate = same_number(rows.rate, columns.rate)
        largest = float(anchors.norm(dim=1).max() * keys.norm(dim=1).max())
        # True of no number that is not finite.
        return cls(rate, math.ceil(rate * largest)) if rate and 2 * rate * largest <= COMMON_RANGE else None

    @classmethod
    def of_weights(cls, rows: Weights, columns: Weights) -> "Common | None":
        """Around the largest shift; None where rates differ or shifts are too far apart."""
        rate = same_number(rows.rate, columns.rate)
        least, most = torch.cat((rows.shift, columns.shift)).aminmax()
        near = rate * float(most - least) <= COMMON_RANGE and rate * float(most.abs()) < WHOLE
        return cls(rate, math.ceil(rate * float(most))) if rate and near else None

    def exponents(self, similarities: Tensor, out: Tensor) -> Tensor:
        return torch.add(similarities.new_tensor(-self.offset), similarities, alpha=self.rate, out=out)

    def add(self, side: Statistics, mass: Tensor, moment: Tensor) -> None:
        """Add sums (n,) in float64, of e_ij and of e_ij times its exponent, to the statistics of a direction (n,)."""
        counted = mass > 0
        shift = ((self.offset + mass.log2()) / self.rate).to(side.shift.dtype)  # then the mass is 1, but for rounding
        rest = self.offset - shift.double() * self.rate
        scale = rest.exp2()
        side.add(
            torch.where(counted, shift, LOWEST),
            torch.where(counted, scale * mass, 0.0).to(side.mass.dtype),
            torch.where(counted, scale * (moment + rest * mass), 0.0).to(side.moment.dtype),
        )

    def factor(self, side: Weights) -> Tensor:
        """(n,) what e_ij is multiplied by in the weights of a direction."""
        return (side.factor.double() * (self.offset - side.shift.double() * self.rate).exp2()).to(side.factor.dtype)


def same_number(*numbers: Tensor) -> float:
    """The number that all of them are; 0 where they differ."""
    least, most = torch.cat(numbers).aminmax()
    return float(most) if bool(least == most) else 0.0


class TorchBlocks:
    """`Blocks` with torch.mm and element-wise functions."""

    def __init__(self, settings: Settings, dtype: torch.dtype, form: Form, device: torch.device):
        self.dtype, self.form, self.device = dtype, form, device
        self.shape = tile_shape(settings, device)
        # What 16-bit operands are multiplied as, where that is not their own type.
        self.widen = dtype if form in NARROW and not (device.type == "cuda" and WIDE_PRODUCTS) else None
        self.buffers: list[Tensor] = []

    def accumulate(
        self,
        anchors: Tensor,
        keys: Tensor,
        rows: Statistics,
        columns: Statistics | None = None,
        *,
        diagonal: int | None = None,
        positive: Tensor | None = None,
        exclude_positive: bool = False,
        mask: Mask | None = None,
        cache: TileCache | None = None,
    ) -> None:
        common = (
            Common.of_sums(anchors, keys, rows, columns) if columns and self._may_look(anchors, keys, mask) else None
        )
        # Mass and moment of both directions; float64, since they are added up over tiles around one offset.
        sums = [torch.zeros(2, len(x), dtype=torch.float64) for x in (anchors, keys)] if common else []
        for tile in self._tiles(anchors, keys):
            buffer, x, e = self._buffers(tile)
            similarities = self._similarities(tile, cache.room(buffer) if cache else buffer)
            found = tile.diagonal(similarities, diagonal)
            if found and positive is not None:
                positive[found[0]] = found[1]
            if found and exclude_positive:
                found[1].fill_(MASKED)
            left_out = LeftOut(mask and mask[tile.rows, tile.columns], tile, diagonal)
            left_out.of_groups(similarities, MASKED)
            if common:
                torch.exp2(common.exponents(similarities, out=x), out=e)
                x.mul_(e)
                for (mass, moment), part, dim in zip(sums, (tile.rows, tile.columns), (1, 0), strict=True):
                    mass[part] += e.sum(dim)
                    moment[part] += x.sum(dim)
                continue
            sides = [(rows[tile.rows], 1)] + ([(columns[tile.columns], 0)] if columns else [])
            for side, dim in sides:
                counted = similarities
                if mask and mask.limited:  # of this direction alone
                    counted = left_out.above_limit(similarities, similarities, dim, MASKED, out=x)
                shift = torch.maximum(counted.amax(dim), side.shift)
                torch.sub(counted, shift.unsqueeze(dim), out=x).mul_(side.rate.unsqueeze(dim))
                torch.exp2(x, out=e)
                side.add(shift, e.sum(dim), x.mul_(e).sum(dim))
        if common and columns:
            for side, (mass, moment) in zip((rows, columns), sums, strict=True):
                common.add(side, mass, moment)

    def differentiate(
        self,
        anchors: Tensor,
        keys: Tensor,
        rows: Weights | None,
        columns: Weights | None = None,
        *,
        d_anchors: Tensor | None = None,
        d_keys: Tensor | None = None,
        diagonal: int | None = None,
        positive_weight: Tensor | None = None,
        mask: Mask | None = None,
        cache: TileCache | None = None,
    ) -> None:
        common = Common.of_weights(rows, columns) if rows and columns and self._may_look(anchors, keys, mask) else None
        factors = [common.factor(side) for side in (rows, columns) if side] if common else []
        for tile in self._tiles(anchors, keys):
            buffer, weights, more = self._buffers(tile)
            similarities = cache.take() if cache else None
            if similarities is None:
                similarities = self._similarities(tile, buffer)
            sides = ([(rows[tile.rows], 1)] if rows else []) + ([(columns[tile.columns], 0)] if columns else [])
            left_out = LeftOut(mask and mask[tile.rows, tile.columns], tile, diagonal)
            if common:
                torch.add(factors[0][tile.rows, None], factors[1][tile.columns], out=more)
                common.exponents(similarities, out=weights).exp2_().mul_(more)
                sides = []
            for (side, dim), out in zip(sides, (weights, more), strict=False):
                torch.sub(similarities, side.shift.unsqueeze(dim), out=out).mul_(side.rate.unsqueeze(dim))
                out.exp2_().mul_(side.factor.unsqueeze(dim))
                left_out.above_limit(out, similarities, dim, 0.0, out=out)
            if not sides and not common:
                weights.zero_()
            elif len(sides) == 2:
                weights.add_(more)
            left_out.of_groups(weights, 0.0)
            found = tile.diagonal(weights, diagonal)
            if found and positive_weight is not None:
                found[1].copy_(positive_weight[found[0]])
            self._add_gradients(tile, weights, d_anchors, d_keys)

    def sigmoid(
        self,
        anchors: Tensor,
        keys: Tensor,
        numbers: Sigmoid,
        *,
        d_anchors: Tensor | None = None,
        d_keys: Tensor | None = None,
        diagonal: int | None = None,
    ) -> None:
        for tile in self._tiles(anchors, keys):
            buffer, logits, weights = self._buffers(tile)
            similarities = self._similarities(tile, buffer)
            torch.mul(similarities, numbers.scale, out=logits).add_(numbers.bias)
            if found := tile.diagonal(logits, diagonal):
                found[1].neg_()  # now -y r everywhere
            torch.sigmoid(logits, out=weights)
            if found := tile.diagonal(weights, diagonal):
                found[1].neg_()
            numbers.loss.add_(F.softplus(logits).sum(1).double().sum())
            numbers.d_bias.add_(weights.sum(1).double().sum())
            numbers.d_scale.add_(torch.mul(similarities, weights, out=logits).sum(1).double().sum())
            self._add_gradients(tile, weights, d_anchors, d_keys)

    def _may_look(self, anchors: Tensor, keys: Tensor, mask: Mask | None) -> bool:
        """Whether to look for a common exponential: elsewhere than on a CPU looking at numbers is a wait."""
        large = len(anchors) * len(keys) >= COMMON_SIZE
        return large and self.device.type == "cpu" and not (mask and mask.limited)

    def _tiles(self, anchors: Tensor, keys: Tensor) -> Iterator[Tile]:
        r, c = self.shape
        for row in range(0, len(anchors), r):
            rows = slice(row, min(row + r, len(anchors)))
            left = self._operand(anchors[rows], left=True)
            for column in range(0, len(keys), c):
                columns = slice(column, min(column + c, len(keys)))
                yield Tile(rows, columns, left, self._operand(keys[columns], left=False))

    def _operand(self, x: Tensor, *, left: bool) -> Operand:
        return operand(x, self.form, left=left, widen=self.widen)

    def _buffers(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        r, c = len(tile.left.product), len(tile.right.product)
        if not self.buffers or self.buffers[0].numel() < r * c:
            self.buffers = [torch.empty(r * c, dtype=self.dtype, device=self.device) for _ in range(BUFFERS)]
        first, second, third = (buffer[: r * c].view(r, c) for buffer in self.buffers)
        return first, second, third

    def _similarities(self, tile: Tile, out: Tensor) -> Tensor:
        left, right = tile.left.product, tile.right.product
        if left.dtype == self.dtype:
            return torch.mm(left, right.T, out=out)
        torch.ops.aten.mm.dtype_out(left, right.T, self.dtype, out=out)
        return out

    def _add_gradients(self, tile: Tile, weights: Tensor, d_anchors: Tensor | None, d_keys: Tensor | None) -> None:
        parts = weight_parts(weights, self.form, self.widen)
        if d_anchors is not None:
            add_product(d_anchors[tile.rows], parts, tile.right.parts)
        if d_keys is not None:
            add_product(d_keys[tile.columns], [part.T for part in parts], tile.left.parts)
