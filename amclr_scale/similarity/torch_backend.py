"""Blocks of similarities in plain PyTorch, on any device: a few preallocated tiles, nothing waits for the device.

r, c  rows and columns of a tile    b  anchors    n  keys of a block    D  width

A tile is small enough to stay in cache, so the element-wise work between two matrix products costs some percent of
them. Features of bfloat16 on CUDA are multiplied as they are, with float32 results; others are widened tile by tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.similarity.blocks import MASKED, Sigmoid, Statistics, TileCache, Weights
from amclr_scale.similarity.settings import Settings

_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype_out")  # bfloat16 matrices, float32 product: torch 2.8 and later


def tile_shape(settings: Settings, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile, measured to be near the speed of one large product."""
    if settings.chunk != "auto":
        return settings.chunk, settings.chunk
    if device.type == "cuda":
        return 4096, 4096
    return (1024, 1024) if torch.get_num_threads() == 1 else (2048, 2048)  # threads wait for one another: meet less


@dataclass(frozen=True)
class _Tile:
    rows: slice
    columns: slice
    left: Tensor  # (r, D) anchors, ready to be multiplied
    right: Tensor  # (c, D) keys

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


class TorchBlocks:
    """`Blocks` with torch.mm and element-wise functions."""

    def __init__(self, settings: Settings, dtype: torch.dtype, like: Tensor):
        self.dtype, self.device = dtype, like.device
        self.shape = tile_shape(settings, like.device)
        narrow = like.dtype == torch.bfloat16 and like.is_cuda and _WIDE_PRODUCTS
        self.operand = torch.bfloat16 if narrow else dtype  # what matrix products read
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
        cache: TileCache | None = None,
    ) -> None:
        for tile in self._tiles(anchors, keys):
            buffer, x, e = self._buffers(tile)
            similarities = self._similarities(tile, cache.room(buffer) if cache else buffer)
            found = tile.diagonal(similarities, diagonal)
            if found and positive is not None:
                positive[found[0]] = found[1]
            if found and exclude_positive:
                found[1].fill_(MASKED)
            sides = [(rows[tile.rows], 1)] + ([(columns[tile.columns], 0)] if columns else [])
            for side, dim in sides:
                shift = torch.maximum(similarities.amax(dim), side.shift)
                torch.sub(similarities, shift.unsqueeze(dim), out=x).mul_(side.rate.unsqueeze(dim))
                torch.exp2(x, out=e)
                side.add(shift, e.sum(dim), x.mul_(e).sum(dim))

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
        cache: TileCache | None = None,
    ) -> None:
        for tile in self._tiles(anchors, keys):
            buffer, weights, more = self._buffers(tile)
            similarities = cache.take() if cache else None
            if similarities is None:
                similarities = self._similarities(tile, buffer)
            sides = ([(rows[tile.rows], 1)] if rows else []) + ([(columns[tile.columns], 0)] if columns else [])
            for (side, dim), out in zip(sides, (weights, more), strict=False):
                torch.sub(similarities, side.shift.unsqueeze(dim), out=out).mul_(side.rate.unsqueeze(dim))
                out.exp2_().mul_(side.factor.unsqueeze(dim))
            if not sides:
                weights.zero_()
            elif len(sides) == 2:
                weights.add_(more)
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

    def _tiles(self, anchors: Tensor, keys: Tensor) -> Iterator[_Tile]:
        r, c = self.shape
        for row in range(0, len(anchors), r):
            rows = slice(row, min(row + r, len(anchors)))
            left = anchors[rows].to(self.operand)
            for column in range(0, len(keys), c):
                columns = slice(column, min(column + c, len(keys)))
                yield _Tile(rows, columns, left, keys[columns].to(self.operand))

    def _buffers(self, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
        r, c = len(tile.left), len(tile.right)
        if not self.buffers or self.buffers[0].numel() < r * c:
            self.buffers = [torch.empty(r * c, dtype=self.dtype, device=self.device) for _ in range(3)]
        first, second, third = (buffer[: r * c].view(r, c) for buffer in self.buffers)
        return first, second, third

    def _similarities(self, tile: _Tile, out: Tensor) -> Tensor:
        if self.operand == self.dtype:
            return torch.mm(tile.left, tile.right.T, out=out)
        torch.ops.aten.mm.dtype_out(tile.left, tile.right.T, self.dtype, out=out)
        return out

    def _add_gradients(self, tile: _Tile, weights: Tensor, d_anchors: Tensor | None, d_keys: Tensor | None) -> None:
        weights = weights.to(self.operand)
        for out, matrix, features in (
            (None if d_anchors is None else d_anchors[tile.rows], weights, tile.right),
            (None if d_keys is None else d_keys[tile.columns], weights.T, tile.left),
        ):
            if out is None:
                continue
            if self.operand == self.dtype:
                out.addmm_(matrix, features)
            else:
                torch.ops.aten.addmm.dtype_out(out, matrix, features, self.dtype, out=out)
